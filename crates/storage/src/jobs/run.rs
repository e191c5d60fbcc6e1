//! One run: the work, what may cut it short, and its outcome.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument;

use crate::error::chain;
use crate::holds::Scope;
use crate::jobs::{JobRun, JobWork, RELEASE, RunOutcome, table};
use crate::process::Process;

/// How soon an outcome is sent again whose answer did not come.
const SEND_AGAIN: Duration = Duration::from_millis(100);

/// Runs the work under its lease, and settles the slot. `cancelled` changes when the process can wait no longer.
pub(crate) async fn run(
    process: Arc<Process>,
    work: Arc<dyn JobWork>,
    run: JobRun,
    max_hold: Duration,
    mut cancelled: watch::Receiver<bool>,
) {
    let span =
        tracing::info_span!("job", job = run.job, slot = %run.slot, attempt = run.attempt, id = %run.id());
    async {
        let (job, started) = (run.job.clone(), Instant::now());
        let end = tokio::select! {
            biased;
            () = run.guard.lost() => None,
            done = AssertUnwindSafe(work.run(&run)).catch_unwind() => Some(match done {
                Ok(Ok(())) => (RunOutcome::Succeeded, None),
                Ok(Err(error)) => (RunOutcome::Failed, Some(chain(&*error))),
                Err(_) => (RunOutcome::Failed, Some("the job panicked".to_owned())),
            }),
            () = tokio::time::sleep(max_hold) => {
                Some((RunOutcome::TimedOut, Some(format!("cancelled after {max_hold:?}"))))
            }
            _ = cancelled.wait_for(|cancelled| *cancelled) => Some((RunOutcome::Interrupted, None)),
        };
        // By here the work has ended or was dropped.
        metrics::histogram!("leasehold_job_run_seconds", "task" => job).record(started.elapsed());
        match end {
            Some((outcome, error)) => settle(&process, run, outcome, error.as_deref()).await,
            // Whoever looks next finds the lease over, and records that.
            None => tracing::warn!("the lease of a run was lost; its work was cancelled"),
        }
    }
    .instrument(span)
    .await;
}

async fn settle(process: &Process, run: JobRun, outcome: RunOutcome, error: Option<&str>) {
    if let Some(Scope::Lease(lease)) = process.holds.get(run.guard.lock_id()).map(|hold| hold.scope) {
        // A beat that finds the row released must not take that for a loss.
        lease.begin_fencing();
    }
    let started = Instant::now();
    let accepted = tokio::time::timeout(RELEASE, async {
        loop {
            match table::settle(&process.pool, &run.job, run.id(), outcome, error).await {
                Ok(accepted) => return accepted,
                Err(failure) => tracing::debug!(error = chain(&failure), "an outcome was not answered"),
            }
            tokio::time::sleep(SEND_AGAIN).await;
        }
    });
    match accepted.await {
        Ok(true) => {
            process.holds.remove(run.guard.lock_id());
            run.guard.defuse();
            count(&run.job, outcome);
            match outcome {
                RunOutcome::Succeeded => tracing::debug!("a job has run"),
                RunOutcome::Failed | RunOutcome::TimedOut | RunOutcome::Interrupted => {
                    tracing::warn!(%outcome, error, "a job did not succeed");
                }
            }
        }
        // Dropping the guard gives the lease back, if it is there.
        Ok(false) => tracing::warn!(%outcome, "the lease of a run was lost before its outcome was accepted"),
        Err(_) => {
            let waited = started.elapsed();
            tracing::warn!(%outcome, "the outcome of a run was not accepted within {waited:?}");
        }
    }
}

/// Says that there is such a job, so that its first failure is one more than none.
pub(crate) fn announce(job: &str) {
    for outcome in RunOutcome::ALL {
        counter(job, outcome).increment(0);
    }
}

pub(crate) fn count(job: &str, outcome: RunOutcome) {
    counter(job, outcome).increment(1);
}

fn counter(job: &str, outcome: RunOutcome) -> metrics::Counter {
    // Jobs are few, and named by programs.
    metrics::counter!("leasehold_job_runs_total", "task" => job.to_owned(), "outcome" => outcome.as_str())
}
