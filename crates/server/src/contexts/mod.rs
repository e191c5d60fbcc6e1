//! Contexts: what overrides the default configuration, and what comes out in the end.

pub mod model;
pub mod resolve;
pub mod routes;
pub(crate) mod store;
