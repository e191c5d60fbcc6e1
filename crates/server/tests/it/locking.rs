//! Who gets the workspace, what the others are told, and what is left behind: nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::waiters::Limits;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::in_both_modes;
use crate::support::{Answer, Api, MAIN, eventually, settings, workspace_writes};

in_both_modes!(
    the_order_of_answers_while_locked,
    every_write_is_refused_and_told_the_holder,
    versions_have_no_gap_and_no_double,
    one_client_never_meets_its_own_lock,
    whoever_waits_gets_it,
    too_many_waiters_are_sent_away,
    a_lock_can_be_taken_away,
    a_refused_write_leaves_nothing_behind,
    a_write_whose_lock_was_taken_away_writes_nothing,
    a_client_that_goes_away_leaves_nothing_behind,
);

async fn the_order_of_answers_while_locked(api: Api) {
    let guard = api.hold("acme", "main").await;
    let color = format!("{MAIN}/default-config/color");
    let stranger = api.with_key("lh_unknown");
    let reader = api.with_key(&api.new_key("r", Role::Reader, None).await);
    let other = api.with_key(&api.new_key("o", Role::Writer, Some("globex")).await);

    let put = async |api: &Api, path: &str, body: &str| {
        api.send(Method::PUT, path, &[], Some(body.to_owned())).await
    };
    // Each of these is wrong in every later way as well.
    put(&stranger, &color, "{").await.problem(401, "unauthenticated");
    put(&reader, "/v1/tenants/none/workspaces/main/default-config/a", "{")
        .await
        .problem(403, "forbidden");
    put(&api, "/v1/tenants/none/workspaces/main/default-config/%20", "{")
        .await
        .problem(404, "not_found");
    put(&other, &color, "{").await.problem(404, "not_found");
    put(&api, "/v1/tenants/acme/workspaces/none/default-config/%20", "{")
        .await
        .problem(400, "invalid_request");
    put(&api, "/v1/tenants/acme/workspaces/none/default-config/a", "{")
        .await
        .problem(400, "invalid_request");
    put(&api, "/v1/tenants/acme/workspaces/none/default-config/a", "{}")
        .await
        .problem(422, "invalid_request");
    let valid = json!({"value": 1}).to_string();
    put(&api, "/v1/tenants/acme/workspaces/none/default-config/a", &valid)
        .await
        .problem(404, "not_found");
    put(&api, &color, "{").await.problem(400, "invalid_request");
    put(&api, &color, "{}").await.problem(422, "invalid_request");
    let stale = [("if-match", "\"9\"")];
    api.send(Method::PUT, &color, &stale, Some(valid.clone()))
        .await
        .problem(409, "workspace_locked");
    api.delete(&format!("{MAIN}/default-config/missing"))
        .await
        .problem(409, "workspace_locked");

    // What reads is never locked.
    api.post(&format!("{MAIN}/resolve"), json!({"context": {}}))
        .await
        .is(200);
    for read in [
        "",
        "/default-config",
        "/contexts",
        "/config",
        "/versions",
        "/lock",
    ] {
        api.get(&format!("{MAIN}{read}")).await.is(200);
    }
    // Neither is another workspace.
    put(
        &other,
        "/v1/tenants/globex/workspaces/main/default-config/a",
        &valid,
    )
    .await
    .is(200);

    api.release(guard).await;
    api.send(Method::PUT, &color, &stale, Some(valid.clone()))
        .await
        .problem(412, "version_mismatch");
    put(&api, &color, &valid).await.is(200);
}

async fn every_write_is_refused_and_told_the_holder(api: Api) {
    api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
        .await
        .is(200);
    let guard = api.hold("acme", "main").await;
    let is_holder = |lock: &Value| {
        assert_eq!(lock["lock_id"], guard.lock_id().to_string(), "{lock:#}");
        assert_eq!(
            (&lock["locked_by"], &lock["operation"]),
            (&json!("mallory"), &json!("PUT /elsewhere"))
        );
        assert!(lock["acquired_at"].as_str().unwrap().ends_with('Z'));
        let is_lease = api.mode() == WorkspaceLockMode::Lease;
        assert_eq!(
            (lock["expires_at"].is_string(), lock["fencing_token"].is_i64()),
            (is_lease, is_lease),
            "{lock:#}"
        );
    };
    for (method, path, body) in workspace_writes() {
        let answer = api
            .send(method.clone(), &path, &[], body.map(|body| body.to_string()))
            .await;
        let problem = answer.problem(409, "workspace_locked");
        assert_eq!(
            (&problem["retryable"], &problem["instance"]),
            (&json!(true), &json!(path)),
            "{method} {path}"
        );
        is_holder(&problem["lock"]);
    }
    is_holder(&api.get(MAIN).await.is(200)["workspace_lock"]);
    is_holder(&api.get(&format!("{MAIN}/lock")).await.is(200));

    api.release(guard).await;
    assert_eq!(api.get(MAIN).await.is(200).get("workspace_lock"), None);
    api.get(&format!("{MAIN}/lock")).await.problem(404, "not_found");
    assert_eq!(api.get(MAIN).await.is(200)["version"], 1, "nothing was written");
}

async fn versions_have_no_gap_and_no_double(api: Api) {
    const CLIENTS: usize = 8;
    const WRITES: usize = 15;
    let api = Arc::new(api);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let api = api.clone();
            tokio::spawn(async move {
                let mut versions = Vec::new();
                while versions.len() < WRITES {
                    let path = format!("{MAIN}/default-config/c{client}");
                    let answer = api.put(&path, json!({"value": versions.len()})).await;
                    match answer.status {
                        200 => versions.push(answer.body["version"].as_i64().unwrap()),
                        409 => {
                            let problem = answer.problem(409, "workspace_locked");
                            assert!(problem["retry_after_ms"].as_u64().unwrap() > 0);
                        }
                        other => panic!("{other}: {:#}", answer.body),
                    }
                }
                versions
            })
        })
        .collect();
    let mut versions = Vec::new();
    for client in clients {
        versions.extend(client.await.unwrap());
    }
    versions.sort_unstable();
    let all = i64::try_from(CLIENTS * WRITES).unwrap();
    assert_eq!(versions, (1..=all).collect::<Vec<_>>());
    // Each is its predecessor and one change.
    let mut before = json!({});
    for n in 1..=all {
        let after =
            api.get(&format!("{MAIN}/versions/{n}")).await.is(200)["snapshot"]["default_config"].clone();
        let changed = after
            .as_object()
            .unwrap()
            .iter()
            .filter(|(key, value)| before.get(key) != Some(value))
            .count();
        assert_eq!(changed, 1, "version {n}: {before} -> {after}");
        before = after;
    }
}

async fn one_client_never_meets_its_own_lock(api: Api) {
    for n in 1..=200 {
        let put = api
            .put(&format!("{MAIN}/default-config/a"), json!({"value": n}))
            .await
            .is(200);
        assert_eq!(put["version"], n);
        let refused = api.delete(&format!("{MAIN}/default-config/missing")).await;
        refused.problem(404, "not_found");
    }
}

async fn whoever_waits_gets_it(api: Api) {
    let guard = api.hold("acme", "main").await;
    let put = async |prefer: &str| {
        let path = format!("{MAIN}/default-config/a");
        api.send(
            Method::PUT,
            &path,
            &[("prefer", prefer)],
            Some(json!({"value": 1}).to_string()),
        )
        .await
    };
    let late = put("wait=0").await;
    assert_eq!(late.header("preference-applied"), Some("wait=0"));
    late.problem(409, "workspace_locked");

    let (waited, ()) = tokio::join!(put("respond-async, wait=600"), async {
        // Long enough that it looks at least once.
        tokio::time::sleep(Duration::from_millis(100)).await;
        api.release(guard).await;
    });
    assert_eq!(
        waited.header("preference-applied"),
        Some("wait=30"),
        "clamped to what the service allows"
    );
    assert_eq!(waited.is(200)["version"], 1);
}

async fn too_many_waiters_are_sent_away(api: Api) {
    let limits = Limits {
        total: 2,
        per_tenant: 1,
    };
    let few = Api::start_with(leasehold_server::Settings {
        waiters: limits,
        ..settings(api.mode())
    })
    .await;
    let guard = few.hold("acme", "main").await;
    let path = format!("{MAIN}/default-config/a");
    let put = async || {
        let body = Some(json!({"value": 1}).to_string());
        few.send(Method::PUT, &path, &[("prefer", "wait=20")], body).await
    };
    let first = async {
        loop {
            // One of those who look whether it waits may have its place.
            let answer = put().await;
            if answer.status != 503 {
                break answer;
            }
        }
    };
    let (first, ()) = tokio::join!(first, async {
        eventually("the second is sent away", async || {
            // Until the first one waits, there is room; then the wait is refused at once.
            let short = few.send(
                Method::PUT,
                &path,
                &[("prefer", "wait=0")],
                Some(json!({"value": 1}).to_string()),
            );
            short.await.status == 503
        })
        .await;
        put().await.problem(503, "unavailable");
        few.put(&path, json!({"value": 1}))
            .await
            .problem(409, "workspace_locked");
        few.release(guard).await;
    });
    first.is(200);
}

async fn a_lock_can_be_taken_away(api: Api) {
    let lock = format!("{MAIN}/lock");
    api.delete(&format!("{lock}?reason=nobody"))
        .await
        .problem(404, "not_found");
    let guard = api.hold("acme", "main").await;
    api.delete(&lock).await.problem(400, "invalid_request");
    api.delete(&format!("{lock}?reason="))
        .await
        .problem(422, "invalid_request");
    api.delete(&format!("{lock}?reason={}", "x".repeat(257)))
        .await
        .problem(422, "invalid_request");
    let writer = api.with_key(&api.new_key("w", Role::Writer, Some("acme")).await);
    writer
        .delete(&format!("{lock}?reason=mine"))
        .await
        .problem(403, "forbidden");
    let foreign = api.with_key(&api.new_key("f", Role::Admin, Some("globex")).await);
    foreign
        .delete(&format!("{lock}?reason=mine"))
        .await
        .problem(404, "not_found");

    let ended = api
        .delete(&format!("{lock}?reason=the+holder+is+on+holiday"))
        .await
        .is(200);
    assert_eq!(
        (&ended["locked_by"], &ended["lock_id"]),
        (&json!("mallory"), &json!(guard.lock_id().to_string()))
    );
    tokio::time::timeout(Duration::from_secs(10), guard.lost())
        .await
        .expect("the holder learns of it");
    // The session of a transaction's lock ends a moment after it was told to.
    let path = format!("{MAIN}/default-config/a");
    eventually("the workspace is free", async || {
        let answer = api.put(&path, json!({"value": 1})).await;
        assert!([200, 409].contains(&answer.status), "{:#}", answer.body);
        answer.status == 200
    })
    .await;

    let audit = "SELECT released_by, reason, locked_by FROM leasehold.lock_audit";
    let row = api.client().await.query_one(audit, &[]).await.unwrap();
    let told: [String; 3] = [row.get(0), row.get(1), row.get(2)];
    assert_eq!(told, ["root", "the holder is on holiday", "mallory"]);
    if api.mode() == WorkspaceLockMode::Lease {
        let version = api.get(&format!("{MAIN}/versions/1")).await.is(200);
        let old = ended["fencing_token"].as_i64().unwrap();
        assert!(
            version["fencing_token"].as_i64().unwrap() > old,
            "the token was raised"
        );
    }
    drop(guard);
}

async fn a_refused_write_leaves_nothing_behind(api: Api) {
    let color = format!("{MAIN}/default-config/color");
    let bad = [
        (Method::PUT, color.as_str(), Some("{")),
        (Method::PUT, &color, Some("{}")),
        (Method::DELETE, &color, None),
    ];
    for (method, path, body) in bad {
        let answer = api.send(method, path, &[], body.map(str::to_owned)).await;
        assert!((400..=422).contains(&answer.status));
        api.get(&format!("{MAIN}/lock")).await.problem(404, "not_found");
    }
    let held = "SELECT count(*) FROM workspaces WHERE workspace_lock_id IS NOT NULL";
    let advisory = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let client = api.client().await;
    for count in [held, advisory] {
        assert_eq!(
            client.query_one(count, &[]).await.unwrap().get::<_, i64>(0),
            0,
            "{count}"
        );
    }
    api.put(&color, json!({"value": 1})).await.is(200);
}

/// A write that has its lock and cannot go on, because somebody else has the table that it writes to.
pub(crate) struct Stuck {
    write: tokio::task::JoinHandle<Answer>,
    in_the_way: Client,
}

impl Stuck {
    async fn start(api: &Arc<Api>) -> Self {
        Self::start_with(api, &[]).await
    }

    pub(crate) async fn start_with(api: &Arc<Api>, headers: &'static [(&str, &str)]) -> Self {
        let in_the_way = api.client().await;
        in_the_way
            .batch_execute("BEGIN; LOCK TABLE default_config IN EXCLUSIVE MODE")
            .await
            .unwrap();
        let writer = api.clone();
        let write = tokio::spawn(async move {
            let (path, body) = (
                format!("{MAIN}/default-config/a"),
                json!({"value": 1}).to_string(),
            );
            writer.send(Method::PUT, &path, headers, Some(body)).await
        });
        let waits =
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'default_config'::regclass
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        eventually("the write is stuck", async || {
            in_the_way.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        assert_eq!(api.get(MAIN).await.is(200)["workspace_lock"]["locked_by"], "root");
        Self { write, in_the_way }
    }

    pub(crate) async fn let_go(self) -> Answer {
        self.in_the_way.batch_execute("COMMIT").await.unwrap();
        self.write.await.unwrap()
    }
}

async fn a_write_whose_lock_was_taken_away_writes_nothing(api: Api) {
    let api = Arc::new(api);
    let stuck = Stuck::start(&api).await;
    api.delete(&format!("{MAIN}/lock?reason=it+is+stuck"))
        .await
        .is(200);
    let problem = stuck.let_go().await.problem(409, "lock_lost");
    assert_eq!(problem["retryable"], true);
    let nothing_written = async || {
        assert_eq!(api.get(MAIN).await.is(200)["version"], 0);
        api.get(&format!("{MAIN}/default-config/a"))
            .await
            .problem(404, "not_found");
    };
    nothing_written().await;

    if api.mode() == WorkspaceLockMode::Lease {
        let stuck = Stuck::start(&api).await;
        let expire = "UPDATE workspaces SET workspace_lock_acquired_at = now() - interval '2 s',
                             workspace_lock_expires_at = now() - interval '1 s'
                      WHERE workspace_lock_id IS NOT NULL";
        assert_eq!(api.client().await.execute(expire, &[]).await.unwrap(), 1);
        stuck.let_go().await.problem(409, "lock_lost");
        nothing_written().await;
    }
    api.put(&format!("{MAIN}/default-config/a"), json!({"value": 2}))
        .await
        .is(200);
}

async fn a_client_that_goes_away_leaves_nothing_behind(api: Api) {
    let api = Arc::new(api);
    let stuck = Stuck::start(&api).await;
    // As a server does with the request of a client that hangs up.
    stuck.write.abort();
    stuck.write.await.unwrap_err();
    eventually("nobody holds the workspace", async || {
        api.get(&format!("{MAIN}/lock")).await.status == 404
    })
    .await;
    stuck.in_the_way.batch_execute("COMMIT").await.unwrap();
    assert_eq!(
        api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
            .await
            .is(200)["version"],
        1
    );
}
