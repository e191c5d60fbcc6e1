//! The lock is free before the response is sent, however the handler ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::put;
use leasehold_domain::{DistributedLock, LockName, LockRequest};
use leasehold_http::{ApiJson, LockScope, LockScopeLayer, Locked, Problem, RELEASE_TIMEOUT, RequestIdLayer};

use crate::support::{App, Client, Plan, Rename, alice, ask, layered, rename, router, routes, serve, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_writes_in_a_row_on_one_connection_meet_no_lock() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let mut client = Client::connect(address).await;
    for n in 0..500 {
        client.put("/plans/seven", "").await;
        assert_eq!(client.answer().await.status, 200, "write {n}");
    }
    assert_eq!(app.entered(), 500);
    assert_eq!(app.lock.held(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_writes_in_a_row_on_new_connections_meet_no_lock() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    for n in 0..500 {
        assert_eq!(write(address, "/plans/seven").await, 200, "write {n}");
    }
    assert_eq!(app.entered(), 500);
    assert_eq!(app.lock.held(), 0);
}

/// The control for the two above: a guard that is dropped instead of given back is overtaken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_is_not_awaited_is_overtaken_by_the_next_write() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let mut refused = 0;
    for _ in 0..200 {
        refused += usize::from(write(address, "/plans/seven/taken-out").await == 409);
    }
    assert!(refused > 0);
    until("the lock is free in the end", || app.lock.held() == 0).await;
}

async fn write(address: SocketAddr, path: &str) -> u16 {
    let mut client = Client::connect(address).await;
    client.put(path, "").await;
    client.answer().await.status
}

#[tokio::test]
async fn a_panic_is_answered_after_the_release() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let mut client = Client::connect(address).await;
    for _ in 0..20 {
        client.put("/plans/seven/panic", "").await;
        client.answer().await.problem(500, "internal");
        assert_eq!(app.lock.held(), 0);
        client.put("/plans/seven", "").await;
        assert_eq!(client.answer().await.status, 200, "the connection survives");
    }
}

#[tokio::test]
async fn an_early_error_is_answered_after_the_release() {
    let app = App::new();
    let router = router(app.clone());
    for _ in 0..20 {
        ask(&router, rename("/plans/seven/refuse"))
            .await
            .problem(409, "already_exists");
        assert_eq!(app.lock.held(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_cut_off_by_time_releases() {
    let app = App::new();
    let timeout = tower_http::timeout::TimeoutLayer::with_status_code(
        StatusCode::REQUEST_TIMEOUT,
        Duration::from_secs(10),
    );
    let router = layered(routes().layer(timeout), app.clone());
    ask(&router, rename("/plans/seven/hang"))
        .await
        .problem(408, "request_timeout");
    assert_eq!(app.entered(), 1);
    assert_eq!(app.lock.held(), 0);
}

#[tokio::test]
async fn a_panic_that_nothing_catches_releases_in_the_background() {
    let app = App::new();
    let router = routes()
        .with_state(app.clone())
        .layer(LockScopeLayer)
        .layer(RequestIdLayer);
    let request = tokio::spawn(async move { ask(&router, rename("/plans/seven/panic")).await.status });
    assert!(request.await.unwrap_err().is_panic());
    assert_eq!(app.lock.attempts(), 1);
    until("the lock is free", || app.lock.held() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_release_that_hangs_does_not_keep_the_response_for_ever() {
    let app = App::new();
    app.lock.let_releases_hang();
    let start = tokio::time::Instant::now();
    assert_eq!(
        ask(&router(app.clone()), rename("/plans/seven")).await.status,
        200
    );
    assert_eq!(start.elapsed(), RELEASE_TIMEOUT);
    until("the lock is released in the background", || app.lock.held() == 0).await;
}

#[tokio::test]
async fn a_release_that_fails_does_not_change_the_response() {
    let app = App::new();
    app.lock.let_releases_fail();
    assert_eq!(ask(&router(app), rename("/plans/seven")).await.status, 200);
}

#[tokio::test]
async fn a_delete_has_no_body_and_releases_too() {
    let app = App::new();
    let router = router(app.clone());
    for _ in 0..2 {
        let request = alice("DELETE", "/plans/seven").body("ignored".into()).unwrap();
        assert_eq!(ask(&router, request).await.status, 204);
    }
}

#[tokio::test]
async fn a_request_may_hold_several_locks() {
    let app = App::new();
    let both = put(
        async |State(app): State<App>, scope: LockScope, write: Locked<Plan, ApiJson<Rename>>| {
            let request = LockRequest::new(
                LockName::new(["plan", "other"]).unwrap(),
                write.guard.holder().clone(),
            );
            let other = scope.lend(Arc::new(app.lock.clone()), app.lock.try_acquire(&request).await?);
            assert_eq!(other.name(), request.name());
            Ok::<_, Problem>(app.lock.held().to_string())
        },
    );
    let router = layered(Router::new().route("/plans/{plan}/both", both), app.clone());
    for _ in 0..2 {
        let answer = ask(&router, rename("/plans/seven/both")).await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"2"[..]));
        assert_eq!(app.lock.held(), 0);
    }
}

#[tokio::test]
async fn without_the_layer_every_locked_request_is_refused() {
    let app = App::new();
    let router = routes().with_state(app.clone()).layer(RequestIdLayer);
    ask(&router, rename("/plans/seven"))
        .await
        .problem(500, "internal");
    assert_eq!(app.lock.attempts(), 0);
}
