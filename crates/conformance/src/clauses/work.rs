//! `with_lock`: work that runs while the lock is held, and no longer.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use leasehold_domain::{AcquireError, DistributedLockExt, ErrorClass, LockGuard, WithLockError};

use super::{SHORT_TTL, becomes_free, expire, give_back, refused, request, take};
use crate::Provider;
use crate::patience::{LONG_WAIT, within_cap};

/// Set when it is dropped: how work tells that it was cancelled.
struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The work runs while the lock is held, and its result comes after the release.
pub async fn with_lock_answers_after_release<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("work", "answers").await);
    for round in 0..10 {
        let done = one.with_lock(&request, LONG_WAIT, async |guard| {
            refused(&*other, &request).await;
            (round, guard.name().clone())
        });
        let done = within_cap("the work", done).await.expect("it is free");
        assert_eq!(done, (round, request.name().clone()));
        give_back(&*other, take(&*other, &request).await).await;
    }
}

/// Work whose lock is held does not start.
pub async fn with_lock_contended_does_not_start<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("work", "contended").await);
    let guard = take(&*one, &request).await;
    let done = other
        .with_lock(&request, Duration::ZERO, async |_| panic!("the work started"))
        .await;
    let error: WithLockError = done.expect_err("it is held");
    assert!(
        matches!(error, WithLockError::Acquire(AcquireError::TimedOut { .. })),
        "{error:?}"
    );
    assert_eq!(error.class(), ErrorClass::Conflict);
    give_back(&*one, guard).await;
}

/// The work is cancelled when the lock is lost, and that is told.
pub async fn with_lock_cancelled_on_loss<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("work", "loss").await).with_ttl(SHORT_TTL);
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = Flag(Arc::clone(&cancelled));
    let work = lock.with_lock(&request, LONG_WAIT, async |guard: &LockGuard| {
        let _flag = flag;
        provider.lose(guard.name()).await;
        pending::<()>().await;
    });
    let error = within_cap("the loss", work).await.expect_err("it was lost");
    assert!(matches!(error, WithLockError::Lost), "{error:?}");
    assert!(error.is_retryable());
    assert!(cancelled.load(Ordering::Relaxed), "the work goes on");
}

/// Work that ends before anybody noticed that its lease had, is told that it was not alone for sure.
pub async fn with_lock_tells_a_late_end<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("work", "late").await);
    let done = lock
        .with_lock(&request, LONG_WAIT, async |guard| expire(provider, guard).await)
        .await;
    match done {
        Ok(expired) => assert!(!expired, "the lease had ended"),
        Err(error) => assert!(matches!(error, WithLockError::Lost), "{error:?}"),
    }
}

/// A panic of the work releases the lock and goes on.
pub async fn with_lock_panic_releases<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("work", "panic").await);
    let work = {
        let request = request.clone();
        tokio::spawn(async move {
            let done: Result<(), _> = one
                .with_lock(&request, LONG_WAIT, async |_| panic!("on purpose"))
                .await;
            done
        })
    };
    let error = within_cap("the panic", work).await.expect_err("it panics");
    assert!(error.is_panic());
    becomes_free(&*other, &request).await;
}

/// Given up half way, the work is dropped and the lock released.
pub async fn with_lock_dropped_releases<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("work", "dropped").await);
    let cancelled = Arc::new(AtomicBool::new(false));
    let (started, starts) = tokio::sync::oneshot::channel();
    {
        let flag = Flag(Arc::clone(&cancelled));
        let work = one.with_lock(&request, LONG_WAIT, async move |_: &LockGuard| {
            let _flag = flag;
            started.send(()).expect("somebody listens");
            pending::<()>().await;
        });
        within_cap("the start", async {
            tokio::select! {
                _ = work => panic!("it never ends"),
                start = starts => start.expect("it starts"),
            }
        })
        .await;
    }
    assert!(cancelled.load(Ordering::Relaxed), "the work goes on");
    becomes_free(&*other, &request).await;
}

/// Work under a lock that is known only as a trait object can be spawned.
pub async fn with_lock_can_be_spawned<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("work", "spawned").await);
    let work = {
        let (lock, request) = (Arc::clone(&lock), request.clone());
        tokio::spawn(async move {
            let work = lock.with_lock(&request, LONG_WAIT, async |guard: &LockGuard| {
                tokio::task::yield_now().await;
                guard.lock_id()
            });
            work.await
        })
    };
    within_cap("the work", work)
        .await
        .expect("it does not panic")
        .expect("it is free");
    give_back(&*lock, take(&*lock, &request).await).await;
}
