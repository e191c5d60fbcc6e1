//! The conformance suite against every lock of this crate.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{Abilities, Life, Provider, hold_as_told, this_test_binary};
use leasehold_domain::{DistributedLock, Holder, LockName};
use leasehold_storage::{Database, LeaseColumns, LeaseTable, RowLeaseTable};
use tokio::process::Command;
use tokio_postgres::Client;

use crate::support::TestDatabase;

const URL: &str = "LEASEHOLD_CONFORMANCE_DATABASE_URL";
/// Enough for the clauses that try a hundred times at once.
const POOL: u32 = 8;

/// Which lock is on trial.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lease,
    Row,
    Transaction,
}

struct Postgres {
    kind: Kind,
    database: TestDatabase,
    client: Client,
}

impl Postgres {
    async fn start(kind: Kind) -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        if kind == Kind::Row {
            client.batch_execute(PLANS).await.unwrap();
        }
        Self {
            kind,
            database,
            client,
        }
    }

    /// Changes the lease row of a name; the assignments use the columns of the library's own table.
    async fn change(&self, name: &LockName, assignments: &str) -> u64 {
        let (table, condition, values) = match self.kind {
            Kind::Lease => ("leasehold.leases", "name = $1", vec![name.encoded().to_owned()]),
            Kind::Row => (
                "plans",
                "tenant_id = $1 AND id = $2",
                name.parts().skip(1).map(str::to_owned).collect(),
            ),
            Kind::Transaction => unreachable!("a transaction lock has no row"),
        };
        let assignments = match self.kind {
            Kind::Row => assignments
                .replace("locked_by", "lock_owner")
                .replace("operation", "lock_operation"),
            _ => assignments.to_owned(),
        };
        let statement = format!("UPDATE {table} SET {assignments} WHERE {condition}");
        let binds: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            values.iter().map(|value| value as _).collect();
        self.client.execute(&statement, &binds).await.unwrap()
    }

    async fn holding_sessions(&self) -> Vec<i32> {
        let rows = self.client.query(ADVISORY, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }
}

/// A table as a user might have it, with columns that do not share one prefix and need quotes.
const PLANS: &str = r#"
CREATE TABLE plans (
    tenant_id TEXT NOT NULL,
    id        TEXT NOT NULL,
    lock_id UUID, lock_operation TEXT, lock_owner TEXT, acquired_at TIMESTAMPTZ, expires_at TIMESTAMPTZ,
    "Fencing token" BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, id),
    CHECK (num_nulls(lock_id, lock_operation, lock_owner, acquired_at, expires_at) IN (0, 5))
)"#;

const ADVISORY: &str = "\
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

pub(crate) fn plans() -> LeaseTable {
    RowLeaseTable::new("public", "plans", "plan")
        .key_column("tenant_id")
        .key_column("id")
        .columns(LeaseColumns {
            by: "lock_owner".into(),
            acquired_at: "acquired_at".into(),
            expires_at: "expires_at".into(),
            fencing_token: "Fencing token".into(),
            ..LeaseColumns::prefixed("lock_")
        })
        .build()
        .unwrap()
}

fn lock_of(kind: Kind, database: &Database) -> Arc<dyn DistributedLock> {
    match kind {
        Kind::Lease => Arc::new(database.leases()),
        Kind::Row => Arc::new(database.row_leases(plans())),
        Kind::Transaction => Arc::new(database.transaction_locks()),
    }
}

impl Provider for Postgres {
    fn abilities(&self) -> Abilities {
        let life = if self.kind == Kind::Transaction {
            Life::Session
        } else {
            Life::Lease
        };
        Abilities {
            life,
            shared: false,
            processes: true,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        let database = Database::connect(self.database.options(), POOL).await.unwrap();
        lock_of(self.kind, &database)
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        if self.kind == Kind::Row {
            let insert = "INSERT INTO plans (tenant_id, id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
            self.client.execute(insert, &[&scope, &item]).await.unwrap();
        }
        LockName::new(["plan", scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        let rows = match self.kind {
            Kind::Lease => "SELECT name FROM leasehold.leases WHERE expires_at > clock_timestamp()",
            Kind::Row => "SELECT id FROM plans WHERE expires_at > clock_timestamp()",
            Kind::Transaction => "SELECT NULL::text WHERE false",
        };
        let rows = self.client.query(rows, &[]).await.unwrap();
        let leases: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let sessions = self.holding_sessions().await;
        (!leases.is_empty() || !sessions.is_empty())
            .then(|| format!("leases {leases:?}, sessions {sessions:?}"))
    }

    async fn lose(&self, name: &LockName) {
        if self.kind == Kind::Transaction {
            let ended = self
                .database_lock()
                .await
                .force_release(name, "test", "lose")
                .await
                .unwrap();
            assert!(ended.is_some(), "somebody held {name}");
            return;
        }
        let gone =
            "lock_id = NULL, operation = NULL, locked_by = NULL, acquired_at = NULL, expires_at = NULL";
        assert_eq!(self.change(name, gone).await, 1);
    }

    async fn expire(&self, name: &LockName) -> bool {
        if self.kind == Kind::Transaction {
            return false;
        }
        let past = "acquired_at = acquired_at - interval '25 hours', expires_at = clock_timestamp() - interval '1 hour'";
        self.change(name, past).await == 1
    }

    fn holder_process(&self) -> Option<Command> {
        let mut command = this_test_binary(match self.kind {
            Kind::Lease => "providers::lease_holder",
            Kind::Row => "providers::row_holder",
            Kind::Transaction => "providers::transaction_holder",
        });
        command.env(URL, self.database.url());
        Some(command)
    }

    fn told(&self, holder: &Holder) -> Holder {
        match self.kind {
            // Six columns have no room for more.
            Kind::Row => Holder::new(&holder.owner, &holder.operation),
            Kind::Lease | Kind::Transaction => holder.clone(),
        }
    }

    async fn unreachable(&self) -> Option<Arc<dyn DistributedLock>> {
        let database = TestDatabase::create().await;
        let lock = lock_of(
            self.kind,
            &Database::connect(database.options(), POOL).await.unwrap(),
        );
        database.close().await;
        Some(lock)
    }

    async fn absent_name(&self) -> Option<LockName> {
        (self.kind == Kind::Row).then(|| LockName::new(["plan", "nobody", "nothing"]).unwrap())
    }
}

impl Postgres {
    async fn database_lock(&self) -> leasehold_storage::PgTransactionLock {
        Database::connect(self.database.options(), POOL)
            .await
            .unwrap()
            .transaction_locks()
    }
}

async fn hold(kind: Kind) {
    let url = std::env::var(URL).expect("the provider sets it");
    let options = leasehold_storage::ConnectOptions::parse(&url, None).unwrap();
    let database = Database::connect(options, 2).await.unwrap();
    hold_as_told(lock_of(kind, &database)).await;
    database.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn lease_holder() {
    hold(Kind::Lease).await;
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn row_holder() {
    hold(Kind::Row).await;
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn transaction_holder() {
    hold(Kind::Transaction).await;
}

mod lease {
    use super::{Kind, Postgres};
    leasehold_conformance::lock_conformance!(Postgres::start(Kind::Lease).await);
}

mod row {
    use super::{Kind, Postgres};
    leasehold_conformance::lock_conformance!(Postgres::start(Kind::Row).await);
}

mod transaction {
    use super::{Kind, Postgres};
    leasehold_conformance::lock_conformance!(Postgres::start(Kind::Transaction).await);
}
