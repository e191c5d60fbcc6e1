//! One at a time: acquire, refuse, release.

use leasehold_domain::{AcquireError, Holder, LockName, LockRequest, Released};

use crate::Provider;

fn request(name: &LockName) -> LockRequest {
    LockRequest::new(name.clone(), Holder::new("conformance", "clause"))
}

/// A free lock is granted, and the guard says what was asked for.
pub async fn try_acquire_free<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let request = request(&provider.name("basics", "free").await);
    let guard = lock.try_acquire(&request).await.expect("it is free");
    assert_eq!(guard.name(), request.name());
    assert_eq!(guard.mode(), request.mode());
    assert_eq!(guard.holder(), request.holder());
    assert!(!guard.is_lost());
    assert_eq!(lock.release(guard).await.expect("it answers"), Released::Held);
}

/// Who comes second is refused, in the same process and in another.
pub async fn second_is_busy<P: Provider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    let request = request(&provider.name("basics", "busy").await);
    let _guard = one.try_acquire(&request).await.expect("it is free");
    for lock in [&one, &other] {
        let refused = lock.try_acquire(&request).await.expect_err("it is held");
        assert!(matches!(refused, AcquireError::Contended(_)), "{refused:?}");
    }
}
