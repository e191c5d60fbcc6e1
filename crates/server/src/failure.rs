//! [`Failure`]: why work on the database ended early, and what the client is told.

use diesel::result::{DatabaseErrorKind, Error};
use leasehold_domain::QueueError;
use leasehold_http::{Code, Problem};
use leasehold_storage::tenant::EnterError;

/// Why statements were not all run.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request cannot be served: the client is told why.
    Refused(Problem),
    /// A statement failed.
    Database(Error),
    /// The session was ended by somebody else. What was not committed never happened.
    Disconnected(Error),
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

impl From<EnterError> for Failure {
    fn from(error: EnterError) -> Self {
        match error {
            EnterError::Conflict(conflict) => Self::Refused(conflict.into()),
            // Each tenant was checked where it came in, and the transaction is our own: there are too many of them.
            EnterError::Invalid(invalid) => Self::Refused(invalid.into()),
            EnterError::Database(error) => Self::Database(error),
        }
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(problem) => problem,
            Failure::Disconnected(error) => Self::unavailable(error),
            Failure::Database(error) => match &error {
                Error::DatabaseError(DatabaseErrorKind::ReadOnlyTransaction, _) => Self::unavailable(error),
                Error::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => {
                    Self::new(Code::ModifiedConcurrently, "the row changed while it was written")
                        .because(error)
                }
                // Also a deadlock and a statement that the server's own timeout has ended: Diesel keeps their SQLSTATE
                // to itself, and their texts are translated. Ours lock in one order, and no timeout is needed.
                _ => Self::internal(error),
            },
        }
    }
}
