//! Shared and exclusive holds of one name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use leasehold_domain::{AcquireError, LockMode};
use tokio::task::JoinSet;

use super::{becomes_free, give_back, refused, request, shared, shared_is_refused, take, take_soon};
use crate::Provider;
use crate::patience::{LONG_WAIT, until_none, within_cap};

/// Readers share, in one process and across; a writer excludes everybody and is excluded by every reader.
pub async fn readers_writer<P: Provider>(provider: &P) {
    let name = provider.name("sharing", "readers and writer").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let (one, other) = (provider.process().await, provider.process().await);
    let readers = [
        (&one, take(&*one, &shared(&name)).await),
        (&one, take(&*one, &shared(&name)).await),
        (&other, take(&*other, &shared(&name)).await),
    ];
    for (lock, reader) in readers {
        for writer in [&one, &other] {
            let held = refused(&**writer, &request(&name))
                .await
                .held
                .expect("somebody has it");
            assert_eq!(held.mode, LockMode::Shared);
        }
        give_back(&**lock, reader).await;
    }
    let writer = take(&*other, &request(&name)).await;
    for reader in [&one, &other] {
        let held = refused(&**reader, &shared(&name))
            .await
            .held
            .expect("somebody has it");
        assert_eq!(held.mode, LockMode::Exclusive);
    }
    give_back(&*other, writer).await;
    give_back(&*one, take(&*one, &shared(&name)).await).await;
}

/// A reader cannot become a writer: it is refused as everybody is, does not wait for itself for ever, and keeps
/// what it has.
pub async fn upgrade_absent<P: Provider>(provider: &P) {
    let name = provider.name("sharing", "upgrade").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let lock = provider.process().await;
    let reader = take(&*lock, &shared(&name)).await;
    refused(&*lock, &request(&name)).await;
    let waited = within_cap(
        "a wait",
        lock.acquire(&request(&name), Duration::from_millis(100)),
    )
    .await;
    assert!(matches!(waited, Err(AcquireError::TimedOut { .. })), "{waited:?}");
    assert!(!reader.is_lost());
    give_back(&*lock, reader).await;
    give_back(&*lock, take(&*lock, &request(&name)).await).await;
}

/// A writer waits until the last reader is gone, in any process.
pub async fn writer_waits_for_the_last_reader<P: Provider>(provider: &P) {
    let name = provider.name("sharing", "last reader").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let (one, other) = (provider.process().await, provider.process().await);
    let near = take(&*one, &shared(&name)).await;
    let far = take(&*other, &shared(&name)).await;
    let exclusive = request(&name);
    let mut writer = one.acquire(&exclusive, LONG_WAIT);
    for (lock, reader) in [(&one, near), (&other, far)] {
        let early = tokio::time::timeout(Duration::from_millis(100), &mut writer).await;
        assert!(early.is_err(), "a reader is there, but {early:?}");
        give_back(&**lock, reader).await;
    }
    let guard = within_cap("the grant", writer).await.expect("nobody reads");
    give_back(&*one, guard).await;
}

/// Readers that come and go without a gap do not keep a writer out for ever, in any process.
pub async fn writer_not_starved<P: Provider>(provider: &P) {
    let name = provider.name("sharing", "starved").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let (one, other) = (provider.process().await, provider.process().await);
    let (rounds, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut readers = JoinSet::new();
    for reader in 0..6 {
        let lock = Arc::clone(if reader % 2 == 0 { &one } else { &other });
        let (name, rounds, over) = (name.clone(), Arc::clone(&rounds), Arc::clone(&over));
        readers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let guard = take_soon(&*lock, &shared(&name)).await;
                rounds.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
                give_back(&*lock, guard).await;
            }
        });
    }
    until_none("too few rounds", async || {
        let done = rounds.load(Ordering::Relaxed);
        (done < 12).then_some(done)
    })
    .await;
    for lock in [&one, &other, &one] {
        let writer = take_soon(&**lock, &request(&name)).await;
        give_back(&**lock, writer).await;
    }
    over.store(true, Ordering::Relaxed);
    within_cap("the readers", readers.join_all()).await;
}

/// Once a waiting writer has given up, readers come in again.
pub async fn writer_that_gives_up_lets_readers_in<P: Provider>(provider: &P) {
    let name = provider.name("sharing", "gives up").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let (one, other) = (provider.process().await, provider.process().await);
    let reader = take(&*one, &shared(&name)).await;
    {
        let exclusive = request(&name);
        let mut writer = one.acquire(&exclusive, LONG_WAIT);
        let early = tokio::time::timeout(Duration::from_millis(100), &mut writer).await;
        assert!(early.is_err(), "a reader is there, but {early:?}");
    }
    for lock in [&one, &other] {
        becomes_free(&**lock, &shared(&name)).await;
    }
    give_back(&*one, reader).await;
}
