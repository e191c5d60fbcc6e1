//! Real processes: one that holds, one that ends with the lock held, one that is killed.

use std::time::Duration;

use leasehold_domain::Released;

use super::{SHORT_TTL, becomes_free, give_back, is_lease, refused, request, take};
use crate::Provider;
use crate::holder_process::{HolderProcess, child_holder};

/// What another process holds is refused here, with its holder, and is free here once it has released.
pub async fn cross_process<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("processes", "holds").await);
    let Some(process) = HolderProcess::start(provider, request.name(), Duration::from_secs(20)).await else {
        return;
    };
    let held = refused(&*lock, &request).await.held.expect("somebody has it");
    if is_lease(provider) {
        assert_eq!(held.holder, Some(provider.told(&child_holder())));
    } else {
        assert!(held.session.is_some(), "nothing is known of {held:?}");
    }
    process.release().await;
    let guard = take(&*lock, &request).await;
    assert_eq!(lock.release(guard).await.expect("it answers"), Released::Held);
}

/// What a process leaves held when it ends is free after its slice at the latest.
pub async fn cross_process_abandon<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("processes", "abandons").await);
    let Some(process) = HolderProcess::start(provider, request.name(), SHORT_TTL).await else {
        return;
    };
    refused(&*lock, &request).await;
    process.exit().await;
    becomes_free(&*lock, &request).await;
}

/// What a process holds when it is killed goes to those who wait for it.
pub async fn cross_process_kill<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("processes", "killed").await);
    let Some(process) = HolderProcess::start(provider, request.name(), SHORT_TTL).await else {
        return;
    };
    let waiting = {
        let (lock, request) = (lock.clone(), request.clone());
        tokio::spawn(async move {
            let guard = super::take_soon(&*lock, &request).await;
            give_back(&*lock, guard).await;
        })
    };
    refused(&*lock, &request).await;
    process.kill().await;
    waiting.await.expect("the waiter gets it");
}
