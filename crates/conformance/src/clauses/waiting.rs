//! Waiting for a lock: how long, in which order, and what is told at the end.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use leasehold_domain::{AcquireError, DistributedLock, ErrorClass, LockRequest};
use tokio::task::JoinSet;

use super::{SHORT_TTL, becomes_free, expire, give_back, refused, request, take, take_soon};
use crate::Provider;
use crate::patience::{LONG_WAIT, within_cap};

/// Long enough that an attempt would have come back, and no more: what is tested is that it has not.
const A_WHILE: Duration = Duration::from_millis(100);

/// Waits in vain; answers how long that was.
async fn waits_in_vain(lock: &dyn DistributedLock, request: &LockRequest, wait: Duration) -> Duration {
    match within_cap("a wait", lock.acquire(request, wait)).await {
        Err(error @ AcquireError::TimedOut { .. }) => {
            assert_eq!(error.class(), ErrorClass::Conflict);
            assert!(error.is_retryable());
            let contention = error.contention().expect("it is held");
            assert_eq!(contention.name, *request.name());
            assert!(contention.held.is_some(), "the holder is there to be read");
            let AcquireError::TimedOut { waited, .. } = error else {
                unreachable!("it was matched above");
            };
            waited
        }
        other => panic!("it is held: {other:?}"),
    }
}

/// A free lock is granted whatever the wait, also a wait of nothing.
pub async fn acquire_free_does_not_wait<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("waiting", "free").await);
    for wait in [Duration::ZERO, Duration::from_nanos(1), LONG_WAIT, Duration::MAX] {
        let guard = within_cap("a wait", lock.acquire(&request, wait)).await;
        give_back(&*lock, guard.expect("it is free")).await;
    }
}

/// A wait of nothing is one attempt, and its end is told as the end of a wait.
pub async fn acquire_deadline_zero_is_try<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "zero").await);
    let guard = take(&*one, &request).await;
    for lock in [&one, &other] {
        waits_in_vain(&**lock, &request, Duration::ZERO).await;
    }
    give_back(&*one, guard).await;
}

/// A wait ends when it is over, and not before; it tells how long it was and who has the lock, and leaves nothing.
pub async fn acquire_deadline_passed<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "deadline").await);
    let guard = take(&*one, &request).await;
    for lock in [&one, &other] {
        let wait = Duration::from_millis(150);
        let start = tokio::time::Instant::now();
        let waited = waits_in_vain(&**lock, &request, wait).await;
        assert!(
            start.elapsed() >= wait,
            "it came back after {:?}",
            start.elapsed()
        );
        assert!(waited >= wait, "it says that it waited {waited:?}");
    }
    give_back(&*one, guard).await;
    give_back(&*other, take(&*other, &request).await).await;
}

/// Whoever waits gets the lock when it is released, in the same process and in another.
pub async fn acquire_waits_then_gets<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "gets").await);
    for waiter in [&one, &other] {
        let first = take(&*one, &request).await;
        let id = first.lock_id();
        let mut waiting = waiter.acquire(&request, LONG_WAIT);
        let early = tokio::time::timeout(A_WHILE, &mut waiting).await;
        assert!(early.is_err(), "it is held, but {early:?}");
        give_back(&*one, first).await;
        let second = within_cap("the grant", waiting).await.expect("it is free");
        assert_ne!(second.lock_id(), id);
        refused(&*one, &request).await;
        give_back(&**waiter, second).await;
    }
}

/// Whoever waits gets the lock when its guard is dropped.
pub async fn acquire_waits_for_a_drop<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "drop").await);
    for waiter in [&one, &other] {
        let first = take_soon(&*one, &request).await;
        let mut waiting = waiter.acquire(&request, LONG_WAIT);
        let early = tokio::time::timeout(A_WHILE, &mut waiting).await;
        assert!(early.is_err(), "it is held, but {early:?}");
        drop(first);
        let second = within_cap("the grant", waiting).await.expect("it is free");
        give_back(&**waiter, second).await;
    }
}

/// Whoever waits gets the lock when its holder has lost it.
pub async fn acquire_waits_for_a_loss<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "loss").await);
    let first = take(&*one, &request).await;
    let mut waiting = other.acquire(&request, LONG_WAIT);
    let early = tokio::time::timeout(A_WHILE, &mut waiting).await;
    assert!(early.is_err(), "it is held, but {early:?}");
    provider.lose(request.name()).await;
    let second = within_cap("the grant", waiting).await.expect("it is free");
    drop(first);
    give_back(&*other, second).await;
}

/// Whoever waits gets the lock when the lease of its holder has ended without a word.
pub async fn acquire_waits_for_an_expiry<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "expiry").await);
    let first = take(&*one, &request).await;
    let mut waiting = other.acquire(&request, LONG_WAIT);
    let early = tokio::time::timeout(A_WHILE, &mut waiting).await;
    assert!(early.is_err(), "it is held, but {early:?}");
    if !expire(provider, &first).await {
        return;
    }
    let second = within_cap("the grant", waiting).await.expect("it is free");
    drop(first);
    give_back(&*other, second).await;
}

/// Within one process those who wait for a name get it in the order in which they began.
pub async fn waiters_go_in_order<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "order").await);
    let first = take(&*one, &request).await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for place in 0..8 {
        let (lock, request, order) = (Arc::clone(&other), request.clone(), Arc::clone(&order));
        let mut waiter: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            let guard = take_soon(&*lock, &request).await;
            order.lock().expect("nobody panics here").push(place);
            give_back(&*lock, guard).await;
        });
        // Polled once here, it has begun to wait before the next one is made; the task polls it again.
        let begun = waiter.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(begun.is_pending(), "it is held");
        tasks.spawn(waiter);
    }
    give_back(&*one, first).await;
    within_cap("the waiters", tasks.join_all()).await;
    assert_eq!(
        *order.lock().expect("nobody panics here"),
        (0..8).collect::<Vec<_>>()
    );
}

/// Who gives up waiting is passed over.
pub async fn waiter_that_gives_up_is_passed_over<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("waiting", "gives up").await);
    let first = take(&*lock, &request).await;
    let gone = {
        let mut gone = lock.acquire(&request, LONG_WAIT);
        let early = tokio::time::timeout(A_WHILE, &mut gone).await;
        assert!(early.is_err(), "it is held, but {early:?}");
        gone
    };
    let mut waiting = lock.acquire(&request, LONG_WAIT);
    let early = tokio::time::timeout(A_WHILE, &mut waiting).await;
    assert!(early.is_err(), "it is held, but {early:?}");
    drop(gone);
    give_back(&*lock, first).await;
    let second = within_cap("the grant", waiting).await.expect("it is free");
    give_back(&*lock, second).await;
}

/// A wait that ends while the lock changes hands either has it or has left nothing.
pub async fn deadline_races_the_grant<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("waiting", "race").await);
    for round in 0..20 {
        let lock = if round % 2 == 0 { &one } else { &other };
        let first = take_soon(&*one, &request).await;
        let wait = Duration::from_millis(round / 2);
        let end = tokio::time::Instant::now() + wait;
        let releaser = Arc::clone(&one);
        let release = tokio::spawn(async move {
            tokio::time::sleep_until(end).await;
            give_back(&*releaser, first).await;
        });
        let granted = within_cap("a wait", lock.acquire(&request, wait)).await;
        release.await.expect("the release succeeds");
        match granted {
            Ok(guard) => give_back(&**lock, guard).await,
            Err(AcquireError::TimedOut { .. }) => {}
            Err(error) => panic!("it was held for a while: {error:?}"),
        }
        becomes_free(&*other, &request.clone().with_ttl(SHORT_TTL)).await;
    }
}
