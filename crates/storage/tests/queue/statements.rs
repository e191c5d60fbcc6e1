//! Transactions of the caller, and what the statements cost.

use std::time::Duration;

use leasehold_domain::{NewWork, Outcome, QueueError, Retention, Scope, WorkQueue};
use leasehold_embedded::Cluster;
use leasehold_storage::migrate::Migrations;
use leasehold_storage::{ConnectOptions, Database, TransactionError, Worker, WorkerOptions};

use super::{Bench, Run, request, work};
use crate::support::{client, eventually};

/// What a transaction of the caller enqueues is there when that commits, and not before, and never if it rolls back.
#[tokio::test(flavor = "multi_thread")]
async fn enqueue_in_tx_is_part_of_the_transaction() {
    let bench = Bench::start().await;
    let many: Vec<NewWork> = (0..1500).rev().map(|n| work(&n.to_string())).collect();
    let rolled_back = bench
        .process
        .transaction(async |conn| {
            bench.queue.enqueue_in_tx(conn, &many).await.unwrap();
            assert!(bench.is_empty().await, "nobody else sees it");
            Err::<(), _>("no")
        })
        .await;
    assert!(matches!(rolled_back, Err(TransactionError::Work("no"))));
    assert!(bench.is_empty().await);
    let committed = bench
        .process
        .transaction(async |conn| bench.queue.enqueue_in_tx(conn, &many).await)
        .await;
    committed.unwrap();
    assert_eq!(
        bench.number("SELECT count(*) FROM leasehold.work_items").await,
        1500
    );
}

/// A bad scope is refused before anything is sent: the transaction goes on.
#[tokio::test(flavor = "multi_thread")]
async fn enqueue_in_tx_refuses_before_it_sends() {
    let bench = Bench::start().await;
    let committed = bench
        .process
        .transaction(async |conn| {
            let bad = [work("1"), work("")];
            let refused = bench.queue.enqueue_in_tx(conn, &bad).await;
            assert!(matches!(refused, Err(QueueError::Invalid(_))), "{refused:?}");
            bench.queue.enqueue_in_tx(conn, &[work("2")]).await
        })
        .await;
    committed.unwrap();
    assert_eq!(bench.text("SELECT scope_id FROM leasehold.work_items").await, "2");
}

/// What the work has written and that it is done become true together, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn complete_in_tx_is_part_of_the_transaction() {
    let bench = Bench::start().await;
    bench.enqueue([1, 2]).await;
    let claims = bench.queue.claim(&request().with_batch(2)).await.unwrap().claims;
    let keys = [claims[0].key, claims[1].key];
    for commits in [false, true] {
        let ended = bench
            .process
            .transaction(async |conn| {
                let outcomes = bench.queue.complete_in_tx(conn, &keys).await.unwrap();
                assert_eq!(outcomes, [Outcome::Done, Outcome::Done]);
                if commits { Ok(()) } else { Err("no") }
            })
            .await;
        assert_eq!(ended.is_ok(), commits);
        assert_eq!(bench.is_empty().await, commits);
    }
    let late = bench.queue.complete(&keys).await.unwrap();
    assert_eq!(late, [Outcome::NotOwned, Outcome::NotOwned]);
}

/// Statements that were prepared while the tables were empty do not read all of them when they are full: nothing that
/// workers and producers do reads a table from end to end, and what rests or is claimed costs nothing.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_no_statement_reads_a_whole_table() {
    let bench = Bench::start().await;
    let retention = Retention::default();
    let everything = async || {
        bench.enqueue(0..4).await;
        let claims = bench.queue.claim(&request().with_batch(4)).await.unwrap().claims;
        let keys: Vec<_> = claims.iter().map(|claim| claim.key).collect();
        bench
            .queue
            .extend(&keys, Duration::from_secs(3600))
            .await
            .unwrap();
        bench.queue.complete(&keys[..1]).await.unwrap();
        let error = "error".to_owned();
        let retry = leasehold_domain::Retry {
            claim: keys[1],
            error: error.clone(),
            backoff: Duration::ZERO,
        };
        bench.queue.retry(&[retry]).await.unwrap();
        let failure = leasehold_domain::Failure {
            claim: keys[2],
            error,
        };
        bench.queue.fail(&[failure]).await.unwrap();
        bench.queue.give_back(&keys[3..]).await.unwrap();
        let claims = bench.queue.claim(&request().with_batch(2)).await.unwrap().claims;
        let keys: Vec<_> = claims.iter().map(|claim| claim.key).collect();
        bench.queue.complete(&keys).await.unwrap();
    };
    // More often than it takes for plans to be kept.
    for _ in 0..10 {
        everything().await;
    }
    bench.queue.purge_dead_letters(&retention).await.unwrap();
    // In a session that ends before the first look, or what it reads here itself would be told after that.
    bench
        .database
        .client()
        .await
        .batch_execute(
            "TRUNCATE leasehold.work_items, leasehold.work_claims, leasehold.dead_letters;
             INSERT INTO leasehold.work_items
                 (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts, parked_until)
             SELECT 'acme', 'reindex', 'filler', n::text, 100, clock_timestamp(), 10,
                    CASE WHEN n <= 50000 THEN clock_timestamp() + interval '1 hour' END
             FROM generate_series(1, 100000) AS n;
             INSERT INTO leasehold.work_claims (item_id, expires_at, generation, attempt_count)
             SELECT id, parked_until, 1, 1 FROM leasehold.work_items WHERE parked_until IS NOT NULL;
             INSERT INTO leasehold.dead_letters
                 (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts, attempt_count, last_error)
             SELECT 'acme', 'reindex', 'filler', n::text, 100, clock_timestamp(), 10, 10, 'error'
             FROM generate_series(1, 10000) AS n;",
        )
        .await
        .unwrap();
    // What is urgent stands before the filler, and what rests stands behind a thing that is claimed.
    for _ in 0..10 {
        let scans = "SELECT relname::text, seq_tup_read, coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables
                     WHERE schemaname = 'leasehold' AND relname IN ('work_items', 'work_claims', 'dead_letters')
                     ORDER BY relname";
        let read = async || -> Vec<(String, i64, i64)> {
            // Sessions tell what they did when they have been idle for a second or so; new ones see it at once.
            let rows = bench.client.query(scans, &[]).await.unwrap();
            rows.iter()
                .map(|row| (row.get(0), row.get(1), row.get(2)))
                .collect()
        };
        flush(&bench).await;
        let before = read().await;
        let urgent: Vec<NewWork> = (0..4)
            .map(|n| work(&format!("urgent {n}")).with_priority(1))
            .collect();
        bench.queue.enqueue_many(&urgent).await.unwrap();
        everything().await;
        flush(&bench).await;
        for (before, after) in before.iter().zip(read().await) {
            assert_eq!(after.1 - before.1, 0, "rows read from end to end of {}", after.0);
            let fetched = after.2 - before.2;
            assert!(fetched < 1000, "{fetched} rows of {} were read", after.0);
        }
    }
}

/// Waits until every session has told its statistics.
async fn flush(bench: &Bench) {
    // Told when the session ends.
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()";
    eventually("every session has ended", async || bench.number(sql).await == 0).await;
    bench
        .client
        .batch_execute("SELECT pg_stat_clear_snapshot()")
        .await
        .unwrap();
}

/// Heartbeats move no row to another page and change no index (HOT), or tables would grow with time.
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_are_hot() {
    // On a server of its own: old versions stay while a transaction is open in any of its databases.
    let cluster = Cluster::temporary().set("autovacuum", "off").start().unwrap();
    let options = ConnectOptions::parse(&cluster.url("postgres"), None).unwrap();
    Migrations::storage().run(&options).await.unwrap();
    let process = Database::connect(options, 2).await.unwrap();
    let queue = process.work_queue();
    let client = client(&cluster.url("postgres")).await;
    let many: Vec<NewWork> = (0..100).map(|n| work(&n.to_string())).collect();
    queue.enqueue_many(&many).await.unwrap();
    let claims = queue.claim(&request().with_batch(100)).await.unwrap().claims;
    let keys: Vec<_> = claims.iter().map(|claim| claim.key).collect();
    let number = async |sql: &str| -> i64 { client.query_one(sql, &[]).await.unwrap().get(0) };
    let pages = "SELECT pg_relation_size('leasehold.work_claims')";
    let before = number(pages).await;
    for minutes in 61..161 {
        let lease = Duration::from_secs(60 * minutes);
        queue.extend(&keys, lease).await.unwrap();
    }
    process.shutdown(Duration::from_secs(5)).await;
    drop((queue, process));
    eventually("the updates are counted", async || {
        let updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'work_claims'";
        number(updates).await == 10_000
    })
    .await;
    let hot = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'work_claims'";
    let hot = number(hot).await;
    assert!(hot >= 9_000, "{hot} of 10000 were HOT");
    let after = number(pages).await;
    assert!(
        after <= 2 * before,
        "the table grew from {before} to {after} bytes"
    );
}

/// A worker removes dead letters that are too old or too many, and what is left of claims of a removed tenant.
#[tokio::test(flavor = "multi_thread")]
async fn workers_tidy_up() {
    let bench = Bench::start().await;
    bench
        .client
        .batch_execute(
            "INSERT INTO leasehold.dead_letters
                 (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts, attempt_count, last_error,
                  failed_at)
             SELECT 'acme', 'reindex', 'plan', n::text, 100, clock_timestamp(), 1, 1, 'error',
                    clock_timestamp() - n * interval '1 hour'
             FROM generate_series(3000, 1, -1) AS n;
             INSERT INTO leasehold.work_claims (item_id, expires_at, generation, attempt_count)
             SELECT n, clock_timestamp(), 1, 1 FROM generate_series(1000001, 1002500) AS n;
             INSERT INTO leasehold.work_claims (item_id, token, worker, claimed_at, expires_at, generation, attempt_count)
             VALUES (1, gen_random_uuid(), 'somebody', clock_timestamp(), clock_timestamp() + interval '1 hour', 1, 1)",
        )
        .await
        .unwrap();
    let retention = Retention {
        age: Duration::from_secs(48 * 3600 - 1800),
        number: 1000,
    };
    let options = WorkerOptions::new(["reindex"], "test").with_retention(retention);
    let processor = Run(async |_| unreachable!("there is nothing to do"));
    let worker = Worker::start(&bench.queue, options, processor, ()).unwrap();
    eventually("only young letters are left", async || {
        bench.number("SELECT count(*) FROM leasehold.dead_letters").await == 47
    })
    .await;
    eventually("only live claims are left", async || {
        bench.number("SELECT count(*) FROM leasehold.work_claims").await == 1
    })
    .await;
    worker.stop(Duration::ZERO).await;
}

/// Two transactions that enqueue many scopes in other orders do not deadlock: the calls put them in one order.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_enqueue_in_one_order() {
    let bench = Bench::start().await;
    let mut tasks = tokio::task::JoinSet::new();
    for producer in 0..4_usize {
        let (process, queue) = (bench.process.clone(), bench.queue.clone());
        tasks.spawn(async move {
            for round in 0..10 {
                let mut many: Vec<NewWork> = (0..60)
                    .map(|n| {
                        NewWork::new(Scope::new(
                            "acme",
                            "reindex",
                            "plan",
                            ((n + round) % 60).to_string(),
                        ))
                    })
                    .collect();
                if producer % 2 == 0 {
                    many.reverse();
                }
                let done = process.transaction(async |conn| queue.enqueue_in_tx(conn, &many).await);
                done.await.unwrap();
            }
        });
    }
    tokio::time::timeout(Duration::from_secs(60), tasks.join_all())
        .await
        .expect("nobody waits for ever");
    assert_eq!(
        bench.number("SELECT count(*) FROM leasehold.work_items").await,
        60
    );
}
