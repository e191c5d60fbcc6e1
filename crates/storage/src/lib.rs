#![doc = include_str!("../README.md")]

pub mod advisory;
mod clock;
mod connect;
mod database;
mod error;
mod holds;
mod incarnation;
mod keeper;
mod lease;
pub mod migrate;
mod observe;
mod pool;
mod presence;
mod process;
mod signals;
mod startup;
mod statement;
pub mod tenant;
mod tls;
mod transaction;
mod waiting;

pub use advisory::session::PgSessionLock;
pub use advisory::transaction::PgTransactionLock;
pub use connect::{ConnectOptions, ConnectOptionsError};
pub use database::Database;
pub use lease::row::{PgLeaseLock, RowLease};
pub use lease::table::{LeaseColumns, LeaseTable, RowLeaseTable};
pub use pool::{Pool, PoolState};
pub use startup::{Findings, StartupError};
pub use statement::Prepared;
pub use tenant::TenantGate;
pub use tls::{TlsError, TlsMode};
pub use transaction::{Fenced, TransactionError, WorkError};
