//! Feedback records: what they do, and whom they wait for: nobody.

use std::sync::Arc;

use axum::http::Method;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::Api;

const RECORDS: &str = "/v1/feedback-records";

async fn start() -> Api {
    Api::start(WorkspaceLockMode::Lease).await
}

async fn make(api: &Api, tenant: &str) -> String {
    let new = json!({"tenant_id": tenant, "user_id": "alice", "field_id": "title", "value": {"stars": 5}});
    let made = api.post(RECORDS, new).await.is(201);
    format!("{RECORDS}/{}", made["id"].as_str().unwrap())
}

/// The types of the events of a tenant's records.
async fn events(api: &Api, tenant: &str) -> Vec<String> {
    let events = api.events(tenant).await.into_iter();
    events
        .map(|(kind, _)| kind)
        .filter(|kind| kind.starts_with("feedback_record."))
        .collect()
}

/// Its row is there before the commit, and it is one statement.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_at_its_commit_was_not_made() {
    let api = start().await;
    let too_late = "CREATE FUNCTION too_late() RETURNS trigger LANGUAGE plpgsql
                        AS $$ BEGIN RAISE EXCEPTION 'not committed'; END $$;
                    CREATE CONSTRAINT TRIGGER too_late AFTER INSERT ON feedback_records
                        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION too_late()";
    api.client().await.batch_execute(too_late).await.unwrap();
    let new = json!({"tenant_id": "acme", "value": 5});
    let refused = api.post(RECORDS, new).await;
    assert!(refused.status >= 500, "{}", refused.status);
    let records = api.get(&format!("{RECORDS}?tenant_id=acme")).await.is(200);
    assert_eq!(records["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn made_read_changed_deleted() {
    let api = start().await;
    let new = json!({"tenant_id": "acme", "user_id": "alice", "field_id": "title", "value": {"stars": 5}});
    let made = api.post(RECORDS, new).await.is(201);
    let id: Uuid = made["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(id.get_version_num(), 7);
    assert_eq!(
        made,
        json!({
            "id": id, "tenant_id": "acme", "user_id": "alice", "field_id": "title", "value": {"stars": 5},
            "created_at": made["created_at"], "updated_at": made["created_at"],
        })
    );
    let path = format!("{RECORDS}/{id}");
    assert_eq!(api.get(&path).await.is(200), made);

    let changed = api
        .patch(&path, json!({"value": null, "user_id": null}))
        .await
        .is(200);
    assert_eq!(
        (&changed["value"], &changed["user_id"], &changed["field_id"]),
        (&Value::Null, &Value::Null, &json!("title")),
        "what is left out stays"
    );
    assert_eq!(changed["created_at"], made["created_at"]);
    assert!(changed["updated_at"].as_str() > made["updated_at"].as_str());
    assert_eq!(api.get(&path).await.is(200), changed);
    let back = json!({"field_id": "body", "user_id": "bob"});
    let changed = api.patch(&path, back).await.is(200);
    assert_eq!(
        (&changed["value"], &changed["user_id"], &changed["field_id"]),
        (&Value::Null, &json!("bob"), &json!("body"))
    );

    api.delete(&path).await.is(204);
    api.get(&path).await.problem(404, "not_found");
    api.delete(&path).await.problem(404, "not_found");
    api.patch(&path, json!({})).await.problem(404, "not_found");
    api.patch(&path, json!({"value": 1}))
        .await
        .problem(404, "not_found");

    let kinds = ["created", "updated", "updated", "deleted"];
    assert_eq!(
        events(&api, "acme").await,
        kinds.map(|kind| format!("feedback_record.{kind}"))
    );
    for (_, data) in api
        .events("acme")
        .await
        .iter()
        .filter(|(kind, _)| kind.starts_with("feedback"))
    {
        assert_eq!(
            *data,
            json!({"tenant_id": "acme", "id": id}),
            "it does not repeat what was said"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_json_comes_back_as_it_was() {
    let api = start().await;
    for value in [
        json!(null),
        json!(false),
        json!("text"),
        json!(1.5),
        json!(-7),
        json!([]),
        json!({"a": [1, {"b": null}]}),
    ] {
        let made = api
            .post(RECORDS, json!({"tenant_id": "acme", "value": value}))
            .await
            .is(201);
        assert_eq!((&made["value"], &made["user_id"]), (&value, &Value::Null));
        let path = format!("{RECORDS}/{}", made["id"].as_str().unwrap());
        assert_eq!(api.get(&path).await.is(200), made);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_record() {
    let api = start().await;
    let long = "x".repeat(257);
    for (bad, field) in [
        (json!({"value": 1}), "tenant_id"),
        (json!({"tenant_id": "acme"}), "value"),
        (json!({"tenant_id": "A", "value": 1}), "tenant_id"),
        (json!({"tenant_id": "acme", "value": 1, "user_id": ""}), "user_id"),
        (
            json!({"tenant_id": "acme", "value": 1, "user_id": long}),
            "user_id",
        ),
        (
            json!({"tenant_id": "acme", "value": 1, "field_id": ""}),
            "field_id",
        ),
        (json!({"tenant_id": "acme", "value": 1, "user_id": 5}), "user_id"),
        (json!({"tenant_id": "acme", "value": 1, "other": 5}), "other"),
        (json!({"tenant_id": "acme", "value": "\u{0}"}), "value"),
    ] {
        let problem = api
            .post(RECORDS, bad.clone())
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], field, "{bad}");
    }
    for tenant in ["none", "acme2"] {
        api.post(RECORDS, json!({"tenant_id": tenant, "value": 1}))
            .await
            .problem(404, "not_found");
    }
    let path = make(&api, "acme").await;
    for (bad, field) in [
        (json!({"user_id": ""}), "user_id"),
        (json!({"field_id": long}), "field_id"),
        (json!({"tenant_id": "globex"}), "tenant_id"),
    ] {
        let problem = api
            .patch(&path, bad.clone())
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], field, "{bad}");
    }
    api.get(&format!("{RECORDS}/1"))
        .await
        .problem(400, "invalid_request");
    for (query, status) in [
        ("tenant_id=A", 400),
        ("tenant_id=", 400),
        ("user_id=", 422),
        ("limit=0", 422),
        ("cursor=x", 400),
        ("tenant_id=none", 404),
    ] {
        let answer = api.get(&format!("{RECORDS}?{query}")).await;
        assert_eq!(answer.status, status, "{query}: {:#}", answer.body);
    }
    assert_eq!(events(&api, "acme").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_and_paged() {
    let api = start().await;
    for n in 0..4 {
        for tenant in ["acme", "globex"] {
            for user in ["alice", "bob"] {
                let new = json!({"tenant_id": tenant, "user_id": user, "value": n});
                api.post(RECORDS, new).await.is(201);
            }
        }
    }
    let all = async |api: &Api, filter: &str| {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = api
                .get(&format!("{RECORDS}?limit=3{filter}{cursor}"))
                .await
                .is(200);
            for item in page["items"].as_array().unwrap() {
                let text = |member: &str| item[member].as_str().unwrap().to_owned();
                found.push((
                    text("tenant_id"),
                    text("user_id"),
                    item["value"].as_i64().unwrap(),
                ));
            }
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return found,
            }
        }
    };
    assert_eq!(all(&api, "").await.len(), 16);
    for tenant in ["acme", "globex"] {
        for user in ["alice", "bob"] {
            let expected: Vec<_> = (0..4).map(|n| (tenant.to_owned(), user.to_owned(), n)).collect();
            let filter = format!("&tenant_id={tenant}&user_id={user}");
            assert_eq!(all(&api, &filter).await, expected, "oldest first");
        }
        let own = all(&api, &format!("&tenant_id={tenant}")).await;
        assert!(
            own.len() == 8 && own.iter().all(|(of, ..)| of == tenant),
            "{own:?}"
        );
        let one = api.with_key(&api.new_key("one", Role::Reader, Some(tenant)).await);
        assert_eq!(all(&one, "").await, own);
    }
    let alice = all(&api, "&user_id=alice").await;
    assert!(alice.len() == 8 && alice.iter().all(|(_, user, _)| user == "alice"));
    assert_eq!(all(&api, "&user_id=nobody").await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_one_tenant_needs_not_say_which() {
    let api = start().await;
    let one = api.with_key(&api.new_key("one", Role::Writer, Some("acme")).await);
    let made = one.post(RECORDS, json!({"value": 1})).await.is(201);
    assert_eq!(made["tenant_id"], "acme");
    one.post(RECORDS, json!({"tenant_id": "acme", "value": 1}))
        .await
        .is(201);
    one.post(RECORDS, json!({"tenant_id": "globex", "value": 1}))
        .await
        .problem(404, "not_found");
    let reader = api.with_key(&api.new_key("reader", Role::Reader, Some("acme")).await);
    let path = format!("{RECORDS}/{}", made["id"].as_str().unwrap());
    reader.get(&path).await.is(200);
    reader
        .post(RECORDS, json!({"value": 1}))
        .await
        .problem(403, "forbidden");
    reader
        .patch(&path, json!({"value": 1}))
        .await
        .problem(403, "forbidden");
    reader.delete(&path).await.problem(403, "forbidden");
    one.delete(&path).await.is(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_that_changes_nothing_takes_no_lock_and_no_gate() {
    let api = start().await;
    let path = make(&api, "acme").await;
    let before = api.rows("acme").await;
    let drain = api.close_gate("acme").await;
    let row = api.client().await;
    let lock = "BEGIN; SELECT FROM feedback_records FOR UPDATE";
    row.batch_execute(lock).await.unwrap();
    for headers in [
        &[][..],
        &[("idempotency-key", "nothing")],
        &[("idempotency-key", "nothing")],
    ] {
        let answer = api
            .send(Method::PATCH, &path, headers, Some("{}".to_owned()))
            .await;
        assert_eq!(answer.is(200), api.get(&path).await.is(200));
    }
    api.patch(&path, json!({"value": 1}))
        .await
        .problem(409, "tenant_write_conflict");
    for open in [row, drain] {
        open.batch_execute("COMMIT").await.unwrap();
    }
    assert_eq!(api.rows("acme").await, before);
    api.patch(&path, json!({"value": 1})).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_moves_meanwhile_is_a_conflict_and_one_that_goes_is_not_found() {
    let api = Arc::new(start().await);
    let elsewhere = api.client().await;
    let move_it = "UPDATE feedback_records SET tenant_id = 'globex'";
    let writes = [
        (Method::PATCH, Some(json!({"value": "mine"}).to_string())),
        (Method::DELETE, None),
    ];
    for (what, status, code) in [
        (move_it, 409, "modified_concurrently"),
        ("DELETE FROM feedback_records", 404, "not_found"),
    ] {
        for (method, body) in writes.clone() {
            let path = make(&api, "acme").await;
            elsewhere.batch_execute(&format!("BEGIN; {what}")).await.unwrap();
            let (writer, to) = (Arc::clone(&api), path.clone());
            let write = tokio::spawn(async move { writer.send(method, &to, &[], body).await });
            api.statements_wait(1).await;
            elsewhere.batch_execute("COMMIT").await.unwrap();
            let problem = write.await.unwrap().problem(status, code);
            assert_eq!(problem["retryable"], status == 409);
            let now = api.get(&path).await;
            assert_eq!(now.status, if status == 409 { 200 } else { 404 });
            if status == 409 {
                assert_eq!(
                    (&now.body["tenant_id"], &now.body["value"]),
                    (&json!("globex"), &json!({"stars": 5}))
                );
            }
        }
    }
    let unsaid = events(&api, "acme").await;
    assert!(
        unsaid.iter().all(|kind| kind == "feedback_record.created"),
        "{unsaid:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_whose_answer_is_lost_is_told_as_such() {
    let api = Arc::new(start().await);
    let in_the_way = api.client().await;
    in_the_way
        .batch_execute("BEGIN; LOCK TABLE feedback_records IN EXCLUSIVE MODE")
        .await
        .unwrap();
    let end_it = "SELECT pg_terminate_backend(pid) FROM pg_locks
                  WHERE NOT granted AND relation = 'feedback_records'::regclass
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let new = json!({"tenant_id": "acme", "value": 1}).to_string();
    // In a transaction it is known that nothing was committed.
    for (headers, status, code) in [
        (&[][..], 500, "outcome_unknown"),
        (&[("idempotency-key", "known")][..], 503, "unavailable"),
    ] {
        let (writer, new) = (Arc::clone(&api), new.clone());
        let write = tokio::spawn(async move { writer.send(Method::POST, RECORDS, headers, Some(new)).await });
        api.statements_wait(1).await;
        assert_eq!(in_the_way.query(end_it, &[]).await.unwrap().len(), 1);
        let problem = write.await.unwrap().problem(status, code);
        assert_eq!(problem["retryable"], status == 503);
    }
    in_the_way.batch_execute("COMMIT").await.unwrap();
    // The client sends it again with a key.
    let headers = [("idempotency-key", "known")];
    let answer = api.send(Method::POST, RECORDS, &headers, Some(new)).await;
    assert_eq!(answer.header("idempotency-replayed"), None);
    answer.is(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_sent_again_is_made_once() {
    let api = start().await;
    let new = json!({"tenant_id": "acme", "value": 1}).to_string();
    let headers = [("idempotency-key", "record-1")];
    let send = async |new: &str| {
        api.send(Method::POST, RECORDS, &headers, Some(new.to_owned()))
            .await
    };
    let first = send(&new).await.is(201);
    let again = send(&new).await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.is(201), first);
    send(&json!({"tenant_id": "acme", "value": 2}).to_string())
        .await
        .problem(422, "idempotency_mismatch");
    let list = api.get(RECORDS).await.is(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(events(&api, "acme").await, ["feedback_record.created"]);

    // Deleting is no different, though the second time there is nothing to delete.
    let path = format!("{RECORDS}/{}", first["id"].as_str().unwrap());
    for replayed in [None, Some("true")] {
        let answer = api
            .send(Method::DELETE, &path, &[("idempotency-key", "record-2")], None)
            .await;
        assert_eq!(
            (answer.status, answer.header("idempotency-replayed")),
            (204, replayed)
        );
    }
}
