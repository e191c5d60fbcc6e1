//! [`Failure`]: why work on the database ended early, and what the client is told.

use diesel::result::{DatabaseErrorKind, Error};
use leasehold_http::{Code, Problem};
use leasehold_storage::{TransactionError, WorkError};

/// Why statements were not all run.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request cannot be served: the client is told why.
    Refused(Problem),
    /// A statement failed.
    Database(Error),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(problem) => problem,
            Failure::Database(error) => match &error {
                Error::DatabaseError(
                    DatabaseErrorKind::UnableToSendCommand
                    | DatabaseErrorKind::ClosedConnection
                    | DatabaseErrorKind::ReadOnlyTransaction,
                    _,
                )
                | Error::BrokenTransactionManager => Self::unavailable(error),
                Error::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => {
                    Self::new(Code::ModifiedConcurrently, "the row changed while it was written")
                        .because(error)
                }
                _ => Self::internal(error),
            },
        }
    }
}

/// For reads.
pub(crate) fn of_work(error: WorkError<Failure>) -> Problem {
    match error {
        WorkError::Work(failure) => failure.into(),
        WorkError::Unavailable(source) => Problem::unavailable(source),
    }
}

/// For writes.
pub(crate) fn of_transaction(error: TransactionError<Failure>) -> Problem {
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
