//! [`Settler`]: what became of the items, told to the queue in batches.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use leasehold_domain::{ClaimKey, Failure, Outcome, QueueError, Requeue, Retry, WorkQueue};
use tokio::sync::Notify;

use super::flight::{Flight, InFlight};
use super::processor::{Dropped, GivenUp};
use super::tell::Hooks;
use crate::error::chain;
use crate::queue::store::PgWorkQueue;

/// The first pause after the database did not answer, and the longest; each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How an item was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Complete,
    Retry {
        error: String,
        pause: Duration,
    },
    Fail {
        error: String,
    },
    PutOff(Duration),
    GiveBack,
    /// The processor has settled it.
    Settled,
    Lost,
}

type Left = (Arc<InFlight>, Verdict);

/// Items that are worked on to the end, and wait to be settled.
#[derive(Debug, Default)]
pub(super) struct Settler {
    left: Mutex<Vec<Left>>,
    closed: AtomicBool,
    more: Notify,
}

impl Settler {
    fn left(&self) -> MutexGuard<'_, Vec<Left>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: Arc<InFlight>, verdict: Verdict) {
        item.set_settling();
        self.left().push((item, verdict));
        self.more.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.left().len()
    }

    /// Nothing is pushed any more: the task ends when all is settled.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.more.notify_one();
    }

    /// Settles until it is closed. `settled` hears when there is less to do, `again` when items may be claimed again
    /// sooner than the leases said.
    pub(super) async fn run(
        &self,
        queue: &PgWorkQueue,
        flight: &Flight,
        hooks: &Hooks,
        settled: &Notify,
        again: &Notify,
    ) {
        let (mut pause, longest) = PAUSES;
        let mut left = Vec::new();
        loop {
            left.append(&mut self.left());
            if left.is_empty() {
                if self.closed.load(Ordering::Relaxed) {
                    return;
                }
                self.more.notified().await;
                continue;
            }
            left = settle(queue, flight, hooks, left, again).await;
            settled.notify_one();
            if left.is_empty() {
                pause = PAUSES.0;
            } else {
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 2);
            }
        }
    }
}

/// Answers what could not be settled because the database did not answer.
async fn settle(
    queue: &PgWorkQueue,
    flight: &Flight,
    hooks: &Hooks,
    left: Vec<Left>,
    come_back: &Notify,
) -> Vec<Left> {
    let (mut complete, mut retry, mut fail, mut back) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (item, verdict) in left {
        match verdict {
            Verdict::Complete => complete.push((item, verdict)),
            Verdict::Retry { .. } => retry.push((item, verdict)),
            Verdict::Fail { .. } => fail.push((item, verdict)),
            Verdict::PutOff(_) | Verdict::GiveBack => back.push((item, verdict)),
            Verdict::Settled => {
                // Whether it changed meanwhile only the processor knows.
                come_back.notify_one();
                flight.let_go(item.claim.key);
                hooks.tell(|hooks| hooks.on_processed(&item.claim, Outcome::Done));
            }
            Verdict::Lost => {
                flight.let_go(item.claim.key);
                hooks.tell(|hooks| hooks.on_dropped(&item.claim, Dropped::Lost));
            }
        }
    }
    let mut again = Vec::new();
    if !complete.is_empty() {
        let claims: Vec<ClaimKey> = complete.iter().map(|(item, _)| item.claim.key).collect();
        again.extend(told(
            flight,
            hooks,
            come_back,
            complete,
            queue.complete(&claims).await,
        ));
    }
    if !retry.is_empty() {
        let retries: Vec<Retry> = retry.iter().filter_map(as_retry).collect();
        again.extend(told(flight, hooks, come_back, retry, queue.retry(&retries).await));
    }
    if !fail.is_empty() {
        let failures: Vec<Failure> = fail.iter().filter_map(as_failure).collect();
        again.extend(told(flight, hooks, come_back, fail, queue.fail(&failures).await));
    }
    if !back.is_empty() {
        let requeues: Vec<Requeue> = back.iter().map(as_requeue).collect();
        again.extend(told(
            flight,
            hooks,
            come_back,
            back,
            queue.requeue_after(&requeues).await,
        ));
    }
    again
}

fn as_retry((item, verdict): &Left) -> Option<Retry> {
    let Verdict::Retry { error, pause } = verdict else {
        return None;
    };
    Some(Retry {
        claim: item.claim.key,
        error: error.clone(),
        backoff: *pause,
    })
}

fn as_failure((item, verdict): &Left) -> Option<Failure> {
    let Verdict::Fail { error } = verdict else {
        return None;
    };
    Some(Failure {
        claim: item.claim.key,
        error: error.clone(),
    })
}

fn as_requeue((item, verdict): &Left) -> Requeue {
    let after = match verdict {
        Verdict::PutOff(after) => *after,
        _ => Duration::ZERO,
    };
    Requeue {
        claim: item.claim.key,
        after,
    }
}

fn told(
    flight: &Flight,
    hooks: &Hooks,
    come_back: &Notify,
    settled: Vec<Left>,
    answer: Result<Vec<Outcome>, QueueError>,
) -> Vec<Left> {
    let outcomes = match answer {
        Ok(outcomes) => outcomes,
        Err(error) if error.is_retryable() => {
            tracing::warn!(error = chain(&error), "items were not settled yet");
            return settled;
        }
        Err(error) => {
            tracing::error!(error = chain(&error), "items were not settled; their leases end");
            vec![Outcome::NotOwned; settled.len()]
        }
    };
    for ((item, verdict), outcome) in settled.into_iter().zip(outcomes) {
        let claim = &item.claim;
        flight.let_go(claim.key);
        let put_back = matches!(verdict, Verdict::Retry { .. } | Verdict::PutOff(_));
        if outcome == Outcome::DoneButChanged || (put_back && outcome == Outcome::Done) {
            come_back.notify_one();
        }
        metrics::counter!("leasehold_queue_settled_total", "outcome" => label(&verdict, outcome))
            .increment(1);
        hooks.tell(|hooks| match (verdict, outcome) {
            (_, Outcome::NotOwned) | (Verdict::Lost, _) => hooks.on_dropped(claim, Dropped::Lost),
            (Verdict::Complete | Verdict::Settled, outcome) => hooks.on_processed(claim, outcome),
            (Verdict::Retry { error, pause }, outcome) => {
                let changed = outcome == Outcome::DoneButChanged;
                hooks.on_retried(claim, &error, if changed { Duration::ZERO } else { pause });
            }
            (Verdict::Fail { error }, _) => hooks.on_dead_lettered(&GivenUp::by(claim, &error)),
            (Verdict::PutOff(_), _) => hooks.on_dropped(claim, Dropped::PutOff),
            (Verdict::GiveBack, _) => hooks.on_dropped(claim, Dropped::GivenBack),
        });
    }
    Vec::new()
}

fn label(verdict: &Verdict, outcome: Outcome) -> &'static str {
    match (verdict, outcome) {
        (_, Outcome::NotOwned) | (Verdict::Lost, _) => "not_owned",
        (Verdict::Complete | Verdict::Settled, _) => "completed",
        (Verdict::Retry { .. }, _) => "retried",
        (Verdict::Fail { .. }, _) => "failed",
        (Verdict::PutOff(_) | Verdict::GiveBack, _) => "put_back",
    }
}
