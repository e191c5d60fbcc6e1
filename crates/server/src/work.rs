//! Running statements for a request: whatever goes wrong comes back as the [`Problem`] that the client is told.
//!
//! A write answers from inside of its transaction: there its [`Answer`] is stored under the request's idempotency key,
//! if it has one. Which gates of tenants the transaction enters, and how, is what the ways to write differ in.

use std::time::{Duration, Instant};

use diesel::result::{DatabaseErrorKind, Error};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use leasehold_domain::LockGuard;
use leasehold_http::{Code, Problem};
use leasehold_storage::tenant::GateError;
use leasehold_storage::{TenantGate, TransactionError, WorkError};

use crate::answer::Answer;
use crate::config::WorkspaceLockMode;
use crate::failure::Failure;
use crate::idempotency::Once;
use crate::state::AppState;

impl AppState {
    /// Runs statements that only read.
    pub(crate) async fn read<T, W>(&self, work: W) -> Result<T, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, Failure>,
    {
        let read = self.db().read(async |conn| {
            let done = work(conn).await;
            told(conn, done).await
        });
        read.await.map_err(|error| match error {
            WorkError::Work(failure) => failure.into(),
            WorkError::Unavailable(source) => Problem::unavailable(source),
        })
    }

    /// As [`read`](Self::read), for no longer than this. Then the connection is closed.
    pub(crate) async fn read_within<T, W>(&self, limit: Duration, work: W) -> Result<T, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, Failure>,
    {
        let read = tokio::time::timeout(limit, self.read(work));
        read.await.map_err(Problem::unavailable)?
    }

    /// Runs a write that is one statement, and its own transaction. It has no idempotency key, and takes the gate of its
    /// tenant itself.
    pub(crate) async fn autocommitted<W>(&self, work: W) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let written = self.db().read(async |conn| {
            let done = work(conn).await;
            told(conn, done).await
        });
        written.await.map_err(|error| match error {
            // It may have committed before the connection broke.
            WorkError::Work(Failure::Disconnected(cause)) => outcome_unknown().because(cause),
            WorkError::Work(failure) => failure.into(),
            WorkError::Unavailable(source) => Problem::unavailable(source),
        })
    }

    /// Runs a write of tenants themselves, which have no gate to enter.
    pub(crate) async fn ungated<W>(&self, once: &Once, work: W) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let written = self.db().transaction(async |conn| {
            let done = once.run(conn, None, work).await;
            told(conn, done).await
        });
        written.await.map_err(problem)
    }

    /// Runs a write of what these tenants own, whose gates it enters first. The answer tells of the first of them.
    pub(crate) async fn gated<W>(
        &self,
        once: &Once,
        tenants: &[impl AsRef<str>],
        work: W,
    ) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let first = tenants.first().map(AsRef::as_ref);
        let gate = self.db().tenant_gate();
        let written = gate.write(tenants, async |conn| {
            let done = once.run(conn, first, work).await;
            told(conn, done).await
        });
        written.await.map_err(gate_problem)
    }

    /// Runs a write of rows that are known by something else than their tenants. `find` reads whose they are, and locks
    /// nothing; then the gates of those are entered, if there are any, and `work` writes to rows of these tenants alone:
    /// they may have moved since. The answer tells of the first of them.
    pub(crate) async fn gated_row<F, W>(&self, once: &Once, find: F, work: W) -> Result<Answer, Problem>
    where
        F: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Vec<String>, Failure>,
        W: AsyncFnOnce(&mut AsyncPgConnection, &[String]) -> Result<Answer, Failure>,
    {
        let written = self.db().transaction(async |conn| {
            let write = async {
                let tenants = find(conn).await?;
                if !tenants.is_empty() {
                    TenantGate::enter_in_tx(conn, &tenants).await?;
                }
                let first = tenants.first().map(String::as_str);
                once.run(conn, first, async |conn| work(conn, &tenants).await)
                    .await
            };
            let done = write.await;
            told(conn, done).await
        });
        written.await.map_err(problem)
    }

    /// Runs work that has a tenant for itself, and is told how long it waited for the tenant's writers. The answer is not
    /// among the data of the tenant.
    pub(crate) async fn drained<W>(
        &self,
        once: &Once,
        tenant: &str,
        timeout: Duration,
        work: W,
    ) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection, Duration) -> Result<Answer, Failure>,
    {
        let start = Instant::now();
        let gate = self.db().tenant_gate();
        let drained = gate.drain(tenant, timeout, async |conn| {
            // With the time that the connection took; the wait itself is no longer than it may be.
            let waited = start.elapsed().min(timeout);
            let done = once.run(conn, None, async |conn| work(conn, waited).await).await;
            told(conn, done).await
        });
        drained.await.map(|drained| drained.value).map_err(gate_problem)
    }

    /// Runs statements that commit only if the workspace's lock is still ours, and release it with the commit. The
    /// transaction has entered the gate of the workspace's tenant.
    pub(crate) async fn write_under<W>(
        &self,
        guard: &LockGuard,
        once: &Once,
        tenant: &str,
        work: W,
    ) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let mode = self.settings().lock_mode;
        let written = self.db().fenced_transaction_releasing(guard, async |conn| {
            let write = async {
                // An advisory lock was taken behind the gate, in the same statement.
                if mode == WorkspaceLockMode::Lease {
                    TenantGate::enter_in_tx(conn, &[tenant]).await?;
                }
                once.run(conn, Some(tenant), work).await
            };
            let done = write.await;
            told(conn, done).await
        });
        written
            .await
            .map(|written| written.value)
            .map_err(|error| match error {
                // An advisory lock is gone with its session, before a lease may have been.
                TransactionError::Work(Failure::Disconnected(cause))
                    if mode == WorkspaceLockMode::Advisory || guard.is_lost() =>
                {
                    Problem::lock_lost().because(cause)
                }
                other => problem(other),
            })
    }
}

fn gate_problem(error: GateError<Failure>) -> Problem {
    match error {
        GateError::Conflict(conflict) => conflict.into(),
        GateError::Invalid(invalid) => invalid.into(),
        GateError::Transaction(error) => problem(error),
    }
}

fn problem(error: TransactionError<Failure>) -> Problem {
    match error {
        TransactionError::Work(failure) => failure.into(),
        TransactionError::Lost => Problem::lock_lost(),
        TransactionError::CommitRolledBack(source) => Problem::internal(source),
        TransactionError::OutcomeUnknown { lock_id, source } => {
            let problem = outcome_unknown().because(source);
            match lock_id {
                Some(lock_id) => problem.with_lock(lock_id),
                None => problem,
            }
        }
        TransactionError::Unavailable(source) => Problem::unavailable(source),
    }
}

fn outcome_unknown() -> Problem {
    Problem::new(Code::OutcomeUnknown, "the answer to the commit was lost")
}

/// Tells a statement that was at fault from one whose session was ended by somebody else, which is known by its
/// SQLSTATE alone, and that Diesel hides: what comes after it says whether there still is a session.
async fn told<T>(conn: &mut AsyncPgConnection, done: Result<T, Failure>) -> Result<T, Failure> {
    match done {
        Err(Failure::Database(error)) if is_gone(&error) => Err(Failure::Disconnected(error)),
        Err(Failure::Database(error)) => match conn.batch_execute("SELECT").await {
            Err(next) if is_gone(&next) => Err(Failure::Disconnected(error)),
            _ => Err(Failure::Database(error)),
        },
        other => other,
    }
}

fn is_gone(error: &Error) -> bool {
    matches!(
        error,
        Error::BrokenTransactionManager
            | Error::DatabaseError(
                DatabaseErrorKind::UnableToSendCommand | DatabaseErrorKind::ClosedConnection,
                _
            )
    )
}
