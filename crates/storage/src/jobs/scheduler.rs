//! [`JobScheduler`]: what one process does for its jobs: it looks when a slot begins, and runs what it could claim.
//!
//! It looks once a slot and process, with one statement for all jobs and a jitter, and otherwise when somebody has asked
//! for a run, when the lease of a run ends, and now and then. Between looks it has no connection.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::{Invalid, LockId, MonotonicClock, Slots, Unavailable};
use rand::Rng;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use uuid::Uuid;

use crate::clock::Boottime;
use crate::error::{StorageError, chain};
use crate::jobs::run::{self, announce, count};
use crate::jobs::table::{self, Claim, JobRow, Last};
use crate::jobs::{Job, JobRun, JobWork, RELEASE, RunOutcome};
use crate::lease::reaper::Lease;
use crate::lease::row::RowLease;
use crate::lease::table::LeaseTable;
use crate::process::Process;

/// A look that nothing has called for: it finds what no signal told.
const POLL: std::ops::Range<Duration> = Duration::from_secs(10)..Duration::from_secs(20);
/// The same where there are no signals.
const POLL_ALONE: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(2);
/// When to look again after another process was first.
const SOON: std::ops::Range<Duration> = Duration::from_millis(10)..Duration::from_millis(50);
/// When to look again after the database did not answer.
const LATER: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(2);
/// The most that a process lets a slot wait, so that not all processes look in the same moment.
const JITTER: Duration = Duration::from_millis(200);

/// Runs jobs once a slot, together with other processes that have the same jobs.
pub struct JobScheduler {
    process: Arc<Process>,
    lease: RowLease,
    table: Arc<LeaseTable>,
    holder: String,
    jobs: BTreeMap<String, Registered>,
}

struct Registered {
    job: Job,
    work: Arc<dyn JobWork>,
}

impl JobScheduler {
    pub(crate) fn new(process: Arc<Process>, table: Arc<LeaseTable>, holder: &str) -> Self {
        Self {
            lease: RowLease::new(Arc::clone(&process), Arc::clone(&table)),
            process,
            table,
            holder: holder.to_owned(),
            jobs: BTreeMap::new(),
        }
    }

    /// Adds a job.
    ///
    /// # Errors
    /// [`Invalid`] with the field `name` (also when there is one of this name already), `ttl` or `max_hold`, or with
    /// `holder.owner` when the scheduler's own name is too long.
    pub fn register(&mut self, job: Job, work: impl JobWork + 'static) -> Result<(), Invalid> {
        job.validate()?;
        job.request(&self.holder)?.validate()?;
        let name = job.name.clone();
        let work = Arc::new(work);
        match self.jobs.insert(name, Registered { job, work }) {
            None => Ok(()),
            Some(first) => {
                let name = first.job.name.clone();
                let refused = Invalid::new("name", format!("there are two jobs named {name}"));
                self.jobs.insert(name, first);
                Err(refused)
            }
        }
    }

    /// Registers the jobs in the database and runs them, on the runtime of the caller, until the answer is stopped or
    /// dropped.
    ///
    /// A job that is new counts its slots from here on, and so does one whose schedule is another than before. Of
    /// processes that register a job in different ways the last one counts.
    ///
    /// # Errors
    /// [`Unavailable`] when the database did not answer.
    ///
    /// # Cancel safety
    /// Some of the jobs may have been registered; nothing runs.
    pub async fn start(self) -> Result<RunningJobs, Unavailable> {
        for registered in self.jobs.values() {
            table::register(&self.process.pool, &registered.job).await?;
            announce(&registered.job.name);
        }
        let (stop, stopped) = watch::channel(None);
        let task = tokio::spawn(self.run(stopped));
        Ok(RunningJobs { stop, task })
    }

    async fn run(self, mut stop: watch::Receiver<Option<Instant>>) {
        let names: Vec<String> = self.jobs.keys().cloned().collect();
        let mut signals = self.process.signals.jobs();
        let (cancel, cancelled) = watch::channel(false);
        let mut runs = JoinSet::new();
        let deadline = loop {
            signals.mark_unchanged();
            let wait = self.look(&names, &mut runs, &cancelled).await;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = signals.changed() => {}
                Some(_) = runs.join_next() => {}
                stopped = stop.wait_for(Option::is_some) => break stopped.ok().and_then(|deadline| *deadline),
            }
        };
        // Without a deadline nobody waits for the end.
        let deadline = deadline.unwrap_or_else(Instant::now);
        let all = async { while runs.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline, all).await.is_err() {
            cancel.send_replace(true);
            while runs.join_next().await.is_some() {}
        }
    }

    /// Looks at all jobs, starts what is due, and answers when to look again at the latest.
    async fn look(
        &self,
        names: &[String],
        runs: &mut JoinSet<()>,
        cancelled: &watch::Receiver<bool>,
    ) -> Duration {
        let poll = if self.process.findings.pooled {
            POLL_ALONE
        } else {
            POLL
        };
        let mut wait = within(poll);
        if names.is_empty() {
            return wait;
        }
        let rows = match table::look(&self.process.pool, Some(names)).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(error = chain(&error), "cannot look for jobs that are due");
                return within(LATER);
            }
        };
        for row in rows {
            let Some(registered) = self.jobs.get(&row.name) else {
                continue;
            };
            let next = match self.step(registered, &row).await {
                Ok(Step::Started(run)) => {
                    let (process, work) = (Arc::clone(&self.process), Arc::clone(&registered.work));
                    runs.spawn(run::run(
                        process,
                        work,
                        run,
                        registered.job.max_hold,
                        cancelled.clone(),
                    ));
                    continue;
                }
                Ok(Step::Wait(next)) => next,
                Ok(Step::LookAgain) => within(SOON),
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        job = row.name,
                        "a job could not be looked after"
                    );
                    within(LATER)
                }
            };
            wait = wait.min(next);
        }
        wait
    }

    /// Does the next thing that is to be done for a job.
    async fn step(&self, registered: &Registered, row: &JobRow) -> Result<Step, StorageError> {
        let slots = match row.slots() {
            Ok(slots) => slots,
            Err(error) => {
                tracing::warn!(job = row.name, %error, "another version of the program has written this schedule");
                return Ok(Step::Wait(within(POLL)));
            }
        };
        let (idle_since, interrupted) = match row.last() {
            Last::Running(ends_in) => return Ok(Step::Wait(ends_in + within(SOON))),
            Last::Over => {
                if table::close(&self.process.pool, row).await? {
                    count(&row.name, RunOutcome::Interrupted);
                    tracing::warn!(job = row.name, "a run ended without an outcome");
                }
                return Ok(Step::LookAgain);
            }
            Last::Interrupted(run) => (run.finished_at.unwrap_or(run.started_at), Some(run)),
            Last::Settled(idle_since) => (idle_since, None),
        };
        if row.paused {
            return Ok(Step::Wait(within(POLL)));
        }
        let again = interrupted.filter(|run| row.on_crash().runs_again(run.attempt));
        let claim = if let Some(run) = again {
            Claim {
                id: Uuid::new_v4(),
                slot: run.slot,
                attempt: run.attempt + 1,
                asked: run.asked,
                takes_up: false,
                handled_until: row.handled_until,
            }
        } else if let (Some(id), Some(asked_at)) = (row.asked_id, row.asked_at) {
            Claim {
                id,
                slot: asked_at,
                attempt: 1,
                asked: true,
                takes_up: true,
                handled_until: row.handled_until,
            }
        } else if let Some(slot) = row.missed().due(&slots, row.handled_until, idle_since, row.now) {
            Claim {
                id: Uuid::new_v4(),
                slot,
                attempt: 1,
                asked: false,
                takes_up: false,
                handled_until: slot,
            }
        } else {
            return Ok(Step::Wait(until(slots.next_after(row.now), row.now)));
        };
        self.claim(registered, row, claim).await
    }

    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "claim", job = row.name))]
    async fn claim(&self, registered: &Registered, row: &JobRow, claim: Claim) -> Result<Step, StorageError> {
        let job = &registered.job;
        let Ok(request) = job.request(&self.holder) else {
            return Ok(Step::Wait(within(POLL)));
        };
        let (lock_id, keys) = (LockId::from(claim.id), vec![row.name.clone()]);
        let sent = Boottime.now();
        let answer = table::claim(&self.process.pool, row, &claim, &self.holder, job.lease).await;
        if answer.as_ref().is_err_and(StorageError::is_outcome_unknown) {
            self.process.reaper.release_unanswered(Lease {
                table: Arc::clone(&self.table),
                keys: keys.clone(),
                name: request.name().clone(),
                lock_id,
            });
        }
        let Some(claimed) = answer? else {
            return Ok(Step::LookAgain);
        };
        let ends = sent.plus(request.max_hold());
        let token = Some(leasehold_domain::FencingToken::new(claimed.run_fencing_token));
        let times = (claimed.run_acquired_at, claimed.run_expires_at);
        let guard = self
            .lease
            .guard(&request, &keys, lock_id, sent, ends, token, times);
        Ok(Step::Started(JobRun {
            job: row.name.clone(),
            slot: claim.slot,
            attempt: claim.attempt,
            guard,
        }))
    }
}

/// What a look at a job came to.
enum Step {
    Started(JobRun),
    /// There is nothing to do for so long.
    Wait(Duration),
    /// Something has changed meanwhile.
    LookAgain,
}

fn within(range: std::ops::Range<Duration>) -> Duration {
    rand::rng().random_range(range)
}

/// How long to wait for a slot. Of many processes that wait for it, not all look at once.
fn until(slot: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Duration {
    let wait = slot.and_then(|slot| (slot - now).to_std().ok());
    let Some(wait) = wait else { return Duration::MAX };
    wait + within(Duration::ZERO..JITTER.min(wait / 20) + Duration::from_millis(1))
}

impl fmt::Debug for JobScheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobScheduler")
            .field("holder", &self.holder)
            .field("jobs", &self.jobs.keys())
            .finish_non_exhaustive()
    }
}

/// Jobs that a process runs. Dropped, it starts no more of them and drops those that run: their slots are run again
/// where their policy says so.
#[must_use = "the jobs end as soon as it is dropped"]
#[derive(Debug)]
pub struct RunningJobs {
    stop: watch::Sender<Option<Instant>>,
    task: JoinHandle<()>,
}

impl RunningJobs {
    /// Starts no more runs and waits for those under way, up to `grace`. Then they are cancelled and recorded as
    /// interrupted, which takes up to 5 seconds more.
    ///
    /// # Cancel safety
    /// As if it was dropped.
    pub async fn stop(mut self, grace: Duration) {
        let now = Instant::now();
        // A grace beyond what the clock can count is as good as for ever.
        let deadline = now
            .checked_add(grace)
            .unwrap_or(now + Duration::from_secs(365 * 24 * 60 * 60));
        self.stop.send_replace(Some(deadline));
        let last = deadline + RELEASE + Duration::from_secs(1);
        if tokio::time::timeout_at(last, &mut self.task).await.is_err() {
            tracing::warn!("the jobs did not end in time");
        }
    }
}

impl Drop for RunningJobs {
    fn drop(&mut self) {
        self.task.abort();
    }
}
