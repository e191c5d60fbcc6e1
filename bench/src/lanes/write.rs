//! A write under a lock beside the same write without one.

use std::sync::Arc;

use diesel::QueryResult;
use diesel::sql_types::Text;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_domain::{DistributedLock, Durability, LockRequest};
use leasehold_storage::{Database, LeaseTable, Prepared, RowLeaseTable};
use tokio_postgres::{Client as Connection, Statement};
use uuid::Uuid;

use crate::capture::Captured;
use crate::database::BenchDatabase;
use crate::group::Group;
use crate::lanes::pairs::BEGIN;
use crate::lanes::request;
use crate::measure::{Client, Clients, Lane};
use crate::{Bench, Result, pgbench};

/// A row with a version and a lease, and a row for each version: the least that a versioned service writes.
const TABLES: &str = "
    CREATE TABLE documents (
        id TEXT PRIMARY KEY,
        version BIGINT NOT NULL DEFAULT 0,
        lock_id UUID, lock_operation TEXT, lock_by TEXT, lock_acquired_at TIMESTAMPTZ, lock_expires_at TIMESTAMPTZ,
        lock_fencing_token BIGINT NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50);
    CREATE TABLE document_versions (
        id TEXT, version BIGINT, fencing_token BIGINT, body TEXT, PRIMARY KEY (id, version)
    );
    INSERT INTO documents (id)
    SELECT kind || '-' || number
    FROM unnest('{plain,lease,advisory,raw,raw-plain,pgbench,captured}'::text[]) AS kind, generate_series(0, 63) AS number;";

const WRITE: &str = "
    WITH next AS (
        UPDATE documents SET version = version + 1 WHERE id = $1 RETURNING id, version, lock_fencing_token
    )
    INSERT INTO document_versions (id, version, fencing_token, body)
    SELECT id, version, lock_fencing_token, $2 FROM next";

const BODY: &str =
    "what a version holds: some hundred bytes of text, more or less, as a small setting of a service";

pub(crate) async fn create_tables(database: &BenchDatabase) -> Result {
    Ok(database.client().await?.batch_execute(TABLES).await?)
}

fn documents() -> Result<LeaseTable> {
    Ok(RowLeaseTable::new("public", "documents", "document")
        .key_column("id")
        .build()?)
}

async fn write(conn: &mut AsyncPgConnection, id: &str) -> QueryResult<usize> {
    let query = diesel::sql_query(WRITE).bind::<Text, _>(id).bind::<Text, _>(BODY);
    Prepared(query).execute(conn).await
}

struct Plain {
    db: Database,
    id: String,
}

impl Client for Plain {
    async fn once(&mut self) -> Result {
        self.db
            .transaction(async |conn| write(conn, &self.id).await)
            .await?;
        Ok(())
    }
}

/// Lock, write, release with the commit.
struct Guarded {
    db: Database,
    lock: Arc<dyn DistributedLock>,
    request: LockRequest,
    id: String,
}

impl Client for Guarded {
    async fn once(&mut self) -> Result {
        let guard = self.lock.try_acquire(&self.request).await?;
        self.db
            .fenced_transaction_releasing(&guard, async |conn| write(conn, &self.id).await)
            .await?;
        self.lock.release(guard).await?;
        Ok(())
    }
}

fn guarded_client(db: &Database, lock: &Arc<dyn DistributedLock>, id: String) -> Result<Guarded> {
    Ok(Guarded {
        db: db.clone(),
        lock: Arc::clone(lock),
        request: request(&["document", &id])?.with_durability(Durability::WithWrite),
        id,
    })
}

fn guarded_lane(
    name: &'static str,
    kind: &str,
    db: &Database,
    lock: &Arc<dyn DistributedLock>,
    clients: u32,
) -> Result<Box<dyn Lane>> {
    let clients = (0..clients).map(|index| guarded_client(db, lock, format!("{kind}-{index}")));
    Ok(Clients::lane(name, clients.collect::<Result<_>>()?))
}

pub(crate) async fn guarded(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let people = if clients == 1 { "client" } else { "clients" };
    let mut group = Group::new(
        format!("guarded write, {clients} {people}, distinct rows"),
        "writes/s",
        &["plain", "raw", "pgbench"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let sent = Captured::of(database, async |db| {
        let lock: Arc<dyn DistributedLock> = Arc::new(db.row_leases(documents()?));
        guarded_client(db, &lock, "captured-0".into())?.once().await
    })
    .await?;
    let (acquire, fence) = (sent.find("WITH seen")?, sent.find("WITH mine")?);

    let db = database.open(clients).await?;
    let plain = (0..clients).map(|index| Plain {
        db: db.clone(),
        id: format!("plain-{index}"),
    });
    group.add(Clients::lane("plain", plain.collect()));
    let leases: Arc<dyn DistributedLock> = Arc::new(db.row_leases(documents()?));
    group.add(guarded_lane("lease", "lease", &db, &leases, clients)?);
    let locks: Arc<dyn DistributedLock> = Arc::new(db.transaction_locks());
    group.add(guarded_lane("transaction", "advisory", &db, &locks, clients)?);

    let raw = database.clients(clients, async |client, index| {
        Ok(RawPlain {
            write: client.prepare(WRITE).await?,
            client,
            id: format!("raw-plain-{index}"),
        })
    });
    group.add(Clients::lane("raw, plain", raw.await?));
    let raw = database.clients(clients, async |client, index| {
        Ok(RawGuarded {
            acquire: client.prepare(&acquire).await?,
            write: client.prepare(WRITE).await?,
            fence: client.prepare(&fence).await?,
            client,
            id: format!("raw-{index}"),
        })
    });
    group.add(Clients::lane("raw", raw.await?));
    if let Some(pgbench) = &bench.pgbench {
        let id = "('pgbench-' || :client_id::text)";
        let acquire = pgbench::statement(
            &acquire,
            &[pgbench::LOCK_ID, "'measure'", "'bench'", "30.0::float8", id],
        );
        let write = pgbench::statement(WRITE, &[id, &format!("'{}'", BODY.replace(':', ""))]);
        let fence = pgbench::statement(&fence, &[pgbench::LOCK_ID, id]);
        let script = format!("{acquire}{BEGIN};\n{write}{fence}COMMIT;\n");
        group.add(pgbench.lane("pgbench", database, clients, &script)?);
    }
    bench.measure(group).await
}

struct RawPlain {
    client: Connection,
    write: Statement,
    id: String,
}

impl Client for RawPlain {
    async fn once(&mut self) -> Result {
        self.client.batch_execute(BEGIN).await?;
        // Spelled out: diesel-async gives everything an `execute`.
        Connection::execute(&self.client, &self.write, &[&self.id, &BODY]).await?;
        self.client.batch_execute("COMMIT").await?;
        Ok(())
    }
}

struct RawGuarded {
    client: Connection,
    acquire: Statement,
    write: Statement,
    fence: Statement,
    id: String,
}

impl Client for RawGuarded {
    async fn once(&mut self) -> Result {
        let lock_id = Uuid::new_v4();
        let given = self
            .client
            .query_one(
                &self.acquire,
                &[&lock_id, &"measure", &"bench", &30.0_f64, &self.id],
            )
            .await?;
        if given.get::<_, Option<i64>>("given_token").is_none() {
            return Err("a lease was not given".into());
        }
        self.client.batch_execute(BEGIN).await?;
        // Spelled out: diesel-async gives everything an `execute`.
        Connection::execute(&self.client, &self.write, &[&self.id, &BODY]).await?;
        self.client.query_one(&self.fence, &[&lock_id, &self.id]).await?;
        self.client.batch_execute("COMMIT").await?;
        Ok(())
    }
}
