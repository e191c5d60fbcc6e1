//! What the service counts and measures, as Prometheus reads it.

use leasehold_domain::{NewWork, Scope, WorkQueue};
use leasehold_server::config::WorkspaceLockMode;
use serde_json::json;

use crate::support::{Api, MAIN, eventually};

/// The value of a series, by its name and labels as they stand there. All tests of a process count together.
async fn value(api: &Api, series: &str) -> Option<f64> {
    let answer = api.with_key("").get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let line = answer.text.lines().find_map(|line| line.strip_prefix(series));
    line.map(|value| value.trim().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_counted_as_a_request_and_as_a_lock() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let route = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/{key}";
    let requests = format!(r#"leasehold_http_requests_total{{route="{route}",method="PUT",status="200"}}"#);
    let times = format!(r#"leasehold_http_request_seconds_count{{route="{route}",method="PUT"}}"#);
    let acquired = r#"leasehold_lock_acquire_total{backend="lease",outcome="acquired"}"#;
    let held = r#"leasehold_lock_hold_seconds_count{backend="lease"}"#;
    let all = [requests.as_str(), &times, acquired, held];
    let mut before = Vec::new();
    for series in all {
        before.push(value(&api, series).await.unwrap_or_default());
    }
    for key in ["a", "b", "c"] {
        api.put(&format!("{MAIN}/default-config/{key}"), json!({"value": 1}))
            .await
            .is(200);
    }
    for (series, before) in all.into_iter().zip(before) {
        let now = value(&api, series).await.unwrap();
        assert!(now >= before + 3.0, "{series}: {before}, then {now}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_client_makes_up_becomes_a_series() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    // Counting begins in this process.
    api.get("/metrics").await;
    for path in [
        "/no-such-page-1",
        "/no-such-page-2",
        "/v1/tenants/no-such-tenant/workspaces",
    ] {
        api.get(path).await.problem(404, "not_found");
    }
    let request = axum::http::Method::from_bytes(b"MADEUP").unwrap();
    api.send(request, "/healthz", &[], None)
        .await
        .problem(405, "method_not_allowed");
    let text = api.get("/metrics").await.text;
    for made_up in ["no-such", "MADEUP", "acme", "root"] {
        assert!(!text.contains(made_up), "{made_up} in\n{text}");
    }
    assert!(
        text.contains(r#"route="none",method="GET",status="404""#),
        "{text}"
    );
    assert!(text.contains(r#"method="other",status="405""#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_measured_when_somebody_asks_and_not_each_time() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let queue = api.db.work_queue();
    // Nothing else in this process uses this kind.
    let work = |id: &str| NewWork::new(Scope::new("acme", "measured", "test", id));
    let ready = r#"leasehold_queue_items{kind="measured",state="ready"}"#;
    queue.enqueue_many(&[work("1"), work("2")]).await.unwrap();
    assert_eq!(value(&api, ready).await, Some(2.0));
    assert_eq!(value(&api, "leasehold_database_up").await, Some(1.0));

    let client = api.client().await;
    queue.enqueue_many(&[work("3")]).await.unwrap();
    assert_eq!(
        value(&api, ready).await,
        Some(2.0),
        "an answer is kept for a while"
    );
    eventually("the new item is measured", async || {
        value(&api, ready).await == Some(3.0)
    })
    .await;

    client
        .batch_execute("DELETE FROM leasehold.work_items WHERE kind = 'measured'")
        .await
        .unwrap();
    eventually("what is gone is not measured any more", async || {
        value(&api, ready).await == Some(0.0)
    })
    .await;
}
