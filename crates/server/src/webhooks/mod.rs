//! Webhooks: whom a tenant's events are sent to. Only an admin sees them.

pub mod model;
pub mod routes;
pub(crate) mod store;
