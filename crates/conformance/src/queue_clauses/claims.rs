//! Who gets what, in which order, and for how long.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use leasehold_domain::{ClaimRequest, NewWork, Outcome, Scope, WorkState};

use super::{
    LONG, claim, complete, enqueue, extend, give_back, item, items, made_up, nothing, request, take, work,
};
use crate::QueueProvider;

/// What is claimed is nobody else's, also not the same worker's.
pub async fn claimed_is_not_claimed_again<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let claim = take(&*one).await;
    nothing(&*one).await;
    nothing(&*other).await;
    let seen = item(&*other).await;
    assert_eq!((seen.state, seen.id), (WorkState::Claimed, claim.key.id));
    assert_eq!((seen.attempt_count, seen.not_before), (1, None));
}

/// An empty queue gives nothing, at once.
pub async fn empty_gives_nothing<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    nothing(&*queue).await;
    assert_eq!(items(&*queue).await, []);
}

/// By priority, then by the time of the event, then in the order in which they came; also across kinds.
pub async fn order_is_priority_event_id<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let at = |n: i64| -> DateTime<Utc> { DateTime::UNIX_EPOCH + TimeDelta::seconds(n) };
    let table = [
        ("a", 5, 30, "6"),
        ("b", -1, 90, "3"),
        ("a", 5, 20, "4"),
        ("b", 5, 20, "5"),
        ("a", -2, 99, "2"),
        ("b", i32::MAX, 1, "7"),
        ("a", i32::MIN, 1000, "1"),
    ];
    for (kind, priority, event, place) in table {
        let work = NewWork::new(Scope::new("acme", kind, "plan", place));
        enqueue(&*queue, work.with_priority(priority).with_event_at(at(event))).await;
    }
    let request = ClaimRequest::new(["a", "b"], "w");
    let mut order = Vec::new();
    for batch in [1, 2, 10] {
        let claims = claim(&*queue, &request.clone().with_batch(batch)).await.claims;
        order.extend(claims.into_iter().map(|claim| claim.scope.scope_id));
    }
    assert_eq!(order, ["1", "2", "3", "4", "5", "6", "7"]);
}

/// A claim takes no more than it asked for.
pub async fn batch_bounds_a_claim<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let many: Vec<NewWork> = (0..25).map(|n| work(&n.to_string())).collect();
    queue.enqueue_many(&many).await.expect("the queue is there");
    let mut seen = BTreeSet::new();
    for (batch, found) in [(1, 1), (10, 10), (10, 10), (1000, 4), (10, 0)] {
        let claims = claim(&*queue, &request().with_batch(batch)).await.claims;
        assert_eq!(claims.len(), found);
        seen.extend(claims.into_iter().map(|claim| claim.key.id));
    }
    assert_eq!(seen.len(), 25);
}

/// Every claim has a token of its own.
pub async fn tokens_differ<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let mut tokens = BTreeSet::new();
    for _ in 0..5 {
        let claim = take(&*queue).await;
        assert!(tokens.insert(claim.key.token));
        give_back(&*queue, &claim).await;
    }
}

/// The lease is as long as was asked for, to the microsecond.
pub async fn lease_is_exact<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for micros in [100_000, 123_457, 999_999, 1_000_001, 86_400_000_000] {
        enqueue(&*queue, work("1")).await;
        let lease = Duration::from_micros(micros);
        let claims = claim(&*queue, &request().with_lease(lease)).await.claims;
        assert_eq!(
            claims[0].expires_at - claims[0].claimed_at,
            TimeDelta::from_std(lease).expect("it is short")
        );
        complete(&*queue, &claims[0]).await;
    }
}

/// A lease of less than a second ends, and not before.
pub async fn short_leases_end<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let short = Duration::from_millis(400);
    let first = claim(&*one, &request().with_lease(short)).await.claims;
    let early = claim(&*other, &request()).await.claims;
    provider.pass(short).await;
    let late = claim(&*other, &request()).await.claims;
    let second = early.iter().chain(&late).collect::<Vec<_>>();
    assert_eq!(second.len(), 1, "it is free again");
    assert!(
        second[0].claimed_at >= first[0].expires_at,
        "it was free only when the lease was over"
    );
}

/// What expired can be claimed at once, with nobody cleaning up; the attempt was one.
pub async fn expired_is_claimable_at_once<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let first = take(&*one).await;
    provider.expire(first.key).await;
    assert_eq!(item(&*one).await.state, WorkState::Ready);
    let second = take(&*other).await;
    assert_eq!(second.key.id, first.key.id);
    assert_ne!(second.key.token, first.key.token);
    assert_eq!(second.attempt, 2);
    assert!(second.last_error.is_some(), "the crash is told");
}

/// An extension keeps others out for as long as it says.
pub async fn extend_keeps_the_claim<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let short = Duration::from_secs(1);
    let mut claims = claim(&*one, &request().with_lease(short)).await.claims;
    let claimed = claims.remove(0);
    assert_eq!(extend(&*one, &claimed, LONG).await, Outcome::Done);
    provider.pass(short).await;
    nothing(&*other).await;
    assert_eq!(complete(&*one, &claimed).await, Outcome::Done);
}

/// An extension never ends a lease sooner.
pub async fn extend_never_shortens<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let claimed = take(&*one).await;
    let short = Duration::from_millis(100);
    assert_eq!(extend(&*one, &claimed, short).await, Outcome::Done);
    provider.pass(short).await;
    nothing(&*other).await;
}

/// Beats change nothing but the end: afterwards the item is as it was claimed.
pub async fn many_beats_do_not_change_the_item<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claimed = take(&*queue).await;
    for _ in 0..10 {
        assert_eq!(extend(&*queue, &claimed, LONG).await, Outcome::Done);
    }
    assert_eq!(complete(&*queue, &claimed).await, Outcome::Done);
    assert_eq!(items(&*queue).await, []);
}

/// What nobody claimed cannot be extended.
pub async fn extend_needs_a_claim<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let id = item(&*queue).await.id;
    let outcomes = queue.extend(&[made_up(id)], LONG).await.expect("it answers");
    assert_eq!(outcomes, [Outcome::NotOwned]);
    let claimed = take(&*queue).await;
    let outcomes = queue.extend(&[made_up(id)], LONG).await.expect("it answers");
    assert_eq!(outcomes, [Outcome::NotOwned]);
    give_back(&*queue, &claimed).await;
    assert_eq!(extend(&*queue, &claimed, LONG).await, Outcome::NotOwned);
    take(&*queue).await;
}
