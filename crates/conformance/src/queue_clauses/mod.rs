//! The clauses of queues, by what they are about. Each is a promise in one sentence, and the experiment that tests it.

mod bounds;
mod claims;
mod enqueue;
mod letters;
mod looking;
mod races;
mod retries;
mod settle;
mod stale;

use std::time::Duration;

use leasehold_domain::{
    Claim, ClaimKey, ClaimRequest, ClaimToken, Claimed, Failure, NewWork, Outcome, Page, QueueError, Requeue,
    Retry, Scope, WorkId, WorkItem, WorkQueue,
};

pub use bounds::*;
pub use claims::*;
pub use enqueue::*;
pub use letters::*;
pub use looking::*;
pub use races::*;
pub use retries::*;
pub use settle::*;
pub use stale::*;

use crate::patience::within_cap;

/// So long that it never ends in a test by itself.
const LONG: Duration = Duration::from_secs(3600);

fn scope(id: &str) -> Scope {
    Scope::new("acme", "reindex", "plan", id)
}

fn work(id: &str) -> NewWork {
    NewWork::new(scope(id))
}

fn request() -> ClaimRequest {
    ClaimRequest::new(["reindex"], "conformance").with_lease(LONG)
}

async fn enqueue(queue: &dyn WorkQueue, work: NewWork) {
    within_cap("an enqueue", queue.enqueue(&work))
        .await
        .expect("the queue is there");
}

async fn claim(queue: &dyn WorkQueue, request: &ClaimRequest) -> Claimed {
    within_cap("a claim", queue.claim(request))
        .await
        .expect("the queue is there")
}

/// Claims the only item there is to claim.
async fn take(queue: &dyn WorkQueue) -> Claim {
    let mut claimed = claim(queue, &request().with_batch(10)).await;
    assert_eq!(claimed.dead, []);
    assert_eq!(claimed.claims.len(), 1, "one item is ready: {:?}", claimed.claims);
    claimed.claims.remove(0)
}

/// There is nothing to claim.
async fn nothing(queue: &dyn WorkQueue) {
    assert_eq!(claim(queue, &request().with_batch(10)).await, Claimed::default());
}

async fn items(queue: &dyn WorkQueue) -> Vec<WorkItem> {
    queue.items(&Page::default()).await.expect("the queue is there")
}

/// The only item there is.
async fn item(queue: &dyn WorkQueue) -> WorkItem {
    let mut items = items(queue).await;
    assert_eq!(items.len(), 1, "there is one item: {items:?}");
    items.remove(0)
}

async fn complete(queue: &dyn WorkQueue, claim: &Claim) -> Outcome {
    one(queue.complete(&[claim.key]).await)
}

async fn retry(queue: &dyn WorkQueue, claim: &Claim, backoff: Duration) -> Outcome {
    let error = "not now".to_owned();
    one(queue
        .retry(&[Retry {
            claim: claim.key,
            error,
            backoff,
        }])
        .await)
}

async fn fail(queue: &dyn WorkQueue, claim: &Claim) -> Outcome {
    let error = "never".to_owned();
    one(queue
        .fail(&[Failure {
            claim: claim.key,
            error,
        }])
        .await)
}

async fn requeue(queue: &dyn WorkQueue, claim: &Claim, after: Duration) -> Outcome {
    one(queue
        .requeue_after(&[Requeue {
            claim: claim.key,
            after,
        }])
        .await)
}

async fn give_back(queue: &dyn WorkQueue, claim: &Claim) -> Outcome {
    one(queue.give_back(&[claim.key]).await)
}

async fn extend(queue: &dyn WorkQueue, claim: &Claim, lease: Duration) -> Outcome {
    one(queue.extend(&[claim.key], lease).await)
}

fn one(outcomes: Result<Vec<Outcome>, QueueError>) -> Outcome {
    let outcomes = outcomes.expect("the queue is there");
    assert_eq!(outcomes.len(), 1);
    outcomes[0]
}

/// Every way to end a claim.
const ENDS: [&str; 5] = ["complete", "retry", "fail", "requeue", "give back"];

async fn end(queue: &dyn WorkQueue, claim: &Claim, how: &str) -> Outcome {
    match how {
        "complete" => complete(queue, claim).await,
        "retry" => retry(queue, claim, LONG).await,
        "fail" => fail(queue, claim).await,
        "requeue" => requeue(queue, claim, LONG).await,
        "give back" => give_back(queue, claim).await,
        other => panic!("{other} ends no claim"),
    }
}

/// A claim that nobody has made.
fn made_up(id: WorkId) -> ClaimKey {
    let token = ClaimToken::new();
    ClaimKey { id, token }
}
