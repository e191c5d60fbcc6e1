//! The life of a hold: renewed, extended, bounded, resumed, and over.

use std::time::Duration;

use leasehold_domain::{ExtendError, LockId, ResumeError};

use super::{SHORT_TTL, becomes_free, expire, give_back, give_back_lost, is_lease, refused, request, take};
use crate::Provider;
use crate::patience::{until_none, within_cap};

/// While its process lives, a hold outlives its slice many times.
pub async fn heartbeat_keeps<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "heartbeat").await).with_ttl(SHORT_TTL);
    let guard = take(&*one, &request).await;
    let granted = guard.expires_at();
    provider.pass(SHORT_TTL * 5 / 2).await;
    assert!(!guard.is_lost());
    if is_lease(provider) {
        assert!(guard.expires_at() > granted, "nothing was renewed");
    }
    refused(&*other, &request).await;
    give_back(&*one, guard).await;
}

/// Without heartbeats a lease ends after its slice: the holder knows, and others get it.
pub async fn stopped_heartbeat_ends_after_ttl<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "stopped").await).with_ttl(SHORT_TTL);
    let guard = take(&*one, &request).await;
    if !provider.stop_heartbeats(request.name()).await {
        // Then the end of a process proves it: see `cross_process_kill`.
        assert!(provider.abilities().processes || !is_lease(provider));
        return;
    }
    provider.pass(SHORT_TTL).await;
    within_cap("the loss", guard.lost()).await;
    becomes_free(&*other, &request).await;
    give_back_lost(&*one, guard).await;
}

/// What has expired goes to whoever asks next, and the former holder is told.
pub async fn expired_goes_to_the_next<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "expired").await).with_ttl(SHORT_TTL);
    let first = take(&*one, &request).await;
    if !expire(provider, &first).await {
        return;
    }
    assert_eq!(other.inspect(request.name()).await.expect("it answers"), None);
    let second = take(&*other, &request).await;
    within_cap("the loss", first.lost()).await;
    assert!(first.is_lost());
    assert!(!second.is_lost());
    give_back(&*other, second).await;
}

/// The release of what has expired says that it came late, whether or not somebody has it by then.
pub async fn release_after_expiry_tells<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "late").await);
    let first = take(&*one, &request).await;
    if !expire(provider, &first).await {
        return;
    }
    give_back_lost(&*one, first).await;

    let first = take(&*one, &request).await;
    expire(provider, &first).await;
    let second = take(&*other, &request).await;
    give_back_lost(&*one, first).await;
    refused(&*one, &request).await;
    give_back(&*other, second).await;
}

/// The drop of what has expired leaves the next holder alone.
pub async fn drop_after_expiry_touches_nobody<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let name = provider.name("leases", "late drop").await;
    let first = take(&*one, &request(&name)).await;
    if !expire(provider, &first).await {
        return;
    }
    let second = take(&*other, &request(&name)).await;
    drop(first);
    // The drop works in the background; another name's round trip in the same process comes after it.
    becomes_free(&*one, &request(&provider.name("leases", "after").await)).await;
    refused(&*one, &request(&name)).await;
    assert!(!second.is_lost());
    give_back(&*other, second).await;
}

/// A hold that nobody gives back ends at its longest hold, heartbeats or not, and its holder is told.
pub async fn max_hold_ends_the_hold<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let name = provider.name("leases", "max hold").await;
    let bounded = request(&name).with_ttl(SHORT_TTL / 2).with_max_hold(SHORT_TTL);
    let guard = take(&*one, &bounded).await;
    provider.pass(SHORT_TTL).await;
    within_cap("the loss", guard.lost()).await;
    becomes_free(&*other, &request(&name)).await;
    let extended = one.extend(&guard, SHORT_TTL).await;
    assert!(
        matches!(extended, Err(ExtendError::Lost | ExtendError::MaxHoldReached)),
        "{extended:?}"
    );
    give_back_lost(&*one, guard).await;
}

/// An extension moves the end of a lease; the backend and the guard agree on it.
pub async fn extend_ok<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("leases", "extend").await).with_ttl(Duration::from_secs(20));
    let guard = take(&*lock, &request).await;
    let (expires, trusted) = (guard.expires_at(), guard.trusted_until());
    lock.extend(&guard, Duration::from_secs(600))
        .await
        .expect("it is held");
    assert_eq!(guard.expires_at() > expires, is_lease(provider));
    assert_eq!(guard.trusted_until() > trusted, is_lease(provider));
    let held = lock
        .inspect(request.name())
        .await
        .expect("it answers")
        .expect("it is held");
    assert_eq!(held.expires_at, guard.expires_at());
    give_back(&*lock, guard).await;
}

/// A hold can be extended again and again.
pub async fn extend_twice<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let guard = take(&*lock, &request(&provider.name("leases", "twice").await)).await;
    let mut last = guard.expires_at();
    for minutes in 2..5 {
        lock.extend(&guard, Duration::from_secs(60 * minutes))
            .await
            .expect("it is held");
        assert_eq!(guard.expires_at() > last, is_lease(provider));
        last = guard.expires_at();
    }
    give_back(&*lock, guard).await;
}

/// An extension that would end earlier moves nothing back, neither the end nor the trust.
pub async fn extend_shorter_moves_nothing_back<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("leases", "shorter").await).with_ttl(Duration::from_secs(600));
    let guard = take(&*lock, &request).await;
    let (expires, trusted) = (guard.expires_at(), guard.trusted_until());
    lock.extend(&guard, Duration::from_secs(20))
        .await
        .expect("it is held");
    assert!(guard.expires_at() >= expires);
    assert!(guard.trusted_until() >= trusted);
    let held = lock
        .inspect(request.name())
        .await
        .expect("it answers")
        .expect("it is held");
    assert!(held.expires_at >= expires);
    give_back(&*lock, guard).await;
}

/// No extension passes the longest hold; the hold stays as long as it has.
pub async fn extend_stops_at_max_hold<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let max_hold = Duration::from_secs(300);
    let request = request(&provider.name("leases", "capped").await).with_max_hold(max_hold);
    let guard = take(&*lock, &request).await;
    lock.extend(&guard, Duration::from_secs(3600))
        .await
        .expect("there is time left");
    // With the end at its bound already, both answers are true: it is held, and it cannot be held longer.
    match lock.extend(&guard, Duration::from_secs(3600)).await {
        Ok(()) | Err(ExtendError::MaxHoldReached) => {}
        Err(error) => panic!("it is held: {error:?}"),
    }
    if let Some(expires_at) = guard.expires_at() {
        let slice = (expires_at - guard.acquired_at())
            .to_std()
            .expect("it ends after it began");
        assert!(slice <= max_hold, "{slice:?} is longer than {max_hold:?}");
        assert!(slice > request.ttl(), "nothing was extended");
    }
    assert!(!guard.is_lost());
    refused(&*lock, &request).await;
    give_back(&*lock, guard).await;
}

/// Success is never answered for what has expired, also when nobody else has it; nothing is revived.
pub async fn extend_expired_refused<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("leases", "extend expired").await);
    let guard = take(&*lock, &request).await;
    if !expire(provider, &guard).await {
        return;
    }
    let error = lock.extend(&guard, SHORT_TTL).await.expect_err("it is over");
    assert!(matches!(error, ExtendError::Lost), "{error:?}");
    assert!(!error.is_retryable());
    give_back(&*lock, take(&*lock, &request).await).await;
}

/// Success is never answered for what was taken away.
pub async fn extend_lost_refused<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("leases", "extend lost").await);
    let guard = take(&*lock, &request).await;
    provider.lose(request.name()).await;
    let error = within_cap("an extension", lock.extend(&guard, SHORT_TTL))
        .await
        .expect_err("it is over");
    assert!(matches!(error, ExtendError::Lost), "{error:?}");
    becomes_free(&*lock, &request).await;
}

/// Success is never answered for what another guard of the same hold has released.
pub async fn extend_released_refused<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "extend released").await);
    let first = take(&*one, &request).await;
    if !is_lease(provider) {
        return give_back(&*one, first).await;
    }
    let resumed = other.resume(&request, first.lock_id()).await.expect("it is held");
    give_back(&*other, resumed).await;
    let error = one.extend(&first, SHORT_TTL).await.expect_err("it is over");
    assert!(matches!(error, ExtendError::Lost), "{error:?}");
    give_back(&*other, take(&*other, &request).await).await;
}

/// A hold whose answer was lost is found by its id: the same acquisition, with the same token.
pub async fn resume_takes_up_the_hold<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "resume").await);
    let first = take(&*one, &request).await;
    let resumed = other.resume(&request, first.lock_id()).await;
    if !is_lease(provider) {
        // A session's holds end with it: there is nothing that another could take up.
        assert!(matches!(resumed, Err(ResumeError::NotHeld { lock_id }) if lock_id == first.lock_id()));
        return give_back(&*one, first).await;
    }
    let second = resumed.expect("it is held");
    assert_eq!(second.lock_id(), first.lock_id());
    assert_eq!(second.fencing_token(), first.fencing_token());
    assert_eq!(second.acquired_at(), first.acquired_at());
    assert_eq!(second.holder(), request.holder());
    assert!(!second.is_lost());
    refused(&*one, &request).await;
    refused(&*other, &request).await;
    other
        .extend(&second, Duration::from_secs(60))
        .await
        .expect("it is held");
    give_back(&*other, second).await;
    give_back_lost(&*one, first).await;
}

/// What was never held, is held no more, or is held in another name, is not held.
pub async fn resume_not_held<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let free = request(&provider.name("leases", "not held").await);
    let elsewhere = request(&provider.name("leases", "elsewhere").await);
    let released = take(&*one, &free).await;
    let gone = released.lock_id();
    give_back(&*one, released).await;
    let held = take(&*one, &elsewhere).await;
    for (request, lock_id) in [
        (&free, LockId::new()),
        (&free, gone),
        (&free, held.lock_id()),
        (&elsewhere, LockId::new()),
        (&elsewhere, gone),
    ] {
        let error = other.resume(request, lock_id).await.expect_err("it is not held");
        assert!(
            matches!(error, ResumeError::NotHeld { lock_id: told } if told == lock_id),
            "{error:?}"
        );
    }
    assert!(!held.is_lost());
    give_back(&*one, held).await;
    give_back(&*one, take(&*one, &free).await).await;
}

/// What has expired cannot be resumed, also when nobody else has it.
pub async fn resume_expired_not_held<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("leases", "resume expired").await);
    let guard = take(&*one, &request).await;
    if !expire(provider, &guard).await {
        return;
    }
    let resumed = other.resume(&request, guard.lock_id()).await;
    assert!(matches!(resumed, Err(ResumeError::NotHeld { .. })), "{resumed:?}");
    until_none("a hold", async || provider.residue().await).await;
}
