//! How lock operations fail: one enum per operation, so that who releases need not think about contention.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{HeldLock, LockId, LockName, TenantConflict};

/// What kind of failure an error is, for those who map errors to statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Somebody else has the lock, or it was lost: an expected answer.
    Conflict,
    /// There is no such hold.
    NotFound,
    /// The caller asked for something that can never be granted.
    Invalid,
    /// The backend cannot be reached or is full.
    Unavailable,
    /// What happened cannot be told, or a bug.
    Internal,
}

/// A value outside its bounds: which field, and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {field}: {reason}")]
pub struct Invalid {
    field: &'static str,
    reason: String,
}

impl Invalid {
    /// Names the field and says what is allowed.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }

    /// The field.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// What is wrong with it; safe to show to whoever sent it.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// The backend cannot be reached or is full; the hold, if there was one, is unchanged.
///
/// The message is for operators: it may name hosts and must not reach a client.
#[derive(Clone, Debug)]
pub struct Unavailable {
    message: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Unavailable {
    /// Says what could not be done.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            source: None,
        }
    }

    /// Says what could not be done, and why.
    pub fn because(
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self {
            message: message.into(),
            source: Some(Arc::new(source)),
        }
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Unavailable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// Somebody else has the lock. Nothing of the attempt is left behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Contention {
    /// The lock that was asked for.
    pub name: LockName,
    /// Who has it; `None` when it was let go before the holder could be read.
    pub held: Option<Box<HeldLock>>,
}

impl Contention {
    /// Contention with a holder that could be read.
    pub fn with(held: HeldLock) -> Self {
        Self {
            name: held.name.clone(),
            held: Some(Box::new(held)),
        }
    }

    /// Contention with a holder that was gone before it could be read.
    pub fn unknown(name: LockName) -> Self {
        Self { name, held: None }
    }
}

impl fmt::Display for Contention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the lock {} is held", self.name)?;
        let holder = self.held.as_ref().and_then(|held| held.holder.as_ref());
        if let Some(holder) = holder {
            write!(f, " by {} for {}", holder.owner, holder.operation)?;
        }
        Ok(())
    }
}

/// Why a lock was not acquired.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AcquireError {
    /// Somebody else has it. Not held, and nothing is left behind.
    #[error("{0}")]
    Contended(Contention),
    /// Somebody else still had it when the wait was over. Not held, and nothing is left behind.
    #[error("{contention} and did not become free within {waited:?}")]
    TimedOut {
        /// How long was waited.
        waited: Duration,
        /// Who had it at the last look.
        contention: Contention,
    },
    /// The lock stands behind the gate of a tenant, which is closed. Not held, and nothing is left behind.
    #[error(transparent)]
    TenantConflict(#[from] TenantConflict),
    /// What the name stands for does not exist: the row of a lease that lives in a table of the caller.
    #[error("there is no {name}")]
    NotFound {
        /// The lock that was asked for.
        name: LockName,
    },
    /// The request is out of bounds; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The backend cannot be reached or is full. Not held.
    #[error("the lock backend is not available")]
    Unavailable(#[source] Unavailable),
    /// The answer never came. If the lock is held it is under this id: [`crate::DistributedLock::resume`] takes
    /// it up, or it ends by itself after its `ttl`.
    #[error("the outcome of acquiring {lock_id} is unknown")]
    OutcomeUnknown {
        /// The acquisition that may hold.
        lock_id: LockId,
        /// What went wrong.
        #[source]
        source: Unavailable,
    },
}

impl AcquireError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Contended(_) | Self::TimedOut { .. } | Self::TenantConflict(_) => ErrorClass::Conflict,
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Invalid(_) => ErrorClass::Invalid,
            Self::Unavailable(_) => ErrorClass::Unavailable,
            Self::OutcomeUnknown { .. } => ErrorClass::Internal,
        }
    }

    /// Whether the same request may succeed later without anybody changing it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Contended(_)
            | Self::TimedOut { .. }
            | Self::TenantConflict(_)
            | Self::Unavailable(_)
            | Self::OutcomeUnknown { .. } => true,
            Self::NotFound { .. } | Self::Invalid(_) => false,
        }
    }

    /// Who has the lock, when somebody else having it is the reason.
    pub fn contention(&self) -> Option<&Contention> {
        match self {
            Self::Contended(contention) | Self::TimedOut { contention, .. } => Some(contention),
            Self::TenantConflict(_)
            | Self::NotFound { .. }
            | Self::Invalid(_)
            | Self::Unavailable(_)
            | Self::OutcomeUnknown { .. } => None,
        }
    }
}

/// Why a hold whose answer was lost could not be taken up again.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ResumeError {
    /// There is no hold with this id: the acquire never arrived, was refused, or its hold is over.
    #[error("{lock_id} holds no lock")]
    NotHeld {
        /// The id that was asked for.
        lock_id: LockId,
    },
    /// The request is out of bounds; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The backend cannot be reached. The hold, if there is one, is unchanged.
    #[error("the lock backend is not available")]
    Unavailable(#[source] Unavailable),
}

impl ResumeError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NotHeld { .. } => ErrorClass::NotFound,
            Self::Invalid(_) => ErrorClass::Invalid,
            Self::Unavailable(_) => ErrorClass::Unavailable,
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotHeld { .. } | Self::Invalid(_) => false,
            Self::Unavailable(_) => true,
        }
    }
}

/// Why a hold was not extended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExtendError {
    /// The hold is over: expired, released or taken away. It cannot come back.
    #[error("the lock was lost")]
    Lost,
    /// The hold has reached its `max_hold`.
    #[error("the lock has reached its longest hold")]
    MaxHoldReached,
    /// The `ttl` is out of bounds; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The backend cannot be reached. The hold ends when it would have ended.
    #[error("the lock backend is not available")]
    Unavailable(#[source] Unavailable),
}

impl ExtendError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Lost | Self::MaxHoldReached => ErrorClass::Conflict,
            Self::Invalid(_) => ErrorClass::Invalid,
            Self::Unavailable(_) => ErrorClass::Unavailable,
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Lost | Self::MaxHoldReached | Self::Invalid(_) => false,
            Self::Unavailable(_) => true,
        }
    }
}

/// Why it is not known whether a lock was released.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The backend cannot be reached. The hold ends by itself after its `ttl`, or with its session.
    #[error("the lock backend is not available")]
    Unavailable(#[source] Unavailable),
}

impl ReleaseError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unavailable(_) => ErrorClass::Unavailable,
        }
    }

    /// Whether the same call may succeed later. The guard is gone, so there is nothing to call it with: always
    /// `false`.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) => false,
        }
    }
}

/// Why work under a lock did not run, or did not finish under it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WithLockError {
    /// The lock was not acquired; the work did not start.
    #[error(transparent)]
    Acquire(#[from] AcquireError),
    /// The lock was lost before the work was done. The work was cancelled, or had ended by itself after the
    /// loss: what it did may overlap with another holder.
    #[error("the lock was lost before the work was done")]
    Lost,
}

impl WithLockError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Acquire(error) => error.class(),
            Self::Lost => ErrorClass::Conflict,
        }
    }

    /// Whether the same work may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Acquire(error) => error.is_retryable(),
            Self::Lost => true,
        }
    }
}
