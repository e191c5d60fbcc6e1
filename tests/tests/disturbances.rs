//! Servers that restart, callers that go away, runtimes that end: what remains works.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diesel_async::AsyncPgConnection;
use futures_util::FutureExt;
use leasehold_domain::{DistributedLock, LockId, Released};
use leasehold_embedded::Cluster;
use leasehold_storage::{ConnectOptions, Database, Prepared, TransactionError};
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::patience::{PATIENCE, eventually, in_time};
use leasehold_system_tests::proxy::{Fault, Proxy};
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{
    Bench, Failure, MODES, Mode, create_table, for_a_write, insert, lock, named, write_under, written,
};

/// Kills one backend, which makes Postgres end all sessions and recover, and waits until it has.
pub(crate) async fn crash(database: &TestDatabase) {
    let client = database.client().await;
    let victim: i32 = client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL).unwrap();
    eventually("the server has noticed", async || client.is_closed()).await;
    eventually("the server is up again", async || match tokio_postgres::connect(
        database.url(),
        tokio_postgres::NoTls,
    )
    .await
    {
        Ok((client, driver)) => {
            tokio::spawn(async move { driver.await.ok() });
            client.batch_execute("SELECT").await.is_ok()
        }
        Err(_) => false,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_a_server_that_restarts_under_load_is_used_again_within_five_seconds() {
    let cluster = tokio::task::spawn_blocking(|| Cluster::temporary().start().unwrap())
        .await
        .unwrap();
    for mode in MODES {
        let database = TestDatabase::create_on(&cluster.url("postgres")).await;
        create_table(&database.client().await).await;
        let process = Database::connect(database.options(), 4).await.unwrap();
        let (next, stop) = (Arc::new(AtomicI64::new(1)), Arc::new(AtomicBool::new(false)));
        let (sure, doubtful) = (
            Arc::new(Mutex::new(BTreeSet::new())),
            Arc::new(Mutex::new(BTreeSet::new())),
        );
        let last_failure = Arc::new(Mutex::new(Instant::now()));
        let writers: Vec<_> = (0..8)
            .map(|_| {
                let (process, next, stop) = (process.clone(), Arc::clone(&next), Arc::clone(&stop));
                let (sure, doubtful) = (Arc::clone(&sure), Arc::clone(&doubtful));
                let last_failure = Arc::clone(&last_failure);
                tokio::spawn(async move {
                    let lock = lock(&process, mode);
                    while !stop.load(Ordering::Relaxed) {
                        let value = next.fetch_add(1, Ordering::Relaxed);
                        let request = for_a_write("plan").with_ttl(Duration::from_secs(1));
                        let Ok(guard) = lock.acquire(&request, Duration::from_secs(20)).await else {
                            *last_failure.lock().unwrap() = Instant::now();
                            continue;
                        };
                        match write_under(&process, &guard, value).await {
                            Ok(()) => _ = sure.lock().unwrap().insert(value),
                            Err(TransactionError::OutcomeUnknown { .. }) => {
                                doubtful.lock().unwrap().insert(value);
                            }
                            Err(_) => *last_failure.lock().unwrap() = Instant::now(),
                        }
                        drop(lock.release(guard).await);
                    }
                })
            })
            .collect();
        let progress = async |more: usize| {
            let goal = sure.lock().unwrap().len() + more;
            eventually("writes go on", async || sure.lock().unwrap().len() >= goal).await;
        };
        progress(50).await;
        crash(&database).await;
        let up = Instant::now();
        progress(50).await;
        let recovered = up.elapsed();
        assert!(recovered < Duration::from_secs(5), "{mode:?}: {recovered:?}");
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            in_time("a writer", writer).await.unwrap();
        }
        // What was told is true.
        let written: BTreeSet<i64> = written(&database.client().await).await.into_iter().collect();
        let (sure, doubtful) = (sure.lock().unwrap(), doubtful.lock().unwrap());
        let missing: BTreeSet<i64> = sure.difference(&written).copied().collect();
        assert!(
            missing.is_empty(),
            "{mode:?}: {missing:?} was promised, and is not there"
        );
        let surplus: BTreeSet<i64> = written.difference(&sure).copied().collect();
        assert!(
            surplus.is_subset(&doubtful),
            "{mode:?}: {surplus:?} was written, and denied"
        );
    }
}

/// What a crash throws away takes the ids of its transactions along: the next ones get them again, and commit.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_given_out_again_after_a_crash_is_not_believed() {
    // Nothing but commits writes the log.
    let start = || {
        Cluster::temporary()
            .set("wal_writer_delay", "10s")
            .start()
            .unwrap()
    };
    let cluster = tokio::task::spawn_blocking(start).await.unwrap();
    for mode in MODES {
        let mut came_to_it = false;
        for _ in 0..5 {
            came_to_it = came_to_it || an_id_is_given_out_again(&cluster, mode).await;
        }
        assert!(came_to_it, "{mode:?}: or this tests nothing");
    }
}

/// Answers whether it was. Another commit, of presence or of the server's own, brings the first one to the disk.
async fn an_id_is_given_out_again(cluster: &Cluster, mode: Mode) -> bool {
    let database = TestDatabase::create_on(&cluster.url("postgres")).await;
    create_table(&database.client().await).await;
    let proxy = Proxy::start(&database);
    let options = ConnectOptions::parse(&proxy.url(&database), None).unwrap();
    let process = Database::connect(options, 2).await.unwrap();
    let guard = lock(&process, mode)
        .try_acquire(&for_a_write("plan"))
        .await
        .unwrap();
    let mut held = proxy.on_commit(Fault::HoldStatement);
    let id = Mutex::new(0);
    let write = process.fenced_transaction_releasing(&guard, async |conn| {
        insert(conn, 1).await?;
        *id.lock().unwrap() = current_id(conn).await?;
        Ok::<_, Failure>(())
    });
    let trouble = async {
        held.happened().await;
        // Until the id has gone to somebody else nobody is told anything.
        proxy.hold_off();
        crash(&database).await;
        let other = database.client().await;
        eventually("the ids have come to it", async || {
            let take = "INSERT INTO written VALUES ((SELECT 1000 + count(*) FROM written))
                        RETURNING pg_current_xact_id()::text::bigint";
            other.query_one(take, &[]).await.unwrap().get::<_, i64>(0) >= *id.lock().unwrap()
        })
        .await;
        let status = format!("SELECT pg_xact_status('{}')", id.lock().unwrap());
        let status: String = other.query_one(&status, &[]).await.unwrap().get(0);
        proxy.come_back();
        status == "committed"
    };
    let (result, again) = in_time("the write", async { tokio::join!(write, trouble) }).await;
    assert!(
        !again
            || matches!(
                result,
                Err(TransactionError::OutcomeUnknown { .. } | TransactionError::Unavailable(_))
            ),
        "{mode:?}: {result:?}"
    );
    assert!(!written(&database.client().await).await.contains(&1), "{mode:?}");
    again
}

async fn current_id(conn: &mut AsyncPgConnection) -> Result<i64, Failure> {
    #[derive(diesel::QueryableByName)]
    struct Row {
        #[diesel(sql_type = diesel::sql_types::BigInt)]
        id: i64,
    }
    let ask = diesel::sql_query("SELECT pg_current_xact_id()::text::bigint AS id");
    let row: Row = Prepared(ask).one(conn).await?;
    Ok(row.id)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_is_whole_after_five_hundred_aborted_waiters() {
    let bench = Bench::start(3).await;
    for mode in MODES {
        let lock: Arc<dyn DistributedLock> = Arc::from(bench.lock(mode));
        let held = lock.try_acquire(&named("plan")).await.unwrap();
        let waiters: Vec<_> = (0..500)
            .map(|_| {
                let lock = Arc::clone(&lock);
                tokio::spawn(async move {
                    lock.acquire(&named("plan"), Duration::from_secs(60))
                        .await
                        .map(drop)
                })
            })
            .collect();
        // At all stages: some have not begun, one tries, most wait, and some get the lock while they are aborted.
        let mut held = Some(held);
        for (number, waiter) in waiters.iter().enumerate() {
            if number == 250 {
                held.take();
            }
            if number % 5 == 0 {
                tokio::task::yield_now().await;
            }
            waiter.abort();
        }
        for waiter in waiters {
            // Aborted, or it had the lock already.
            assert!(
                waiter
                    .await
                    .map_or_else(|error| error.is_cancelled(), |got| got.is_ok())
            );
        }
        eventually("nobody holds it", async || {
            lock.inspect(named("plan").name()).await.unwrap().is_none()
        })
        .await;
        // What was aborted may still arrive, and goes again.
        let guard = lock.acquire(&named("plan"), PATIENCE).await.unwrap();
        lock.release(guard).await.unwrap();
        eventually("no lock is left", async || {
            bench.database.advisory_locks(&bench.client).await == 0
        })
        .await;
        // All connections of the pool at once.
        let arrived = tokio::sync::Barrier::new(3);
        let all = (0..3).map(|_| {
            bench.process.read(async |_| {
                arrived.wait().await;
                Ok::<_, Failure>(())
            })
        });
        for done in in_time("all connections", futures_util::future::join_all(all)).await {
            done.unwrap();
        }
    }
}

/// An extension tells the guard what it finds, also when nobody waits for it any more, and a release waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_extension_that_was_given_up_still_finds_the_loss() {
    let database = TestDatabase::create().await;
    let proxy = Proxy::start(&database);
    let options = ConnectOptions::parse(&proxy.url(&database), None).unwrap();
    let process = Database::connect(options, 2).await.unwrap();
    let lock = process.transaction_locks();
    for fault in [Fault::LoseStatement, Fault::HoldAnswer] {
        let guard = lock.try_acquire(&named("plan")).await.unwrap();
        let mut hit = proxy.on("SELECT 1", fault);
        let extension = lock.extend(&guard, Duration::from_secs(30));
        assert!(extension.now_or_never().is_none());
        hit.happened().await;
        if fault == Fault::LoseStatement {
            in_time("the loss is told", guard.lost()).await;
            assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);
        } else {
            let mut release = lock.release(guard);
            assert!((&mut release).now_or_never().is_none());
            hit.let_go().await;
            assert_eq!(release.await.unwrap(), Released::Held);
        }
    }
}

#[test]
fn a_guard_can_be_dropped_after_its_runtime_has_ended() {
    let start = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    };
    for mode in MODES {
        let runtime = start();
        let (database, process, guard) = runtime.block_on(async {
            let database = TestDatabase::create().await;
            let process = Database::connect(database.options(), 2).await.unwrap();
            let guard = lock(&process, mode).try_acquire(&named("plan")).await.unwrap();
            (database, process, guard)
        });
        runtime.shutdown_timeout(PATIENCE);
        drop(guard);
        let runtime = start();
        runtime.block_on(async {
            let other = Database::connect(database.options(), 2).await.unwrap();
            let lock = lock(&other, mode);
            let next = lock.acquire(&named("plan"), PATIENCE).await.unwrap();
            lock.release(next).await.unwrap();
        });
        drop(process);
    }
}

/// Whoever ends in order leaves no lease for others to wait for, whatever still has a guard.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_gives_back_what_guards_still_hold() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guards = [
        lock.try_acquire(&named("a")).await.unwrap(),
        lock.try_acquire(&named("b")).await.unwrap(),
    ];
    bench.process.shutdown(PATIENCE).await;
    for guard in &guards {
        assert!(guard.is_lost());
        assert!(!bench.lease_is_live(guard.name()).await);
    }
    let written = bench
        .process
        .fenced_transaction(&guards[0], async |conn| insert(conn, 1).await)
        .await;
    assert!(matches!(written, Err(TransactionError::Lost)), "{written:?}");
}

/// A lease that is being handed to a client while its process gives back what it has is either the client's or free.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_frees_nothing_that_a_client_was_given() {
    for chosen in [None, Some(LockId::new())] {
        let database = TestDatabase::create().await;
        let proxy = Proxy::start(&database);
        let options = ConnectOptions::parse(&proxy.url(&database), None).unwrap();
        let process = Database::connect(options, 2).await.unwrap();
        let guard = process.leases().try_acquire(&named("plan")).await.unwrap();
        let mut hit = proxy.on("INSERT INTO leasehold.client_leases", Fault::HoldAnswer);
        let handing = {
            let leases = process.client_leases();
            tokio::spawn(async move { leases.hand_over(guard, chosen).await })
        };
        hit.happened().await;
        let ending = {
            let process = process.clone();
            tokio::spawn(async move { process.shutdown(PATIENCE).await })
        };
        let other = Database::connect(database.options(), 2).await.unwrap();
        if chosen.is_none() {
            eventually("it was given back", async || {
                other
                    .leases()
                    .inspect(named("plan").name())
                    .await
                    .unwrap()
                    .is_none()
            })
            .await;
        }
        hit.let_go().await;
        let handed = in_time("the hand-over", handing).await.unwrap();
        in_time("the shutdown", ending).await.unwrap();
        let held = other.leases().inspect(named("plan").name()).await.unwrap();
        assert_eq!(handed.is_ok(), held.is_some(), "{chosen:?}: {handed:?}, {held:?}");
    }
}

/// A row that somebody has locked is waited for as long as there is time.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_takes_the_time_that_it_was_given() {
    let bench = Bench::start(2).await;
    let guard = bench.process.leases().try_acquire(&named("a")).await.unwrap();
    let lock_row = "BEGIN; SELECT FROM leasehold.leases FOR UPDATE";
    let stranger = bench.database.client().await;
    stranger.batch_execute(lock_row).await.unwrap();
    let process = bench.process.clone();
    let ending = tokio::spawn(async move { process.shutdown(PATIENCE).await });
    in_time("the shutdown", guard.lost()).await;
    // Longer than the thread takes when nobody said how long it may.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!ending.is_finished());
    assert!(bench.lease_is_live(guard.name()).await);
    stranger.batch_execute("ROLLBACK").await.unwrap();
    in_time("the shutdown", ending).await.unwrap();
    assert!(!bench.lease_is_live(guard.name()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_takes_no_longer_than_it_was_given() {
    let bench = Bench::start(2).await;
    let guard = bench.process.leases().try_acquire(&named("a")).await.unwrap();
    let lock_row = "BEGIN; SELECT FROM leasehold.leases FOR UPDATE";
    bench.client.batch_execute(lock_row).await.unwrap();
    let grace = Duration::from_millis(300);
    let shutdown = bench.process.shutdown(grace);
    // To give it back it would wait for the row, for ever.
    let ended = tokio::time::timeout(grace + Duration::from_secs(10), shutdown).await;
    assert!(ended.is_ok());
    assert!(guard.is_lost());
}

/// Everything that can be awaited is dropped after every number of polls.
#[tokio::test(flavor = "multi_thread")]
async fn futures_that_are_dropped_at_any_poll_leave_nothing() {
    let bench = Bench::start(3).await;
    for mode in MODES {
        let lock = bench.lock(mode);
        for polls in 0..60 {
            let mut all = Box::pin(async {
                let guard = lock.acquire(&for_a_write("plan"), PATIENCE).await.unwrap();
                lock.extend(&guard, Duration::from_secs(30)).await.unwrap();
                lock.inspect(guard.name()).await.unwrap();
                let write = bench.process.fenced_transaction_releasing(&guard, async |conn| {
                    insert(conn, -polls).await.or(Ok::<_, Failure>(()))
                });
                drop(write.await);
                lock.release(guard).await.unwrap();
            });
            for _ in 0..polls {
                if (&mut all).now_or_never().is_some() {
                    break;
                }
                // Time for what it waits for to come.
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            drop(all);
            eventually("the lock is free", async || {
                lock.inspect(for_a_write("plan").name()).await.unwrap().is_none()
            })
            .await;
        }
        eventually("no lock is left", async || {
            bench.database.advisory_locks(&bench.client).await == 0
        })
        .await;
    }
    eventually("no connection is in use", async || {
        let pool = bench.process.pool().state();
        pool.open == pool.idle
    })
    .await;
}
