//! What a guard says of itself: identity, times, tokens.

use std::time::Duration;

use leasehold_domain::{Durability, LockMode};

use super::{expire, give_back, is_lease, request, shared, shared_is_refused, take, take_soon};
use crate::Provider;

/// A lease says when it ends; what lives as long as a session does not.
pub async fn times_are_told<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let ttl = Duration::from_secs(20);
    let guard = take(
        &*lock,
        &request(&provider.name("guards", "times").await).with_ttl(ttl),
    )
    .await;
    assert_eq!(guard.expires_at().is_some(), is_lease(provider));
    assert_eq!(guard.trusted_until().is_some(), is_lease(provider));
    if let Some(expires_at) = guard.expires_at() {
        let slice = (expires_at - guard.acquired_at())
            .to_std()
            .expect("it ends after it began");
        assert!(
            slice.abs_diff(ttl) < Duration::from_secs(1),
            "{slice:?} were granted, not {ttl:?}"
        );
    }
    let before = guard.held_for();
    provider.pass(Duration::from_millis(50)).await;
    assert!(guard.held_for() >= before + Duration::from_millis(50));
    give_back(&*lock, guard).await;
}

/// A holder trusts a lease for one slice from before it was asked for, less a margin of 10 % of it, at least 10 ms
/// and at most 1 s.
pub async fn trust_ends_before_the_lease<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let name = provider.name("guards", "trust").await;
    for (ttl, margin) in [(400, 40), (5_000, 500), (60_000, 1_000)] {
        let ttl = Duration::from_millis(ttl);
        // The backend's clock is known from a guard.
        let first = take(&*lock, &request(&name)).await;
        let clock = first.control().parts().clock.clone();
        give_back(&*lock, first).await;

        let before = clock.now();
        let guard = take(&*lock, &request(&name).with_ttl(ttl)).await;
        let parts = guard.control().parts().clone();
        let after = clock.now();
        assert_eq!(parts.trusted_until.is_some(), is_lease(provider));
        if let Some(trusted) = parts.trusted_until {
            let trusted_for = ttl - Duration::from_millis(margin);
            assert!(before.plus(trusted_for) <= trusted, "trusted too short");
            assert!(trusted <= after.plus(trusted_for), "trusted too long");
        }
        // With the shortest slice it may be over by now.
        lock.release(guard).await.expect("it answers");
    }
}

/// The tokens of a name rise with every acquisition: after a release, a drop, a loss, an expiry, in any process.
pub async fn token_increases<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("guards", "tokens").await);
    let mut last = None;
    for round in 0..12 {
        let lock = if round % 3 == 0 { &other } else { &one };
        let guard = take_soon(&**lock, &request).await;
        assert_eq!(guard.fencing_token().is_some(), is_lease(provider));
        if is_lease(provider) {
            assert!(
                guard.fencing_token() > last,
                "{:?} after {last:?}",
                guard.fencing_token()
            );
        }
        last = guard.fencing_token();
        match round % 4 {
            0 => give_back(&**lock, guard).await,
            1 => drop(guard),
            2 => provider.lose(request.name()).await,
            _ => assert_eq!(expire(provider, &guard).await, is_lease(provider)),
        }
    }
}

/// A shared hold has no token: it orders nothing.
pub async fn shared_has_no_token<P: Provider>(provider: &P) {
    let name = provider.name("guards", "shared token").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let lock = provider.process().await;
    let guard = take(&*lock, &shared(&name)).await;
    assert_eq!(guard.mode(), LockMode::Shared);
    assert_eq!(guard.fencing_token(), None);
    give_back(&*lock, guard).await;
}

/// A hold that becomes durable with its write has no token that could be trusted before; otherwise it is a hold
/// like any other.
pub async fn with_write_has_no_token_yet<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("guards", "with write").await);
    let guard = take(&*one, &request.clone().with_durability(Durability::WithWrite)).await;
    assert_eq!(guard.fencing_token(), None);
    super::refused(&*other, &request).await;
    give_back(&*one, guard).await;
    give_back(&*other, take(&*other, &request).await).await;
}
