//! What errors say, and to whom.

use std::time::Duration;

use leasehold_domain::{DistributedLockExt, Holder, LockId, LockRequest};
use serde_json::json;

use super::{SHORT_TTL, give_back, request, take};
use crate::Provider;
use crate::patience::within_cap;

/// The text of an error can be shown to a client: it has nothing in it of the backend's address or credentials,
/// nor what a holder noted for its own readers.
pub async fn error_display_has_no_secrets<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    let name = provider.name("errors", "secrets").await;
    let note = json!({ "note": "metadata-secret" });
    let holder = Holder::new("alice", "edit").with_metadata(note.as_object().expect("an object").clone());
    let guard = take(&*lock, &LockRequest::new(name.clone(), holder)).await;
    let request = request(&name);

    let mut texts = vec![
        lock.try_acquire(&request)
            .await
            .expect_err("it is held")
            .to_string(),
        lock.acquire(&request, Duration::from_millis(1))
            .await
            .expect_err("it is held")
            .to_string(),
        lock.try_acquire(&request.clone().with_ttl(Duration::ZERO))
            .await
            .expect_err("bad")
            .to_string(),
        lock.resume(&request, LockId::new())
            .await
            .expect_err("not held")
            .to_string(),
        lock.extend(&guard, Duration::ZERO)
            .await
            .expect_err("bad")
            .to_string(),
    ];
    provider.lose(&name).await;
    texts.push(
        lock.extend(&guard, SHORT_TTL)
            .await
            .expect_err("it is over")
            .to_string(),
    );
    if let Some(unreachable) = provider.unreachable().await {
        let tried = within_cap("an attempt", unreachable.try_acquire(&request)).await;
        texts.push(tried.expect_err("nobody answers").to_string());
        let work = unreachable.with_lock(&request, Duration::ZERO, async |_| ());
        texts.push(
            within_cap("an attempt", work)
                .await
                .expect_err("nobody answers")
                .to_string(),
        );
    }

    assert!(texts[0].contains("alice"), "the holder is told: {:?}", texts[0]);
    let mut secrets = provider.secrets();
    secrets.push("metadata-secret".to_owned());
    for secret in &secrets {
        for text in &texts {
            assert!(!text.contains(secret.as_str()), "{text:?} shows {secret:?}");
        }
    }
}

/// Errors are values that other tasks may get: they can be sent, shared and kept.
pub async fn errors_can_be_kept<P: Provider>(provider: &P) {
    fn kept<E: std::error::Error + Clone + Send + Sync + 'static>(error: &E) -> E {
        error.clone()
    }
    let lock = provider.process().await;
    let request = request(&provider.name("errors", "kept").await);
    let guard = take(&*lock, &request).await;
    let error = lock.try_acquire(&request).await.expect_err("it is held");
    assert_eq!(kept(&error).to_string(), error.to_string());
    assert_eq!(kept(&error).contention(), error.contention());
    give_back(&*lock, guard).await;
}
