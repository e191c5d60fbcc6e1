//! What is out of bounds is refused before anything is sent, naming the field.

use std::time::Duration;

use leasehold_domain::{
    ErrorClass, ExtendError, Holder, Invalid, LockId, LockRequest, MAX_TTL, MIN_TTL, ResumeError,
};
use serde_json::json;

use super::{give_back, invalid_field, request, take};
use crate::Provider;
use crate::patience::{LONG_WAIT, within_cap};

/// Every way to ask refuses the request for the same field, and holds nothing.
async fn is_refused<P: Provider>(provider: &P, request: &LockRequest, field: &str) {
    let lock = provider.process().await;
    assert_eq!(invalid_field(lock.try_acquire(request).await), field);
    let waited = within_cap("a refusal", lock.acquire(request, LONG_WAIT)).await;
    assert_eq!(invalid_field(waited), field);
    match lock.resume(request, LockId::new()).await {
        Err(ResumeError::Invalid(invalid)) => assert_eq!(invalid.field(), field),
        other => panic!("out of bounds, but {other:?}"),
    }
    assert_eq!(lock.inspect(request.name()).await.expect("it answers"), None);
}

/// A slice below 100 ms or above 24 h is no slice.
pub async fn bad_ttl<P: Provider>(provider: &P) {
    let request = request(&provider.name("bounds", "ttl").await);
    let tick = Duration::from_nanos(1);
    for ttl in [
        Duration::ZERO,
        tick,
        MIN_TTL - tick,
        MAX_TTL + tick,
        Duration::MAX,
    ] {
        let request = request.clone().with_ttl(ttl).with_max_hold(Duration::MAX);
        is_refused(provider, &request, "ttl").await;
    }
}

/// A longest hold that is shorter than the slice is none.
pub async fn bad_max_hold<P: Provider>(provider: &P) {
    let request = request(&provider.name("bounds", "max hold").await);
    for max_hold in [Duration::ZERO, request.ttl() - Duration::from_nanos(1)] {
        is_refused(provider, &request.clone().with_max_hold(max_hold), "max_hold").await;
    }
}

/// What is told of a holder fits on a screen and into a database.
pub async fn bad_holder<P: Provider>(provider: &P) {
    let name = provider.name("bounds", "holder").await;
    let long = "x".repeat(Holder::MAX_FIELD_BYTES + 1);
    let metadata = |text: &str| json!({ "m": text }).as_object().expect("an object").clone();
    let large = "x".repeat(Holder::MAX_METADATA_BYTES);
    let table = [
        (Holder::new(&long, "op"), "holder.owner"),
        (Holder::new("nul\0", "op"), "holder.owner"),
        (Holder::new("o", &long), "holder.operation"),
        (Holder::new("o", "nul\0"), "holder.operation"),
        (Holder::new("o", "op").with_instance(&long), "holder.instance"),
        (
            Holder::new("o", "op").with_metadata(metadata(&large)),
            "holder.metadata",
        ),
        (
            Holder::new("o", "op").with_metadata(metadata("nul\0")),
            "holder.metadata",
        ),
    ];
    for (holder, field) in table {
        is_refused(provider, &LockRequest::new(name.clone(), holder), field).await;
    }
}

/// What lies just within the bounds is granted.
pub async fn bounds_are_granted<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let name = provider.name("bounds", "within").await;
    let long = "x".repeat(Holder::MAX_FIELD_BYTES);
    let text = "x".repeat(Holder::MAX_METADATA_BYTES - r#"{"m":""}"#.len());
    let holder = Holder::new(&long, &long)
        .with_instance(&long)
        .with_metadata(json!({ "m": text }).as_object().expect("an object").clone());
    let request = LockRequest::new(name, holder);
    give_back(&*lock, take(&*lock, &request.clone().with_ttl(MAX_TTL)).await).await;
    // A bound beyond what any calendar holds is no bound, and no overflow.
    give_back(
        &*lock,
        take(&*lock, &request.clone().with_max_hold(Duration::MAX)).await,
    )
    .await;
    // The smallest slice may be over before the answer is here, so nothing is said about its end.
    let guard = take(&*lock, &request.with_ttl(MIN_TTL)).await;
    within_cap("a release", lock.release(guard))
        .await
        .expect("it answers");
}

/// A hold is not extended by what is no slice, and stays as it was.
pub async fn extend_bad_ttl<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let guard = take(&*lock, &request(&provider.name("bounds", "extend").await)).await;
    for ttl in [Duration::ZERO, MIN_TTL - Duration::from_nanos(1), Duration::MAX] {
        let error = lock.extend(&guard, ttl).await.expect_err("it is out of bounds");
        assert_eq!(error.class(), ErrorClass::Invalid);
        assert!(matches!(error, ExtendError::Invalid(ref invalid) if Invalid::field(invalid) == "ttl"));
    }
    assert!(!guard.is_lost());
    give_back(&*lock, guard).await;
}
