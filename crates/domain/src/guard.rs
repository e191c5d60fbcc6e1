//! [`LockGuard`]: the value whose life is the hold.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;

use crate::{FencingToken, Holder, LockId, LockMode, LockName, Monotonic, MonotonicClock};

/// How often a waiter for the loss of a lock looks at the clock again: timers stand still while the machine is
/// suspended, the clock does not.
const CLOCK_LOOK: Duration = Duration::from_millis(500);

/// Proof that a lock was granted. While it lives the lock is held and renewed; dropping it releases.
///
/// Release with [`crate::DistributedLock::release`] to know when the lock is free. Dropping the guard releases
/// in the background: it never blocks, works in any thread and during a panic, and the backend's own limit (the
/// `ttl`, or the end of the session) stands behind it.
///
/// A hold can end without the guard's doing: the process was stopped for too long, the connection broke, an
/// operator took the lock away. [`LockGuard::lost`] tells; a guard alone does not keep a paused process from
/// writing late. Work whose effect must never overlap belongs into a fenced transaction, or takes
/// [`LockGuard::fencing_token`] along.
#[must_use = "the lock is released as soon as the guard is dropped"]
#[clippy::has_significant_drop]
pub struct LockGuard {
    hold: Arc<Hold>,
    release: Option<Box<dyn FnOnce() + Send + Sync>>,
}

/// What a backend knows at the moment of the grant.
#[derive(Clone, Debug)]
pub struct GuardParts {
    /// The lock.
    pub name: LockName,
    /// Shared or exclusive.
    pub mode: LockMode,
    /// This acquisition.
    pub lock_id: LockId,
    /// Its token, where the backend gives tokens and it is final.
    pub fencing_token: Option<FencingToken>,
    /// Who holds it.
    pub holder: Holder,
    /// When it was granted, by the backend's clock.
    pub acquired_at: DateTime<Utc>,
    /// When it ends unless renewed; `None` for holds without a lease.
    pub expires_at: Option<DateTime<Utc>>,
    /// Until when the holder may believe in it without another answer; `None` for holds without a lease.
    pub trusted_until: Option<Monotonic>,
    /// The clock of `trusted_until`.
    pub clock: Arc<dyn MonotonicClock>,
}

struct Hold {
    parts: GuardParts,
    granted: Monotonic,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy)]
struct State {
    expires_at: Option<DateTime<Utc>>,
    trusted_until: Option<Monotonic>,
    /// A row lock of ours keeps rivals out, whatever the clock says.
    pinned: bool,
    lost: bool,
}

impl Hold {
    fn is_lost(&self, state: &State) -> bool {
        let overdue = || {
            state
                .trusted_until
                .is_some_and(|until| until <= self.parts.clock.now())
        };
        state.lost || (!state.pinned && overdue())
    }
}

impl LockGuard {
    /// For backends: a guard that runs `release` when it is dropped.
    ///
    /// `release` must not block and must work in any thread, in or out of a runtime.
    pub fn new(parts: GuardParts, release: impl FnOnce() + Send + Sync + 'static) -> Self {
        let state = State {
            expires_at: parts.expires_at,
            trusted_until: parts.trusted_until,
            pinned: false,
            lost: false,
        };
        let granted = parts.clock.now();
        let hold = Arc::new(Hold {
            parts,
            granted,
            state: watch::Sender::new(state),
        });
        Self {
            hold,
            release: Some(Box::new(release)),
        }
    }

    /// A guard of an exclusive lock that nobody holds: for mocks to return. It is never lost and releases
    /// nothing.
    ///
    /// ```
    /// use leasehold_domain::{LockGuard, LockName};
    ///
    /// let guard = LockGuard::for_test(LockName::new(["plan", "7"])?);
    /// assert!(!guard.is_lost());
    /// # Ok::<(), leasehold_domain::Invalid>(())
    /// ```
    pub fn for_test(name: LockName) -> Self {
        let clock = Arc::new(crate::MemoryClock::new());
        let parts = GuardParts {
            name,
            mode: LockMode::Exclusive,
            lock_id: LockId::new(),
            fencing_token: Some(FencingToken::new(1)),
            holder: Holder::new("test", "test"),
            acquired_at: clock.wall(),
            expires_at: None,
            trusted_until: None,
            clock,
        };
        Self::new(parts, || {})
    }

    /// The lock.
    pub fn name(&self) -> &LockName {
        &self.hold.parts.name
    }

    /// Shared or exclusive.
    pub fn mode(&self) -> LockMode {
        self.hold.parts.mode
    }

    /// This acquisition.
    pub fn lock_id(&self) -> LockId {
        self.hold.parts.lock_id
    }

    /// The token of this acquisition.
    ///
    /// Durable leases have one; session, transaction and shared locks have none; a lease whose grant becomes
    /// durable only with its write has one only inside its fenced transaction.
    pub fn fencing_token(&self) -> Option<FencingToken> {
        self.hold.parts.fencing_token
    }

    /// Who holds it.
    pub fn holder(&self) -> &Holder {
        &self.hold.parts.holder
    }

    /// When it was granted, by the backend's clock.
    pub fn acquired_at(&self) -> DateTime<Utc> {
        self.hold.parts.acquired_at
    }

    /// When it ends unless it is renewed, by the backend's clock; `None` for session and transaction scope.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.hold.state.borrow().expires_at
    }

    /// Until when this process may believe that it holds the lock without another answer from the backend;
    /// `None` for session and transaction scope.
    ///
    /// It lies a margin (10 % of the `ttl`, at least 10 ms, at most 1 s) before the moment that is one `ttl`
    /// after the last successful request was *sent*, so that a slow answer does not lengthen it.
    pub fn trusted_until(&self) -> Option<Monotonic> {
        self.hold.state.borrow().trusted_until
    }

    /// How long this process has had the lock.
    pub fn held_for(&self) -> Duration {
        self.hold.parts.clock.now().since(self.hold.granted)
    }

    /// Whether the hold has ended without our release, as far as this process knows or must assume.
    pub fn is_lost(&self) -> bool {
        self.hold.is_lost(&self.hold.state.borrow())
    }

    /// Waits until the hold has ended without our release. It never resolves after a release.
    ///
    /// It resolves at once when the backend says so, and at [`LockGuard::trusted_until`] at the latest.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: call it again.
    pub async fn lost(&self) {
        let mut changes = self.hold.state.subscribe();
        loop {
            let state = *changes.borrow_and_update();
            if self.hold.is_lost(&state) {
                return;
            }
            // The sender lives as long as this guard: whatever ends the wait, the state is looked at again.
            match state.trusted_until {
                Some(until) if !state.pinned => {
                    let left = until.since(self.hold.parts.clock.now()).min(CLOCK_LOOK);
                    _ = tokio::time::timeout(left, changes.changed()).await;
                }
                // No clock ends it, so a hundred thousand who wait cost nothing.
                _ => _ = changes.changed().await,
            }
        }
    }

    /// For backends: what moves the hold's state from outside of the guard.
    pub fn control(&self) -> HoldControl {
        HoldControl {
            hold: Arc::clone(&self.hold),
        }
    }

    /// For backends: ends the guard without running its release, because the release has been done.
    pub fn defuse(mut self) {
        self.release = None;
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("name", self.name())
            .field("mode", &self.mode())
            .field("lock_id", &self.lock_id())
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

/// A backend's grip on the state of a hold: it renews, pins, and declares it lost.
#[derive(Clone)]
pub struct HoldControl {
    hold: Arc<Hold>,
}

impl HoldControl {
    /// The facts of the grant.
    pub fn parts(&self) -> &GuardParts {
        &self.hold.parts
    }

    /// When the hold ends unless renewed, as last answered.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.hold.state.borrow().expires_at
    }

    /// Whether the hold is lost, as [`LockGuard::is_lost`].
    pub fn is_lost(&self) -> bool {
        self.hold.is_lost(&self.hold.state.borrow())
    }

    /// How long this process has had the lock.
    pub fn held_for(&self) -> Duration {
        self.hold.parts.clock.now().since(self.hold.granted)
    }

    /// Notes a renewal that the backend has confirmed. Neither time moves back.
    ///
    /// Answers `false`, and declares the hold lost, when it was already lost: whoever was told of a loss is
    /// never told otherwise.
    pub fn renewed(&self, expires_at: DateTime<Utc>, trusted_until: Monotonic) -> bool {
        let mut held = true;
        self.hold.state.send_modify(|state| {
            held = !self.hold.is_lost(state);
            if held {
                state.expires_at = state.expires_at.max(Some(expires_at));
                state.trusted_until = state.trusted_until.max(Some(trusted_until));
            } else {
                state.lost = true;
            }
        });
        held
    }

    /// Declares the hold lost; everybody who waits for that is told.
    pub fn lose(&self) {
        self.hold.state.send_modify(|state| state.lost = true);
    }

    /// Says whether a row lock of our own keeps rivals out just now, so that the hold outlives its deadline.
    ///
    /// Answers `false`, and changes nothing, when the hold is already lost.
    pub fn pin(&self, pinned: bool) -> bool {
        let mut held = true;
        self.hold.state.send_modify(|state| {
            held = !self.hold.is_lost(state);
            if held {
                state.pinned = pinned;
            }
        });
        held
    }
}

impl fmt::Debug for HoldControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HoldControl")
            .field("name", &self.hold.parts.name)
            .field("lock_id", &self.hold.parts.lock_id)
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}
