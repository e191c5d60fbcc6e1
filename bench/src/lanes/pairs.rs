//! Acquire and release of names that nobody else wants.

use std::sync::Arc;

use leasehold_domain::{DistributedLock, LockRequest};
use tokio_postgres::types::Json;
use tokio_postgres::{Client as Connection, Statement};
use uuid::Uuid;

use crate::capture::Captured;
use crate::database::BenchDatabase;
use crate::group::Group;
use crate::lanes::request;
use crate::measure::{Client, Clients, Lane};
use crate::raw::{self, AdvisoryPair};
use crate::{Bench, Result, pgbench};

/// One of our locks, taken and given back.
pub(crate) struct Pair {
    lock: Arc<dyn DistributedLock>,
    request: LockRequest,
}

impl Client for Pair {
    async fn once(&mut self) -> Result {
        let guard = self.lock.try_acquire(&self.request).await?;
        self.lock.release(guard).await?;
        Ok(())
    }
}

/// As many clients as are wanted, each with a name of its own.
fn ours(lock: &Arc<dyn DistributedLock>, clients: u32) -> Result<Box<dyn Lane>> {
    let clients = (0..clients).map(|index| {
        Ok(Pair {
            lock: Arc::clone(lock),
            request: request(&["pair", &index.to_string()])?,
        })
    });
    Ok(Clients::lane("leasehold", clients.collect::<Result<_>>()?))
}

/// Acquires and releases once, so that its statements can be seen.
async fn pair_once(lock: &dyn DistributedLock) -> Result {
    let guard = lock.try_acquire(&request(&["captured"])?).await?;
    lock.release(guard).await?;
    Ok(())
}

fn group(mode: &str, clients: u32) -> Group {
    let people = if clients == 1 { "client" } else { "clients" };
    Group::new(
        format!("{mode} lock, acquire + release, {clients} {people}, distinct names"),
        "pairs/s",
        &["raw", "pgbench"],
    )
}

/// Advisory locks of session scope: ours on shared sessions, the others on a connection for each client.
pub(crate) async fn session(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let mut group = group("session", clients);
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let db = database.open(1).await?;
    group.add(ours(
        &(Arc::new(db.session_locks()) as Arc<dyn DistributedLock>),
        clients,
    )?);
    let raw = database.clients(clients, async |client, index| {
        AdvisoryPair::new(client, raw::TRY_LOCK, i64::from(index)).await
    });
    group.add(Clients::lane("raw", raw.await?));
    if let Some(pgbench) = &bench.pgbench {
        let key = "(1000 + :client_id)::bigint";
        let script = [raw::TRY_LOCK, raw::UNLOCK].map(|sql| pgbench::statement(sql, &[key]));
        group.add(pgbench.lane("pgbench", database, clients, &script.concat())?);
    }
    bench.measure(group).await
}

/// Lease rows: two statements, the acquire durable.
pub(crate) async fn lease(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let mut group = group("lease", clients);
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let sent = Captured::of(database, async |db| pair_once(&db.leases()).await).await?;
    let (acquire, release) = (sent.find("WITH seen")?, sent.find("WITH mine")?);

    let db = database.open(clients).await?;
    group.add(ours(
        &(Arc::new(db.leases()) as Arc<dyn DistributedLock>),
        clients,
    )?);
    let raw = database.clients(clients, async |client, index| {
        Ok(RawLease {
            acquire: client.prepare(&acquire).await?,
            release: client.prepare(&release).await?,
            client,
            name: format!("raw-{index}"),
            first_row_key: i64::from(index),
        })
    });
    group.add(Clients::lane("raw", raw.await?));
    if let Some(pgbench) = &bench.pgbench {
        let name = "('pgbench-' || :client_id::text)";
        let script = [
            pgbench::statement(
                &acquire,
                &[
                    pgbench::LOCK_ID,
                    "'measure'",
                    "'bench'",
                    "30.0::float8",
                    name,
                    "''",
                    "'{}'::jsonb",
                    ":client_id::bigint",
                ],
            ),
            pgbench::statement(&release, &[pgbench::LOCK_ID, name]),
        ];
        group.add(pgbench.lane("pgbench", database, clients, &script.concat())?);
    }
    bench.measure(group).await
}

struct RawLease {
    client: Connection,
    acquire: Statement,
    release: Statement,
    name: String,
    first_row_key: i64,
}

impl Client for RawLease {
    async fn once(&mut self) -> Result {
        let lock_id = Uuid::new_v4();
        let row = self
            .client
            .query_one(
                &self.acquire,
                &[
                    &lock_id,
                    &"measure",
                    &"bench",
                    &30.0_f64,
                    &self.name,
                    &"",
                    &Json(serde_json::json!({})),
                    &self.first_row_key,
                ],
            )
            .await?;
        if row.get::<_, Option<i64>>("given_token").is_none() {
            return Err("a lease was not given".into());
        }
        self.client
            .query_one(&self.release, &[&lock_id, &self.name])
            .await?;
        Ok(())
    }
}

/// Advisory locks of transaction scope: BEGIN, the lock, ROLLBACK.
pub(crate) async fn transaction(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let mut group = group("transaction", clients);
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let sent = Captured::of(database, async |db| pair_once(&db.transaction_locks()).await).await?;
    let try_lock = sent.find("pg_try_advisory_xact_lock")?;

    let db = database.open(clients).await?;
    group.add(ours(
        &(Arc::new(db.transaction_locks()) as Arc<dyn DistributedLock>),
        clients,
    )?);
    let raw = database.clients(clients, async |client, index| {
        Ok(RawTransaction {
            try_lock: client.prepare(&try_lock).await?,
            client,
            key: i64::from(index),
        })
    });
    group.add(Clients::lane("raw", raw.await?));
    if let Some(pgbench) = &bench.pgbench {
        let try_lock = pgbench::statement(&try_lock, &["(1000 + :client_id)::bigint", "'3600000ms'"]);
        let script = format!("{BEGIN};\n{try_lock}ROLLBACK;\n");
        group.add(pgbench.lane("pgbench", database, clients, &script)?);
    }
    bench.measure(group).await
}

pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

struct RawTransaction {
    client: Connection,
    try_lock: Statement,
    key: i64,
}

impl Client for RawTransaction {
    async fn once(&mut self) -> Result {
        self.client.batch_execute(BEGIN).await?;
        let row = self
            .client
            .query_one(&self.try_lock, &[&self.key, &"3600000ms"])
            .await?;
        if !row.get::<_, bool>("got") {
            return Err("a transaction lock was not given".into());
        }
        self.client.batch_execute("ROLLBACK").await?;
        Ok(())
    }
}
