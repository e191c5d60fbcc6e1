//! [`Database`]: the entrance. One a process; every lock comes from it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::advisory::session::PgSessionLock;
use crate::advisory::transaction::PgTransactionLock;
use crate::connect::ConnectOptions;
use crate::jobs::control::Jobs;
use crate::jobs::scheduler::JobScheduler;
use crate::lease::row::{PgLeaseLock, RowLease};
use crate::lease::table::LeaseTable;
use crate::pool::Pool;
use crate::process::Process;
use crate::queue::PgWorkQueue;
use crate::startup::{self, Findings, StartupError};
use crate::tenant::TenantGate;

/// A Postgres database and what this process holds in it. Clones share everything.
///
/// It keeps a thread and, besides the pool, a few connections of its own, most of them opened when they are first
/// needed: two that have the session locks, and one each to renew leases, to give back what was dropped, to listen,
/// and to tell others what it holds.
#[derive(Clone)]
pub struct Database {
    pub(crate) process: Arc<Process>,
    pub(crate) leases: Arc<LeaseTable>,
    jobs: Arc<LeaseTable>,
}

impl Database {
    /// Checks that the server is one that locks can rely on, and starts the background thread.
    ///
    /// The pool has at most `pool_size` connections; it opens them as they are needed.
    ///
    /// # Errors
    /// [`StartupError`] names what is wrong with the server and what to do about it. What is merely unwise stands
    /// in [`Database::findings`].
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    pub async fn connect(options: ConnectOptions, pool_size: u32) -> Result<Self, StartupError> {
        let findings = startup::check(&options, pool_size).await?;
        let process = Process::start(options, pool_size, findings).map_err(StartupError::Thread)?;
        Ok(Self {
            process,
            leases: Arc::new(LeaseTable::own()),
            jobs: Arc::new(LeaseTable::jobs()),
        })
    }

    /// What was found at the start.
    pub fn findings(&self) -> &Findings {
        &self.process.findings
    }

    /// The pool, to look at.
    pub fn pool(&self) -> &Pool {
        &self.process.pool
    }

    /// Locks on any names, kept as lease rows in `leasehold.leases`.
    pub fn leases(&self) -> PgLeaseLock {
        RowLease::new(Arc::clone(&self.process), Arc::clone(&self.leases))
    }

    /// Locks on the rows of a table of the caller.
    pub fn row_leases(&self, table: LeaseTable) -> RowLease {
        RowLease::new(Arc::clone(&self.process), Arc::new(table))
    }

    /// Shared and exclusive locks that live in connections of this process, many in one.
    pub fn session_locks(&self) -> PgSessionLock {
        PgSessionLock::new(Arc::clone(&self.process))
    }

    /// Locks that live as long as a transaction, which [`Database::fenced_transaction`] runs the caller's
    /// statements in.
    pub fn transaction_locks(&self) -> PgTransactionLock {
        PgTransactionLock::new(Arc::clone(&self.process))
    }

    /// The queue of work in `leasehold.work_items`.
    pub fn work_queue(&self) -> PgWorkQueue {
        PgWorkQueue::new(Arc::clone(&self.process))
    }

    /// The gates of tenants, which many writers share and one drain has alone.
    pub fn tenant_gate(&self) -> TenantGate {
        TenantGate::new(Arc::clone(&self.process))
    }

    /// Jobs that run once a slot, to look at and to intervene in.
    pub fn jobs(&self) -> Jobs {
        Jobs::new(Arc::clone(&self.process))
    }

    /// Runs jobs once a slot, together with other processes. `holder` names this process in their history.
    pub fn job_scheduler(&self, holder: &str) -> JobScheduler {
        JobScheduler::new(Arc::clone(&self.process), Arc::clone(&self.jobs), holder)
    }

    /// Gives back all leases, and ends the background thread once that and everything that guards were dropped with
    /// is done, at most `grace` later. Guards that still live are lost; those of other locks end with their
    /// connections.
    ///
    /// # Cancel safety
    /// The thread ends all the same.
    pub async fn shutdown(&self, grace: Duration) {
        self.process.end_leases();
        if tokio::time::timeout(grace, self.process.keeper.stop(grace))
            .await
            .is_err()
        {
            tracing::warn!("the background thread did not end within {grace:?}");
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("application_name", &self.process.options.application_name())
            .field("pool", &self.process.pool)
            .finish_non_exhaustive()
    }
}
