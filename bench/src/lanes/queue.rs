//! Work items that need nothing done: claimed, worked on, completed; and what a claim costs when many went through.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use leasehold_domain::{Claim, ClaimKey, ClaimRequest, NewWork, Outcome, Scope, WorkQueue};
use leasehold_storage::{Database, PgWorkQueue, Processed, Processor, Worker, WorkerHooks, WorkerOptions};
use tokio::process::Command;
use tokio_postgres::Client;

use crate::capture::Captured;
use crate::database::BenchDatabase;
use crate::group::{self, Group};
use crate::measure::{self, Lane, Sample};
use crate::{Bench, PEER, Result, pgbench};

const KIND: &str = "bench";
/// Of the worker's pool: one claims, another settles, and one has the heartbeats.
const POOL: u32 = 4;

const FILL: &str = "\
INSERT INTO leasehold.work_items (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts)
SELECT 'bench', 'bench', 'item', n::text, 100, clock_timestamp(), 10 FROM generate_series(1, $1::bigint) AS n";
const EMPTY: &str = "TRUNCATE leasehold.work_items, leasehold.work_claims";
const LEFT: &str = "SELECT count(*) FROM leasehold.work_items";

/// The statements of a round of work: a claim, and the end of what was claimed.
struct Sent {
    claim: String,
    complete: String,
}

impl Sent {
    async fn capture(database: &BenchDatabase) -> Result<Self> {
        let sent = Captured::of(database, async |db| {
            let queue = db.work_queue();
            queue.enqueue(&NewWork::new(scope(0))).await?;
            let claimed = queue.claim(&request(1)).await?;
            queue.complete(&keys(&claimed.claims)).await?;
            Ok(())
        })
        .await?;
        Ok(Self {
            claim: sent.find("leasehold.claim_work(")?,
            complete: sent.find("leasehold.complete_work(")?,
        })
    }

    /// Both as a script, which hands the ids and tokens of the one to the other.
    fn script(&self, batch: usize) -> String {
        let (kinds, batch) = (format!("'{{{KIND}}}'"), batch.to_string());
        let claim = pgbench::statement(&self.claim, &[&kinds, &batch, "'pgbench'", "30000000"]);
        let complete = pgbench::statement(&self.complete, &[":ids", ":tokens"]);
        format!(
            "SELECT coalesce(array_agg(id), '{{}}')::text AS ids, coalesce(array_agg(token), '{{}}')::text AS tokens
             FROM ({}) AS claimed \\gset\n{complete}",
            claim.trim_end().trim_end_matches(';')
        )
    }
}

fn scope(number: usize) -> Scope {
    Scope::new("bench", KIND, "item", number.to_string())
}

fn request(batch: usize) -> ClaimRequest {
    ClaimRequest::new([KIND], "bench").with_batch(batch)
}

fn keys(claims: &[Claim]) -> Vec<ClaimKey> {
    claims.iter().map(|claim| claim.key).collect()
}

/// For each size of a batch and each number of processors.
pub(crate) async fn no_op(bench: &Bench, database: &BenchDatabase) -> Result {
    for batch in [1, 10, 100] {
        for processors in &bench.options.clients {
            no_op_in(bench, database, batch, *processors).await?;
        }
    }
    Ok(())
}

async fn no_op_in(bench: &Bench, database: &BenchDatabase, batch: usize, processors: u32) -> Result {
    let mut group = Group::new(
        format!("queue: items that need nothing done, batches of {batch}, {processors} at once"),
        "items/s",
        &["pgbench", "pgbench, 1", "graphile_worker"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let process = database.open(POOL).await?;
    group.add(Box::new(Ours {
        client: database.client().await?,
        queue: process.work_queue(),
        _process: process,
        batch,
        options: WorkerOptions::new([KIND], "bench")
            .with_batch(batch)
            .with_concurrency(processors as usize),
    }));
    if let Some(pgbench) = &bench.pgbench {
        let script = Sent::capture(database).await?.script(batch);
        let lanes = [("pgbench", processors), ("pgbench, 1", 1)];
        // One client is both.
        for (name, clients) in lanes.into_iter().take(processors.min(2) as usize) {
            group.add(Box::new(Filled {
                client: database.client().await?,
                batch,
                lane: pgbench.lane(name, database, clients, &script)?,
            }));
        }
    }
    if let Some(program) = &bench.peer {
        group.add(Box::new(Peer {
            program: program.clone(),
            url: database.url.clone(),
            batch,
            processors,
        }));
    } else {
        println!("graphile_worker: {PEER} names no program; its lane is left out");
    }
    bench.measure(group).await
}

/// More items than can be done in a turn.
fn enough(batch: usize, window: Duration) -> i64 {
    let a_second = match batch {
        1 => 15_000,
        2..=20 => 60_000,
        _ => 150_000,
    };
    a_second * i64::try_from(window.as_secs().max(1)).unwrap_or(i64::MAX)
}

async fn fill(client: &Client, items: i64) -> Result {
    client.batch_execute(EMPTY).await?;
    client.execute(FILL, &[&items]).await?;
    Ok(())
}

/// How many of these items are gone.
async fn done(client: &Client, items: i64) -> Result<i64> {
    match client.query_one(LEFT, &[]).await?.get(0) {
        0 => Err("nothing was left to do before the time was over".into()),
        left => Ok(items - left),
    }
}

/// A lane of pgbench, which finds a full queue.
struct Filled {
    client: Client,
    batch: usize,
    lane: Box<dyn Lane>,
}

#[async_trait]
impl Lane for Filled {
    fn name(&self) -> &str {
        self.lane.name()
    }

    /// Its connections are new in each turn.
    async fn warm_up(&mut self) -> Result {
        Ok(())
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let items = enough(self.batch, window);
        fill(&self.client, items).await?;
        let sample = self.lane.run(window).await?;
        // Claimants that meet get less than they asked for.
        let items = done(&self.client, items).await?;
        let window = window.as_secs().max(1);
        Ok(Sample {
            rate: items as f64 / window as f64,
            ..sample
        })
    }
}

struct Ours {
    client: Client,
    queue: PgWorkQueue,
    _process: Database,
    batch: usize,
    options: WorkerOptions,
}

struct NoOp;

#[async_trait]
impl Processor for NoOp {
    async fn process(
        &self,
        _: &Claim,
    ) -> std::result::Result<Processed, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Processed::Done)
    }
}

/// How many items were completed.
#[derive(Clone, Default)]
struct Count(Arc<AtomicU64>);

impl WorkerHooks for Count {
    fn on_processed(&self, _: &Claim, _: Outcome) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[async_trait]
impl Lane for Ours {
    fn name(&self) -> &str {
        "leasehold"
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let items = enough(self.batch, window);
        fill(&self.client, items).await?;
        let completed = Count::default();
        let (start, spent) = (Instant::now(), measure::cpu_time());
        let worker = Worker::start(&self.queue, self.options.clone(), NoOp, completed.clone())?;
        tokio::time::sleep(window).await;
        let (completed, took) = (completed.0.load(Ordering::Relaxed), start.elapsed());
        let spent = measure::cpu_time().saturating_sub(spent);
        worker.stop(Duration::from_secs(5)).await;
        done(&self.client, items).await?;
        Ok(Sample {
            rate: completed as f64 / took.as_secs_f64(),
            latency: None,
            cpu: u32::try_from(completed)
                .ok()
                .and_then(|items| spent.checked_div(items)),
        })
    }
}

/// Another library, in a program of its own: it prints its items a second.
struct Peer {
    program: PathBuf,
    url: String,
    batch: usize,
    processors: u32,
}

#[async_trait]
impl Lane for Peer {
    fn name(&self) -> &str {
        "graphile_worker"
    }

    /// It starts anew in each turn.
    async fn warm_up(&mut self) -> Result {
        Ok(())
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let output = Command::new(&self.program)
            .arg(&self.url)
            .arg(enough(self.batch, window).to_string())
            .arg(self.batch.to_string())
            .arg(self.processors.to_string())
            .arg(window.as_secs().max(1).to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await?;
        match String::from_utf8_lossy(&output.stdout).trim().parse() {
            Ok(rate) if output.status.success() => Ok(Sample {
                rate,
                latency: None,
                cpu: None,
            }),
            _ => {
                let error = String::from_utf8_lossy(&output.stderr);
                Err(format!("graphile_worker: {}", error.trim()).into())
            }
        }
    }
}

/// How many items go through the tables, and in what portions they are enqueued.
const THROUGH: usize = 200_000;
const PORTION: usize = 10_000;
const VACUUM: &str = "VACUUM leasehold.work_items, leasehold.work_claims";
/// Where claims are timed, and in between.
const TIMED: usize = 10;
const UNTIMED: usize = 100;

/// What a claim costs, and how large the tables are, when many items have gone through them.
pub(crate) async fn growth(bench: &Bench) -> Result {
    let title = format!("queue: claims of {TIMED} and sizes, by the items that went through");
    if !bench.wants(&title) {
        return Ok(());
    }
    let database = bench.server.create("leasehold_bench_queue").await?;
    let (db, client) = (database.open(1).await?, database.client().await?);
    let queue = db.work_queue();
    println!(
        "\n{title}\n  {:>8} {:>10} {:>10} {:>12} {:>12} {:>8}",
        "items", "p50", "p99", "work_items", "work_claims", "seconds"
    );
    let start = Instant::now();
    for first in (0..=THROUGH).step_by(PORTION) {
        if first == THROUGH {
            // As the server does by itself, but not each minute here.
            client.batch_execute(VACUUM).await?;
        }
        let work: Vec<_> = (first..first + PORTION)
            .map(|number| NewWork::new(scope(number)))
            .collect();
        queue.enqueue_many(&work).await?;
        let last = first + PORTION;
        if first != 0 && last != THROUGH / 2 && last < THROUGH {
            empty(&queue, UNTIMED).await?;
            continue;
        }
        let mut times = empty(&queue, TIMED).await?;
        times.sort_unstable();
        let [half, most] = [0.5, 0.99].map(|fraction| {
            let time = measure::percentile(&times, fraction);
            group::readable(time.map_or(f64::NAN, |time| time.as_secs_f64()))
        });
        let sizes = "SELECT pg_size_pretty(pg_total_relation_size('leasehold.work_items')),
                            pg_size_pretty(pg_total_relation_size('leasehold.work_claims'))";
        let sizes = client.query_one(sizes, &[]).await?;
        println!(
            "  {last:>8} {half:>10} {most:>10} {:>12} {:>12} {:>8.0}",
            sizes.get::<_, String>(0),
            sizes.get::<_, String>(1),
            start.elapsed().as_secs_f64()
        );
    }
    db.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

/// Claims and completes until nothing is left. Answers how long each claim took.
async fn empty(queue: &PgWorkQueue, batch: usize) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    loop {
        let start = Instant::now();
        let claimed = queue.claim(&request(batch)).await?;
        if claimed.claims.is_empty() {
            return Ok(times);
        }
        times.push(start.elapsed());
        queue.complete(&keys(&claimed.claims)).await?;
    }
}
