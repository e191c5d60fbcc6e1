//! Versions: 1, 2, 3, … without gap or double, each with a snapshot of the whole workspace.

pub mod model;
pub mod routes;
pub(crate) mod store;
