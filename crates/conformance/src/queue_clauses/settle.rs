//! How claims end.

use std::time::Duration;

use leasehold_domain::{ClaimKey, Outcome, WorkId, WorkState};
use serde_json::json;

use super::{
    ENDS, LONG, claim, complete, end, enqueue, extend, item, items, made_up, nothing, request, take, work,
};
use crate::QueueProvider;

/// What is done leaves nothing.
pub async fn complete_leaves_nothing<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let claim = take(&*one).await;
    assert_eq!(complete(&*one, &claim).await, Outcome::Done);
    assert_eq!(items(&*other).await, []);
    assert_eq!(other.stats().await.expect("it answers"), []);
}

/// A claim ends once, whatever is tried afterwards.
pub async fn a_claim_ends_once<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for first in ENDS {
        for second in ENDS {
            enqueue(&*queue, work("1")).await;
            let claim = take(&*queue).await;
            assert_eq!(end(&*queue, &claim, first).await, Outcome::Done, "{first}");
            let before = items(&*queue).await;
            let outcome = end(&*queue, &claim, second).await;
            assert_eq!(outcome, Outcome::NotOwned, "{first}, {second}");
            assert_eq!(extend(&*queue, &claim, LONG).await, Outcome::NotOwned);
            assert_eq!(items(&*queue).await, before, "{first}, {second}");
            provider.purge_tenant("acme").await;
        }
    }
}

/// However a claim ends, an item that changed meanwhile is a new one: free at once, no attempts, no error.
pub async fn changed_items_are_new<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for how in ENDS {
        enqueue(&*queue, work("1").with_max_attempts(2)).await;
        let first = take(&*queue).await;
        super::retry(&*queue, &first, Duration::ZERO).await;
        let second = take(&*queue).await;
        assert_eq!(
            (second.attempt, second.last_error.as_deref()),
            (2, Some("not now"))
        );
        enqueue(&*queue, work("1").with_payload(json!(how)).with_max_attempts(2)).await;
        assert_eq!(end(&*queue, &second, how).await, Outcome::DoneButChanged, "{how}");
        let seen = item(&*queue).await;
        assert_eq!((seen.state, seen.attempt_count), (WorkState::Ready, 0), "{how}");
        let third = take(&*queue).await;
        assert_eq!((third.attempt, third.last_error.as_deref()), (1, None), "{how}");
        assert_eq!(third.payload, Some(json!(how)));
        assert_eq!(complete(&*queue, &third).await, Outcome::Done);
    }
}

/// Beats between an enqueue and the end hide nothing.
pub async fn beats_hide_no_change<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    extend(&*queue, &claim, LONG).await;
    enqueue(&*queue, work("1")).await;
    assert_eq!(extend(&*queue, &claim, LONG).await, Outcome::Done);
    assert_eq!(complete(&*queue, &claim).await, Outcome::DoneButChanged);
    take(&*queue).await;
}

/// Every claim of a call has its own outcome, in the order of the call, and none keeps another from ending.
pub async fn batch_outcomes_are_in_order<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for how in ["complete", "retry", "fail", "requeue"] {
        for id in ["0", "1", "2", "3"] {
            enqueue(&*queue, work(id)).await;
        }
        let claims = claim(&*queue, &request().with_batch(10)).await.claims;
        assert_eq!(claims.len(), 4);
        enqueue(&*queue, work("1")).await;
        provider.expire(claims[2].key).await;
        take(&*queue).await;
        let keys: Vec<ClaimKey> = [3, 2, 1, 0].iter().map(|n| claims[*n].key).collect();
        let keys = [
            keys[0],
            keys[1],
            made_up(keys[0].id),
            keys[2],
            keys[3],
            made_up(WorkId::new(i64::MAX)),
        ];
        let outcomes = match how {
            "complete" => queue.complete(&keys).await,
            "retry" => queue.retry(&keys.map(|claim| retry(claim, LONG))).await,
            "fail" => queue.fail(&keys.map(failure)).await,
            _ => queue.requeue_after(&keys.map(|claim| requeue(claim, LONG))).await,
        };
        let expected = [
            Outcome::Done,
            Outcome::NotOwned,
            Outcome::NotOwned,
            Outcome::DoneButChanged,
            Outcome::Done,
            Outcome::NotOwned,
        ];
        assert_eq!(outcomes.expect("the queue is there"), expected, "{how}");
        provider.purge_tenant("acme").await;
    }
}

/// Thousands of claims end in one call.
pub async fn batches_of_any_number_end<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let many: Vec<_> = (0..2500).map(|n| work(&n.to_string())).collect();
    queue.enqueue_many(&many).await.expect("the queue is there");
    let mut keys = Vec::new();
    while keys.len() < 2500 {
        let claims = claim(&*queue, &request().with_batch(1000)).await.claims;
        assert_ne!(claims, []);
        keys.extend(claims.into_iter().map(|claim| claim.key));
    }
    keys.reverse();
    let extended = queue.extend(&keys, LONG).await.expect("the queue is there");
    assert_eq!(extended, vec![Outcome::Done; 2500]);
    let outcomes = queue.complete(&keys).await.expect("the queue is there");
    assert_eq!(outcomes, vec![Outcome::Done; 2500]);
    assert_eq!(items(&*queue).await, []);
}

/// Work whose tenant is removed ends without a word: nobody owns it, and nothing of it comes back.
pub async fn purged_work_ends_quietly<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    for how in ENDS {
        enqueue(&*one, work("1")).await;
        let claim = take(&*one).await;
        provider.purge_tenant("acme").await;
        assert_eq!(extend(&*one, &claim, LONG).await, Outcome::NotOwned, "{how}");
        assert_eq!(end(&*one, &claim, how).await, Outcome::NotOwned, "{how}");
        assert_eq!(items(&*other).await, [], "{how}");
        let letters = other.dead_letters(&leasehold_domain::Page::default()).await;
        assert_eq!(letters.expect("it answers"), [], "{how}");
        nothing(&*other).await;
    }
}

fn retry(claim: ClaimKey, backoff: Duration) -> leasehold_domain::Retry {
    let error = "not now".to_owned();
    leasehold_domain::Retry {
        claim,
        error,
        backoff,
    }
}

fn failure(claim: ClaimKey) -> leasehold_domain::Failure {
    let error = "never".to_owned();
    leasehold_domain::Failure { claim, error }
}

fn requeue(claim: ClaimKey, after: Duration) -> leasehold_domain::Requeue {
    leasehold_domain::Requeue { claim, after }
}
