//! `MemoryLock` keeps every clause that the backends keep.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{Abilities, Life, Provider, lock_conformance};
use leasehold_domain::{
    AcquireError, DistributedLock, ExtendError, Holder, LockName, LockRequest, MemoryLock, Released,
};

struct Memory(MemoryLock);

impl Provider for Memory {
    fn abilities(&self) -> Abilities {
        Abilities {
            life: Life::Lease,
            shared: true,
            processes: false,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        Arc::new(self.0.clone())
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        LockName::new([scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        (!self.0.is_idle()).then(|| format!("{:?}", self.0))
    }

    async fn lose(&self, name: &LockName) {
        self.0.lose(name);
    }

    async fn expire(&self, name: &LockName) -> bool {
        self.0.stop_heartbeats(name);
        if let Some(expires_at) = self
            .0
            .inspect(name)
            .await
            .unwrap()
            .and_then(|held| held.expires_at)
        {
            let left = expires_at - self.0.clock().wall();
            self.0.advance(left.to_std().unwrap());
        }
        true
    }

    async fn stop_heartbeats(&self, name: &LockName) -> bool {
        self.0.stop_heartbeats(name);
        true
    }

    async fn pass(&self, time: Duration) {
        self.0.advance(time);
    }
}

lock_conformance!(Memory(MemoryLock::new()));

fn request(name: &LockName) -> LockRequest {
    LockRequest::new(name.clone(), Holder::new("alice", "edit"))
        .with_ttl(Duration::from_secs(10))
        .with_max_hold(Duration::from_secs(60))
}

fn name() -> LockName {
    LockName::new(["plan", "7"]).unwrap()
}

#[tokio::test]
async fn a_hold_lasts_to_its_bound_however_large_the_steps() {
    for step in [1, 7, 59, 60, 61] {
        let lock = MemoryLock::new();
        let guard = lock.try_acquire(&request(&name())).await.unwrap();
        let mut at = 0;
        while at + step < 60 {
            lock.advance(Duration::from_secs(step));
            at += step;
            // The last slice is cut short by the bound, and is trusted for less by the margin.
            assert_eq!(guard.is_lost(), at + 1 > 59, "after {at} s");
            assert!(lock.inspect(&name()).await.unwrap().is_some(), "after {at} s");
        }
        lock.advance(Duration::from_secs(step));
        assert!(guard.is_lost());
        assert!(lock.is_idle());
    }
}

#[tokio::test]
async fn a_dead_holder_keeps_the_lock_for_its_ttl() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    let id = guard.lock_id();
    lock.abandon(guard);
    lock.advance(Duration::from_millis(9_999));
    let held = lock.inspect(&name()).await.unwrap().unwrap();
    assert_eq!(held.lock_id, Some(id));
    lock.advance(Duration::from_millis(1));
    assert_eq!(lock.inspect(&name()).await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_of_a_dead_holder_goes_on_when_the_clock_does() {
    let lock = MemoryLock::new();
    lock.abandon(lock.try_acquire(&request(&name())).await.unwrap());
    let request = request(&name());
    let mut waiting = lock.acquire(&request, Duration::from_secs(3600));
    // Hours of tokio's time are not a second of the lock's.
    assert!(
        tokio::time::timeout(Duration::from_secs(3000), &mut waiting)
            .await
            .is_err()
    );
    lock.advance(Duration::from_secs(10));
    drop(waiting.await.unwrap());
}

#[tokio::test]
async fn a_hung_holder_that_wakes_up_in_time_can_still_extend() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    lock.stop_heartbeats(&name());
    lock.advance(Duration::from_secs(8));
    lock.extend(&guard, Duration::from_secs(10)).await.unwrap();
    lock.advance(Duration::from_secs(8));
    assert!(!guard.is_lost());
    // The trust ends a margin before the lease; from then on it is not extended any more.
    lock.advance(Duration::from_millis(1_500));
    assert!(guard.is_lost());
    assert!(matches!(
        lock.extend(&guard, Duration::from_secs(10)).await,
        Err(ExtendError::Lost)
    ));
    assert_eq!(lock.release(guard).await.unwrap(), Released::Held);
}

#[tokio::test]
async fn a_clock_that_moves_alone_renews_nothing() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    lock.clock().advance(Duration::from_secs(11));
    assert!(guard.is_lost());
    assert!(lock.is_idle());
    let next = lock.try_acquire(&request(&name())).await.unwrap();
    drop(guard);
    assert_eq!(lock.release(next).await.unwrap(), Released::Held);
}

#[tokio::test]
async fn a_hold_at_its_bound_cannot_be_extended() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    lock.extend(&guard, Duration::from_secs(3600)).await.unwrap();
    let extended = lock.extend(&guard, Duration::from_secs(3600)).await;
    assert!(
        matches!(extended, Err(ExtendError::MaxHoldReached)),
        "{extended:?}"
    );
    // What ends before the bound asks for nothing.
    lock.extend(&guard, Duration::from_secs(1)).await.unwrap();
}

#[tokio::test]
async fn a_guard_of_another_lock_goes_back_there() {
    let (here, there) = (MemoryLock::new(), MemoryLock::new());
    let held = here.try_acquire(&request(&name())).await.unwrap();
    let strange = there.try_acquire(&request(&name())).await.unwrap();
    assert_eq!(here.release(strange).await.unwrap(), Released::AlreadyGone);
    assert!(there.is_idle());
    assert_eq!(here.release(held).await.unwrap(), Released::Held);
}

#[tokio::test]
async fn a_former_guard_of_a_resumed_hold_does_not_end_it() {
    let lock = MemoryLock::new();
    let former = lock.try_acquire(&request(&name())).await.unwrap();
    let resumed = lock.resume(&request(&name()), former.lock_id()).await.unwrap();
    assert!(former.is_lost());
    let extended = lock.extend(&former, Duration::from_secs(10)).await;
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    drop(former);
    assert!(!resumed.is_lost());
    assert_eq!(lock.release(resumed).await.unwrap(), Released::Held);
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_ends_on_the_clock_is_told_at_once() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    let start = tokio::time::Instant::now();
    tokio::join!(guard.lost(), async { lock.advance(Duration::from_secs(60)) });
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn what_is_over_goes_to_the_waiter_before_anybody_else() {
    let lock = MemoryLock::new();
    let first = lock.try_acquire(&request(&name())).await.unwrap();
    let request = request(&name());
    let mut waiting = lock.acquire(&request, Duration::from_secs(600));
    assert!(
        tokio::time::timeout(Duration::from_millis(1), &mut waiting)
            .await
            .is_err()
    );
    lock.clock().advance(Duration::from_secs(60));
    let Err(AcquireError::Contended(contention)) = lock.try_acquire(&request).await else {
        panic!("somebody was there before");
    };
    let second = waiting.await.unwrap();
    assert_eq!(contention.held.unwrap().lock_id, Some(second.lock_id()));
    assert_eq!(lock.release(first).await.unwrap(), Released::AlreadyGone);
    assert_eq!(lock.release(second).await.unwrap(), Released::Held);
}

#[tokio::test]
async fn a_shorter_extension_leaves_the_end_where_it_was() {
    let lock = MemoryLock::new();
    let guard = lock.try_acquire(&request(&name())).await.unwrap();
    lock.extend(&guard, Duration::from_secs(2)).await.unwrap();
    lock.stop_heartbeats(&name());
    lock.advance(Duration::from_millis(8_900));
    assert!(!guard.is_lost());
    assert!(lock.inspect(&name()).await.unwrap().is_some());
}
