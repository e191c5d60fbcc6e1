//! How many round trips, statements and durable commits things cost: counted, never timed.

use std::time::Duration;

use futures_util::StreamExt;
use leasehold_domain::{
    AcquireError, ClaimRequest, DistributedLock, Durability, LockGuard, NewWork, Scope, WorkQueue,
};
use leasehold_storage::{Database, RowLeaseTable};
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{Api, Call, post};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::proxy::{Proxy, Traffic};
use leasehold_system_tests::service::{Service, make_key};
use leasehold_system_tests::wal::DurableServer;
use serde_json::json;

use crate::bench::{
    Bench, Failure, MODES, Mode, create_table, for_a_write, insert, named, write_guarded, write_under,
    write_unguarded,
};
use crate::world::{World, make_workspace, put_key};

/// Connections are open and statements prepared.
async fn warm_up(process: &Database) {
    for value in -6..0 {
        match value % 3 {
            0 => write_unguarded(process, value).await,
            -1 => write_guarded(process, Mode::Lease, value).await,
            _ => write_guarded(process, Mode::Transaction, value).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guarded_write_in_lease_mode_costs_two_round_trips_more() {
    let bench = Bench::start(1).await;
    warm_up(&bench.process).await;
    let ((), unguarded) = bench.proxy.watch(write_unguarded(&bench.process, 1)).await;
    let ((), guarded) = bench
        .proxy
        .watch(write_guarded(&bench.process, Mode::Lease, 2))
        .await;
    assert_eq!(
        guarded.round_trips,
        unguarded.round_trips + 2,
        "{guarded:#?} {unguarded:#?}"
    );
    assert_eq!(
        guarded.count("seen AS MATERIALIZED"),
        1,
        "the acquire: {guarded:#?}"
    );
    assert_eq!(
        guarded.count("mine AS MATERIALIZED"),
        1,
        "the fence: {guarded:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guarded_write_on_a_row_of_the_caller_costs_two_round_trips_more() {
    let bench = Bench::start(1).await;
    let table = "CREATE TABLE plans (
        id TEXT PRIMARY KEY, lock_id UUID, lock_operation TEXT, lock_by TEXT, lock_acquired_at TIMESTAMPTZ,
        lock_expires_at TIMESTAMPTZ, lock_fencing_token BIGINT NOT NULL DEFAULT 0);
        INSERT INTO plans VALUES ('plan')";
    bench.client.batch_execute(table).await.unwrap();
    let table = RowLeaseTable::new("public", "plans", "bench").key_column("id");
    let lock = bench.process.row_leases(table.build().unwrap());
    let write = async |value| {
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        write_under(&bench.process, &guard, value).await.unwrap();
        lock.release(guard).await.unwrap();
    };
    for value in 1..4 {
        write(value).await;
        write_unguarded(&bench.process, -value).await;
    }
    let ((), unguarded) = bench.proxy.watch(write_unguarded(&bench.process, 0)).await;
    let ((), guarded) = bench.proxy.watch(write(4)).await;
    assert_eq!(
        guarded.round_trips,
        unguarded.round_trips + 2,
        "{guarded:#?} {unguarded:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guarded_write_in_advisory_mode_costs_one_round_trip_more() {
    let bench = Bench::start(1).await;
    warm_up(&bench.process).await;
    let ((), unguarded) = bench.proxy.watch(write_unguarded(&bench.process, 1)).await;
    let ((), guarded) = bench
        .proxy
        .watch(write_guarded(&bench.process, Mode::Transaction, 2))
        .await;
    assert_eq!(
        guarded.round_trips,
        unguarded.round_trips + 1,
        "{guarded:#?} {unguarded:#?}"
    );
    assert_eq!(
        guarded.count("pg_try_advisory_xact_lock"),
        1,
        "the lock: {guarded:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_after_a_transaction_that_released_costs_nothing() {
    let bench = Bench::start(1).await;
    warm_up(&bench.process).await;
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        write_under(&bench.process, &guard, value).await.unwrap();
        let (released, traffic) = bench.proxy.watch(lock.release(guard)).await;
        released.unwrap();
        assert_eq!(traffic.round_trips, 0, "{mode:?} {traffic:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uncontended_acquire_and_release_are_two_statements() {
    let bench = Bench::start(1).await;
    let lock = bench.process.leases();
    let pair = async |name: &str| {
        let guard = lock.try_acquire(&named(name)).await.unwrap();
        lock.release(guard).await.unwrap();
    };
    pair("warm").await;
    pair("warm").await;
    // A name that was never used is no different.
    for name in ["warm", "new"] {
        let ((), traffic) = bench.proxy.watch(pair(name)).await;
        assert_eq!(
            (traffic.statements.len(), traffic.round_trips),
            (2, 2),
            "{name}: {traffic:#?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_try_is_one_round_trip_and_against_a_locked_row_two() {
    let bench = Bench::start(1).await;
    let lock = bench.process.leases();
    lock.release(lock.try_acquire(&named("plan")).await.unwrap())
        .await
        .unwrap();
    let held = lock.try_acquire(&named("plan")).await.unwrap();
    let (refused, traffic) = bench.proxy.watch(lock.try_acquire(&named("plan"))).await;
    assert!(matches!(refused, Err(AcquireError::Contended(_))), "{refused:?}");
    assert_eq!(traffic.round_trips, 1, "{traffic:#?}");
    lock.release(held).await.unwrap();
    // Free, but a stranger has its row locked and will keep it: the try must not wait for that.
    bench
        .client
        .batch_execute("BEGIN; SELECT FROM leasehold.leases FOR UPDATE")
        .await
        .unwrap();
    let (refused, traffic) = bench
        .proxy
        .watch(in_time("a try", async { lock.try_acquire(&named("plan")).await }))
        .await;
    assert!(matches!(refused, Err(AcquireError::Contended(_))), "{refused:?}");
    assert!(traffic.round_trips <= 2, "{traffic:#?}");
    bench.client.batch_execute("ROLLBACK").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_beat_of_a_thousand_leases_is_one_statement() {
    let bench = Bench::start(8).await;
    let lock = bench.process.leases();
    // All that is due within a sixth of it goes along: so long may it take to acquire them.
    let requests = (0..1000).map(|number| named(&number.to_string()).with_ttl(Duration::from_secs(18)));
    let guards: Vec<LockGuard> = futures_util::stream::iter(requests)
        .map(|request| {
            let lock = lock.clone();
            async move { lock.try_acquire(&request).await.unwrap() }
        })
        .buffer_unordered(8)
        .collect()
        .await;
    let ends = || guards.iter().map(|guard| guard.expires_at().unwrap());
    let mut beats = 0;
    for _ in 0..2 {
        let (last, before) = (
            ends().max().unwrap(),
            bench.proxy.traffic().count("due AS MATERIALIZED"),
        );
        eventually("all leases are renewed", async || ends().all(|end| end > last)).await;
        beats = bench.proxy.traffic().count("due AS MATERIALIZED") - before;
    }
    // The first beat may have come in parts: they were not all granted at once. From then on they stay together.
    assert_eq!(beats, 1);
    assert!(guards.iter().all(|guard| !guard.is_lost()));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_waiters_hold_no_pooled_connection() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let held = lock.try_acquire(&named("plan")).await.unwrap();
    let waiters: Vec<_> = (0..200)
        .map(|_| {
            let lock = lock.clone();
            tokio::spawn(async move {
                let guard = lock
                    .acquire(&named("plan"), Duration::from_secs(60))
                    .await
                    .unwrap();
                lock.release(guard).await.unwrap();
            })
        })
        .collect();
    eventually("the first of them announces that it waits", async || {
        bench.proxy.traffic().count("NOTIFY leasehold_wait") == 1
    })
    .await;
    eventually("no connection is in use", async || {
        let pool = bench.process.pool().state();
        pool.open == pool.idle
    })
    .await;
    // The pool has at most two, and the process a few of its own, whoever waits.
    assert!(
        bench.proxy.connections() <= 2 + 4,
        "{}",
        bench.proxy.connections()
    );
    let both = [1, 2].map(|value| bench.process.read(async move |conn| insert(conn, value).await));
    for done in in_time("two statements at once", futures_util::future::join_all(both)).await {
        done.unwrap();
    }
    lock.release(held).await.unwrap();
    for waiter in waiters {
        in_time("its turn", waiter).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_two_thousand_session_locks_need_at_most_four_connections() {
    let bench = Bench::start(2).await;
    let lock = bench.process.session_locks();
    let mut guards = Vec::new();
    for number in 0..2000 {
        guards.push(lock.try_acquire(&named(&number.to_string())).await.unwrap());
    }
    let sql = "SELECT count(*), count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND granted
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let row = bench.client.query_one(sql, &[]).await.unwrap();
    let (locks, sessions): (i64, i64) = (row.get(0), row.get(1));
    assert!(locks >= 2000, "{locks}");
    assert!(sessions <= 4, "{sessions}");
    drop(guards);
    eventually("all are given back", async || {
        bench.database.advisory_locks(&bench.client).await == 0
    })
    .await;
}

/// What one PUT costs.
async fn put_over_http(api: &Api, proxy: &Proxy) -> Traffic {
    over_http(api, proxy, 200, |value| put_key("key", value)).await
}

/// What one call costs. A ping of a lock session may fall among some, so it is the least of several.
async fn over_http(api: &Api, proxy: &Proxy, status: u16, call: impl Fn(i64) -> Call) -> Traffic {
    let mut least: Option<Traffic> = None;
    for value in 0..5 {
        let (answer, traffic) = proxy.watch(api.send(call(value))).await;
        answer.expect(status);
        if least
            .as_ref()
            .is_none_or(|least| traffic.round_trips < least.round_trips)
        {
            least = Some(traffic);
        }
    }
    least.unwrap()
}

/// What only the statement that enters the gates of tenants contains.
const TENANT_GATE: &str = "WITH ORDINALITY AS gates";

/// The same PUT with nothing to guard it would ask for the key, begin, write, make the version, and commit.
const UNGUARDED: [&str; 5] = [
    "FROM credentials",
    "BEGIN",
    "INSERT INTO default_config",
    "INSERT INTO versions",
    "COMMIT",
];

fn assert_guarded_put(traffic: &Traffic, guard: &[&str]) {
    for text in UNGUARDED.iter().skip(1).chain(guard) {
        let count = traffic.statements.iter().filter(|statement| match *text {
            "COMMIT" => statement.ends_with("COMMIT"),
            "BEGIN" => statement.starts_with("BEGIN"),
            text => statement.contains(text),
        });
        assert_eq!(count.count(), 1, "{text}: {traffic:#?}");
    }
    assert_eq!(traffic.round_trips, UNGUARDED.len() + guard.len(), "{traffic:#?}");
    assert_eq!(
        traffic.round_trips,
        traffic.statements.len(),
        "each is prepared already: {traffic:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_over_http_in_lease_mode_costs_three_round_trips_more() {
    let (world, proxy) = World::behind_a_proxy("lease").await;
    let traffic = put_over_http(&world.api, &proxy).await;
    assert_guarded_put(
        &traffic,
        &["seen AS MATERIALIZED", TENANT_GATE, "mine AS MATERIALIZED"],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_over_http_in_advisory_mode_costs_one_round_trip_more() {
    let (world, proxy) = World::behind_a_proxy("advisory").await;
    // The gate and the lock are one.
    let traffic = put_over_http(&world.api, &proxy).await;
    assert_guarded_put(&traffic, &["pg_try_advisory_xact_lock"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feedback_record_without_a_key_is_made_in_one_round_trip() {
    let (world, proxy) = World::behind_a_proxy("lease").await;
    let record = |value| {
        let new = json!({"tenant_id": "acme", "user_id": "alice", "value": value});
        post("/v1/feedback-records", &new)
    };
    let traffic = over_http(&world.api, &proxy, 201, record).await;
    // The key is asked for, and that is it: gate, record and event are one statement and its own transaction.
    assert_eq!(traffic.count("FROM credentials"), 1, "{traffic:#?}");
    assert_eq!(traffic.count("INSERT INTO feedback_records"), 1, "{traffic:#?}");
    assert_eq!(
        (traffic.statements.len(), traffic.round_trips),
        (2, 2),
        "{traffic:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_put_over_http_is_one_durable_commit() {
    const PUTS: u64 = 100;
    let server = tokio::task::spawn_blocking(DurableServer::start).await.unwrap();
    for mode in ["lease", "advisory"] {
        let mut grown = Vec::new();
        for puts in [0, PUTS] {
            let database = TestDatabase::create_empty_on(&server.url()).await;
            let before = server.syncs().await;
            let mut service = Service::on(&database)
                .set("WORKSPACE_LOCK_MODE", mode)
                .start()
                .await;
            let key = tokio::task::spawn_blocking(move || make_key(&database, "tester", "admin", None));
            let api = service.api(&key.await.unwrap());
            make_workspace(&api).await;
            for value in 0..puts {
                api.send(put_key("key", value)).await.expect(200);
            }
            service.stop().await;
            grown.push(server.syncs().await - before);
        }
        let seen = grown[1].saturating_sub(grown[0]);
        assert!(
            (PUTS - 3..=PUTS + 3).contains(&seen),
            "{mode}: {seen}, not {PUTS}"
        );
    }
}

/// What a process costs the disk that warms up and then does something `times` times.
async fn syncs(server: &DurableServer, times: i64, work: impl AsyncFn(&Database, i64)) -> u64 {
    let database: TestDatabase = server.database().await;
    create_table(&database.client().await).await;
    let before = server.syncs().await;
    let process = Database::connect(database.options(), 1).await.unwrap();
    warm_up(&process).await;
    for value in 0..times {
        work(&process, value).await;
    }
    process.shutdown(Duration::from_secs(5)).await;
    drop(process);
    server.syncs().await - before
}

/// How many durable commits one `work` costs, counted over a hundred.
async fn assert_commits(server: &DurableServer, what: &str, each: u64, work: impl AsyncFn(&Database, i64)) {
    const TIMES: i64 = 100;
    let base = syncs(server, 0, &work).await;
    let grown = syncs(server, TIMES, &work).await;
    // The log writer may wake up once in between.
    let expected = each * TIMES.unsigned_abs();
    let seen = grown.saturating_sub(base);
    assert!(
        (expected.saturating_sub(2)..=expected + 2).contains(&seen),
        "{what}: {seen}, not {expected}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_guarded_write_is_one_durable_commit() {
    let server = tokio::task::spawn_blocking(DurableServer::start).await.unwrap();
    assert_commits(&server, "unguarded", 1, async |process, value| {
        write_unguarded(process, value).await
    })
    .await;
    for mode in MODES {
        let write = async |process: &Database, value| write_guarded(process, mode, value).await;
        assert_commits(&server, &format!("{mode:?}"), 1, write).await;
    }
    // What the numbers above would be if the count were blind.
    let durably = async |process: &Database, value| {
        let guard = process
            .leases()
            .try_acquire(&named("plan").with_durability(Durability::Durable))
            .await
            .unwrap();
        let write = process.fenced_transaction_releasing(&guard, async |conn| insert(conn, value).await);
        write.await.unwrap();
    };
    assert_commits(&server, "a durable acquire and a write", 2, durably).await;
    let nothing = async |process: &Database, _| {
        process
            .read(async |conn| insert(conn, -1).await.or(Ok::<_, Failure>(())))
            .await
            .unwrap();
    };
    assert_commits(&server, "a write that fails", 0, nothing).await;
}

/// The claim needs no disk of its own; a dead letter that was told must be there.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_work_item_is_two_durable_commits() {
    let server = tokio::task::spawn_blocking(DurableServer::start).await.unwrap();
    let request = ClaimRequest::new(["work"], "test").with_lease(Duration::from_millis(100));
    let enqueue = async |process: &Database, attempts| {
        let item = NewWork::new(Scope::new("acme", "work", "item", "one")).with_max_attempts(attempts);
        process.work_queue().enqueue(&item).await.unwrap();
    };
    let processed = async |process: &Database, _| {
        enqueue(process, 10).await;
        let claims = process.work_queue().claim(&request).await.unwrap().claims;
        process.work_queue().complete(&[claims[0].key]).await.unwrap();
    };
    assert_commits(&server, "enqueue, claim and complete", 2, processed).await;
    let given_up = async |process: &Database, _| {
        enqueue(process, 1).await;
        assert_eq!(
            process.work_queue().claim(&request).await.unwrap().claims.len(),
            1
        );
        eventually("the claim has expired", async || {
            let claimed = process.work_queue().claim(&request).await.unwrap();
            assert!(claimed.claims.is_empty());
            claimed.dead.len() == 1
        })
        .await;
    };
    assert_commits(&server, "enqueue, claim and a claim that gives up", 2, given_up).await;
}
