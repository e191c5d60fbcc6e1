//! [`MemoryLock`]: the whole contract of a lock, kept in this process on a clock that moves when it is told.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::MemoryClock;
use crate::{
    AcquireError, Contention, DistributedLock, Durability, ExtendError, FencingToken, GuardParts, HeldLock,
    HoldControl, LockGuard, LockId, LockMode, LockName, LockRequest, Monotonic, MonotonicClock, ReleaseError,
    Released, ResumeError, Ttl, Unavailable,
};

/// A lock for tests: it excludes within this process, keeps every promise that the real backends keep, and can
/// be made to break.
///
/// Clones share their locks, so that a test can hand one to each "instance" of a service. Holds are leases on a
/// [`MemoryClock`]: they last until [`MemoryLock::advance`] moves it. Waiting in
/// [`DistributedLock::acquire`] runs on tokio's time, which a test may pause.
///
/// Requests for one name are served in the order in which they began to wait; nobody overtakes a waiter, so that
/// readers do not starve a writer. An exclusive, durable hold has a fencing token, which grows for ever.
///
/// ```
/// use std::time::Duration;
/// use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest, MemoryLock};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
/// let lock = MemoryLock::new();
/// let name = LockName::new(["plan", "7"])?;
/// let request = LockRequest::new(name.clone(), Holder::new("alice", "edit"))
///     .with_ttl(Duration::from_secs(10))
///     .with_max_hold(Duration::from_secs(60));
///
/// let guard = lock.try_acquire(&request).await?;
/// lock.advance(Duration::from_secs(30)); // renewed on the way
/// assert!(!guard.is_lost());
/// lock.advance(Duration::from_secs(30)); // that was the bound
/// assert!(guard.is_lost());
/// assert!(lock.try_acquire(&request).await.is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct MemoryLock {
    inner: Arc<Inner>,
}

impl MemoryLock {
    /// Locks that nobody holds, and a clock at its start.
    pub fn new() -> Self {
        Self::default()
    }

    /// The clock of every hold. Move it with [`MemoryLock::advance`]: moved directly it leaves every heartbeat
    /// out, as when the whole process was stopped, and nobody is told before the next call.
    pub fn clock(&self) -> &MemoryClock {
        &self.inner.clock
    }

    /// Moves the clock on, as far as one likes in one step. Live holds are renewed on the way, as their
    /// heartbeats would; those that reach their `max_hold`, or their end without a heartbeat, are lost and told,
    /// and whoever waited for them goes on.
    pub fn advance(&self, by: Duration) {
        let mut names = self.inner.names();
        let target = self.inner.clock.now().plus(by);
        // Renewed before the clock moves: a hold that has once looked overdue is never renewed.
        for hold in names.values_mut().flat_map(|entry| &mut entry.holds) {
            if hold.heartbeat && hold.bound > target && !hold.control.is_lost() {
                hold.renew(&self.inner.clock, target);
            }
        }
        self.inner.clock.advance(by);
        for entry in names.values_mut() {
            entry.end_overdue(target);
            self.inner.hand_over(entry, target);
        }
    }

    /// Takes the lock away from whoever holds it, as an operator or a broken session does. They are told at
    /// once.
    pub fn lose(&self, name: &LockName) {
        self.inner.change(name, |_, entry, _| {
            for hold in entry.holds.drain(..) {
                hold.control.lose();
            }
        });
    }

    /// Stops the heartbeats of whoever holds the lock now, as when their process hangs: the hold ends once its
    /// `ttl` has passed on the clock.
    pub fn stop_heartbeats(&self, name: &LockName) {
        self.inner.change(name, |_, entry, _| {
            for hold in &mut entry.holds {
                hold.heartbeat = false;
            }
        });
    }

    /// Ends the guard as when its process dies: without a release and with no more heartbeats. The lock stays
    /// held until its `ttl` has passed on the clock.
    pub fn abandon(&self, guard: LockGuard) {
        self.inner.change(guard.name(), |_, entry, _| {
            for hold in &mut entry.holds {
                hold.heartbeat &= hold.lock_id != guard.lock_id();
            }
        });
        guard.defuse();
    }

    /// Whether nobody holds a lock and nobody waits for one: what a test asks at its end.
    pub fn is_idle(&self) -> bool {
        let now = self.inner.clock.now();
        let names = self.inner.names();
        names
            .values()
            .all(|entry| entry.waiters.is_empty() && entry.holds.iter().all(|hold| hold.expires <= now))
    }
}

impl fmt::Debug for MemoryLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.inner.names();
        let held = names.iter().filter(|(_, entry)| !entry.holds.is_empty());
        f.debug_struct("MemoryLock")
            .field("clock", &self.inner.clock)
            .field("held", &held.map(|(name, _)| name).collect::<Vec<_>>())
            .finish()
    }
}

#[async_trait]
impl DistributedLock for MemoryLock {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        request.validate()?;
        self.inner
            .change(request.name(), |inner, entry, now| {
                inner.try_grant(entry, request, now)
            })
            .map_err(AcquireError::Contended)
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        request.validate()?;
        let start = Instant::now();
        let name = request.name();
        let attempt = self.inner.change(name, |inner, entry, now| {
            inner.try_grant(entry, request, now).map_err(|contention| {
                let queued = (!wait.is_zero()).then(|| inner.queue(entry, request));
                (contention, queued)
            })
        });
        let mut place = match attempt {
            Ok(guard) => return Ok(guard),
            Err((_, Some(place))) => place,
            Err((contention, None)) => {
                let waited = start.elapsed();
                return Err(AcquireError::TimedOut { waited, contention });
            }
        };
        if let Ok(Ok(guard)) = tokio::time::timeout(wait, &mut place.granted).await {
            return Ok(guard);
        }
        // Once out of the queue nothing more is granted; what was granted in the meantime is ours.
        let contention = self.inner.change(name, |_, entry, _| {
            entry.waiters.retain(|waiter| waiter.lock_id != place.lock_id);
            entry.contention(name)
        });
        place.granted.try_recv().map_err(|_| AcquireError::TimedOut {
            waited: start.elapsed(),
            contention,
        })
    }

    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        request.validate()?;
        self.inner
            .change(request.name(), |inner, entry, now| {
                let hold = entry.holds.iter_mut().find(|hold| hold.lock_id == lock_id)?;
                // The hold belongs to the new guard: what the one before does has no effect any more.
                hold.control.lose();
                hold.takeovers += 1;
                hold.heartbeat = true;
                hold.ttl = request.ttl();
                let (end, trusted) = slice(now, hold.ttl, hold.bound);
                hold.expires = hold.expires.max(end);
                let guard = inner.guard(
                    hold.control.parts().clone(),
                    hold.expires,
                    trusted,
                    hold.takeovers,
                );
                hold.control = guard.control();
                Some(guard)
            })
            .ok_or(ResumeError::NotHeld { lock_id })
    }

    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        let ttl = Ttl::new(ttl)?.get();
        self.inner.change(guard.name(), |inner, entry, now| {
            let hold = entry
                .holds
                .iter_mut()
                .find(|hold| hold.lock_id == guard.lock_id() && !guard.is_lost())
                .ok_or(ExtendError::Lost)?;
            if hold.expires == hold.bound && now.plus(ttl) > hold.bound {
                return Err(ExtendError::MaxHoldReached);
            }
            hold.ttl = ttl;
            if hold.renew(&inner.clock, now) {
                Ok(())
            } else {
                Err(ExtendError::Lost)
            }
        })
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        let control = guard.control();
        let held = self.inner.change(guard.name(), |_, entry, _| {
            let ours = |hold: &Hold| std::ptr::eq(hold.control.parts(), control.parts());
            let found = entry.holds.iter().position(ours);
            found.map(|index| entry.holds.remove(index)).is_some()
        });
        // Its own release finds nothing any more; a guard of another lock releases itself there.
        drop(guard);
        Ok(if held {
            Released::Held
        } else {
            Released::AlreadyGone
        })
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        Ok(self
            .inner
            .change(name, |_, entry, _| entry.holds.first().map(Hold::seen)))
    }
}

#[derive(Default)]
struct Inner {
    clock: Arc<MemoryClock>,
    names: Mutex<HashMap<LockName, Entry>>,
}

/// One name: who has it and who waits for it, in order. It stays for ever, because its tokens may not repeat.
#[derive(Default)]
struct Entry {
    holds: Vec<Hold>,
    waiters: VecDeque<Waiter>,
    last_token: i64,
}

struct Hold {
    lock_id: LockId,
    ttl: Duration,
    /// Where `max_hold` ends.
    bound: Monotonic,
    expires: Monotonic,
    heartbeat: bool,
    /// How often the hold went to another guard: the release of a former one must not end it.
    takeovers: u32,
    control: HoldControl,
}

struct Waiter {
    lock_id: LockId,
    request: LockRequest,
    grant: oneshot::Sender<LockGuard>,
}

/// A place in the queue; dropped, it is given up, and with it whatever was granted to it.
struct Place {
    inner: Arc<Inner>,
    name: LockName,
    lock_id: LockId,
    granted: oneshot::Receiver<LockGuard>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.change(&self.name, |_, entry, _| {
            entry.waiters.retain(|waiter| waiter.lock_id != self.lock_id);
        });
    }
}

impl Inner {
    fn names(&self) -> MutexGuard<'_, HashMap<LockName, Entry>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at or changes one name. What is overdue ends before, and whoever may go on goes on before and after.
    fn change<R>(
        self: &Arc<Self>,
        name: &LockName,
        change: impl FnOnce(&Arc<Self>, &mut Entry, Monotonic) -> R,
    ) -> R {
        let mut names = self.names();
        let now = self.clock.now();
        let entry = names.entry(name.clone()).or_default();
        entry.end_overdue(now);
        self.hand_over(entry, now);
        let answer = change(self, entry, now);
        self.hand_over(entry, now);
        answer
    }

    /// Grants to the waiters in their order, until one must wait on.
    fn hand_over(self: &Arc<Self>, entry: &mut Entry, now: Monotonic) {
        while let Some(waiter) = entry.next() {
            let guard = self.grant(entry, waiter.lock_id, &waiter.request, now);
            if let Err(unclaimed) = waiter.grant.send(guard) {
                // A place leaves the queue before it stops listening, so this does not happen; a guard that was
                // dropped here would wait for the names, which are locked.
                unclaimed.defuse();
                entry.holds.pop();
            }
        }
    }

    fn try_grant(
        self: &Arc<Self>,
        entry: &mut Entry,
        request: &LockRequest,
        now: Monotonic,
    ) -> Result<LockGuard, Contention> {
        if entry.waiters.is_empty() && entry.admits(request.mode()) {
            Ok(self.grant(entry, LockId::new(), request, now))
        } else {
            Err(entry.contention(request.name()))
        }
    }

    fn queue(self: &Arc<Self>, entry: &mut Entry, request: &LockRequest) -> Place {
        let lock_id = LockId::new();
        let (grant, granted) = oneshot::channel();
        entry.waiters.push_back(Waiter {
            lock_id,
            request: request.clone(),
            grant,
        });
        Place {
            inner: Arc::clone(self),
            name: request.name().clone(),
            lock_id,
            granted,
        }
    }

    fn grant(
        self: &Arc<Self>,
        entry: &mut Entry,
        lock_id: LockId,
        request: &LockRequest,
        now: Monotonic,
    ) -> LockGuard {
        let durable = request.durability() == Durability::Durable;
        let fencing_token = (durable && request.mode() == LockMode::Exclusive).then(|| {
            entry.last_token += 1;
            FencingToken::new(entry.last_token)
        });
        let (expires, trusted) = slice(now, request.ttl(), now.plus(request.max_hold()));
        let facts = GuardParts {
            name: request.name().clone(),
            mode: request.mode(),
            lock_id,
            fencing_token,
            holder: request.holder().clone(),
            acquired_at: self.clock.wall_at(now),
            expires_at: None,
            trusted_until: None,
            clock: Arc::clone(&self.clock) as _,
        };
        let guard = self.guard(facts, expires, trusted, 0);
        entry.holds.push(Hold {
            lock_id,
            ttl: request.ttl(),
            bound: now.plus(request.max_hold()),
            expires,
            heartbeat: true,
            takeovers: 0,
            control: guard.control(),
        });
        guard
    }

    fn guard(
        self: &Arc<Self>,
        facts: GuardParts,
        expires: Monotonic,
        trusted: Monotonic,
        takeovers: u32,
    ) -> LockGuard {
        let (inner, name, lock_id) = (Arc::clone(self), facts.name.clone(), facts.lock_id);
        let parts = GuardParts {
            expires_at: Some(self.clock.wall_at(expires)),
            trusted_until: Some(trusted),
            ..facts
        };
        LockGuard::new(parts, move || {
            inner.change(&name, |_, entry, _| {
                entry
                    .holds
                    .retain(|hold| hold.lock_id != lock_id || hold.takeovers != takeovers);
            });
        })
    }
}

impl Entry {
    fn admits(&self, mode: LockMode) -> bool {
        self.holds
            .iter()
            .all(|hold| (hold.control.parts().mode, mode) == (LockMode::Shared, LockMode::Shared))
    }

    /// The first waiter, when the lock can be granted to it.
    fn next(&mut self) -> Option<Waiter> {
        let admitted = self.admits(self.waiters.front()?.request.mode());
        self.waiters.pop_front_if(|_| admitted)
    }

    fn end_overdue(&mut self, now: Monotonic) {
        self.holds.retain(|hold| {
            let lives = now < hold.expires;
            if !lives {
                hold.control.lose();
            }
            lives
        });
    }

    fn contention(&self, name: &LockName) -> Contention {
        match self.holds.first() {
            Some(hold) => Contention::with(hold.seen()),
            None => Contention::unknown(name.clone()),
        }
    }
}

impl Hold {
    /// Grants the slice of a heartbeat or an extension at `now`; no end moves back. Answers whether it was held.
    fn renew(&mut self, clock: &MemoryClock, now: Monotonic) -> bool {
        let (end, trusted) = slice(now, self.ttl, self.bound);
        let held = self.control.renewed(clock.wall_at(end), trusted);
        if held {
            self.expires = self.expires.max(end);
        }
        held
    }

    fn seen(&self) -> HeldLock {
        let facts = self.control.parts();
        HeldLock {
            name: facts.name.clone(),
            mode: facts.mode,
            lock_id: Some(self.lock_id),
            holder: Some(facts.holder.clone()),
            acquired_at: Some(facts.acquired_at),
            expires_at: self.control.expires_at(),
            fencing_token: facts.fencing_token,
            session: None,
        }
    }
}

/// The end of a slice that is granted at `now`, and until when its holder may trust in it: a margin of 10 % of
/// the `ttl`, at least 10 ms and at most 1 s, earlier.
fn slice(now: Monotonic, ttl: Duration, bound: Monotonic) -> (Monotonic, Monotonic) {
    let granted = ttl.min(bound.since(now));
    let margin = (ttl / 10).clamp(Duration::from_millis(10), Duration::from_secs(1));
    (now.plus(granted), now.plus(granted.saturating_sub(margin)))
}
