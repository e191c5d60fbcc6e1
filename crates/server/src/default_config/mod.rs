//! The default configuration of a workspace: keys with values, written one by one or in batches.

pub mod batch;
pub mod model;
pub mod routes;
pub(crate) mod store;
