//! Who may do what, and who may see whom.

use std::time::Duration;

use axum::http::Method;
use leasehold_server::Settings;
use leasehold_server::auth::{NewCredential, Role};
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};

use crate::support::{Api, MAIN, settings};

async fn start() -> Api {
    Api::start(WorkspaceLockMode::Lease).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_valid_key_nothing_is_told() {
    let api = start().await;
    for key in ["", "lh_", "lh_unknown", "no key"] {
        let api = api.with_key(key);
        for path in [
            "/v1/tenants",
            MAIN,
            "/v1/tenants/none",
            "/v1/tenants/none/workspaces/none/config",
        ] {
            let answer = api.get(path).await;
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            let problem = answer.problem(401, "unauthenticated");
            assert!(!problem.to_string().contains("unknown"));
        }
        api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
            .await
            .problem(401, "unauthenticated");
        for open in [
            "/healthz",
            "/readyz",
            "/metrics",
            "/openapi.json",
            "/docs/",
            "/problems/lock_lost",
        ] {
            assert_eq!(api.get(open).await.status, 200, "{open}");
        }
    }
}

/// Whatever the request may then wait for.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_long_to_be_let_in() {
    let api = start().await;
    let client = api.client().await;
    let lock = "BEGIN; LOCK TABLE credentials IN ACCESS EXCLUSIVE MODE";
    client.batch_execute(lock).await.unwrap();
    let asked = tokio::time::timeout(Duration::from_secs(60), api.get(MAIN)).await;
    asked.expect("an answer").problem(503, "unavailable");
    client.batch_execute("ROLLBACK").await.unwrap();
    api.get(MAIN).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn roles() {
    let api = start().await;
    let key = async |role| api.with_key(&api.new_key("somebody", role, None).await);
    let (reader, writer, admin) = (
        key(Role::Reader).await,
        key(Role::Writer).await,
        key(Role::Admin).await,
    );
    let one = api.with_key(&api.new_key("one", Role::Admin, Some("acme")).await);

    let put = json!({"value": 1});
    let color = format!("{MAIN}/default-config/color");
    reader.put(&color, put.clone()).await.problem(403, "forbidden");
    for api in [&writer, &admin, &one] {
        api.put(&color, put.clone()).await.is(200);
    }
    for api in [&reader, &writer, &admin, &one] {
        api.get(&color).await.is(200);
        api.post(&format!("{MAIN}/resolve"), json!({"context": {}}))
            .await
            .is(200);
    }
    let workspaces = "/v1/tenants/acme/workspaces";
    reader
        .post(workspaces, json!({"name": "r"}))
        .await
        .problem(403, "forbidden");
    writer.post(workspaces, json!({"name": "w"})).await.is(201);
    let lock = format!("{MAIN}/lock?reason=x");
    writer.delete(&lock).await.problem(403, "forbidden");
    one.delete(&lock).await.problem(404, "not_found");
    for api in [&reader, &writer, &one] {
        api.post("/v1/tenants", json!({"id": "hooli"}))
            .await
            .problem(403, "forbidden");
        api.delete("/v1/tenants/acme").await.problem(403, "forbidden");
    }
    admin.post("/v1/tenants", json!({"id": "hooli"})).await.is(201);
    admin.delete("/v1/tenants/hooli").await.is(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_one_tenant_sees_no_other() {
    let api = start().await;
    let one = api.with_key(&api.new_key("one", Role::Admin, Some("acme")).await);
    let list = one.get("/v1/tenants").await.is(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(list["items"][0]["id"], "acme");

    // There is no telling another's tenant from one that does not exist.
    let strip = |mut problem: Value| {
        for member in ["instance", "request_id"] {
            problem.as_object_mut().unwrap().remove(member);
        }
        problem
    };
    for path in [
        "",
        "/workspaces",
        "/workspaces/main",
        "/workspaces/main/config",
        "/workspaces/main/lock",
    ] {
        let others = one
            .get(&format!("/v1/tenants/globex{path}"))
            .await
            .problem(404, "not_found");
        let nobodys = one
            .get(&format!("/v1/tenants/none{path}"))
            .await
            .problem(404, "not_found");
        assert_eq!(strip(others), strip(nobodys), "{path}");
    }
    let writes = [
        (
            Method::PUT,
            "/workspaces/main/default-config/a",
            json!({"value": 1}),
        ),
        (Method::POST, "/workspaces", json!({"name": "a"})),
        (Method::PATCH, "/workspaces/main", json!({})),
    ];
    for (method, path, body) in writes {
        let path = format!("/v1/tenants/globex{path}");
        one.send(method, &path, &[], Some(body.to_string()))
            .await
            .problem(404, "not_found");
    }
    one.get(MAIN).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_end() {
    let api = start().await;
    let new = |expires_in_seconds| NewCredential {
        subject: "short".to_owned(),
        role: Role::Reader,
        tenant: None,
        expires_in_seconds,
        only_on_loopback: false,
    };
    let good = api.store_key(&new(Some(3600.0))).await;
    let expired = api.store_key(&new(Some(-1.0))).await;
    api.with_key(&good).get(MAIN).await.is(200);
    api.with_key(&expired)
        .get(MAIN)
        .await
        .problem(401, "unauthenticated");

    let update = "UPDATE credentials SET expires_at = clock_timestamp() WHERE subject = 'short'";
    api.client().await.execute(update, &[]).await.unwrap();
    api.with_key(&good)
        .get(MAIN)
        .await
        .problem(401, "unauthenticated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_for_loopback_is_refused_elsewhere() {
    let api = start().await;
    let credential = NewCredential {
        subject: "visitor".to_owned(),
        role: Role::Admin,
        tenant: None,
        expires_in_seconds: None,
        only_on_loopback: true,
    };
    let key = api.store_key(&credential).await;
    api.with_key(&key).get(MAIN).await.is(200);
    let exposed = Settings {
        on_loopback: false,
        ..settings(WorkspaceLockMode::Lease)
    };
    let exposed = Api::start_on(&api.url, exposed).await;
    exposed.get(MAIN).await.is(200);
    exposed
        .with_key(&key)
        .get(MAIN)
        .await
        .problem(401, "unauthenticated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_stored_only_as_a_hash() {
    let api = start().await;
    let key = api.new_key("somebody", Role::Reader, None).await;
    let dump = "SELECT string_agg(c::text, ' ') FROM credentials c";
    let stored: String = api.client().await.query_one(dump, &[]).await.unwrap().get(0);
    assert!(stored.contains("somebody") && !stored.contains(&key) && !stored.contains(&key[3..]));
}
