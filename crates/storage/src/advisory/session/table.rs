//! [`Table`]: what this process has of the locks of one lock session, who of it wants them, and who is next.
//!
//! The server knows one holder, the session. Everything else is decided here: exclusion inside the process, the
//! count of shared holders over one server lock, the order of those who wait, and when other processes get their
//! turn. The table never waits: it changes in the thread that brings the news, and what is to be sent goes to the
//! connection's task in the order in which it was decided. A key that was unlocked here may therefore be asked
//! for again at once; the server hears both in that order.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use leasehold_domain::{
    HeldLock, Holder, HolderSession, LockId, LockMode, LockName, Monotonic, MonotonicClock, Unavailable,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use super::bounds::Bounds;
use super::budget::{Budget, ServerLock};
use crate::advisory::AdvisoryKey;
use crate::clock::Boottime;
use crate::waiting::jittered_poll;

/// How often the server's lock may be handed on inside the process before others get a turn.
const HANDED_ON_AT_MOST: u32 = 16;
/// How long the process may keep a name with pauses that only those notice who wait inside the server. Others
/// make themselves known; this bounds how long one is overlooked whose word was lost.
const KEPT_AT_MOST: Duration = Duration::from_secs(10);
/// The lead that another process gets before a single attempt of this one. A notification takes about a
/// millisecond.
const HEAD_START: Duration = Duration::from_millis(20);

/// What the connection is told to send.
#[derive(Debug)]
pub(super) enum Command {
    /// Try to lock.
    Lock { key: AdvisoryKey, mode: LockMode },
    /// Unlock what that session was granted, and say what became of it.
    Unlock {
        key: AdvisoryKey,
        mode: LockMode,
        session: Session,
        told: Option<oneshot::Sender<Unlocked>>,
    },
    /// Ask whether that session is still there, and say so if it is.
    Ping {
        session: Session,
        told: oneshot::Sender<()>,
    },
}

/// What became of an unlock.
#[derive(Debug)]
pub(super) enum Unlocked {
    /// It was ours until then.
    Held,
    /// The server did not know of it.
    AlreadyGone,
    /// No answer came; the session has ended, and the lock with it.
    Unanswered(Unavailable),
}

/// One connection to the server, of those that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) backend_pid: i32,
}

/// Somebody of this process who wants the lock.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) lock_id: LockId,
    pub(super) name: LockName,
    pub(super) mode: LockMode,
    pub(super) holder: Arc<Holder>,
    pub(super) max_hold: Duration,
    pub(super) patience: Patience,
    pub(super) verdict: oneshot::Sender<Verdict>,
}

/// Whether a refusal is an answer or a reason to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Try,
    Wait,
}

/// How it went.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is held from now on.
    Granted {
        acquired_at: DateTime<Utc>,
        backend_pid: i32,
    },
    /// Somebody else has it or is before us; who, where it is somebody of this process.
    Refused(Option<Box<HeldLock>>),
    /// It could not be asked for.
    Failed(Failure),
}

/// Why a lock could not be asked for.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) cause: Unavailable,
    /// Whether the server may have heard it all the same.
    pub(super) sent: bool,
}

/// What a leave came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// There was no such hold.
    NotHeld,
    /// The hold has ended; the server's lock is still with this process.
    Kept,
    /// The hold has ended and the server's lock is being given back.
    Unlocking,
}

/// What becomes of a waiter whose time is over.
#[derive(Debug)]
pub(super) enum GivenUp {
    /// It is out of the queue.
    Refused(Option<Box<HeldLock>>),
    /// Its verdict is there or under way.
    Pending,
}

/// What a chaser does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chase {
    /// Nobody waits, or this process has the lock.
    End,
    /// An attempt is under way.
    Asked,
    /// Somebody else has the lock.
    Refused,
    /// Others have their turn until then; whether somebody of this process waits for the end of it.
    Yielding { until: Instant, awaited: bool },
}

#[derive(Debug)]
pub(super) struct Table {
    entries: HashMap<AdvisoryKey, Entry>,
    commands: mpsc::UnboundedSender<Command>,
    budget: Arc<Budget>,
    bounds: Arc<Bounds>,
    /// Why nothing is asked for any more.
    closed: Option<Unavailable>,
}

#[derive(Debug)]
struct Entry {
    stage: Stage,
    queue: VecDeque<Waiter>,
    /// Since when this process has had the name with no more than moments in between.
    kept_since: Option<Instant>,
    /// An attempt broke with its connection, and is being made again on the next.
    asked_again: bool,
    /// Wakes the task that waits for other processes on behalf of the queue.
    chaser: Option<Arc<Notify>>,
}

#[derive(Debug)]
enum Stage {
    /// In between, inside one function.
    Idle,
    /// A try for the first of the queue is under way. The queue may be empty by the time it is answered.
    Asking { mode: LockMode, lock: ServerLock },
    /// The server's lock is with this process.
    Held(Held),
    /// Somebody else has it, and the chaser asks again later. The queue is not empty.
    Refused,
    /// Given back so that others have a turn.
    Yielding { since: Instant, until: Instant },
}

/// The server's lock and those who have it.
#[derive(Debug)]
struct Held {
    mode: LockMode,
    session: Session,
    holders: Vec<Holding>,
    handed_on: u32,
    /// Shared holders that came later are of the next generation. When the last of this one has left, the lock
    /// has been handed on to the next.
    generation: u32,
    granted_at: DateTime<Utc>,
    granted: Monotonic,
    _lock: ServerLock,
}

/// One holder.
#[derive(Debug)]
struct Holding {
    lock_id: LockId,
    name: LockName,
    holder: Arc<Holder>,
    acquired_at: DateTime<Utc>,
    ends: Monotonic,
    generation: u32,
}

impl Waiter {
    fn tell(self, verdict: Verdict) {
        // A waiter leaves the queue before it stops listening, so somebody hears this.
        drop(self.verdict.send(verdict));
    }
}

impl Held {
    fn let_in(&mut self, waiter: Waiter, bounds: &Bounds) {
        let now = Boottime.now();
        // As exact as the server's own times.
        let since = i64::try_from(now.since(self.granted).as_micros())
            .map_or(TimeDelta::MAX, TimeDelta::microseconds);
        let acquired_at = self
            .granted_at
            .checked_add_signed(since)
            .unwrap_or(self.granted_at);
        let ends = now.plus(waiter.max_hold);
        bounds.note(ends);
        self.holders.push(Holding {
            lock_id: waiter.lock_id,
            name: waiter.name.clone(),
            holder: Arc::clone(&waiter.holder),
            acquired_at,
            ends,
            generation: self.generation + u32::from(!self.holders.is_empty()),
        });
        let backend_pid = self.session.backend_pid;
        waiter.tell(Verdict::Granted {
            acquired_at,
            backend_pid,
        });
    }

    /// Lets in the first of the queue, and with a shared one all shared ones behind it.
    fn admit(&mut self, queue: &mut VecDeque<Waiter>, bounds: &Bounds) {
        while queue.front().is_some_and(|first| first.mode == self.mode) {
            if let Some(first) = queue.pop_front() {
                self.let_in(first, bounds);
            }
            if self.mode == LockMode::Exclusive {
                return;
            }
        }
    }

    /// Whether one more shared holder may come in beside those that are there.
    fn lets_in(&self, mode: LockMode, wanted: &impl Fn() -> bool) -> bool {
        mode == LockMode::Shared
            && self.mode == LockMode::Shared
            && self.handed_on < HANDED_ON_AT_MOST
            && !wanted()
    }

    fn leave(&mut self, index: usize) {
        self.holders.swap_remove(index);
        let last_of_its_generation = !self.holders.is_empty()
            && self
                .holders
                .iter()
                .all(|holding| holding.generation > self.generation);
        if last_of_its_generation {
            self.generation += 1;
            self.handed_on += 1;
        }
    }

    fn seen(&self) -> Option<Box<HeldLock>> {
        let first = self.holders.first()?;
        Some(Box::new(HeldLock {
            lock_id: Some(first.lock_id),
            holder: Some((*first.holder).clone()),
            acquired_at: Some(first.acquired_at),
            session: Some(HolderSession {
                backend_pid: self.session.backend_pid,
                application_name: None,
                client_address: None,
            }),
            ..HeldLock::unknown(first.name.clone(), self.mode)
        }))
    }
}

impl Entry {
    fn wake_chaser(&self) {
        if let Some(chaser) = &self.chaser {
            chaser.notify_one();
        }
    }

    /// Cuts a turn of others short for a single attempt, but for their lead.
    fn hurry(&mut self) {
        if let Stage::Yielding { since, until } = &mut self.stage {
            *until = (*until).min(*since + HEAD_START);
            self.wake_chaser();
        }
    }
}

impl Table {
    pub(super) fn new(
        commands: mpsc::UnboundedSender<Command>,
        budget: Arc<Budget>,
        bounds: Arc<Bounds>,
    ) -> Self {
        Self {
            entries: HashMap::new(),
            commands,
            budget,
            bounds,
            closed: None,
        }
    }

    /// Somebody wants a lock. The verdict comes now or later. `wanted` says whether another process is known to
    /// wait for it.
    pub(super) fn join(&mut self, key: AdvisoryKey, waiter: Waiter, wanted: impl Fn() -> bool) {
        if let Some(cause) = &self.closed {
            let cause = cause.clone();
            return waiter.tell(Verdict::Failed(Failure { cause, sent: false }));
        }
        let Some(entry) = self.entries.get_mut(&key) else {
            let entry = Entry {
                stage: Stage::Idle,
                queue: VecDeque::from([waiter]),
                kept_since: None,
                asked_again: false,
                chaser: None,
            };
            self.entries.insert(key, entry);
            return self.ask(key);
        };
        let tries = waiter.patience == Patience::Try;
        match &mut entry.stage {
            Stage::Held(held) if entry.queue.is_empty() && held.lets_in(waiter.mode, &wanted) => {
                held.let_in(waiter, &self.bounds);
            }
            Stage::Held(held) if tries => waiter.tell(Verdict::Refused(held.seen())),
            Stage::Refused if tries => waiter.tell(Verdict::Refused(None)),
            Stage::Yielding { .. } if tries && !entry.queue.is_empty() => {
                waiter.tell(Verdict::Refused(None));
            }
            Stage::Idle | Stage::Asking { .. } | Stage::Held(_) | Stage::Refused => {
                entry.queue.push_back(waiter);
            }
            Stage::Yielding { .. } => {
                entry.queue.push_back(waiter);
                if tries {
                    entry.hurry();
                } else {
                    entry.wake_chaser();
                }
            }
        }
    }

    /// Whoever joined under this id is gone, whatever it has got meanwhile.
    pub(super) fn withdraw(&mut self, key: AdvisoryKey, lock_id: LockId, wanted: impl Fn() -> bool) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        match entry.queue.iter().position(|waiter| waiter.lock_id == lock_id) {
            Some(index) => {
                entry.queue.remove(index);
                self.queue_is_shorter(key, wanted);
            }
            None => {
                self.leave(key, lock_id, wanted, None);
            }
        }
    }

    /// The time of a waiter is over.
    pub(super) fn give_up(
        &mut self,
        key: AdvisoryKey,
        lock_id: LockId,
        wanted: impl Fn() -> bool,
    ) -> GivenUp {
        let Some(entry) = self.entries.get_mut(&key) else {
            return GivenUp::Pending;
        };
        let Some(index) = entry.queue.iter().position(|waiter| waiter.lock_id == lock_id) else {
            return GivenUp::Pending;
        };
        let held = match &entry.stage {
            // There may have been no attempt yet since it came.
            Stage::Idle | Stage::Asking { .. } | Stage::Yielding { .. } => {
                entry.queue[index].patience = Patience::Try;
                entry.hurry();
                return GivenUp::Pending;
            }
            Stage::Held(held) => held.seen(),
            Stage::Refused => None,
        };
        entry.queue.remove(index);
        self.queue_is_shorter(key, wanted);
        GivenUp::Refused(held)
    }

    /// Somebody left the queue: those behind may be let in now, or nobody is left to chase for.
    fn queue_is_shorter(&mut self, key: AdvisoryKey, wanted: impl Fn() -> bool) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        match &mut entry.stage {
            Stage::Held(held) => {
                if let Some(first) = entry.queue.front()
                    && held.lets_in(first.mode, &wanted)
                {
                    held.admit(&mut entry.queue, &self.bounds);
                }
            }
            Stage::Refused if entry.queue.is_empty() => self.forget(key),
            Stage::Idle | Stage::Asking { .. } | Stage::Refused | Stage::Yielding { .. } => {}
        }
    }

    /// A holder leaves. The last one hands the server's lock on, or gives it back; then `told` hears of it.
    pub(super) fn leave(
        &mut self,
        key: AdvisoryKey,
        lock_id: LockId,
        wanted: impl Fn() -> bool,
        told: Option<oneshot::Sender<Unlocked>>,
    ) -> Left {
        let Some(entry) = self.entries.get_mut(&key) else {
            return Left::NotHeld;
        };
        let Stage::Held(held) = &mut entry.stage else {
            return Left::NotHeld;
        };
        let Some(index) = held.holders.iter().position(|holding| holding.lock_id == lock_id) else {
            return Left::NotHeld;
        };
        held.leave(index);
        if !held.holders.is_empty() {
            return Left::Kept;
        }
        let wanted = wanted();
        let kept_too_long = !entry.queue.is_empty()
            && entry
                .kept_since
                .is_some_and(|since| since.elapsed() >= KEPT_AT_MOST);
        let others_turn = wanted || kept_too_long;
        let fits = entry.queue.front().is_some_and(|first| first.mode == held.mode);
        if fits && !others_turn && held.handed_on < HANDED_ON_AT_MOST {
            held.handed_on += 1;
            held.admit(&mut entry.queue, &self.bounds);
            return Left::Kept;
        }
        let (mode, session) = (held.mode, held.session);
        if others_turn {
            let now = Instant::now();
            entry.kept_since = None;
            entry.stage = Stage::Yielding {
                since: now,
                until: now + jittered_poll() + jittered_poll(),
            };
        } else {
            entry.stage = Stage::Idle;
        }
        self.send(Command::Unlock {
            key,
            mode,
            session,
            told,
        });
        if !others_turn {
            self.ask(key);
        }
        Left::Unlocking
    }

    /// Asks the server for what the first of the queue wants; forgets the key when nobody wants it.
    fn ask(&mut self, key: AdvisoryKey) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let Some(mode) = entry.queue.front().map(|first| first.mode) else {
            return self.forget(key);
        };
        match self.budget.take() {
            Some(lock) => {
                entry.stage = Stage::Asking { mode, lock };
                self.send(Command::Lock { key, mode });
            }
            None => {
                let cause = self.budget.exhausted();
                self.fail(key, &Failure { cause, sent: false });
            }
        }
    }

    fn send(&self, command: Command) {
        // The task that hears this closes the table before it stops listening.
        drop(self.commands.send(command));
    }

    fn forget(&mut self, key: AdvisoryKey) {
        if let Some(entry) = self.entries.remove(&key) {
            entry.wake_chaser();
        }
    }

    fn fail(&mut self, key: AdvisoryKey, failure: &Failure) {
        if let Some(entry) = self.entries.remove(&key) {
            entry.wake_chaser();
            for waiter in entry.queue {
                waiter.tell(Verdict::Failed(failure.clone()));
            }
        }
    }

    /// The server has granted what was asked for.
    pub(super) fn granted(&mut self, key: AdvisoryKey, session: Session, granted_at: DateTime<Utc>) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let Stage::Asking { mode, lock } = std::mem::replace(&mut entry.stage, Stage::Idle) else {
            return;
        };
        entry.asked_again = false;
        if entry.queue.front().is_none_or(|first| first.mode != mode) {
            // Who asked is gone, and the next wants it in another way.
            self.send(Command::Unlock {
                key,
                mode,
                session,
                told: None,
            });
            drop(lock);
            return self.ask(key);
        }
        let mut held = Held {
            mode,
            session,
            holders: Vec::with_capacity(1),
            handed_on: 0,
            generation: 0,
            granted_at,
            granted: Boottime.now(),
            _lock: lock,
        };
        held.admit(&mut entry.queue, &self.bounds);
        entry.kept_since.get_or_insert_with(Instant::now);
        for waiter in take_tries(&mut entry.queue, |_| true) {
            waiter.tell(Verdict::Refused(held.seen()));
        }
        entry.stage = Stage::Held(held);
        if let Some(chaser) = entry.chaser.take() {
            chaser.notify_one();
        }
    }

    /// The server has refused what was asked for. Answers what wakes the chaser when one is to be started.
    pub(super) fn refused(&mut self, key: AdvisoryKey) -> Option<Arc<Notify>> {
        let entry = self.entries.get_mut(&key)?;
        let Stage::Asking { mode: asked, .. } = std::mem::replace(&mut entry.stage, Stage::Idle) else {
            return None;
        };
        entry.asked_again = false;
        entry.kept_since = None;
        // Shared holders elsewhere refuse an exclusive request and not a shared one, so a shared attempt that
        // has nobody before it is still to be made.
        let may_share = asked == LockMode::Exclusive
            && entry
                .queue
                .iter()
                .find(|waiter| waiter.mode == LockMode::Shared || waiter.patience == Patience::Wait)
                .is_some_and(|first| first.mode == LockMode::Shared);
        for waiter in take_tries(&mut entry.queue, |waiter| {
            !(may_share && waiter.mode == LockMode::Shared)
        }) {
            waiter.tell(Verdict::Refused(None));
        }
        if entry.queue.is_empty() || may_share {
            self.ask(key);
            return None;
        }
        entry.stage = Stage::Refused;
        entry.start_chaser()
    }

    /// What was asked for cannot be had because of the connection.
    pub(super) fn failed(&mut self, key: AdvisoryKey, failure: &Failure) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        if !matches!(entry.stage, Stage::Asking { .. }) {
            return;
        }
        if failure.sent && !entry.asked_again {
            entry.asked_again = true;
            entry.stage = Stage::Idle;
            self.ask(key);
        } else {
            self.fail(key, failure);
        }
    }

    /// A key was unlocked, or its session has ended. Answers what wakes the chaser when one is to be started.
    pub(super) fn unlocked(&mut self, key: AdvisoryKey) -> Option<Arc<Notify>> {
        let entry = self.entries.get_mut(&key)?;
        match entry.stage {
            Stage::Yielding { .. } => entry.start_chaser(),
            Stage::Idle | Stage::Asking { .. } | Stage::Held(_) | Stage::Refused => None,
        }
    }

    /// A session has ended: answers the holds that ended with it. What is waited for here is asked for again.
    pub(super) fn session_ended(&mut self, ended: Session) -> Vec<(AdvisoryKey, LockId)> {
        let mut lost = Vec::new();
        let mut freed = Vec::new();
        for (key, entry) in &mut self.entries {
            if let Stage::Held(held) = &entry.stage
                && held.session == ended
            {
                lost.extend(held.holders.iter().map(|holding| (*key, holding.lock_id)));
                entry.stage = Stage::Idle;
                entry.kept_since = None;
                freed.push(*key);
            }
        }
        for key in freed {
            self.ask(key);
        }
        lost
    }

    /// Nothing is asked for any more. Answers whose holds end with it.
    pub(super) fn close(&mut self, cause: &Unavailable) -> Vec<LockId> {
        self.closed = Some(cause.clone());
        let mut lost = Vec::new();
        for (_, entry) in self.entries.drain() {
            if let Stage::Held(held) = &entry.stage {
                lost.extend(held.holders.iter().map(|holding| holding.lock_id));
            }
            for waiter in entry.queue {
                let cause = cause.clone();
                waiter.tell(Verdict::Failed(Failure { cause, sent: false }));
            }
        }
        lost
    }

    /// The holds whose longest time is over, and when the next one's is.
    pub(super) fn overdue(&self, now: Monotonic) -> (Vec<(AdvisoryKey, LockId)>, Option<Monotonic>) {
        let mut over = Vec::new();
        let mut next = None::<Monotonic>;
        for (key, entry) in &self.entries {
            let Stage::Held(held) = &entry.stage else {
                continue;
            };
            for holding in &held.holders {
                if holding.ends <= now {
                    over.push((*key, holding.lock_id));
                } else {
                    next = Some(next.map_or(holding.ends, |next| next.min(holding.ends)));
                }
            }
        }
        (over, next)
    }

    /// Moves the end of a hold, if that is later. `told` hears when its session has proven to be there; it is
    /// dropped when that is over, or there is no such hold.
    pub(super) fn extend(
        &mut self,
        key: AdvisoryKey,
        lock_id: LockId,
        ends: Monotonic,
        told: oneshot::Sender<()>,
    ) {
        let Some((session, holding)) = self.holding(key, lock_id) else {
            return;
        };
        holding.ends = holding.ends.max(ends);
        self.bounds.note(ends);
        self.send(Command::Ping { session, told });
    }

    pub(super) fn is_held(&mut self, key: AdvisoryKey, lock_id: LockId) -> bool {
        self.holding(key, lock_id).is_some()
    }

    fn holding(&mut self, key: AdvisoryKey, lock_id: LockId) -> Option<(Session, &mut Holding)> {
        let Stage::Held(held) = &mut self.entries.get_mut(&key)?.stage else {
            return None;
        };
        let mut holders = held.holders.iter_mut();
        let holding = holders.find(|holding| holding.lock_id == lock_id)?;
        Some((held.session, holding))
    }

    /// Everybody who has the server's lock together with this hold.
    pub(super) fn sharing(&self, key: AdvisoryKey, lock_id: LockId) -> Vec<LockId> {
        match self.entries.get(&key).map(|entry| &entry.stage) {
            Some(Stage::Held(held)) if held.holders.iter().any(|holding| holding.lock_id == lock_id) => {
                held.holders.iter().map(|holding| holding.lock_id).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Who of this process has it.
    pub(super) fn seen(&self, key: AdvisoryKey) -> Option<Box<HeldLock>> {
        match &self.entries.get(&key)?.stage {
            Stage::Held(held) => held.seen(),
            Stage::Idle | Stage::Asking { .. } | Stage::Refused | Stage::Yielding { .. } => None,
        }
    }

    /// What the chaser that `me` wakes does next.
    pub(super) fn chase(&mut self, key: AdvisoryKey, me: &Arc<Notify>) -> Chase {
        let Some(entry) = self.entries.get_mut(&key) else {
            return Chase::End;
        };
        if !entry
            .chaser
            .as_ref()
            .is_some_and(|chaser| Arc::ptr_eq(chaser, me))
        {
            return Chase::End;
        }
        match entry.stage {
            Stage::Asking { .. } => Chase::Asked,
            Stage::Refused => Chase::Refused,
            Stage::Yielding { until, .. } => Chase::Yielding {
                until,
                awaited: !entry.queue.is_empty(),
            },
            Stage::Idle | Stage::Held(_) => Chase::End,
        }
    }

    /// It is time to ask again: another process has had its turn, or may have.
    pub(super) fn ask_again(&mut self, key: AdvisoryKey) {
        let waits = self
            .entries
            .get(&key)
            .is_some_and(|entry| matches!(entry.stage, Stage::Refused | Stage::Yielding { .. }));
        if waits {
            self.ask(key);
        }
    }
}

impl Entry {
    fn start_chaser(&mut self) -> Option<Arc<Notify>> {
        match &self.chaser {
            Some(chaser) => {
                chaser.notify_one();
                None
            }
            None => {
                let chaser = Arc::new(Notify::new());
                self.chaser = Some(Arc::clone(&chaser));
                Some(chaser)
            }
        }
    }
}

/// Takes the single attempts that `which` picks out of the queue.
fn take_tries(queue: &mut VecDeque<Waiter>, which: impl Fn(&Waiter) -> bool) -> Vec<Waiter> {
    let taken = |waiter: &Waiter| waiter.patience == Patience::Try && which(waiter);
    if !queue.iter().any(taken) {
        return Vec::new();
    }
    let (tries, rest) = std::mem::take(queue).into_iter().partition(taken);
    *queue = rest;
    tries.into()
}

#[cfg(test)]
mod tests;
