//! What is out of bounds is refused by the name of the field, and nothing is done.

use std::time::Duration;

use leasehold_domain::{
    ClaimRequest, ErrorClass, Failure, MAX_DELAY, NewWork, Page, QueueError, Requeue, Retry, Scope, WorkQueue,
};
use serde_json::json;

use super::{claim, complete, enqueue, extend, item, items, nothing, request, take, work};
use crate::QueueProvider;
use crate::patience::within_cap;

fn invalid_field<T: std::fmt::Debug>(answer: Result<T, QueueError>) -> &'static str {
    match answer {
        Err(error @ QueueError::Invalid(_)) => {
            assert_eq!(error.class(), ErrorClass::Invalid);
            assert!(!error.is_retryable());
            let QueueError::Invalid(invalid) = error else {
                unreachable!("it was matched")
            };
            invalid.field()
        }
        other => panic!("out of bounds, but {other:?}"),
    }
}

/// No kinds means none, and is a mistake: it is never taken for all.
pub async fn empty_kinds_refused<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let none = ClaimRequest::new([""; 0], "conformance").with_batch(10);
    assert_eq!(invalid_field(queue.claim(&none).await), "kinds");
    let blank = ClaimRequest::new([""], "conformance");
    assert_eq!(invalid_field(queue.claim(&blank).await), "kinds");
    take(&*queue).await;
}

/// Each bound of new work is told by its field.
pub async fn bad_work_table<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let long = "x".repeat(257);
    let table = [
        (NewWork::new(Scope::new("", "k", "s", "1")), "tenant"),
        (NewWork::new(Scope::new("t", "", "s", "1")), "kind"),
        (NewWork::new(Scope::new("t", "k", "a\0b", "1")), "scope_type"),
        (NewWork::new(Scope::new("t", "k", "s", long)), "scope_id"),
        (work("1").with_payload(json!({ "a": "\0" })), "payload"),
        (work("1").with_payload(json!("x".repeat(300_000))), "payload"),
        (work("1").with_max_attempts(0), "max_attempts"),
    ];
    for (bad, field) in table {
        assert_eq!(invalid_field(queue.enqueue(&bad).await), field);
    }
    assert_eq!(items(&*queue).await, []);
}

/// One that is out of bounds keeps all from being enqueued.
pub async fn enqueue_many_refuses_before_it_begins<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let many = [work("1"), work("2"), work("3").with_max_attempts(0)];
    assert_eq!(invalid_field(queue.enqueue_many(&many).await), "max_attempts");
    assert_eq!(items(&*queue).await, []);
}

/// Each bound of a claim is told by its field, and nothing is claimed.
pub async fn bad_claim_table<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let table = [
        (request().with_batch(0), "batch"),
        (request().with_batch(1001), "batch"),
        (request().with_lease(Duration::ZERO), "lease"),
        (request().with_lease(Duration::from_millis(99)), "lease"),
        (request().with_lease(Duration::MAX), "lease"),
        (ClaimRequest::new(["reindex"], ""), "worker"),
    ];
    for (bad, field) in table {
        assert_eq!(invalid_field(queue.claim(&bad).await), field);
    }
    assert_eq!(take(&*queue).await.attempt, 1);
}

/// Each bound of a settlement is told by its field, and the claim stays.
pub async fn bad_settlement_table<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    let (key, too_long) = (claim.key, MAX_DELAY + Duration::from_secs(1));
    let retry = Retry {
        claim: key,
        error: String::new(),
        backoff: too_long,
    };
    let requeue = Requeue {
        claim: key,
        after: too_long,
    };
    assert_eq!(invalid_field(queue.retry(&[retry]).await), "backoff");
    assert_eq!(invalid_field(queue.requeue_after(&[requeue]).await), "after");
    for lease in [Duration::ZERO, Duration::from_millis(99), Duration::MAX] {
        assert_eq!(invalid_field(queue.extend(&[key], lease).await), "lease");
    }
    for limit in [0, 1001] {
        let page = Page {
            limit,
            ..Page::default()
        };
        assert_eq!(invalid_field(queue.items(&page).await), "limit");
        assert_eq!(invalid_field(queue.dead_letters(&page).await), "limit");
    }
    complete(&*queue, &claim).await;
    assert_eq!(items(&*queue).await, []);
}

/// The longest there are are granted.
pub async fn longest_bounds_are_granted<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    let text = "ä".repeat(128);
    let most = NewWork::new(Scope::new(&text, &text, &text, &text))
        .with_payload(json!("x".repeat(256 * 1024 - 2)))
        .with_priority(i32::MIN)
        .with_max_attempts(1_000_000);
    enqueue(&*queue, most.clone()).await;
    let day = Duration::from_secs(24 * 60 * 60);
    let all = ClaimRequest::new([text.clone()], &text)
        .with_batch(1000)
        .with_lease(day);
    let mut claimed = claim(&*queue, &all).await.claims;
    let claimed = claimed.pop().expect("it is there");
    assert_eq!(claimed.payload.as_ref(), most.payload());
    assert_eq!(claimed.priority, i32::MIN);
    assert_eq!(claimed.scope, *most.scope());
    let requeue = Requeue {
        claim: claimed.key,
        after: MAX_DELAY,
    };
    queue.requeue_after(&[requeue]).await.expect("it is in bounds");
    assert!(item(&*queue).await.not_before > Some(claimed.claimed_at + MAX_DELAY / 2));
}

/// An error of any length and content ends a claim; its beginning is kept.
pub async fn long_errors_are_cut<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    let error = format!("a\0b{}", "ä".repeat(10_000));
    let retry = Retry {
        claim: claim.key,
        error: error.clone(),
        backoff: Duration::ZERO,
    };
    queue.retry(&[retry]).await.expect("it is kept");
    let claim = take(&*queue).await;
    let kept = claim.last_error.expect("it is kept");
    assert!(kept.len() <= 4096 && kept.starts_with("a\u{fffd}bää"), "{kept}");
    let failure = Failure {
        claim: claim.key,
        error,
    };
    queue.fail(&[failure]).await.expect("it is kept");
    let letters = queue.dead_letters(&Page::default()).await.expect("it answers");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].last_error, kept);
}

/// Calls with nothing in them do nothing, and are no mistake.
pub async fn nothing_is_a_number<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    queue.enqueue_many(&[]).await.expect("nothing");
    assert_eq!(queue.complete(&[]).await.expect("nothing"), []);
    assert_eq!(queue.retry(&[]).await.expect("nothing"), []);
    assert_eq!(queue.fail(&[]).await.expect("nothing"), []);
    assert_eq!(queue.requeue_after(&[]).await.expect("nothing"), []);
    assert_eq!(queue.give_back(&[]).await.expect("nothing"), []);
    assert_eq!(
        queue.extend(&[], Duration::from_secs(1)).await.expect("nothing"),
        []
    );
    assert_eq!(queue.redrive("acme", &[]).await.expect("nothing"), 0);
    nothing(&*queue).await;
}

/// A backend that cannot be reached is told as such, to be tried again, and by no text that a client must not see.
pub async fn unreachable_is_told<P: QueueProvider>(provider: &P) {
    let Some(queue) = provider.unreachable().await else {
        return;
    };
    let queue: &dyn WorkQueue = &*queue;
    let errors = [
        within_cap("an enqueue", queue.enqueue(&work("1"))).await.err(),
        within_cap("a claim", queue.claim(&request())).await.err(),
        within_cap("a look", queue.stats()).await.err(),
    ];
    for error in errors {
        let error = error.expect("nobody answers");
        assert!(error.is_retryable(), "{error:?}");
        assert_ne!(error.class(), ErrorClass::Invalid);
        for secret in provider.secrets() {
            assert!(!error.to_string().contains(&secret), "{error} shows {secret:?}");
        }
    }
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    extend(&*queue, &claim, Duration::from_secs(1)).await;
}
