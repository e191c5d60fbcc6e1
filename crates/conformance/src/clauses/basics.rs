//! One at a time: acquire, refuse, release, look.

use leasehold_domain::{
    AcquireError, DistributedLockExt, ErrorClass, Holder, LockMode, LockRequest, Released, ResumeError,
};
use serde_json::json;

use super::{becomes_free, give_back, give_back_lost, is_lease, refused, request, take, take_soon};
use crate::Provider;
use crate::patience::{LONG_WAIT, until_none, within_cap};

/// A free lock is granted, and the guard says what was asked for.
pub async fn try_acquire_free<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "free").await);
    let guard = take(&*lock, &request).await;
    assert_eq!(guard.name(), request.name());
    assert_eq!(guard.mode(), request.mode());
    assert_eq!(guard.holder(), request.holder());
    assert!(!guard.is_lost());
    give_back(&*lock, guard).await;
}

/// Who comes second is refused, in the same process and in another.
pub async fn second_is_busy<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "busy").await);
    let guard = take(&*one, &request).await;
    refused(&*one, &request).await;
    refused(&*other, &request).await;
    give_back(&*one, guard).await;
}

/// The holder itself is refused when it asks again, and its hold is not harmed by that.
pub async fn not_reentrant<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "again").await);
    let guard = take(&*lock, &request).await;
    for _ in 0..3 {
        refused(&*lock, &request).await;
    }
    assert!(!guard.is_lost());
    give_back(&*lock, guard).await;
    // One release was enough: nothing was counted.
    give_back(&*lock, take(&*lock, &request).await).await;
}

/// Different names do not know each other.
pub async fn independent_keys<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let one = take(&*lock, &request(&provider.name("basics", "one").await)).await;
    let other = take(&*lock, &request(&provider.name("basics", "other").await)).await;
    give_back(&*lock, one).await;
    assert!(!other.is_lost());
    give_back(&*lock, other).await;
}

/// A released lock is free at once for everybody, and every acquisition has an identity of its own.
pub async fn reacquire_after_release<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "reacquire").await);
    let mut ids = Vec::new();
    for lock in [&one, &one, &other, &one] {
        let guard = take(&**lock, &request).await;
        assert!(!ids.contains(&guard.lock_id()), "an identity came twice");
        ids.push(guard.lock_id());
        give_back(&**lock, guard).await;
    }
}

/// A release of what was taken away before says so, and leaves the next holder alone.
pub async fn release_idempotent<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "idempotent").await);
    let first = take(&*one, &request).await;
    provider.lose(request.name()).await;
    let second = take_soon(&*other, &request).await;
    give_back_lost(&*one, first).await;
    refused(&*one, &request).await;
    assert!(!second.is_lost());
    give_back(&*other, second).await;
}

/// A dropped guard releases in the background.
pub async fn drop_frees<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "drop").await);
    drop(take(&*one, &request).await);
    becomes_free(&*other, &request).await;
}

/// A guard can be dropped in a thread that knows no runtime.
pub async fn drop_in_a_plain_thread_frees<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "thread").await);
    let guard = take(&*one, &request).await;
    let dropped = std::thread::spawn(move || drop(guard)).join();
    dropped.expect("dropping does not panic");
    becomes_free(&*other, &request).await;
}

/// A panic that unwinds through a guard releases it.
pub async fn drop_in_a_panic_frees<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "panic").await);
    let guard = take(&*one, &request).await;
    let panicked = tokio::spawn(async move {
        let _guard = guard;
        panic!("on purpose");
    });
    assert!(panicked.await.is_err_and(|error| error.is_panic()));
    becomes_free(&*other, &request).await;
}

/// A guard may outlive every handle of its lock; dropped then, it still frees.
pub async fn drop_after_the_lock_is_gone_frees<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "outlive").await);
    let guard = take(&*one, &request).await;
    drop(one);
    drop(guard);
    becomes_free(&*other, &request).await;
}

/// Nobody is told of a lock that is free.
pub async fn inspect_free_is_none<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "nobody").await);
    assert_eq!(lock.inspect(request.name()).await.expect("it answers"), None);
    give_back(&*lock, take(&*lock, &request).await).await;
    assert_eq!(lock.inspect(request.name()).await.expect("it answers"), None);
}

/// The refused are told who has it, since when, until when and what for; in another process as far as the backend
/// can know. A look tells the same.
pub async fn contention_names_the_holder<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let metadata =
        json!({ "ticket": 7, "why": "Ümlaute, \"quotes\" and \\", "deep": { "er": [null, true, 1.5] } });
    let holder = Holder::new("alice@example.com", "PUT /v1/plans/7 ' OR 1=1 --")
        .with_instance("api-3")
        .with_metadata(metadata.as_object().expect("an object").clone());
    let name = provider.name("basics", "holder").await;
    let guard = take(&*one, &LockRequest::new(name.clone(), holder.clone())).await;
    assert_eq!(*guard.holder(), holder);

    for (lock, same_process) in [(&one, true), (&other, false)] {
        let refusal = refused(&**lock, &request(&name))
            .await
            .held
            .expect("somebody has it");
        let look = lock
            .inspect(&name)
            .await
            .expect("it answers")
            .expect("somebody has it");
        for held in [*refusal, look] {
            assert_eq!(held.name, name);
            assert_eq!(held.mode, LockMode::Exclusive);
            if same_process || is_lease(provider) {
                assert_eq!(held.holder, Some(provider.told(&holder)));
                assert_eq!(held.lock_id, Some(guard.lock_id()));
                assert_eq!(held.acquired_at, Some(guard.acquired_at()));
                assert_eq!(held.fencing_token, guard.fencing_token());
            } else {
                assert!(held.session.is_some(), "nothing is known of {held:?}");
            }
            assert_eq!(held.expires_at.is_some(), is_lease(provider));
            assert!(
                held.expires_at >= guard.expires_at(),
                "{held:?} ends before {guard:?}"
            );
        }
    }
    give_back(&*one, guard).await;
}

/// For those who branch, contention is `None`.
pub async fn try_acquire_opt_is_none_when_contended<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "opt").await);
    let guard = lock
        .try_acquire_opt(&request)
        .await
        .expect("it answers")
        .expect("it is free");
    assert!(
        lock.try_acquire_opt(&request)
            .await
            .expect("it answers")
            .is_none()
    );
    give_back(&*lock, guard).await;
}

/// A name whose row does not exist is not found: neither contended nor free.
pub async fn absent_row_is_not_found<P: Provider>(provider: &P) {
    let Some(name) = provider.absent_name().await else {
        // Every name can be locked, also one that was never heard of.
        let lock = provider.process().await;
        let request = request(&provider.name("basics", "unheard of").await);
        give_back(&*lock, take(&*lock, &request).await).await;
        return;
    };
    let lock = provider.process().await;
    for answer in [
        lock.try_acquire(&request(&name)).await,
        within_cap("a wait", lock.acquire(&request(&name), LONG_WAIT)).await,
    ] {
        let error = answer.expect_err("there is no row");
        assert!(
            matches!(&error, AcquireError::NotFound { name: told } if *told == name),
            "{error:?}"
        );
        assert_eq!(error.class(), ErrorClass::NotFound);
        assert!(!error.is_retryable());
    }
}

/// A backend that cannot be reached is unavailable, which may pass; it never looks contended or free.
pub async fn unreachable_is_unavailable<P: Provider>(provider: &P) {
    let Some(lock) = provider.unreachable().await else {
        assert!(
            !provider.abilities().processes,
            "what is shared by processes can be out of reach"
        );
        return;
    };
    let request = request(&provider.name("basics", "unreachable").await);
    let tried = within_cap("an attempt", lock.try_acquire(&request)).await;
    let waited = within_cap("a wait", lock.acquire(&request, super::SHORT_TTL)).await;
    for answer in [tried, waited] {
        let error = answer.expect_err("nobody can have answered");
        assert!(matches!(error, AcquireError::Unavailable(_)), "{error:?}");
        assert_eq!(error.class(), ErrorClass::Unavailable);
        assert!(error.is_retryable());
    }
    within_cap("a look", lock.inspect(request.name()))
        .await
        .expect_err("nobody can have answered");
    if is_lease(provider) {
        let resumed = within_cap(
            "a resumption",
            lock.resume(&request, leasehold_domain::LockId::new()),
        )
        .await;
        assert!(matches!(resumed, Err(ResumeError::Unavailable(_))), "{resumed:?}");
    }
}

/// After a release that was told, nothing of the hold is left to see.
pub async fn release_is_done_when_told<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "told").await);
    for _ in 0..50 {
        let guard = take(&*lock, &request).await;
        assert_eq!(lock.release(guard).await.expect("it answers"), Released::Held);
    }
    until_none("a hold", async || provider.residue().await).await;
}
