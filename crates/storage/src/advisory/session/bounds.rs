//! [`Bounds`]: when the next hold reaches its longest time.
//!
//! One timer serves all holds. It sleeps until the earliest end it has heard of, and then looks through what is
//! held; a hold that is released before costs nothing more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use leasehold_domain::{Monotonic, MonotonicClock};
use tokio::sync::Notify;

use crate::clock::Boottime;

/// Timers stand still during suspend, the clock does not.
const CLOCK_LOOK: Duration = Duration::from_secs(60);
const NEVER: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Bounds {
    /// Milliseconds on the clock, rounded up; the clock itself is rounded down, so that none comes early.
    next: AtomicU64,
    earlier: Notify,
}

impl Bounds {
    pub(super) fn new() -> Self {
        Self {
            next: AtomicU64::new(NEVER),
            earlier: Notify::new(),
        }
    }

    /// A hold ends then, unless it is released before.
    pub(super) fn note(&self, ends: Monotonic) {
        let ends = millis(ends).saturating_add(1);
        if ends < self.next.fetch_min(ends, Ordering::AcqRel) {
            self.earlier.notify_one();
        }
    }

    /// Waits until the earliest end has come, and forgets it.
    pub(super) async fn reached(&self) {
        loop {
            let next = self.next.load(Ordering::Acquire);
            let left = Duration::from_millis(next.saturating_sub(millis(Boottime.now())));
            if left.is_zero() {
                self.next.store(NEVER, Ordering::Release);
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left.min(CLOCK_LOOK)) => {}
                () = self.earlier.notified() => {}
            }
        }
    }
}

fn millis(point: Monotonic) -> u64 {
    let since_start = point.since(Monotonic::from_start(Duration::ZERO));
    u64::try_from(since_start.as_millis()).unwrap_or(NEVER)
}
