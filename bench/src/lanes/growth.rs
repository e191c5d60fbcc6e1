//! What one operation costs as the number of lock names, and of held leases, grows.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use leasehold_domain::{DistributedLock, LockGuard, Monotonic, MonotonicClock};
use leasehold_storage::{Database, PgLeaseLock};

use crate::database::BenchDatabase;
use crate::group::{self, Group};
use crate::lanes::request;
use crate::measure::{Client, Clients};
use crate::{Bench, Result};

const CLIENTS: u32 = 8;
/// How many rows the table has.
const ROWS: [u32; 3] = [100, 10_000, 1_000_000];

/// The encoding of names such as `["row", "17"]`.
const FILL: &str = "
    INSERT INTO leasehold.leases (name, fencing_token)
    SELECT '|3:row|' || length(number::text) || ':' || number, 1 FROM generate_series(0, $1::int - 1) AS number";

/// Names out of all rows, each client in an order of its own.
struct Anywhere {
    lock: PgLeaseLock,
    rows: u32,
    next: u32,
}

impl Client for Anywhere {
    async fn once(&mut self) -> Result {
        // A full cycle through the rows (Hull and Dobell), spread over the whole table.
        self.next = self.next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let row = (u64::from(self.next) * u64::from(self.rows)) >> 32;
        let request = request(&["row", &row.to_string()])?;
        // Two clients may meet in a small table.
        if let Ok(guard) = self.lock.try_acquire(&request).await {
            self.lock.release(guard).await?;
        }
        Ok(())
    }
}

/// Each client the same few names all the time.
struct Few {
    lock: PgLeaseLock,
    own: u32,
}

impl Client for Few {
    async fn once(&mut self) -> Result {
        let guard = self
            .lock
            .try_acquire(&request(&["row", &self.own.to_string()])?)
            .await?;
        self.lock.release(guard).await?;
        Ok(())
    }
}

/// The same work on tables of growing size, in databases of their own, so that the sizes take turns.
pub(crate) async fn rows(bench: &Bench) -> Result {
    let title = format!("growth: acquire + release by {CLIENTS} clients, by the rows in the table");
    if !bench.wants(&title) {
        return Ok(());
    }
    let mut few = Group::new(
        format!("{title}; the same {CLIENTS} names"),
        "pairs/s",
        &["100 rows"],
    );
    let mut anywhere = Group::new(
        format!("{title}; names from the whole table"),
        "pairs/s",
        &["100 rows"],
    );
    for (rows, name) in ROWS
        .into_iter()
        .zip(["100 rows", "10,000 rows", "1,000,000 rows"])
    {
        let database = bench.server.create(&format!("leasehold_bench_{rows}")).await?;
        let client = database.client().await?;
        client.execute(FILL, &[&i32::try_from(rows)?]).await?;
        client.batch_execute("VACUUM ANALYZE leasehold.leases").await?;
        client.batch_execute("CHECKPOINT").await?;
        let db = database.open(CLIENTS).await?;
        let lock = db.leases();
        let clients = (0..CLIENTS).map(|index| Few {
            lock: lock.clone(),
            own: index * (rows / CLIENTS),
        });
        few.add(Clients::lane(name, clients.collect()));
        let clients = (0..CLIENTS).map(|index| Anywhere {
            lock: lock.clone(),
            rows,
            next: index * 123_456_789,
        });
        anywhere.add(Clients::lane(name, clients.collect()));
    }
    bench.measure(few).await?;
    bench.measure(anywhere).await
}

/// How many leases are held, and the slice of each: a beat comes after a third of it.
const HELD: [(usize, Duration); 3] = [
    (1, Duration::from_millis(1_500)),
    (1_000, Duration::from_millis(3_000)),
    (100_000, Duration::from_secs(15)),
];
/// Guards that are looked at: a beat renews thousands at once, so few show them all.
const WATCHED: usize = 500;
const LOOK: Duration = Duration::from_micros(500);

/// The heartbeat as the process feels it: from before a statement is sent until its guards know.
pub(crate) async fn renewal(bench: &Bench) -> Result {
    let title = "growth: renewal by heartbeat, by held leases (a statement renews up to 10,000)";
    if !bench.wants(title) {
        return Ok(());
    }
    let database = bench.server.create("leasehold_bench_renewal").await?;
    println!(
        "\n{title}\n  {:>8} {:>11} {:>14} {:>14}",
        "leases", "statements", "a statement", "all of them"
    );
    for (count, ttl) in HELD {
        let db = database.open(CLIENTS).await?;
        let guards = hold(&db, count, ttl).await?;
        let beats = watch(&guards, ttl).await;
        let times = beats.iter().map(|beat| beat.took.as_secs_f64());
        let (statements, all) = (beats.len(), beats.iter().map(|beat| beat.took).sum::<Duration>());
        // Within a third of a slice every lease is renewed once.
        println!(
            "  {count:>8} {statements:>11} {:>14} {:>14}",
            group::readable(group::median(times)),
            group::readable(all.as_secs_f64()),
        );
        release(&database, guards).await?;
        db.shutdown(Duration::from_secs(5)).await;
    }
    Ok(())
}

async fn hold(db: &Database, count: usize, ttl: Duration) -> Result<Vec<LockGuard>> {
    let lock = db.leases();
    let tasks: Vec<_> = (0..CLIENTS as usize)
        .map(|client| {
            let lock = lock.clone();
            let numbers = (client..count).step_by(CLIENTS as usize);
            tokio::spawn(async move {
                let mut guards = Vec::new();
                for number in numbers {
                    let request = request(&["held", &number.to_string()])?.with_ttl(ttl);
                    guards.push(lock.try_acquire(&request).await?);
                }
                Result::Ok(guards)
            })
        })
        .collect();
    let mut guards = Vec::new();
    for task in tasks {
        guards.extend(task.await??);
    }
    Ok(guards)
}

/// One statement of the heartbeat.
struct Statement {
    took: Duration,
}

/// Looks at the guards for as long as every lease takes to be renewed. A renewal moves `trusted_until`, which was
/// counted from the moment at which the statement was sent: so it tells that moment, and the statement it was.
async fn watch(guards: &[LockGuard], ttl: Duration) -> Vec<Statement> {
    let watched: Vec<&LockGuard> = guards.iter().step_by(guards.len().div_ceil(WATCHED)).collect();
    let mut known: Vec<_> = watched.iter().map(|guard| guard.trusted_until()).collect();
    let mut seen = HashSet::new();
    let mut statements = Vec::new();
    let end = Instant::now() + ttl / 3;
    while Instant::now() < end {
        let now = Boottime.now();
        for (guard, known) in watched.iter().zip(&mut known) {
            let trusted = guard.trusted_until();
            if trusted == *known {
                continue;
            }
            *known = trusted;
            let Some(trusted) = trusted else { continue };
            if seen.insert(trusted.since(Monotonic::from_start(Duration::ZERO))) {
                let sent = trusted.since(Monotonic::from_start(ttl - margin(ttl)));
                let took = now.since(Monotonic::from_start(sent));
                statements.push(Statement { took });
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    statements
}

/// What a guard's trust ends before its slice does.
fn margin(ttl: Duration) -> Duration {
    (ttl / 10).clamp(Duration::from_millis(10), Duration::from_secs(1))
}

/// Gives up all at once: the rows are what is measured, not their release.
async fn release(database: &BenchDatabase, guards: Vec<LockGuard>) -> Result {
    let client = database.client().await?;
    client.batch_execute("TRUNCATE leasehold.leases").await?;
    for guard in guards {
        guard.defuse();
    }
    Ok(())
}

/// The clock of `trusted_until`.
#[derive(Debug)]
struct Boottime;

impl MonotonicClock for Boottime {
    fn now(&self) -> Monotonic {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
        Monotonic::from_start(Duration::new(seconds, nanos))
    }
}
