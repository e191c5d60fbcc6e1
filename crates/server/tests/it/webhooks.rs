//! Webhooks: who may see them, what of them, and how they move.

use std::sync::Arc;

use axum::http::Method;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::Api;

const WEBHOOKS: &str = "/v1/webhooks";
const URL: &str = "https://example.com/leasehold";

async fn start() -> Api {
    Api::start(WorkspaceLockMode::Lease).await
}

async fn make(api: &Api, tenant: &str) -> String {
    let made = api
        .post(WEBHOOKS, json!({"tenant_id": tenant, "url": URL}))
        .await
        .is(201);
    format!("{WEBHOOKS}/{}", made["id"].as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn made_read_changed_deleted() {
    let api = start().await;
    let mut made = api
        .post(WEBHOOKS, json!({"tenant_id": "acme", "url": URL}))
        .await
        .is(201);
    let secret = made.as_object_mut().unwrap().remove("secret").unwrap();
    let secret = secret.as_str().unwrap();
    assert!(
        secret.starts_with("whsec_") && secret.len() >= 6 + 43,
        "256 bits: {secret}"
    );
    let id: Uuid = made["id"].as_str().unwrap().parse().unwrap();
    let expected = [
        ("tenant_id", json!("acme")),
        ("url", json!(URL)),
        ("enabled", json!(true)),
        ("updated_at", made["created_at"].clone()),
    ];
    for (member, value) in expected {
        assert_eq!(made[member], value, "{member}");
    }
    let path = format!("{WEBHOOKS}/{id}");
    assert_eq!(api.get(&path).await.is(200), made);
    assert_eq!(api.get(WEBHOOKS).await.is(200)["items"], json!([made]));

    let changed = api.patch(&path, json!({"enabled": false})).await.is(200);
    assert_eq!(
        (&changed["enabled"], &changed["url"]),
        (&json!(false), &json!(URL))
    );
    assert!(changed["updated_at"].as_str() > made["updated_at"].as_str());
    let changed = api
        .patch(&path, json!({"url": "http://127.0.0.1:9000/"}))
        .await
        .is(200);
    assert_eq!(
        (&changed["enabled"], &changed["url"], &changed["tenant_id"]),
        (&json!(false), &json!("http://127.0.0.1:9000/"), &json!("acme"))
    );
    assert_eq!(api.patch(&path, json!({})).await.is(200), changed);

    api.delete(&path).await.is(204);
    for answer in [
        api.get(&path).await,
        api.delete(&path).await,
        api.patch(&path, json!({})).await,
        api.patch(&path, json!({"enabled": true})).await,
    ] {
        answer.problem(404, "not_found");
    }
    let off = json!({"tenant_id": "acme", "url": URL, "enabled": false});
    assert_eq!(api.post(WEBHOOKS, off).await.is(201)["enabled"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_is_told_once() {
    let api = start().await;
    let new = json!({"tenant_id": "acme", "url": URL}).to_string();
    let headers = [("idempotency-key", "webhook-1")];
    let send = async || {
        api.send(Method::POST, WEBHOOKS, &headers, Some(new.clone()))
            .await
    };
    let mut first = send().await.is(201);
    let secret = first.as_object_mut().unwrap().remove("secret").unwrap();
    let again = send().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.is(201), first);

    // Neither where it is kept for the replay, nor in any other answer.
    let secret = secret.as_str().unwrap();
    let kept: Vec<u8> = api
        .client()
        .await
        .query_one("SELECT answer FROM idempotency_keys", &[])
        .await
        .unwrap()
        .get(0);
    let path = format!("{WEBHOOKS}/{}", first["id"].as_str().unwrap());
    for told in [
        String::from_utf8(kept).unwrap(),
        api.get(&path).await.is(200).to_string(),
        api.get(WEBHOOKS).await.is(200).to_string(),
        api.patch(&path, json!({"enabled": false}))
            .await
            .is(200)
            .to_string(),
    ] {
        assert!(
            told.contains(URL) && !told.contains(secret) && !told.contains("secret"),
            "{told}"
        );
    }
    let other = api
        .post(WEBHOOKS, json!({"tenant_id": "acme", "url": URL}))
        .await
        .is(201);
    assert_ne!(other["secret"], secret);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_webhook() {
    let api = start().await;
    let path = make(&api, "acme").await;
    let long = format!("https://example.com/{}", "a".repeat(2048));
    for url in [
        "",
        "example.com",
        "ftp://example.com",
        "https://",
        "file:///etc/passwd",
        "https://example.com:99999/",
        "https://example.com:/",
        &long,
    ] {
        let problem = api
            .post(WEBHOOKS, json!({"tenant_id": "acme", "url": url}))
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], "url", "{url}");
        let problem = api
            .patch(&path, json!({"url": url}))
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], "url", "{url}");
    }
    for (bad, field) in [
        (json!({"url": URL}), "tenant_id"),
        (json!({"tenant_id": "acme"}), "url"),
        (
            json!({"tenant_id": "acme", "url": URL, "enabled": null}),
            "enabled",
        ),
        (
            json!({"tenant_id": "acme", "url": URL, "secret": "mine"}),
            "secret",
        ),
    ] {
        let problem = api.post(WEBHOOKS, bad).await.problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], field);
    }
    for (bad, field) in [
        (json!({"url": null}), "url"),
        (json!({"enabled": null}), "enabled"),
        (json!({"tenant_id": null}), "tenant_id"),
        (json!({"secret": "mine"}), "secret"),
    ] {
        let problem = api.patch(&path, bad).await.problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], field);
    }
    api.post(WEBHOOKS, json!({"tenant_id": "none", "url": URL}))
        .await
        .problem(404, "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_has_a_hundred_at_most() {
    let api = start().await;
    let fill = "INSERT INTO webhooks (id, tenant_id, url, enabled, secret, created_at, updated_at)
                SELECT gen_random_uuid(), 'acme', 'https://example.com', true, 'secret', now(), now()
                FROM generate_series(1, 99)";
    api.client().await.batch_execute(fill).await.unwrap();
    let last = make(&api, "acme").await;
    let problem = api
        .post(WEBHOOKS, json!({"tenant_id": "acme", "url": URL}))
        .await
        .problem(422, "invalid_request");
    assert_eq!(problem["errors"][0]["field"], "tenant_id");
    make(&api, "globex").await;
    api.delete(&last).await.is(204);
    make(&api, "acme").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_admins_see_them() {
    let api = start().await;
    let path = make(&api, "acme").await;
    for role in [Role::Reader, Role::Writer] {
        let somebody = api.with_key(&api.new_key("somebody", role, None).await);
        for answer in [
            somebody.get(WEBHOOKS).await,
            somebody.get(&path).await,
            somebody
                .post(WEBHOOKS, json!({"tenant_id": "acme", "url": URL}))
                .await,
            somebody.patch(&path, json!({})).await,
            somebody.delete(&path).await,
        ] {
            answer.problem(403, "forbidden");
        }
    }
    let one = api.with_key(&api.new_key("one", Role::Admin, Some("acme")).await);
    let made = one.post(WEBHOOKS, json!({"url": URL})).await.is(201);
    assert_eq!(made["tenant_id"], "acme");
    one.post(WEBHOOKS, json!({"tenant_id": "globex", "url": URL}))
        .await
        .problem(404, "not_found");
    make(&api, "globex").await;
    let tenants = async |api: &Api, query: &str| {
        let list = api.get(&format!("{WEBHOOKS}{query}")).await.is(200);
        let items = list["items"].as_array().unwrap().iter();
        items
            .map(|item| item["tenant_id"].clone())
            .collect::<Vec<Value>>()
    };
    assert_eq!(tenants(&one, "").await, ["acme", "acme"]);
    assert_eq!(tenants(&api, "").await, ["acme", "acme", "globex"]);
    assert_eq!(tenants(&api, "?tenant_id=globex").await, ["globex"]);
    api.get(&format!("{WEBHOOKS}?tenant_id=none"))
        .await
        .problem(404, "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_locks_both_tenants() {
    let api = start().await;
    let path = make(&api, "acme").await;
    let (acme, other) = (api.rows("acme").await, api.rows("globex").await);
    for drained in ["acme", "globex"] {
        let drain = api.close_gate(drained).await;
        let refused = api
            .patch(&path, json!({"tenant_id": "globex"}))
            .await
            .problem(409, "tenant_write_conflict");
        assert_eq!(refused["reason"], "purge_in_progress");
        assert_eq!(
            (api.rows("acme").await, api.rows("globex").await),
            (acme.clone(), other.clone()),
            "{drained}"
        );
        drain.batch_execute("COMMIT").await.unwrap();
    }
    // What stays in its tenant needs the other one's gate no more.
    let drain = api.close_gate("globex").await;
    api.patch(&path, json!({"enabled": false})).await.is(200);
    api.patch(&path, json!({"tenant_id": "acme"})).await.is(200);
    drain.batch_execute("COMMIT").await.unwrap();

    let moved = api
        .patch(&path, json!({"tenant_id": "globex", "enabled": true}))
        .await
        .is(200);
    assert_eq!(
        (&moved["tenant_id"], &moved["enabled"]),
        (&json!("globex"), &json!(true))
    );
    assert_eq!(api.get(&path).await.is(200), moved);
    assert_eq!(api.purge("acme").await.is(200)["deleted"]["webhooks"], 0);
    assert_eq!(api.purge("globex").await.is(200)["deleted"]["webhooks"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_moves_meanwhile_is_a_conflict() {
    let api = Arc::new(start().await);
    api.post("/v1/tenants", json!({"id": "initech"})).await.is(201);
    let path = make(&api, "acme").await;
    let writes = [
        (Method::PATCH, Some(json!({"tenant_id": "initech"}).to_string())),
        (Method::DELETE, None),
    ];
    let elsewhere = api.client().await;
    for (method, body) in writes {
        for statement in [
            "UPDATE webhooks SET tenant_id = 'acme'",
            "BEGIN",
            "UPDATE webhooks SET tenant_id = 'globex'",
        ] {
            elsewhere.batch_execute(statement).await.unwrap();
        }
        let (writer, to) = (Arc::clone(&api), path.clone());
        let write = tokio::spawn(async move { writer.send(method, &to, &[], body).await });
        api.statements_wait(1).await;
        elsewhere.batch_execute("COMMIT").await.unwrap();
        write.await.unwrap().problem(409, "modified_concurrently");
        assert_eq!(api.get(&path).await.is(200)["tenant_id"], "globex");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_sees_both_tenants_moves_one() {
    let api = start().await;
    let path = make(&api, "acme").await;
    let acme = api.with_key(&api.new_key("one", Role::Admin, Some("acme")).await);
    let other = api.with_key(&api.new_key("one", Role::Admin, Some("globex")).await);
    for tenant in ["globex", "none"] {
        acme.patch(&path, json!({"tenant_id": tenant}))
            .await
            .problem(404, "not_found");
    }
    other
        .patch(&path, json!({"tenant_id": "globex"}))
        .await
        .problem(404, "not_found");
    api.patch(&path, json!({"tenant_id": "none"}))
        .await
        .problem(404, "not_found");
    assert_eq!(acme.get(&path).await.is(200)["tenant_id"], "acme");
    api.patch(&path, json!({"tenant_id": "globex"})).await.is(200);
    acme.get(&path).await.problem(404, "not_found");
    other.get(&path).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_that_changes_nothing_takes_no_lock_and_no_gate() {
    let api = start().await;
    let path = make(&api, "acme").await;
    let before = api.rows("acme").await;
    let drain = api.close_gate("acme").await;
    let row = api.client().await;
    row.batch_execute("BEGIN; SELECT FROM webhooks FOR UPDATE")
        .await
        .unwrap();
    assert_eq!(
        api.patch(&path, json!({})).await.is(200),
        api.get(&path).await.is(200)
    );
    for open in [row, drain] {
        open.batch_execute("COMMIT").await.unwrap();
    }
    assert_eq!(api.rows("acme").await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_that_swap_their_tenants_do_not_deadlock() {
    let api = Arc::new(start().await);
    let (one, two) = (make(&api, "acme").await, make(&api, "globex").await);
    for round in 0..20 {
        let (there, back) = if round % 2 == 0 {
            ("globex", "acme")
        } else {
            ("acme", "globex")
        };
        let moves = [(one.clone(), there), (two.clone(), back)].map(|(path, to)| {
            let api = Arc::clone(&api);
            tokio::spawn(async move { api.patch(&path, json!({"tenant_id": to})).await })
        });
        for moved in moves {
            moved.await.unwrap().is(200);
        }
    }
}
