//! What can be seen from outside.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use leasehold_domain::{NewWork, Page, Scope, WorkState};

use super::{LONG, claim, enqueue, fail, items, request, retry, take, work};
use crate::QueueProvider;

/// Everything is counted once, by what may be done with it.
pub async fn stats_count_by_state<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let of = |kind: &str, id: &str| NewWork::new(Scope::new("acme", kind, "plan", id));
    for id in ["dead", "delayed", "claimed", "expired"] {
        enqueue(&*queue, of("reindex", id)).await;
        let claim = take(&*queue).await;
        match id {
            "dead" => drop(fail(&*queue, &claim).await),
            "delayed" => drop(retry(&*queue, &claim, LONG).await),
            "expired" => provider.expire(claim.key).await,
            _ => {}
        }
    }
    enqueue(&*queue, of("reindex", "ready")).await;
    enqueue(&*queue, of("other", "ready")).await;
    let stats = queue.stats().await.expect("it answers");
    let counts: Vec<_> = stats
        .iter()
        .map(|s| (s.kind.as_str(), s.ready, s.delayed, s.claimed, s.dead))
        .collect();
    assert_eq!(counts, [("other", 1, 0, 0, 0), ("reindex", 2, 1, 1, 1)]);
}

/// The age of what waits is that of the oldest event that waits; what is worked on or rests does not wait.
pub async fn stats_tell_the_oldest<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("now")).await;
    let now: DateTime<Utc> = items(&*queue).await[0].event_at;
    let hours = |n: i64| work(&n.to_string()).with_event_at(now - TimeDelta::hours(n));
    enqueue(&*queue, hours(5)).await;
    let claimed = claim(&*queue, &request()).await.claims;
    assert_eq!(claimed[0].scope.scope_id, "5");
    enqueue(&*queue, hours(2)).await;
    enqueue(&*queue, hours(3)).await;
    enqueue(&*queue, work("future").with_event_at(now + TimeDelta::days(1))).await;
    let stats = queue.stats().await.expect("it answers");
    let oldest = stats[0].oldest_ready.expect("something waits");
    let three = Duration::from_secs(3 * 3600);
    assert!((three..three + LONG).contains(&oldest), "{oldest:?}");
    provider.purge_tenant("acme").await;
    enqueue(&*queue, work("future").with_event_at(now + TimeDelta::days(1))).await;
    let stats = queue.stats().await.expect("it answers");
    assert_eq!(stats[0].oldest_ready, Some(Duration::ZERO));
    take(&*queue).await;
    let stats = queue.stats().await.expect("it answers");
    assert_eq!(stats[0].oldest_ready, None);
}

/// Items are listed oldest first, in pages, for a tenant or a kind or all.
pub async fn items_are_paged<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for n in 0..4 {
        for (tenant, kind) in [("acme", "a"), ("acme", "b"), ("other", "a")] {
            let scope = Scope::new(tenant, kind, "plan", n.to_string());
            enqueue(&*queue, NewWork::new(scope).with_priority(-n)).await;
        }
    }
    let list = async |page: &Page| queue.items(page).await.expect("it answers");
    let all = list(&Page::default()).await;
    assert_eq!(all.len(), 12);
    assert!(all.is_sorted_by_key(|item| item.id));
    let mut page = Page {
        tenant: Some("acme".into()),
        kind: Some("a".into()),
        limit: 3,
        ..Page::default()
    };
    let first = list(&page).await;
    page.after = first[2].id.get();
    let second = list(&page).await;
    let ids: Vec<&str> = first
        .iter()
        .chain(&second)
        .map(|item| item.scope.scope_id.as_str())
        .collect();
    assert_eq!(ids, ["0", "1", "2", "3"]);
    assert!(first.iter().all(|item| item.state == WorkState::Ready));
    page.tenant = Some("nobody".into());
    assert_eq!(list(&page).await, []);
}

/// Dead letters are listed oldest first, in pages, for a tenant or a kind or all.
pub async fn letters_are_paged<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for n in 0..4 {
        for tenant in ["acme", "other"] {
            let scope = Scope::new(tenant, "reindex", "plan", n.to_string());
            enqueue(&*queue, NewWork::new(scope)).await;
            let claim = take(&*queue).await;
            fail(&*queue, &claim).await;
        }
    }
    let list = async |page: &Page| queue.dead_letters(page).await.expect("it answers");
    let all = list(&Page::default()).await;
    assert_eq!(all.len(), 8);
    assert!(all.is_sorted_by_key(|letter| letter.id));
    let mut page = Page {
        tenant: Some("other".into()),
        limit: 3,
        ..Page::default()
    };
    let first = list(&page).await;
    page.after = first[2].id;
    let second = list(&page).await;
    let ids: Vec<&str> = first
        .iter()
        .chain(&second)
        .map(|letter| letter.scope.scope_id.as_str())
        .collect();
    assert_eq!(ids, ["0", "1", "2", "3"]);
    page.kind = Some("nothing".into());
    assert_eq!(list(&page).await, []);
}
