//! What the gate of a tenant costs a write, and what a table costs that takes the gate itself.

use diesel::sql_types::{BigInt, Text};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_storage::{Database, Prepared, TenantGate};
use tokio_postgres::{Client as Connection, Statement};

use crate::capture::Captured;
use crate::database::BenchDatabase;
use crate::group::Group;
use crate::lanes::pairs::BEGIN;
use crate::measure::{Client, Clients};
use crate::{Bench, Result, pgbench};

/// What tenants own: an id, whose it is, a value, and an index to list them by. One table as it is, and one that takes
/// the gate itself.
const TABLES: &str = "
    CREATE TABLE notes (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
        tenant_id TEXT COLLATE \"C\" NOT NULL,
        value TEXT NOT NULL,
        seq BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY,
        created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
    );
    CREATE INDEX ON notes (tenant_id, seq);
    CREATE TABLE guarded_notes (LIKE notes INCLUDING ALL);
    SELECT leasehold.gate_table('guarded_notes', 'tenant_id');";

const VALUE: &str =
    "what somebody thinks of something, in some hundred bytes of text, more or less, as people write";
const INSERT: &str = "INSERT INTO notes (tenant_id, value) VALUES ($1, $2)";
const GATED_INSERT: &str = "\
INSERT INTO notes (tenant_id, value)
SELECT $1, $2 WHERE (SELECT pg_try_advisory_xact_lock_shared($3))";

pub(crate) async fn create_tables(database: &BenchDatabase) -> Result {
    Ok(database.client().await?.batch_execute(TABLES).await?)
}

fn title(what: &str, clients: u32) -> String {
    let people = if clients == 1 { "client" } else { "clients" };
    format!("{what}, {clients} {people}, a tenant each")
}

fn tenant(index: u32) -> String {
    format!("tenant-{index}")
}

async fn insert(conn: &mut AsyncPgConnection, tenant: &str) -> diesel::QueryResult<usize> {
    let query = diesel::sql_query(INSERT)
        .bind::<Text, _>(tenant)
        .bind::<Text, _>(VALUE);
    Prepared(query).execute(conn).await
}

/// Ours: what is measured, on a pool.
struct Ours {
    db: Database,
    tenant: String,
    way: Way,
}

#[derive(Clone, Copy)]
enum Way {
    /// The insert alone.
    Insert,
    /// The same behind the gate, one statement.
    GatedInsert,
    /// A transaction with the insert.
    Write,
    /// The same behind the gate.
    GatedWrite,
}

impl Client for Ours {
    async fn once(&mut self) -> Result {
        let tenant = self.tenant.as_str();
        let work = async |conn: &mut AsyncPgConnection| insert(conn, tenant).await;
        let inserted = match self.way {
            Way::Insert => self.db.read(work).await?,
            Way::GatedInsert => {
                let key = TenantGate::key(tenant)?;
                let gated = self.db.read(async |conn| {
                    let query = diesel::sql_query(GATED_INSERT)
                        .bind::<Text, _>(tenant)
                        .bind::<Text, _>(VALUE)
                        .bind::<BigInt, _>(key);
                    Prepared(query).execute(conn).await
                });
                gated.await?
            }
            Way::Write => self.db.transaction(work).await?,
            Way::GatedWrite => self.db.tenant_gate().write(&[tenant], work).await?,
        };
        if inserted == 1 {
            Ok(())
        } else {
            Err("a gate was closed".into())
        }
    }
}

fn ours(db: &Database, clients: u32, way: Way) -> Vec<Ours> {
    let client = |index| Ours {
        db: db.clone(),
        tenant: tenant(index),
        way,
    };
    (0..clients).map(client).collect()
}

/// One statement each.
pub(crate) async fn gated_insert(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let mut group = Group::new(
        title("gated insert, one statement", clients),
        "inserts/s",
        &["plain", "raw", "pgbench"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let db = database.open(clients).await?;
    group.add(Clients::lane("plain", ours(&db, clients, Way::Insert)));
    group.add(Clients::lane("leasehold", ours(&db, clients, Way::GatedInsert)));
    for (name, sql, gated) in [("raw, plain", INSERT, false), ("raw", GATED_INSERT, true)] {
        let raw = database.clients(clients, async |client, index| {
            Ok(RawInsert {
                insert: client.prepare(sql).await?,
                client,
                tenant: tenant(index),
                key: gated.then(|| i64::from(index)),
            })
        });
        group.add(Clients::lane(name, raw.await?));
    }
    if let Some(pgbench) = &bench.pgbench {
        let script = pgbench::statement(
            GATED_INSERT,
            &[&tenant_of_client(), &value(), ":client_id::bigint"],
        );
        group.add(pgbench.lane("pgbench", database, clients, &script)?);
    }
    bench.measure(group).await
}

/// A transaction with one insert.
pub(crate) async fn gated_write(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    let mut group = Group::new(
        title("gated write of one insert, a transaction", clients),
        "writes/s",
        &["plain", "raw", "pgbench"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let sent = Captured::of(database, async |db| {
        let once = ours(db, 1, Way::GatedWrite).pop();
        once.ok_or("no client")?.once().await
    });
    let enter = sent.await?.find("pg_try_advisory_xact_lock_shared")?;
    let db = database.open(clients).await?;
    group.add(Clients::lane("plain", ours(&db, clients, Way::Write)));
    group.add(Clients::lane("leasehold", ours(&db, clients, Way::GatedWrite)));
    for (name, gated) in [("raw, plain", false), ("raw", true)] {
        let raw = database.clients(clients, async |client, index| {
            Ok(RawWrite {
                enter: if gated {
                    Some(client.prepare(&enter).await?)
                } else {
                    None
                },
                insert: client.prepare(INSERT).await?,
                client,
                tenant: tenant(index),
                keys: vec![i64::from(index)],
            })
        });
        group.add(Clients::lane(name, raw.await?));
    }
    if let Some(pgbench) = &bench.pgbench {
        let enter = pgbench::statement(&enter, &["ARRAY[:client_id::bigint]"]);
        let insert = pgbench::statement(INSERT, &[&tenant_of_client(), &value()]);
        let script = format!("{BEGIN};\n{enter}{insert}SELECT 1;\nCOMMIT;\n");
        group.add(pgbench.lane("pgbench", database, clients, &script)?);
    }
    bench.measure(group).await
}

/// Tables that take the gate themselves, whoever writes: by pgbench, so that nothing of ours is in it.
pub(crate) async fn net(bench: &Bench, database: &BenchDatabase, clients: u32) -> Result {
    const NONE: &str = "insert";
    let mut group = Group::new(
        title("gated table, pgbench", clients),
        "inserts/s",
        &[NONE, "gated insert", "gated write"],
    );
    let (Some(pgbench), true) = (&bench.pgbench, bench.wants(group.title())) else {
        return Ok(());
    };
    // The trigger must find what the statement took: the keys must be those of the tenants.
    let mut keys = String::from("\\set key case");
    for index in 0..clients {
        keys += &format!(
            " when :client_id = {index} then {}",
            TenantGate::key(&tenant(index))?
        );
    }
    keys += " end\n";
    for (suffix, table) in [("", "notes"), (", trigger", "guarded_notes")] {
        let on = |sql: &str| sql.replace("INTO notes", &format!("INTO {table}"));
        let (tenant, value) = (tenant_of_client(), value());
        let insert = pgbench::statement(&on(INSERT), &[&tenant, &value]);
        group.add(pgbench.lane(
            &format!("{NONE}{suffix}"),
            database,
            clients,
            &format!("{keys}{insert}"),
        )?);
        let gated = pgbench::statement(&on(GATED_INSERT), &[&tenant, &value, ":key::bigint"]);
        group.add(pgbench.lane(
            &format!("gated insert{suffix}"),
            database,
            clients,
            &format!("{keys}{gated}"),
        )?);
        let write = format!(
            "{keys}{BEGIN};\nSELECT pg_try_advisory_xact_lock_shared(:key::bigint);\n{insert}COMMIT;\n"
        );
        group.add(pgbench.lane(&format!("gated write{suffix}"), database, clients, &write)?);
    }
    bench.measure(group).await
}

/// The tenant of a client of pgbench.
fn tenant_of_client() -> String {
    "'tenant-' || :client_id::text".to_owned()
}

fn value() -> String {
    format!("'{VALUE}'")
}

struct RawInsert {
    client: Connection,
    insert: Statement,
    tenant: String,
    key: Option<i64>,
}

impl Client for RawInsert {
    async fn once(&mut self) -> Result {
        // Spelled out: diesel-async gives everything an `execute`.
        let inserted = match self.key {
            Some(key) => {
                Connection::execute(&self.client, &self.insert, &[&self.tenant, &VALUE, &key]).await?
            }
            None => Connection::execute(&self.client, &self.insert, &[&self.tenant, &VALUE]).await?,
        };
        if inserted == 1 {
            Ok(())
        } else {
            Err("a gate was closed".into())
        }
    }
}

struct RawWrite {
    client: Connection,
    enter: Option<Statement>,
    insert: Statement,
    tenant: String,
    keys: Vec<i64>,
}

impl Client for RawWrite {
    async fn once(&mut self) -> Result {
        self.client.batch_execute(BEGIN).await?;
        if let Some(enter) = &self.enter {
            self.client.query_one(enter, &[&self.keys]).await?;
        }
        // Spelled out: diesel-async gives everything an `execute`.
        Connection::execute(&self.client, &self.insert, &[&self.tenant, &VALUE]).await?;
        self.client.batch_execute("SELECT 1; COMMIT").await?;
        Ok(())
    }
}
