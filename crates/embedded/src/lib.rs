#![doc = include_str!("../README.md")]

#[cfg(not(unix))]
compile_error!("leasehold-embedded needs Unix sockets and Unix accounts");

mod account;
mod binaries;
mod cluster;
mod error;
mod home;
mod postmaster;
mod temporary;
mod watchdog;

pub use binaries::Binaries;
pub use cluster::{Cluster, ClusterBuilder, Durability};
pub use error::Error;
