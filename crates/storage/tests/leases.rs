//! What a process does for its leases: it keeps them, in whatever table they live, and gives them back.

use std::time::Duration;

use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest};
use leasehold_storage::{Database, LeaseColumns, RowLease, RowLeaseTable};
use tokio_postgres::Client;

use crate::support::{TestDatabase, eventually};

struct Bench {
    process: Database,
    client: Client,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let process = Database::connect(database.options(), 4).await.unwrap();
        Self { process, client }
    }

    /// A table of the caller with one row, whose key columns have the names of things that the statements use.
    async fn plans(&self) -> RowLease {
        let table =
            "CREATE TABLE plans (operation TEXT, until TEXT, lock_id UUID, lock_operation TEXT, lock_by TEXT,
                         lock_acquired_at TIMESTAMPTZ, lock_expires_at TIMESTAMPTZ,
                         lock_fencing_token BIGINT NOT NULL DEFAULT 0, PRIMARY KEY (operation, until));
                     INSERT INTO plans VALUES ('a', 'b')";
        self.client.batch_execute(table).await.unwrap();
        let table = RowLeaseTable::new("public", "plans", "plan")
            .key_column("operation")
            .key_column("until")
            .columns(LeaseColumns::prefixed("lock_"))
            .build()
            .unwrap();
        self.process.row_leases(table)
    }
}

fn named(name: &str) -> LockRequest {
    let name = LockName::new(["leases", name]).unwrap();
    LockRequest::new(name, Holder::new("alice", "edit"))
}

fn plan() -> LockRequest {
    let name = LockName::new(["plan", "a", "b"]).unwrap();
    LockRequest::new(name, Holder::new("alice", "edit"))
}

/// Postgres has no interval for the longest duration there is, and all renewals are one statement.
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_hold_is_renewed_like_the_others() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let ttl = Duration::from_millis(600);
    let endless = named("endless").with_ttl(ttl).with_max_hold(Duration::MAX);
    let endless = lock.try_acquire(&endless).await.unwrap();
    let other = lock.try_acquire(&named("other").with_ttl(ttl)).await.unwrap();
    let granted = other.expires_at().unwrap();
    eventually("four slices have passed", async || {
        other.expires_at().unwrap() > granted + ttl * 4 || other.is_lost()
    })
    .await;
    assert!(!other.is_lost());
    assert!(!endless.is_lost());
    lock.extend(&endless, Duration::from_secs(60)).await.unwrap();
}

/// A migration that has a table locked keeps its leases from being renewed, and only those.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_does_not_stop_the_heartbeat_of_another() {
    let bench = Bench::start().await;
    let plans = bench.plans().await;
    let stuck = plans
        .try_acquire(&plan().with_ttl(Duration::from_secs(6)))
        .await
        .unwrap();
    let ttl = Duration::from_millis(1500);
    let other = bench
        .process
        .leases()
        .try_acquire(&named("other").with_ttl(ttl))
        .await
        .unwrap();
    bench
        .client
        .batch_execute("BEGIN; LOCK TABLE plans")
        .await
        .unwrap();
    eventually("the lease in the locked table is over", async || {
        stuck.is_lost() || other.is_lost()
    })
    .await;
    assert!(!other.is_lost());
}

#[tokio::test(flavor = "multi_thread")]
async fn key_columns_may_have_any_names() {
    let bench = Bench::start().await;
    let plans = bench.plans().await;
    let ttl = Duration::from_millis(600);
    let guard = plans.try_acquire(&plan().with_ttl(ttl)).await.unwrap();
    let granted = guard.expires_at().unwrap();
    eventually("two slices have passed", async || {
        guard.expires_at().unwrap() > granted + ttl * 2 || guard.is_lost()
    })
    .await;
    plans.extend(&guard, Duration::from_secs(60)).await.unwrap();
    bench
        .process
        .fenced_transaction(&guard, async |_| Ok::<_, diesel::result::Error>(()))
        .await
        .unwrap();
    plans.release(guard).await.unwrap();
    drop(plans.try_acquire(&plan()).await.unwrap());
    eventually("a dropped guard gives back", async || {
        plans.inspect(plan().name()).await.unwrap().is_none()
    })
    .await;
    let guard = plans.try_acquire(&plan()).await.unwrap();
    let ended = plans
        .force_release(guard.name(), "operator", "stuck")
        .await
        .unwrap();
    assert_eq!(ended.unwrap().lock_id, Some(guard.lock_id()));
}

/// A service has several locks, and each is the same trait: a guard that is given to the wrong one is released all
/// the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_is_given_to_another_lock_leaks_nothing() {
    let bench = Bench::start().await;
    let (leases, transactions) = (bench.process.leases(), bench.process.transaction_locks());
    let plans = bench.plans().await;
    let locks: [&dyn DistributedLock; 3] = [&leases, &transactions, &plans];
    for (of, lock) in locks.iter().enumerate() {
        let request = if of == 2 { plan() } else { named("mixed up") };
        for (to, other) in locks.iter().enumerate() {
            let guard = lock.try_acquire(&request).await.unwrap();
            // What it answers is not promised, that it ends the hold is.
            drop(other.release(guard).await);
            eventually("it is free", async || {
                lock.inspect(request.name()).await.unwrap().is_none()
            })
            .await;
            let next = lock.try_acquire(&request).await;
            assert!(next.is_ok(), "{of} given to {to}: {next:?}");
            lock.release(next.unwrap()).await.unwrap();
        }
    }
}

/// A lease and a transaction lock of one name are two locks: who waits for one does not stand behind the other.
#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_lock_has_its_own_queue() {
    let bench = Bench::start().await;
    let (leases, transactions) = (bench.process.leases(), bench.process.transaction_locks());
    let request = named("two kinds");
    let held = leases.try_acquire(&request).await.unwrap();
    let (first, asked) = (leases.clone(), request.clone());
    let waiting = tokio::spawn(async move { first.acquire(&asked, Duration::from_secs(60)).await });
    eventually("the first waits", async || {
        // It has tried, and told everybody that it waits.
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'NOTIFY leasehold_wait%'";
        !bench.client.query(sql, &[]).await.unwrap().is_empty()
    })
    .await;
    let free = transactions.acquire(&request, Duration::from_secs(60));
    let free = tokio::time::timeout(Duration::from_secs(10), free).await;
    transactions
        .release(free.expect("nobody has it").unwrap())
        .await
        .unwrap();
    leases.release(held).await.unwrap();
    leases.release(waiting.await.unwrap().unwrap()).await.unwrap();
}
