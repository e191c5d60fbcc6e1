//! `Idempotency-Key`: never two effects, always the first answer.

use std::sync::Arc;

use axum::http::Method;
use leasehold_server::Settings;
use leasehold_server::auth::Role;
use leasehold_server::waiters::Limits;
use serde_json::{Value, json};

use crate::in_both_modes;
use crate::locking::Stuck;
use crate::support::{Answer, Api, MAIN, eventually, settings};

in_both_modes!(
    every_write_that_is_sent_again_is_answered_as_the_first,
    a_key_that_came_with_another_request_is_refused,
    a_key_is_the_credentials_own,
    what_is_no_key_is_refused_before_anything_is_looked_at,
    a_failed_write_leaves_its_key_free,
    a_request_under_way_has_its_key,
    the_same_key_at_once_has_one_effect,
    who_looks_refuses_nobody,
    a_deletion_at_once_with_its_twin_is_not_told_that_nothing_is_there,
    a_stored_answer_needs_no_lock,
    an_answer_is_kept_for_a_day,
    an_answer_goes_with_what_it_tells_of,
    a_patch_that_changes_nothing_leaves_its_key_free,
    reads_and_forced_releases_take_no_key,
);

async fn send(api: &Api, key: &str, method: Method, path: &str, body: Option<Value>) -> Answer {
    let body = body.map(|body| body.to_string());
    api.send(method, path, &[("idempotency-key", key)], body).await
}

async fn put(api: &Api, key: &str, path: &str, value: i64) -> Answer {
    let path = format!("{MAIN}/default-config/{path}");
    send(api, key, Method::PUT, &path, Some(json!({"value": value}))).await
}

async fn version(api: &Api) -> i64 {
    api.get(MAIN).await.is(200)["version"].as_i64().unwrap()
}

/// Everything that was written anywhere.
async fn rows(api: &Api) -> i64 {
    let count = "SELECT (SELECT count(*) FROM versions) + (SELECT count(*) FROM leasehold.outbox)
                      + (SELECT count(*) FROM workspaces) + (SELECT count(*) FROM tenants)";
    api.client().await.query_one(count, &[]).await.unwrap().get(0)
}

#[track_caller]
fn is_replay(first: &Answer, again: &Answer) {
    assert_eq!(first.header("idempotency-replayed"), None);
    assert_eq!(again.header("idempotency-replayed"), Some("true"), "{again:#?}");
    assert_eq!((again.status, &again.text), (first.status, &first.text));
    assert_eq!(again.header("content-type"), first.header("content-type"));
    assert_ne!(again.header("x-request-id"), first.header("x-request-id"));
}

async fn every_write_that_is_sent_again_is_answered_as_the_first(api: Api) {
    let key = format!("{MAIN}/default-config/a");
    let batch = json!({"operations": [{"op": "put", "key": "b", "value": 1}]});
    let context = json!({"condition": {"x": 1}, "overrides": {"b": 2}});
    let mut writes = vec![
        (
            Method::POST,
            "/v1/tenants".to_owned(),
            Some(json!({"id": "zeta"})),
            201,
        ),
        (
            Method::POST,
            "/v1/tenants/acme/workspaces".to_owned(),
            Some(json!({"name": "second"})),
            201,
        ),
        (Method::PUT, key.clone(), Some(json!({"value": [1, "é"]})), 200),
        (
            Method::POST,
            format!("{MAIN}/default-config/batch"),
            Some(batch),
            200,
        ),
        (Method::DELETE, key, None, 200),
        (
            Method::PATCH,
            MAIN.to_owned(),
            Some(json!({"description": "x"})),
            200,
        ),
        (Method::POST, format!("{MAIN}/versions/1/restore"), None, 200),
        (Method::POST, format!("{MAIN}/versions/2/restore"), None, 200),
        (
            Method::POST,
            format!("{MAIN}/contexts"),
            Some(context.clone()),
            201,
        ),
    ];
    let mut number = 0;
    while number < writes.len() {
        let (method, path, body, status) = writes[number].clone();
        let name = format!("key-{number}");
        let first = send(&api, &name, method.clone(), &path, body.clone()).await;
        assert_eq!(first.status, status, "{method} {path}: {:#}", first.body);
        let after = rows(&api).await;
        for _ in 0..2 {
            is_replay(
                &first,
                &send(&api, &name, method.clone(), &path, body.clone()).await,
            );
        }
        assert_eq!(rows(&api).await, after, "{method} {path}");
        if path.ends_with("/contexts") {
            let path = format!("{path}/{}", first.body["id"].as_str().unwrap());
            writes.push((Method::PUT, path.clone(), Some(context.clone()), 200));
            writes.push((Method::DELETE, path, None, 200));
            let second = "/v1/tenants/acme/workspaces/second".to_owned();
            writes.push((Method::DELETE, second, None, 204));
        }
        number += 1;
    }
    assert_eq!(version(&api).await, 8);
    // A tenant that is gone is not found, whatever the key: that comes first.
    let gone = async || send(&api, "last", Method::DELETE, "/v1/tenants/zeta", None).await;
    gone().await.is(204);
    gone().await.problem(404, "not_found");
}

async fn a_key_that_came_with_another_request_is_refused(api: Api) {
    put(&api, "k", "a", 1).await.is(200);
    put(&api, "k", "a", 2).await.problem(422, "idempotency_mismatch");
    put(&api, "k", "b", 1).await.problem(422, "idempotency_mismatch");
    let (path, body) = (format!("{MAIN}/default-config/a"), json!({"value": 1}));
    for (method, path, body) in [
        (Method::PUT, format!("{path}?x=1"), Some(body.clone())),
        (Method::DELETE, path.clone(), None),
        (Method::PATCH, MAIN.to_owned(), Some(json!({}))),
        (
            Method::POST,
            "/v1/tenants".to_owned(),
            Some(json!({"id": "zeta"})),
        ),
        (Method::DELETE, "/v1/tenants/globex".to_owned(), None),
        (
            Method::POST,
            "/v1/tenants/globex/workspaces".to_owned(),
            Some(json!({"name": "second"})),
        ),
    ] {
        send(&api, "k", method, &path, body)
            .await
            .problem(422, "idempotency_mismatch");
    }
    // The same value in other bytes.
    let spaced = Some("{ \"value\": 1 }".to_owned());
    api.send(Method::PUT, &path, &[("idempotency-key", "k")], spaced)
        .await
        .problem(422, "idempotency_mismatch");
    put(&api, "k", "a", 1).await.is(200);
    assert_eq!(version(&api).await, 1);
}

async fn a_key_is_the_credentials_own(api: Api) {
    let other = api.with_key(&api.new_key("root", Role::Admin, None).await);
    let first = put(&api, "k", "a", 1).await;
    let second = put(&other, "k", "a", 2).await;
    assert_eq!((first.status, second.status), (200, 200));
    is_replay(&first, &put(&api, "k", "a", 1).await);
    is_replay(&second, &put(&other, "k", "a", 2).await);
    assert_eq!(version(&api).await, 2);
}

async fn what_is_no_key_is_refused_before_anything_is_looked_at(api: Api) {
    let guard = api.hold("acme", "main").await;
    let long = "k".repeat(256);
    for bad in ["", "a b", "a\tb", &long] {
        let refused = put(&api, bad, "a", 1).await.problem(400, "invalid_request");
        assert_eq!(refused["errors"][0]["field"], "Idempotency-Key", "{bad:?}");
        let body = Some(json!({"id": "zeta"}));
        send(&api, bad, Method::POST, "/v1/tenants", body)
            .await
            .problem(400, "invalid_request");
    }
    let path = format!("{MAIN}/default-config/a");
    let twice = [("idempotency-key", "a"), ("idempotency-key", "b")];
    api.send(Method::PUT, &path, &twice, Some(json!({"value": 1}).to_string()))
        .await
        .problem(400, "invalid_request");
    api.release(guard).await;
    put(&api, &"k".repeat(255), "a", 1).await.is(200);
}

async fn a_failed_write_leaves_its_key_free(api: Api) {
    let guard = api.hold("acme", "main").await;
    put(&api, "k", "a", 1).await.problem(409, "workspace_locked");
    api.release(guard).await;
    let path = format!("{MAIN}/default-config/a");
    send(&api, "k", Method::DELETE, &path, None)
        .await
        .problem(404, "not_found");
    let stale = [("idempotency-key", "k"), ("if-match", "\"9\"")];
    let body = json!({"value": 1}).to_string();
    api.send(Method::PUT, &path, &stale, Some(body))
        .await
        .problem(412, "version_mismatch");
    let body = Some(json!({"name": "main"}));
    send(&api, "k", Method::POST, "/v1/tenants/acme/workspaces", body)
        .await
        .problem(409, "already_exists");
    let first = put(&api, "k", "a", 1).await;
    assert_eq!(first.status, 200, "{:#}", first.body);
    is_replay(&first, &put(&api, "k", "a", 1).await);
}

async fn a_request_under_way_has_its_key(api: Api) {
    let api = Arc::new(api);
    let stuck = Stuck::start_with(&api, &[("idempotency-key", "k")]).await;
    put(&api, "k", "a", 1)
        .await
        .problem(409, "idempotency_in_progress");
    // Whether it is another one is not known before it has ended.
    let body = Some(json!({"id": "zeta"}));
    send(&api, "k", Method::POST, "/v1/tenants", body)
        .await
        .problem(409, "idempotency_in_progress");
    put(&api, "globex", "a", 1).await.problem(409, "workspace_locked");
    let first = stuck.let_go().await;
    assert_eq!(first.status, 200);
    is_replay(&first, &put(&api, "k", "a", 1).await);
}

async fn the_same_key_at_once_has_one_effect(api: Api) {
    const CLIENTS: usize = 8;
    let api = Arc::new(api);
    for round in 0..10 {
        let (key, path) = (format!("round-{round}"), format!("a{round}"));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let (api, key, path) = (api.clone(), key.clone(), path.clone());
                tokio::spawn(async move { put(&api, &key, &path, round).await })
            })
            .collect();
        let mut answers = Vec::new();
        for client in clients {
            let answer = client.await.unwrap();
            match answer.status {
                200 => answers.push(answer),
                _ => {
                    let code = answer.body["code"].as_str().unwrap();
                    let others = ["idempotency_in_progress", "workspace_locked"];
                    assert!(others.contains(&code), "{:#}", answer.body);
                }
            }
        }
        assert_eq!(version(&api).await, round + 1);
        let first: Vec<_> = answers
            .iter()
            .filter(|answer| answer.header("idempotency-replayed").is_none())
            .collect();
        assert_eq!(first.len(), 1, "{answers:#?}");
        for again in answers
            .iter()
            .filter(|answer| answer.header("idempotency-replayed").is_some())
        {
            is_replay(first[0], again);
        }
        is_replay(first[0], &put(&api, &key, &path, round).await);
    }
    assert_eq!(version(&api).await, 10);
}

/// For a moment a look shares what it looks at, and who has come to the work waits for that moment.
async fn who_looks_refuses_nobody(api: Api) {
    let api = Arc::new(api);
    let client = api.client().await;
    let look = "SELECT pg_advisory_lock_shared(hashtextextended('idempotency shown|' || id || '|k', 0)) FROM credentials";
    assert!(!client.query(look, &[]).await.unwrap().is_empty());
    let done = {
        let api = api.clone();
        tokio::spawn(async move { put(&api, "k", "a", 1).await })
    };
    eventually("it waits, or was refused", async || {
        let waits = "SELECT FROM pg_locks JOIN pg_database d ON d.oid = database
                     WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()";
        done.is_finished() || !client.query(waits, &[]).await.unwrap().is_empty()
    })
    .await;
    client
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();
    done.await.unwrap().is(200);
}

/// Both have looked before either was done: then one of them finds nothing to delete.
async fn a_deletion_at_once_with_its_twin_is_not_told_that_nothing_is_there(api: Api) {
    let limits = Limits {
        total: 2,
        per_tenant: 2,
    };
    let few = Settings {
        waiters: limits,
        ..settings(api.mode())
    };
    let api = Arc::new(Api::start_with(few).await);
    let guard = api.hold("acme", "main").await;
    let twins: Vec<_> = (0..2)
        .map(|_| {
            let api = api.clone();
            let headers = [("idempotency-key", "k"), ("prefer", "wait=20")];
            tokio::spawn(async move {
                loop {
                    let answer = api.send(Method::DELETE, MAIN, &headers, None).await;
                    // Who looks whether both wait may have had the place.
                    if answer.status != 503 {
                        return answer;
                    }
                }
            })
        })
        .collect();
    eventually("both wait for the workspace", async || {
        let wait = [("prefer", "wait=0")];
        let body = Some(json!({"value": 1}).to_string());
        let path = format!("{MAIN}/default-config/a");
        let third = api.send(Method::PUT, &path, &wait, body);
        third.await.status == 503
    })
    .await;
    api.release(guard).await;
    let mut replays = 0;
    for twin in twins {
        let answer = twin.await.unwrap();
        assert_eq!(answer.status, 204, "{:#}", answer.body);
        replays += usize::from(answer.header("idempotency-replayed").is_some());
    }
    assert_eq!(replays, 1);

    for round in 0..30 {
        let record = json!({"tenant_id": "acme", "value": round});
        let record = api.post("/v1/feedback-records", record).await.is(201);
        let path = format!("/v1/feedback-records/{}", record["id"].as_str().unwrap());
        let twins: Vec<_> = (0..4)
            .map(|_| {
                let (api, path, key) = (api.clone(), path.clone(), format!("round-{round}"));
                tokio::spawn(async move { send(&api, &key, Method::DELETE, &path, None).await })
            })
            .collect();
        for twin in twins {
            let answer = twin.await.unwrap();
            match answer.status {
                204 => {}
                _ => drop(answer.problem(409, "idempotency_in_progress")),
            }
        }
    }
}

async fn a_stored_answer_needs_no_lock(api: Api) {
    let first = put(&api, "k", "a", 1).await;
    assert_eq!(first.status, 200);
    let guard = api.hold("acme", "main").await;
    is_replay(&first, &put(&api, "k", "a", 1).await);
    api.release(guard).await;
    // Nor anything that it told of.
    api.delete(MAIN).await.is(204);
    is_replay(&first, &put(&api, "k", "a", 1).await);
}

async fn an_answer_is_kept_for_a_day(api: Api) {
    let first = put(&api, "k", "a", 1).await;
    assert_eq!(first.status, 200);
    let client = api.client().await;
    let age = async |age: &str| {
        let sql = format!("UPDATE idempotency_keys SET created_at = clock_timestamp() - interval '{age}'");
        assert_eq!(client.execute(&sql, &[]).await.unwrap(), 1);
    };
    age("23 hours 59 minutes").await;
    is_replay(&first, &put(&api, "k", "a", 1).await);
    age("24 hours").await;
    let second = put(&api, "k", "b", 2).await;
    assert_eq!(second.body["version"], 2, "{:#}", second.body);
    is_replay(&second, &put(&api, "k", "b", 2).await);
}

/// Whose data each stored answer tells of, by its key.
async fn owners(api: &Api) -> Vec<(String, Option<String>)> {
    let stored = "SELECT key, tenant_id FROM idempotency_keys ORDER BY key";
    let rows = api.client().await.query(stored, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn an_answer_goes_with_what_it_tells_of(api: Api) {
    put(&api, "1", "a", 1).await.is(200);
    let body = json!({"tenant_id": "acme", "url": "https://example.com/"});
    let webhook = send(&api, "2", Method::POST, "/v1/webhooks", Some(body))
        .await
        .is(201);
    let webhook = format!("/v1/webhooks/{}", webhook["id"].as_str().unwrap());
    let body = json!({"tenant_id": "globex"});
    send(&api, "3", Method::PATCH, &webhook, Some(body)).await.is(200);
    let body = json!({"id": "zeta"});
    send(&api, "4", Method::POST, "/v1/tenants", Some(body))
        .await
        .is(201);
    let workspaces = "/v1/tenants/zeta/workspaces";
    let body = json!({"name": "main"});
    send(&api, "5", Method::POST, workspaces, Some(body.clone()))
        .await
        .is(201);
    let of = |key: &str, tenant: Option<&str>| (key.to_owned(), tenant.map(str::to_owned));
    let all = [
        of("1", Some("acme")),
        of("2", Some("acme")),
        of("3", Some("globex")),
        of("4", None),
        of("5", Some("zeta")),
    ];
    assert_eq!(owners(&api).await, all);

    let purge = async || send(&api, "6", Method::DELETE, "/v1/tenants/acme/data", None).await;
    let purged = purge().await;
    assert_eq!(purged.body["deleted"]["idempotency_keys"], 2, "{:#}", purged.body);
    is_replay(&purged, &purge().await);
    api.delete(&format!("{workspaces}/main")).await.is(204);
    api.delete("/v1/tenants/zeta").await.is(204);
    assert_eq!(
        owners(&api).await,
        [of("3", Some("globex")), of("4", None), of("6", None)]
    );
    // A tenant of the same id is another one.
    api.post("/v1/tenants", json!({"id": "zeta"})).await.is(201);
    let made = send(&api, "5", Method::POST, workspaces, Some(body)).await;
    assert_eq!((made.status, made.header("idempotency-replayed")), (201, None));
}

async fn a_patch_that_changes_nothing_leaves_its_key_free(api: Api) {
    let record = json!({"tenant_id": "acme", "value": 1});
    let record = api.post("/v1/feedback-records", record).await.is(201);
    let webhook = json!({"tenant_id": "acme", "url": "https://example.com/"});
    let webhook = api.post("/v1/webhooks", webhook).await.is(201);
    let id = |row: &Value| row["id"].as_str().unwrap().to_owned();
    for path in [
        MAIN.to_owned(),
        format!("/v1/feedback-records/{}", id(&record)),
        format!("/v1/webhooks/{}", id(&webhook)),
    ] {
        send(&api, "k", Method::PATCH, &path, Some(json!({})))
            .await
            .is(200);
    }
    assert_eq!(owners(&api).await, []);
    put(&api, "k", "a", 1).await.is(200);
}

async fn reads_and_forced_releases_take_no_key(api: Api) {
    let guard = api.hold("acme", "main").await;
    let release = format!("{MAIN}/lock?reason=stuck");
    send(&api, "k", Method::DELETE, &release, None).await.is(200);
    drop(guard);
    send(&api, "k", Method::GET, MAIN, None).await.is(200);
    send(&api, "not a key", Method::GET, MAIN, None).await.is(200);
    assert_eq!(owners(&api).await, []);
}
