//! Many producers, workers in processes of their own, and processes that die.

use std::process::Stdio;
use std::time::{Duration, Instant};

use leasehold_conformance::this_test_binary;
use leasehold_domain::{NewWork, WorkQueue};
use leasehold_storage::{ConnectOptions, Database, PgWorkQueue, Processed, Worker, WorkerOptions};
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::{Bench, Run, work};
use crate::support::{client, eventually};

const URL: &str = "LEASEHOLD_TEST_QUEUE_DATABASE_URL";
const LEASE_MS: &str = "LEASEHOLD_TEST_QUEUE_LEASE_MS";

/// Notes in the table `seen` what it works on. `abort` ends the process, and `hang` never ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process for the tests of this module"]
async fn worker_process() {
    let url = std::env::var(URL).expect("a test starts this process");
    let lease_ms = std::env::var(LEASE_MS).expect("a test starts this process");
    let database = Database::connect(ConnectOptions::parse(&url, None).unwrap(), 8)
        .await
        .unwrap();
    let notes = std::sync::Arc::new(client(&url).await);
    let ready = "INSERT INTO seen VALUES ('ready', 0, 0)";
    notes.batch_execute(ready).await.unwrap();
    let processor = Run(move |claim: leasehold_domain::Claim| {
        let notes = std::sync::Arc::clone(&notes);
        async move {
            let payload = claim.payload.clone().unwrap_or_default();
            let number = payload.as_i64().unwrap_or(0);
            let note = "INSERT INTO seen VALUES ($1, $2, $3)";
            let attempt = i32::try_from(claim.attempt)?;
            notes
                .execute(note, &[&claim.scope.scope_id, &number, &attempt])
                .await?;
            match payload.as_str() {
                Some("abort") => std::process::abort(),
                Some("hang") if claim.attempt == 1 => std::future::pending().await,
                _ => {
                    // So long that it is likely to be enqueued meanwhile.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    Ok(Processed::Done)
                }
            }
        }
    });
    let options = WorkerOptions::new(["reindex"], "child")
        .with_batch(4)
        .with_poll(Duration::from_millis(100))
        .with_lease(Duration::from_millis(lease_ms.parse().unwrap()));
    let worker = Worker::start(&database.work_queue(), options, processor, ()).unwrap();
    // The parent that goes away closes it.
    tokio::task::spawn_blocking(|| std::io::stdin().lines().count())
        .await
        .unwrap();
    worker.stop(Duration::from_secs(10)).await;
}

fn start_process(bench: &Bench, lease: Duration) -> Child {
    let mut command: Command = this_test_binary("queue::load::worker_process");
    command
        .env(URL, bench.database.url())
        .env(LEASE_MS, lease.as_millis().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command.spawn().unwrap()
}

async fn start() -> Bench {
    let bench = Bench::start().await;
    let seen = "CREATE TABLE seen (scope TEXT, number BIGINT, attempt INTEGER, at TIMESTAMPTZ DEFAULT clock_timestamp())";
    bench.client.batch_execute(seen).await.unwrap();
    bench
}

/// How work comes in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Producer {
    /// By this crate.
    Ours,
    /// As queues do that leave alone what is claimed.
    SkipsClaimed,
}

const SCOPES: i64 = 50;

/// Producers enqueue `rounds` times each scope, with growing numbers, while workers in three processes work. Answers
/// the scopes whose last number nobody has seen when all is quiet.
async fn lost_events(producer: Producer, rounds: i64) -> Vec<String> {
    let bench = start().await;
    let mut workers: Vec<Child> = (0..3)
        .map(|_| start_process(&bench, Duration::from_secs(30)))
        .collect();
    eventually("the workers are there", async || {
        bench.number("SELECT count(*) FROM seen").await == 3
    })
    .await;
    let mut producers = JoinSet::new();
    for first in 0..10 {
        let (queue, client) = (bench.other().await, bench.database.client().await);
        producers.spawn(async move {
            for round in 1..=rounds {
                // Each has its own scopes, so that the numbers of a scope grow.
                let mine: Vec<i64> = (first..SCOPES).step_by(10).collect();
                // Half of them one by one, half in one call.
                let size = if round % 2 == 0 { mine.len() } else { 1 };
                for scopes in mine.chunks(size) {
                    produce(producer, &queue, &client, scopes, round).await;
                }
            }
        });
    }
    let all = tokio::time::timeout(Duration::from_secs(150), producers.join_all()).await;
    all.expect("nobody waits for ever");
    eventually("all work is done", async || bench.is_empty().await).await;
    for mut worker in workers.drain(..) {
        drop(worker.stdin.take());
        assert!(worker.wait().await.unwrap().success(), "a worker stops by itself");
    }
    let dead = bench.number("SELECT count(*) FROM leasehold.dead_letters").await;
    assert_eq!(dead, 0, "to be busy is no failure");
    let ready = "DELETE FROM seen WHERE scope = 'ready'";
    bench.client.batch_execute(ready).await.unwrap();
    let backwards = "SELECT count(*) FROM (
            SELECT number < lag(number) OVER (PARTITION BY scope ORDER BY at) AS back FROM seen
        ) AS steps WHERE back";
    assert_eq!(bench.number(backwards).await, 0, "what is seen later is newer");
    let lost = "SELECT wanted.id::text FROM generate_series(0, $1::bigint - 1) AS wanted(id)
                WHERE NOT EXISTS (SELECT FROM seen s WHERE s.scope = wanted.id::text AND s.number = $2)";
    let rows = bench.client.query(lost, &[&SCOPES, &rounds]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn produce(producer: Producer, queue: &PgWorkQueue, client: &Client, scopes: &[i64], number: i64) {
    let ids = scopes.iter().map(i64::to_string);
    match producer {
        Producer::Ours => {
            let many: Vec<NewWork> = ids.map(|id| work(&id).with_payload(json!(number))).collect();
            queue.enqueue_many(&many).await.unwrap();
        }
        Producer::SkipsClaimed => {
            let skip = "INSERT INTO leasehold.work_items AS w
                    (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts)
                SELECT 'acme', 'reindex', 'plan', n.id, $2, 100, clock_timestamp(), 10
                FROM unnest($1::text[]) AS n(id)
                ON CONFLICT ON CONSTRAINT work_items_one_a_scope DO UPDATE
                SET generation = w.generation + 1, payload = excluded.payload
                WHERE NOT EXISTS (
                    SELECT FROM leasehold.work_claims c WHERE c.item_id = w.id AND c.expires_at > clock_timestamp()
                )";
            let ids: Vec<String> = ids.collect();
            client.execute(skip, &[&ids, &json!(number)]).await.unwrap();
        }
    }
}

/// 60,000 enqueues of 50 scopes, while workers in three processes complete them: the last of each scope is always seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heavy_no_event_is_lost() {
    assert_eq!(lost_events(Producer::Ours, 1200).await, [""; 0]);
}

/// The same with an enqueue that skips what is claimed loses some: the test above can fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heavy_a_queue_that_skips_claimed_rows_loses_events() {
    assert_ne!(lost_events(Producer::SkipsClaimed, 40).await, [""; 0]);
}

/// A process is killed in the middle of an item: another works on it again, after the lease at the latest.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_replaced_after_the_lease() {
    let bench = start().await;
    let lease = Duration::from_secs(3);
    let mut first = start_process(&bench, lease);
    bench
        .queue
        .enqueue(&work("1").with_payload(json!("hang")))
        .await
        .unwrap();
    let begun = async |attempt: i32| {
        let sql = "SELECT count(*) FROM seen WHERE attempt = $1";
        let row = bench.client.query_one(sql, &[&attempt]).await.unwrap();
        row.get::<_, i64>(0) == 1
    };
    eventually("it is begun", async || begun(1).await).await;
    let mut second = start_process(&bench, lease);
    first.kill().await.unwrap();
    let killed = Instant::now();
    eventually("it is begun again", async || begun(2).await).await;
    // A beat of the first may have come just before its end; starting a process takes some time as well.
    assert!(killed.elapsed() < lease * 3, "{:?}", killed.elapsed());
    eventually("it is done", async || bench.is_empty().await).await;
    drop(second.stdin.take());
    second.wait().await.unwrap();
}

/// An item that ends its process each time is a dead letter after its attempts, with a word of what happened; others go
/// on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_kills_processes_is_given_up() {
    let bench = start().await;
    let poison = work("poison").with_payload(json!("abort")).with_max_attempts(3);
    bench.queue.enqueue(&poison).await.unwrap();
    let mut others = 0_u32;
    let mut died = 0;
    let started = Instant::now();
    while bench.number("SELECT count(*) FROM leasehold.dead_letters").await == 0 {
        assert!(
            started.elapsed() < Duration::from_secs(100),
            "it is never given up"
        );
        let mut process = start_process(&bench, Duration::from_secs(3));
        loop {
            bench.enqueue([others]).await;
            others += 1;
            if process.try_wait().unwrap().is_some() {
                died += 1;
                break;
            }
            if bench.number("SELECT count(*) FROM leasehold.dead_letters").await == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(process.stdin.take());
        process.wait().await.unwrap();
    }
    assert_eq!(died, 3);
    let row = "SELECT attempt_count, last_error FROM leasehold.dead_letters";
    let row = bench.client.query_one(row, &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 3);
    assert_eq!(row.get::<_, String>(1), "not finished by child");
    let mut last = start_process(&bench, Duration::from_secs(3));
    eventually("the others are done", async || bench.is_empty().await).await;
    drop(last.stdin.take());
    assert!(last.wait().await.unwrap().success());
    let seen = "SELECT count(DISTINCT scope) FROM seen WHERE scope NOT IN ('poison', 'ready')";
    assert_eq!(bench.number(seen).await, i64::from(others));
}
