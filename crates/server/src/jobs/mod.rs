//! Jobs: what the service does once a slot, whichever instance does it.

pub mod model;
pub mod routes;
