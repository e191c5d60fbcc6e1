//! The heartbeat: what it survives, and what it cannot bring back.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use leasehold_domain::{AcquireError, DistributedLock, ExtendError};
use leasehold_storage::Database;
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::patience::{eventually, in_time, within};
use leasehold_system_tests::proxy::Fault;
use tokio::runtime::Builder;

use crate::bench::{Bench, Failure, named};

/// What only a beat contains.
const BEAT: &str = "due AS MATERIALIZED";
const TTL: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread")]
async fn survives_pool_exhaustion() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan").with_ttl(TTL)).await.unwrap();
    let granted = guard.expires_at().unwrap();
    // Every connection of the pool is busy until four slices have passed.
    let busy = (0..2).map(|_| {
        bench.process.read(async |conn| {
            eventually("four renewals of a slice", async || {
                guard.expires_at().unwrap() > granted + TTL * 4
            })
            .await;
            conn.batch_execute("SELECT 1").await
        })
    });
    for done in futures_util::future::join_all(busy).await {
        done.unwrap();
    }
    assert!(!guard.is_lost());
    assert!(bench.lease_is_live(guard.name()).await);
}

/// All threads of the caller's runtime sleep, whatever their number.
#[test]
fn survives_a_blocked_runtime() {
    const WORKERS: usize = 2;
    for threads in [1, WORKERS] {
        let runtime = match threads {
            1 => Builder::new_current_thread().enable_all().build().unwrap(),
            _ => Builder::new_multi_thread()
                .worker_threads(WORKERS)
                .enable_all()
                .build()
                .unwrap(),
        };
        let (guard, process) = runtime.block_on(async {
            let process = Database::connect(TestDatabase::create().await.options(), 2)
                .await
                .unwrap();
            let guard = process
                .leases()
                .try_acquire(&named("plan").with_ttl(TTL))
                .await
                .unwrap();
            (guard, process)
        });
        let granted = guard.expires_at().unwrap();
        let asleep = Arc::new(Barrier::new(threads));
        let sleepers = (0..threads).map(|_| {
            let asleep = Arc::clone(&asleep);
            runtime.spawn(async move {
                asleep.wait();
                std::thread::sleep(TTL * 4);
            })
        });
        let sleepers = futures_util::future::join_all(sleepers);
        runtime.block_on(async { in_time("the sleep", sleepers).await });
        assert!(!guard.is_lost(), "{threads}");
        assert!(guard.expires_at().unwrap() > granted + TTL * 3, "{threads}");
        runtime.block_on(async {
            let contended = process.leases().try_acquire(&named("plan")).await;
            assert!(
                matches!(contended, Err(AcquireError::Contended(_))),
                "{contended:?}"
            );
            process.leases().release(guard).await.unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_connection_that_breaks() {
    let bench = Bench::start(2).await;
    // A third of it until the first beat, and then time for the four attempts that are needed here.
    let ttl = Duration::from_secs(3);
    let guard = bench
        .process
        .leases()
        .try_acquire(&named("plan").with_ttl(ttl))
        .await
        .unwrap();
    let granted = guard.expires_at().unwrap();
    for fault in [Fault::LoseStatement, Fault::LoseAnswer, Fault::CutBehind] {
        bench.proxy.on(BEAT, fault).happened().await;
    }
    eventually("it goes on", async || {
        guard.expires_at().unwrap() > granted || guard.is_lost()
    })
    .await;
    assert!(!guard.is_lost());
}

/// Trust counts from before the request was sent: an answer that comes late extends nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_renewal_does_not_extend_trust() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan").with_ttl(TTL)).await.unwrap();
    let mut beat = bench.proxy.on(BEAT, Fault::HoldAnswer);
    beat.happened().await;
    bench.proxy.fall_silent();
    // The server has renewed it, and nobody here knows.
    within(TTL + Duration::from_secs(2), "the guard is lost", async || {
        guard.is_lost()
    })
    .await;
    in_time("whoever waits for the loss", guard.lost()).await;
    bench.proxy.speak();
    beat.let_go().await;
    let extended = lock.extend(&guard, Duration::from_secs(30)).await;
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    assert!(guard.is_lost(), "what was told once is never taken back");
    drop(guard);
    eventually("the lock is free", async || {
        lock.try_acquire(&named("plan")).await.is_ok()
    })
    .await;
}

/// As above, for an extend that the caller itself asked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_extend_that_is_answered_too_late_does_not_succeed() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan").with_ttl(TTL)).await.unwrap();
    lock.extend(&guard, TTL).await.unwrap();
    bench.proxy.fall_silent();
    let extend = lock.extend(&guard, Duration::from_secs(30));
    let late = async {
        in_time("the loss", guard.lost()).await;
        bench.proxy.speak();
    };
    let (extended, ()) = tokio::join!(extend, late);
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    assert!(guard.is_lost());
}

/// A beat that was on its way when the lock was released arrives afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn cannot_revive_what_was_released() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan").with_ttl(TTL)).await.unwrap();
    let mut late = bench.proxy.on(BEAT, Fault::HoldStatement);
    late.happened().await;
    let name = guard.name().clone();
    lock.release(guard).await.unwrap();
    let next = lock
        .try_acquire(&named("plan").with_ttl(Duration::from_secs(60)))
        .await
        .unwrap();
    let until = lock.inspect(&name).await.unwrap().unwrap().expires_at;
    late.let_go().await;
    let held = lock.inspect(&name).await.unwrap().unwrap();
    assert_eq!((held.lock_id, held.expires_at), (Some(next.lock_id()), until));
    lock.release(next).await.unwrap();
    assert_eq!(lock.inspect(&name).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn cannot_revive_what_expired() {
    let bench = Bench::start(2).await;
    let lock = bench.process.leases();
    let guard = lock.try_acquire(&named("plan").with_ttl(TTL)).await.unwrap();
    let mut late = bench.proxy.on(BEAT, Fault::HoldStatement);
    late.happened().await;
    let expire = "UPDATE leasehold.leases SET acquired_at = clock_timestamp() - interval '2 hours',
                                              expires_at = clock_timestamp() - interval '1 hour'";
    assert_eq!(bench.client.execute(expire, &[]).await.unwrap(), 1);
    late.let_go().await;
    in_time("the loss", guard.lost()).await;
    assert!(!bench.lease_is_live(guard.name()).await);
    let extended = lock.extend(&guard, TTL).await;
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    assert!(!bench.lease_is_live(guard.name()).await);
    // Nobody had it in between, and still the write of whoever lost it is refused.
    let written = bench
        .process
        .fenced_transaction(&guard, async |_| Ok::<_, Failure>(()))
        .await;
    assert!(
        matches!(written, Err(leasehold_storage::TransactionError::Lost)),
        "{written:?}"
    );
}
