//! Jobs: work that runs once a slot, however many processes there are.
//!
//! A job is a row of `leasehold.jobs`. All processes that have its work look when a slot begins, and one of them claims
//! it with one statement: that settles the slot, makes the row of its run, and leases the job's row. The lease is
//! renewed, lost and given back like every other; the outcome is written by the statement that ends it.

pub(crate) mod control;
mod cron;
mod run;
mod schedule;
pub(crate) mod scheduler;
mod table;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use leasehold_domain::{Holder, Invalid, LockGuard, LockName, LockRequest, MissedSlots, OnCrash};
use uuid::Uuid;

pub use schedule::Schedule;

/// The lock of a job's run is named `["job", name]`.
pub(crate) const FIXED_PART: &str = "job";

/// How long the end of a run may take: to write the outcome, or to give the lease back.
pub(crate) const RELEASE: Duration = Duration::from_secs(5);

/// A job as a process registers it.
///
/// ```
/// use std::time::Duration;
/// use leasehold_storage::{Job, Schedule};
///
/// let nightly = Schedule::cron("30 2 * * *", "Europe/Berlin")?;
/// let job = Job::new("tidy-up", nightly).max_hold(Duration::from_secs(600));
/// # Ok::<(), leasehold_domain::Invalid>(())
/// ```
#[derive(Clone, Debug)]
pub struct Job {
    pub(crate) name: String,
    pub(crate) schedule: Schedule,
    pub(crate) missed: MissedSlots,
    pub(crate) on_crash: OnCrash,
    pub(crate) lease: Duration,
    pub(crate) max_hold: Duration,
}

impl Job {
    /// A job that runs the latest missed slot, tries again after a crash, and has a lease of 30 seconds and a longest
    /// run of one hour. Names are `[a-z0-9][a-z0-9_-]{0,62}`.
    pub fn new(name: impl Into<String>, schedule: Schedule) -> Self {
        Self {
            name: name.into(),
            schedule,
            missed: MissedSlots::default(),
            on_crash: OnCrash::default(),
            lease: Duration::from_secs(30),
            max_hold: Duration::from_secs(60 * 60),
        }
    }

    /// What becomes of slots that nobody started in time.
    #[must_use]
    pub fn missed(mut self, missed: MissedSlots) -> Self {
        self.missed = missed;
        self
    }

    /// What becomes of a slot whose run ended without an outcome.
    #[must_use]
    pub fn on_crash(mut self, on_crash: OnCrash) -> Self {
        self.on_crash = on_crash;
        self
    }

    /// After how long without a heartbeat a run counts as interrupted: 100 ms to 24 h.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// After how long a run is cancelled; at least the lease.
    #[must_use]
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = max_hold;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bounded = (1..=63).contains(&self.name.len());
        if !bounded
            || !self.name.starts_with(plain)
            || !self.name.chars().all(|c| plain(c) || c == '-' || c == '_')
        {
            return Err(Invalid::new("name", "a job is named [a-z0-9][a-z0-9_-]{0,62}"));
        }
        // The bounds of its own longest hold, and then that of the lease behind it.
        let request = self.request("")?;
        request.with_max_hold(self.max_hold).validate()
    }

    /// The lease of a run. It outlives the longest run by the time that the outcome may take: a run that was cancelled
    /// still has its lease, and one that hangs has lost it then.
    pub(crate) fn request(&self, holder: &str) -> Result<LockRequest, Invalid> {
        let name = LockName::new([FIXED_PART, &self.name])?;
        Ok(LockRequest::new(name, Holder::new(holder, table::OPERATION))
            .with_ttl(self.lease)
            .with_max_hold(self.max_hold.saturating_add(RELEASE)))
    }
}

/// What a job does. It is dropped at its next await when the run is cancelled: the lease was lost, the run took longer
/// than `max_hold`, or the process stops.
#[async_trait]
pub trait JobWork: Send + Sync {
    /// Runs once. What must not happen twice belongs into a fenced transaction under [`JobRun::guard`].
    ///
    /// # Errors
    /// Whatever stands in the way. It is the outcome of the slot, which is not run again for it.
    ///
    /// # Cancel safety
    /// It may be dropped at every await, and the slot may be run again then.
    async fn run(&self, run: &JobRun) -> Result<(), JobFailure>;
}

/// Why a run failed. Its text, up to 1 KiB, is kept in the history.
pub type JobFailure = Box<dyn std::error::Error + Send + Sync>;

/// One run, as its work sees it.
#[derive(Debug)]
pub struct JobRun {
    pub(crate) job: String,
    pub(crate) slot: DateTime<Utc>,
    pub(crate) attempt: i32,
    pub(crate) guard: LockGuard,
}

impl JobRun {
    /// The job.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// The slot, or when the run was asked for.
    pub fn slot(&self) -> DateTime<Utc> {
        self.slot
    }

    /// 1, or more after runs of the slot that ended without an outcome.
    pub fn attempt(&self) -> i32 {
        self.attempt
    }

    /// The id of this run.
    pub fn id(&self) -> Uuid {
        self.guard.lock_id().as_uuid()
    }

    /// The lease of this run, for fenced transactions and for its token. It is renewed meanwhile.
    ///
    /// A transaction that releases it ends the run without an outcome: take [`crate::Database::fenced_transaction`].
    pub fn guard(&self) -> &LockGuard {
        &self.guard
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunOutcome {
    /// The work was done.
    Succeeded,
    /// The work answered an error, or panicked.
    Failed,
    /// It took longer than `max_hold` and was cancelled.
    TimedOut,
    /// It ended without an outcome: its process died or stopped, or the lease was lost. The only outcome that is none:
    /// the slot may be run again.
    Interrupted,
}

impl RunOutcome {
    pub(crate) const ALL: [Self; 4] = [Self::Succeeded, Self::Failed, Self::TimedOut, Self::Interrupted];

    /// `succeeded`, `failed`, `timed_out` or `interrupted`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Interrupted => "interrupted",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == text)
    }
}

impl fmt::Display for RunOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A job as it stands in its row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its name.
    pub name: String,
    /// `every 30m`, or a cron expression.
    pub schedule: String,
    /// By whose clock, as the IANA database names it.
    pub time_zone: String,
    /// No run is started until it is resumed.
    pub paused: bool,
    /// The next slot; `None` while it is paused.
    pub next_slot: Option<DateTime<Utc>>,
    /// The run that was begun last.
    pub last_run: Option<JobRunInfo>,
}

/// A run in the history of its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRunInfo {
    /// Its id.
    pub id: Uuid,
    /// The slot, or when it was asked for.
    pub slot: DateTime<Utc>,
    /// 1, or more after runs of the slot that ended without an outcome.
    pub attempt: i32,
    /// Somebody asked for it.
    pub asked: bool,
    /// Which process ran it.
    pub holder: String,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended; `None` while it runs.
    pub finished_at: Option<DateTime<Utc>>,
    /// How it ended; `None` while it runs.
    pub outcome: Option<RunOutcome>,
    /// Why it failed.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str) -> Job {
        Job::new(name, Schedule::every(Duration::from_secs(1)).unwrap())
    }

    #[test]
    fn jobs_out_of_bounds_are_refused_with_the_field() {
        let long = "x".repeat(64);
        for name in ["", "-a", "A", "a b", "a/b", "é", &long] {
            assert_eq!(job(name).validate().unwrap_err().field(), "name", "{name:?}");
        }
        assert!(job(&long[1..]).validate().is_ok());
        let short = job("a").lease(Duration::from_millis(99));
        assert_eq!(short.validate().unwrap_err().field(), "ttl");
        let (lease, hold) = (Duration::from_secs(10), Duration::from_millis(9_999));
        let held = job("a").lease(lease).max_hold(hold);
        assert_eq!(held.validate().unwrap_err().field(), "max_hold");
        assert!(job("a").max_hold(Duration::MAX).validate().is_ok());
    }

    #[test]
    fn outcomes_read_back() {
        for text in ["succeeded", "failed", "timed_out", "interrupted"] {
            assert_eq!(RunOutcome::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(RunOutcome::parse("running"), None);
    }
}
