//! Work that fails: again after a pause, and not for ever.

use std::time::Duration;

use leasehold_domain::{ClaimRequest, NewWork, Outcome, Page, Retry, Scope, WorkState};
use serde_json::json;

use super::{
    LONG, claim, complete, enqueue, fail, give_back, item, items, nothing, request, requeue, retry, take,
    work,
};
use crate::QueueProvider;

const SHORT: Duration = Duration::from_millis(300);

/// What failed rests, and comes again with its error and its attempts.
pub async fn retry_rests_and_comes_again<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let first = take(&*one).await;
    assert_eq!(retry(&*one, &first, LONG).await, Outcome::Done);
    nothing(&*other).await;
    let seen = item(&*other).await;
    assert_eq!((seen.state, seen.attempt_count), (WorkState::Delayed, 1));
    assert!(seen.not_before > Some(first.claimed_at));
    assert_eq!(seen.last_error.as_deref(), Some("not now"));
}

/// A pause of less than a second is over after that, and not before.
pub async fn short_pauses_end<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for how in ["retry", "requeue"] {
        enqueue(&*queue, work("1")).await;
        let first = take(&*queue).await;
        match how {
            "retry" => retry(&*queue, &first, SHORT).await,
            _ => requeue(&*queue, &first, SHORT).await,
        };
        let until = item(&*queue).await.not_before;
        let early = claim(&*queue, &request()).await.claims;
        provider.pass(SHORT).await;
        let late = claim(&*queue, &request()).await.claims;
        let second: Vec<_> = early.into_iter().chain(late).collect();
        assert_eq!(second.len(), 1, "{how}");
        // An end that was seen was kept; on a busy machine it may have passed before.
        if let Some(until) = until {
            assert!(second[0].claimed_at >= until, "{how}");
            assert!(until >= first.claimed_at + SHORT, "{how}");
        }
        complete(&*queue, &second[0]).await;
    }
}

/// No pause is none.
pub async fn retry_without_a_pause<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let first = take(&*queue).await;
    retry(&*queue, &first, Duration::ZERO).await;
    let second = take(&*queue).await;
    assert_eq!(
        (second.attempt, second.last_error.as_deref()),
        (2, Some("not now"))
    );
}

/// Every retry has its own error and its own pause.
pub async fn retries_are_kept_apart<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for id in ["1", "2", "3"] {
        enqueue(&*queue, work(id)).await;
    }
    let claims = claim(&*queue, &request().with_batch(3)).await.claims;
    let retries: Vec<Retry> = claims
        .iter()
        .map(|claim| Retry {
            claim: claim.key,
            error: format!("error of {}", claim.scope.scope_id),
            backoff: if claim.scope.scope_id == "2" {
                Duration::ZERO
            } else {
                LONG
            },
        })
        .collect();
    queue.retry(&retries).await.expect("the queue is there");
    for item in items(&*queue).await {
        let id = &item.scope.scope_id;
        assert_eq!(item.last_error, Some(format!("error of {id}")));
        assert_eq!(item.state == WorkState::Ready, id == "2");
    }
    assert_eq!(take(&*queue).await.scope.scope_id, "2");
}

/// What rests does not keep others from being claimed, however many rest.
pub async fn resting_work_is_passed_over<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let many: Vec<NewWork> = (0..50).map(|n| work(&n.to_string()).with_priority(1)).collect();
    queue.enqueue_many(&many).await.expect("the queue is there");
    let claims = claim(&*queue, &request().with_batch(50)).await.claims;
    for claim in &claims {
        retry(&*queue, claim, LONG).await;
    }
    enqueue(&*queue, work("last")).await;
    assert_eq!(take(&*queue).await.scope.scope_id, "last");
}

/// What has rested is in line by its priority, before what was there all the time.
pub async fn rested_work_is_in_line_again<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("urgent").with_priority(1)).await;
    let first = take(&*queue).await;
    retry(&*queue, &first, SHORT).await;
    enqueue(&*queue, work("idle").with_priority(2)).await;
    provider.pass(SHORT).await;
    let claims = claim(&*queue, &request()).await.claims;
    assert_eq!(claims[0].scope.scope_id, "urgent");
    let claims = claim(&*queue, &request()).await.claims;
    assert_eq!(claims[0].scope.scope_id, "idle");
}

/// A new event does not end the pause after a failure; what it brings is there afterwards.
pub async fn events_do_not_end_a_pause<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_payload(json!("old"))).await;
    let first = take(&*queue).await;
    retry(&*queue, &first, SHORT).await;
    let until = item(&*queue).await.not_before;
    enqueue(&*queue, work("1").with_payload(json!("new"))).await;
    let seen = item(&*queue).await;
    if seen.state == WorkState::Delayed {
        assert_eq!((seen.not_before, seen.attempt_count), (until, 1));
        assert_eq!(seen.last_error.as_deref(), Some("not now"));
    }
    provider.pass(SHORT).await;
    let second = take(&*queue).await;
    assert_eq!(second.payload, Some(json!("new")));
    assert_eq!(second.attempt, 2);
    assert_eq!(complete(&*queue, &second).await, Outcome::Done);
}

/// Put off, the attempt does not count, and the last error stays.
pub async fn requeue_does_not_count<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_max_attempts(2)).await;
    let first = take(&*queue).await;
    retry(&*queue, &first, Duration::ZERO).await;
    for _ in 0..5 {
        let claim = take(&*queue).await;
        assert_eq!((claim.attempt, claim.last_error.as_deref()), (2, Some("not now")));
        assert_eq!(requeue(&*queue, &claim, Duration::ZERO).await, Outcome::Done);
    }
    let claim = take(&*queue).await;
    requeue(&*queue, &claim, LONG).await;
    nothing(&*queue).await;
    let seen = item(&*queue).await;
    assert_eq!((seen.state, seen.attempt_count), (WorkState::Delayed, 1));
}

/// Given back it is as if it had not been claimed, for everybody and at once.
pub async fn give_back_is_free_at_once<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1").with_max_attempts(1)).await;
    for _ in 0..3 {
        let claim = take(&*one).await;
        assert_eq!((claim.attempt, claim.last_error.as_deref()), (1, None));
        assert_eq!(give_back(&*one, &claim).await, Outcome::Done);
        let seen = item(&*other).await;
        assert_eq!((seen.state, seen.attempt_count), (WorkState::Ready, 0));
    }
    assert!(take(&*other).await.is_last_attempt());
}

/// What is begun again and again and never finished is given up after its attempts, while others proceed.
pub async fn poison_is_given_up<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(
        &*queue,
        work("poison")
            .with_priority(1)
            .with_max_attempts(3)
            .with_payload(json!(7)),
    )
    .await;
    for attempt in 1..=3 {
        let claim = take(&*queue).await;
        assert_eq!(claim.attempt, attempt);
        assert_eq!(claim.is_last_attempt(), attempt == 3);
        provider.expire(claim.key).await;
    }
    enqueue(&*queue, work("good")).await;
    let claimed = claim(&*queue, &request().with_batch(10)).await;
    assert_eq!(claimed.claims.len(), 1);
    assert_eq!(claimed.claims[0].scope.scope_id, "good");
    assert_eq!(claimed.dead.len(), 1);
    let dead = &claimed.dead[0];
    assert_eq!((dead.scope.scope_id.as_str(), dead.attempt_count), ("poison", 3));
    assert_eq!(dead.payload, Some(json!(7)));
    assert!(
        dead.last_error.contains("conformance"),
        "it says who did not finish: {}",
        dead.last_error
    );
    let letters = queue.dead_letters(&Page::default()).await.expect("it answers");
    assert_eq!(letters, claimed.dead);
    assert_eq!(item(&*queue).await.scope.scope_id, "good");
}

/// What failed on its last attempt, and nobody gave up, has its last error in the dead letter.
pub async fn spent_work_keeps_its_last_error<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_max_attempts(1)).await;
    let first = take(&*queue).await;
    assert_eq!(retry(&*queue, &first, Duration::ZERO).await, Outcome::Done);
    let claimed = claim(&*queue, &request().with_batch(10)).await;
    assert_eq!(claimed.claims, []);
    assert_eq!(claimed.dead[0].last_error, "not now");
    assert_eq!(claimed.dead[0].attempt_count, 1);
    assert_eq!(items(&*queue).await, []);
}

/// What was enqueued since the last attempt of spent work began is new work.
pub async fn spent_and_changed_is_new<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_max_attempts(1)).await;
    let first = take(&*queue).await;
    enqueue(&*queue, work("1").with_max_attempts(1).with_payload(json!("new"))).await;
    provider.expire(first.key).await;
    let claimed = claim(&*queue, &request().with_batch(10)).await;
    assert_eq!((claimed.claims.len(), claimed.dead.len()), (0, 1));
    let again = take(&*queue).await;
    assert_eq!((again.attempt, again.payload), (1, Some(json!("new"))));
}

/// Who enqueues last says how often it is begun.
pub async fn last_enqueue_says_the_attempts<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1").with_max_attempts(1)).await;
    let first = take(&*queue).await;
    retry(&*queue, &first, Duration::ZERO).await;
    enqueue(&*queue, work("1").with_max_attempts(2)).await;
    let second = take(&*queue).await;
    assert_eq!((second.attempt, second.max_attempts), (2, 2));
}

/// Given up it is a dead letter at once, whatever attempts are left, and nobody claims it again.
pub async fn fail_makes_a_dead_letter<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1").with_payload(json!({ "n": 1 })).with_priority(7)).await;
    let claim = take(&*one).await;
    assert_eq!(fail(&*one, &claim).await, Outcome::Done);
    nothing(&*other).await;
    assert_eq!(items(&*other).await, []);
    let letters = other.dead_letters(&Page::default()).await.expect("it answers");
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!(letter.scope, claim.scope);
    assert_eq!((letter.attempt_count, letter.max_attempts), (1, 10));
    assert_eq!((letter.priority, letter.event_at), (7, claim.event_at));
    assert_eq!(letter.payload, Some(json!({ "n": 1 })));
    assert_eq!(letter.last_error, "never");
    assert!(letter.failed_at >= claim.claimed_at);
}

/// Work of many kinds comes from one call, however they are mixed with what is dead.
pub async fn dead_work_of_one_kind_hides_no_other<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let of = |kind: &str| NewWork::new(Scope::new("acme", kind, "plan", "1")).with_max_attempts(1);
    let all = ClaimRequest::new(["a", "b"], "w").with_batch(2);
    enqueue(&*queue, of("a")).await;
    let first = claim(&*queue, &all).await.claims;
    provider.expire(first[0].key).await;
    enqueue(&*queue, of("b")).await;
    let claimed = claim(&*queue, &all).await;
    assert_eq!((claimed.claims.len(), claimed.dead.len()), (1, 1));
    assert_eq!(claimed.claims[0].scope.kind, "b");
    assert_eq!(claimed.dead[0].scope.kind, "a");
}
