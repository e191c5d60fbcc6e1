//! What writers of workspaces meet at a closed gate, and the events that they leave.

use std::sync::Arc;

use axum::http::Method;
use leasehold_domain::{DistributedLock, Holder, LockGuard, LockRequest};
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::workspace_lock_name;
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

use crate::in_both_modes;
use crate::support::{Answer, Api, MAIN, eventually, workspace_writes};

in_both_modes!(
    a_closed_gate_refuses_every_write_of_a_workspace,
    a_drain_that_waits_closes_the_gate,
    the_order_of_answers_at_a_closed_gate,
    a_patch_that_changes_nothing_takes_no_lock_and_no_gate,
    committed_writes_leave_events_and_others_none,
);

/// Takes `main` of `acme` and not the gate, as a lease under which nothing is written at the moment, or a transaction of
/// another program.
async fn hold_beside_the_gate(api: &Api) -> LockGuard {
    let lock: Arc<dyn DistributedLock> = match api.mode() {
        WorkspaceLockMode::Lease => api.state.locks(),
        WorkspaceLockMode::Advisory => Arc::new(api.db.transaction_locks()),
    };
    let name = workspace_lock_name("acme", "main").unwrap();
    let request = LockRequest::new(name, Holder::new("mallory", "PUT /elsewhere"));
    lock.try_acquire(&request).await.unwrap()
}

async fn let_go(api: &Api, guard: LockGuard) {
    drop(guard);
    eventually("the workspace is free", async || {
        api.get(&format!("{MAIN}/lock")).await.status == 404
    })
    .await;
}

#[track_caller]
fn is_refused(answer: Answer) {
    let problem = answer.problem(409, "tenant_write_conflict");
    assert_eq!(problem["reason"], "purge_in_progress", "{problem:#}");
    assert_eq!(problem["retryable"], true);
}

/// Everything that the tenant owns, but for what its lock left in a workspace.
async fn rows_without_locks(api: &Api) -> Value {
    let mut rows = api.rows("acme").await;
    for workspace in rows["public.workspaces"].as_array_mut().unwrap() {
        let columns = workspace.as_object_mut().unwrap();
        columns.retain(|column, _| !column.starts_with("workspace_lock"));
    }
    rows
}

async fn a_closed_gate_refuses_every_write_of_a_workspace(api: Api) {
    api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
        .await
        .is(200);
    let mut writes = workspace_writes();
    writes.push((
        Method::POST,
        "/v1/tenants/acme/workspaces".to_owned(),
        Some(json!({"name": "second"})),
    ));
    let before = rows_without_locks(&api).await;
    let closed = api.close_gate("acme").await;
    for (method, path, body) in &writes {
        let body = body.as_ref().map(Value::to_string);
        for headers in [&[][..], &[("idempotency-key", "k")], &[("if-match", "*")]] {
            let answer = api.send(method.clone(), path, headers, body.clone()).await;
            is_refused(answer);
        }
    }
    assert_eq!(rows_without_locks(&api).await, before);
    api.get(&format!("{MAIN}/lock")).await.problem(404, "not_found");

    // Other tenants do not notice, nor do those who read.
    let others = "/v1/tenants/globex/workspaces/main/default-config/a";
    api.put(others, json!({"value": 1})).await.is(200);
    api.post("/v1/tenants", json!({"id": "initech"})).await.is(201);
    for read in ["", "/config", "/versions", "/default-config", "/contexts"] {
        api.get(&format!("{MAIN}{read}")).await.is(200);
    }
    drop(closed);
    eventually("the gate is open", async || {
        let path = format!("{MAIN}/default-config/a");
        api.put(&path, json!({"value": 1})).await.status == 200
    })
    .await;
    for (method, path, body) in writes {
        let body = body.map(|body| body.to_string());
        let answer = api.send(method.clone(), &path, &[], body).await;
        assert_ne!(answer.status, 409, "{method} {path}: {:#}", answer.body);
        if (&method, &*path) == (&Method::DELETE, MAIN) {
            let main = json!({"name": "main"});
            api.post("/v1/tenants/acme/workspaces", main).await.is(201);
        }
    }
}

async fn a_drain_that_waits_closes_the_gate(api: Api) {
    let api = Arc::new(api);
    let writer = api.writer_in_flight("acme").await;
    let put = async || {
        let path = format!("{MAIN}/default-config/a");
        api.put(&path, json!({"value": 1})).await
    };
    put().await.is(200);
    let drain = tokio::spawn({
        let api = api.clone();
        async move { api.close_gate("acme").await }
    });
    api.purge_waits("acme").await;
    is_refused(put().await);
    writer.batch_execute("COMMIT").await.unwrap();
    let closed = drain.await.unwrap();
    is_refused(put().await);
    closed.batch_execute("COMMIT").await.unwrap();
    assert_eq!(put().await.is(200)["version"], 2);
}

async fn the_order_of_answers_at_a_closed_gate(api: Api) {
    let color = format!("{MAIN}/default-config/color");
    let unknown = "/v1/tenants/acme/workspaces/none/default-config/color";
    let valid = json!({"value": 1}).to_string();
    let put = async |api: &Api, path: &str, headers: &[(&str, &str)], body: &str| {
        api.send(Method::PUT, path, headers, Some(body.to_owned())).await
    };
    let known = [("idempotency-key", "done")];
    put(&api, &color, &known, &valid).await.is(200);

    let stranger = api.with_key("lh_unknown");
    let reader = api.with_key(&api.new_key("r", Role::Reader, None).await);
    let guard = hold_beside_the_gate(&api).await;
    let closed = api.close_gate("acme").await;
    // Each of these is wrong in every later way as well.
    let stale = ("if-match", "\"9\"");
    put(&stranger, &color, &[stale], &valid)
        .await
        .problem(401, "unauthenticated");
    put(&reader, &color, &[stale], &valid)
        .await
        .problem(403, "forbidden");
    let nowhere = "/v1/tenants/none/workspaces/none/default-config/color";
    put(&api, nowhere, &[stale], &valid)
        .await
        .problem(404, "not_found");
    put(&api, unknown, &[stale], "{")
        .await
        .problem(400, "invalid_request");
    put(&api, unknown, &[stale], "{}")
        .await
        .problem(422, "invalid_request");
    put(&api, unknown, &[stale, known[0]], &valid)
        .await
        .problem(422, "idempotency_mismatch");
    put(&api, &color, &[stale, known[0]], &valid).await.is(200);
    put(&api, unknown, &[stale], &valid)
        .await
        .problem(404, "not_found");
    put(&api, unknown, &[("prefer", "wait=1")], &valid)
        .await
        .problem(404, "not_found");
    is_refused(put(&api, &color, &[stale], &valid).await);
    is_refused(put(&api, &color, &[stale, ("prefer", "wait=1")], &valid).await);
    let missing = format!("{MAIN}/default-config/missing");
    let delete = async || api.send(Method::DELETE, &missing, &[stale], None).await;
    is_refused(delete().await);

    closed.batch_execute("COMMIT").await.unwrap();
    put(&api, unknown, &[stale], &valid)
        .await
        .problem(404, "not_found");
    delete().await.problem(409, "workspace_locked");
    let_go(&api, guard).await;
    delete().await.problem(412, "version_mismatch");
    api.delete(&missing).await.problem(404, "not_found");
}

async fn a_patch_that_changes_nothing_takes_no_lock_and_no_gate(api: Api) {
    let guard = hold_beside_the_gate(&api).await;
    let before = api.rows("acme").await;
    let closed = api.close_gate("acme").await;
    let nothing = async |path: &str, headers: &[(&str, &str)]| {
        api.send(Method::PATCH, path, headers, Some("{}".to_owned()))
            .await
    };
    let unchanged = nothing(MAIN, &[]).await.is(200);
    assert_eq!(unchanged["workspace_lock"]["locked_by"], "mallory");
    assert_eq!(unchanged, api.get(MAIN).await.is(200), "as if it was read");
    let key = ("idempotency-key", "k");
    nothing(MAIN, &[key, ("if-match", "\"0\"")]).await.is(200);
    nothing(MAIN, &[("if-match", "\"1\"")])
        .await
        .problem(412, "version_mismatch");
    nothing("/v1/tenants/acme/workspaces/none", &[])
        .await
        .problem(404, "not_found");
    assert_eq!(api.rows("acme").await, before, "not even the lock");
    closed.batch_execute("COMMIT").await.unwrap();
    let_go(&api, guard).await;
    // There was nothing to keep: the key is free.
    let body = Some(json!({"description": "x"}).to_string());
    let changed = api.send(Method::PATCH, MAIN, &[key], body).await;
    assert_eq!(changed.is(200)["description"], "x");
    nothing(MAIN, &[key]).await.problem(422, "idempotency_mismatch");
}

async fn committed_writes_leave_events_and_others_none(api: Api) {
    let key = format!("{MAIN}/default-config/a");
    let workspace = |kind: &str, name: &str, description: Value| {
        let data = json!({"tenant_id": "acme", "workspace": name, "description": description});
        (format!("workspace.{kind}"), data)
    };
    let version = |version: i64, operation: &str| {
        let data = json!({
            "tenant_id": "acme", "workspace": "main", "version": version, "operation": operation, "author": "root"
        });
        ("workspace.version_created".to_owned(), data)
    };
    // That of the start.
    let mut expected = vec![workspace("created", "main", Value::Null)];

    let second = json!({"name": "second", "description": "two"});
    api.post("/v1/tenants/acme/workspaces", second.clone())
        .await
        .is(201);
    expected.push(workspace("created", "second", json!("two")));
    api.post("/v1/tenants/acme/workspaces", second)
        .await
        .problem(409, "already_exists");
    api.put(&key, json!({"value": 1})).await.is(200);
    expected.push(version(1, &format!("PUT {key}")));
    api.delete(&format!("{MAIN}/default-config/missing"))
        .await
        .problem(404, "not_found");
    let context = json!({"condition": {}, "overrides": {"a": 2}});
    let context = api.post(&format!("{MAIN}/contexts"), context).await.is(201);
    expected.push(version(2, &format!("POST {MAIN}/contexts")));
    let unknown = json!({"condition": {}, "overrides": {"b": 2}});
    api.post(&format!("{MAIN}/contexts"), unknown)
        .await
        .problem(422, "invalid_request");
    let context = format!("{MAIN}/contexts/{}", context["id"].as_str().unwrap());
    api.delete(&context).await.is(200);
    expected.push(version(3, &format!("DELETE {context}")));
    let stale = [("if-match", "\"1\"")];
    api.send(Method::DELETE, &key, &stale, None)
        .await
        .problem(412, "version_mismatch");
    let batch = json!({"operations": [
        {"op": "put", "key": "a", "value": 1}, {"op": "put", "key": "b", "value": 2}
    ]});
    let path = format!("{MAIN}/default-config/batch");
    api.post(&path, batch).await.is(200);
    expected.push(version(4, &format!("POST {path}")));
    let path = format!("{MAIN}/versions/1/restore");
    api.send(Method::POST, &path, &[], None).await.is(200);
    expected.push(version(5, &format!("POST {path}")));
    api.send(Method::POST, &format!("{MAIN}/versions/9/restore"), &[], None)
        .await
        .problem(404, "not_found");
    api.patch(MAIN, json!({"description": null})).await.is(200);
    expected.push(workspace("updated", "main", Value::Null));
    api.patch(MAIN, json!({})).await.is(200);
    let guard = api.hold("acme", "main").await;
    api.put(&key, json!({"value": 1}))
        .await
        .problem(409, "workspace_locked");
    api.release(guard).await;
    api.delete("/v1/tenants/acme/workspaces/second").await.is(204);
    let deleted = json!({"tenant_id": "acme", "workspace": "second"});
    expected.push(("workspace.deleted".to_owned(), deleted));
    api.delete("/v1/tenants/acme/workspaces/second")
        .await
        .problem(404, "not_found");

    assert_eq!(api.events("acme").await, expected);
    assert_eq!(api.events("globex").await.len(), 1, "that of the start");
}

/// Whoever writes by another program passes the gate too, and need not know of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_tables_refuse_what_bypasses_the_gate() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    for tenant in ["acme", "globex"] {
        let main = format!("/v1/tenants/{tenant}/workspaces/main");
        api.put(&format!("{main}/default-config/a"), json!({"value": 1}))
            .await
            .is(200);
        let context = json!({"condition": {}, "overrides": {}});
        api.post(&format!("{main}/contexts"), context).await.is(201);
    }
    let writes = |tenant: &str| {
        let mut writes = vec![
            format!("INSERT INTO workspaces (tenant_id, name) VALUES ('{tenant}', 'by-hand')"),
            format!("UPDATE workspaces SET description = 'x' WHERE tenant_id = '{tenant}'"),
            format!(
                "INSERT INTO default_config (tenant_id, workspace, key, value, version)
                 VALUES ('{tenant}', 'main', 'b', '1', 1)"
            ),
            format!(
                "INSERT INTO contexts (tenant_id, workspace, id, condition, overrides, priority, version)
                 VALUES ('{tenant}', 'main', gen_random_uuid(), '{{}}', '{{}}', 0, 1)"
            ),
            format!(
                "INSERT INTO versions (tenant_id, workspace, version, operation, author, fencing_token, snapshot)
                 VALUES ('{tenant}', 'main', 9, 'x', 'x', 1, '{{}}')"
            ),
        ];
        for table in ["default_config", "contexts", "versions"] {
            writes.push(format!(
                "UPDATE {table} SET version = version + 90 WHERE tenant_id = '{tenant}'"
            ));
            writes.push(format!("DELETE FROM {table} WHERE tenant_id = '{tenant}'"));
        }
        writes.push(format!("DELETE FROM workspaces WHERE tenant_id = '{tenant}'"));
        writes
    };
    let client = api.client().await;
    let closed = api.close_gate("acme").await;
    for write in writes("acme") {
        let refused = client.execute(&write, &[]).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Some(&SqlState::LOCK_NOT_AVAILABLE),
            "{write}: {refused}"
        );
    }
    for write in writes("globex") {
        assert!(client.execute(&write, &[]).await.unwrap() > 0, "{write}");
    }
    // What happens to the lock of a workspace is no write of the tenant.
    api.release(api.hold("acme", "main").await).await;
    closed.batch_execute("COMMIT").await.unwrap();
    for write in writes("acme") {
        assert!(client.execute(&write, &[]).await.unwrap() > 0, "{write}");
    }
    let bad = "INSERT INTO workspaces (tenant_id, name) VALUES ('globex', 'No Name')";
    let refused = client.execute(bad, &[]).await.unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::CHECK_VIOLATION), "{refused}");
}
