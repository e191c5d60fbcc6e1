//! What comes in: one item a scope, and nothing is lost.

use chrono::{DateTime, TimeDelta, Utc};
use leasehold_domain::{ClaimRequest, NewWork, Outcome, Page, Scope, WorkState};
use serde_json::json;

use super::{claim, complete, enqueue, item, items, nothing, request, scope, take, work};
use crate::QueueProvider;

fn day(n: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::days(10_000 + n)
}

/// What is enqueued can be claimed, in every process, as it was enqueued.
pub async fn enqueued_is_claimed<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let payload = json!({ "a": [1, "ä", null], "b": { "c": true } });
    enqueue(
        &*one,
        work("1")
            .with_payload(payload.clone())
            .with_priority(-5)
            .with_event_at(day(1))
            .with_max_attempts(3),
    )
    .await;
    let claim = take(&*other).await;
    assert_eq!(claim.scope, scope("1"));
    assert_eq!(claim.payload, Some(payload));
    assert_eq!((claim.priority, claim.event_at), (-5, day(1)));
    assert_eq!((claim.attempt, claim.max_attempts), (1, 3));
    assert_eq!(claim.last_error, None);
    nothing(&*one).await;
}

/// Who says no more than the scope gets the defaults.
pub async fn defaults_are_those_documented<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let seen = item(&*queue).await;
    assert_eq!((seen.priority, seen.max_attempts), (100, 10));
    assert_eq!((seen.payload, seen.attempt_count), (None, 0));
    assert_eq!((seen.state, seen.not_before), (WorkState::Ready, None));
    let claim = take(&*queue).await;
    assert!((claim.claimed_at - claim.event_at).abs() < TimeDelta::minutes(1));
}

/// The same scope again is the same item.
pub async fn one_item_a_scope<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let first = item(&*one).await.id;
    enqueue(&*other, work("1")).await;
    enqueue(&*one, work("1")).await;
    assert_eq!(item(&*one).await.id, first);
    let claim = take(&*one).await;
    assert_eq!(complete(&*one, &claim).await, Outcome::Done);
    assert_eq!(items(&*one).await, []);
}

/// A scope is all of its parts, and none runs into the next.
pub async fn scopes_are_kept_apart<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let scopes = [
        Scope::new("a", "reindex", "b", "c"),
        Scope::new("b", "reindex", "b", "c"),
        Scope::new("a", "reindex", "c", "b"),
        Scope::new("a", "reindex", "bc", "c"),
        Scope::new("ab", "reindex", "b", "c"),
        Scope::new("a", "reindex", "b", "C"),
        Scope::new("a", "reindex", "b", "c "),
        Scope::new("a", "reindex", "b", "\u{e4}"),
        Scope::new("a", "reindex", "b", "a\u{308}"),
        Scope::new("a", "other", "b", "c"),
    ];
    for scope in scopes.clone() {
        enqueue(&*queue, NewWork::new(scope)).await;
    }
    let seen: Vec<Scope> = items(&*queue).await.into_iter().map(|item| item.scope).collect();
    assert_eq!(seen, scopes);
}

/// The newest event's time stays, whichever comes first.
pub async fn merge_keeps_the_newest_event<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for (n, newest) in [(2, 2), (1, 2), (3, 3)] {
        enqueue(&*queue, work("1").with_event_at(day(n))).await;
        assert_eq!(item(&*queue).await.event_at, day(newest));
    }
    enqueue(&*queue, work("1")).await;
    assert!(item(&*queue).await.event_at > day(3), "an event of now is newer");
    let future = DateTime::from_timestamp(32_503_680_000, 0).expect("in the year 3000");
    enqueue(&*queue, work("1").with_event_at(future)).await;
    enqueue(&*queue, work("1")).await;
    assert_eq!(item(&*queue).await.event_at, future);
}

/// The most urgent priority stays, whichever comes first.
pub async fn merge_keeps_the_most_urgent_priority<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for (priority, urgent) in [(50, 50), (100, 50), (-7, -7), (0, -7)] {
        enqueue(&*queue, work("1").with_priority(priority)).await;
        assert_eq!(item(&*queue).await.priority, urgent);
    }
}

/// The payload is that of the last enqueue, also when it has none, and however old its event is.
pub async fn merge_takes_the_last_payload<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_payload(json!(1)).with_event_at(day(2))).await;
    enqueue(&*queue, work("1").with_payload(json!(2)).with_event_at(day(1))).await;
    assert_eq!(item(&*queue).await.payload, Some(json!(2)));
    enqueue(&*queue, work("1").with_payload(json!(null))).await;
    assert_eq!(item(&*queue).await.payload, Some(json!(null)));
    enqueue(&*queue, work("1")).await;
    assert_eq!(item(&*queue).await.payload, None);
}

/// Any number at once, in any order, with any repeated: as if they had come one after the other.
pub async fn enqueue_many_of_any_number<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let mut many: Vec<NewWork> = (0..2500)
        .rev()
        .map(|n| work(&format!("{:04}", n % 1250)).with_payload(json!(n)))
        .collect();
    many.push(work("0007").with_priority(3).with_event_at(day(1)));
    queue.enqueue_many(&many).await.expect("the queue is there");
    let mut seen = Vec::new();
    loop {
        let page = Page {
            after: seen.last().map_or(0, |(id, _, _): &(i64, String, _)| *id),
            limit: 1000,
            ..Page::default()
        };
        let items = queue.items(&page).await.expect("the queue is there");
        if items.is_empty() {
            break;
        }
        seen.extend(
            items
                .into_iter()
                .map(|item| (item.id.get(), item.scope.scope_id, item.payload)),
        );
    }
    assert_eq!(seen.len(), 1250);
    for (_, scope_id, payload) in seen {
        let last = match scope_id.as_str() {
            "0007" => None,
            id => Some(json!(id.parse::<u64>().expect("a number"))),
        };
        assert_eq!(payload, last);
    }
    let first = claim(&*queue, &request()).await.claims;
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].scope, scope("0007"), "it is the most urgent");
    assert!(first[0].event_at > day(1), "it keeps the newest time");
}

/// What is enqueued while it is worked on is worked on again, with the new payload.
pub async fn enqueue_while_claimed_is_not_lost<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1").with_payload(json!("old"))).await;
    let claim = take(&*one).await;
    enqueue(&*other, work("1").with_payload(json!("new"))).await;
    nothing(&*other).await;
    assert_eq!(complete(&*one, &claim).await, Outcome::DoneButChanged);
    let again = take(&*other).await;
    assert_eq!(again.payload, Some(json!("new")));
    assert_eq!(again.attempt, 1);
    assert_ne!(again.key.token, claim.key.token);
    assert_eq!(complete(&*other, &again).await, Outcome::Done);
    assert_eq!(items(&*one).await, []);
}

/// However often it is enqueued while it is worked on, it is worked on once more.
pub async fn enqueues_while_claimed_are_one<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    for n in 0..5 {
        enqueue(&*queue, work("1").with_payload(json!(n))).await;
    }
    assert_eq!(complete(&*queue, &claim).await, Outcome::DoneButChanged);
    let again = take(&*queue).await;
    assert_eq!(again.payload, Some(json!(4)));
    assert_eq!(complete(&*queue, &again).await, Outcome::Done);
    nothing(&*queue).await;
}

/// What was done can come again, as another item.
pub async fn done_scopes_can_come_again<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let first = take(&*queue).await;
    complete(&*queue, &first).await;
    enqueue(&*queue, work("1")).await;
    let second = take(&*queue).await;
    assert!(second.key.id > first.key.id);
    assert_eq!(complete(&*queue, &first).await, Outcome::NotOwned);
    assert_eq!(complete(&*queue, &second).await, Outcome::Done);
}

/// A worker gets the kinds that it asks for, and no others.
pub async fn kinds_are_kept_apart<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for kind in ["a", "b", "c"] {
        enqueue(&*queue, NewWork::new(Scope::new("acme", kind, "plan", "1"))).await;
    }
    let of = |kinds: &[&str]| ClaimRequest::new(kinds.iter().copied(), "w").with_batch(10);
    let kinds = async |request: ClaimRequest| -> Vec<String> {
        let claims = claim(&*queue, &request).await.claims;
        claims.into_iter().map(|claim| claim.scope.kind).collect()
    };
    assert_eq!(kinds(of(&["d"])).await, [""; 0]);
    assert_eq!(kinds(of(&["b"])).await, ["b"]);
    assert_eq!(kinds(of(&["c", "b", "a", "a"])).await, ["a", "c"]);
}
