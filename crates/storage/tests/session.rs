//! Session locks: the conformance suite, and what is special about many locks in one connection.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{Abilities, Life, Provider, hold_as_told, this_test_binary};
use leasehold_domain::{DistributedLock, Holder, LockMode, LockName, LockRequest};
use leasehold_storage::advisory::AdvisoryKey;
use leasehold_storage::{ConnectOptions, Database};
use tokio::process::Command;
use tokio_postgres::Client;

use crate::support::{TestDatabase, eventually};

const URL: &str = "LEASEHOLD_CONFORMANCE_DATABASE_URL";

const ADVISORY: &str = "\
SELECT pid, granted FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// The backend that has the lock of a `bigint` key.
const HOLDER: &str = "\
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (classid::bigint << 32) | objid::bigint = $1";

fn name(part: &str) -> LockName {
    LockName::new(["session test", part]).unwrap()
}

fn request(name: &LockName) -> LockRequest {
    LockRequest::new(name.clone(), Holder::new("tester", "test"))
}

fn shared(name: &LockName) -> LockRequest {
    request(name).with_mode(LockMode::Shared)
}

fn bits(name: &LockName) -> i64 {
    match AdvisoryKey::of(name) {
        AdvisoryKey::Big(key) => key,
        AdvisoryKey::Pair(..) => unreachable!("names have big keys"),
    }
}

async fn connect(database: &TestDatabase) -> Database {
    Database::connect(database.options(), 2).await.unwrap()
}

/// How many advisory locks there are, waited for or granted.
async fn advisory_locks(client: &Client) -> usize {
    client.query(ADVISORY, &[]).await.unwrap().len()
}

async fn nothing_is_left(client: &Client) {
    eventually("no advisory lock", async || advisory_locks(client).await == 0).await;
}

struct Sessions {
    database: TestDatabase,
    client: Client,
}

impl Sessions {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        Self { database, client }
    }
}

impl Provider for Sessions {
    fn abilities(&self) -> Abilities {
        Abilities {
            life: Life::Session,
            shared: true,
            processes: true,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        Arc::new(connect(&self.database).await.session_locks())
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        LockName::new(["plan", scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        match advisory_locks(&self.client).await {
            0 => None,
            locks => Some(format!("{locks} advisory locks")),
        }
    }

    async fn lose(&self, name: &LockName) {
        let holders = self.client.query(HOLDER, &[&bits(name)]).await.unwrap();
        assert!(!holders.is_empty(), "somebody holds {name}");
        let holders: Vec<i32> = holders.iter().map(|row| row.get(0)).collect();
        self.client
            .execute(
                "SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid",
                &[&holders],
            )
            .await
            .unwrap();
        let gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1)";
        eventually("the sessions have ended", async || {
            self.client
                .query_one(gone, &[&holders])
                .await
                .unwrap()
                .get::<_, i64>(0)
                == 0
        })
        .await;
    }

    async fn expire(&self, _name: &LockName) -> bool {
        false
    }

    async fn unreachable(&self) -> Option<Arc<dyn DistributedLock>> {
        let database = TestDatabase::create().await;
        let locks = connect(&database).await.session_locks();
        database.close().await;
        Some(Arc::new(locks))
    }

    fn holder_process(&self) -> Option<Command> {
        let mut command = this_test_binary("session::holder");
        command.env(URL, self.database.url());
        Some(command)
    }
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn holder() {
    let url = std::env::var(URL).expect("the provider sets it");
    let options = ConnectOptions::parse(&url, None).unwrap();
    let database = Database::connect(options, 2).await.unwrap();
    hold_as_told(Arc::new(database.session_locks())).await;
    database.shutdown(Duration::from_secs(5)).await;
}

mod conformance {
    use super::Sessions;
    leasehold_conformance::lock_conformance!(Sessions::start().await);
}
