//! What operators read: every cause once, with the request's id.

use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use leasehold_http::{LockScopeLayer, RequestIdLayer, X_REQUEST_ID};
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use crate::support::{App, ask, rename, router, routes};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Catches what this thread logs.
    fn catch() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt().json().with_writer(log.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self) -> Vec<String> {
        let bytes = self.0.lock().unwrap();
        String::from_utf8_lossy(&bytes)
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

async fn log_of(router: &axum::Router, uri: &str) -> Vec<String> {
    let (log, _caught) = Log::catch();
    let mut request = rename(uri);
    request
        .headers_mut()
        .insert(X_REQUEST_ID, "find-me".parse().unwrap());
    ask(router, request).await;
    log.lines()
}

#[tokio::test]
async fn a_cause_is_logged_once_with_all_its_sources_and_the_request_id() {
    let router = router(App::new());
    let lines = log_of(&router, "/plans/away").await;
    let [line] = lines.as_slice() else {
        panic!("{lines:#?}")
    };
    for part in [
        "WARN",
        "find-me",
        "unavailable",
        "db-7.internal refused",
        "SELECT pg_try_advisory_lock(1)",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let lines = log_of(&router, "/plans/seven/panic").await;
    let [line] = lines.as_slice() else {
        panic!("{lines:#?}")
    };
    for part in ["ERROR", "find-me", "internal", "hunter2"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    // Contention is an expected answer.
    assert_eq!(log_of(&router, "/plans/seven/refuse").await, Vec::<String>::new());
}

#[tokio::test]
async fn a_missing_layer_is_named() {
    let router = routes().with_state(App::new()).layer(RequestIdLayer);
    let lines = log_of(&router, "/plans/seven").await;
    assert!(
        lines[0].contains("LockScopeLayer") && lines[0].contains("find-me"),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn a_release_that_fails_is_logged_with_the_request_id() {
    let app = App::new();
    app.lock.let_releases_fail();
    let lines = log_of(&router(app), "/plans/seven").await;
    let [line] = lines.as_slice() else {
        panic!("{lines:#?}")
    };
    for part in ["WARN", "find-me", "plan/seven", "db-7.internal"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// Without the layer that logs causes an answer is still complete but for the request's own members.
#[tokio::test]
async fn a_problem_without_the_request_id_layer_is_still_a_problem() {
    let router = routes().with_state(App::new()).layer(LockScopeLayer);
    let answer = ask(&router, rename("/plans/unknown")).await;
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert_eq!(answer.json()["code"], "not_found");
    let request = axum::http::Request::put("/plans/a").body(Body::empty()).unwrap();
    assert_eq!(ask(&router, request).await.json()["code"], "unauthenticated");
}
