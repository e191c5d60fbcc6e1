//! Locks behind the gate of their tenant: the gate is told first.

use std::time::{Duration, Instant};

use leasehold_domain::{
    AcquireError, DistributedLock, Holder, LockName, LockRequest, TenantConflict, TenantConflictReason,
};
use leasehold_storage::Database;
use leasehold_storage::tenant::Gated;

use super::{Bench, Failure, LONG, SHORT, UnderWay, assert_conflict, insert, purge, purge_in_background};

fn tenant_of(name: &LockName) -> Option<&str> {
    name.parts().nth(1)
}

fn request(parts: &[&str]) -> LockRequest {
    let name = LockName::new(parts.iter().copied()).unwrap();
    LockRequest::new(name, Holder::new("alice", "edit"))
}

#[track_caller]
fn assert_closed<T: std::fmt::Debug>(result: &Result<T, AcquireError>, tenant: &str) {
    let expected = TenantConflict {
        tenant: tenant.to_owned(),
        reason: TenantConflictReason::PurgeInProgress,
    };
    assert!(
        matches!(result, Err(AcquireError::TenantConflict(conflict)) if *conflict == expected),
        "{result:?}, not {expected:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_lock_behind_a_gate_has_both() {
    let bench = Bench::start().await;
    let lock = bench.process.transaction_locks().behind_gates(tenant_of);
    let guard = lock
        .try_acquire(&request(&["workspace", "a", "main"]))
        .await
        .unwrap();
    let held = lock.inspect(guard.name()).await.unwrap().unwrap();
    let backend = held.session.unwrap().backend_pid;
    assert_eq!(
        bench.at_the_gate("a").await,
        [(backend, "ShareLock".to_owned(), true)]
    );
    assert_conflict(
        &purge(&bench.gate(), "a", SHORT).await,
        "a",
        TenantConflictReason::WritesInProgress,
    );
    bench
        .process
        .fenced_transaction(&guard, async |conn| insert(conn, "a", 1).await)
        .await
        .unwrap();
    // The end of the transaction was the end of both.
    assert_eq!(purge(&bench.gate(), "a", SHORT).await.unwrap().value, 1);
    // A name that is no tenant's has no gate.
    lock.release(lock.try_acquire(&request(&["alone"])).await.unwrap())
        .await
        .unwrap();
    let unnameable = lock.try_acquire(&request(&["workspace", &"x".repeat(257)])).await;
    assert!(
        matches!(unnameable, Err(AcquireError::Invalid(_))),
        "{unnameable:?}"
    );
    bench.nothing_is_left().await;
}

/// Whoever has the lock: this process, another one, or nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_lock_behind_a_closed_gate_tells_of_the_gate() {
    let bench = Bench::start().await;
    let other = Database::connect(bench.database.options(), 2).await.unwrap();
    let lock = bench.process.transaction_locks().behind_gates(tenant_of);
    let elsewhere = other.transaction_locks().behind_gates(tenant_of);
    let request = request(&["workspace", "a", "main"]);
    let guard = lock.try_acquire(&request).await.unwrap();
    for lock in [&lock, &elsewhere] {
        let result = lock.try_acquire(&request).await;
        assert!(matches!(result, Err(AcquireError::Contended(_))), "{result:?}");
    }
    let purge = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    let start = Instant::now();
    for lock in [&lock, &elsewhere] {
        assert_closed(&lock.try_acquire(&request).await, "a");
        // Nor does it wait for what it would not get.
        assert_closed(&lock.acquire(&request, LONG).await, "a");
    }
    assert!(start.elapsed() < LONG / 2);
    let free = self::request(&["workspace", "b", "main"]);
    lock.release(lock.try_acquire(&free).await.unwrap())
        .await
        .unwrap();
    lock.release(guard).await.unwrap();
    purge.await.unwrap().unwrap();
    let purge = UnderWay::purge(&bench, "a").await;
    assert_closed(&lock.try_acquire(&request).await, "a");
    purge.end().await;
    lock.release(lock.try_acquire(&request).await.unwrap())
        .await
        .unwrap();
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_lease_that_is_refused_tells_of_a_closed_gate() {
    let bench = Bench::start().await;
    let lock = Gated::new(bench.process.leases(), bench.gate(), tenant_of);
    let request = request(&["workspace", "a", "main"]);
    let wait = Duration::from_millis(100);
    let guard = lock.try_acquire(&request).await.unwrap();
    assert!(bench.at_the_gate("a").await.is_empty(), "it enters no gate");
    let result = lock.try_acquire(&request).await;
    assert!(matches!(result, Err(AcquireError::Contended(_))), "{result:?}");
    let result = lock.acquire(&request, wait).await;
    assert!(matches!(result, Err(AcquireError::TimedOut { .. })), "{result:?}");

    let purge = UnderWay::purge(&bench, "a").await;
    assert_closed(&lock.try_acquire(&request).await, "a");
    assert_closed(&lock.acquire(&request, wait).await, "a");
    // The hold goes on: it is the write that the gate refuses.
    lock.extend(&guard, Duration::from_secs(60)).await.unwrap();
    lock.release(guard).await.unwrap();
    let guard = lock.try_acquire(&request).await.unwrap();
    let entered = bench.process.fenced_transaction(&guard, async |conn| {
        let entered = leasehold_storage::TenantGate::enter_in_tx(conn, &["a"]).await;
        Ok::<_, Failure>(entered.is_ok())
    });
    assert!(!entered.await.unwrap().value);
    lock.release(guard).await.unwrap();
    purge.end().await;
    // Nor does the question of the gate leave anything.
    bench.nothing_is_left().await;
}
