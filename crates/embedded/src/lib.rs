//! A private Postgres from the programs that are already on the machine.
//!
//! Nothing is downloaded and no port is opened: the server listens on a Unix socket in a folder that only
//! its own account can enter. It ends with the process that started it, however that process ends, and what
//! a crash leaves behind is cleaned up by the next start.
//!
//! ```no_run
//! use leasehold_embedded::Cluster;
//!
//! // For people: durable, the data stays in the folder and is found again.
//! let server = Cluster::persistent(".leasehold").start()?;
//! println!("{}", server.url("postgres"));
//!
//! // For tests: fast, not durable, gone when dropped.
//! let scratch = Cluster::temporary().set("max_connections", "400").start()?;
//! # drop(scratch);
//! # Ok::<(), leasehold_embedded::Error>(())
//! ```
//!
//! Which programs are used: those in the folder that the environment variable `PG_BIN` names, else those on
//! `PATH`, else those of the newest version in the usual places ([`Binaries::find`]).
//!
//! Postgres refuses to run as root. When this process is root, the server runs as the user `postgres`, or
//! `nobody` where there is none.
//!
//! # What a crash leaves
//!
//! * This process dies in any way: a watchdog beside the server sees its pipe close and stops the server.
//! * The watchdog dies too: the next start finds the lock of the folder free, stops the orphan and goes on.
//! * The machine or the server dies: the next start recovers as any Postgres does. A process id that was
//!   given to somebody else meanwhile is not taken for ours.

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
