//! Fenced transactions: what commits, what cannot, and what is told about it.

use std::time::Duration;

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::FutureExt;
use leasehold_domain::{
    AcquireError, DistributedLock, Durability, Holder, LockGuard, LockName, LockRequest, Released,
};
use leasehold_storage::{Database, TransactionError};
use tokio_postgres::Client;

use crate::support::measured::measured;
use crate::support::{TestDatabase, eventually};

type Failure = diesel::result::Error;

struct Bench {
    #[expect(dead_code, reason = "keeps the database's name for failure messages")]
    database: TestDatabase,
    process: Database,
    client: Client,
}

/// Both ways to guard a write.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Lease,
    Transaction,
}

const MODES: [Mode; 2] = [Mode::Lease, Mode::Transaction];

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        client
            .batch_execute("CREATE TABLE written (value BIGINT PRIMARY KEY, token BIGINT)")
            .await
            .unwrap();
        let process = Database::connect(database.options(), 4).await.unwrap();
        Self {
            database,
            process,
            client,
        }
    }

    fn lock(&self, mode: Mode) -> Box<dyn DistributedLock> {
        match mode {
            Mode::Lease => Box::new(self.process.leases()),
            Mode::Transaction => Box::new(self.process.transaction_locks()),
        }
    }

    async fn written(&self) -> Vec<i64> {
        let rows = self
            .client
            .query("SELECT value FROM written ORDER BY value", &[])
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    async fn shift_expiry(&self, interval: &str) {
        let shift = format!(
            "UPDATE leasehold.leases SET acquired_at = acquired_at - interval '25 hours', expires_at = expires_at + interval '{interval}'"
        );
        assert_eq!(self.client.execute(&shift, &[]).await.unwrap(), 1);
    }
}

fn request() -> LockRequest {
    LockRequest::new(
        LockName::new(["plan", "a"]).unwrap(),
        Holder::new("alice", "edit"),
    )
    .with_durability(Durability::WithWrite)
}

async fn write(process: &Database, guard: &LockGuard, value: i64) -> Result<(), TransactionError<Failure>> {
    process
        .fenced_transaction_releasing(guard, async |conn| {
            insert(conn, value).await?;
            Ok(())
        })
        .await
        .map(|written| written.value)
}

async fn insert(conn: &mut AsyncPgConnection, value: i64) -> Result<usize, Failure> {
    let query =
        diesel::sql_query("INSERT INTO written VALUES ($1)").bind::<diesel::sql_types::BigInt, _>(value);
    // By path: the trait has an `execute` for everything, the raw client included.
    diesel_async::RunQueryDsl::execute(query, conn).await
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_and_releases_in_one_transaction() {
    let bench = Bench::start().await;
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&request()).await.unwrap();
        assert_eq!(
            guard.fencing_token(),
            None,
            "a token is final only inside the transaction"
        );
        write(&bench.process, &guard, value).await.unwrap();
        // The commit was the release.
        let next = lock.try_acquire(&request()).await.unwrap();
        assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
        // And the late release has not touched the next holder.
        assert!(matches!(
            lock.try_acquire(&request()).await,
            Err(AcquireError::Contended(_))
        ));
        assert_eq!(lock.release(next).await.unwrap(), Released::Held);
    }
    assert_eq!(bench.written().await, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn its_future_can_be_spawned() {
    let bench = Bench::start().await;
    let process = bench.process.clone();
    let written = tokio::spawn(async move {
        let lock = process.leases();
        let name = String::from("borrowed by the work");
        let guard = lock.try_acquire(&request()).await.unwrap();
        let result = process
            .fenced_transaction(&guard, async |conn| {
                insert(conn, i64::try_from(name.len()).unwrap()).await?;
                diesel_async::AsyncConnection::transaction(conn, async |conn| insert(conn, 2).await).await
            })
            .await;
        lock.release(guard).await.unwrap();
        result.unwrap().value
    });
    assert_eq!(written.await.unwrap(), 1);
    assert_eq!(bench.written().await, [2, 20]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_that_it_committed_under_is_told() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&request()).await.unwrap();
    let mut tokens = Vec::new();
    for value in [1, 2] {
        let written = bench
            .process
            .fenced_transaction(&guard, async |conn| insert(conn, value).await)
            .await
            .unwrap();
        tokens.push(written.fencing_token.unwrap());
    }
    assert_eq!(tokens[0], tokens[1], "it is the token of the acquisition");
    let row = "SELECT fencing_token FROM leasehold.leases";
    let stored: i64 = bench.client.query_one(row, &[]).await.unwrap().get(0);
    assert_eq!(tokens[0].get(), stored);
    lock.release(guard).await.unwrap();

    let durable = request().with_durability(Durability::Durable);
    let guard = lock.try_acquire(&durable).await.unwrap();
    let released = bench
        .process
        .fenced_transaction_releasing(&guard, async |conn| insert(conn, 3).await)
        .await
        .unwrap();
    assert_eq!(released.fencing_token, guard.fencing_token());
    assert!(released.fencing_token > Some(tokens[0]));

    let lock = bench.process.transaction_locks();
    let guard = lock.try_acquire(&request()).await.unwrap();
    let written = bench
        .process
        .fenced_transaction(&guard, async |conn| insert(conn, 4).await)
        .await
        .unwrap();
    assert_eq!(written.fencing_token, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_expired_during_the_work_cannot_commit() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&request()).await.unwrap();
    let result = bench
        .process
        .fenced_transaction(&guard, async |conn| {
            insert(conn, 1).await?;
            bench.shift_expiry("-1 hour").await;
            Ok::<_, Failure>(())
        })
        .await;
    assert!(matches!(result, Err(TransactionError::Lost)), "{result:?}");
    assert!(guard.is_lost());
    assert!(bench.written().await.is_empty());
    assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_somebody_else_took_cannot_commit() {
    let bench = Bench::start().await;
    let (lock, other) = (bench.process.leases(), bench.process.leases());
    let guard = lock.try_acquire(&request()).await.unwrap();
    let result = bench
        .process
        .fenced_transaction_releasing(&guard, async |conn| {
            insert(conn, 1).await?;
            bench.shift_expiry("-1 hour").await;
            let taken = other.try_acquire(&request()).await.unwrap();
            bench
                .process
                .fenced_transaction(&taken, async |conn| insert(conn, 2).await)
                .await
                .unwrap();
            Ok::<_, Failure>(taken)
        })
        .await;
    assert!(matches!(result, Err(TransactionError::Lost)), "{result:?}");
    assert_eq!(bench.written().await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn forced_away_cannot_commit() {
    let bench = Bench::start().await;
    for mode in MODES {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&request()).await.unwrap();
        let held = lock.inspect(guard.name()).await.unwrap().unwrap();
        assert_eq!(held.lock_id, Some(guard.lock_id()), "{mode:?}");
        let (name, by, reason) = (guard.name(), "operator", "stuck");
        let result = bench
            .process
            .fenced_transaction(&guard, async |conn| {
                insert(conn, 1).await?;
                let ended = match mode {
                    Mode::Lease => bench.process.leases().force_release(name, by, reason).await,
                    Mode::Transaction => {
                        bench
                            .process
                            .transaction_locks()
                            .force_release(name, by, reason)
                            .await
                    }
                };
                assert_eq!(ended.unwrap().unwrap().lock_id, Some(guard.lock_id()));
                Ok::<_, Failure>(())
            })
            .await;
        assert!(result.is_err(), "{mode:?}");
        assert!(guard.is_lost(), "{mode:?}");
        assert_eq!(lock.inspect(name).await.unwrap(), None, "{mode:?}");
    }
    assert!(bench.written().await.is_empty());
    let audited = "SELECT count(*) FROM leasehold.lock_audit WHERE released_by = 'operator' AND reason = 'stuck' AND locked_by = 'alice'";
    assert_eq!(
        bench
            .client
            .query_one(audited, &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_work_may_take_many_slices() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let ttl = Duration::from_secs(1);
    let guard = lock.try_acquire(&request().with_ttl(ttl)).await.unwrap();
    let granted = guard.expires_at().unwrap();
    bench
        .process
        .fenced_transaction_releasing(&guard, async |conn| {
            insert(conn, 1).await?;
            eventually("four renewals", async || {
                guard.expires_at().unwrap() > granted + ttl * 4
            })
            .await;
            Ok::<_, Failure>(())
        })
        .await
        .unwrap();
    assert_eq!(bench.written().await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_work_rolls_back_and_keeps_the_lock() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&request()).await.unwrap();
    let result = bench
        .process
        .fenced_transaction_releasing(&guard, async |conn| {
            insert(conn, 1).await?;
            insert(conn, 1).await
        })
        .await;
    assert!(
        matches!(result, Err(TransactionError::Work(Failure::DatabaseError(..)))),
        "{result:?}"
    );
    write(&bench.process, &guard, 2).await.unwrap();
    assert_eq!(bench.written().await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swallowed_error_is_told() {
    let bench = Bench::start().await;
    for mode in MODES {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&request()).await.unwrap();
        let result = bench
            .process
            .fenced_transaction(&guard, async |conn| {
                insert(conn, 1).await?;
                insert(conn, 1).await.unwrap_err();
                Ok::<_, Failure>(())
            })
            .await;
        assert!(
            matches!(result, Err(TransactionError::CommitRolledBack(_))),
            "{mode:?} {result:?}"
        );
        lock.release(guard).await.unwrap();
    }
    let result = bench
        .process
        .transaction(async |conn| {
            insert(conn, 1).await?;
            insert(conn, 1).await.unwrap_err();
            Ok::<_, Failure>(())
        })
        .await;
    assert!(
        matches!(result, Err(TransactionError::CommitRolledBack(_))),
        "{result:?}"
    );
    assert!(bench.written().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deferred_constraint_that_fails_at_commit_is_told() {
    let bench = Bench::start().await;
    bench
        .client
        .batch_execute("CREATE TABLE once (value BIGINT UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        .await
        .unwrap();
    for mode in MODES {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&request()).await.unwrap();
        let result = bench
            .process
            .fenced_transaction_releasing(&guard, async |conn| {
                conn.batch_execute("INSERT INTO once VALUES (1), (1)").await
            })
            .await;
        assert!(
            matches!(result, Err(TransactionError::CommitRolledBack(_))),
            "{mode:?} {result:?}"
        );
        lock.release(guard).await.unwrap();
        lock.release(lock.try_acquire(&request()).await.unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_transaction_writes_nothing_and_frees_the_lock() {
    let bench = Bench::start().await;
    for mode in MODES {
        for polls in 0..40 {
            let lock = bench.lock(mode);
            let mut write = Box::pin(async {
                let guard = lock.acquire(&request(), Duration::from_secs(10)).await.unwrap();
                bench
                    .process
                    .fenced_transaction(&guard, async |conn| {
                        insert(conn, 1000 + polls).await?;
                        std::future::pending::<Result<(), Failure>>().await
                    })
                    .await
            });
            for _ in 0..polls {
                assert!((&mut write).now_or_never().is_none());
                tokio::task::yield_now().await;
            }
            drop(write);
            eventually("the lock is free", async || {
                lock.inspect(request().name()).await.unwrap().is_none()
            })
            .await;
        }
    }
    assert!(bench.written().await.is_empty());
    eventually("no lock is left", async || {
        let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        bench.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    // The pool has lost nothing.
    let all = futures_util::future::join_all((0..4).map(|_| {
        bench
            .process
            .read(async |conn| insert(conn, -1).await.or(Ok::<_, Failure>(0)))
    }));
    for result in all.await {
        result.unwrap();
    }
}

/// Whoever drops a transaction in the middle of its work has ended it, and the lock with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_outlives_its_dropped_transaction_is_told() {
    let bench = Bench::start().await;
    let lock = bench.lock(Mode::Transaction);
    let guard = lock.try_acquire(&request()).await.unwrap();
    let (begun, mut working) = tokio::sync::oneshot::channel();
    tokio::select! {
        result = bench.process.fenced_transaction(&guard, async |conn| {
            insert(conn, 1).await?;
            begun.send(()).unwrap();
            std::future::pending::<Result<(), Failure>>().await
        }) => panic!("{result:?}"),
        begun = &mut working => begun.unwrap(),
    }
    eventually("the loss is told", async || guard.is_lost()).await;
    let next = lock.acquire(&request(), Duration::from_secs(10)).await.unwrap();
    assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);
    assert!(!next.is_lost());
    assert!(bench.written().await.is_empty());
}

/// The commit was the release: what the clock does to the guard afterwards is no loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_was_released_by_the_commit_is_never_lost() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let ttl = Duration::from_secs(1);
    let guard = lock.try_acquire(&request().with_ttl(ttl)).await.unwrap();
    write(&bench.process, &guard, 1).await.unwrap();
    eventually("its slice is over", async || guard.held_for() > ttl * 2).await;
    assert!(!guard.is_lost());
    let again = write(&bench.process, &guard, 2).await;
    assert!(matches!(again, Err(TransactionError::Lost)), "{again:?}");
    assert!(!guard.is_lost());
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
    assert_eq!(bench.written().await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn acquiring_waits_for_no_row_lock() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    lock.release(lock.try_acquire(&request()).await.unwrap())
        .await
        .unwrap();
    // A stranger has the row, and will keep it until the end of the test.
    bench
        .client
        .batch_execute("BEGIN; SELECT FROM leasehold.leases FOR UPDATE")
        .await
        .unwrap();
    let result = lock.try_acquire(&request()).await;
    let Err(AcquireError::Contended(contention)) = result else {
        panic!("{result:?}")
    };
    assert_eq!(contention.held, None);
    // And a new name whose first row a stranger is making.
    let new = LockRequest::new(LockName::new(["new"]).unwrap(), Holder::new("bob", "edit"));
    let key = "SELECT pg_advisory_xact_lock(('x' || left(encode(sha256(convert_to('leasehold/v1|3:new', 'UTF8')), 'hex'), 16))::bit(64)::bigint # x'6c656173655f726f'::bigint)";
    bench.client.batch_execute(key).await.unwrap();
    let result = lock.try_acquire(&new).await;
    assert!(matches!(result, Err(AcquireError::Contended(_))), "{result:?}");
    bench.client.batch_execute("ROLLBACK").await.unwrap();
    drop(lock.try_acquire(&new).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_rise_for_ever() {
    let bench = Bench::start().await;
    let lock = bench.process.leases();
    let durable = request().with_durability(Durability::Durable);
    let mut last = None;
    // Dropped it would be given back, beside the next attempt.
    let mut expired = Vec::new();
    for round in 0..20 {
        let guard = lock.try_acquire(&durable).await.unwrap();
        let token = guard.fencing_token();
        assert!(token > last, "{token:?} after {last:?}");
        last = token;
        match round % 3 {
            0 => _ = lock.release(guard).await.unwrap(),
            1 => {
                bench.shift_expiry("-1 hour").await;
                expired.push(guard);
            }
            _ => {
                lock.release(guard).await.unwrap();
                bench.client.batch_execute("UPDATE leasehold.leases SET used_at = used_at - interval '2 hours', expires_at = expires_at - interval '2 hours', acquired_at = acquired_at - interval '2 hours'").await.unwrap();
                assert_eq!(lock.remove_unused(Duration::from_secs(3600)).await.unwrap(), 1);
            }
        }
    }
}

/// Ends whoever has the transaction lock, from outside.
async fn end_the_holder(client: &Client) {
    let end = "SELECT pg_terminate_backend(l.pid, 5000) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND l.mode = 'ExclusiveLock' AND l.granted
                 AND a.datname = current_database()";
    assert_eq!(client.query(end, &[]).await.unwrap().len(), 1);
}

/// A transaction lock goes with its session, whoever ends that: the hold is counted as lost and its guard is told,
/// in the middle of the work as between two statements.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_lock_whose_session_is_ended_is_lost() {
    let measured = measured();
    let lost = || measured.counter(r#"leasehold_lock_lost_total{backend="transaction"}"#);
    let bench = Bench::start().await;
    let lock = bench.lock(Mode::Transaction);

    let guard = lock.try_acquire(&request()).await.unwrap();
    let before = lost();
    let failed = bench.process.fenced_transaction(&guard, async |conn| {
        end_the_holder(&bench.client).await;
        insert(conn, 1).await
    });
    let failed = failed.await;
    assert!(matches!(failed, Err(TransactionError::Work(_))), "{failed:?}");
    assert!(guard.is_lost());
    assert!(lost() > before);
    assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);

    let guard = lock.try_acquire(&request()).await.unwrap();
    let before = lost();
    end_the_holder(&bench.client).await;
    assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);
    assert!(lost() > before);
    assert_eq!(bench.written().await, [0; 0]);
}

/// Whoever gives up on an extension gives up nothing else: what comes next waits for the connection to come back.
#[tokio::test(flavor = "multi_thread")]
async fn an_extension_that_was_given_up_holds_nothing_up() {
    let bench = Bench::start().await;
    let lock = bench.lock(Mode::Transaction);
    let ttl = Duration::from_secs(30);
    for value in 0..20 {
        let guard = lock.try_acquire(&request()).await.unwrap();
        drop(lock.extend(&guard, ttl).now_or_never());
        if value % 2 == 0 {
            lock.extend(&guard, ttl).await.unwrap();
            drop(lock.extend(&guard, ttl).now_or_never());
            write(&bench.process, &guard, value).await.unwrap();
            assert!(!guard.is_lost());
        }
        assert_eq!(lock.release(guard).await.unwrap(), Released::Held, "{value}");
    }
    assert_eq!(bench.written().await.len(), 10);
}

/// Work that hangs keeps a transaction lock no longer than the longest hold: it is given up, and the lock is free.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_hangs_ends_with_the_longest_hold() {
    let bench = Bench::start().await;
    let lock = bench.lock(Mode::Transaction);
    // Each by itself, or the row would belong to the transaction.
    for statement in [
        "INSERT INTO written VALUES (1, 0)",
        "BEGIN; SELECT FROM written FOR UPDATE",
    ] {
        bench.client.batch_execute(statement).await.unwrap();
    }
    let longest = Duration::from_secs(1);
    let request = request().with_ttl(longest).with_max_hold(longest);
    let guard = lock.try_acquire(&request).await.unwrap();
    let hanging = bench.process.fenced_transaction(&guard, async |conn| {
        insert(conn, 2).await?;
        conn.batch_execute("UPDATE written SET token = 1 WHERE value = 1")
            .await
    });
    let refused = tokio::time::timeout(Duration::from_secs(20), hanging)
        .await
        .expect("it does not hang");
    assert!(matches!(refused, Err(TransactionError::Lost)), "{refused:?}");
    assert!(guard.is_lost());
    // The stranger still has the row.
    let next = lock.acquire(&request, Duration::from_secs(20)).await.unwrap();
    assert_eq!(lock.release(guard).await.unwrap(), Released::AlreadyGone);
    assert_eq!(lock.release(next).await.unwrap(), Released::Held);
    bench.client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.written().await, [1]);
    let untouched = "SELECT FROM written WHERE value = 1 AND token = 0";
    assert_eq!(bench.client.query(untouched, &[]).await.unwrap().len(), 1);
}
