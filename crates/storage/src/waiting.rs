//! Waiting without a connection: one queue a name, first come first served, and one of them tries.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use leasehold_domain::{AcquireError, Contention, LockGuard, LockName};
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::pool::ANSWER;
use crate::signals::{self, Signals};

/// The fallback poll, jittered between these: it finds what no signal told.
const POLL: std::ops::Range<Duration> = Duration::from_millis(250)..Duration::from_secs(1);
/// How long the attempt that ends a wait may take, after its end: a wait of nothing is an attempt all the same.
pub(crate) const LAST_ATTEMPT: Duration = Duration::from_secs(1);
/// How often a waiter says again that it waits.
pub(crate) const ANNOUNCE: Duration = Duration::from_secs(10);

/// The queues of one backend in one process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    names: Arc<Mutex<HashMap<LockName, Queue>>>,
}

/// Those who wait for one name.
#[derive(Debug, Default)]
struct Queue {
    waiters: VecDeque<Arc<Waiter>>,
    /// When somebody among them last asked, and who had it.
    told: Option<(Instant, Contention)>,
}

#[derive(Debug, Default)]
struct Waiter {
    wake: Notify,
    /// The one before it got the lock: a try makes no sense until this process has freed it.
    held_here: AtomicBool,
}

/// What an attempt found.
pub(crate) enum Attempt {
    Acquired(LockGuard),
    /// Somebody else has it, and by the database's clock it ends in this time at the latest, where it has an end.
    Contended(Contention, Option<Duration>),
}

impl Queues {
    fn names(&self) -> MutexGuard<'_, HashMap<LockName, Queue>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the first waiter of a name that this process has freed.
    pub(crate) fn freed(&self, name: &LockName) {
        if let Some(first) = self.names().get(name).and_then(|queue| queue.waiters.front()) {
            first.held_here.store(false, Ordering::Relaxed);
            first.wake.notify_one();
        }
    }

    fn join(&self, name: &LockName) -> Place {
        let waiter = Arc::new(Waiter::default());
        let mut names = self.names();
        let queue = &mut names.entry(name.clone()).or_default().waiters;
        queue.push_back(Arc::clone(&waiter));
        if queue.len() == 1 {
            waiter.wake.notify_one();
        }
        Place {
            queues: self.clone(),
            name: name.clone(),
            waiter,
            acquired: false,
        }
    }

    /// Who had the name when somebody in the line last asked, if that was not before this moment.
    fn told_since(&self, name: &LockName, start: Instant) -> Option<Contention> {
        let names = self.names();
        let (asked, contention) = names.get(name)?.told.as_ref()?;
        (*asked >= start).then(|| contention.clone())
    }

    /// Makes attempts until one succeeds, fails for another reason than contention, or `wait` has passed. Each is told
    /// until when it must have ended: so that a server which does not answer lengthens no wait by much.
    pub(crate) async fn acquire<'a>(
        &self,
        name: &LockName,
        wait: Duration,
        signals: &Signals,
        attempt: impl Fn(Instant) -> BoxFuture<'a, Result<Attempt, AcquireError>>,
    ) -> Result<LockGuard, AcquireError> {
        let start = Instant::now();
        // A wait beyond what the clock can count is as good as for ever.
        let deadline = start
            .checked_add(wait)
            .unwrap_or_else(|| start + Duration::from_secs(365 * 24 * 60 * 60));
        let mut place = self.join(name);
        let wake = &Arc::clone(&place.waiter).wake;
        let first = tokio::time::timeout_at(deadline, wake.notified()).await.is_ok();
        // The first in line has asked for all of them: a crowd whose time is over together does not ask together.
        if !first && let Some(contention) = self.told_since(name, start) {
            return Err(AcquireError::TimedOut {
                waited: start.elapsed(),
                contention,
            });
        }
        if first && place.waiter.held_here.load(Ordering::Relaxed) {
            tokio::select! {
                () = wake.notified() => {}
                () = tokio::time::sleep_until(deadline.min(Instant::now() + jittered_poll())) => {}
            }
        }
        let mut ear = None;
        let (mut announced, mut forgotten) = (start, false);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let asked = Instant::now();
            let until = asked + left.clamp(LAST_ATTEMPT, ANSWER);
            let (contention, ends_in) = match attempt(until).await? {
                Attempt::Acquired(guard) => {
                    place.acquired = true;
                    return Ok(guard);
                }
                Attempt::Contended(contention, ends_in) => (contention, ends_in),
            };
            if let Some(queue) = self.names().get_mut(name) {
                queue.told = Some((asked, contention.clone()));
            }
            if !first || Instant::now() >= deadline {
                return Err(AcquireError::TimedOut {
                    waited: start.elapsed(),
                    contention,
                });
            }
            let Some(ear) = &ear else {
                // What was freed before the ear was open is found by trying again at once.
                tokio::select! {
                    opened = signals.wait_for(signals::key(name)) => ear = Some(opened),
                    () = tokio::time::sleep_until(deadline) => {}
                }
                continue;
            };
            if forgotten || announced.elapsed() > ANNOUNCE {
                announced = Instant::now();
                ear.announce().await;
            }
            let poll = jittered_poll();
            let sleep = ends_in.map_or(poll, |ends_in| poll.min(ends_in + Duration::from_millis(1)));
            forgotten = tokio::select! {
                () = wake.notified() => false,
                // Who frees a name forgets who wanted it, and somebody else may be faster.
                () = ear.freed() => true,
                () = tokio::time::sleep_until(deadline.min(Instant::now() + sleep)) => false,
            };
        }
    }
}

pub(crate) fn jittered_poll() -> Duration {
    rand::rng().random_range(POLL)
}

/// A place in a queue. Giving it up, in whatever way, lets the next one step forward.
struct Place {
    queues: Queues,
    name: LockName,
    waiter: Arc<Waiter>,
    acquired: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut names = self.queues.names();
        let Some(queue) = names.get_mut(&self.name) else {
            return;
        };
        let was_first = queue
            .waiters
            .front()
            .is_some_and(|first| Arc::ptr_eq(first, &self.waiter));
        let waiters = &mut queue.waiters;
        waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        match waiters.front() {
            None => {
                names.remove(&self.name);
            }
            Some(next) if was_first => {
                next.held_here.store(self.acquired, Ordering::Relaxed);
                next.wake.notify_one();
            }
            Some(_) => {}
        }
    }
}
