//! The purge: it waits for writers, keeps new ones out, takes everything, and counts it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold_server::Settings;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::gate::TABLES;
use crate::in_both_modes;
use crate::operations::{Things, USER, gated_writes};
use crate::support::{Answer, Api, MAIN, settings};

in_both_modes!(
    a_purge_takes_everything_and_counts_it,
    every_write_is_refused_while_a_purge_waits,
    every_write_is_refused_while_a_purge_goes_on,
    a_workspace_that_comes_back_after_a_purge_has_higher_tokens,
    a_purge_takes_a_workspace_that_is_locked,
);

/// A service whose purges wait for so long.
async fn waiting_for(wait: Duration) -> Api {
    Api::start_with(Settings {
        purge_wait: wait,
        ..settings(WorkspaceLockMode::Lease)
    })
    .await
}

fn spawn_purge(api: &Arc<Api>, tenant: &'static str) -> JoinHandle<Answer> {
    let api = Arc::clone(api);
    tokio::spawn(async move { api.purge(tenant).await })
}

/// What a purge answers when it deletes so many rows.
fn counted(counts: &[i64]) -> Value {
    TABLES
        .into_iter()
        .zip(counts)
        .map(|(table, count)| (table.to_owned(), json!(count)))
        .collect()
}

/// One of everything, and what only workers and idempotency keys make.
async fn fill(api: &Api, tenant: &str) -> Things {
    let things = Things::make(api, tenant).await;
    let record = json!({"tenant_id": tenant, "value": 1}).to_string();
    let headers = [("idempotency-key", tenant)];
    let made = api.send(
        axum::http::Method::POST,
        "/v1/feedback-records",
        &headers,
        Some(record),
    );
    made.await.is(201);
    // Nothing makes them at once.
    let queue = "
        INSERT INTO leasehold.work_items (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts)
        SELECT $1, 'send', 'webhook', n::text, 100, clock_timestamp(), 10 FROM generate_series(1, 3) AS n";
    api.client().await.execute(queue, &[&tenant]).await.unwrap();
    things
}

async fn a_purge_takes_everything_and_counts_it(api: Api) {
    for tenant in ["acme", "globex"] {
        fill(&api, tenant).await;
    }
    let key = api.new_key("one", Role::Admin, Some("acme")).await;
    let audit =
        "INSERT INTO leasehold.lock_audit (name, released_by, reason) VALUES ('|4:acme', 'root', 'test')";
    api.client().await.batch_execute(audit).await.unwrap();
    let (counts, others) = (api.counts("acme").await, api.rows("globex").await);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");

    let purged = api.purge("acme").await.is(200);
    assert_eq!(purged["tenant_id"], "acme");
    assert_eq!(purged["deleted"], counted(&counts));
    assert!(purged["waited_ms"].is_u64(), "{purged:#}");
    assert_eq!(api.counts("acme").await, [0; TABLES.len()]);
    assert_eq!(api.rows("globex").await, others, "another tenant's rows stay");

    let one = api.with_key(&key);
    one.get("/v1/tenants/acme").await.is(200);
    let kept = "SELECT count(*) FROM leasehold.lock_audit";
    assert_eq!(
        api.client()
            .await
            .query_one(kept, &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        1
    );

    // Again: there is nothing left, and that is no error. Writes go on as before.
    let again = one.purge("acme").await.is(200);
    assert_eq!(again["deleted"], counted(&[0; TABLES.len()]));
    one.post("/v1/tenants/acme/workspaces", json!({"name": "main"}))
        .await
        .is(201);
    one.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
        .await
        .is(200);
    let owns = api
        .delete("/v1/tenants/acme")
        .await
        .problem(422, "invalid_request");
    assert_eq!(owns["errors"][0]["field"], "tenant");
    one.purge("acme").await.is(200);
    api.delete("/v1/tenants/acme").await.is(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_conflicts_when_writers_do_not_end_and_deletes_nothing() {
    const WAIT: Duration = Duration::from_millis(300);
    let api = waiting_for(WAIT).await;
    fill(&api, "acme").await;
    let before = api.rows("acme").await;
    let writer = api.writer_in_flight("acme").await;
    let start = Instant::now();
    let refused = api.purge("acme").await.problem(409, "tenant_write_conflict");
    assert!(start.elapsed() >= WAIT, "{:?}", start.elapsed());
    assert_eq!(
        (&refused["reason"], &refused["retryable"]),
        (&json!("writes_in_progress"), &json!(true))
    );
    assert_eq!(api.rows("acme").await, before, "nothing was deleted");
    // It waits no more: writers pass.
    api.post("/v1/feedback-records", json!({"tenant_id": "acme", "value": 1}))
        .await
        .is(201);

    writer.batch_execute("COMMIT").await.unwrap();
    let counts = api.counts("acme").await;
    assert_eq!(api.purge("acme").await.is(200)["deleted"], counted(&counts));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_waits_for_writers_in_flight_and_takes_what_they_wrote() {
    let api = Arc::new(waiting_for(Duration::from_secs(30)).await);
    fill(&api, "acme").await;
    let counts = api.counts("acme").await;
    let writer = api.writer_in_flight("acme").await;
    let write = "INSERT INTO feedback_records (id, tenant_id, value) VALUES (gen_random_uuid(), 'acme', '1')";
    writer.batch_execute(write).await.unwrap();
    let purge = spawn_purge(&api, "acme");
    api.purge_waits("acme").await;
    // Once a writer who was let in goes on writing, it is let on.
    writer.batch_execute(write).await.unwrap();
    writer.batch_execute("COMMIT").await.unwrap();
    let purged = purge.await.unwrap().is(200);
    let mut expected = counted(&counts);
    expected["feedback_records"] = json!(expected["feedback_records"].as_i64().unwrap() + 2);
    assert_eq!(purged["deleted"], expected);
    assert_eq!(api.counts("acme").await, [0; TABLES.len()]);
}

/// Sends every kind of write, with and without an idempotency key, and sees each refused.
async fn all_writes_are_refused(api: &Api, things: &Things) {
    let writes = gated_writes();
    assert!(writes.len() >= 16, "{}", writes.len());
    for write in writes {
        let id = &write.id;
        for headers in [&[][..], &[("idempotency-key", id.as_str())]] {
            let answer = write.send(api, things, headers).await;
            assert_eq!(
                (answer.status, &answer.body["code"], &answer.body["reason"]),
                (409, &json!("tenant_write_conflict"), &json!("purge_in_progress")),
                "{id} {headers:?}: {:#}",
                answer.body
            );
            answer.problem(409, "tenant_write_conflict");
        }
    }
}

/// Every kind of write, to the things of a tenant that is not purged.
async fn all_writes_succeed(api: &Api, tenant: &str) {
    let things = Things::make(api, tenant).await;
    let mut writes = gated_writes();
    // What is deleted is not changed afterwards, and what is in a workspace goes before it.
    writes.sort_by_key(|write| {
        let deletes = write.method == axum::http::Method::DELETE;
        (deletes, std::cmp::Reverse(write.template.matches('/').count()))
    });
    for write in writes {
        let answer = write.send(api, &things, &[]).await;
        assert!(
            (200..300).contains(&answer.status),
            "{}: {:#}",
            write.id,
            answer.body
        );
    }
}

async fn every_write_is_refused_while_a_purge_waits(api: Api) {
    let api = Arc::new(Api::start_on(&api.url, settings_with(api.mode(), Duration::from_secs(60))).await);
    let things = fill(&api, "acme").await;
    let before = api.rows("acme").await;
    let writer = api.writer_in_flight("acme").await;
    let purge = spawn_purge(&api, "acme");
    api.purge_waits("acme").await;

    all_writes_are_refused(&api, &things).await;
    assert_eq!(api.rows("acme").await, before, "also nothing in the outbox");
    let others = api.with_key(&api.new_key("globex", Role::Admin, Some("globex")).await);
    all_writes_succeed(&others, "globex").await;
    assert!(!purge.is_finished());

    writer.batch_execute("COMMIT").await.unwrap();
    let purged = purge.await.unwrap().is(200);
    assert_eq!(purged["deleted"]["workspaces"], 1);
    writes_go_on(&api).await;
}

async fn every_write_is_refused_while_a_purge_goes_on(api: Api) {
    let api = Arc::new(api);
    let things = fill(&api, "acme").await;
    let before = api.rows("acme").await;
    // In the way of a purge that has the gate, and of no writer.
    let in_the_way = api.client().await;
    let lock = "BEGIN; SELECT FROM leasehold.dead_letters WHERE tenant_id = 'acme' FOR UPDATE";
    in_the_way.batch_execute(lock).await.unwrap();
    let purge = spawn_purge(&api, "acme");
    api.purge_holds("acme").await;
    api.statements_wait(1).await;

    all_writes_are_refused(&api, &things).await;
    assert_eq!(api.rows("acme").await, before, "also nothing in the outbox");
    let others = api.with_key(&api.new_key("globex", Role::Admin, Some("globex")).await);
    all_writes_succeed(&others, "globex").await;
    assert!(!purge.is_finished());

    in_the_way.batch_execute("COMMIT").await.unwrap();
    assert_eq!(purge.await.unwrap().is(200)["deleted"]["dead_letters"], 1);
    writes_go_on(&api).await;
}

fn settings_with(mode: WorkspaceLockMode, wait: Duration) -> Settings {
    Settings {
        purge_wait: wait,
        ..settings(mode)
    }
}

/// After a purge of `acme` every kind of write succeeds there.
async fn writes_go_on(api: &Api) {
    assert_eq!(api.counts("acme").await, [0; TABLES.len()]);
    let acme = api.with_key(&api.new_key("acme", Role::Admin, Some("acme")).await);
    acme.post("/v1/tenants/acme/workspaces", json!({"name": "main"}))
        .await
        .is(201);
    all_writes_succeed(&acme, "acme").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_purge_leaves_nothing() {
    let api = Arc::new(waiting_for(Duration::from_secs(60)).await);
    fill(&api, "acme").await;
    let before = api.rows("acme").await;
    let writer = api.writer_in_flight("acme").await;
    let purge = spawn_purge(&api, "acme");
    api.purge_waits("acme").await;
    // As a server does with the request of a client that hangs up.
    purge.abort();
    purge.await.unwrap_err();
    crate::support::eventually("nobody waits for the gate", async || {
        api.waiting_purges("acme").await == 0
    })
    .await;
    assert_eq!(api.rows("acme").await, before);
    api.post("/v1/feedback-records", json!({"tenant_id": "acme", "value": 1}))
        .await
        .is(201);
    writer.batch_execute("COMMIT").await.unwrap();
    api.purge("acme").await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_purge_is_told_of_the_first() {
    let api = Arc::new(waiting_for(Duration::from_secs(60)).await);
    let writer = api.writer_in_flight("acme").await;
    let first = spawn_purge(&api, "acme");
    api.purge_waits("acme").await;
    let refused = api.purge("acme").await.problem(409, "tenant_write_conflict");
    assert_eq!(refused["reason"], "purge_in_progress");
    writer.batch_execute("COMMIT").await.unwrap();
    first.await.unwrap().is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_of_one_tenant_do_not_deadlock() {
    const ROUNDS: usize = 10;
    let api = Arc::new(waiting_for(Duration::from_secs(30)).await);
    for _ in 0..ROUNDS {
        Things::make(
            &api.with_key(&api.new_key("root", Role::Admin, None).await),
            "acme",
        )
        .await;
        let purges: Vec<_> = (0..4).map(|_| spawn_purge(&api, "acme")).collect();
        let mut done = 0;
        for purge in purges {
            let answer = purge.await.unwrap();
            if answer.status == 200 {
                done += 1;
            } else {
                let refused = answer.problem(409, "tenant_write_conflict");
                assert_eq!(refused["reason"], "purge_in_progress");
            }
        }
        assert!(done >= 1, "one of them is not refused");
        assert_eq!(api.counts("acme").await, [0; TABLES.len()]);
        api.post("/v1/tenants/acme/workspaces", json!({"name": "main"}))
            .await
            .is(201);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_is_sent_again_is_done_once() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    fill(&api, "acme").await;
    let purge = async || {
        let headers = [("idempotency-key", "purge-1")];
        api.send(
            axum::http::Method::DELETE,
            "/v1/tenants/acme/data",
            &headers,
            None,
        )
        .await
    };
    let first = purge().await;
    assert_eq!(first.header("idempotency-replayed"), None);
    let first = first.is(200);
    let record = json!({"tenant_id": "acme", "user_id": USER, "value": 1});
    api.post("/v1/feedback-records", record).await.is(201);
    let again = purge().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.is(200), first);
    let counts: Value = counted(&api.counts("acme").await);
    assert_eq!(counts["feedback_records"], 1, "what came after the first stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_admin_purges_and_only_a_tenant_of_its_own() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let before = api.rows("acme").await;
    for (role, tenant, status, code) in [
        (Role::Reader, None, 403, "forbidden"),
        (Role::Writer, Some("acme"), 403, "forbidden"),
        (Role::Admin, Some("globex"), 404, "not_found"),
    ] {
        let somebody = api.with_key(&api.new_key("somebody", role, tenant).await);
        somebody.purge("acme").await.problem(status, code);
    }
    api.purge("none").await.problem(404, "not_found");
    let after = api.rows("acme").await;
    for table in ["public.workspaces", "public.default_config", "leasehold.outbox"] {
        assert_eq!(after[table], before[table]);
    }
}

async fn a_workspace_that_comes_back_after_a_purge_has_higher_tokens(api: Api) {
    let write = async || {
        api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
            .await
            .is(200);
        let version = api.get(&format!("{MAIN}/versions/1")).await.is(200);
        version["fencing_token"].as_i64().unwrap()
    };
    let before = write().await;
    api.purge("acme").await.is(200);
    api.post("/v1/tenants/acme/workspaces", json!({"name": "main"}))
        .await
        .is(201);
    let after = write().await;
    assert!(after > before, "{after} {before}");
}

/// A lock is no write: the purge does not wait for whoever has one and has not begun to write.
async fn a_purge_takes_a_workspace_that_is_locked(api: Api) {
    if api.mode() == WorkspaceLockMode::Advisory {
        // There the lock is taken together with the gate.
        return;
    }
    let guard = api.hold("acme", "main").await;
    assert_eq!(api.purge("acme").await.is(200)["deleted"]["workspaces"], 1);
    api.get(MAIN).await.problem(404, "not_found");
    tokio::time::timeout(Duration::from_secs(30), guard.lost())
        .await
        .expect("the holder learns of it");
}
