//! Tools to look at Leasehold from outside: at the wire between it and Postgres, at the disk, at the built
//! service over HTTP.

#![expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "tools of tests fail their test"
)]

pub mod database;
pub mod http;
pub mod patience;
pub mod process;
pub mod proxy;
pub mod secrets;
pub mod service;
pub mod wal;
pub mod wire;
