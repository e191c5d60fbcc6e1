//! Services that are killed, stopped, asked to end, and started together.

use std::fs::File;
use std::time::{Duration, Instant};

use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::get;
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::service::{Service, ServiceBuilder};
use rustix::process::Signal;
use tokio::net::TcpStream;

use crate::world::{WORKSPACE, World, grace, in_both_modes, key_path, put_key};

const LEASE: Duration = Duration::from_millis(1500);

in_both_modes!(
    heavy_another_takes_over_from_one_that_was_killed,
    a_stopped_service_finishes_what_it_began,
    several_start_at_once_on_an_empty_database,
);

fn short_lease(service: ServiceBuilder) -> ServiceBuilder {
    service.set("WORKSPACE_LOCK_LEASE_MS", LEASE.as_millis().to_string())
}

async fn heavy_another_takes_over_from_one_that_was_killed(mode: &'static str) {
    let mut world = World::start_with(mode, short_lease).await;
    let (_other, api) = world.another(short_lease).await;
    let holding = world.hold().await;
    api.send(put_key("a", 1)).await.expect(409);
    world.service.kill();
    let killed = Instant::now();
    // One that stands in line already, and one that comes again and again.
    let patient = tokio::spawn({
        let api = api.clone();
        async move { api.send(put_key("b", 1).header("prefer", "wait=30")).await }
    });
    eventually("another gets the workspace", async || {
        api.send(put_key("a", 1)).await.status == 200
    })
    .await;
    let taken_over = killed.elapsed();
    in_time("the one in line", patient).await.unwrap().expect(200);
    // Far less than the minute that a write may hold a workspace.
    assert!(taken_over < grace(LEASE), "{taken_over:?}");
    assert!(
        killed.elapsed() < grace(LEASE) + Duration::from_secs(1),
        "{:?}",
        killed.elapsed()
    );
    drop(holding);
    let gate = api.send(get(key_path("gate"))).await.expect(200).json();
    assert_eq!(gate["value"], "open", "the dead have written");
    assert_eq!(api.send(get(WORKSPACE)).await.json()["version"], 2);
}

/// As a virtual machine that is suspended: it wakes up and goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_one_that_was_asleep_does_not_write_over_its_successor() {
    let world = World::start_with("lease", short_lease).await;
    let (_other, api) = world.another(short_lease).await;
    let holding = world.hold().await;
    world.service.signal(Signal::STOP);
    let asleep = Instant::now();
    eventually("another gets the workspace", async || {
        api.send(put_key("a", 1)).await.status == 200
    })
    .await;
    assert!(asleep.elapsed() < grace(LEASE), "{:?}", asleep.elapsed());
    world.service.signal(Signal::CONT);
    let answer = holding.go_on().await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (409, "lock_lost"),
        "{answer:?}"
    );
    let config = api
        .send(get(format!("{WORKSPACE}/config")))
        .await
        .expect(200)
        .json();
    assert_eq!(config["values"], serde_json::json!({"gate": "open", "a": 1}));
    assert_eq!(config["version"], 1);
}

/// Every service has a session lock that tells that it lives. One that is stopped cannot keep it.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_stopped_process_loses_its_session_locks() {
    let world = World::start("lease").await;
    let session_locks = async || world.database.advisory_locks(&world.client).await;
    eventually("it tells that it lives", async || session_locks().await == 1).await;
    // In the middle of a transaction it would keep that one's locks.
    eventually("it has nothing else to do", async || {
        let left = "SELECT FROM leasehold.outbox";
        world.client.query(left, &[]).await.unwrap().is_empty()
    })
    .await;
    world.service.signal(Signal::STOP);
    let stopped = Instant::now();
    eventually("its session is ended", async || session_locks().await == 0).await;
    // The server's bound is 10 seconds without a word, and the last word was 3 seconds old at most.
    assert!(
        stopped.elapsed() < Duration::from_secs(20),
        "{:?}",
        stopped.elapsed()
    );
    world.service.signal(Signal::CONT);
    eventually("it tells again that it lives", async || {
        session_locks().await == 1
    })
    .await;
    world.api.send(put_key("a", 1)).await.expect(200);
}

async fn a_stopped_service_finishes_what_it_began(mode: &'static str) {
    let mut world = World::start(mode).await;
    let holding = world.hold().await;
    let mut idle = world.api.connect().await;
    idle.send(get("/readyz")).await.expect(200);
    world.service.signal(Signal::TERM);
    // New requests are turned away, at the door or with a 503.
    eventually("it takes nothing new", async || {
        world
            .api
            .try_send(get("/readyz"))
            .await
            .is_none_or(|answer| answer.status == 503)
    })
    .await;
    let answer = holding.go_on().await.expect(200);
    assert_eq!(answer.json()["version"], 1);
    let status = world.service.ended().await;
    assert!(status.success(), "{status}");
    let versions: i64 = world
        .client
        .query_one("SELECT count(*) FROM versions", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(versions, 1);
    world.nothing_is_held().await;
    eventually("all its sessions have ended", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name LIKE 'leasehold%'";
        world.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A request that does not end within the grace is cut off, and has written nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_waits_no_longer_than_its_grace() {
    let mut world = World::start_with("lease", |service| service.set("SHUTDOWN_GRACE_SECONDS", "1")).await;
    let holding = world.hold().await;
    let status = world.service.stop().await;
    assert!(status.success(), "{status}");
    // Nobody has to wait for the lease of one that ended in order.
    let sql = "SELECT count(*) FROM workspaces WHERE workspace_lock_expires_at > clock_timestamp()";
    let held: i64 = world.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(held, 0);
    assert!(holding.told().await.is_none(), "no answer came");
    let versions: i64 = world
        .client
        .query_one("SELECT count(*) FROM versions", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(versions, 0);
    world.nothing_is_held().await;
}

async fn several_start_at_once_on_an_empty_database(mode: &'static str) {
    let database = TestDatabase::create_empty().await;
    let starts = (0..3).map(|_| Service::on(&database).set("WORKSPACE_LOCK_MODE", mode).start());
    let services = in_time("all of them", futures_util::future::join_all(starts)).await;
    for service in &services {
        let api = service.api("");
        api.send(get("/readyz")).await.expect(200);
    }
    // And one more finds everything done.
    let late = Service::on(&database)
        .set("WORKSPACE_LOCK_MODE", mode)
        .start()
        .await;
    late.api("").send(get("/healthz")).await.expect(200);
}

/// What a service says that does not start.
async fn refusal(service: ServiceBuilder) -> String {
    let Err((status, log)) = service.try_start().await else {
        panic!("it started")
    };
    assert!(!status.success());
    log.join("\n")
}

/// The first service decides what a workspace lock is.
#[tokio::test(flavor = "multi_thread")]
async fn instances_of_different_lock_modes_do_not_mix() {
    let world = World::start("lease").await;
    let said = refusal(Service::on(&world.database).set("WORKSPACE_LOCK_MODE", "advisory")).await;
    assert!(
        said.contains("WORKSPACE_LOCK_MODE") && said.contains("leasehold migrate"),
        "{said}"
    );
}

/// The limit of open files that most systems begin with is one that a program is expected to raise.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_more_clients_than_files_were_allowed_at_first() {
    let world = World::start_with("lease", |service| {
        service.through("ulimit -S -n 100; exec \"$@\"")
    })
    .await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(TcpStream::connect(world.service.address()).await.unwrap());
    }
    world.api.send(get("/healthz")).await.expect(200);
    world.api.send(put_key("a", 1)).await.expect(200);
}

/// As when the disk of the log is full, or whoever read it has gone: a line is lost, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_goes_on_when_nobody_takes_its_log() {
    let nobody = File::options().write(true).open("/dev/full").unwrap();
    let world = World::start_with("lease", |service| service.log_to(nobody)).await;
    let keeps = async || -> i64 {
        let sql = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                   WHERE datname = current_database() AND locktype = 'advisory' AND mode = 'ShareLock'";
        world.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    eventually("it keeps its lock", async || keeps().await == 1).await;
    for round in 0..3 {
        world.end_sessions().await;
        eventually("it keeps its lock again", async || keeps().await == 1).await;
        eventually("it writes", async || {
            let written = world.api.try_send(put_key("a", round)).await;
            written.is_some_and(|answer| answer.status == 200)
        })
        .await;
    }
}

/// Statements name the service's tables without their schema, and Postgres looks into one of the role's name first.
#[tokio::test(flavor = "multi_thread")]
async fn the_tables_are_those_in_public() {
    let database = TestDatabase::create_empty().await;
    let client = database.client().await;
    client
        .batch_execute("CREATE SCHEMA AUTHORIZATION CURRENT_USER")
        .await
        .unwrap();
    let world = World::of(Service::on(&database), database, "lease").await;
    world.api.send(put_key("a", 1)).await.expect(200);
    drop(world.service);

    let row = client
        .query_one("SELECT current_database()::text", &[])
        .await
        .unwrap();
    let name: &str = row.get(0);
    let elsewhere = format!("CREATE SCHEMA shop; ALTER DATABASE {name} SET search_path = shop");
    client.batch_execute(&elsewhere).await.unwrap();
    let said = refusal(Service::on(&world.database)).await;
    assert!(
        said.contains("search_path is \"shop\"") && said.contains("public"),
        "{said}"
    );
}

/// Without `--migrate` nothing is changed, and what to do is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_not_current_is_refused() {
    let database = TestDatabase::create_empty().await;
    let said = refusal(Service::without_migrating(&database)).await;
    assert!(
        said.contains("leasehold migrate") && said.contains("--migrate"),
        "{said}"
    );
    let tables: i64 = database
        .client()
        .await
        .query_one(
            "SELECT count(*) FROM pg_tables WHERE schemaname IN ('public', 'leasehold')",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(tables, 0);
}
