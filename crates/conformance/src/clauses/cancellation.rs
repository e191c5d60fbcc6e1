//! Futures that are dropped: whatever was polled how often, nothing is left behind.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use leasehold_domain::{DistributedLock, DistributedLockExt, LockRequest};
use tokio::task::yield_now;

use super::{becomes_free, give_back, is_lease, refused, request, take, take_soon};
use crate::Provider;
use crate::patience::LONG_WAIT;

/// How many drop points each future is swept over: more than any has before it is done or only waits.
const POLLS: usize = 12;

/// After which a future that nobody wakes is dropped where it is.
const NOBODY_WAKES: Duration = Duration::from_millis(50);

/// Polls `future` as often as it is woken, at most `polls` times, and drops it. Answers what it answered in time.
async fn drop_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    let polled = poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    });
    tokio::time::timeout(NOBODY_WAKES, polled).await.ok().flatten()
}

/// A future that was never polled has done nothing.
pub async fn cancelled_before_start<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("cancelled", "before start").await);
    drop(lock.try_acquire(&request));
    drop(lock.acquire(&request, LONG_WAIT));
    drop(lock.with_lock(&request, LONG_WAIT, async |_| panic!("the work started")));
    assert_eq!(provider.residue().await, None);
    give_back(&*lock, take(&*lock, &request).await).await;
}

/// An attempt dropped anywhere holds nothing.
pub async fn try_acquire_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "attempt").await);
    for polls in 0..POLLS {
        drop(drop_after(polls, one.try_acquire(&request)).await);
        becomes_free(&*other, &request).await;
    }
}

/// A wait dropped anywhere holds nothing and keeps no place, whether the lock was free, held or just released.
pub async fn acquire_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "wait").await);
    for polls in 0..POLLS {
        drop(drop_after(polls, one.acquire(&request, LONG_WAIT)).await);
        becomes_free(&*other, &request).await;

        for holder in [&one, &other] {
            let guard = take_soon(&**holder, &request).await;
            assert!(
                drop_after(polls, one.acquire(&request, LONG_WAIT))
                    .await
                    .is_none()
            );
            give_back(&**holder, guard).await;
            becomes_free(&*other, &request).await;

            let guard = take_soon(&**holder, &request).await;
            let (waited, ()) = tokio::join!(
                drop_after(polls, one.acquire(&request, LONG_WAIT)),
                give_back(&**holder, guard)
            );
            drop(waited);
            becomes_free(&*other, &request).await;
        }
    }
}

/// An extension dropped anywhere leaves the hold held.
pub async fn extend_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "extension").await);
    let guard = take(&*one, &request).await;
    for polls in 0..POLLS {
        drop_after(polls, one.extend(&guard, Duration::from_secs(60))).await;
        assert!(!guard.is_lost());
        refused(&*other, &request).await;
    }
    give_back(&*one, guard).await;
}

/// A release dropped anywhere goes on by itself.
pub async fn release_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "release").await);
    for polls in 0..POLLS {
        let guard = take_soon(&*one, &request).await;
        drop_after(polls, one.release(guard)).await;
        becomes_free(&*other, &request).await;
    }
}

/// A look dropped anywhere changes nothing.
pub async fn inspect_dropped_anywhere<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("cancelled", "look").await);
    let guard = take(&*lock, &request).await;
    for polls in 0..POLLS {
        drop_after(polls, lock.inspect(request.name())).await;
        refused(&*lock, &request).await;
    }
    give_back(&*lock, guard).await;
}

/// A resumption dropped anywhere loses nothing: it can be called again.
pub async fn resume_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "resumption").await);
    for polls in 0..POLLS {
        let first = take_soon(&*one, &request).await;
        let resumed = drop_after(polls, other.resume(&request, first.lock_id())).await;
        if !is_lease(provider) {
            assert!(!matches!(resumed, Some(Ok(_))));
            give_back(&*one, first).await;
            continue;
        }
        let second = match resumed {
            Some(answer) => answer,
            None => other.resume(&request, first.lock_id()).await,
        };
        give_back(&*other, second.expect("it is held")).await;
    }
}

/// Several locks whose acquisition is dropped anywhere are all free.
pub async fn acquire_all_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let requests = [
        request(&provider.name("cancelled", "several 1").await),
        request(&provider.name("cancelled", "several 2").await),
    ];
    for polls in 0..POLLS {
        let taken = drop_after(polls, one.acquire_all(requests.to_vec(), LONG_WAIT)).await;
        if let Some(Ok(guards)) = taken {
            drop_after(polls, one.release_all(guards)).await;
        }
        for request in &requests {
            becomes_free(&*other, request).await;
        }
    }
}

/// Work under a lock that is dropped anywhere leaves the lock free.
pub async fn with_lock_dropped_anywhere<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("cancelled", "work").await);
    for polls in 0..POLLS {
        drop_after(polls, works(&*one, &request)).await;
        becomes_free(&*other, &request).await;
    }
}

async fn works(lock: &dyn DistributedLock, request: &LockRequest) {
    let work = lock.with_lock(request, LONG_WAIT, async |_| {
        for _ in 0..3 {
            yield_now().await;
        }
    });
    work.await.expect("it becomes free");
}
