//! The monotonic clock of this process: `CLOCK_BOOTTIME`, which runs on while the machine is suspended.

use std::time::Duration;

use leasehold_domain::{Monotonic, MonotonicClock};
use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`. `std::time::Instant` is `CLOCK_MONOTONIC` on Linux, which stands still during suspend while
/// the lease in the database runs out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boottime;

impl MonotonicClock for Boottime {
    fn now(&self) -> Monotonic {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
        Monotonic::from_start(Duration::new(seconds, nanos))
    }
}
