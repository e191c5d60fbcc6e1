//! The failures of the database as this crate sees them, and the one place where they become the domain's.

use std::time::Duration;

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use leasehold_domain::{
    AcquireError, ExtendError, LockId, QueueError, ReleaseError, ResumeError, Unavailable,
};

/// Why a statement did not do its work.
///
/// Contention is never one of these: statements tell it by the rows they return. Message texts are never
/// matched, because servers translate them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// The pool had no connection to give in time.
    #[error("no database connection became free in time")]
    NoConnection,
    /// A connection in the pool was not open any more.
    #[error("a database connection had ended while nobody used it")]
    Ended,
    /// A connection could not be made.
    #[error("cannot connect to the database")]
    Connect(#[from] diesel::ConnectionError),
    /// A connection was not ready in time.
    #[error("the database let nobody in within {0:?}")]
    ConnectTimedOut(Duration),
    /// A connection of our own gave no answer in time, and is not used again.
    #[error("the database gave no answer within {0:?}")]
    NoAnswer(Duration),
    /// The server refused the statement: it had no effect.
    #[error("the database refused a statement")]
    Refused(#[source] diesel::result::Error),
    /// The connection ended before the answer came: the statement may have had its effect.
    #[error("the connection to the database ended before it answered")]
    Disconnected(#[source] diesel::result::Error),
    /// The same, or a refusal, on a connection that tokio-postgres drives.
    #[error("the database connection failed")]
    Driver(#[from] tokio_postgres::Error),
}

impl From<diesel::result::Error> for StorageError {
    fn from(error: diesel::result::Error) -> Self {
        use diesel::result::{DatabaseErrorKind, Error};
        match error {
            Error::DatabaseError(
                DatabaseErrorKind::UnableToSendCommand | DatabaseErrorKind::ClosedConnection,
                _,
            )
            | Error::BrokenTransactionManager => Self::Disconnected(error),
            other => Self::Refused(other),
        }
    }
}

impl StorageError {
    /// The error of a statement outside of a transaction, whose effect matters.
    ///
    /// A pooler that has lost the server says so by an error of its own, which looks like a refusal. What was really
    /// refused left the connection as it was.
    pub(crate) async fn of_connection(conn: &mut AsyncPgConnection, error: diesel::result::Error) -> Self {
        match Self::from(error) {
            Self::Refused(error) if conn.batch_execute("SELECT 1").await.is_err() => {
                Self::Disconnected(error)
            }
            other => other,
        }
    }

    /// Whether the statement may have had its effect although no answer came.
    pub(crate) fn is_outcome_unknown(&self) -> bool {
        match self {
            Self::Disconnected(_) | Self::NoAnswer(_) => true,
            Self::Driver(error) => error.as_db_error().is_none(),
            Self::NoConnection
            | Self::Ended
            | Self::Connect(_)
            | Self::ConnectTimedOut(_)
            | Self::Refused(_) => false,
        }
    }

    pub(crate) fn into_acquire(self, lock_id: LockId) -> AcquireError {
        if self.is_outcome_unknown() {
            metrics::counter!("leasehold_outcome_unknown_total").increment(1);
            AcquireError::OutcomeUnknown {
                lock_id,
                source: self.into(),
            }
        } else {
            AcquireError::Unavailable(self.into())
        }
    }
}

impl From<StorageError> for Unavailable {
    fn from(error: StorageError) -> Self {
        Self::because("the database did not do what it was asked", error)
    }
}

impl From<StorageError> for ExtendError {
    fn from(error: StorageError) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<StorageError> for ReleaseError {
    fn from(error: StorageError) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<StorageError> for ResumeError {
    fn from(error: StorageError) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<StorageError> for QueueError {
    fn from(error: StorageError) -> Self {
        if error.is_outcome_unknown() {
            Self::OutcomeUnknown(error.into())
        } else {
            Self::Unavailable(error.into())
        }
    }
}

/// An error with all its sources, for one log line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_layer_repeats_another() {
        let error = StorageError::Refused(diesel::result::Error::NotFound);
        let told = chain(&error.into_acquire(LockId::new()));
        let mut layers: Vec<&str> = told.split(": ").collect();
        let all = layers.len();
        layers.sort_unstable();
        layers.dedup();
        assert_eq!(layers.len(), all, "{told}");
    }
}
