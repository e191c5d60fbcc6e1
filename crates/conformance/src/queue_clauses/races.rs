//! Many at once, and calls that are dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{NewWork, Outcome, Requeue, WorkQueue};
use serde_json::json;
use tokio::task::JoinSet;

use super::{claim, complete, enqueue, items, request, take, work};
use crate::QueueProvider;
use crate::patience::{until_none, within_cap};

/// How many drop points each future is swept over.
const POLLS: usize = 8;

/// Polls `future` as often as it is woken, at most `polls` times, and drops it.
async fn drop_after(polls: usize, future: impl Future) {
    let mut future = std::pin::pin!(future);
    let mut left = polls;
    let polled = std::future::poll_fn(|context| {
        if left == 0 {
            return std::task::Poll::Ready(());
        }
        left -= 1;
        match future.as_mut().poll(context) {
            std::task::Poll::Pending if left > 0 => std::task::Poll::Pending,
            _ => std::task::Poll::Ready(()),
        }
    });
    // Nobody may wake it any more.
    _ = tokio::time::timeout(Duration::from_millis(50), polled).await;
}

/// Eight workers claim a hundred items: each is claimed once, and none is left.
pub async fn no_item_is_claimed_twice<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let many: Vec<NewWork> = (0..100).map(|n| work(&n.to_string())).collect();
    queue.enqueue_many(&many).await.expect("the queue is there");
    let mut workers = JoinSet::new();
    for n in 0..8 {
        let queue = provider.process().await;
        workers.spawn(async move {
            let mut mine = Vec::new();
            let mut empty = 0;
            while empty < 3 {
                let claims = claim(&*queue, &request().with_batch(1 + n % 3)).await.claims;
                empty = if claims.is_empty() { empty + 1 } else { 0 };
                mine.extend(claims);
            }
            mine
        });
    }
    let mut seen = BTreeSet::new();
    for claim in within_cap("the workers", workers.join_all())
        .await
        .into_iter()
        .flatten()
    {
        assert!(seen.insert(claim.key.id), "{} was claimed twice", claim.scope);
        assert_eq!(claim.attempt, 1);
    }
    // Who looked while others had everything locked may have left some.
    let left = claim(&*queue, &request().with_batch(100)).await.claims;
    assert_eq!(seen.len() + left.len(), 100);
}

/// Enqueues of many at once, in any order and of the same scopes, all end, and make one item of each.
pub async fn enqueues_do_not_block_each_other<P: QueueProvider>(provider: &P) {
    let mut producers = JoinSet::new();
    for producer in 0..4 {
        let queue = provider.process().await;
        producers.spawn(async move {
            for round in 0..10 {
                let mut many: Vec<NewWork> = (0..50)
                    .map(|n| work(&((n * 7 + round) % 50).to_string()))
                    .collect();
                if producer % 2 == 0 {
                    many.reverse();
                }
                queue.enqueue_many(&many).await.expect("the queue is there");
            }
        });
    }
    within_cap("the producers", producers.join_all()).await;
    assert_eq!(items(&*provider.process().await).await.len(), 50);
}

/// Producers enqueue while workers complete: the last payload of each scope is seen by somebody, and nothing is left.
pub async fn last_payload_is_always_seen<P: QueueProvider>(provider: &P) {
    const LAST: u64 = 30;
    let mut tasks = JoinSet::new();
    let seen: Arc<std::sync::Mutex<BTreeMap<String, u64>>> = Arc::default();
    for scope in ["a", "b", "c"] {
        let queue = provider.process().await;
        tasks.spawn(async move {
            for n in 1..=LAST {
                enqueue(&*queue, work(scope).with_payload(json!(n))).await;
            }
        });
    }
    for _ in 0..3 {
        let (queue, seen) = (provider.process().await, Arc::clone(&seen));
        tasks.spawn(async move {
            let all_seen = || {
                let seen = seen.lock().expect("nobody panics with it");
                seen.values().filter(|n| **n == LAST).count() == 3
            };
            while !all_seen() {
                for claim in claim(&*queue, &request().with_batch(2)).await.claims {
                    let n = claim.payload.as_ref().and_then(serde_json::Value::as_u64);
                    let n = n.expect("a number");
                    {
                        let mut seen = seen.lock().expect("nobody panics with it");
                        let last = seen.entry(claim.scope.scope_id.clone()).or_default();
                        assert!(*last <= n, "what was seen later is newer");
                        *last = n;
                    }
                    assert_ne!(complete(&*queue, &claim).await, Outcome::NotOwned);
                }
                tokio::task::yield_now().await;
            }
        });
    }
    within_cap("producers and workers", tasks.join_all()).await;
    let queue = provider.process().await;
    until_none("items are left", async || {
        for claim in claim(&*queue, &request().with_batch(10)).await.claims {
            complete(&*queue, &claim).await;
        }
        items(&*queue).await.pop()
    })
    .await;
}

/// An enqueue that is dropped anywhere was done or was not; done again it is done once.
pub async fn enqueue_dropped_anywhere<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    for polls in 0..POLLS {
        // Its own, because what was dropped in the round before may arrive only now.
        let scope = polls.to_string();
        let new = work(&scope).with_payload(json!(polls));
        drop_after(polls, one.enqueue(&new)).await;
        enqueue(&*other, new).await;
        let claim = loop {
            let claim = within_cap("a claim", soon(&*other)).await;
            if claim.scope.scope_id == scope {
                break claim;
            }
        };
        assert_eq!(claim.payload, Some(json!(polls)));
        // What was dropped may still arrive, and then makes it a changed one.
        complete(&*other, &claim).await;
        provider.purge_tenant("acme").await;
    }
}

/// A claim that is dropped anywhere keeps its items for the lease at most.
pub async fn claim_dropped_anywhere<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let short = request().with_lease(Duration::from_millis(100));
    enqueue(&*one, work("1").with_max_attempts(100)).await;
    for polls in 0..POLLS {
        drop_after(polls, one.claim(&short)).await;
        provider.pass(Duration::from_millis(100)).await;
        let claim = within_cap("a claim", soon(&*other)).await;
        let key = claim.key;
        let after = Duration::ZERO;
        let outcomes = other.requeue_after(&[Requeue { claim: key, after }]).await;
        assert_eq!(outcomes.expect("it answers"), [Outcome::Done]);
    }
}

/// A completion that is dropped anywhere was done or was not; done again it is done.
pub async fn complete_dropped_anywhere<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    for polls in 0..POLLS {
        enqueue(&*one, work("1")).await;
        let claim = take(&*one).await;
        let keys = [claim.key];
        drop_after(polls, one.complete(&keys)).await;
        let outcome = complete(&*other, &claim).await;
        assert!(matches!(outcome, Outcome::Done | Outcome::NotOwned));
        assert_eq!(items(&*other).await, []);
    }
}

/// Claims until there is something. A call that was dropped may still have it locked.
async fn soon(queue: &dyn WorkQueue) -> leasehold_domain::Claim {
    loop {
        if let Some(claim) = claim(queue, &request()).await.claims.pop() {
            return claim;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
