//! [`Fingerprint`]: what a request is compared by, taken from its bytes as they are read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Body;
use axum::extract::Request;
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

/// SHA-256 over the method, the path, the query and what has been read of the body.
#[derive(Clone, Debug)]
pub(super) struct Fingerprint(Arc<Mutex<Sha256>>);

impl Fingerprint {
    /// Begins it; what is read of the body is added.
    pub(super) fn take(request: Request) -> (Request, Self) {
        let mut hash = Sha256::new();
        let uri = request.uri();
        for part in [
            request.method().as_str(),
            uri.path(),
            uri.query().unwrap_or_default(),
        ] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let fingerprint = Self(Arc::new(Mutex::new(hash)));
        let reading = fingerprint.clone();
        let request = request.map(|body| {
            Body::new(body.inspect_frame(move |frame| {
                if let Some(bytes) = frame.data_ref() {
                    reading.hash().update(bytes);
                }
            }))
        });
        (request, fingerprint)
    }

    /// Of what has been read so far.
    pub(super) fn finish(&self) -> [u8; 32] {
        self.hash().clone().finalize().into()
    }

    fn hash(&self) -> MutexGuard<'_, Sha256> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of(method: &str, uri: &str, body: &str) -> [u8; 32] {
        let request = Request::builder().method(method).uri(uri);
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let (request, fingerprint) = Fingerprint::take(request);
        let read = request.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(read, body.as_bytes());
        fingerprint.finish()
    }

    #[tokio::test]
    async fn every_part_counts_and_parts_keep_their_borders() {
        let one = of("PUT", "/a?b", "c").await;
        assert_eq!(one, of("PUT", "/a?b", "c").await);
        for (method, uri, body) in [
            ("POST", "/a?b", "c"),
            ("PUT", "/ab", "c"),
            ("PUT", "/a", "bc"),
            ("PUT", "/a?bc", ""),
            ("PUT", "/a?b", ""),
        ] {
            assert_ne!(one, of(method, uri, body).await, "{method} {uri} {body}");
        }
    }
}
