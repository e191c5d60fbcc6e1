//! Locks for programs in any language, by name: they extend and release them themselves.

pub mod model;
pub(crate) mod routes;
