//! The erasure of a user: all of it or nothing, in all tenants or in one.

use std::sync::Arc;

use axum::http::Method;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};

use crate::support::Api;

const ERASE: &str = "/v1/feedback-records?user_id=alice";
const TENANTS: [&str; 3] = ["acme", "globex", "initech"];

/// Three tenants: in each two records of alice and one of bob.
async fn start() -> Api {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    api.post("/v1/tenants", json!({"id": "initech"})).await.is(201);
    for tenant in TENANTS {
        for user in ["alice", "bob", "alice"] {
            record(&api, tenant, user).await;
        }
    }
    api.client()
        .await
        .batch_execute("DELETE FROM leasehold.outbox")
        .await
        .unwrap();
    api
}

async fn record(api: &Api, tenant: &str, user: &str) -> String {
    let new = json!({"tenant_id": tenant, "user_id": user, "value": {"said": "a lot"}});
    let made = api.post("/v1/feedback-records", new).await.is(201);
    made["id"].as_str().unwrap().to_owned()
}

async fn all_rows(api: &Api) -> Vec<Value> {
    let mut rows = Vec::new();
    for tenant in TENANTS {
        rows.push(api.rows(tenant).await);
    }
    rows
}

async fn left(api: &Api, user: &str) -> usize {
    let list = api
        .get(&format!("/v1/feedback-records?user_id={user}"))
        .await
        .is(200);
    list["items"].as_array().unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_erased_from_all_tenants() {
    let api = start().await;
    let erased = api.delete(ERASE).await.is(200);
    assert_eq!(
        erased,
        json!({"deleted": 6, "by_tenant": {"acme": 2, "globex": 2, "initech": 2}})
    );
    assert_eq!((left(&api, "alice").await, left(&api, "bob").await), (0, 3));
    for tenant in TENANTS {
        let event = json!({"tenant_id": tenant, "user_id": "alice", "deleted": 2});
        assert_eq!(
            api.events(tenant).await,
            [("feedback_record.erased".to_owned(), event)]
        );
    }
    // Nothing is left, and that is no error, nor an event.
    let again = api.delete(ERASE).await.is(200);
    assert_eq!(again, json!({"deleted": 0, "by_tenant": {}}));
    assert_eq!(api.events("acme").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_over_three_tenants_of_which_one_is_locked_changes_nothing() {
    let api = start().await;
    for locked in TENANTS {
        let before = all_rows(&api).await;
        let drain = api.close_gate(locked).await;
        let refused = api.delete(ERASE).await.problem(409, "tenant_write_conflict");
        assert_eq!(refused["reason"], "purge_in_progress");
        assert_eq!(all_rows(&api).await, before, "{locked}");
        drain.batch_execute("COMMIT").await.unwrap();
    }
    assert_eq!(api.delete(ERASE).await.is(200)["deleted"], 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_filtered_to_a_free_tenant_proceeds() {
    let api = start().await;
    let drain = api.close_gate("globex").await;
    let (before, free) = (api.rows("globex").await, "&tenant_id=acme");
    let erased = api.delete(&format!("{ERASE}{free}")).await.is(200);
    assert_eq!(erased, json!({"deleted": 2, "by_tenant": {"acme": 2}}));
    let locked = api.delete(&format!("{ERASE}&tenant_id=globex")).await;
    locked.problem(409, "tenant_write_conflict");
    assert_eq!(api.rows("globex").await, before);
    drain.batch_execute("COMMIT").await.unwrap();
    assert_eq!(left(&api, "alice").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_up_in_another_tenant_meanwhile_is_erased_too() {
    let api = Arc::new(start().await);
    api.delete(&format!("{ERASE}&tenant_id=initech")).await.is(200);
    // It has found out in which tenants alice is, and gets no further.
    let in_the_way = api.client().await;
    let lock =
        "BEGIN; SELECT FROM feedback_records WHERE user_id = 'alice' AND tenant_id = 'acme' FOR UPDATE";
    in_the_way.batch_execute(lock).await.unwrap();
    let erasing = Arc::clone(&api);
    let erasure = tokio::spawn(async move { erasing.delete(ERASE).await });
    api.statements_wait(1).await;
    record(&api, "initech", "alice").await;
    in_the_way.batch_execute("COMMIT").await.unwrap();
    let erased = erasure.await.unwrap().is(200);
    assert_eq!(erased["by_tenant"], json!({"acme": 2, "globex": 2, "initech": 1}));
    assert_eq!(left(&api, "alice").await, 0);
    assert_eq!(
        api.events("acme").await.len(),
        1,
        "what was begun anew left no event"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_that_never_comes_to_an_end_is_told_to_come_again() {
    let api = start().await;
    let restless = "
        CREATE FUNCTION come_back() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO feedback_records (id, tenant_id, user_id, value)
            VALUES (gen_random_uuid(), OLD.tenant_id, OLD.user_id, '1');
            RETURN NULL;
        END $$;
        CREATE TRIGGER come_back AFTER DELETE ON feedback_records FOR EACH ROW EXECUTE FUNCTION come_back()";
    let client = api.client().await;
    client.batch_execute(restless).await.unwrap();
    let before = all_rows(&api).await;
    let refused = api.delete(ERASE).await.problem(409, "modified_concurrently");
    assert_eq!(refused["retryable"], true);
    assert_eq!(all_rows(&api).await, before, "nothing was erased");
    client
        .batch_execute("DROP TRIGGER come_back ON feedback_records")
        .await
        .unwrap();
    assert_eq!(api.delete(ERASE).await.is(200)["deleted"], 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_erase_and_where() {
    let api = start().await;
    for (role, tenant) in [
        (Role::Reader, None),
        (Role::Writer, None),
        (Role::Writer, Some("acme")),
    ] {
        let somebody = api.with_key(&api.new_key("somebody", role, tenant).await);
        somebody.delete(ERASE).await.problem(403, "forbidden");
    }
    let one = api.with_key(&api.new_key("one", Role::Admin, Some("acme")).await);
    one.delete(&format!("{ERASE}&tenant_id=globex"))
        .await
        .problem(404, "not_found");
    // What is locked elsewhere is none of its business.
    let drain = api.close_gate("globex").await;
    let erased = one.delete(ERASE).await.is(200);
    assert_eq!(erased, json!({"deleted": 2, "by_tenant": {"acme": 2}}));
    drain.batch_execute("COMMIT").await.unwrap();
    assert_eq!(left(&api, "alice").await, 4);

    api.delete(&format!("{ERASE}&tenant_id=none"))
        .await
        .problem(404, "not_found");
    api.delete("/v1/feedback-records")
        .await
        .problem(400, "invalid_request");
    api.delete("/v1/feedback-records?user_id=")
        .await
        .problem(422, "invalid_request");
    assert_eq!(left(&api, "alice").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_that_is_sent_again_is_done_once() {
    let api = start().await;
    let erase = async || {
        api.send(Method::DELETE, ERASE, &[("idempotency-key", "erase-1")], None)
            .await
    };
    let first = erase().await.is(200);
    record(&api, "acme", "alice").await;
    let again = erase().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.is(200), first);
    assert_eq!(left(&api, "alice").await, 1, "what came after the first stays");
}

/// What one transaction cannot do is told, and can be done in parts.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_too_many_tenants_is_erased_tenant_by_tenant() {
    let api = start().await;
    let many = "
        INSERT INTO tenants (id) SELECT 'many-' || n FROM generate_series(1, 1000) AS n;
        INSERT INTO feedback_records (id, tenant_id, user_id, value, created_at, updated_at)
        SELECT gen_random_uuid(), 'many-' || n, 'alice', '1', now(), now() FROM generate_series(1, 1000) AS n";
    api.client().await.batch_execute(many).await.unwrap();
    let problem = api.delete(ERASE).await.problem(422, "invalid_request");
    assert_eq!(problem["errors"][0]["field"], "tenants");
    for tenant in TENANTS {
        api.delete(&format!("{ERASE}&tenant_id={tenant}")).await.is(200);
    }
    assert_eq!(api.delete(ERASE).await.is(200)["deleted"], 1000);
}

/// An answer that is kept to be given again tells nothing more of the user, and the write is still not done again.
#[tokio::test(flavor = "multi_thread")]
async fn kept_answers_forget_the_user() {
    let api = start().await;
    let post = async |user: &str| {
        let record = json!({"tenant_id": "acme", "user_id": user, "field_id": "nps", "value": "a secret"});
        let headers = [("idempotency-key", user)];
        let body = Some(record.to_string());
        api.send(Method::POST, "/v1/feedback-records", &headers, body)
            .await
    };
    let (alice, bob) = (post("alice").await.is(201), post("bob").await.is(201));
    api.delete(ERASE).await.is(200);
    let kept = "SELECT count(*) FROM idempotency_keys WHERE strpos(convert_from(answer, 'UTF8'), $1) > 0";
    let client = api.client().await;
    for (text, count) in [("alice", 0_i64), ("bob", 1), ("a secret", 1)] {
        let row = client.query_one(kept, &[&text]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), count, "{text}");
    }
    let again = post("alice").await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    let again = again.is(201);
    assert_eq!(again["id"], alice["id"]);
    for gone in ["user_id", "field_id", "value"] {
        assert!(again[gone].is_null(), "{again}");
    }
    assert_eq!(post("bob").await.is(201), bob);
    assert_eq!(left(&api, "alice").await, 0, "it was not written again");
}

#[tokio::test(flavor = "multi_thread")]
async fn erasures_of_one_user_at_once_do_not_deadlock() {
    let api = Arc::new(start().await);
    for round in 0..5 {
        let erasures: Vec<_> = (0..4)
            .map(|_| {
                let api = Arc::clone(&api);
                tokio::spawn(async move { api.delete(ERASE).await.is(200)["deleted"].as_i64().unwrap() })
            })
            .collect();
        let mut deleted = 0;
        for erasure in erasures {
            deleted += erasure.await.unwrap();
        }
        assert_eq!(
            deleted,
            if round == 0 { 6 } else { 30 },
            "each row is counted once"
        );
        for tenant in TENANTS {
            for _ in 0..10 {
                record(&api, tenant, "alice").await;
            }
        }
    }
}
