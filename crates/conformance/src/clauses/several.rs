//! Several locks at once: all or nothing.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{AcquireError, DistributedLockExt, LockGuard};
use tokio::task::JoinSet;

use super::{SHORT_TTL, becomes_free, give_back, refused, request, take};
use crate::Provider;
use crate::patience::{LONG_WAIT, until_none, within_cap};

/// They are taken in the order of their names, each once, however they were listed.
pub async fn multi_sorted_deduped<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let mut requests = Vec::new();
    for item in ["c", "a", "b", "a", "c"] {
        requests.push(request(&provider.name("several", item).await));
    }
    let guards = lock
        .acquire_all(requests.clone(), LONG_WAIT)
        .await
        .expect("they are free");
    let names = guards.iter().map(LockGuard::name).collect::<Vec<_>>();
    assert_eq!(names.len(), 3);
    assert!(names.is_sorted(), "{names:?}");
    for request in &requests {
        refused(&*lock, request).await;
    }
    lock.release_all(guards).await;
    for request in &requests {
        give_back(&*lock, take(&*lock, request).await).await;
    }
}

/// When one cannot be had, the others are free again before that is told.
pub async fn multi_partial_failure_releases<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let mut requests = Vec::new();
    for item in ["1", "2", "3"] {
        requests.push(request(&provider.name("partial", item).await));
    }
    for taken in 0..3 {
        let guard = take(&*other, &requests[taken]).await;
        let error = within_cap(
            "a wait",
            one.acquire_all(requests.clone(), Duration::from_millis(50)),
        )
        .await
        .expect_err("one is held");
        assert!(matches!(error, AcquireError::TimedOut { .. }), "{error:?}");
        assert_eq!(
            error.contention().expect("it is held").name,
            *requests[taken].name()
        );
        for free in requests
            .iter()
            .filter(|request| request.name() != requests[taken].name())
        {
            give_back(&*other, take(&*other, free).await).await;
        }
        give_back(&*other, guard).await;
    }
}

/// When one is lost while the next is waited for, there is no point in waiting on.
pub async fn multi_stops_at_a_loss<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let first = request(&provider.name("loss of several", "1").await).with_ttl(SHORT_TTL);
    let second = request(&provider.name("loss of several", "2").await);
    let held = take(&*other, &second).await;
    let trouble = async {
        until_none("the first is not taken", async || {
            let taken = other.inspect(first.name()).await.expect("it can be asked for");
            taken.is_none().then_some("free")
        })
        .await;
        provider.lose(first.name()).await;
    };
    let several = one.acquire_all(vec![first.clone(), second], LONG_WAIT);
    let (acquired, ()) = within_cap("the loss", async { tokio::join!(several, trouble) }).await;
    let error = acquired.expect_err("one is held and the other lost");
    assert!(matches!(error, AcquireError::Unavailable(_)), "{error:?}");
    give_back(&*other, held).await;
    becomes_free(&*other, &first).await;
}

/// One request out of bounds, and nothing is sent for any.
pub async fn multi_refuses_before_it_takes<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let good = request(&provider.name("refuses", "1").await);
    let bad = request(&provider.name("refuses", "2").await).with_ttl(Duration::ZERO);
    let error = lock
        .acquire_all(vec![good, bad], LONG_WAIT)
        .await
        .expect_err("one is out of bounds");
    assert!(matches!(error, AcquireError::Invalid(_)), "{error:?}");
    assert_eq!(provider.residue().await, None);
}

/// No locks at all are had at once.
pub async fn multi_of_nothing<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let guards = lock
        .acquire_all(Vec::new(), Duration::ZERO)
        .await
        .expect("there is nothing to wait for");
    assert_eq!(guards.iter().count(), 0);
    lock.release_all(guards).await;
}

/// Dropped together, they are free again.
pub async fn multi_drop_frees<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let requests = [
        request(&provider.name("drop", "1").await),
        request(&provider.name("drop", "2").await),
    ];
    drop(
        lock.acquire_all(requests.to_vec(), LONG_WAIT)
            .await
            .expect("they are free"),
    );
    for request in &requests {
        becomes_free(&*lock, request).await;
    }
}

/// Those who list the same locks in different orders never wait for each other for ever.
pub async fn multi_no_deadlock<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let mut requests = Vec::new();
    for item in ["1", "2", "3"] {
        requests.push(request(&provider.name("deadlock", item).await));
    }
    let mut tasks = JoinSet::new();
    for task in 0..6 {
        let lock = Arc::clone(if task % 2 == 0 { &one } else { &other });
        let mut requests = requests.clone();
        requests.rotate_left(task % 3);
        if task >= 3 {
            requests.reverse();
        }
        tasks.spawn(async move {
            for _ in 0..3 {
                let guards = lock
                    .acquire_all(requests.clone(), LONG_WAIT)
                    .await
                    .expect("everybody gets them");
                tokio::task::yield_now().await;
                lock.release_all(guards).await;
            }
        });
    }
    within_cap("everybody", tasks.join_all()).await;
}
