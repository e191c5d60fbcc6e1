//! What a backend does with a guard, and what the guard makes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use leasehold_domain::{
    GuardParts, Holder, LockGuard, LockId, LockMode, LockName, MemoryClock, Monotonic, MonotonicClock,
};

const SLICE: Duration = Duration::from_secs(10);

/// A lease of one slice, and how often it was released.
fn lease(clock: &Arc<MemoryClock>) -> (LockGuard, Arc<AtomicUsize>) {
    let parts = GuardParts {
        name: LockName::new(["plan", "7"]).unwrap(),
        mode: LockMode::Exclusive,
        lock_id: LockId::new(),
        fencing_token: None,
        holder: Holder::new("alice", "edit"),
        acquired_at: clock.wall(),
        expires_at: Some(clock.wall() + SLICE),
        trusted_until: Some(clock.now().plus(SLICE)),
        clock: Arc::clone(clock) as _,
    };
    let released = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&released);
    let guard = LockGuard::new(parts, move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    (guard, released)
}

#[test]
fn it_releases_once_when_dropped_and_never_when_defused() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, released) = lease(&clock);
    drop(guard);
    assert_eq!(released.load(Ordering::Relaxed), 1);
    let (guard, released) = lease(&clock);
    guard.defuse();
    assert_eq!(released.load(Ordering::Relaxed), 0);
}

#[test]
fn it_is_lost_when_its_trust_ends_and_no_renewal_revives_it() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, _) = lease(&clock);
    let control = guard.control();
    let later = Monotonic::from_start(SLICE * 5);
    clock.advance(SLICE - Duration::from_nanos(1));
    assert!(!guard.is_lost());
    clock.advance(Duration::from_nanos(1));
    assert!(guard.is_lost());
    assert!(!control.renewed(clock.wall() + SLICE, later));
    assert!(guard.is_lost());
    assert!(guard.trusted_until().unwrap() < later);
}

#[test]
fn a_renewal_in_time_moves_both_ends_and_never_back() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, _) = lease(&clock);
    let control = guard.control();
    let (expires, trusted) = (clock.wall() + SLICE * 3, clock.now().plus(SLICE * 3));
    assert!(control.renewed(expires, trusted));
    assert!(control.renewed(clock.wall(), clock.now()));
    assert_eq!(
        (guard.expires_at(), guard.trusted_until()),
        (Some(expires), Some(trusted))
    );
    clock.advance(SLICE * 2);
    assert!(!guard.is_lost());
    assert_eq!(guard.held_for(), SLICE * 2);
}

#[test]
fn a_pinned_hold_outlives_its_trust_and_no_longer() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, _) = lease(&clock);
    let control = guard.control();
    assert!(control.pin(true));
    clock.advance(SLICE * 2);
    assert!(!guard.is_lost());
    assert!(control.pin(false));
    assert!(guard.is_lost());
    assert!(!control.pin(true), "what is lost cannot be pinned");
    assert!(guard.is_lost());
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_told_at_once_and_not_at_the_next_look_at_the_clock() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, _) = lease(&clock);
    let control = guard.control();
    let start = tokio::time::Instant::now();
    tokio::join!(guard.lost(), async { control.lose() });
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_trust_is_noticed_though_nobody_tells() {
    let clock = Arc::new(MemoryClock::new());
    let (guard, _) = lease(&clock);
    tokio::join!(guard.lost(), async { clock.advance(SLICE) });
    assert!(guard.is_lost());
}
