//! What a running service counts, and what it never does: names that somebody chose.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use leasehold_domain::DistributedLock;
use leasehold_storage::Database;
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{Api, delete, get, post};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::proxy::Fault;
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::json;
use tokio::task::JoinSet;

use crate::bench::named;
use crate::world::{World, put_key};

/// Every sample by its series, as one scrape has them.
struct Scrape(BTreeMap<String, f64>);

async fn scrape(api: &Api) -> Scrape {
    let stranger = Api {
        key: None,
        ..api.clone()
    };
    let answer = stranger.send(get("/metrics")).await.expect(200);
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let samples = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        (series.to_owned(), value.parse().unwrap())
    };
    Scrape(samples.map(sample).collect())
}

impl Scrape {
    /// The sum of all series of a metric that have all these labels.
    fn of(&self, name: &str, labels: &[&str]) -> f64 {
        let has = |series: &str| {
            let (metric, rest) = series.split_once('{').unwrap_or((series, ""));
            metric == name && labels.iter().all(|label| rest.contains(label))
        };
        let found = self.0.iter().filter(|(series, _)| has(series));
        found.map(|(_, value)| value).sum()
    }

    fn names(&self) -> BTreeSet<String> {
        let name = |series: &String| {
            let name = series.split('{').next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"]
                .into_iter()
                .find_map(|suffix| name.strip_suffix(suffix));
            of_histogram.unwrap_or(name).to_owned()
        };
        self.0.keys().map(name).collect()
    }
}

/// How often an attempt of a lease has ended so.
fn attempts(scrape: &Scrape, outcome: &str) -> f64 {
    scrape.of(
        "leasehold_lock_acquire_total",
        &[r#"backend="lease""#, &format!(r#"outcome="{outcome}""#)],
    )
}

/// Waits until a metric has come to a value.
async fn comes_to(api: &Api, name: &str, labels: &[&str], right: impl Fn(f64) -> bool) {
    eventually(&format!("{name} {labels:?} is right"), async || {
        right(scrape(api).await.of(name, labels))
    })
    .await;
}

const LEASE: &[&str] = &[r#"backend="lease""#];
const SESSION: &[&str] = &[r#"backend="session""#];

#[tokio::test(flavor = "multi_thread")]
async fn attempts_waits_and_holds_are_counted() {
    let world = World::start_with("lease", |service| service.set("WORKSPACE_LOCK_LEASE_MS", "3000")).await;
    let api = &world.api;
    let before = scrape(api).await;
    let since = |now: &Scrape, name: &str| now.of(name, LEASE) - before.of(name, LEASE);
    for value in 0..3 {
        api.send(put_key("key", value)).await.expect(200);
    }
    let now = scrape(api).await;
    assert_eq!(attempts(&now, "acquired") - attempts(&before, "acquired"), 3.0);
    assert_eq!(since(&now, "leasehold_lock_wait_seconds_count"), 3.0);
    assert_eq!(since(&now, "leasehold_lock_hold_seconds_count"), 3.0);
    assert!(since(&now, "leasehold_lock_hold_seconds_sum") > 0.0);

    let holding = world.hold().await;
    comes_to(api, "leasehold_lock_held", LEASE, |held| held == 1.0).await;
    api.send(put_key("key", 4)).await.expect(409);
    assert_eq!(attempts(&scrape(api).await, "contended"), 1.0);

    let waiter = {
        let (api, write) = (api.clone(), put_key("key", 5).header("prefer", "wait=1"));
        tokio::spawn(async move { api.send(write).await })
    };
    comes_to(api, "leasehold_lock_waiting", LEASE, |waiting| waiting == 1.0).await;
    in_time("the waiter", waiter).await.unwrap().expect(409);
    let now = scrape(api).await;
    assert_eq!(now.of("leasehold_lock_waiting", LEASE), 0.0);
    assert_eq!(attempts(&now, "timed_out"), 1.0);
    assert!(since(&now, "leasehold_lock_wait_seconds_sum") >= 1.0);

    // By now the holder has renewed its lease.
    comes_to(api, "leasehold_heartbeat_late_seconds_count", &[], |beats| {
        beats > 0.0
    })
    .await;
    assert_eq!(scrape(api).await.of("leasehold_lock_lost_total", LEASE), 0.0);
    world.expire().await;
    comes_to(api, "leasehold_lock_lost_total", LEASE, |lost| lost == 1.0).await;
    holding.go_on().await.expect(409);
    let now = scrape(api).await;
    assert_eq!(now.of("leasehold_fence_refused_total", &[]), 1.0);
    assert_eq!(now.of("leasehold_lock_held", LEASE), 0.0);

    // The client of a holder goes away, and with it the connection that was in the middle of something.
    let tainted = "leasehold_tainted_connections_closed_total";
    let clean = now.of(tainted, &[]);
    let _row_stays_locked = world.hold().await.hang_up().await;
    comes_to(api, tainted, &[], |closed| closed == clean + 1.0).await;
    let hung_up = [r#"method="PUT""#, r#"status="hung_up""#];
    comes_to(api, "leasehold_http_requests_total", &hung_up, |hung_up| {
        hung_up == 1.0
    })
    .await;
    comes_to(api, "leasehold_lock_held", LEASE, |held| held == 0.0).await;

    // The lock that says that this instance lives is one of a session.
    assert_eq!(scrape(api).await.of("leasehold_lock_held", SESSION), 1.0);
    let end = "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND l.mode = 'ShareLock' AND a.xact_start IS NULL
                 AND a.datname = current_database()";
    assert_eq!(world.client.query(end, &[]).await.unwrap().len(), 1);
    comes_to(api, "leasehold_lock_lost_total", SESSION, |lost| lost == 1.0).await;
    comes_to(api, "leasehold_lock_held", SESSION, |held| held == 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_locks_are_counted() {
    let world = World::start("advisory").await;
    let api = &world.api;
    let transaction = &[r#"backend="transaction""#][..];
    let ended = |outcome: &str| {
        let outcome = format!(r#"outcome="{outcome}""#);
        async move {
            scrape(api)
                .await
                .of("leasehold_lock_acquire_total", &[transaction[0], &outcome])
        }
    };
    let holds = "leasehold_lock_hold_seconds_count";
    let (acquired, held) = (ended("acquired").await, scrape(api).await.of(holds, transaction));
    api.send(put_key("key", 1)).await.expect(200);
    assert_eq!(ended("acquired").await, acquired + 1.0);
    comes_to(api, holds, transaction, |holds| holds == held + 1.0).await;

    let holding = world.hold().await;
    comes_to(api, "leasehold_lock_held", transaction, |held| held == 1.0).await;
    api.send(put_key("key", 2)).await.expect(409);
    assert_eq!(ended("contended").await, 1.0);
    let waiter = {
        let (api, write) = (api.clone(), put_key("key", 3).header("prefer", "wait=30"));
        tokio::spawn(async move { api.send(write).await })
    };
    comes_to(api, "leasehold_lock_waiting", transaction, |waiting| {
        waiting == 1.0
    })
    .await;
    // Its session is ended under it: it writes nothing, and the one that waits is next.
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database d ON d.oid = database
               WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND datname = current_database()";
    eventually("its session is ended", async || {
        world.client.query(end, &[]).await.unwrap().len() == 1
    })
    .await;
    in_time("the waiter", waiter).await.unwrap().expect(200);
    holding.go_on().await.expect(409);
    comes_to(api, "leasehold_lock_lost_total", transaction, |lost| lost == 1.0).await;
    comes_to(api, "leasehold_lock_held", transaction, |held| held == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gates_work_and_jobs_are_counted_and_every_metric_is_there() {
    let world = World::start_with("lease", |service| service.set("WEBHOOK_ALLOW_PRIVATE", "true")).await;
    let api = &world.api;
    let job = [r#"task="webhook-health""#, r#"outcome="succeeded""#];
    comes_to(api, "leasehold_queue_items", &[], |items| items == 0.0).await;

    // Nobody listens there, so what is to be sent is tried again and again.
    let webhook = json!({"tenant_id": "acme", "url": "http://127.0.0.1:9/"});
    api.send(post("/v1/webhooks", &webhook)).await.expect(201);
    api.send(put_key("key", 1)).await.expect(200);
    let retried = &[r#"outcome="retried""#][..];
    comes_to(api, "leasehold_queue_settled_total", retried, |retried| {
        retried >= 1.0
    })
    .await;
    comes_to(api, "leasehold_queue_claimed_total", &[], |claimed| {
        claimed >= 1.0
    })
    .await;
    let kind = &[r#"kind="webhook_delivery""#][..];
    comes_to(api, "leasehold_queue_processing_seconds_count", kind, |done| {
        done >= 1.0
    })
    .await;
    comes_to(api, "leasehold_queue_items", kind, |items| items >= 1.0).await;

    let ran = scrape(api).await.of("leasehold_job_runs_total", &job);
    api.send(post("/v1/jobs/webhook-health/run", &json!({})))
        .await
        .expect(202);
    comes_to(api, "leasehold_job_runs_total", &job, |runs| runs > ran).await;
    comes_to(api, "leasehold_job_run_seconds_count", &job[..1], |runs| {
        runs >= 1.0
    })
    .await;

    // A purge waits for the write, and whoever comes after it is refused.
    let refused = scrape(api).await.of("leasehold_tenant_gate_refused_total", &[]);
    assert_eq!(refused, 0.0);
    let holding = world.hold().await;
    let purge = {
        let api = api.clone();
        tokio::spawn(async move { api.send(delete("/v1/tenants/acme/data")).await })
    };
    let record = json!({"tenant_id": "acme", "user_id": "user", "value": 1});
    eventually("a write is refused at the gate", async || {
        api.send(post("/v1/feedback-records", &record)).await.status == 409
    })
    .await;
    holding.go_on().await.expect(200);
    in_time("the purge", purge).await.unwrap().expect(200);
    let now = scrape(api).await;
    // Whoever was to hand the event on may have come in that time, too.
    assert!(now.of("leasehold_tenant_gate_refused_total", &[]) >= 1.0);
    assert_eq!(now.of("leasehold_tenant_drain_wait_seconds_count", &[]), 1.0);

    // The page for operators describes exactly what there is.
    let page = include_str!("../../docs/operating.md");
    let described = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `leasehold_")?.split('`').next());
    let described: BTreeSet<String> = described.map(|rest| format!("leasehold_{rest}")).collect();
    assert_eq!(now.names(), described);
}

#[tokio::test(flavor = "multi_thread")]
async fn doubt_and_a_database_that_is_away_are_counted() {
    let (world, proxy) = World::behind_a_proxy("lease").await;
    let api = &world.api;
    comes_to(api, "leasehold_database_up", &[], |up| up == 1.0).await;
    let mut hit = proxy.on_commit_of("INSERT INTO versions", Fault::LoseAnswerAndGoAway);
    api.send(put_key("key", 100)).await.expect(500);
    hit.happened().await;
    comes_to(api, "leasehold_outcome_unknown_total", &[], |unknown| {
        unknown >= 1.0
    })
    .await;
    comes_to(api, "leasehold_database_up", &[], |up| up == 0.0).await;
    let route = [r#"method="PUT""#, r#"status="500""#];
    assert_eq!(scrape(api).await.of("leasehold_http_requests_total", &route), 1.0);
    proxy.come_back();
    comes_to(api, "leasehold_database_up", &[], |up| up == 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_used_up_is_seen() {
    let world = World::start_with("lease", |service| service.set("DATABASE_POOL_SIZE", "2")).await;
    let api = &world.api;
    let stranger = world.database.client().await;
    let lock = "BEGIN; LOCK TABLE feedback_records IN ACCESS EXCLUSIVE MODE";
    stranger.batch_execute(lock).await.unwrap();
    let record = json!({"tenant_id": "acme", "user_id": "user", "value": 1});
    let mut writes = JoinSet::new();
    for _ in 0..2 {
        let (api, write) = (api.clone(), post("/v1/feedback-records", &record));
        writes.spawn(async move { api.send(write).await });
    }
    let used = &[r#"state="used""#][..];
    comes_to(api, "leasehold_pool_connections", used, |used| used == 2.0).await;
    api.send(get("/v1/tenants")).await.expect(503);
    comes_to(api, "leasehold_pool_timeouts_total", &[], |timeouts| {
        timeouts >= 1.0
    })
    .await;
    assert!(scrape(api).await.of("leasehold_pool_wait_seconds_sum", &[]) >= 5.0);
    stranger.batch_execute("ROLLBACK").await.unwrap();
    while let Some(write) = writes.join_next().await {
        // They may have waited for longer than they may.
        let status = write.unwrap().status;
        assert!([201, 500, 503].contains(&status), "{status}");
    }
    comes_to(api, "leasehold_pool_connections", used, |used| used == 0.0).await;
}

/// What clients of the API call their locks is in no series.
#[tokio::test(flavor = "multi_thread")]
async fn locks_of_clients_add_no_series() {
    let world = World::start("lease").await;
    let mut connection = world.api.connect().await;
    let mut lock = async |numbers: std::ops::Range<usize>| {
        for number in numbers {
            let path = format!("/v1/tenants/acme/locks/name-{number}");
            let acquire = post(format!("{path}/acquire"), &json!({"ttl_ms": 60_000}));
            let granted = connection.send(acquire).await.expect(200).json();
            let release = json!({"lock_id": granted["lock_id"]});
            connection
                .send(post(format!("{path}/release"), &release))
                .await
                .expect(200);
        }
        scrape(&world.api).await
    };
    let first = lock(0..5).await;
    let last = lock(5..300).await;
    let series = |scrape: &Scrape| {
        let other = |series: &&String| !series.contains(r#"route="/metrics""#);
        scrape.0.keys().filter(other).cloned().collect::<BTreeSet<_>>()
    };
    assert_eq!(series(&last), series(&first));
    assert!(!last.0.keys().any(|series| series.contains("name-")));
    assert_eq!(attempts(&last, "acquired") - attempts(&first, "acquired"), 295.0);
    // Each was held from its grant to its release, by whoever kept it.
    let holds = |scrape: &Scrape| scrape.of("leasehold_lock_hold_seconds_count", LEASE);
    assert_eq!(holds(&last) - holds(&first), 295.0);
    assert_eq!(last.of("leasehold_lock_held", LEASE), 0.0);
}

/// Ten thousand names for locks of each kind that lives on its own, counted in this process.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_the_number_of_series_does_not_grow_with_the_number_of_names() {
    const NAMES: usize = 10_000;
    const AT_ONCE: usize = 32;

    let measured = PrometheusBuilder::new().install_recorder().unwrap();
    let database = TestDatabase::create().await;
    let process = Database::connect(database.options(), 8).await.unwrap();
    let locks: [Arc<dyn DistributedLock>; 2] =
        [Arc::new(process.leases()), Arc::new(process.session_locks())];
    for lock in locks {
        let mut clients = JoinSet::new();
        for client in 0..AT_ONCE {
            let lock = Arc::clone(&lock);
            clients.spawn(async move {
                for number in (client..NAMES).step_by(AT_ONCE) {
                    let guard = lock.try_acquire(&named(&format!("name-{number}"))).await.unwrap();
                    lock.release(guard).await.unwrap();
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
    }
    let text = measured.render();
    for backend in ["lease", "session"] {
        let acquired =
            format!(r#"leasehold_lock_acquire_total{{backend="{backend}",outcome="acquired"}} {NAMES}"#);
        assert!(text.lines().any(|line| line == acquired), "{text}");
    }
    assert!(!text.contains("name-"), "{text}");
    let samples = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    assert!(samples.count() < 100, "{text}");
}
