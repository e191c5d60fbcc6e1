//! Dead letters: they come back when somebody says so, and are not kept for ever.

use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use leasehold_domain::{DeadLetter, NewWork, Outcome, Page, Retention, Scope, WorkQueue};
use serde_json::json;

use super::{LONG, complete, enqueue, fail, item, items, nothing, retry, take, work};
use crate::QueueProvider;

async fn letters(queue: &dyn WorkQueue) -> Vec<DeadLetter> {
    queue.dead_letters(&Page::default()).await.expect("it answers")
}

async fn redrive(queue: &dyn WorkQueue, letters: &[DeadLetter]) -> u64 {
    let ids: Vec<i64> = letters.iter().map(|letter| letter.id).collect();
    queue.redrive("acme", &ids).await.expect("it answers")
}

async fn bury(queue: &dyn WorkQueue, work: NewWork) {
    enqueue(queue, work).await;
    let claim = take(queue).await;
    assert_eq!(fail(queue, &claim).await, Outcome::Done);
}

/// What is redriven is as if it were enqueued again: all its attempts, its payload, its place.
pub async fn redrive_enqueues_again<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let event_at = DateTime::UNIX_EPOCH + TimeDelta::days(9);
    let work = work("1")
        .with_payload(json!({ "a": 1 }))
        .with_priority(3)
        .with_event_at(event_at)
        .with_max_attempts(4);
    bury(&*one, work).await;
    let dead = letters(&*other).await;
    assert_eq!(redrive(&*other, &dead).await, 1);
    assert_eq!(letters(&*one).await, []);
    let again = take(&*one).await;
    assert_eq!((again.attempt, again.max_attempts), (1, 4));
    assert_eq!((again.priority, again.event_at), (3, event_at));
    assert_eq!(again.payload, Some(json!({ "a": 1 })));
    assert_eq!(again.last_error, None);
    assert_eq!(redrive(&*other, &dead).await, 0, "it is no dead letter any more");
}

/// A letter whose scope has an item already is merged into that, which keeps its own payload and is looked at again.
pub async fn redrive_merges_into_a_live_item<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    bury(&*queue, work("1").with_payload(json!("old")).with_priority(1)).await;
    enqueue(&*queue, work("1").with_payload(json!("new"))).await;
    let claim = take(&*queue).await;
    assert_eq!(redrive(&*queue, &letters(&*queue).await).await, 1);
    let seen = item(&*queue).await;
    assert_eq!((seen.payload, seen.priority), (Some(json!("new")), 1));
    assert_eq!(complete(&*queue, &claim).await, Outcome::DoneButChanged);
    assert_eq!(take(&*queue).await.payload, Some(json!("new")));
}

/// A redrive does not end the pause of an item either.
pub async fn redrive_does_not_end_a_pause<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    bury(&*queue, work("1")).await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    retry(&*queue, &claim, LONG).await;
    redrive(&*queue, &letters(&*queue).await).await;
    nothing(&*queue).await;
}

/// Several letters of one scope become one item, with the payload of the last.
pub async fn redrive_of_one_scope_twice<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for n in 1..=3 {
        bury(
            &*queue,
            work("1").with_payload(json!(n)).with_priority(10 * (4 - n)),
        )
        .await;
    }
    bury(&*queue, work("2")).await;
    assert_eq!(redrive(&*queue, &letters(&*queue).await).await, 4);
    let items = items(&*queue).await;
    let first = items.iter().find(|item| item.scope.scope_id == "1");
    let first = first.expect("it is there");
    assert_eq!((first.payload.clone(), first.priority), (Some(json!(3)), 10));
    assert_eq!(items.len(), 2);
}

/// The letters of one tenant are not redriven for another.
pub async fn redrive_keeps_to_the_tenant<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    bury(&*queue, work("1")).await;
    let other = NewWork::new(Scope::new("other", "reindex", "plan", "1"));
    bury(&*queue, other).await;
    let dead = letters(&*queue).await;
    assert_eq!(redrive(&*queue, &dead).await, 1);
    assert_eq!(item(&*queue).await.scope.tenant, "acme");
    let left = letters(&*queue).await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].scope.tenant, "other");
}

/// Letters that are too old are removed, and only those.
pub async fn letters_are_bounded_by_age<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let retention = Retention {
        age: LONG,
        number: 1000,
    };
    bury(&*queue, work("old")).await;
    provider.age_letters(LONG + Duration::from_secs(1)).await;
    bury(&*queue, work("new")).await;
    let purged = queue.purge_dead_letters(&retention).await;
    assert_eq!(purged.expect("it answers"), 1);
    let left = letters(&*queue).await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].scope.scope_id, "new");
    let purged = queue.purge_dead_letters(&retention).await;
    assert_eq!(purged.expect("it answers"), 0);
}

/// Letters that are too many are removed, the oldest first.
pub async fn letters_are_bounded_by_number<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for n in 0..6 {
        bury(&*queue, work(&n.to_string())).await;
    }
    for (number, removed) in [(6, 0), (4, 2), (4, 0), (0, 4), (0, 0)] {
        let retention = Retention {
            number,
            ..Retention::default()
        };
        let purged = queue.purge_dead_letters(&retention).await;
        assert_eq!(purged.expect("it answers"), removed);
        let left: Vec<String> = letters(&*queue)
            .await
            .into_iter()
            .map(|letter| letter.scope.scope_id)
            .collect();
        let newest: Vec<String> = (6 - number..6).map(|n| n.to_string()).collect();
        assert_eq!(left, newest);
    }
}
