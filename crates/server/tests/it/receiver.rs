//! [`Receiver`]: where events are sent to, on loopback. It remembers what came and answers as it is told.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::BodyExt;
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

pub(crate) struct Receiver {
    address: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

struct Seen {
    requests: Mutex<Vec<Received>>,
    answer: AtomicU16,
    /// A permit for each answer that may be given.
    answers: Semaphore,
}

/// A request that came.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Receiver {
    /// It answers 200.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen {
            requests: Mutex::default(),
            answer: AtomicU16::new(200),
            answers: Semaphore::new(Semaphore::MAX_PERMITS),
        });
        let router = Router::new().fallback(receive).with_state(Arc::clone(&seen));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, seen, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// From now on it answers this.
    pub(crate) fn answers(&self, status: u16) {
        self.seen.answer.store(status, Ordering::Relaxed);
    }

    /// From now on it answers nothing, until [`Receiver::let_go`].
    pub(crate) fn hold_back(&self) {
        self.seen.answers.forget_permits(Semaphore::MAX_PERMITS);
    }

    pub(crate) fn let_go(&self) {
        self.seen.answers.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    /// What came, in order.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.seen.requests.lock().unwrap().clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Received {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Checks the signature as a receiver in any language would.
    #[track_caller]
    pub(crate) fn is_signed_with(&self, secret: &str) {
        let header = self.headers["leasehold-signature"].to_str().unwrap();
        let (time, digest) = header.split_once(",v1=").unwrap();
        let time = time.strip_prefix("t=").unwrap();
        let seconds: i64 = time.parse().unwrap();
        assert!(seconds > 1_700_000_000, "{header}");
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(time.as_bytes());
        mac.update(b".");
        mac.update(&self.body);
        let expected: String = mac
            .finalize()
            .into_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest, expected, "{header}");
    }
}

async fn receive(State(seen): State<Arc<Seen>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    seen.requests.lock().unwrap().push(Received {
        method: parts.method,
        headers: parts.headers,
        body,
    });
    seen.answers.acquire().await.unwrap().forget();
    let status = StatusCode::from_u16(seen.answer.load(Ordering::Relaxed)).unwrap();
    (status, [(header::LOCATION, "http://127.0.0.1:1/elsewhere")]).into_response()
}
