//! [`PgSessionLock`]: advisory locks that live as long as a connection that many of them share.

mod bounds;
mod budget;
mod chaser;
mod connection;
pub(crate) mod force;
mod table;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{
    AcquireError, Contention, DistributedLock, ExtendError, GuardParts, HeldLock, LockGuard, LockId,
    LockName, LockRequest, MonotonicClock, ReleaseError, Released, ResumeError, Ttl, Unavailable,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::Instrument;

use self::bounds::Bounds;
use self::budget::Budget;
use self::table::{Command, GivenUp, Left, Patience, Session, Table, Unlocked, Verdict, Waiter};
use crate::advisory::{AdvisoryKey, holder};
use crate::clock::Boottime;
use crate::connect::ConnectOptions;
use crate::error::chain;
use crate::holds::{Holds, Scope};
use crate::keeper::Keeper;
use crate::observe;
use crate::pool::ANSWER;
use crate::process::Process;
use crate::signals::Signals;
use crate::waiting::LAST_ATTEMPT;

/// How many lock sessions a process has.
const SESSIONS: usize = 2;
/// How long it may take to find out who has a lock of another process. An answer without a name is better than
/// none.
const FIND: Duration = Duration::from_secs(1);

/// A lock that lives as long as a database session: shared or exclusive, without a lease.
///
/// All session locks of a process live in two connections, opened when they are first needed and used for nothing
/// else. A guard has no `expires_at` and no fencing token, `ttl` has no effect, and a hold cannot be resumed. It
/// ends when the guard is released or dropped, at `max_hold`, which [`extend`](DistributedLock::extend) moves, or
/// when its connection ends: then every guard on that connection is lost and told at once. The server ends the
/// connection of a process that was stopped after 10 seconds.
///
/// Within one process those who wait for a name get it in order, handed from one to the next without asking the
/// server, at most 16 times in a row and only while no other process is known to wait. Waiting holds no connection
/// and nothing of the server.
///
/// A session lock is no protection against a holder that goes on after its connection ended. Work whose effect must
/// never overlap belongs into a fenced transaction.
///
/// Behind a transaction pooler it is refused as [`AcquireError::Unavailable`], and so is a lock beyond
/// [`Findings::lock_budget`](crate::Findings::lock_budget).
#[derive(Clone, Debug)]
pub struct PgSessionLock {
    process: Arc<Process>,
    key_of: fn(&LockName) -> AdvisoryKey,
}

/// The lock sessions of one process.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    sessions: [Arc<LockSession>; SESSIONS],
}

/// One lock session.
#[derive(Debug)]
struct LockSession {
    table: Mutex<Table>,
    holds: Holds,
    signals: Signals,
}

/// The number under which a key is signalled. It is that of the name unless the caller maps names otherwise.
fn signal(key: AdvisoryKey) -> i64 {
    key.as_lock_table_columns().0
}

impl Sessions {
    /// Starts the tasks on the keeper's thread; none connects yet.
    pub(crate) fn start(
        keeper: &Keeper,
        options: &ConnectOptions,
        lock_budget: u32,
        holds: &Holds,
        signals: &Signals,
    ) -> Self {
        let budget = Budget::new(lock_budget);
        let bounds = Arc::new(Bounds::new());
        let sessions = [(); SESSIONS].map(|()| {
            let (commands, inbox) = mpsc::unbounded_channel::<Command>();
            let session = Arc::new(LockSession {
                table: Mutex::new(Table::new(commands, Arc::clone(&budget), Arc::clone(&bounds))),
                holds: holds.clone(),
                signals: signals.clone(),
            });
            keeper.spawn(connection::run(Arc::clone(&session), options.clone(), inbox));
            session
        });
        keeper.spawn(end_at_bounds(sessions.clone(), bounds));
        let sessions = Self { sessions };
        keeper.spawn(force::give_up_when_asked(
            sessions.clone(),
            holds.clone(),
            signals.asked_to_release(),
        ));
        sessions
    }

    /// A key always has the same lock session, so that its unlock comes before its next lock.
    fn of(&self, key: AdvisoryKey) -> &Arc<LockSession> {
        // Keys of other programs may be small numbers.
        let spread = signal(key).cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.sessions[(spread >> 32) as usize % SESSIONS]
    }
}

/// Ends each hold at its longest time.
async fn end_at_bounds(sessions: [Arc<LockSession>; SESSIONS], bounds: Arc<Bounds>) {
    loop {
        bounds.reached().await;
        for session in &sessions {
            let (over, next) = session.table().overdue(Boottime.now());
            if let Some(next) = next {
                bounds.note(next);
            }
            for (key, lock_id) in over {
                // Told before anybody else can have it.
                session.holds.lose(lock_id);
                session.leave(key, lock_id, None);
            }
        }
    }
}

impl LockSession {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self, key: AdvisoryKey) -> impl Fn() -> bool {
        move || self.signals.is_wanted(signal(key))
    }

    /// Ends a hold. Never blocks, and works in any thread.
    fn leave(&self, key: AdvisoryKey, lock_id: LockId, told: Option<oneshot::Sender<Unlocked>>) -> Left {
        self.table().leave(key, lock_id, self.wanted(key), told)
    }

    /// The session has ended: whoever holds by it is told.
    fn lose(&self, ended: Session, cause: &Unavailable) {
        let lost = self.table().session_ended(ended);
        tracing::warn!(
            error = chain(cause),
            locks = lost.len(),
            "a lock session has ended; it is replaced"
        );
        for (_, lock_id) in &lost {
            self.holds.lose(*lock_id);
        }
        for (key, _) in lost {
            self.signals.freed(signal(key));
        }
    }

    fn close(&self, cause: &Unavailable) {
        let lost = self.table().close(cause);
        for lock_id in lost {
            self.holds.lose(lock_id);
        }
    }
}

/// A place in the queue of a key, and then what it got. Dropped before that is taken, it is given back.
struct Place {
    session: Arc<LockSession>,
    key: AdvisoryKey,
    lock_id: LockId,
    taken: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.taken {
            let wanted = self.session.wanted(self.key);
            self.session.table().withdraw(self.key, self.lock_id, wanted);
        }
    }
}

/// How an attempt ended that got no lock.
enum Refusal {
    Contended(Contention),
    Failed(AcquireError),
}

impl From<AcquireError> for Refusal {
    fn from(error: AcquireError) -> Self {
        Self::Failed(error)
    }
}

impl PgSessionLock {
    pub(crate) fn new(process: Arc<Process>) -> Self {
        Self {
            process,
            key_of: AdvisoryKey::of,
        }
    }

    /// The same locks under other keys, for fleets where other programs hold locks on these names already; see
    /// [`compat`](crate::advisory::compat).
    ///
    /// All who use a name must agree on its key. Two names of one key exclude each other.
    ///
    /// ```
    /// # fn example(database: &leasehold_storage::Database) {
    /// use leasehold_storage::advisory::compat;
    ///
    /// let locks = database
    ///     .session_locks()
    ///     .keyed_by(|name| compat::xxh64_pair(["entelix:lock"].into_iter().chain(name.parts())));
    /// # drop(locks);
    /// # }
    /// ```
    #[must_use]
    pub fn keyed_by(mut self, key_of: fn(&LockName) -> AdvisoryKey) -> Self {
        self.key_of = key_of;
        self
    }

    /// One attempt, or with `wait` as many as fit into it.
    async fn obtain(&self, request: &LockRequest, wait: Option<Duration>) -> Result<LockGuard, Refusal> {
        request.validate().map_err(AcquireError::Invalid)?;
        self.check_pooler().map_err(AcquireError::Unavailable)?;
        let name = request.name();
        let key = (self.key_of)(name);
        let session = self.process.sessions.of(key);
        let lock_id = LockId::new();
        let (told, mut verdict) = oneshot::channel();
        let mut place = Place {
            session: Arc::clone(session),
            key,
            lock_id,
            taken: false,
        };
        let waiter = Waiter {
            lock_id,
            name: name.clone(),
            mode: request.mode(),
            holder: Arc::new(request.holder().clone()),
            max_hold: request.max_hold(),
            patience: match wait {
                None | Some(Duration::ZERO) => Patience::Try,
                Some(_) => Patience::Wait,
            },
            verdict: told,
        };
        session.table().join(key, waiter, session.wanted(key));
        let answer = match timeout(wait.unwrap_or(ANSWER), &mut verdict).await {
            Ok(answer) => answer,
            Err(_) => {
                let given_up = session.table().give_up(key, lock_id, session.wanted(key));
                match given_up {
                    GivenUp::Refused(held) => Ok(Verdict::Refused(held)),
                    GivenUp::Pending => match timeout(LAST_ATTEMPT, &mut verdict).await {
                        Ok(answer) => answer,
                        // What it still comes to is given back with the place.
                        Err(_) => {
                            let cause = Unavailable::new("the lock session did not answer in time");
                            return Err(Refusal::Failed(outcome_unknown(lock_id, cause)));
                        }
                    },
                }
            }
        };
        place.taken = true;
        match answer {
            Ok(Verdict::Granted {
                acquired_at,
                backend_pid,
            }) => Ok(self.guard(request, key, lock_id, acquired_at, backend_pid)?),
            Ok(Verdict::Refused(held)) => Err(Refusal::Contended(self.contention(key, name, held).await)),
            Ok(Verdict::Failed(failure)) if failure.sent => {
                Err(Refusal::Failed(outcome_unknown(lock_id, failure.cause)))
            }
            Ok(Verdict::Failed(failure)) => Err(Refusal::Failed(AcquireError::Unavailable(failure.cause))),
            Err(_) => {
                let cause = Unavailable::new("the locks of this process are shut down");
                Err(Refusal::Failed(AcquireError::Unavailable(cause)))
            }
        }
    }

    fn check_pooler(&self) -> Result<(), Unavailable> {
        if self.process.findings.pooled {
            return Err(Unavailable::new(
                "a transaction pooler is in between, which gives each statement another session: session locks \
                 need a connection of their own",
            ));
        }
        Ok(())
    }

    fn guard(
        &self,
        request: &LockRequest,
        key: AdvisoryKey,
        lock_id: LockId,
        acquired_at: chrono::DateTime<chrono::Utc>,
        backend_pid: i32,
    ) -> Result<LockGuard, AcquireError> {
        let parts = GuardParts {
            name: request.name().clone(),
            mode: request.mode(),
            lock_id,
            fencing_token: None,
            holder: request.holder().clone(),
            acquired_at,
            expires_at: None,
            trusted_until: None,
            clock: Arc::new(Boottime),
        };
        let process = Arc::clone(&self.process);
        let guard = LockGuard::new(parts, move || {
            process.holds.remove(lock_id);
            process.sessions.of(key).leave(key, lock_id, None);
        });
        let holds = &self.process.holds;
        holds.insert(guard.control(), Scope::Session { key, backend_pid });
        // It may have ended before it could be told.
        if !self.process.sessions.of(key).table().is_held(key, lock_id) {
            holds.remove(lock_id);
            guard.defuse();
            let cause = Unavailable::new("the hold ended before it could be handed out");
            return Err(AcquireError::Unavailable(cause));
        }
        Ok(guard)
    }

    /// Who has it: somebody of this process, or else whoever the server knows.
    async fn contention(&self, key: AdvisoryKey, name: &LockName, held: Option<Box<HeldLock>>) -> Contention {
        let held = match held {
            Some(held) => Some(held),
            None => self.find(key, name).await.unwrap_or_else(|error| {
                tracing::debug!(error = chain(&error), "cannot find out who has a lock");
                None
            }),
        };
        Contention {
            name: name.clone(),
            held: held.map(|held| self.named(held)),
        }
    }

    async fn find(&self, key: AdvisoryKey, name: &LockName) -> Result<Option<Box<HeldLock>>, Unavailable> {
        if let Some(held) = self.process.sessions.of(key).table().seen(key) {
            return Ok(Some(held));
        }
        let found = holder::find(&self.process.pool, key, name, Instant::now() + FIND).await;
        Ok(found?.map(Box::new))
    }

    /// What this process calls itself goes to its own holds.
    fn named(&self, mut held: Box<HeldLock>) -> Box<HeldLock> {
        if let Some(session) = &mut held.session
            && session.application_name.is_none()
        {
            session.application_name = Some(self.process.options.application_name().to_owned());
        }
        held
    }
}

fn outcome_unknown(lock_id: LockId, source: Unavailable) -> AcquireError {
    metrics::counter!("leasehold_outcome_unknown_total").increment(1);
    AcquireError::OutcomeUnknown { lock_id, source }
}

#[async_trait]
impl DistributedLock for PgSessionLock {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        let attempt = async {
            self.obtain(request, None).await.map_err(|refusal| match refusal {
                Refusal::Contended(contention) => AcquireError::Contended(contention),
                Refusal::Failed(error) => error,
            })
        };
        let span = observe::span("try_acquire", "session", request.name());
        observe::acquire("session", attempt).instrument(span).await
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        let attempt = async {
            let start = Instant::now();
            let obtained = self.obtain(request, Some(wait)).await;
            obtained.map_err(|refusal| match refusal {
                Refusal::Contended(contention) => AcquireError::TimedOut {
                    waited: start.elapsed(),
                    contention,
                },
                Refusal::Failed(error) => error,
            })
        };
        let key = || Some((self.key_of)(request.name()));
        let attempt = self
            .process
            .waits
            .while_it_takes(request, "session", key, attempt);
        let span = observe::span("acquire", "session", request.name());
        observe::acquire("session", attempt).instrument(span).await
    }

    /// Finds nothing: a hold ends with the one who has it.
    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        request.validate()?;
        Err(ResumeError::NotHeld { lock_id })
    }

    /// Moves the end that `max_hold` set to `ttl` from now, if that is later, and asks the lock session whether it
    /// is still there.
    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "extend", backend = "session", name = %guard.name()))]
    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        let ttl = Ttl::new(ttl)?.get();
        let lock_id = guard.lock_id();
        let Some(Scope::Session { key, .. }) = self.process.holds.get(lock_id).map(|hold| hold.scope) else {
            return Err(ExtendError::Lost);
        };
        let ends = Boottime.now().plus(ttl);
        let (told, there) = oneshot::channel();
        let session = self.process.sessions.of(key);
        session.table().extend(key, lock_id, ends, told);
        there.await.map_err(|_| ExtendError::Lost)
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        let span = observe::span("release", "session", guard.name());
        async {
            let lock_id = guard.lock_id();
            let holds = &self.process.holds;
            let Some(Scope::Session { key, .. }) = holds.get(lock_id).map(|hold| hold.scope) else {
                // Lost, or of another lock: then it releases itself there.
                drop(guard);
                return Ok(Released::AlreadyGone);
            };
            holds.remove(lock_id);
            let (told, unlocked) = oneshot::channel();
            // From here on it goes on by itself.
            guard.defuse();
            match self.process.sessions.of(key).leave(key, lock_id, Some(told)) {
                Left::NotHeld => Ok(Released::AlreadyGone),
                Left::Kept => Ok(Released::Held),
                Left::Unlocking => match unlocked.await {
                    Ok(Unlocked::Held) => Ok(Released::Held),
                    Ok(Unlocked::AlreadyGone) => Ok(Released::AlreadyGone),
                    Ok(Unlocked::Unanswered(cause)) => Err(ReleaseError::Unavailable(cause)),
                    Err(_) => Err(ReleaseError::Unavailable(Unavailable::new(
                        "the locks of this process are shut down",
                    ))),
                },
            }
        }
        .instrument(span)
        .await
    }

    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "inspect", backend = "session", name = name.to_string()))]
    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        let key = (self.key_of)(name);
        let held = self.find(key, name).await?;
        Ok(held.map(|held| HeldLock {
            name: name.clone(),
            ..*self.named(held)
        }))
    }
}
