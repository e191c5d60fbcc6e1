//! What a process does for its leases: it keeps them, in whatever table they live, and gives them back.

use std::time::Duration;

use leasehold_domain::{
    AcquireError, DistributedLock, Holder, LockGuard, LockName, LockRequest, Released, ResumeError,
};
use leasehold_storage::advisory::AdvisoryKey;
use leasehold_storage::{Database, LeaseColumns, RowLease, RowLeaseTable};
use tokio_postgres::Client;

use crate::support::{TestDatabase, eventually};

struct Bench {
    database: TestDatabase,
    process: Database,
    client: Client,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let process = Database::connect(database.options(), 4).await.unwrap();
        Self {
            database,
            process,
            client,
        }
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

/// Waits until a guard is held for so much longer than was granted.
async fn outlives(guard: &LockGuard, more: Duration) {
    let granted = guard.expires_at().unwrap();
    eventually("its slices have passed", async || {
        guard.expires_at().unwrap() > granted + more || guard.is_lost()
    })
    .await;
    assert!(!guard.is_lost());
}

/// Postgres has no interval for the longest duration there is, and all renewals are one statement.
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_hold_is_renewed_like_the_others() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let ttl = Duration::from_millis(1500);
    let endless = named("endless").with_ttl(ttl).with_max_hold(Duration::MAX);
    let endless = lock.try_acquire(&endless).await.unwrap();
    let other = lock.try_acquire(&named("other").with_ttl(ttl)).await.unwrap();
    outlives(&other, ttl * 4).await;
    assert!(!endless.is_lost());
    lock.extend(&endless, Duration::from_secs(60)).await.unwrap();
}

/// A migration that has a table locked keeps its leases from being renewed, and only those.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_does_not_stop_the_heartbeat_of_another() {
    let bench = Bench::start().await;
    let plans = bench.plans().await;
    let stuck = plans
        .try_acquire(&plan().with_ttl(Duration::from_secs(12)))
        .await
        .unwrap();
    let ttl = Duration::from_secs(3);
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

/// By hand, to pin it. What cannot be read of one lease must not end the others.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_is_none_does_not_stop_the_heartbeat_of_others() {
    let bench = Bench::start().await;
    let leases = bench.process.leases();
    let ttl = Duration::from_secs(3);
    let pinned = leases.try_acquire(&named("pinned").with_ttl(ttl)).await.unwrap();
    let pin = "UPDATE leasehold.leases SET expires_at = 'infinity'";
    bench.client.execute(pin, &[]).await.unwrap();
    eventually("nobody says how long it is held", async || pinned.is_lost()).await;
    let other = leases.try_acquire(&named("other").with_ttl(ttl)).await.unwrap();
    outlives(&other, ttl * 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn key_columns_may_have_any_names() {
    let bench = Bench::start().await;
    let plans = bench.plans().await;
    let ttl = Duration::from_millis(1500);
    let guard = plans.try_acquire(&plan().with_ttl(ttl)).await.unwrap();
    outlives(&guard, ttl * 2).await;
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

/// A table with many rows, found by keys of all the types that there are, and the lock on it.
async fn typed(bench: &Bench) -> RowLease {
    let table = "CREATE DOMAIN slug AS TEXT CHECK (VALUE ~ '^[a-z0-9]+$');
         CREATE TABLE typed (tenant slug, id UUID, number BIGINT, part INTEGER, lock_id UUID, lock_operation TEXT,
                             lock_by TEXT, lock_acquired_at TIMESTAMPTZ, lock_expires_at TIMESTAMPTZ,
                             lock_fencing_token BIGINT NOT NULL DEFAULT 0, PRIMARY KEY (tenant, id, number, part))
             WITH (fillfactor = 50);
         INSERT INTO typed
             SELECT 't' || n, ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid, -n, n
             FROM generate_series(1, 2000) AS n;
         ANALYZE typed;
         SELECT count(*) FROM typed WHERE number + 0 = 7";
    let maker = bench.database.client().await;
    let pid: i32 = maker
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    maker.batch_execute(table).await.unwrap();
    drop(maker);
    // What a session has counted is told when it ends.
    let there = "SELECT FROM pg_stat_activity WHERE pid = $1";
    eventually("its maker has left", async || {
        bench.client.query(there, &[&pid]).await.unwrap().is_empty()
    })
    .await;
    let table = RowLeaseTable::new("public", "typed", "typed")
        .key_column("tenant")
        .uuid_key_column("id")
        .integer_key_column("number")
        .integer_key_column("part")
        .build()
        .unwrap();
    bench.process.row_leases(table)
}

fn typed_name(parts: [&str; 4]) -> LockRequest {
    let name = LockName::new(std::iter::once("typed").chain(parts)).unwrap();
    LockRequest::new(name, Holder::new("alice", "edit"))
}

const SEVENTH: [&str; 4] = ["t7", "00000000-0000-4000-8000-000000000007", "-7", "7"];

/// Every statement there is, and none of them looks through the table.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_any_type_are_found_by_their_index() {
    let bench = Bench::start().await;
    let lock = typed(&bench).await;
    let client = bench.database.client().await;
    let scans = async || {
        let sql = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'typed'";
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    // That of who has made the table and looked all through it.
    eventually("looks through the table are counted", async || {
        scans().await.0 > 0
    })
    .await;
    let (before, found) = scans().await;

    let seventh = typed_name(SEVENTH);
    let ttl = Duration::from_millis(1500);
    let guard = lock.try_acquire(&seventh.clone().with_ttl(ttl)).await.unwrap();
    assert!(matches!(
        lock.try_acquire(&seventh).await,
        Err(AcquireError::Contended(_))
    ));
    let granted = guard.expires_at().unwrap();
    eventually("it is renewed", async || {
        guard.expires_at().unwrap() > granted + ttl * 2 || guard.is_lost()
    })
    .await;
    lock.extend(&guard, Duration::from_secs(60)).await.unwrap();
    let write = bench
        .process
        .fenced_transaction(&guard, async |_| Ok::<_, diesel::result::Error>(()));
    write.await.unwrap();
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
    drop(lock.try_acquire(&seventh).await.unwrap());
    eventually("a dropped guard gives back", async || {
        lock.inspect(seventh.name()).await.unwrap().is_none()
    })
    .await;
    let guard = lock.try_acquire(&seventh).await.unwrap();
    let ended = lock.force_release(guard.name(), "operator", "stuck").await;
    assert_eq!(ended.unwrap().unwrap().lock_id, Some(guard.lock_id()));
    drop(guard);

    bench.process.shutdown(Duration::from_secs(10)).await;
    drop((bench, lock));
    let others =
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    eventually("its statements are counted", async || {
        client.query(others, &[]).await.unwrap().is_empty() && scans().await.1 >= found + 10
    })
    .await;
    assert_eq!(scans().await.0, before, "a statement looked through the table");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_no_value_of_its_column_names_no_row() {
    let bench = Bench::start().await;
    let lock = typed(&bench).await;
    let [tenant, id, number, part] = SEVENTH;
    let refused = [
        [tenant, "7", number, part],
        [tenant, "{00000000-0000-4000-8000-000000000007}", number, part],
        [tenant, "00000000-0000-4000-8000-00000000000A", number, part],
        [tenant, id, "seven", part],
        [tenant, id, "-7.0", part],
        [tenant, id, " -7", part],
        [tenant, id, "-07", part],
        [tenant, id, "-9223372036854775809", part],
        [tenant, id, number, "+7"],
    ];
    for parts in refused {
        let request = typed_name(parts);
        let result = lock.try_acquire(&request).await;
        assert!(
            matches!(result, Err(AcquireError::Invalid(_))),
            "{parts:?}: {result:?}"
        );
        assert_eq!(lock.inspect(request.name()).await.unwrap(), None);
    }
    let absent = [
        ["No slug", id, number, part],
        [tenant, id, "9223372036854775807", part],
        // More than the column can have.
        [tenant, id, number, "2147483648"],
    ];
    for parts in absent {
        let result = lock.try_acquire(&typed_name(parts)).await;
        assert!(
            matches!(result, Err(AcquireError::NotFound { .. })),
            "{parts:?}: {result:?}"
        );
    }
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

/// Who frees a name forgets who wanted it. A waiter that was told of it, and then was too slow, says again that it waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_that_was_too_slow_says_again_that_it_waits() {
    let bench = Bench::start().await;
    let (leases, request) = (bench.process.leases(), named("contended"));
    let held = leases.try_acquire(&request).await.unwrap();
    let other = Database::connect(bench.database.options(), 2).await.unwrap();
    let (lock, asked) = (other.leases(), request.clone());
    let waiting = tokio::spawn(async move { lock.acquire(&asked, Duration::from_secs(60)).await });
    let said = async || {
        let sql = "SELECT extract(epoch FROM query_start)::float8 FROM pg_stat_activity
                   WHERE datname = current_database() AND query LIKE 'NOTIFY leasehold_wait%'";
        let row = bench.client.query_opt(sql, &[]).await.unwrap();
        row.map(|row| row.get::<_, f64>(0))
    };
    eventually("it says that it waits", async || said().await.is_some()).await;
    let first = said().await.unwrap();
    let AdvisoryKey::Big(key) = AdvisoryKey::of(request.name()) else {
        panic!("names have keys of 64 bits")
    };
    // As somebody who has freed it, and took it again at once.
    let free = format!("NOTIFY leasehold_free, '{key}'");
    bench.client.batch_execute(&free).await.unwrap();
    eventually("it says so again", async || said().await.unwrap() > first).await;
    // It would have done so after ten seconds in any case.
    assert!(said().await.unwrap() < first + 8.0);
    leases.release(held).await.unwrap();
    other
        .leases()
        .release(waiting.await.unwrap().unwrap())
        .await
        .unwrap();
}

/// Two guards of one hold would each believe to be the only one.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_take_up_a_hold_at_once_one_gets_it() {
    let bench = Bench::start().await;
    let other = Database::connect(bench.database.options(), 4).await.unwrap();
    let (leases, lock) = (bench.process.leases(), other.leases());
    for _ in 0..20 {
        let request = named("resumed");
        let first = leases.try_acquire(&request).await.unwrap();
        let (one, two) = tokio::join!(
            lock.resume(&request, first.lock_id()),
            lock.resume(&request, first.lock_id()),
        );
        let guard = match (one, two) {
            (Ok(guard), Err(refused)) | (Err(refused), Ok(guard)) => {
                assert!(matches!(refused, ResumeError::NotHeld { .. }), "{refused:?}");
                guard
            }
            both => panic!("{both:?}"),
        };
        let again = lock.resume(&request, first.lock_id()).await;
        assert!(matches!(again, Err(ResumeError::NotHeld { .. })), "{again:?}");
        assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
    }
}

/// An operator who ends a transaction lock must not end the session that thousands of other locks are in.
#[tokio::test(flavor = "multi_thread")]
async fn force_ends_no_lock_session() {
    let bench = Bench::start().await;
    let (sessions, transactions) = (bench.process.session_locks(), bench.process.transaction_locks());
    let request = named("of a session");
    let guard = sessions.try_acquire(&request).await.unwrap();
    let held = transactions.inspect(request.name()).await.unwrap();
    assert!(held.is_some(), "both have the same key");
    let ended = transactions
        .force_release(request.name(), "operator", "stuck")
        .await;
    assert_eq!(ended.unwrap(), None);
    // It asks the session.
    sessions.extend(&guard, Duration::from_secs(60)).await.unwrap();
    assert_eq!(sessions.release(guard).await.unwrap(), Released::Held);
    let guard = transactions.try_acquire(&request).await.unwrap();
    let ended = transactions
        .force_release(request.name(), "operator", "stuck")
        .await;
    assert_eq!(ended.unwrap().unwrap().lock_id, Some(guard.lock_id()));
}

/// A row that goes away with its lease is no lost lock.
#[tokio::test(flavor = "multi_thread")]
async fn a_leased_row_can_be_removed() {
    let bench = Bench::start().await;
    let plans = bench.plans().await;
    let ttl = Duration::from_secs(6);
    let guard = plans.try_acquire(&plan().with_ttl(ttl)).await.unwrap();
    let remove = format!("DELETE FROM plans WHERE lock_id = '{}'", guard.lock_id());
    let removing = bench.process.removing(&guard);
    assert_eq!(bench.client.execute(&remove, &[]).await.unwrap(), 1);
    // The next beat comes after a third of the slice.
    tokio::time::sleep(ttl / 2).await;
    assert!(!guard.is_lost());
    removing.committed();
    // Nobody will renew it any more, and nobody need.
    let lost = tokio::time::timeout(ttl, guard.lost()).await;
    assert!(lost.is_err(), "it was not lost");
    assert_eq!(plans.release(guard).await.unwrap(), Released::Held);
}
