//! Work items and dead letters over HTTP.

use leasehold_domain::{ClaimRequest, Failure, NewWork, Scope, WorkQueue};
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};

use crate::support::Api;

/// Enqueues work that nobody of the service does.
async fn enqueue(api: &Api, tenant: &str, ids: std::ops::Range<usize>) {
    let work: Vec<_> = ids
        .map(|id| {
            NewWork::new(Scope::new(tenant, "reindex", "plan", id.to_string())).with_payload(json!({"n": id}))
        })
        .collect();
    api.db.work_queue().enqueue_many(&work).await.unwrap();
}

/// Gives work up.
async fn give_up(api: &Api, items: usize) {
    let queue = api.db.work_queue();
    let request = ClaimRequest::new(["reindex"], "test").with_batch(items);
    let claimed = queue.claim(&request).await.unwrap().claims;
    assert_eq!(claimed.len(), items);
    let failures: Vec<_> = claimed
        .iter()
        .map(|claim| Failure {
            claim: claim.key,
            error: "it cannot be done".to_owned(),
        })
        .collect();
    queue.fail(&failures).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn items_are_listed_in_pages_for_their_tenant() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    enqueue(&api, "acme", 0..3).await;
    enqueue(&api, "globex", 0..1).await;
    let queue = api.db.work_queue();
    queue
        .claim(&ClaimRequest::new(["reindex"], "test"))
        .await
        .unwrap();

    let path = "/v1/tenants/acme/work-items";
    let first = api.get(&format!("{path}?limit=2")).await.is(200);
    let cursor = first["next_cursor"].as_str().unwrap();
    let second = api.get(&format!("{path}?limit=2&cursor={cursor}")).await.is(200);
    assert_eq!(second["next_cursor"], Value::Null);
    let mut items = first["items"].as_array().unwrap().clone();
    items.extend(second["items"].as_array().unwrap().clone());
    let ids: Vec<_> = items.iter().map(|item| item["scope_id"].clone()).collect();
    assert_eq!(ids, ["0", "1", "2"]);
    assert_eq!(items[0]["state"], "claimed");
    assert_eq!(items[0]["attempt_count"], 1);
    let id = items[1]["id"].clone();
    assert_eq!(
        items[1],
        json!({
            "id": id, "kind": "reindex", "scope_type": "plan", "scope_id": "1", "state": "ready", "priority": 100,
            "attempt_count": 0, "not_before": null, "last_error": null,
        })
    );
    let reader = api.with_key(&api.new_key("reader", Role::Reader, Some("acme")).await);
    assert_eq!(
        reader.get(path).await.is(200)["items"].as_array().unwrap().len(),
        3
    );
    reader
        .get("/v1/tenants/globex/work-items")
        .await
        .problem(404, "not_found");
    api.get("/v1/tenants/nobody/work-items")
        .await
        .problem(404, "not_found");
    api.get("/v1/tenants/nobody/dead-letters")
        .await
        .problem(404, "not_found");
    api.get(&format!("{path}?limit=0"))
        .await
        .problem(422, "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_and_driven_again() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    enqueue(&api, "acme", 0..2).await;
    give_up(&api, 2).await;
    let path = "/v1/tenants/acme/dead-letters";
    let page = api.get(path).await.is(200);
    let letters = page["items"].as_array().unwrap();
    let (id, failed_at) = (&letters[0]["id"], &letters[0]["failed_at"]);
    assert!(failed_at.as_str().unwrap().ends_with('Z'));
    assert_eq!(
        letters[0],
        json!({
            "id": id, "kind": "reindex", "scope_type": "plan", "scope_id": "0", "state": "dead", "priority": 100,
            "attempt_count": 1, "not_before": null, "last_error": "it cannot be done", "failed_at": failed_at,
            "payload": {"n": 0},
        })
    );

    let writer = api.with_key(&api.new_key("writer", Role::Writer, Some("acme")).await);
    let redrive = format!("{path}/{id}/redrive");
    writer.post(&redrive, Value::Null).await.problem(403, "forbidden");
    let elsewhere = format!("/v1/tenants/globex/dead-letters/{id}/redrive");
    api.post(&elsewhere, Value::Null).await.problem(404, "not_found");
    api.post(&format!("{path}/0/redrive"), Value::Null)
        .await
        .problem(404, "not_found");
    api.post(&format!("{path}/x/redrive"), Value::Null)
        .await
        .problem(400, "invalid_request");
    let key = [("idempotency-key", "once")];
    let send = async || api.send(axum::http::Method::POST, &redrive, &key, None).await;
    assert_eq!(send().await.is(200), json!({"redriven": 1}));
    let again = send().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    again.is(200);
    api.post(&redrive, Value::Null).await.problem(404, "not_found");

    let items = api.get("/v1/tenants/acme/work-items").await.is(200);
    let item = &items["items"][0];
    assert_eq!(
        (&item["scope_id"], &item["attempt_count"]),
        (&json!("0"), &json!(0)),
        "{item}"
    );
    assert_eq!(item["state"], "ready");
    assert_eq!(api.get(path).await.is(200)["items"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_of_a_tenant_that_is_drained_is_not_driven_again() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    enqueue(&api, "acme", 0..1).await;
    give_up(&api, 1).await;
    let letters = api.get("/v1/tenants/acme/dead-letters").await.is(200);
    let redrive = format!(
        "/v1/tenants/acme/dead-letters/{}/redrive",
        letters["items"][0]["id"]
    );
    let mut stranger = api.client().await;
    let drain = stranger.transaction().await.unwrap();
    let gate = "SELECT pg_advisory_xact_lock(leasehold.tenant_write_key('acme'))";
    drain.execute(gate, &[]).await.unwrap();
    api.post(&redrive, Value::Null)
        .await
        .problem(409, "tenant_write_conflict");
    drain.rollback().await.unwrap();
    api.post(&redrive, Value::Null).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_count_by_kind_and_state() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    assert_eq!(api.get("/v1/queue/stats").await.is(200), json!({"kinds": []}));
    enqueue(&api, "acme", 0..1).await;
    give_up(&api, 1).await;
    enqueue(&api, "acme", 1..3).await;
    enqueue(&api, "globex", 0..2).await;
    let queue = api.db.work_queue();
    queue
        .claim(&ClaimRequest::new(["reindex"], "test"))
        .await
        .unwrap();
    let stats = api.get("/v1/queue/stats").await.is(200);
    let kind = &stats["kinds"][0];
    for (member, number) in [("ready", 3), ("claimed", 1), ("delayed", 0), ("dead", 1)] {
        assert_eq!(kind[member], number, "{stats}");
    }
    assert_eq!(kind["kind"], "reindex");
    let oldest = kind["oldest_ready_seconds"].as_f64().unwrap();
    assert!((0.0..60.0).contains(&oldest), "{oldest}");
    let theirs = api.with_key(&api.new_key("theirs", Role::Admin, Some("acme")).await);
    theirs.get("/v1/queue/stats").await.problem(403, "forbidden");
}
