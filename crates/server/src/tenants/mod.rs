//! Tenants: they own everything else.

pub mod model;
pub(crate) mod owner;
pub mod purge;
pub mod routes;
pub(crate) mod store;
