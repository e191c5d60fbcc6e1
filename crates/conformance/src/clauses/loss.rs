//! A hold that is taken away: its guard tells, and nothing else is harmed.

use super::{SHORT_TTL, becomes_free, give_back, give_back_lost, request, take, take_soon};
use crate::Provider;
use crate::patience::within_cap;

/// Whoever waits for the loss is told, all of them, and again whenever it is asked later.
pub async fn lost_fires<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("loss", "fires").await).with_ttl(SHORT_TTL);
    let guard = take(&*lock, &request).await;
    within_cap("the loss", async {
        tokio::join!(guard.lost(), guard.lost(), provider.lose(request.name()))
    })
    .await;
    assert!(guard.is_lost());
    within_cap("the loss, asked again", guard.lost()).await;
    give_back_lost(&*lock, guard).await;
}

/// A guard that was not watched when it happened knows it all the same.
pub async fn lost_already_when_lost<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("loss", "already").await).with_ttl(SHORT_TTL);
    let guard = take(&*lock, &request).await;
    provider.lose(request.name()).await;
    within_cap("the loss", guard.lost()).await;
    assert!(guard.is_lost());
}

/// A release is no loss.
pub async fn lost_not_fired_on_release<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("loss", "release").await);
    let guard = take(&*lock, &request).await;
    let control = guard.control();
    give_back(&*lock, guard).await;
    becomes_free(&*lock, &request).await;
    assert!(!control.is_lost());
}

/// A wait for the loss can be given up and begun again.
pub async fn lost_can_be_dropped<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("loss", "dropped").await).with_ttl(SHORT_TTL);
    let guard = take(&*lock, &request).await;
    for _ in 0..3 {
        let waited = tokio::time::timeout(SHORT_TTL / 50, guard.lost()).await;
        assert!(waited.is_err(), "nothing was lost");
    }
    provider.lose(request.name()).await;
    within_cap("the loss", guard.lost()).await;
}

/// After a loss the lock can be had again, by the same process too.
pub async fn lost_goes_to_the_next<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("loss", "next").await).with_ttl(SHORT_TTL);
    for lock in [&one, &other, &one] {
        let first = take_soon(&**lock, &request).await;
        provider.lose(request.name()).await;
        let second = take_soon(&*one, &request).await;
        within_cap("the loss", first.lost()).await;
        assert!(!second.is_lost());
        // Late, and of a hold that is not its own any more.
        drop(first);
        give_back(&*one, second).await;
    }
}
