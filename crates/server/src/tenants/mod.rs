//! Tenants: they own everything else.

pub mod model;
pub mod routes;
pub(crate) mod store;
