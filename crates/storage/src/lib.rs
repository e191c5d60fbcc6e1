#![doc = include_str!("../README.md")]

pub mod advisory;
mod clock;
mod connect;
mod database;
mod error;
mod holds;
mod incarnation;
mod inspect;
mod jobs;
mod keeper;
mod lease;
pub mod migrate;
mod observe;
mod pool;
mod presence;
mod process;
mod queue;
mod signals;
mod startup;
mod statement;
pub mod tenant;
mod tls;
mod transaction;
mod waiting;
mod waits;

pub use advisory::session::PgSessionLock;
pub use advisory::session::force::Terminated;
pub use advisory::transaction::PgTransactionLock;
pub use connect::{ConnectOptions, ConnectOptionsError};
pub use database::Database;
pub use inspect::{HeldView, LockBackend, WaiterView};
pub use jobs::control::{Jobs, RunNow};
pub use jobs::scheduler::{JobScheduler, RunningJobs};
pub use jobs::{Job, JobFailure, JobInfo, JobRun, JobRunInfo, JobWork, RunOutcome, Schedule};
pub use lease::client::{Chosen, ClientLease, ClientLeases, HandedOver};
pub use lease::row::{PgLeaseLock, RowLease};
pub use lease::table::{LeaseColumns, LeaseTable, RowLeaseTable};
pub use pool::{Pool, PoolState};
pub use queue::{
    Dropped, GivenUp, NonRetryable, PgWorkQueue, Processed, Processor, Worker, WorkerHooks, WorkerOptions,
};
pub use startup::{Findings, StartupError};
pub use statement::Prepared;
pub use tenant::TenantGate;
pub use tls::{TlsError, TlsMode};
pub use transaction::{Fenced, Removing, TransactionError, WorkError};
