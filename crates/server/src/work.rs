//! Running statements for a request: whatever goes wrong comes back as the [`Problem`] that the client is told.

use diesel::result::{DatabaseErrorKind, Error};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use leasehold_domain::LockGuard;
use leasehold_http::{Code, Problem};
use leasehold_storage::{TransactionError, WorkError};

use crate::config::WorkspaceLockMode;
use crate::failure::Failure;
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

    /// Runs statements that write something which no lock protects.
    pub(crate) async fn write<T, W>(&self, work: W) -> Result<T, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, Failure>,
    {
        let written = self.db().transaction(async |conn| {
            let done = work(conn).await;
            told(conn, done).await
        });
        written.await.map_err(problem)
    }

    /// Runs statements that commit only if the workspace's lock is still ours, and release it with the commit.
    pub(crate) async fn write_under<T, W>(&self, guard: &LockGuard, work: W) -> Result<T, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, Failure>,
    {
        let written = self.db().fenced_transaction_releasing(guard, async |conn| {
            let done = work(conn).await;
            told(conn, done).await
        });
        written.await.map(|written| written.value).map_err(|error| match error {
            // An advisory lock is gone with its session, before a lease may have been.
            TransactionError::Work(Failure::Disconnected(cause))
                if self.settings().lock_mode == WorkspaceLockMode::Advisory || guard.is_lost() =>
            {
                Problem::lock_lost().because(cause)
            }
            other => problem(other),
        })
    }
}

fn problem(error: TransactionError<Failure>) -> Problem {
    match error {
        TransactionError::Work(failure) => failure.into(),
        TransactionError::Lost => Problem::lock_lost(),
        TransactionError::CommitRolledBack(source) => Problem::internal(source),
        TransactionError::OutcomeUnknown { lock_id, source } => {
            let problem =
                Problem::new(Code::OutcomeUnknown, "the answer to the commit was lost").because(source);
            match lock_id {
                Some(lock_id) => problem.with_lock(lock_id),
                None => problem,
            }
        }
        TransactionError::Unavailable(source) => Problem::unavailable(source),
    }
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
