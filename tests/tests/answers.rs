//! Answers that never came: what is told then is true.

use std::time::Instant;

use diesel_async::SimpleAsyncConnection;
use leasehold_domain::{AcquireError, DistributedLock, ReleaseError, Released, ResumeError};
use leasehold_storage::TransactionError;
use leasehold_system_tests::patience::{PATIENCE, eventually, in_time};
use leasehold_system_tests::proxy::Fault;

use crate::bench::{Bench, Failure, MODES, for_a_write, insert, named, write_under};

/// What only the statement that acquires a lease contains.
const ACQUIRE: &str = "seen AS MATERIALIZED";
/// What only those that release or fence one contain.
const RELEASE: &str = "mine AS MATERIALIZED";

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_told_as_committed() {
    let bench = Bench::start(2).await;
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut lost = bench.proxy.on_commit(Fault::LoseAnswer);
        in_time("the write", write_under(&bench.process, &guard, value))
            .await
            .unwrap();
        lost.happened().await;
        assert_eq!(lock.release(guard).await.unwrap(), Released::Held, "{mode:?}");
        lock.release(lock.try_acquire(&for_a_write("plan")).await.unwrap())
            .await
            .unwrap();
    }
    assert_eq!(bench.written().await, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_never_arrived_is_told_as_not_done() {
    let bench = Bench::start(2).await;
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut lost = bench.proxy.on_commit(Fault::LoseStatement);
        let result = in_time("the write", write_under(&bench.process, &guard, value)).await;
        lost.happened().await;
        assert!(
            matches!(result, Err(TransactionError::Unavailable(_))),
            "{mode:?} {result:?}"
        );
        lock.release(guard).await.unwrap();
        lock.release(lock.try_acquire(&for_a_write("plan")).await.unwrap())
            .await
            .unwrap();
    }
    assert_eq!(bench.written().await, [0; 0]);
}

/// The server is still busy with the commit when it is asked what became of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_takes_long_is_told_as_it_ends() {
    let bench = Bench::start(2).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$;
                CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON written DEFERRABLE INITIALLY DEFERRED
                    FOR EACH ROW EXECUTE FUNCTION slow()";
    bench.client.batch_execute(slow).await.unwrap();
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut cut = bench.proxy.on_commit(Fault::CutBehind);
        let result = in_time("the write", write_under(&bench.process, &guard, value)).await;
        cut.happened().await;
        let written = bench.written().await.contains(&value);
        match result {
            Ok(()) => assert!(written, "{mode:?}"),
            Err(TransactionError::Unavailable(_)) => assert!(!written, "{mode:?}"),
            other => panic!("{mode:?} {other:?}"),
        }
        lock.release(guard).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_fate_cannot_be_found_out_is_told_as_unknown() {
    for mode in MODES {
        let bench = Bench::start(2).await;
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut lost = bench.proxy.on_commit(Fault::LoseAnswerAndGoAway);
        let start = Instant::now();
        let result = write_under(&bench.process, &guard, 1).await;
        lost.happened().await;
        let Err(TransactionError::OutcomeUnknown { lock_id, .. }) = result else {
            panic!("{mode:?} {result:?}")
        };
        assert_eq!(lock_id, Some(guard.lock_id()), "{mode:?}");
        assert!(start.elapsed() < PATIENCE, "{mode:?}");
        bench.proxy.come_back();
        // It was committed, and the lock released with it: the next one gets it.
        assert_eq!(bench.written().await, [1], "{mode:?}");
        drop(guard);
        eventually("the lock is free", async || {
            match lock.try_acquire(&for_a_write("plan")).await {
                Ok(next) => lock.release(next).await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
    }
}

/// Dropping the future of a transaction whose COMMIT was sent does not undo it, and hurts nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_during_the_commit_has_committed() {
    let bench = Bench::start(2).await;
    for (value, mode) in (1..).zip(MODES) {
        let lock = bench.lock(mode);
        let guard = lock.try_acquire(&for_a_write("plan")).await.unwrap();
        let mut held = bench.proxy.on_commit(Fault::HoldAnswer);
        tokio::select! {
            result = write_under(&bench.process, &guard, value) => panic!("{result:?}"),
            () = held.happened() => {}
        }
        drop(guard);
        held.let_go().await;
        eventually("the write is there", async || {
            bench.written().await.contains(&value)
        })
        .await;
        eventually("the lock is free", async || {
            lock.inspect(for_a_write("plan").name()).await.unwrap().is_none()
        })
        .await;
        lock.release(lock.try_acquire(&for_a_write("plan")).await.unwrap())
            .await
            .unwrap();
    }
}

/// The acquire is sent again under the same id, and the server grants it again.
#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_whose_answer_is_lost_once_is_found_again() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    for fault in [Fault::LoseAnswer, Fault::LoseStatement] {
        let mut lost = bench.proxy.on(ACQUIRE, fault);
        let guard = in_time("the acquire", lock.try_acquire(&named("plan")))
            .await
            .unwrap();
        lost.happened().await;
        let held = lock.inspect(guard.name()).await.unwrap().unwrap();
        assert_eq!(held.lock_id, Some(guard.lock_id()), "{fault:?}");
        assert_eq!(held.fencing_token, guard.fencing_token(), "{fault:?}");
        assert_eq!(lock.release(guard).await.unwrap(), Released::Held, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_whose_answers_are_lost_is_unknown_and_can_be_resumed() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let mut first = bench.proxy.on(ACQUIRE, Fault::LoseAnswer);
    let mut second = bench.proxy.on(ACQUIRE, Fault::LoseAnswer);
    let result = in_time("the acquire", lock.try_acquire(&named("plan"))).await;
    first.happened().await;
    second.happened().await;
    let Err(AcquireError::OutcomeUnknown { lock_id, .. }) = result else {
        panic!("{result:?}")
    };
    let guard = lock.resume(&named("plan"), lock_id).await.unwrap();
    assert_eq!(guard.lock_id(), lock_id);
    assert!(!guard.is_lost());
    assert!(matches!(
        lock.resume(&named("plan"), lock_id).await,
        Err(ResumeError::NotHeld { .. })
    ));
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
    assert!(matches!(
        lock.resume(&named("plan"), lock_id).await,
        Err(ResumeError::NotHeld { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_before_the_database_went_away_is_unknown_and_can_be_resumed() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let mut lost = bench.proxy.on(ACQUIRE, Fault::LoseAnswerAndGoAway);
    let result = in_time("the acquire", lock.try_acquire(&named("plan"))).await;
    lost.happened().await;
    // It is held: "not available" would promise that it is not.
    assert!(bench.lease_is_live(named("plan").name()).await);
    let Err(AcquireError::OutcomeUnknown { lock_id, .. }) = result else {
        panic!("{result:?}")
    };
    bench.proxy.come_back();
    let guard = lock.resume(&named("plan"), lock_id).await.unwrap();
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_that_cannot_be_sent_is_unavailable_and_leaves_nothing() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    bench.proxy.go_away();
    let result = in_time("the acquire", lock.try_acquire(&named("plan"))).await;
    assert!(
        matches!(
            result,
            Err(AcquireError::Unavailable(_) | AcquireError::OutcomeUnknown { .. })
        ),
        "{result:?}"
    );
    assert!(!bench.lease_is_live(named("plan").name()).await);
    bench.proxy.come_back();
    eventually("it works again", async || {
        lock.try_acquire(&named("plan")).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acquire_that_is_dropped_before_its_answer_leaves_nothing() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    for fault in [Fault::HoldAnswer, Fault::HoldStatement] {
        let (request, mut held) = (named("plan"), bench.proxy.on(ACQUIRE, fault));
        // Dropped when this has happened: from then on it is given back.
        let happened = async {
            held.happened().await;
            if fault == Fault::HoldAnswer {
                assert!(bench.lease_is_live(named("plan").name()).await);
            }
        };
        tokio::select! {
            result = lock.try_acquire(&request) => panic!("{result:?}"),
            () = happened => {}
        }
        held.let_go().await;
        eventually("the lease is given back", async || {
            !bench.lease_is_live(named("plan").name()).await
        })
        .await;
        lock.release(lock.try_acquire(&named("plan")).await.unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_whose_answer_is_lost_has_released() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan")).await.unwrap();
    let mut lost = bench.proxy.on(RELEASE, Fault::LoseAnswer);
    let result = in_time("the release", lock.release(guard)).await;
    lost.happened().await;
    assert!(matches!(result, Err(ReleaseError::Unavailable(_))), "{result:?}");
    let next = lock.try_acquire(&named("plan")).await.unwrap();
    // What still goes on in the background for the first hold does not touch the second.
    eventually("the release is sent again", async || {
        bench.proxy.traffic().count(RELEASE) >= 2
    })
    .await;
    assert_eq!(lock.release(next).await.unwrap(), Released::Held);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_never_arrived_is_made_up_for() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan")).await.unwrap();
    let mut lost = bench.proxy.on(RELEASE, Fault::LoseStatement);
    let result = in_time("the release", lock.release(guard)).await;
    lost.happened().await;
    assert!(matches!(result, Err(ReleaseError::Unavailable(_))), "{result:?}");
    eventually("it is free", async || {
        !bench.lease_is_live(named("plan").name()).await
    })
    .await;
}

/// An error in the middle of the work costs the connection, not the pool.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_break_are_replaced() {
    let bench = Bench::start(2).await;
    for value in 0..10 {
        let mut cut = bench.proxy.on("INSERT INTO written", Fault::CutBehind);
        let result = bench
            .process
            .transaction(async |conn| insert(conn, value).await)
            .await;
        cut.happened().await;
        assert!(result.is_err());
    }
    let both = (10..12).map(|value| {
        bench.process.transaction(async move |conn| {
            insert(conn, value).await?;
            conn.batch_execute("SELECT pg_sleep(0.05)").await?;
            Ok::<_, Failure>(())
        })
    });
    for done in in_time("two writes at once", futures_util::future::join_all(both)).await {
        done.unwrap();
    }
    assert_eq!(bench.written().await, [10, 11]);
}
