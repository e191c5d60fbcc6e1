//! [`PgTransactionLock`]: an advisory lock that lives as long as a transaction.

use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{BigInt, Bool, Integer, Nullable, Text, Timestamptz};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::FutureExt;
use leasehold_domain::{
    AcquireError, Contention, DistributedLock, ExtendError, GuardParts, HeldLock, Invalid, LockGuard, LockId,
    LockMode, LockName, LockRequest, Monotonic, MonotonicClock, ReleaseError, Released, ResumeError, Ttl,
    Unavailable,
};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::Instrument;

use crate::advisory::{AdvisoryKey, holder};
use crate::clock::Boottime;
use crate::error::StorageError;
use crate::holds::{Hold, Scope};
use crate::observe;
use crate::pool::{ANSWER, Checkout};
use crate::process::Process;
use crate::statement::Prepared;
use crate::tenant::{TenantGate, TenantOf, refused_at};
use crate::transaction::{RolledBack, begin, rollback};
use crate::waiting::Attempt;

/// An exclusive lock that a transaction has: what is written in that transaction is written by the only holder,
/// or not at all, whatever happens to the process in between.
///
/// A guard keeps a pooled connection with an open transaction. Its statements run by
/// [`Database::fenced_transaction`](crate::Database::fenced_transaction), whose commit ends the hold; a guard
/// that is released or dropped rolls back. There is no lease: `ttl` has no effect, a crashed process frees the
/// lock as soon as its connection ends. At `max_hold` the guard is lost and what it would commit is refused.
///
/// [`LockMode::Shared`] is refused as [`AcquireError::Invalid`], and a hold cannot be resumed: it ended with its
/// connection.
#[derive(Clone, Debug)]
pub struct PgTransactionLock {
    process: Arc<Process>,
    behind: Option<TenantOf>,
}

/// The transaction of a hold.
pub(crate) struct OpenTransaction {
    slot: Mutex<Slot>,
    /// Told when an extension has given the connection back.
    given_back: Notify,
    pub(crate) backend_pid: i32,
    /// When `max_hold` is over.
    pub(crate) ends: Monotonic,
}

/// A connection with an open transaction, and the id of that.
pub(crate) type Lendable = (Checkout, String);

enum Slot {
    /// Open, and nobody is using it.
    Parked(Box<Lendable>),
    /// With an extension, which soon gives it back.
    Extending,
    /// Lent to the caller's work, or gone with it.
    Lent,
    /// Committed or rolled back: the server has freed the lock.
    Ended,
}

impl OpenTransaction {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends the connection out, once, with the id of its transaction.
    ///
    /// # Cancel safety
    /// Nothing is lent out when the future is dropped.
    pub(crate) async fn take(&self) -> Option<Lendable> {
        self.take_as(Slot::Lent).await
    }

    /// Waits for an extension to end, which has [`ANSWER`] for it.
    async fn take_as(&self, next: Slot) -> Option<Lendable> {
        loop {
            let mut given_back = pin!(self.given_back.notified());
            given_back.as_mut().enable();
            {
                let mut slot = self.slot();
                match std::mem::replace(&mut *slot, Slot::Lent) {
                    Slot::Parked(open) => {
                        *slot = next;
                        return Some(*open);
                    }
                    Slot::Extending => *slot = Slot::Extending,
                    other @ (Slot::Lent | Slot::Ended) => {
                        *slot = other;
                        return None;
                    }
                }
            }
            given_back.await;
        }
    }

    pub(crate) fn set_ended(&self) {
        *self.slot() = Slot::Ended;
    }

    /// Whether it was committed or rolled back, so that the server has freed the lock.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(*self.slot(), Slot::Ended)
    }

    /// Whether its connection is known to have ended while nobody was using it.
    pub(crate) fn is_broken(&self) -> bool {
        match &mut *self.slot() {
            Slot::Parked(open) => open.0.is_broken(),
            Slot::Extending | Slot::Lent | Slot::Ended => false,
        }
    }
}

/// The connection while it is asked whether it lives. However that ends, those who wait for it are told.
struct Extending {
    open: Arc<OpenTransaction>,
    taken: Option<Lendable>,
}

impl Extending {
    /// What does not answer is not given back.
    async fn ask(&mut self) -> bool {
        let Some((checkout, _)) = &mut self.taken else {
            return false;
        };
        let answer = timeout(ANSWER, checkout.conn().batch_execute("SELECT 1")).await;
        let alive = answer.is_ok_and(|answer| answer.is_ok());
        if !alive {
            self.taken = None;
        }
        alive
    }
}

impl Drop for Extending {
    fn drop(&mut self) {
        *self.open.slot() = self
            .taken
            .take()
            .map_or(Slot::Lent, |open| Slot::Parked(Box::new(open)));
        self.open.given_back.notify_waiters();
    }
}

impl fmt::Debug for OpenTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenTransaction")
            .field("backend_pid", &self.backend_pid)
            .finish_non_exhaustive()
    }
}

/// The bound on idleness is the server's own: it ends the session of a process that was stopped.
const TRY_LOCK: &str = "\
SELECT got, now() AS acquired_at, pg_backend_pid() AS backend_pid,
       CASE WHEN got THEN pg_current_xact_id()::text END AS transaction,
       CASE WHEN got THEN set_config('idle_in_transaction_session_timeout', $2, true) END AS bound
FROM (SELECT CASE
          WHEN $3 IS NULL OR pg_try_advisory_xact_lock_shared($3) THEN pg_try_advisory_xact_lock($1)
      END AS got OFFSET 0) AS attempt";

#[derive(QueryableByName)]
struct TryLockRow {
    /// Unknown when the gate before it is closed.
    #[diesel(sql_type = Nullable<Bool>)]
    got: Option<bool>,
    #[diesel(sql_type = Timestamptz)]
    acquired_at: DateTime<Utc>,
    #[diesel(sql_type = Integer)]
    backend_pid: i32,
    #[diesel(sql_type = Nullable<Text>)]
    transaction: Option<String>,
}

async fn try_lock(
    conn: &mut AsyncPgConnection,
    key: i64,
    gate: Option<i64>,
    idle_bound: Duration,
) -> Result<TryLockRow, StorageError> {
    // Postgres takes whole milliseconds up to 2^31 - 1, and 0 would mean no bound.
    let millis = idle_bound.as_millis().clamp(1, i32::MAX as u128);
    let query = diesel::sql_query(TRY_LOCK)
        .bind::<BigInt, _>(key)
        .bind::<Text, _>(format!("{millis}ms"))
        .bind::<Nullable<BigInt>, _>(gate);
    Ok(Prepared(query).one(conn).await?)
}

impl PgTransactionLock {
    pub(crate) fn new(process: Arc<Process>) -> Self {
        Self {
            process,
            behind: None,
        }
    }

    /// The same locks behind the gates of tenants: the transaction of a hold has entered the gate of its name's tenant
    /// before it took the lock, in the same statement. A closed gate is answered as [`AcquireError::TenantConflict`].
    #[must_use]
    pub fn behind_gates(mut self, tenant_of: TenantOf) -> Self {
        self.behind = Some(tenant_of);
        self
    }

    fn check(request: &LockRequest) -> Result<(), Invalid> {
        request.validate()?;
        if request.mode() == LockMode::Shared {
            return Err(Invalid::new(
                "mode",
                "a transaction lock of this kind is exclusive",
            ));
        }
        Ok(())
    }

    async fn attempt(&self, request: &LockRequest, until: Instant) -> Result<Attempt, AcquireError> {
        let name = request.name();
        let tenant = self.behind.and_then(|tenant_of| tenant_of(name));
        let gate = tenant.map(TenantGate::key).transpose()?;
        // What this process holds needs no connection to be refused, but for the question of the gate, which comes first.
        if let Some(hold) = self.process.holds.transaction(name) {
            if let Some(tenant) = tenant
                && let Some(conflict) = TenantGate::new(Arc::clone(&self.process))
                    .conflict(tenant, until)
                    .await
            {
                return Err(conflict.into());
            }
            return Ok(Attempt::Contended(Contention::with(held(&hold)), None));
        }
        let lock_id = LockId::new();
        // Whatever happens in between: the connection is closed, and the server frees the lock.
        let unavailable = |error: StorageError| AcquireError::Unavailable(error.into());
        let (key, _) = AdvisoryKey::of(name).as_lock_table_columns();
        let sent = Instant::now();
        let asked = timeout_at(until, async {
            let mut checkout = begin(self.process.pool.checkout().await?).await?;
            let row = try_lock(checkout.conn(), key, gate, request.max_hold()).await?;
            Ok((checkout, row))
        });
        let asked = asked
            .await
            .unwrap_or_else(|_| Err(StorageError::NoAnswer(sent.elapsed())));
        let (checkout, row) = asked.map_err(unavailable)?;
        let TryLockRow {
            got: Some(true),
            acquired_at,
            backend_pid,
            transaction: Some(transaction),
        } = row
        else {
            rollback(checkout).await;
            if let (None, Some(tenant)) = (row.got, tenant) {
                return Err(refused_at(tenant).into());
            }
            let held = holder::find(&self.process.pool, AdvisoryKey::of(name), name, until)
                .await
                .map_err(unavailable)?;
            return Ok(Attempt::Contended(
                held.map_or_else(|| Contention::unknown(name.clone()), Contention::with),
                None,
            ));
        };
        Ok(Attempt::Acquired(self.guard(
            request,
            lock_id,
            checkout,
            transaction,
            acquired_at,
            backend_pid,
        )))
    }

    fn guard(
        &self,
        request: &LockRequest,
        lock_id: LockId,
        checkout: Checkout,
        transaction: String,
        acquired_at: DateTime<Utc>,
        backend_pid: i32,
    ) -> LockGuard {
        let open = Arc::new(OpenTransaction {
            slot: Mutex::new(Slot::Parked(Box::new((checkout, transaction)))),
            given_back: Notify::new(),
            backend_pid,
            ends: Boottime.now().plus(request.max_hold()),
        });
        let parts = GuardParts {
            name: request.name().clone(),
            mode: LockMode::Exclusive,
            lock_id,
            fencing_token: None,
            holder: request.holder().clone(),
            acquired_at,
            expires_at: None,
            trusted_until: None,
            clock: Arc::new(Boottime),
        };
        let (process, dropped, name) = (
            Arc::clone(&self.process),
            Arc::clone(&open),
            request.name().clone(),
        );
        let guard = LockGuard::new(parts, move || {
            process.holds.remove(lock_id);
            let keeper = process.keeper.clone();
            // A connection may only be dropped in a runtime, and the guard may be dropped anywhere.
            keeper.finish(async move {
                if let Some((checkout, _)) = dropped.take().await {
                    rollback(checkout).await;
                }
                process.freed(&name);
            });
        });
        self.process
            .holds
            .insert(guard.control(), Scope::Transaction(Arc::clone(&open)));
        self.process.watch.begin();
        guard
    }

    /// Takes a lock away from its holder by ending the holder's database session, which rolls its transaction
    /// back, and records who did it and why in `leasehold.lock_audit`.
    ///
    /// Answers the hold that was ended, or `None` when no transaction held the lock: a session lock of the same key,
    /// whose session has other locks as well, is left alone.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked, or does not let this role end that session.
    ///
    /// # Cancel safety
    /// The lock may or may not have been taken away.
    pub async fn force_release(
        &self,
        name: &LockName,
        by: &str,
        reason: &str,
    ) -> Result<Option<HeldLock>, Unavailable> {
        let Some(held) = self.inspect(name).await? else {
            return Ok(None);
        };
        let Some(session) = &held.session else {
            return Ok(None);
        };
        let (bits, _) = AdvisoryKey::of(name).as_lock_table_columns();
        let holder = held.holder.clone();
        let ended: bool = self
            .process
            .pool
            .ask_until(Instant::now() + ANSWER + TERMINATION, async |conn| {
                let query = diesel::sql_query(TERMINATE)
                    .bind::<Integer, _>(session.backend_pid)
                    .bind::<BigInt, _>(bits)
                    .bind::<Text, _>(name.encoded())
                    .bind::<Text, _>(by)
                    .bind::<Text, _>(reason)
                    .bind::<Nullable<diesel::sql_types::Uuid>, _>(held.lock_id.map(LockId::as_uuid))
                    .bind::<Nullable<Text>, _>(holder.as_ref().map(|holder| holder.operation.clone()))
                    .bind::<Nullable<Text>, _>(holder.as_ref().map(|holder| holder.owner.clone()))
                    .bind::<Nullable<Timestamptz>, _>(held.acquired_at);
                let row: EndedRow = Prepared(query).one(conn).await?;
                Ok::<_, StorageError>(row.ended)
            })
            .await?;
        if !ended {
            return Ok(None);
        }
        if let Some(lock_id) = held.lock_id {
            self.process.holds.lose(lock_id);
        }
        self.process.freed(name);
        Ok(Some(held))
    }
}

/// How long the statement waits for the end of the session.
const TERMINATION: Duration = Duration::from_secs(5);

/// Looks once more that the session still has the lock: it may serve somebody else by now. A transaction that has one of
/// ours has an id, and with that a lock on its id, which the session of a session lock never has.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
const TERMINATE: &str = "\
WITH ended AS MATERIALIZED (
    SELECT pg_terminate_backend(l.pid, 5000) AS done FROM pg_locks AS l
    WHERE l.pid = $1 AND l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (l.classid::bigint << 32) | l.objid::bigint = $2
      AND EXISTS (SELECT FROM pg_locks AS t
                  WHERE t.pid = l.pid AND t.locktype = 'transactionid' AND t.mode = 'ExclusiveLock' AND t.granted)
), audited AS (
    INSERT INTO leasehold.lock_audit (name, released_by, reason, lock_id, operation, locked_by, acquired_at)
    SELECT $3, $4, $5, $6, $7, $8, $9 FROM ended WHERE done
)
SELECT coalesce((SELECT bool_or(done) FROM ended), false) AS ended";

#[derive(QueryableByName)]
struct EndedRow {
    #[diesel(sql_type = Bool)]
    ended: bool,
}

/// A hold of this process as others see it.
fn held(hold: &Hold) -> HeldLock {
    let parts = hold.control.parts();
    let session = match &hold.scope {
        Scope::Transaction(open) => Some(leasehold_domain::HolderSession {
            backend_pid: open.backend_pid,
            application_name: None,
            client_address: None,
        }),
        Scope::Lease(_) | Scope::Session { .. } => None,
    };
    HeldLock {
        lock_id: Some(parts.lock_id),
        holder: Some(parts.holder.clone()),
        acquired_at: Some(parts.acquired_at),
        session,
        ..HeldLock::unknown(parts.name.clone(), parts.mode)
    }
}

#[async_trait]
impl DistributedLock for PgTransactionLock {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        let attempt = async {
            Self::check(request)?;
            match self.attempt(request, Instant::now() + ANSWER).await? {
                Attempt::Acquired(guard) => Ok(guard),
                Attempt::Contended(contention, _) => Err(AcquireError::Contended(contention)),
            }
        };
        let span = observe::span("try_acquire", "transaction", request.name());
        observe::acquire("transaction", attempt).instrument(span).await
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        let attempt = async {
            Self::check(request)?;
            let process = &self.process;
            let attempt = |until| self.attempt(request, until).boxed();
            process
                .transaction_queues
                .acquire(request.name(), wait, &process.signals, attempt)
                .await
        };
        let key = || Some(AdvisoryKey::of(request.name()));
        let attempt = self
            .process
            .waits
            .while_it_takes(request, "transaction", key, attempt);
        let span = observe::span("acquire", "transaction", request.name());
        observe::acquire("transaction", attempt).instrument(span).await
    }

    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        Self::check(request)?;
        Err(ResumeError::NotHeld { lock_id })
    }

    /// Moves nothing, because nothing expires: it asks the server whether the transaction is still open. While
    /// the caller's work uses the transaction that cannot be asked, which is told as [`Unavailable`].
    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        let span = observe::span("extend", "transaction", guard.name());
        async {
            Ttl::new(ttl)?;
            let lock_id = guard.lock_id();
            let Some(Hold {
                scope: Scope::Transaction(open),
                ..
            }) = self.process.holds.get(lock_id).filter(|_| !guard.is_lost())
            else {
                return Err(ExtendError::Lost);
            };
            let Some(taken) = open.take_as(Slot::Extending).await else {
                let busy = Unavailable::new("the transaction is in use");
                return Err(if open.has_ended() {
                    ExtendError::Lost
                } else {
                    ExtendError::Unavailable(busy)
                });
            };
            let mut extending = Extending {
                open,
                taken: Some(taken),
            };
            // In a task, so that a caller who goes away does not take the connection, and so the lock, along.
            let (process, name) = (Arc::clone(&self.process), guard.name().clone());
            let asked = self.process.keeper.spawn(async move {
                let alive = extending.ask().await;
                drop(extending);
                if !alive {
                    process.holds.lose(lock_id);
                    process.freed(&name);
                }
                alive
            });
            if asked.await.unwrap_or(false) {
                Ok(())
            } else {
                Err(ExtendError::Lost)
            }
        }
        .instrument(span)
        .await
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        let span = observe::span("release", "transaction", guard.name());
        async {
            let Some(Hold {
                scope: Scope::Transaction(open),
                ..
            }) = self.process.holds.get(guard.lock_id())
            else {
                // Lost, or another kind of lock, which its guard knows how to end.
                drop(guard);
                return Ok(Released::AlreadyGone);
            };
            let ended = match open.take().await {
                // Dropped in the middle of this the connection closes, which frees the lock as well.
                Some((checkout, _)) => rollback(checkout).await,
                None if open.has_ended() => RolledBack::Done,
                None => RolledBack::Gone,
            };
            let lost = guard.is_lost();
            if ended == RolledBack::Gone {
                self.process.holds.lose(guard.lock_id());
            } else {
                self.process.holds.remove(guard.lock_id());
            }
            let name = guard.name().clone();
            guard.defuse();
            self.process.freed(&name);
            match ended {
                RolledBack::Done if !lost => Ok(Released::Held),
                RolledBack::Done | RolledBack::Gone => Ok(Released::AlreadyGone),
                RolledBack::Unanswered => Err(StorageError::NoAnswer(ANSWER).into()),
            }
        }
        .instrument(span)
        .await
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        let span = observe::span("inspect", "transaction", name);
        async {
            if let Some(hold) = self.process.holds.transaction(name) {
                return Ok(Some(held(&hold)));
            }
            let until = Instant::now() + ANSWER;
            Ok(holder::find(&self.process.pool, AdvisoryKey::of(name), name, until).await?)
        }
        .instrument(span)
        .await
    }
}
