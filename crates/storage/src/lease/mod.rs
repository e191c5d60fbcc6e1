//! Leases: holds that are rows, end by themselves, and are renewed while their guards live.

pub(crate) mod client;
mod held;
pub(crate) mod reaper;
pub(crate) mod renewer;
pub(crate) mod row;
pub(crate) mod table;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use leasehold_domain::Monotonic;

use table::LeaseTable;

/// The part of a lease that the process keeps beside its guard.
#[derive(Debug)]
pub(crate) struct LeaseHold {
    pub(crate) table: Arc<LeaseTable>,
    /// The values of the key columns.
    pub(crate) keys: Vec<String>,
    pub(crate) max_hold: Duration,
    /// When `max_hold` is over.
    pub(crate) ends: Monotonic,
    /// Whether renewals must reach the disk before they count.
    pub(crate) durable: bool,
    schedule: Mutex<Schedule>,
    /// How many fences and releases of ours are under way: a row that is locked or gone is our own doing.
    fencing: AtomicUsize,
    /// A fenced transaction has released it.
    ended: AtomicBool,
}

/// When the next renewal is due, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) due: Monotonic,
    pub(crate) ttl: Duration,
}

impl LeaseHold {
    pub(crate) fn new(
        table: Arc<LeaseTable>,
        keys: Vec<String>,
        durable: bool,
        max_hold: Duration,
        ends: Monotonic,
        schedule: Schedule,
    ) -> Self {
        let (fencing, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self {
            table,
            keys,
            max_hold,
            ends,
            durable,
            schedule: Mutex::new(schedule),
            fencing,
            ended,
        }
    }

    pub(crate) fn schedule(&self) -> Schedule {
        *self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reschedule(&self, schedule: Schedule) {
        *self.schedule.lock().unwrap_or_else(PoisonError::into_inner) = schedule;
    }

    /// Until when an answer to a request that was sent at `sent` may be believed.
    pub(crate) fn trusted_until(&self, sent: Monotonic, ttl: Duration) -> Monotonic {
        trusted_until(sent, ttl, self.ends)
    }

    pub(crate) fn is_fencing(&self) -> bool {
        self.fencing.load(Ordering::Acquire) > 0
    }

    pub(crate) fn begin_fencing(&self) {
        self.fencing.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn end_fencing(&self) {
        self.fencing.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(crate) fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// When a slice should be renewed: after a third of it, so that two renewals may fail.
pub(crate) fn next_renewal(sent: Monotonic, ttl: Duration) -> Schedule {
    Schedule {
        due: sent.plus(ttl / 3),
        ttl,
    }
}

/// Until when a grant or a renewal may be believed: its slice counted from before the request was sent, because
/// the answer may have taken long, and a margin less, because the last step before an effect takes time as well.
pub(crate) fn trusted_until(sent: Monotonic, ttl: Duration, ends: Monotonic) -> Monotonic {
    let slice = ttl.min(ends.since(sent));
    sent.plus(slice.saturating_sub(margin(ttl)))
}

fn margin(ttl: Duration) -> Duration {
    (ttl / 10).clamp(Duration::from_millis(10), Duration::from_secs(1))
}

/// As good as for ever, and an interval that Postgres can still add to a time.
const CENTURY: f64 = 100.0 * 365.25 * 24.0 * 60.0 * 60.0;

/// Seconds for a bind: Postgres multiplies an interval with it.
pub(crate) fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64().min(CENTURY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_ends_a_margin_before_the_slice() {
        let sent = Monotonic::from_start(Duration::from_secs(100));
        let far = sent.plus(Duration::from_secs(1_000_000));
        for (ttl_ms, trusted_ms) in [
            (100, 90),
            (50, 40),
            (1_000, 900),
            (10_000, 9_000),
            (60_000, 59_000),
        ] {
            let until = trusted_until(sent, Duration::from_millis(ttl_ms), far);
            assert_eq!(until.since(sent), Duration::from_millis(trusted_ms), "{ttl_ms}");
        }
    }

    #[test]
    fn trust_never_passes_the_longest_hold() {
        let sent = Monotonic::from_start(Duration::from_secs(100));
        let ends = sent.plus(Duration::from_secs(2));
        let until = trusted_until(sent, Duration::from_secs(10), ends);
        assert_eq!(until.since(sent), Duration::from_secs(1));
        assert_eq!(
            trusted_until(ends.plus(Duration::from_secs(1)), Duration::from_secs(10), ends).since(ends),
            Duration::from_secs(1)
        );
    }
}
