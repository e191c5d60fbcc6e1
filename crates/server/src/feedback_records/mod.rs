//! Feedback records: rows that belong to a tenant and to a user, who may be one in several tenants and may ask to be
//! forgotten.

pub(crate) mod erasure;
pub mod model;
pub mod routes;
pub(crate) mod store;
