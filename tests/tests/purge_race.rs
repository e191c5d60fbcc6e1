//! Purges among writers: what was accepted before a purge had the tenant to itself is gone after it, whatever else went
//! on. And nobody notices a purge that there is not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{Answer, Api, Call, Connection, delete, post, put};
use leasehold_system_tests::patience::eventually;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::world::World;

const TENANTS: [&str; 3] = ["race-a", "race-b", "race-c"];
const WRITERS: usize = 24;
const TIMEOUT: Duration = Duration::from_secs(2);
/// What a request may take besides waiting: the processors are more than busy.
const SLACK: Duration = Duration::from_secs(20);

/// What came of all the writes and purges of a run, by table.
#[derive(Default)]
struct Ledger {
    /// Rows that a client was told it had made, less those that it was told it had deleted.
    accepted: Mutex<BTreeMap<&'static str, i64>>,
    /// Rows that purges said they had deleted.
    purged: Mutex<BTreeMap<String, i64>>,
    writes: AtomicU64,
    refused_at_the_gate: AtomicU64,
}

impl Ledger {
    fn accept(&self, table: &'static str, rows: i64) {
        *self.accepted.lock().unwrap().entry(table).or_default() += rows;
    }

    /// Counts an answer, and says whether the write was accepted. Only what the race explains is no fault.
    fn note(&self, what: &str, answer: &Answer) -> bool {
        let code = answer.code();
        match (answer.status, code.as_str()) {
            (200 | 201 | 204, _) => {
                self.writes.fetch_add(1, Ordering::Relaxed);
                true
            }
            (409, "tenant_write_conflict") => {
                assert_eq!(answer.json()["reason"], "purge_in_progress", "{what}");
                self.refused_at_the_gate.fetch_add(1, Ordering::Relaxed);
                false
            }
            // Another writer, or a purge, was faster.
            (404, "not_found") | (409, "workspace_locked" | "already_exists" | "modified_concurrently") => {
                false
            }
            _ => panic!("{what}: {answer:?}"),
        }
    }
}

/// One writer, of every kind of write.
struct Writer {
    connection: Connection,
    ledger: Arc<Ledger>,
    number: usize,
    step: usize,
    records: Vec<String>,
    webhooks: Vec<String>,
}

impl Writer {
    async fn send(&mut self, what: &'static str, call: Call) -> Option<Answer> {
        let answer = self.connection.send(call).await;
        self.ledger.note(what, &answer).then_some(answer)
    }

    async fn step(&mut self) {
        self.step += 1;
        let (number, step) = (self.number, self.step);
        let tenant = TENANTS[(number + step) % TENANTS.len()];
        // Shared by few, so that most of them meet purges rather than each other.
        let workspace = format!("/v1/tenants/{tenant}/workspaces/w{}", number % 12);
        let ledger = Arc::clone(&self.ledger);
        match step % 11 {
            0 | 5 => {
                let new = json!({"tenant_id": tenant, "user_id": format!("user-{number}"), "value": step});
                if let Some(made) = self
                    .send("create a record", post("/v1/feedback-records", &new))
                    .await
                {
                    ledger.accept("feedback_records", 1);
                    self.records.push(id_of(&made));
                }
            }
            1 => {
                let new = json!({"name": format!("w{}", number % 12)});
                let path = format!("/v1/tenants/{tenant}/workspaces");
                if self.send("create a workspace", post(path, &new)).await.is_some() {
                    ledger.accept("workspaces", 1);
                }
            }
            2 | 8 => {
                let path = format!("{workspace}/default-config/key-{number}");
                if self
                    .send("put a key", put(path, &json!({"value": step})))
                    .await
                    .is_some()
                {
                    ledger.accept("versions", 1);
                }
            }
            3 => {
                let change = json!({"description": format!("step {step}")});
                self.send("patch a workspace", patch(workspace, &change)).await;
            }
            4 => {
                if let Some(id) = self.records.last() {
                    let path = format!("/v1/feedback-records/{id}");
                    self.send("patch a record", patch(path, &json!({"value": "changed"})))
                        .await;
                }
            }
            6 => {
                let new = json!({"tenant_id": tenant, "url": "https://hooks.example/race"});
                if let Some(made) = self.send("create a webhook", post("/v1/webhooks", &new)).await {
                    ledger.accept("webhooks", 1);
                    self.webhooks.push(id_of(&made));
                }
            }
            7 => {
                let new = json!({"condition": {"n": step}, "overrides": {}});
                if self
                    .send("create a context", post(format!("{workspace}/contexts"), &new))
                    .await
                    .is_some()
                {
                    ledger.accept("contexts", 1);
                    ledger.accept("versions", 1);
                }
            }
            9 => {
                // Moved to another tenant, or deleted.
                if step % 2 == 0 {
                    if let Some(id) = self.webhooks.last() {
                        let path = format!("/v1/webhooks/{id}");
                        self.send("move a webhook", patch(path, &json!({"tenant_id": tenant})))
                            .await;
                    }
                } else if let Some(id) = self.webhooks.pop()
                    && self
                        .send("delete a webhook", delete(format!("/v1/webhooks/{id}")))
                        .await
                        .is_some()
                {
                    ledger.accept("webhooks", -1);
                }
            }
            _ => {
                if step % 3 == 0 {
                    let path = format!("/v1/feedback-records?user_id=user-{number}");
                    if let Some(erased) = self.send("erase a user", delete(path)).await {
                        ledger.accept("feedback_records", -erased.json()["deleted"].as_i64().unwrap());
                    }
                } else if let Some(id) = self.records.pop()
                    && self
                        .send("delete a record", delete(format!("/v1/feedback-records/{id}")))
                        .await
                        .is_some()
                {
                    ledger.accept("feedback_records", -1);
                }
            }
        }
    }
}

fn patch(path: impl Into<String>, body: &Value) -> Call {
    Call::new("PATCH".parse().unwrap(), path).json(body)
}

fn id_of(made: &Answer) -> String {
    made.json()["id"].as_str().unwrap().to_owned()
}

/// What there was to see of purges.
#[derive(Debug, Default)]
struct Seen {
    done: u64,
    given_up: u64,
    /// Rows that were older than the purge which they had survived.
    survivors: Vec<String>,
}

/// Rows of a tenant that were there before a moment. A webhook counts from its move on.
const OLDER: &str = "
    SELECT 'feedback record ' || id AS row FROM feedback_records WHERE tenant_id = $1 AND created_at < $2
    UNION ALL SELECT 'webhook ' || id FROM webhooks WHERE tenant_id = $1 AND updated_at < $2
    UNION ALL SELECT 'workspace ' || name FROM workspaces WHERE tenant_id = $1 AND created_at < $2
    UNION ALL SELECT 'version ' || version FROM versions WHERE tenant_id = $1 AND created_at < $2";

/// Purges a tenant again and again, until it is told to stop or a row has survived.
async fn purge(
    database: TestDatabase,
    api: Api,
    tenant: &str,
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
) -> Seen {
    let client = database.client().await;
    let mut connection = api.connect().await;
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) && seen.survivors.is_empty() {
        let before: SystemTime = client
            .query_one("SELECT clock_timestamp()", &[])
            .await
            .unwrap()
            .get(0);
        let start = Instant::now();
        let answer = connection
            .send(delete(format!("/v1/tenants/{tenant}/data")))
            .await;
        assert!(
            start.elapsed() < TIMEOUT + SLACK,
            "{:?}: {answer:?}",
            start.elapsed()
        );
        if answer.status == 409 {
            assert_eq!(answer.code(), "tenant_write_conflict");
            seen.given_up += 1;
            continue;
        }
        let told = answer.expect(200).json();
        let waited = Duration::from_millis(told["waited_ms"].as_u64().unwrap());
        assert!(waited <= TIMEOUT + SLACK, "{waited:?}");
        seen.done += 1;
        for (table, rows) in told["deleted"].as_object().unwrap() {
            *ledger.purged.lock().unwrap().entry(table.clone()).or_default() += rows.as_i64().unwrap();
        }
        // The writers get their turn: a purge of nothing would show nothing. And what was on its way gets its time
        // to appear.
        tokio::time::sleep(Duration::from_millis(150)).await;
        // The purge had the tenant to itself no sooner than this.
        let alone = before + waited;
        let older = client.query(OLDER, &[&tenant, &alone]).await.unwrap();
        seen.survivors = older
            .iter()
            .map(|row| format!("{tenant}: {}", row.get::<_, String>(0)))
            .collect();
    }
    seen
}

async fn race_world() -> (World, [Api; 2], leasehold_system_tests::service::Service) {
    let timeout = TIMEOUT.as_secs().to_string();
    let world = World::start_with("lease", |service| {
        service.set("TENANT_PURGE_LOCK_TIMEOUT_SECONDS", &timeout)
    })
    .await;
    let (other, api) = world
        .another(|service| service.set("TENANT_PURGE_LOCK_TIMEOUT_SECONDS", &timeout))
        .await;
    for tenant in TENANTS {
        world
            .api
            .send(post("/v1/tenants", &json!({"id": tenant})))
            .await
            .expect(201);
    }
    let services = [world.api.clone(), api];
    (world, services, other)
}

/// Starts the writers; each ends when it is told to.
async fn start_writers(services: &[Api], ledger: &Arc<Ledger>, stop: &Arc<AtomicBool>) -> JoinSet<()> {
    let mut writers = JoinSet::new();
    for (number, api) in services.iter().cycle().take(WRITERS).enumerate() {
        let mut writer = Writer {
            connection: api.connect().await,
            ledger: Arc::clone(ledger),
            number,
            step: number,
            records: Vec::new(),
            webhooks: Vec::new(),
        };
        let stop = Arc::clone(stop);
        writers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                writer.step().await;
            }
        });
    }
    writers
}

async fn ended(mut tasks: JoinSet<()>) {
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_no_write_that_overlapped_a_purge_survives_it() {
    let (world, services, _other) = race_world().await;
    let (ledger, stop) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
    let writers = start_writers(&services, &ledger, &stop).await;
    let mut purges = JoinSet::new();
    for (tenant, api) in TENANTS.into_iter().zip(services.iter().cycle()) {
        let (ledger, stop) = (Arc::clone(&ledger), Arc::clone(&stop));
        purges.spawn(purge(world.database.clone(), api.clone(), tenant, ledger, stop));
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    eventually("enough has happened to show something", async || {
        ledger.writes.load(Ordering::Relaxed) >= 500 && ledger.refused_at_the_gate.load(Ordering::Relaxed) > 0
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    ended(writers).await;
    let mut purged = 0;
    while let Some(seen) = purges.join_next().await {
        let seen = seen.unwrap();
        assert!(seen.survivors.is_empty(), "{seen:?}");
        assert!(seen.done > 0, "a purge never got its turn: {seen:?}");
        purged += seen.done;
    }
    assert!(purged >= 5, "{purged} purges are too few to show anything");
    // What was accepted was purged, or is still there.
    let accepted = ledger.accepted.lock().unwrap().clone();
    for (table, accepted) in accepted {
        let left = format!("SELECT count(*) FROM {table} WHERE tenant_id LIKE 'race-%'");
        let left: i64 = world.client.query_one(&left, &[]).await.unwrap().get(0);
        let purged = ledger
            .purged
            .lock()
            .unwrap()
            .get(table)
            .copied()
            .unwrap_or_default();
        assert_eq!(
            accepted,
            purged + left,
            "{table}: {purged} purged and {left} left"
        );
    }
}

/// The same look at the same purges finds the rows of writers that pass the gate by.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_skips_the_gate_is_found() {
    let (world, services, _other) = race_world().await;
    let (ledger, stop) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
    let mut rogues = JoinSet::new();
    for tenant in TENANTS {
        let (client, stop) = (world.database.client().await, Arc::clone(&stop));
        rogues.spawn(async move {
            // Not even the database's own guard stops it.
            client
                .batch_execute("SET session_replication_role = replica")
                .await
                .unwrap();
            let insert =
                "INSERT INTO feedback_records (id, tenant_id, value) VALUES (gen_random_uuid(), $1, '1')";
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute("BEGIN").await.unwrap();
                client.execute(insert, &[&tenant]).await.unwrap();
                // A purge comes and goes meanwhile.
                tokio::time::sleep(Duration::from_millis(300)).await;
                client.batch_execute("COMMIT").await.unwrap();
            }
        });
    }
    let looks = TENANTS.map(|tenant| {
        let (database, api) = (world.database.clone(), services[0].clone());
        purge(database, api, tenant, Arc::clone(&ledger), Arc::clone(&stop))
    });
    let survivors = tokio::select! {
        seen = futures_util::future::select_all(looks.map(Box::pin)) => seen.0.survivors,
        () = tokio::time::sleep(Duration::from_secs(30)) => Vec::new(),
    };
    stop.store(true, Ordering::Relaxed);
    ended(rogues).await;
    assert!(!survivors.is_empty(), "a gate that is passed by was not noticed");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_purge_nobody_is_refused() {
    let (_world, services, _other) = race_world().await;
    let (ledger, stop) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
    let writers = start_writers(&services, &ledger, &stop).await;
    eventually("there were writes enough to show something", async || {
        ledger.writes.load(Ordering::Relaxed) >= 300
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    ended(writers).await;
    let writes = ledger.writes.load(Ordering::Relaxed);
    assert_eq!(
        ledger.refused_at_the_gate.load(Ordering::Relaxed),
        0,
        "of {writes} writes"
    );
}
