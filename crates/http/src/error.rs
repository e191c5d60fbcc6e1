//! From the errors of the domain to what a client is told: one exhaustive match for each.

use std::convert::Infallible;

use leasehold_domain::{
    AcquireError, Contention, ExtendError, Invalid, QueueError, ReleaseError, ResumeError, TenantConflict,
    TenantConflictReason, Unavailable, WithLockError,
};

use crate::{Code, FieldError, LockView, Problem, Reason};

impl Problem {
    /// 409: somebody else has the lock. `code` says which kind of lock it is: [`Code::WorkspaceLocked`],
    /// [`Code::LockHeld`]. The holder comes from a [`Contention`] or a [`leasehold_domain::HeldLock`].
    pub fn contended(code: Code, holder: impl Into<LockView>) -> Self {
        let lock = holder.into();
        let detail = match (&lock.locked_by, &lock.operation) {
            (Some(owner), Some(operation)) if !operation.is_empty() => {
                format!("held by {owner} for {operation}")
            }
            (Some(owner), _) => format!("held by {owner}"),
            (None, _) => "held by somebody who could not be told".to_owned(),
        };
        Self::new(code, detail).with_lock(lock)
    }
}

impl From<&Contention> for LockView {
    fn from(contention: &Contention) -> Self {
        contention.held.as_deref().map_or_else(Self::default, Self::from)
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Self::invalid([FieldError::new(invalid.field(), invalid.reason())])
    }
}

impl From<Unavailable> for Problem {
    fn from(unavailable: Unavailable) -> Self {
        Self::unavailable(unavailable)
    }
}

impl From<TenantConflictReason> for Reason {
    fn from(reason: TenantConflictReason) -> Self {
        match reason {
            TenantConflictReason::PurgeInProgress => Self::PurgeInProgress,
            TenantConflictReason::WritesInProgress => Self::WritesInProgress,
        }
    }
}

impl From<TenantConflict> for Problem {
    fn from(conflict: TenantConflict) -> Self {
        Self::new(Code::TenantWriteConflict, conflict.to_string()).with_reason(conflict.reason.into())
    }
}

impl From<AcquireError> for Problem {
    fn from(error: AcquireError) -> Self {
        match error {
            AcquireError::Contended(contention) | AcquireError::TimedOut { contention, .. } => {
                Self::contended(Code::LockHeld, &contention)
            }
            AcquireError::TenantConflict(conflict) => conflict.into(),
            AcquireError::NotFound { .. } => Self::not_found("there is no such thing to lock"),
            AcquireError::Invalid(invalid) => invalid.into(),
            AcquireError::Unavailable(source) => source.into(),
            // Nothing was done under the lock yet, so the request can be repeated: this is not the lost answer
            // to a commit of the caller's work, which is `outcome_unknown`.
            AcquireError::OutcomeUnknown { lock_id, .. } => Self::unavailable(error).with_lock(lock_id),
        }
    }
}

impl From<ResumeError> for Problem {
    fn from(error: ResumeError) -> Self {
        match error {
            ResumeError::NotHeld { lock_id } => {
                Self::not_found("this acquisition holds no lock").with_lock(lock_id)
            }
            ResumeError::Invalid(invalid) => invalid.into(),
            ResumeError::Unavailable(source) => source.into(),
        }
    }
}

impl From<ExtendError> for Problem {
    fn from(error: ExtendError) -> Self {
        match error {
            ExtendError::Lost => Self::new(
                Code::LockLost,
                "the hold is over: it expired, was released or was taken away",
            )
            .not_retryable(),
            ExtendError::MaxHoldReached => {
                Self::new(Code::LockLost, "the lock has reached its longest hold").not_retryable()
            }
            ExtendError::Invalid(invalid) => invalid.into(),
            ExtendError::Unavailable(source) => source.into(),
        }
    }
}

impl From<ReleaseError> for Problem {
    fn from(error: ReleaseError) -> Self {
        match error {
            ReleaseError::Unavailable(source) => source.into(),
        }
    }
}

impl From<WithLockError> for Problem {
    fn from(error: WithLockError) -> Self {
        match error {
            WithLockError::Acquire(error) => error.into(),
            // Unlike a fenced transaction, plain work under a lock may have had effects before the loss.
            WithLockError::Lost => Self::new(Code::LockLost, "the lock was lost before the work was done"),
        }
    }
}

impl From<QueueError> for Problem {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Invalid(invalid) => invalid.into(),
            QueueError::Unavailable(source) => source.into(),
            QueueError::OutcomeUnknown(source) => Self::new(
                Code::OutcomeUnknown,
                "whether the work queue was changed is unknown",
            )
            .because(source),
        }
    }
}

/// For extractors that cannot fail.
impl From<Infallible> for Problem {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}
