//! What every lock operation tells: one span, one outcome, how long. Lock names are never labels.

use std::time::{Duration, Instant};

use leasehold_domain::{AcquireError, LockGuard, LockName};

pub(crate) fn span(operation: &'static str, backend: &'static str, name: &LockName) -> tracing::Span {
    tracing::debug_span!("lock", operation, backend, name = name.to_string())
}

/// Counts how an attempt ended and how long it took.
pub(crate) async fn acquire<F>(backend: &'static str, attempt: F) -> Result<LockGuard, AcquireError>
where
    F: Future<Output = Result<LockGuard, AcquireError>>,
{
    let start = Instant::now();
    let waiting = Waiting::begin(backend);
    let result = attempt.await;
    drop(waiting);
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

/// Counts how long a lock was held.
pub(crate) fn held(backend: &'static str, held_for: Duration) {
    metrics::histogram!("leasehold_lock_hold_seconds", "backend" => backend).record(held_for);
}

/// Counts an attempt among those that are under way, until it is dropped: also when its caller gives up.
struct Waiting {
    backend: &'static str,
}

impl Waiting {
    fn begin(backend: &'static str) -> Self {
        metrics::gauge!("leasehold_lock_waiting", "backend" => backend).increment(1);
        Self { backend }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        metrics::gauge!("leasehold_lock_waiting", "backend" => self.backend).decrement(1);
    }
}
