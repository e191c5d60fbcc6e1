//! Work items and dead letters: what of a tenant is still to be done, and what was given up.

pub mod model;
pub mod routes;
