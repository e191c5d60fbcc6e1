//! Workspaces: what is locked. One writer each, and every write of what is in one makes exactly one version.

pub(crate) mod known;
pub mod model;
pub mod routes;
pub(crate) mod store;
pub(crate) mod write;
