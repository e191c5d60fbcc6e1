//! [`Monotonic`]: a point on a clock that never goes back and, where the platform has one, runs on in suspend.

use std::fmt::Debug;
use std::time::Duration;

/// A point in time on a [`MonotonicClock`], as the duration since that clock's start.
///
/// What a process believes about its own hold is such a point, never a wall-clock time. `std::time::Instant` is
/// not used because on Linux it stands still while the machine is suspended, and a lease does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Monotonic(Duration);

impl Monotonic {
    /// The point that lies `since_start` after the clock's start.
    pub const fn from_start(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// The point `later` after this one; the last point there is when that would overflow.
    #[must_use]
    pub const fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }

    /// How long before this point `earlier` lies; zero when it does not.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Where [`Monotonic`] points come from: `CLOCK_BOOTTIME` for Postgres backends, a settable clock in tests.
pub trait MonotonicClock: Debug + Send + Sync {
    /// Now.
    fn now(&self) -> Monotonic;
}
