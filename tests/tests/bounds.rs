//! A database that does not answer keeps nobody longer than was asked for, and what is told then is true.

use std::time::{Duration, Instant};

use leasehold_domain::{AcquireError, DistributedLock, ExtendError, LockRequest, ReleaseError, ResumeError};
use leasehold_storage::TransactionError;
use leasehold_system_tests::patience::eventually;
use leasehold_system_tests::proxy::Fault;

use crate::bench::{Bench, MODES, Mode, for_a_write, insert, named, write_under};

/// What a statement without a bound of its own may take, a second more for who has the attempt.
const ANSWER: Duration = Duration::from_secs(5);
/// What COMMIT may take, and then the search for what became of it.
const COMMIT: Duration = Duration::from_secs(10 + 2);
/// What an attempt at the end of a wait may take, and a contended one to name the holder.
const LAST_ATTEMPT: Duration = Duration::from_secs(2);
/// For a loaded machine.
const MARGIN: Duration = Duration::from_secs(5);

/// The answer, which must come by then.
async fn by<T>(bound: Duration, what: &str, future: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let answer = tokio::time::timeout(bound + MARGIN, future).await;
    answer.unwrap_or_else(|_| {
        panic!(
            "{what} took {:?}, which is longer than {bound:?}",
            start.elapsed()
        )
    })
}

fn all_locks(bench: &Bench) -> [(&'static str, Box<dyn DistributedLock>); 3] {
    [
        ("lease", bench.lock(Mode::Lease)),
        ("transaction", bench.lock(Mode::Transaction)),
        ("session", Box::new(bench.process.session_locks())),
    ]
}

/// Opens the connections that it will need.
async fn warm_up(lock: &dyn DistributedLock, request: &LockRequest) {
    let guard = lock.try_acquire(request).await.unwrap();
    lock.release(guard).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_a_silent_server_ends() {
    let bench = Bench::start(2).await;
    for (kind, lock) in all_locks(&bench) {
        // What is granted when the server hears of it at last ends by itself.
        let request = named(kind).with_ttl(Duration::from_secs(1));
        warm_up(lock.as_ref(), &request).await;
        bench.proxy.fall_silent();
        for wait in [Duration::ZERO, Duration::from_millis(300), Duration::from_secs(2)] {
            let result = by(wait + LAST_ATTEMPT, kind, lock.acquire(&request, wait)).await;
            assert!(
                matches!(
                    result,
                    Err(AcquireError::Unavailable(_) | AcquireError::OutcomeUnknown { .. })
                ),
                "{kind} {wait:?}: {result:?}"
            );
        }
        bench.proxy.speak();
        eventually("it can be had again", async || {
            match lock.try_acquire(&request).await {
                Ok(guard) => lock.release(guard).await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_attempt_at_a_silent_server_ends() {
    for kind in 0..3 {
        let bench = Bench::start(2).await;
        let (kind, lock) = all_locks(&bench).into_iter().nth(kind).unwrap();
        let request = named(kind);
        warm_up(lock.as_ref(), &request).await;
        bench.proxy.fall_silent();
        let result = by(ANSWER, kind, lock.try_acquire(&request)).await;
        assert!(
            matches!(
                result,
                Err(AcquireError::Unavailable(_) | AcquireError::OutcomeUnknown { .. })
            ),
            "{kind}: {result:?}"
        );
    }
}

/// Somebody has the whole table locked, as a migration does.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_a_locked_table_ends_and_leaves_nothing() {
    let bench = Bench::start(2).await;
    let lock = bench.lock(Mode::Lease);
    let stranger = bench.database.client().await;
    stranger
        .batch_execute("BEGIN; LOCK TABLE leasehold.leases")
        .await
        .unwrap();
    let request = named("plan").with_ttl(Duration::from_secs(24 * 60 * 60));
    let wait = Duration::from_millis(300);
    let result = by(wait + LAST_ATTEMPT, "the acquire", lock.acquire(&request, wait)).await;
    let Err(AcquireError::OutcomeUnknown { lock_id, .. }) = result else {
        panic!("{result:?}")
    };
    let resumed = by(ANSWER, "the resume", lock.resume(&request, lock_id)).await;
    assert!(matches!(resumed, Err(ResumeError::Unavailable(_))), "{resumed:?}");
    let waiting = "SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                   WHERE NOT l.granted AND a.datname = current_database()";
    eventually("the server does not wait either", async || {
        stranger.query(waiting, &[]).await.unwrap().is_empty()
    })
    .await;
    stranger.batch_execute("ROLLBACK").await.unwrap();
    assert!(!bench.lease_is_live(request.name()).await);
    let resumed = lock.resume(&request, lock_id).await;
    assert!(matches!(resumed, Err(ResumeError::NotHeld { .. })), "{resumed:?}");
    warm_up(lock.as_ref(), &request).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_with_a_lease_ends() {
    let bench = Bench::start(2).await;
    let leases = bench.process.leases();
    let request = named("plan").with_ttl(Duration::from_secs(60));
    let guard = leases.try_acquire(&request).await.unwrap();
    let stranger = bench.database.client().await;
    let lock_row = "BEGIN; SELECT FROM leasehold.leases FOR UPDATE";
    stranger.batch_execute(lock_row).await.unwrap();
    let extended = by(ANSWER, "extend", leases.extend(&guard, Duration::from_secs(90))).await;
    assert!(
        matches!(extended, Err(ExtendError::Unavailable(_))),
        "{extended:?}"
    );
    assert!(!guard.is_lost());
    let forced = by(
        ANSWER,
        "force",
        leases.force_release(guard.name(), "operator", "stuck"),
    )
    .await;
    assert!(forced.is_err(), "{forced:?}");
    let released = by(ANSWER, "release", leases.release(guard)).await;
    assert!(
        matches!(released, Err(ReleaseError::Unavailable(_))),
        "{released:?}"
    );
    stranger
        .batch_execute("LOCK TABLE leasehold.leases")
        .await
        .unwrap();
    by(ANSWER, "inspect", leases.inspect(request.name()))
        .await
        .unwrap_err();
    stranger.batch_execute("ROLLBACK").await.unwrap();
    // It goes on in the background.
    eventually("it is released", async || {
        !bench.lease_is_live(request.name()).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_with_a_transaction_lock_ends() {
    let bench = Bench::start(2).await;
    let lock = bench.lock(Mode::Transaction);
    let guards = [
        lock.try_acquire(&named("extended")).await.unwrap(),
        lock.try_acquire(&named("released")).await.unwrap(),
    ];
    bench.proxy.fall_silent();
    let [first, second] = guards;
    let (extended, released) = tokio::join!(
        by(ANSWER, "extend", lock.extend(&first, Duration::from_secs(90))),
        by(ANSWER, "release", lock.release(second)),
    );
    // Its connection was closed, and with that the lock has ended.
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    assert!(first.is_lost());
    assert!(
        matches!(released, Err(ReleaseError::Unavailable(_))),
        "{released:?}"
    );
    bench.proxy.speak();
    eventually("both are free", async || {
        bench.database.advisory_locks(&bench.client).await == 0
    })
    .await;
}

/// Nothing was committed, because nobody asked for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_must_wait_is_given_up() {
    let bench = Bench::start(2).await;
    let lock = bench.lock(Mode::Lease);
    let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
    let stranger = bench.database.client().await;
    let lock_row = "BEGIN; SELECT FROM leasehold.leases FOR UPDATE";
    stranger.batch_execute(lock_row).await.unwrap();
    let written = by(ANSWER, "the write", write_under(&bench.process, &guard, 1)).await;
    assert!(
        matches!(written, Err(TransactionError::Unavailable(_))),
        "{written:?}"
    );
    stranger.batch_execute("ROLLBACK").await.unwrap();
    assert!(bench.written().await.is_empty());
    assert!(!guard.is_lost());
    write_under(&bench.process, &guard, 2).await.unwrap();
    assert_eq!(bench.written().await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_without_an_answer_is_told_as_it_ended() {
    let answered = async |mode: Mode| {
        let bench = Bench::start(2).await;
        let guard = bench.lock(mode).try_acquire(&for_a_write("plan")).await.unwrap();
        let mut silent = bench.proxy.on_commit(Fault::HoldAnswer);
        let written = by(COMMIT, "the write", write_under(&bench.process, &guard, 1)).await;
        silent.happened().await;
        assert!(written.is_ok(), "{mode:?}: {written:?}");
        assert_eq!(bench.written().await, [1], "{mode:?}");
    };
    let unanswered = async |mode: Mode| {
        let bench = Bench::start(2).await;
        let guard = bench.lock(mode).try_acquire(&for_a_write("plan")).await.unwrap();
        let mut held = bench.proxy.on_commit(Fault::HoldStatement);
        let written = by(COMMIT, "the write", write_under(&bench.process, &guard, 1)).await;
        held.happened().await;
        let Err(TransactionError::OutcomeUnknown { lock_id, .. }) = written else {
            panic!("{mode:?}: {written:?}")
        };
        assert_eq!(lock_id, Some(guard.lock_id()), "{mode:?}");
        // And then it did commit.
        held.let_go().await;
        assert_eq!(bench.written().await, [1], "{mode:?}");
    };
    tokio::join!(
        answered(MODES[0]),
        answered(MODES[1]),
        unanswered(MODES[0]),
        unanswered(MODES[1]),
    );
}

/// What the caller's own statements take is the caller's business.
#[tokio::test(flavor = "multi_thread")]
async fn the_work_itself_may_take_longer() {
    let bench = Bench::start(2).await;
    let lock = bench.lock(Mode::Lease);
    let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
    let written = bench
        .process
        .fenced_transaction(&guard, async |conn| {
            diesel_async::SimpleAsyncConnection::batch_execute(conn, "SELECT pg_sleep(6)").await?;
            insert(conn, 1).await
        })
        .await;
    assert!(written.is_ok(), "{written:?}");
    assert_eq!(bench.written().await, [1]);
}
