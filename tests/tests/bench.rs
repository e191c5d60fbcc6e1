//! [`Bench`]: one process that locks, a proxy between it and its database, and a stranger who looks on.

use diesel::sql_types::BigInt;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_domain::{DistributedLock, Durability, Holder, LockGuard, LockName, LockRequest};
use leasehold_storage::{ConnectOptions, Database, TransactionError};
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::patience::eventually;
use leasehold_system_tests::proxy::Proxy;
use tokio_postgres::Client;

pub(crate) type Failure = diesel::result::Error;

/// Both ways to guard a write.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    Lease,
    Transaction,
}

pub(crate) const MODES: [Mode; 2] = [Mode::Lease, Mode::Transaction];

pub(crate) struct Bench {
    pub(crate) proxy: Proxy,
    pub(crate) database: TestDatabase,
    /// Through the proxy.
    pub(crate) process: Database,
    /// Past the proxy.
    pub(crate) client: Client,
}

impl Bench {
    pub(crate) async fn start(pool_size: u32) -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        create_table(&client).await;
        let proxy = Proxy::start(&database);
        let options = ConnectOptions::parse(&proxy.url(&database), None).unwrap();
        let process = Database::connect(options, pool_size).await.unwrap();
        // It begins to listen meanwhile, which is no part of what is counted from here on.
        eventually("it listens", async || {
            let statements = proxy.traffic().statements;
            let mut since = statements.iter().skip_while(|text| !text.contains("LISTEN"));
            since.any(|text| text.contains("pg_backend_pid()"))
        })
        .await;
        Self {
            proxy,
            database,
            process,
            client,
        }
    }

    pub(crate) fn lock(&self, mode: Mode) -> Box<dyn DistributedLock> {
        lock(&self.process, mode)
    }

    pub(crate) async fn written(&self) -> Vec<i64> {
        written(&self.client).await
    }

    /// What the row of the lease of `name` says, past the proxy: whether it is held, and whether by this clock it
    /// still lasts.
    pub(crate) async fn lease_is_live(&self, name: &LockName) -> bool {
        let sql = "SELECT FROM leasehold.leases WHERE name = $1 AND expires_at > clock_timestamp()";
        self.client
            .query_opt(sql, &[&name.encoded()])
            .await
            .unwrap()
            .is_some()
    }
}

pub(crate) async fn create_table(client: &Client) {
    client
        .batch_execute("CREATE TABLE written (value BIGINT PRIMARY KEY)")
        .await
        .unwrap();
}

pub(crate) async fn written(client: &Client) -> Vec<i64> {
    let rows = client
        .query("SELECT value FROM written ORDER BY value", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

pub(crate) fn lock(process: &Database, mode: Mode) -> Box<dyn DistributedLock> {
    match mode {
        Mode::Lease => Box::new(process.leases()),
        Mode::Transaction => Box::new(process.transaction_locks()),
    }
}

pub(crate) fn named(name: &str) -> LockRequest {
    LockRequest::new(
        LockName::new(["bench", name]).unwrap(),
        Holder::new("alice", "edit"),
    )
}

/// For a hold whose only effect is a fenced transaction.
pub(crate) fn for_a_write(name: &str) -> LockRequest {
    named(name).with_durability(Durability::WithWrite)
}

pub(crate) async fn insert(conn: &mut AsyncPgConnection, value: i64) -> Result<(), Failure> {
    let query = diesel::sql_query("INSERT INTO written VALUES ($1)").bind::<BigInt, _>(value);
    // By path: the trait has an `execute` for everything, the raw client included.
    RunQueryDsl::execute(leasehold_storage::Prepared(query), conn)
        .await
        .map(|_| ())
}

/// The write, as a transaction that nothing guards.
pub(crate) async fn write_unguarded(process: &Database, value: i64) {
    process
        .transaction(async |conn| insert(conn, value).await)
        .await
        .unwrap();
}

/// The same write under a guard that its commit releases.
pub(crate) async fn write_under(
    process: &Database,
    guard: &LockGuard,
    value: i64,
) -> Result<(), TransactionError<Failure>> {
    process
        .fenced_transaction_releasing(guard, async |conn| insert(conn, value).await)
        .await
        .map(|written| written.value)
}

/// From asking for the lock to having released it.
pub(crate) async fn write_guarded(process: &Database, mode: Mode, value: i64) {
    let lock = lock(process, mode);
    let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
    write_under(process, &guard, value).await.unwrap();
    lock.release(guard).await.unwrap();
}
