//! A locked workspace: who is answered what, who is told of the holder, and what a holder that lost it cannot do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use leasehold_system_tests::http::{Call, delete, get, post, put};
use leasehold_system_tests::patience::{eventually, in_time};
use serde_json::{Value, json};

use crate::world::{WORKSPACE, World, in_both_modes, key_path, put_key};

in_both_modes!(
    order_of_answers,
    the_holder_is_told,
    never_a_false_404,
    a_hold_that_was_taken_away_cannot_commit,
    a_batch_longer_than_many_slices_keeps_its_lease,
);

async fn order_of_answers(mode: &'static str) {
    let world = World::start(mode).await;
    let writer = world.key("writer", "writer", Some("acme")).await;
    world
        .api
        .send(post("/v1/tenants", &json!({"id": "globex"})))
        .await
        .expect(201);
    world
        .api
        .send(post("/v1/tenants/globex/workspaces", &json!({"name": "main"})))
        .await
        .expect(201);
    let reader = world.key("reader", "reader", None).await;
    let stranger = world.api.with_key("lh_nobody_has_this_key");
    let nobody = leasehold_system_tests::http::Api {
        key: None,
        ..world.api.clone()
    };
    let row = async || -> (String, Value) {
        let sql = "SELECT xmin::text, to_jsonb(w) FROM workspaces w WHERE tenant_id = 'acme'";
        let row = world.client.query_one(sql, &[]).await.unwrap();
        (row.get(0), row.get(1))
    };

    let holding = world.hold().await;
    let before = row().await;
    let other = "/v1/tenants/globex/workspaces/main/default-config/a";
    let batch = format!("{WORKSPACE}/default-config/batch");
    let refused = [
        (
            "malformed",
            &writer,
            Call::put_text(key_path("a"), "{\"value\": "),
            400,
            "invalid_request",
        ),
        (
            "wrong type",
            &writer,
            put(&batch, &json!({})),
            422,
            "invalid_request",
        ),
        (
            "a bad operation",
            &writer,
            post(&batch, &json!({"operations": [{"op": "burn"}]})),
            422,
            "invalid_request",
        ),
        (
            "no operation",
            &writer,
            post(&batch, &json!({"operations": []})),
            422,
            "invalid_request",
        ),
        ("a bad key", &writer, put_key("a%20b", 1), 400, "invalid_request"),
        (
            "a bad If-Match",
            &writer,
            put_key("a", 1).header("if-match", "seven"),
            400,
            "invalid_request",
        ),
        (
            "wrong credential",
            &stranger,
            put_key("a", 1),
            401,
            "unauthenticated",
        ),
        ("no credential", &nobody, put_key("a", 1), 401, "unauthenticated"),
        (
            "wrong credential and malformed",
            &stranger,
            Call::put_text(key_path("a"), "{"),
            401,
            "unauthenticated",
        ),
        ("role too low", &reader, put_key("a", 1), 403, "forbidden"),
        (
            "unknown workspace",
            &writer,
            put(
                WORKSPACE.replace("main", "none") + "/default-config/a",
                &json!({"value": 1}),
            ),
            404,
            "not_found",
        ),
        (
            "unknown workspace, malformed",
            &writer,
            Call::put_text(WORKSPACE.replace("main", "none") + "/default-config/a", "{"),
            400,
            "invalid_request",
        ),
        (
            "another tenant's",
            &writer,
            put(other, &json!({"value": 1})),
            404,
            "not_found",
        ),
        (
            "another tenant's, malformed",
            &writer,
            Call::put_text(other, "{"),
            404,
            "not_found",
        ),
        ("a valid write", &writer, put_key("a", 1), 409, "workspace_locked"),
        (
            "a valid write with a stale If-Match",
            &writer,
            put_key("a", 1).header("if-match", "\"99\""),
            409,
            "workspace_locked",
        ),
        (
            "a valid delete of what is not there",
            &writer,
            delete(key_path("b")),
            409,
            "workspace_locked",
        ),
        (
            "a valid batch",
            &writer,
            post(
                &batch,
                &json!({"operations": [{"op": "put", "key": "a", "value": 1}]}),
            ),
            409,
            "workspace_locked",
        ),
    ];
    for (what, api, call, status, code) in refused {
        let answer = api.send(call).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{what}: {answer:?}"
        );
        assert_eq!(
            answer.headers["content-type"], "application/problem+json",
            "{what}"
        );
    }
    let read = [
        (
            "a POST that reads",
            post(format!("{WORKSPACE}/resolve"), &json!({"context": {}})),
        ),
        ("the workspace", get(WORKSPACE)),
        ("its configuration", get(format!("{WORKSPACE}/config"))),
        ("its keys", get(format!("{WORKSPACE}/default-config"))),
        ("its versions", get(format!("{WORKSPACE}/versions"))),
    ];
    for (what, call) in read {
        let answer = reader.send(call).await;
        assert_eq!(answer.status, 200, "{what}: {answer:?}");
    }
    // None of them touched the lock.
    assert_eq!(row().await, before);
    holding.go_on().await.expect(200);
    writer.send(put_key("a", 1)).await.expect(200);
    assert_eq!(world.version().await, 2);
}

async fn the_holder_is_told(mode: &'static str) {
    let world = World::start(mode).await;
    let alice = world.key("alice", "writer", Some("acme")).await;
    assert_eq!(
        world.api.send(get(WORKSPACE)).await.json().get("workspace_lock"),
        None
    );
    world.api.send(get(format!("{WORKSPACE}/lock"))).await.expect(404);
    let holding = world.hold_by(&alice, put_key("gate", 1)).await;

    let refused = world.api.send(put_key("a", 1)).await.expect(409);
    let problem = refused.json();
    let lock = &problem["lock"];
    assert_eq!(problem["code"], "workspace_locked");
    assert_eq!(problem["retryable"], true);
    assert_eq!(lock["locked_by"], "alice", "{problem}");
    assert_eq!(
        lock["operation"],
        format!("PUT {}", key_path("gate")),
        "{problem}"
    );
    assert!(
        lock["acquired_at"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z')),
        "{problem}"
    );
    let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=5).contains(&seconds));
    let millis = problem["retry_after_ms"].as_u64().unwrap();
    assert_eq!(millis.div_ceil(1000), seconds);
    match mode {
        "lease" => assert!(
            lock["fencing_token"].is_i64() && lock["expires_at"].is_string(),
            "{problem}"
        ),
        // A hold of which nobody knows yet what it will be.
        _ => assert!(
            lock["fencing_token"].is_null() && lock["expires_at"].is_null(),
            "{problem}"
        ),
    }
    let told = world.api.send(get(WORKSPACE)).await.expect(200).json();
    assert_eq!(told["workspace_lock"]["lock_id"], lock["lock_id"]);
    assert_eq!(told["workspace_lock"]["locked_by"], "alice");
    let told = world
        .api
        .send(get(format!("{WORKSPACE}/lock")))
        .await
        .expect(200)
        .json();
    assert_eq!(told["lock_id"], lock["lock_id"]);
    // Other processes know it too, at the latest when it was held for a while.
    let (_other, api) = world.another(|service| service).await;
    eventually("another process knows the holder", async || {
        let told = api.send(put_key("a", 1)).await.expect(409).json();
        told["lock"]["locked_by"] == "alice" && told["lock"]["operation"] == lock["operation"]
    })
    .await;

    holding.go_on().await.expect(200);
    assert_eq!(
        world.api.send(get(WORKSPACE)).await.json().get("workspace_lock"),
        None
    );
    world.api.send(get(format!("{WORKSPACE}/lock"))).await.expect(404);
}

/// The lock is taken and released all the time: between two looks it may be gone, and that is no 404.
async fn never_a_false_404(mode: &'static str) {
    let world = World::start(mode).await;
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let (api, stop) = (world.api.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut connection, mut refused) = (api.connect().await, 0);
                while !stop.load(Ordering::Relaxed) {
                    let answer = match number {
                        0 => connection.send(get(WORKSPACE)).await.expect(200),
                        _ => connection.send(put_key("key", number)).await,
                    };
                    match (answer.status, answer.code().as_str()) {
                        (200, _) => {}
                        (409, "workspace_locked") => refused += 1,
                        _ => panic!("{answer:?}"),
                    }
                }
                refused
            })
        })
        .collect();
    eventually("many writes", async || {
        world.version().await > 300 || clients.iter().any(tokio::task::JoinHandle::is_finished)
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let mut refused = 0;
    for client in clients {
        refused += in_time("a client", client).await.unwrap();
    }
    assert!(refused > 0, "there was no race");
}

/// Its end is moved into the past while its handler works; nobody sleeps for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_held_past_its_lease_cannot_commit() {
    let world = World::start("lease").await;
    let holding = world.hold().await;
    world.expire().await;
    let answer = holding.go_on().await.expect(409);
    assert_eq!(answer.code(), "lock_lost");
    assert_eq!(answer.json()["retryable"], true);
    assert_eq!(world.version().await, 0);
    let gate = world.api.send(get(key_path("gate"))).await.expect(200).json();
    assert_eq!(gate["value"], "open", "nothing was written");
    world.api.send(put_key("a", 1)).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_held_past_its_lease_cannot_commit() {
    let world = World::start("lease").await;
    let operations: Vec<Value> = (0..500)
        .map(|number| json!({"op": "put", "key": format!("key-{number}"), "value": number}))
        .chain([json!({"op": "put", "key": "gate", "value": "held"})])
        .collect();
    let batch = post(
        format!("{WORKSPACE}/default-config/batch"),
        &json!({"operations": operations}),
    );
    let holding = world.hold_by(&world.api, batch).await;
    world.expire().await;
    let answer = holding.go_on().await.expect(409);
    assert_eq!(answer.code(), "lock_lost");
    assert_eq!(world.version().await, 0);
    let keys = world
        .api
        .send(get(format!("{WORKSPACE}/default-config")))
        .await
        .expect(200)
        .json();
    let keys: Vec<&Value> = keys["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["key"])
        .collect();
    assert_eq!(keys, ["gate"], "nothing was written");
    let gate = world.api.send(get(key_path("gate"))).await.expect(200).json();
    assert_eq!(gate["value"], "open");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_holders_only_one_commits() {
    let world = World::start("lease").await;
    let holding = world.hold().await;
    world.expire().await;
    // Somebody else takes the workspace, writes, and is done before the first wakes up.
    let second = world.api.send(put_key("a", 1)).await.expect(200).json();
    assert_eq!(second["version"], 1);
    let answer = holding.go_on().await.expect(409);
    assert_eq!(answer.code(), "lock_lost");
    let config = world
        .api
        .send(get(format!("{WORKSPACE}/config")))
        .await
        .expect(200)
        .json();
    assert_eq!(config["values"], json!({"gate": "open", "a": 1}));
    assert_eq!(world.version().await, 1);
    // The late release of the first has not freed what the second may hold by now.
    world.nothing_is_held().await;
}

async fn a_hold_that_was_taken_away_cannot_commit(mode: &'static str) {
    let world = World::start(mode).await;
    let holding = world.hold().await;
    let lock = world
        .api
        .send(get(format!("{WORKSPACE}/lock")))
        .await
        .expect(200)
        .json();
    let writer = world.key("writer", "writer", Some("acme")).await;
    let force = format!("{WORKSPACE}/lock?reason=stuck");
    writer.send(delete(&force)).await.expect(403);
    world
        .api
        .send(delete(format!("{WORKSPACE}/lock")))
        .await
        .expect(400);
    let ended = world.api.send(delete(&force)).await.expect(200).json();
    assert_eq!(ended["lock_id"], lock["lock_id"]);
    // The next writer need not wait for the first to notice.
    let next = put_key("a", 1).header("prefer", "wait=5");
    world.api.send(next).await.expect(200);
    let answer = holding.go_on().await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (409, "lock_lost"),
        "{answer:?}"
    );
    let config = world
        .api
        .send(get(format!("{WORKSPACE}/config")))
        .await
        .expect(200)
        .json();
    assert_eq!(config["values"], json!({"gate": "open", "a": 1}));
    assert_eq!(world.version().await, 1);
    let sql = "SELECT released_by, reason, locked_by FROM leasehold.lock_audit";
    let row = world.client.query_one(sql, &[]).await.unwrap();
    let audited: [String; 3] = [row.get(0), row.get(1), row.get(2)];
    assert_eq!(audited, ["tester", "stuck", "tester"]);
    world.nothing_is_held().await;
}

async fn a_batch_longer_than_many_slices_keeps_its_lease(mode: &'static str) {
    let slice = Duration::from_millis(1500);
    let settings = |service: leasehold_system_tests::service::ServiceBuilder| {
        service.set("WORKSPACE_LOCK_LEASE_MS", slice.as_millis().to_string())
    };
    let world = World::start_with(mode, settings).await;
    let operations = json!([{"op": "put", "key": "gate", "value": 1}, {"op": "put", "key": "b", "value": 2}]);
    let batch = post(
        format!("{WORKSPACE}/default-config/batch"),
        &json!({"operations": operations}),
    );
    let holding = world.hold_by(&world.api, batch).await;
    let since = std::time::Instant::now();
    eventually("three slices have passed", async || {
        // All the while nobody else gets it.
        let refused = world.api.send(put_key("a", 1)).await;
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (409, "workspace_locked"),
            "{refused:?}"
        );
        since.elapsed() > slice * 3
    })
    .await;
    let answer = holding.go_on().await.expect(200).json();
    assert_eq!(answer["version"], 1);
    assert_eq!(answer["applied"], 2);
}
