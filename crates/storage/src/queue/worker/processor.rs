//! [`Processor`]: what a worker does with an item; [`WorkerHooks`]: what it tells of that.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{Claim, DeadLetter, Outcome, Scope};
use serde_json::Value;

/// Does the work of one item. A worker calls it for several items at the same time.
#[async_trait]
pub trait Processor: Send + Sync + 'static {
    /// Looks at what the item is about, and does what is to be done.
    ///
    /// It is dropped where it waits when the claim is lost, and when a worker that stops has waited long enough. Then,
    /// and when the process dies, the item is worked on again: doing it twice must do no harm.
    ///
    /// # Errors
    /// Whatever went wrong. The item is tried again after a pause, but not if an error in the chain is
    /// [`NonRetryable`], and not after the last attempt: then it becomes a dead letter. A panic is an error too.
    ///
    /// # Cancel safety
    /// See above.
    async fn process(&self, claim: &Claim) -> Result<Processed, Box<dyn Error + Send + Sync>>;
}

/// How an item was worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processed {
    /// To the end.
    Done,
    /// To the end, and the processor has settled the claim itself, as by
    /// [`complete_in_tx`](crate::PgWorkQueue::complete_in_tx).
    Settled,
    /// Not now: look again after this time. It does not count as an attempt.
    After(Duration),
}

/// An error that another attempt would not change.
#[derive(Debug)]
pub struct NonRetryable(Box<dyn Error + Send + Sync>);

impl NonRetryable {
    /// Says so of an error, or of a text.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into())
    }

    /// Whether somebody has said so of this error, or of one that it came from.
    pub(super) fn is_in(error: &(dyn Error + 'static)) -> bool {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if error.is::<Self>() {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

impl fmt::Display for NonRetryable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for NonRetryable {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// Why a worker is rid of an item that it did not work on to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// The claim was lost: somebody else has it, or may have, or the item is no more.
    Lost,
    /// The worker stops, and has given it back.
    GivenBack,
    /// The processor has put it off.
    PutOff,
}

/// Work that was given up.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenUp {
    /// What it was about.
    pub scope: Scope,
    /// What the item had to say.
    pub payload: Option<Value>,
    /// How often it was begun.
    pub attempts: u32,
    /// What went wrong at last.
    pub error: String,
}

impl GivenUp {
    pub(super) fn by(claim: &Claim, error: &str) -> Self {
        Self {
            scope: claim.scope.clone(),
            payload: claim.payload.clone(),
            attempts: claim.attempt,
            error: error.to_owned(),
        }
    }
}

impl From<DeadLetter> for GivenUp {
    fn from(letter: DeadLetter) -> Self {
        Self {
            scope: letter.scope,
            payload: letter.payload,
            attempts: letter.attempt_count,
            error: letter.last_error,
        }
    }
}

/// Hears what a worker does, each after it is true in the database. A hook that blocks holds up the worker; one that
/// panics is logged and ignored.
pub trait WorkerHooks: Send + Sync + 'static {
    /// The worker begins.
    fn on_started(&self, worker: &str) {
        _ = worker;
    }

    /// The worker has ended, and has nothing any more.
    fn on_stopped(&self, worker: &str) {
        _ = worker;
    }

    /// Items were claimed.
    fn on_claimed(&self, claims: &[Claim]) {
        _ = claims;
    }

    /// An item was worked on to the end.
    fn on_processed(&self, claim: &Claim, outcome: Outcome) {
        _ = (claim, outcome);
    }

    /// An item failed, and is tried again after this pause; at once when it changed meanwhile.
    fn on_retried(&self, claim: &Claim, error: &str, pause: Duration) {
        _ = (claim, error, pause);
    }

    /// An item was not worked on to the end here, and did not fail.
    fn on_dropped(&self, claim: &Claim, why: Dropped) {
        _ = (claim, why);
    }

    /// Work was given up: there is a dead letter.
    fn on_dead_lettered(&self, given_up: &GivenUp) {
        _ = given_up;
    }

    /// One statement has extended the leases of this many items.
    fn on_lease_extended(&self, items: usize) {
        _ = items;
    }
}

/// Nobody listens.
impl WorkerHooks for () {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Box<dyn Error + Send + Sync>);

    #[test]
    fn what_cannot_be_tried_again_is_found_wherever_it_is() {
        let never = || NonRetryable::new("bad address");
        assert!(NonRetryable::is_in(&never()));
        assert!(NonRetryable::is_in(&Outer(Box::new(never()))));
        assert!(!NonRetryable::is_in(&Outer("later".into())));
        assert_eq!(never().to_string(), "bad address");
    }
}
