//! The versions of a workspace are a history: no gap, no double, each one change after its predecessor.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use leasehold_system_tests::http::{Api, get};
use serde_json::{Map, Value};

use crate::world::{WORKSPACE, World, in_both_modes, put_key};

const CLIENTS: usize = 32;
const WRITES: i64 = 2000;

in_both_modes!(
    heavy_no_gap_and_no_double_with_one_process,
    heavy_no_gap_and_no_double_with_two_processes,
    release_before_response_on_one_connection,
    release_before_response_on_new_connections,
);

async fn heavy_no_gap_and_no_double_with_one_process(mode: &'static str) {
    let world = World::start(mode).await;
    write_all_at_once(&world, std::slice::from_ref(&world.api)).await;
}

async fn heavy_no_gap_and_no_double_with_two_processes(mode: &'static str) {
    let world = World::start(mode).await;
    let (_other, api) = world.another(|service| service).await;
    write_all_at_once(&world, &[world.api.clone(), api]).await;
}

/// What a client was told: which version its change of which key became.
type Told = BTreeMap<i64, (String, i64)>;

async fn write_all_at_once(world: &World, services: &[Api]) {
    let (tickets, told) = (Arc::new(AtomicI64::new(0)), Arc::new(Mutex::new(Told::new())));
    let clients: Vec<_> = services
        .iter()
        .cycle()
        .take(CLIENTS)
        .enumerate()
        .map(|(number, api)| {
            tokio::spawn(write_on(
                api.clone(),
                number,
                Arc::clone(&tickets),
                Arc::clone(&told),
            ))
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let told = std::mem::take(&mut *told.lock().unwrap());
    assert_eq!(
        told.len(),
        usize::try_from(WRITES).unwrap(),
        "each 200 named a version of its own"
    );
    check_history(world, &told).await;
}

/// One client: takes numbers until there are none left, and writes each until it is accepted.
async fn write_on(api: Api, client: usize, tickets: Arc<AtomicI64>, told: Arc<Mutex<Told>>) {
    let (key, mut connection) = (format!("key-{client}"), api.connect().await);
    loop {
        let value = tickets.fetch_add(1, Ordering::Relaxed);
        if value >= WRITES {
            return;
        }
        loop {
            // Half of them stand in line, the others come again and again.
            let write = put_key(&key, value);
            let write = if client.is_multiple_of(2) {
                write.header("prefer", "wait=5")
            } else {
                write
            };
            let answer = connection.send(write).await;
            match (answer.status, answer.code().as_str()) {
                (200, _) => {
                    let version = answer.json()["version"].as_i64().unwrap();
                    let before = told.lock().unwrap().insert(version, (key.clone(), value));
                    assert_eq!(before, None, "version {version} was given twice");
                    break;
                }
                // Not to wait for anything: the processors have more to do than to refuse.
                (409, "workspace_locked") => tokio::time::sleep(Duration::from_millis(100)).await,
                _ => panic!("{answer:?}"),
            }
        }
    }
}

async fn check_history(world: &World, told: &Told) {
    assert!(
        told.keys().copied().eq(1..=WRITES),
        "the versions that were told have a gap"
    );
    assert_eq!(world.version().await, WRITES);
    // All of it past the service, in one look.
    let sql = "SELECT version, fencing_token, snapshot FROM versions ORDER BY version";
    let rows = world.client.query(sql, &[]).await.unwrap();
    assert!(
        rows.iter().map(|row| row.get::<_, i64>(0)).eq(1..=WRITES),
        "the versions have a gap"
    );
    let (mut config, mut last_token) = (Map::new(), 0);
    for row in &rows {
        let (version, token): (i64, i64) = (row.get(0), row.get(1));
        let (key, value) = &told[&version];
        config.insert(key.clone(), Value::from(*value));
        assert!(
            token > last_token,
            "version {version}: token {token} after {last_token}"
        );
        last_token = token;
        let snapshot: Value = row.get(2);
        assert_eq!(
            snapshot["default_config"],
            Value::Object(config.clone()),
            "version {version}"
        );
    }
    // And what the service tells of it is the same.
    let mut connection = world.api.connect().await;
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = connection
            .send(get(format!("{WORKSPACE}/versions?limit=200{cursor}")))
            .await
            .expect(200)
            .json();
        seen.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|item| item["version"].as_i64().unwrap()),
        );
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert!(seen.into_iter().eq(1..=WRITES));
    for version in (1..=WRITES).step_by(97) {
        let told = connection
            .send(get(format!("{WORKSPACE}/versions/{version}")))
            .await
            .expect(200)
            .json();
        let row = &rows[usize::try_from(version).unwrap() - 1];
        assert_eq!(
            told["snapshot"]["default_config"],
            row.get::<_, Value>(2)["default_config"]
        );
        assert_eq!(told["fencing_token"].as_i64(), Some(row.get(1)));
    }
    let config = connection
        .send(get(format!("{WORKSPACE}/config")))
        .await
        .expect(200)
        .json();
    assert_eq!(
        config["values"],
        rows.last().unwrap().get::<_, Value>(2)["default_config"]
    );
}

/// A client that got its answer writes again at once: it never meets its own lock.
async fn release_before_response_on_one_connection(mode: &'static str) {
    let world = World::start(mode).await;
    let mut connection = world.api.connect().await;
    for version in 1..=500 {
        let answer = connection.send(put_key("key", version)).await.expect(200);
        assert_eq!(answer.json()["version"], version);
    }
}

async fn release_before_response_on_new_connections(mode: &'static str) {
    let world = World::start(mode).await;
    for version in 1..=500 {
        let answer = world.api.send(put_key("key", version)).await.expect(200);
        assert_eq!(answer.json()["version"], version);
    }
}
