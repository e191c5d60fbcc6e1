//! [`WorkerOptions`]: how a worker works.

use std::time::Duration;

use leasehold_domain::{ClaimRequest, Invalid, MAX_DELAY, Retention};
use rand::Rng;

/// What a [`Worker`](super::Worker) takes, how much at once, and how it tries again.
///
/// ```
/// use std::time::Duration;
/// use leasehold_storage::WorkerOptions;
///
/// let options = WorkerOptions::new(["reindex"], "indexer-3").with_concurrency(4).with_lease(Duration::from_secs(60));
/// assert!(options.validate().is_ok());
/// ```
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    pub(super) request: ClaimRequest,
    pub(super) concurrency: usize,
    pub(super) heartbeat: Option<Duration>,
    pub(super) poll: Duration,
    pub(super) backoff: (Duration, Duration),
    pub(super) retention: Retention,
}

impl WorkerOptions {
    /// Works on these kinds, under a name that tells who has an item: 8 at a time, claimed by 8, with a lease of 30
    /// seconds and a heartbeat every third of that; looks every second; tries again after 1 s × 2ⁿ, at most 10 minutes.
    pub fn new<K: Into<String>>(kinds: impl IntoIterator<Item = K>, name: impl Into<String>) -> Self {
        Self {
            request: ClaimRequest::new(kinds, name).with_batch(8),
            concurrency: 8,
            heartbeat: None,
            poll: Duration::from_secs(1),
            backoff: (Duration::from_secs(1), Duration::from_secs(600)),
            retention: Retention::default(),
        }
    }

    /// How many items are worked on at the same time: 1 to 10,000.
    #[must_use]
    pub fn with_concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// How many items are claimed at once: 1 to 1000. With more than one, up to one and a half batches wait in this
    /// process until they are begun: that is fast where items are many and short. Where each takes long, nobody should
    /// have more than he works on: 1.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.request = self.request.with_batch(batch);
        self
    }

    /// After how long without a heartbeat others take an item over: 100 ms to 24 h.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.request = self.request.with_lease(lease);
        self
    }

    /// How often leases are extended: at least 10 ms, and at most half the lease.
    #[must_use]
    pub fn with_heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// How long it rests after it found nothing: 10 ms to 1 min. While it goes on to find nothing this doubles, to 32
    /// times as much or 30 s. Whoever enqueues wakes it sooner.
    #[must_use]
    pub fn with_poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }

    /// How long an item rests after its n-th failure: between half of and all of `base` × 2ⁿ, which is never more than
    /// `cap`.
    #[must_use]
    pub fn with_backoff(mut self, base: Duration, cap: Duration) -> Self {
        self.backoff = (base, cap);
        self
    }

    /// How long dead letters are kept, of whatever kind. The worker removes them every minute.
    #[must_use]
    pub fn with_retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }

    /// Checks every bound. A worker does so before it starts.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: `kinds`, `worker`, `concurrency`, `batch`, `lease`, `heartbeat`, `poll` or
    /// `backoff`.
    pub fn validate(&self) -> Result<(), Invalid> {
        self.request.validate()?;
        if !(1..=10_000).contains(&self.concurrency) {
            return Err(Invalid::new("concurrency", "must be between 1 and 10000"));
        }
        let (least, most) = (Duration::from_millis(10), self.request.lease() / 2);
        if !(least..=most).contains(&self.heartbeat()) {
            let reason = format!("must be between 10 ms and {most:?}, half the lease");
            return Err(Invalid::new("heartbeat", reason));
        }
        if !(least..=Duration::from_secs(60)).contains(&self.poll) {
            return Err(Invalid::new("poll", "must be between 10 ms and 1 min"));
        }
        let (base, cap) = self.backoff;
        if base > cap || cap > MAX_DELAY {
            return Err(Invalid::new(
                "backoff",
                "the base must be at most the cap, and that 366 days",
            ));
        }
        Ok(())
    }

    pub(super) fn heartbeat(&self) -> Duration {
        self.heartbeat.unwrap_or(self.request.lease() / 3)
    }

    /// How many items may be claimed and not yet worked on to the end.
    pub(super) fn capacity(&self) -> usize {
        let batch = self.request.batch();
        self.concurrency + batch + batch / 2 - 1
    }

    pub(super) fn longest_poll(&self) -> Duration {
        (self.poll * 32).min(Duration::from_secs(30))
    }

    pub(super) fn pause_after(&self, attempt: u32) -> Duration {
        let (base, cap) = self.backoff;
        let most = base.saturating_mul(2_u32.saturating_pow(attempt)).min(cap);
        if most.is_zero() {
            return most;
        }
        rand::rng().random_range(most / 2..=most)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options() -> WorkerOptions {
        WorkerOptions::new(["k"], "w")
    }

    #[test]
    fn bounds_are_told_by_field() {
        let second = Duration::from_secs(1);
        let table = [
            (WorkerOptions::new([""; 0], "w"), "kinds"),
            (WorkerOptions::new(["k"], ""), "worker"),
            (options().with_concurrency(0), "concurrency"),
            (options().with_concurrency(10_001), "concurrency"),
            (options().with_batch(0), "batch"),
            (options().with_batch(1001), "batch"),
            (options().with_lease(Duration::ZERO), "lease"),
            (options().with_heartbeat(Duration::ZERO), "heartbeat"),
            (options().with_lease(second).with_heartbeat(second), "heartbeat"),
            (options().with_poll(Duration::ZERO), "poll"),
            (options().with_poll(second * 61), "poll"),
            (options().with_backoff(second * 2, second), "backoff"),
            (options().with_backoff(second, Duration::MAX), "backoff"),
        ];
        for (options, field) in table {
            assert_eq!(options.validate().unwrap_err().field(), field);
        }
        options().validate().unwrap();
        options()
            .with_lease(Duration::from_millis(100))
            .validate()
            .unwrap();
        options()
            .with_backoff(Duration::ZERO, Duration::ZERO)
            .validate()
            .unwrap();
    }

    #[test]
    fn nothing_waits_in_the_process_when_items_are_claimed_one_by_one() {
        assert_eq!(options().with_batch(1).capacity(), 8);
        assert_eq!(options().with_batch(8).capacity(), 19);
    }

    #[test]
    fn an_idle_worker_looks_at_least_every_half_minute() {
        assert_eq!(options().longest_poll(), Duration::from_secs(30));
        let often = options().with_poll(Duration::from_millis(10));
        assert_eq!(often.longest_poll(), Duration::from_millis(320));
    }

    proptest! {
        #[test]
        fn pauses_double_up_to_the_cap(attempt: u32, base_ms in 0_u64..100_000, more_ms in 0_u64..10_000_000) {
            let base = Duration::from_millis(base_ms);
            let cap = base + Duration::from_millis(more_ms);
            let pause = options().with_backoff(base, cap).pause_after(attempt);
            let full = Duration::try_from_secs_f64(base.as_secs_f64() * 2_f64.powf(f64::from(attempt)));
            let full = full.unwrap_or(Duration::MAX).min(cap);
            prop_assert!(pause <= full + Duration::from_nanos(1));
            prop_assert!(pause + Duration::from_nanos(1) >= full / 2);
        }
    }
}
