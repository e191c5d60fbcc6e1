//! What every lock operation tells: one span, one outcome, how long. Lock names are never labels.

use std::time::Instant;

use leasehold_domain::{AcquireError, LockGuard, LockName};

pub(crate) fn span(operation: &'static str, backend: &'static str, name: &LockName) -> tracing::Span {
    tracing::debug_span!("lock", operation, backend, %name)
}

/// Counts how an attempt ended and how long it took.
pub(crate) async fn acquire<F>(backend: &'static str, attempt: F) -> Result<LockGuard, AcquireError>
where
    F: Future<Output = Result<LockGuard, AcquireError>>,
{
    let start = Instant::now();
    let result = attempt.await;
    let outcome = match &result {
        Ok(_) => "acquired",
        Err(AcquireError::Contended(_) | AcquireError::TenantConflict(_)) => "contended",
        Err(AcquireError::TimedOut { .. }) => "timed_out",
        Err(AcquireError::Unavailable(_)) => "unavailable",
        Err(AcquireError::OutcomeUnknown { .. }) => "unknown",
        Err(AcquireError::Invalid(_) | AcquireError::NotFound { .. }) => "invalid",
    };
    metrics::counter!("leasehold_lock_acquire_total", "backend" => backend, "outcome" => outcome)
        .increment(1);
    metrics::histogram!("leasehold_lock_wait_seconds", "backend" => backend).record(start.elapsed());
    result
}
