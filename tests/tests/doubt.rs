//! What is not known of a lock is given back, told, or found out, and holds up nobody else.

use std::time::Duration;

use leasehold_domain::{AcquireError, DistributedLock, Released};
use leasehold_storage::migrate::Migrations;
use leasehold_storage::{ConnectOptions, TransactionError};
use leasehold_system_tests::patience::{eventually, in_time, within};
use leasehold_system_tests::proxy::Fault;

use crate::bench::{Bench, Failure, MODES, Mode, for_a_write, insert, named, write_under};

/// What only the statement that acquires a lease contains.
const ACQUIRE: &str = "seen AS MATERIALIZED";
/// Longer than a test may take: whatever ends before was given back.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The first request was granted and its answer lost; the second found the row locked.
#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_that_is_refused_when_it_is_sent_again_leaves_nothing() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let mut first = bench.proxy.on(ACQUIRE, Fault::LoseAnswer);
    let mut second = bench.proxy.on(ACQUIRE, Fault::HoldStatement);
    let trouble = async {
        first.happened().await;
        second.happened().await;
        let lock_row = "BEGIN; SELECT FROM leasehold.leases FOR UPDATE";
        bench.client.batch_execute(lock_row).await.unwrap();
        second.let_go().await;
    };
    let request = named("plan").with_ttl(DAY);
    let (result, ()) = tokio::join!(lock.try_acquire(&request), trouble);
    assert!(matches!(result, Err(AcquireError::Contended(_))), "{result:?}");
    bench.client.batch_execute("ROLLBACK").await.unwrap();
    eventually("nothing is left", async || {
        !bench.lease_is_live(request.name()).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_is_answered_too_late_is_none() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let mut late = bench.proxy.on(ACQUIRE, Fault::HoldAnswer);
    let trouble = async {
        late.happened().await;
        eventually("its slice is over", async || {
            !bench.lease_is_live(named("plan").name()).await
        })
        .await;
        late.let_go().await;
    };
    let request = named("plan").with_ttl(Duration::from_millis(100));
    let (result, ()) = tokio::join!(lock.try_acquire(&request), trouble);
    assert!(matches!(result, Err(AcquireError::Unavailable(_))), "{result:?}");
}

/// A pooler that has lost the server tells so in an error of its own, which looks like a refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_word_from_a_pooler_is_no_refusal() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let mut lost = bench.proxy.on(ACQUIRE, Fault::LoseAnswerWithWord);
    let guard = in_time("the acquire", lock.try_acquire(&named("plan")))
        .await
        .unwrap();
    lost.happened().await;
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);

    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut lost = bench.proxy.on_commit(Fault::LoseAnswerWithWord);
        let result = in_time("the write", write_under(&bench.process, &guard, value)).await;
        lost.happened().await;
        assert!(bench.written().await.contains(&value), "{mode:?}");
        assert!(result.is_ok(), "{mode:?} {result:?}");
        lock.release(guard).await.unwrap();
    }
}

/// A transaction that was ended by the server before its COMMIT has not committed, and that is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_ended_before_the_commit_has_rolled_back() {
    let bench = Bench::start(2).await;
    let lock = bench.lock(Mode::Lease);
    let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND state = 'idle in transaction'";
    let result = bench
        .process
        .fenced_transaction(&guard, async |conn| {
            insert(conn, 1).await?;
            assert_eq!(bench.client.query(end, &[]).await.unwrap().len(), 1);
            Ok::<_, Failure>(())
        })
        .await;
    assert!(
        matches!(
            result,
            Err(TransactionError::CommitRolledBack(_) | TransactionError::Unavailable(_))
        ),
        "{result:?}"
    );
    assert!(bench.written().await.is_empty());
    assert!(!guard.is_lost());
    write_under(&bench.process, &guard, 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_dropped_while_the_database_is_away_is_given_back_when_it_returns() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let request = named("plan").with_ttl(DAY);
    let guard = lock.try_acquire(&request).await.unwrap();
    bench.proxy.go_away();
    drop(guard);
    // The outage.
    tokio::time::sleep(Duration::from_secs(2)).await;
    bench.proxy.come_back();
    eventually("it is given back", async || {
        !bench.lease_is_live(request.name()).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_row_does_not_keep_others_from_being_given_back() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let (stuck, free) = (named("stuck").with_ttl(DAY), named("free").with_ttl(DAY));
    let guards = [
        lock.try_acquire(&stuck).await.unwrap(),
        lock.try_acquire(&free).await.unwrap(),
    ];
    let lock_row = "BEGIN; SELECT FROM leasehold.leases WHERE name LIKE '%stuck' FOR UPDATE";
    bench.client.batch_execute(lock_row).await.unwrap();
    let stranger = bench.database.client().await;
    let live = async |name: &str| {
        let sql = "SELECT FROM leasehold.leases WHERE name LIKE $1 AND expires_at > clock_timestamp()";
        stranger.query_opt(sql, &[&name]).await.unwrap().is_some()
    };
    drop(guards);
    within(Duration::from_secs(10), "the other is given back", async || {
        !live("%free").await
    })
    .await;
    assert!(live("%stuck").await);
    // Longer than anybody waits for a row.
    tokio::time::sleep(Duration::from_secs(3)).await;
    bench.client.batch_execute("ROLLBACK").await.unwrap();
    eventually("it is given back as well", async || !live("%stuck").await).await;
}

/// The connection of one transaction does not answer. The guard of another is told all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_without_an_answer_holds_up_nobody() {
    let bench = Bench::start(2).await;
    let lock = bench.process.transaction_locks();
    let bound = |name, millis| {
        named(name)
            .with_ttl(Duration::from_millis(100))
            .with_max_hold(Duration::from_millis(millis))
    };
    let first = lock.try_acquire(&bound("first", 300)).await.unwrap();
    let second = lock.try_acquire(&bound("second", 900)).await.unwrap();
    bench.proxy.fall_silent();
    in_time("the first is told", first.lost()).await;
    in_time("the second is told", second.lost()).await;
    bench.proxy.speak();
}

/// It accepts, and never says a word.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_is_not_waited_for_without_end() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "postgres://any@{}/any?sslmode=disable",
        server.local_addr().unwrap()
    );
    let options = ConnectOptions::parse(&url, None).unwrap();
    let migrated = in_time("an answer", Migrations::storage().run(&options)).await;
    assert!(migrated.is_err());
}

/// Being connected takes longer than an answer may take; slices are long enough for both.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_gets_through_where_connecting_is_slow() {
    let bench = Bench::start(2).await;
    let ttl = Duration::from_secs(9);
    let guard = bench
        .process
        .leases()
        .try_acquire(&named("plan").with_ttl(ttl))
        .await
        .unwrap();
    let granted = guard.expires_at().unwrap();
    let slow = async {
        loop {
            let mut slow = bench
                .proxy
                .on("SET client_connection_check_interval", Fault::HoldAnswer);
            slow.happened().await;
            tokio::time::sleep(ttl / 2 - ttl / 10).await;
            slow.let_go().await;
        }
    };
    let renewed = eventually("it is renewed", async || {
        guard.expires_at().unwrap() > granted || guard.is_lost()
    });
    tokio::select! {
        () = renewed => {}
        () = slow => {}
    }
    assert!(!guard.is_lost());
}
