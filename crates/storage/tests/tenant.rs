//! The gate of a tenant: who passes, who waits, who is refused, and what is left of those who went away.

mod locks;
mod net;
mod statement;

use std::time::{Duration, Instant};

use diesel::sql_types::{BigInt, Text};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::FutureExt;
use leasehold_domain::{TenantConflict, TenantConflictReason};
use leasehold_storage::tenant::{Drained, EnterError, GateError};
use leasehold_storage::{Database, Prepared, TenantGate, TransactionError};
use rand::Rng;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::{TestDatabase, eventually};
use TenantConflictReason::{PurgeInProgress, WritesInProgress};

type Failure = diesel::result::Error;
type GateResult<T> = Result<T, GateError<Failure>>;

/// Longer than a test takes: what ends before did not wait for it.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

struct Bench {
    database: TestDatabase,
    process: Database,
    /// Knows nothing of the library.
    client: Client,
}

impl Bench {
    async fn start() -> Self {
        Self::start_on(TestDatabase::create().await).await
    }

    async fn start_on(database: TestDatabase) -> Self {
        let client = database.client().await;
        client
            .batch_execute("CREATE TABLE rows (tenant_id TEXT NOT NULL, value BIGINT NOT NULL)")
            .await
            .unwrap();
        let process = Database::connect(database.options(), 8).await.unwrap();
        Self {
            database,
            process,
            client,
        }
    }

    fn gate(&self) -> TenantGate {
        self.process.tenant_gate()
    }

    async fn values(&self, tenant: &str) -> Vec<i64> {
        let sql = "SELECT value FROM rows WHERE tenant_id = $1 ORDER BY value";
        let rows = self.client.query(sql, &[&tenant]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Who has a tenant's gate or waits for it: the backend, the mode, and whether it was granted.
    async fn at_the_gate(&self, tenant: &str) -> Vec<(i32, String, bool)> {
        let sql = "SELECT pid, mode, granted FROM pg_locks
                   WHERE locktype = 'advisory' AND objsubid = 1
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                     AND (classid::bigint << 32) | objid::bigint = leasehold.tenant_write_key($1)
                   ORDER BY granted DESC, pid";
        let rows = self.client.query(sql, &[&tenant]).await.unwrap();
        rows.iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect()
    }

    /// Waits until a drain waits for a tenant, and answers its backend.
    async fn waiting_drain(&self, tenant: &str) -> i32 {
        let mut waiting = None;
        eventually("a drain waits for the gate", async || {
            let all = self.at_the_gate(tenant).await;
            waiting = all
                .iter()
                .find(|(_, mode, granted)| mode == "ExclusiveLock" && !granted)
                .map(|(pid, ..)| *pid);
            waiting.is_some()
        })
        .await;
        waiting.unwrap()
    }

    /// Waits until no advisory lock of any kind is held or waited for.
    async fn nothing_is_left(&self) {
        eventually("no lock is left", async || {
            let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            self.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }
}

async fn insert(conn: &mut AsyncPgConnection, tenant: &str, value: i64) -> Result<(), Failure> {
    let query = diesel::sql_query("INSERT INTO rows VALUES ($1, $2)")
        .bind::<Text, _>(tenant)
        .bind::<BigInt, _>(value);
    // By path: the trait has an `execute` for everything, the raw client included.
    diesel_async::RunQueryDsl::execute(query, conn).await.map(|_| ())
}

async fn write(gate: &TenantGate, tenant: &str, value: i64) -> GateResult<()> {
    gate.write(&[tenant], async |conn| insert(conn, tenant, value).await)
        .await
}

async fn delete(conn: &mut AsyncPgConnection, tenant: &str) -> Result<usize, Failure> {
    let query = diesel::sql_query("DELETE FROM rows WHERE tenant_id = $1").bind::<Text, _>(tenant);
    diesel_async::RunQueryDsl::execute(query, conn).await
}

/// Answers how many rows were removed.
async fn purge(gate: &TenantGate, tenant: &str, timeout: Duration) -> GateResult<Drained<usize>> {
    gate.drain(tenant, timeout, async |conn| delete(conn, tenant).await)
        .await
}

fn purge_in_background(
    bench: &Bench,
    tenant: &'static str,
    timeout: Duration,
) -> JoinHandle<GateResult<Drained<usize>>> {
    let gate = bench.gate();
    tokio::spawn(async move { purge(&gate, tenant, timeout).await })
}

/// A transaction whose work has begun, and goes on until it is told to end.
struct UnderWay<T> {
    end: oneshot::Sender<()>,
    task: JoinHandle<GateResult<T>>,
}

impl UnderWay<()> {
    async fn write(bench: &Bench, tenant: &'static str, value: i64) -> Self {
        let (begun, started) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let gate = bench.gate();
        let task = tokio::spawn(async move {
            gate.write(&[tenant], async |conn| {
                insert(conn, tenant, value).await?;
                begun.send(()).unwrap();
                ended.await.unwrap();
                Ok(())
            })
            .await
        });
        started.await.expect("the gate is open");
        Self { end, task }
    }
}

impl UnderWay<Drained<usize>> {
    /// It has removed the rows of the tenant.
    async fn purge(bench: &Bench, tenant: &'static str) -> Self {
        Self::drain(bench, tenant, true).await
    }

    /// It has the tenant, and has touched no row.
    async fn idle_drain(bench: &Bench, tenant: &'static str) -> Self {
        Self::drain(bench, tenant, false).await
    }

    async fn drain(bench: &Bench, tenant: &'static str, delete_rows: bool) -> Self {
        let (begun, started) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let gate = bench.gate();
        let task = tokio::spawn(async move {
            gate.drain(tenant, LONG, async |conn| {
                let deleted = if delete_rows {
                    delete(conn, tenant).await?
                } else {
                    0
                };
                begun.send(()).unwrap();
                ended.await.unwrap();
                Ok(deleted)
            })
            .await
        });
        started.await.expect("nobody is in the way");
        Self { end, task }
    }
}

impl<T> UnderWay<T> {
    async fn end(self) -> T {
        self.end.send(()).unwrap();
        self.task.await.unwrap().unwrap()
    }
}

#[track_caller]
fn assert_conflict<T: std::fmt::Debug>(result: &GateResult<T>, tenant: &str, reason: TenantConflictReason) {
    let expected = TenantConflict {
        tenant: tenant.to_owned(),
        reason,
    };
    assert!(
        matches!(result, Err(GateError::Conflict(conflict)) if *conflict == expected),
        "{result:?}, not {expected:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_share_the_gate() {
    let bench = Bench::start().await;
    let first = UnderWay::write(&bench, "a", 1).await;
    let second = UnderWay::write(&bench, "a", 2).await;
    write(&bench.gate(), "a", 3).await.unwrap();
    let modes = bench.at_the_gate("a").await;
    assert_eq!(modes.len(), 2, "{modes:?}");
    assert!(
        modes
            .iter()
            .all(|(_, mode, granted)| mode == "ShareLock" && *granted),
        "{modes:?}"
    );
    first.end().await;
    second.end().await;
    assert_eq!(bench.values("a").await, [1, 2, 3]);
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_writers_in_flight() {
    let bench = Bench::start().await;
    let writer = UnderWay::write(&bench, "a", 1).await;
    let start = Instant::now();
    let purge = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    let seen = Instant::now();
    // It waits for this long at least.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!purge.is_finished());
    let least = seen.elapsed();
    writer.end().await;
    let drained = purge.await.unwrap().unwrap();
    assert_eq!(drained.value, 1, "it sees what the writer wrote");
    assert!(drained.waited >= least, "{drained:?} {least:?}");
    assert!(drained.waited <= start.elapsed(), "{drained:?}");
    assert!(bench.values("a").await.is_empty());
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_waited_too_long_changes_nothing_and_succeeds_later() {
    let bench = Bench::start().await;
    write(&bench.gate(), "a", 1).await.unwrap();
    let writer = UnderWay::write(&bench, "a", 2).await;
    let start = Instant::now();
    let result = purge(&bench.gate(), "a", SHORT).await;
    assert_conflict(&result, "a", WritesInProgress);
    assert!(start.elapsed() >= SHORT);
    // It waits no longer: nobody but the writer is there, and others may write again.
    assert_eq!(bench.at_the_gate("a").await.len(), 1);
    write(&bench.gate(), "a", 3).await.unwrap();
    writer.end().await;
    assert_eq!(bench.values("a").await, [1, 2, 3]);
    assert_eq!(purge(&bench.gate(), "a", LONG).await.unwrap().value, 3);
    assert!(bench.values("a").await.is_empty());
    write(&bench.gate(), "a", 4).await.unwrap();
    assert_eq!(bench.values("a").await, [4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_is_refused_from_the_moment_a_drain_waits() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let writer = UnderWay::write(&bench, "a", 1).await;
    let purge = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    let refused = gate
        .write(&["a"], async |_| -> Result<(), Failure> { unreachable!() })
        .await;
    assert_conflict(&refused, "a", PurgeInProgress);
    write(&gate, "b", 1).await.unwrap();
    assert!(!purge.is_finished());
    writer.end().await;
    assert_eq!(purge.await.unwrap().unwrap().value, 1);
    write(&gate, "a", 2).await.unwrap();
    assert_eq!(bench.values("a").await, [2]);
    assert_eq!(bench.values("b").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_is_refused_while_a_drain_has_the_tenant() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let purge = UnderWay::purge(&bench, "a").await;
    assert_conflict(&write(&gate, "a", 1).await, "a", PurgeInProgress);
    write(&gate, "b", 1).await.unwrap();
    purge.end().await;
    write(&gate, "a", 2).await.unwrap();
    assert_eq!(bench.values("a").await, [2]);
    assert_eq!(bench.values("b").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_of_writers_starves_a_drain() {
    let bench = Bench::start().await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writers: Vec<_> = (0..6)
        .map(|number| {
            let (gate, stopped) = (bench.gate(), stopped.clone());
            tokio::spawn(async move {
                let mut written = 0;
                while !*stopped.borrow() {
                    match write(&gate, "a", number).await {
                        Ok(()) => written += 1,
                        Err(GateError::Conflict(_)) => tokio::task::yield_now().await,
                        Err(error) => panic!("{error:?}"),
                    }
                }
                written
            })
        })
        .collect();
    let mut deleted = 0;
    for _ in 0..20 {
        deleted += purge(&bench.gate(), "a", Duration::from_secs(10))
            .await
            .unwrap()
            .value;
    }
    stop.send_replace(true);
    let mut written = 0;
    for writer in writers {
        written += writer.await.unwrap();
    }
    deleted += purge(&bench.gate(), "a", LONG).await.unwrap().value;
    assert_eq!(deleted, written);
    assert!(written > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_drain_is_refused_at_once() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let writer = UnderWay::write(&bench, "a", 1).await;
    let first = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    let start = Instant::now();
    // While the first waits, and while it works.
    assert_conflict(&purge(&gate, "a", LONG).await, "a", PurgeInProgress);
    writer.end().await;
    first.await.unwrap().unwrap();
    let first = UnderWay::purge(&bench, "a").await;
    assert_conflict(&purge(&gate, "a", LONG).await, "a", PurgeInProgress);
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    // Another tenant is another matter.
    purge(&gate, "b", SHORT).await.unwrap();
    first.end().await;
    purge(&gate, "a", SHORT).await.unwrap();
}

/// As a person with psql, or another program, would have the gate of `tenant-a`.
const KEY: &str = "hashtextextended('tenant_write|8:tenant-a', 0)";

#[tokio::test(flavor = "multi_thread")]
async fn the_gate_and_a_plain_session_exclude_each_other() {
    let bench = Bench::start().await;
    let (gate, tenant) = (bench.gate(), "tenant-a");
    let ask = async |function: &str| -> bool {
        let sql = format!("SELECT {function}({KEY})");
        bench.client.query_one(&sql, &[]).await.unwrap().get(0)
    };
    let stranger = bench.database.client().await;

    // A stranger has it alone.
    stranger
        .batch_execute(&format!("SELECT pg_advisory_lock({KEY})"))
        .await
        .unwrap();
    assert_conflict(&write(&gate, tenant, 1).await, tenant, PurgeInProgress);
    assert_conflict(&purge(&gate, tenant, SHORT).await, tenant, PurgeInProgress);
    stranger
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();

    // A stranger writes.
    let shared = format!("BEGIN; SELECT pg_advisory_xact_lock_shared({KEY})");
    stranger.batch_execute(&shared).await.unwrap();
    write(&gate, tenant, 2).await.unwrap();
    assert_conflict(&purge(&gate, tenant, SHORT).await, tenant, WritesInProgress);
    let waiting = purge_in_background(&bench, tenant, LONG);
    bench.waiting_drain(tenant).await;
    assert!(!ask("pg_try_advisory_xact_lock_shared").await);
    stranger.batch_execute("COMMIT").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().value, 1);

    // We write.
    let writer = UnderWay::write(&bench, tenant, 3).await;
    assert!(ask("pg_try_advisory_xact_lock_shared").await);
    assert!(!ask("pg_try_advisory_xact_lock").await);
    writer.end().await;
    assert!(ask("pg_try_advisory_xact_lock").await);

    // We have it alone.
    let purge = UnderWay::purge(&bench, tenant).await;
    assert!(!ask("pg_try_advisory_xact_lock_shared").await);
    purge.end().await;
    assert!(ask("pg_try_advisory_xact_lock_shared").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn timeouts_out_of_bounds_never_reach_the_server() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    // Whatever is sent from now on fails.
    bench.database.close().await;
    let hour = Duration::from_secs(60 * 60);
    let nano = Duration::from_nanos(1);
    for timeout in [
        Duration::ZERO,
        Duration::from_micros(400),
        Duration::from_millis(1) - nano,
        hour + nano,
        Duration::MAX,
    ] {
        let result = purge(&gate, "a", timeout).await;
        assert!(
            matches!(&result, Err(GateError::Invalid(invalid)) if invalid.field() == "timeout"),
            "{timeout:?}: {result:?}"
        );
    }
    for timeout in [Duration::from_millis(1), hour] {
        let result = purge(&gate, "a", timeout).await;
        assert!(
            matches!(
                result,
                Err(GateError::Transaction(TransactionError::Unavailable(_)))
            ),
            "{timeout:?}: {result:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_of_a_millisecond_works() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let timeout = Duration::from_millis(1);
    write(&gate, "a", 1).await.unwrap();
    assert_eq!(purge(&gate, "a", timeout).await.unwrap().value, 1);
    let writer = UnderWay::write(&bench, "a", 2).await;
    assert_conflict(&purge(&gate, "a", timeout).await, "a", WritesInProgress);
    writer.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_lock_timeout_is_restored() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let set = format!("ALTER DATABASE {} SET lock_timeout = '7s'", database.name());
    client.batch_execute(&set).await.unwrap();
    let bench = Bench::start_on(database).await;
    let shown = async |client: &Client| -> String {
        client.query_one("SHOW lock_timeout", &[]).await.unwrap().get(0)
    };

    // Through the library, after a grant.
    let gate = bench.gate();
    let inside = gate.drain("a", LONG, async |conn| {
        #[derive(diesel::QueryableByName)]
        struct Row {
            #[diesel(sql_type = Text)]
            lock_timeout: String,
        }
        let row: Row = Prepared(diesel::sql_query("SHOW lock_timeout")).one(conn).await?;
        Ok::<_, Failure>(row.lock_timeout)
    });
    assert_eq!(inside.await.unwrap().value, "7s");

    // By the function, after a grant and after a timeout, whether it was set for the database, the session or the
    // transaction.
    let client = bench.database.client().await;
    for granted in [true, false] {
        let writer = match granted {
            true => None,
            false => Some(UnderWay::write(&bench, "a", 1).await),
        };
        for (session, local) in [(None, None), (Some("4s"), None), (Some("4s"), Some("3s"))] {
            if let Some(session) = session {
                let set = format!("SET lock_timeout = '{session}'");
                client.batch_execute(&set).await.unwrap();
            }
            client.batch_execute("BEGIN").await.unwrap();
            if let Some(local) = local {
                let set = format!("SET LOCAL lock_timeout = '{local}'");
                client.batch_execute(&set).await.unwrap();
            }
            let drain = "SELECT leasehold.drain_tenant('a', 5)";
            let outcome: String = client.query_one(drain, &[]).await.unwrap().get(0);
            assert_eq!(outcome == "drained", granted, "{outcome}");
            let before = session.unwrap_or("7s");
            assert_eq!(shown(&client).await, local.unwrap_or(before), "inside");
            client.batch_execute("COMMIT").await.unwrap();
            assert_eq!(shown(&client).await, before, "afterwards");
        }
        client.batch_execute("RESET lock_timeout").await.unwrap();
        if let Some(writer) = writer {
            writer.end().await;
        }
    }
}

/// A process that is stopped while it has a tenant alone does not close it for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_says_nothing_is_ended_by_the_server() {
    for (own, expected) in [("0", "1min"), ("1h", "1min"), ("2s", "2s")] {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let set = format!(
            "ALTER DATABASE {} SET idle_in_transaction_session_timeout = '{own}'",
            database.name()
        );
        client.batch_execute(&set).await.unwrap();
        let bench = Bench::start_on(database).await;
        let gate = bench.gate();
        let (told, shown) = oneshot::channel();
        let silent = gate.drain("a", SHORT, async |conn| {
            #[derive(diesel::QueryableByName)]
            struct Row {
                #[diesel(sql_type = Text)]
                idle_in_transaction_session_timeout: String,
            }
            let show = diesel::sql_query("SHOW idle_in_transaction_session_timeout");
            let row: Row = Prepared(show).one(conn).await?;
            told.send(row.idle_in_transaction_session_timeout).unwrap();
            std::future::pending::<Result<(), Failure>>().await
        });
        let watch = async {
            assert_eq!(shown.await.unwrap(), expected);
            if own == expected {
                eventually("writers pass", async || write(&gate, "a", 1).await.is_ok()).await;
            }
        };
        tokio::select! {
            result = silent => panic!("{result:?}"),
            () = watch => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_statement_timeout_is_a_conflict() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let set = format!("ALTER DATABASE {} SET statement_timeout = '3s'", database.name());
    client.batch_execute(&set).await.unwrap();
    let bench = Bench::start_on(database).await;
    let writer = UnderWay::write(&bench, "a", 1).await;
    let start = Instant::now();
    assert_conflict(&purge(&bench.gate(), "a", LONG).await, "a", WritesInProgress);
    assert!(start.elapsed() < LONG / 2);
    writer.end().await;
    assert_eq!(bench.values("a").await, [1]);
}

/// Writers that let go at random, and drains whose patience ends at about that time.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_that_races_with_the_grant_is_told_as_it_went() {
    let bench = Bench::start().await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writer = bench.database.client().await;
    let writing = tokio::spawn(async move {
        let write = "BEGIN; SELECT pg_advisory_xact_lock_shared(leasehold.tenant_write_key('a'));
                     SELECT pg_sleep(random() * 0.005); COMMIT";
        while !*stopped.borrow() {
            writer.batch_execute(write).await.unwrap();
        }
    });
    let mine = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
                AND mode = 'ExclusiveLock' AND granted
                AND (classid::bigint << 32) | objid::bigint = leasehold.tenant_write_key('a')";
    let (mut drained, mut refused) = (0, 0);
    let client = bench.database.client().await;
    for round in 0..600 {
        client.batch_execute("BEGIN").await.unwrap();
        let drain = format!("SELECT leasehold.drain_tenant('a', {})", 1 + round % 3);
        let outcome: String = client.query_one(&drain, &[]).await.unwrap().get(0);
        let held: i64 = client.query_one(mine, &[]).await.unwrap().get(0);
        match outcome.as_str() {
            "drained" => drained += 1,
            "writes_in_progress" => refused += 1,
            other => panic!("{other}"),
        }
        assert_eq!(
            held == 1,
            outcome == "drained",
            "round {round}: {outcome}, {held}"
        );
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    let gate = bench.gate();
    for round in 0..60 {
        let timeout = Duration::from_millis(1 + round % 3);
        let looked = gate.drain("a", timeout, async |conn| {
            #[derive(diesel::QueryableByName)]
            struct Row {
                #[diesel(sql_type = BigInt)]
                count: i64,
            }
            let row: Row = Prepared(diesel::sql_query(mine)).one(conn).await?;
            Ok::<_, Failure>(row.count)
        });
        match looked.await {
            Ok(held) => {
                assert_eq!(held.value, 1);
                drained += 1;
            }
            result => {
                assert_conflict(&result, "a", WritesInProgress);
                refused += 1;
                // Rolled back before it was told.
                let all = bench.at_the_gate("a").await;
                assert!(all.iter().all(|(_, mode, _)| mode == "ShareLock"), "{all:?}");
            }
        }
    }
    stop.send_replace(true);
    writing.await.unwrap();
    // Or it was no race.
    assert!(
        drained > 20 && refused > 20,
        "{drained} drained, {refused} refused"
    );
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_dropped_while_it_waits_holds_writers_up_no_longer() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let writer = UnderWay::write(&bench, "a", 1).await;
    let mut purge = Box::pin(purge(&gate, "a", LONG));
    tokio::select! {
        result = &mut purge => panic!("{result:?}"),
        _ = bench.waiting_drain("a") => {}
    }
    assert_conflict(&write(&gate, "a", 2).await, "a", PurgeInProgress);
    drop(purge);
    let dropped = Instant::now();
    eventually("writers pass", async || write(&gate, "a", 3).await.is_ok()).await;
    // The server looks every 250 ms, on a machine that has other things to do.
    assert!(
        dropped.elapsed() < Duration::from_secs(15),
        "{:?}",
        dropped.elapsed()
    );
    writer.end().await;
    assert_eq!(bench.values("a").await, [1, 3]);
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_killed_while_it_waits_holds_writers_up_no_longer() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let writer = UnderWay::write(&bench, "a", 1).await;
    let purge = purge_in_background(&bench, "a", LONG);
    let pid = bench.waiting_drain("a").await;
    let kill = "SELECT pg_terminate_backend($1, 5000)";
    assert!(
        bench
            .client
            .query_one(kill, &[&pid])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
    write(&gate, "a", 2).await.unwrap();
    let result = purge.await.unwrap();
    assert!(
        matches!(
            result,
            Err(GateError::Transaction(TransactionError::Unavailable(_)))
        ),
        "{result:?}"
    );
    writer.end().await;
    assert_eq!(bench.values("a").await, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_is_cancelled_in_its_work_leaves_nothing() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    write(&gate, "a", 1).await.unwrap();
    let purge = UnderWay::purge(&bench, "a").await;
    purge.task.abort();
    eventually("writers pass", async || write(&gate, "a", 2).await.is_ok()).await;
    assert_eq!(bench.values("a").await, [1, 2]);
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_and_drains_that_are_dropped_at_any_poll_leave_nothing() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    for polls in 0..25 {
        let work = async |conn: &mut AsyncPgConnection| {
            insert(conn, "a", 1).await?;
            std::future::pending::<Result<(), Failure>>().await
        };
        let mut write = Box::pin(gate.write(&["a", "b"], work));
        let mut drain = Box::pin(gate.drain("c", LONG, work));
        for _ in 0..polls {
            assert!((&mut write).now_or_never().is_none());
            assert!((&mut drain).now_or_never().is_none());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    bench.nothing_is_left().await;
    assert!(bench.values("a").await.is_empty());
    for tenant in ["a", "b", "c"] {
        purge(&gate, tenant, SHORT).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_work_rolls_back_and_leaves_the_gate() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    for drain in [false, true] {
        let work = async |conn: &mut AsyncPgConnection| {
            insert(conn, "a", 1).await?;
            conn.batch_execute("SELECT 1 / 0").await
        };
        let error = match drain {
            false => gate.write(&["a"], work).await.unwrap_err(),
            true => gate.drain("a", SHORT, work).await.unwrap_err(),
        };
        assert!(
            matches!(error, GateError::Transaction(TransactionError::Work(_))),
            "{error:?}"
        );
        assert!(bench.at_the_gate("a").await.is_empty());
    }
    assert!(bench.values("a").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_tenants_are_entered_together_or_not_at_all() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    for drained in ["a", "b", "c"] {
        let purge = UnderWay::purge(&bench, drained).await;
        let refused = gate.write(&["c", "a", "b", "a"], async |conn| insert(conn, "a", 1).await);
        assert_conflict(&refused.await, drained, PurgeInProgress);
        for tenant in ["a", "b", "c"] {
            let all = bench.at_the_gate(tenant).await;
            assert!(all.iter().all(|(_, mode, _)| mode == "ExclusiveLock"), "{all:?}");
        }
        let others = ["a", "b", "c"].into_iter().filter(|tenant| *tenant != drained);
        let others: Vec<&str> = others.collect();
        gate.write(&others, async |conn| insert(conn, others[0], 2).await)
            .await
            .unwrap();
        purge.end().await;
    }
    gate.write(&["c", "a", "b", "a"], async |conn| {
        insert(conn, "a", 3).await?;
        for tenant in ["a", "b", "c"] {
            assert_eq!(bench.at_the_gate(tenant).await.len(), 1, "{tenant}");
        }
        Ok::<_, Failure>(())
    })
    .await
    .unwrap();
    assert!(bench.values("a").await.contains(&3));
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_out_of_bounds_are_refused() {
    let bench = Bench::start().await;
    let gate = bench.gate();
    let nothing = async |_: &mut AsyncPgConnection| Ok::<_, Failure>(());
    let numbers = |count: i32| (0..count).map(|number| number.to_string()).collect::<Vec<_>>();
    gate.write(&numbers(1000), nothing).await.unwrap();
    // Each counts once.
    gate.write(&vec!["a"; 1001], nothing).await.unwrap();
    gate.write(&["x".repeat(256)], nothing).await.unwrap();
    gate.write(&["ünïcödé", "🗝"], nothing).await.unwrap();
    // Whatever is sent from now on fails.
    bench.database.close().await;
    let bad: [Vec<String>; 5] = [
        numbers(1001),
        vec![],
        vec!["a".into(), String::new()],
        vec!["a".into(), "nul\0".into()],
        vec!["a".into(), "x".repeat(257)],
    ];
    for tenants in bad {
        let result = gate.write(&tenants, nothing).await;
        assert!(matches!(result, Err(GateError::Invalid(_))), "{result:?}");
        if let [_, tenant] = tenants.as_slice() {
            let result = purge(&gate, tenant, LONG).await;
            assert!(matches!(result, Err(GateError::Invalid(_))), "{result:?}");
            assert!(TenantGate::key(tenant).is_err());
            assert!(TenantGate::gate(tenant).is_err());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_and_drains_of_pairs_in_any_order_never_deadlock() {
    let bench = Bench::start().await;
    let tenants = ["a", "b"];
    let workers = (0..4).map(|worker| {
        let gate = bench.gate();
        tokio::spawn(async move {
            let (mut done, mut refused) = (0, 0);
            for round in 0..120 {
                let (first, drain) = {
                    let mut random = rand::rng();
                    (
                        random.random_range(0..2),
                        worker % 2 == 0 && random.random_bool(0.3),
                    )
                };
                let (first, second) = (tenants[first], tenants[1 - first]);
                let result = if drain {
                    let timeout = Duration::from_millis(20);
                    // And a second one inside of it, the other way around as often as not.
                    let both = gate.drain(first, timeout, async |conn| {
                        insert(conn, first, round).await?;
                        Ok::<_, Failure>(purge(&gate, second, timeout).await.is_ok())
                    });
                    both.await.map(|_| ())
                } else {
                    gate.write(&[first, second], async |conn| {
                        insert(conn, first, round).await?;
                        insert(conn, second, round).await
                    })
                    .await
                };
                match result {
                    Ok(()) => done += 1,
                    Err(GateError::Conflict(_)) => refused += 1,
                    // Whatever a deadlock would be.
                    Err(error) => panic!("{error:?}"),
                }
            }
            (done, refused)
        })
    });
    let (mut done, mut refused) = (0, 0);
    for worker in workers.collect::<Vec<_>>() {
        let (some, others) = worker.await.unwrap();
        done += some;
        refused += others;
    }
    assert!(done > 50 && refused > 0, "{done} done, {refused} refused");
    bench.nothing_is_left().await;
}

async fn enter(bench: &Bench, before: &str) -> Result<Result<(), EnterError>, TransactionError<Failure>> {
    bench
        .process
        .transaction(async |conn| {
            if !before.is_empty() {
                conn.batch_execute(before).await?;
            }
            Ok(TenantGate::enter_in_tx(conn, &["a"]).await)
        })
        .await
}

#[track_caller]
fn assert_invalid(result: &Result<(), EnterError>, field: &str) {
    assert!(
        matches!(result, Err(EnterError::Invalid(invalid)) if invalid.field() == field),
        "{result:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn isolation_above_read_committed_is_refused() {
    let bench = Bench::start().await;
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let set = format!("SET TRANSACTION ISOLATION LEVEL {level}");
        assert_invalid(&enter(&bench, &set).await.unwrap(), "transaction isolation");
    }
    enter(&bench, "").await.unwrap().unwrap();
}

/// Whatever a role or a database has for a default.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_and_a_drain_are_at_read_committed() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let set = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = 'serializable'",
        database.name()
    );
    client.batch_execute(&set).await.unwrap();
    let bench = Bench::start_on(database).await;
    let level = async |conn: &mut AsyncPgConnection| {
        #[derive(diesel::QueryableByName)]
        struct Row {
            #[diesel(sql_type = Text)]
            transaction_isolation: String,
        }
        let show = diesel::sql_query("SHOW transaction_isolation");
        let row: Row = Prepared(show).one(conn).await?;
        Ok::<_, Failure>(row.transaction_isolation)
    };
    let gate = bench.gate();
    assert_eq!(gate.write(&["a"], level).await.unwrap(), "read committed");
    assert_eq!(
        gate.drain("a", SHORT, level).await.unwrap().value,
        "read committed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_is_entered_in_a_transaction_and_in_no_savepoint() {
    let bench = Bench::start().await;
    let outside = bench
        .process
        .read(async |conn| Ok::<_, Failure>(TenantGate::enter_in_tx(conn, &["a"]).await));
    assert_invalid(&outside.await.unwrap(), "transaction");
    let savepoint = bench.process.transaction(async |conn| {
        diesel_async::AsyncConnection::transaction(conn, async |conn| {
            Ok::<_, Failure>(TenantGate::enter_in_tx(conn, &["a"]).await)
        })
        .await
    });
    assert_invalid(&savepoint.await.unwrap(), "transaction");
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_is_entered_lasts_as_long_as_the_transaction() {
    let bench = Bench::start().await;
    bench
        .process
        .transaction(async |conn| {
            TenantGate::enter_in_tx(conn, &["a"]).await.unwrap();
            // A savepoint that is rolled back leaves it alone.
            let failed = diesel_async::AsyncConnection::transaction(conn, async |conn| {
                conn.batch_execute("SELECT 1 / 0").await
            });
            assert!(failed.await.is_err());
            assert_conflict(&purge(&bench.gate(), "a", SHORT).await, "a", WritesInProgress);
            Ok::<_, Failure>(())
        })
        .await
        .unwrap();
    purge(&bench.gate(), "a", SHORT).await.unwrap();
}

#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_is_entered_after_other_locks_is_a_bug() {
    let bench = std::sync::Arc::new(Bench::start().await);
    let entered = async |before: &'static str| {
        let bench = std::sync::Arc::clone(&bench);
        tokio::spawn(async move { enter(&bench, before).await }).await
    };
    for before in [
        "INSERT INTO rows VALUES ('a', 1)",
        "UPDATE rows SET value = 2",
        "SELECT FROM rows FOR UPDATE",
        "SELECT pg_advisory_xact_lock(1)",
    ] {
        assert!(entered(before).await.unwrap_err().is_panic(), "{before}");
    }
    // What locks no row, and other gates.
    for before in ["", "SELECT FROM rows", "SELECT pg_advisory_xact_lock_shared(1)"] {
        entered(before).await.unwrap().unwrap().unwrap();
    }
    assert!(bench.values("a").await.is_empty());
}
