//! [`MemoryClock`]: a clock that stands still until it is told to move.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::{Monotonic, MonotonicClock};

/// A settable clock. It starts at a fixed instant, so that what a test prints never changes.
#[derive(Debug, Default)]
pub struct MemoryClock {
    elapsed: Mutex<Duration>,
}

impl MemoryClock {
    /// 2000-01-01T00:00:00Z, where every clock of this kind starts.
    const START_UNIX_SECONDS: i64 = 946_684_800;

    /// A clock at its start.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves the clock on.
    pub fn advance(&self, by: Duration) {
        let mut elapsed = self.elapsed.lock().unwrap_or_else(PoisonError::into_inner);
        *elapsed = elapsed.saturating_add(by);
    }

    /// The time of day it shows.
    pub fn wall(&self) -> DateTime<Utc> {
        self.wall_at(self.now())
    }

    /// The time of day it shows at `point`; the last there is when that would overflow.
    pub(super) fn wall_at(&self, point: Monotonic) -> DateTime<Utc> {
        let start = DateTime::from_timestamp(Self::START_UNIX_SECONDS, 0).unwrap_or_default();
        chrono::Duration::from_std(point.since(Monotonic::from_start(Duration::ZERO)))
            .ok()
            .and_then(|elapsed| start.checked_add_signed(elapsed))
            .unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

impl MonotonicClock for MemoryClock {
    fn now(&self) -> Monotonic {
        Monotonic::from_start(*self.elapsed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
