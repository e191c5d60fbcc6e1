//! The database fails in the middle of a request: the client is told the truth, and the next request is served.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use leasehold_embedded::Cluster;
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{Answer, get};
use leasehold_system_tests::patience::{eventually, in_time, within};
use leasehold_system_tests::proxy::Fault;
use leasehold_system_tests::service::{Service, make_key};
use serde_json::Value;

use crate::disturbances::crash;
use crate::world::{WORKSPACE, World, in_both_modes, key_path, make_workspace, put_key};

in_both_modes!(
    a_fault_in_any_round_trip_of_a_put,
    a_commit_of_unknown_fate,
    a_database_that_is_away,
    heavy_a_history_across_crashes_of_the_database,
);

/// The round trips of a PUT before its COMMIT.
fn steps(mode: &str) -> Vec<&'static str> {
    let (lock, gate, fence) = match mode {
        "lease" => (
            "seen AS MATERIALIZED",
            Some("WITH ORDINALITY AS gates"),
            Some("mine AS MATERIALIZED"),
        ),
        _ => ("pg_try_advisory_xact_lock", None, None),
    };
    let write = [
        "FROM credentials",
        lock,
        "BEGIN",
        "INSERT INTO default_config",
        "INSERT INTO versions",
    ];
    write.into_iter().chain(gate).chain(fence).collect()
}

async fn written(world: &World, value: i64) -> bool {
    let sql = "SELECT count(*) FROM default_config WHERE key = 'key' AND value = to_jsonb($1::bigint)";
    world
        .client
        .query_one(sql, &[&value])
        .await
        .unwrap()
        .get::<_, i64>(0)
        == 1
}

/// A problem that says what is to be done: the same again, later.
fn assert_unavailable(answer: &Answer, what: &str) {
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "unavailable"),
        "{what}: {answer:?}"
    );
    assert_eq!(answer.json()["retryable"], true, "{what}");
    assert!(answer.headers.contains_key("retry-after"), "{what}");
}

async fn a_fault_in_any_round_trip_of_a_put(mode: &'static str) {
    let (world, proxy) = World::behind_a_proxy(mode).await;
    let mut value = 100;
    for fault in [Fault::LoseStatement, Fault::LoseAnswer, Fault::CutBehind] {
        for step in steps(mode).into_iter().chain(["COMMIT"]) {
            value += 1;
            let what = format!("{fault:?} of {step}");
            let before = world.version().await;
            let mut hit = match step {
                "COMMIT" => proxy.on_commit_of("INSERT INTO versions", fault),
                step => proxy.on(step, fault),
            };
            let answer = world.api.send(put_key("key", value)).await;
            hit.happened().await;
            match answer.status {
                200 => {
                    assert!(written(&world, value).await, "{what}");
                    assert_eq!(answer.json()["version"], before + 1, "{what}");
                }
                409 if fault == Fault::CutBehind && step == "seen AS MATERIALIZED" => {
                    assert_eq!(answer.code(), "workspace_locked", "{what}");
                }
                // Its lock went with its connection.
                409 if mode == "advisory" => assert_eq!(answer.code(), "lock_lost", "{what}"),
                _ => assert_unavailable(&answer, &what),
            }
            if answer.status != 200 {
                assert!(!written(&world, value).await, "{what}");
                assert_eq!(world.version().await, before, "{what}");
            }
            // Who is cut off behind it may leave the row locked until the server has seen that.
            if mode == "lease" && step == "seen AS MATERIALIZED" && fault != Fault::CutBehind {
                assert_eq!(answer.status, 200, "{what}: an acquire can be sent again");
            }
            if step == "COMMIT" && fault == Fault::LoseAnswer {
                assert_eq!(answer.status, 200, "{what}: its fate can be found out");
            }
            within(
                Duration::from_secs(10),
                &format!("the next write after {what}"),
                async || world.api.send(put_key("next", 1)).await.status == 200,
            )
            .await;
        }
    }
    world.nothing_is_held().await;
}

async fn a_commit_of_unknown_fate(mode: &'static str) {
    let (world, proxy) = World::behind_a_proxy(mode).await;
    let before = world.version().await;
    let mut hit = proxy.on_commit_of("INSERT INTO versions", Fault::LoseAnswerAndGoAway);
    let answer = world.api.send(put_key("key", 100)).await;
    hit.happened().await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (500, "outcome_unknown"),
        "{answer:?}"
    );
    let problem = answer.json();
    assert_eq!(problem["retryable"], false);
    assert!(problem["lock"]["lock_id"].is_string(), "{problem}");
    proxy.come_back();
    // It was committed, and that is seen as soon as the database is back.
    assert!(written(&world, 100).await);
    eventually("the service is back", async || {
        world.api.send(get(WORKSPACE)).await.status == 200
    })
    .await;
    assert_eq!(world.version().await, before + 1);
    eventually("the next write", async || {
        world.api.send(put_key("next", 1)).await.status == 200
    })
    .await;
    assert_eq!(world.version().await, before + 2);
    world.nothing_is_held().await;
}

async fn a_database_that_is_away(mode: &'static str) {
    let (world, proxy) = World::behind_a_proxy(mode).await;
    world.api.send(get("/readyz")).await.expect(200);
    proxy.go_away();
    assert_unavailable(&world.api.send(put_key("key", 100)).await, "a write");
    assert_unavailable(&world.api.send(get(key_path("key"))).await, "a read");
    eventually("it says that it is not ready", async || {
        world.api.send(get("/readyz")).await.status == 503
    })
    .await;
    world.api.send(get("/healthz")).await.expect(200);
    proxy.come_back();
    eventually("it says that it is ready", async || {
        world.api.send(get("/readyz")).await.status == 200
    })
    .await;
    within(Duration::from_secs(5), "a write", async || {
        world.api.send(put_key("key", 101)).await.status == 200
    })
    .await;
    assert!(!written(&world, 100).await);
}

/// Clients write all the time, the database crashes three times: what was told is what is there.
async fn heavy_a_history_across_crashes_of_the_database(mode: &'static str) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::temporary().start().unwrap())
        .await
        .unwrap();
    let database = TestDatabase::create_empty_on(&cluster.url("postgres")).await;
    let service = Service::on(&database).set("WORKSPACE_LOCK_MODE", mode);
    let service = service.set("WORKSPACE_LOCK_LEASE_MS", "1000").start().await;
    let making = database.clone();
    let key = tokio::task::spawn_blocking(move || make_key(&making, "tester", "admin", None))
        .await
        .unwrap();
    let api = service.api(&key);
    make_workspace(&api).await;

    let (next, stop) = (Arc::new(AtomicI64::new(1)), Arc::new(AtomicBool::new(false)));
    let told = Arc::new(Mutex::new(BTreeMap::new()));
    let denied = Arc::new(Mutex::new(BTreeSet::new()));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (api, next, stop) = (api.clone(), Arc::clone(&next), Arc::clone(&stop));
            let (told, denied) = (Arc::clone(&told), Arc::clone(&denied));
            tokio::spawn(async move {
                let mut connection = api.connect().await;
                while !stop.load(Ordering::Relaxed) {
                    let value = next.fetch_add(1, Ordering::Relaxed);
                    let answer = connection
                        .send(put_key("key", value).header("prefer", "wait=5"))
                        .await;
                    match (answer.status, answer.code().as_str()) {
                        (200, _) => {
                            let version = answer.json()["version"].as_i64().unwrap();
                            assert_eq!(
                                told.lock().unwrap().insert(version, value),
                                None,
                                "{version} twice"
                            );
                        }
                        // It may have been written, or not.
                        (500, "outcome_unknown") => {}
                        (503, "unavailable") | (409, "workspace_locked" | "lock_lost") => {
                            denied.lock().unwrap().insert(value);
                        }
                        _ => panic!("{answer:?}"),
                    }
                }
            })
        })
        .collect();
    let progress = async |bound| {
        let goal = told.lock().unwrap().len() + 40;
        within(bound, "writes go on", async || {
            assert!(
                !clients.iter().any(tokio::task::JoinHandle::is_finished),
                "a client gave up"
            );
            told.lock().unwrap().len() >= goal
        })
        .await;
    };
    progress(Duration::from_secs(20)).await;
    for _ in 0..3 {
        crash(&database).await;
        // What a crash leaves locked is free after one slice.
        progress(Duration::from_secs(8)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        in_time("a client", client).await.unwrap();
    }

    let sql = "SELECT version, snapshot FROM versions ORDER BY version";
    let rows = database.client().await.query(sql, &[]).await.unwrap();
    let history: BTreeMap<i64, i64> = rows
        .iter()
        .map(|row| {
            (
                row.get(0),
                row.get::<_, Value>(1)["default_config"]["key"].as_i64().unwrap(),
            )
        })
        .collect();
    assert!(
        history.keys().copied().eq(1..=i64::try_from(rows.len()).unwrap()),
        "no gap"
    );
    let values: BTreeSet<i64> = history.values().copied().collect();
    assert_eq!(values.len(), history.len(), "each write made one version");
    for (version, value) in &*told.lock().unwrap() {
        assert_eq!(
            history.get(version),
            Some(value),
            "version {version} was promised"
        );
    }
    let denied = denied.lock().unwrap();
    let wrongly: Vec<&i64> = values.intersection(&denied).collect();
    assert!(wrongly.is_empty(), "{wrongly:?} were written, and denied");
}
