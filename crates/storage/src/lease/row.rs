//! [`RowLease`]: the lock whose holds are rows.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use diesel::sql_types::{BigInt, Bool, Double, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel::{OptionalExtension, QueryableByName};
use diesel_async::AsyncPgConnection;
use futures_util::FutureExt;
use leasehold_domain::{
    AcquireError, Contention, DistributedLock, Durability, ExtendError, FencingToken, GuardParts, HeldLock,
    Invalid, LockGuard, LockId, LockMode, LockName, LockRequest, MonotonicClock, ReleaseError, Released,
    ResumeError, Ttl, Unavailable,
};
use serde_json::Value;
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use crate::advisory::holder::HolderColumns;
use crate::clock::Boottime;
use crate::error::StorageError;
use crate::holds::Scope;
use crate::lease::reaper::Lease;
use crate::lease::table::LeaseTable;
use crate::lease::{LeaseHold, next_renewal, seconds, trusted_until};
use crate::observe;
use crate::pool::ANSWER;
use crate::process::Process;
use crate::signals;
use crate::statement::Prepared;
use crate::waiting::Attempt;

/// How long the removal of unused rows may take: there may be very many.
pub(crate) const SWEEP: Duration = Duration::from_secs(60);

/// A lock on names of its own, kept in `leasehold.leases`. Rows are made as names are first used.
///
/// It is a [`RowLease`] on the library's own table.
pub type PgLeaseLock = RowLease;

/// A lock whose holds are rows: exclusive, with a `ttl`, a fencing token, and a heartbeat while the guard lives.
///
/// Acquiring is one statement and never waits for a row lock. The hold survives the loss of the connection and a
/// restart of the database; it ends when it is released, taken away, or not renewed for its `ttl`. A lease alone
/// is not a mutex: a holder that was stopped for longer than its `ttl` may go on without knowing. A fenced
/// transaction refuses what it then tries to commit, and a [fencing token](LockGuard::fencing_token) lets other
/// resources refuse it.
///
/// In a table of the caller, a name whose row does not exist answers [`AcquireError::NotFound`].
/// [`LockMode::Shared`] is refused as [`AcquireError::Invalid`].
#[derive(Clone, Debug)]
pub struct RowLease {
    process: Arc<Process>,
    table: Arc<LeaseTable>,
}

#[derive(QueryableByName)]
struct AcquireRow {
    #[diesel(sql_type = Nullable<Timestamptz>)]
    given_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    given_until: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<BigInt>)]
    given_token: Option<i64>,
    /// Null when there was no row.
    #[diesel(sql_type = Nullable<Bool>)]
    live: Option<bool>,
    #[diesel(sql_type = Nullable<Double>)]
    ends_in: Option<f64>,
    #[diesel(embed)]
    holder: HolderRow,
}

#[derive(QueryableByName)]
struct HolderRow {
    #[diesel(sql_type = Nullable<SqlUuid>)]
    lock_id: Option<Uuid>,
    #[diesel(embed)]
    holder: HolderColumns,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    acquired_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    expires_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<BigInt>)]
    fencing_token: Option<i64>,
}

#[derive(QueryableByName)]
struct ExtendRow {
    #[diesel(sql_type = Timestamptz)]
    expires_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    acquired_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    fencing_token: i64,
    #[diesel(sql_type = Double)]
    age: f64,
}

#[derive(QueryableByName)]
struct ReleaseRow {
    #[diesel(sql_type = Bool)]
    live: bool,
}

impl HolderRow {
    fn into_held(self, name: &LockName) -> HeldLock {
        HeldLock {
            lock_id: self.lock_id.map(LockId::from),
            holder: self.holder.into_holder(),
            acquired_at: self.acquired_at,
            expires_at: self.expires_at,
            fencing_token: self.fencing_token.map(FencingToken::new),
            ..HeldLock::unknown(name.clone(), LockMode::Exclusive)
        }
    }
}

impl RowLease {
    pub(crate) fn new(process: Arc<Process>, table: Arc<LeaseTable>) -> Self {
        Self { process, table }
    }

    fn checked_keys(&self, request: &LockRequest) -> Result<Vec<String>, Invalid> {
        request.validate()?;
        if request.mode() == LockMode::Shared {
            return Err(Invalid::new("mode", "a lease is exclusive"));
        }
        self.table.key_values(request.name())
    }

    /// One attempt, which looks a second time when the row was locked or taken in between.
    async fn attempt(
        &self,
        request: &LockRequest,
        keys: &[String],
        until: Instant,
    ) -> Result<Attempt, AcquireError> {
        let lock_id = LockId::new();
        let mut unanswered = Unanswered {
            lease: self,
            name: request.name(),
            keys,
            lock_id,
            armed: true,
        };
        let (mut looked_before, mut in_doubt) = (false, false);
        loop {
            unanswered.armed = true;
            let sent = Boottime.now();
            let answered = self.send_acquire(request, keys, lock_id, until).await;
            // Of two requests only the second was answered: the first may have been granted, or may still be.
            in_doubt |= answered.as_ref().is_ok_and(|(_, sent_twice)| *sent_twice);
            unanswered.armed = in_doubt;
            // Either nothing is held, or `resume` or the end of the lease settles it.
            let (row, _) = answered.map_err(|error| error.into_acquire(lock_id))?;
            if let (Some(at), Some(until), Some(token)) = (row.given_at, row.given_until, row.given_token) {
                unanswered.armed = false;
                let token = (request.durability() == Durability::Durable).then_some(FencingToken::new(token));
                let ends = sent.plus(request.max_hold());
                let guard = self.guard(request, keys, lock_id, sent, ends, token, (at, until));
                if guard.is_lost() {
                    // Dropping it gives it back.
                    let late = Unavailable::new("the lock was granted too late to be trusted");
                    return Err(AcquireError::Unavailable(late));
                }
                return Ok(Attempt::Acquired(guard));
            }
            match row.live {
                None if !self.table.own => {
                    return Err(AcquireError::NotFound {
                        name: request.name().clone(),
                    });
                }
                Some(true) => {
                    let ends_in = row
                        .ends_in
                        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                    return Ok(Attempt::Contended(
                        Contention::with(row.holder.into_held(request.name())),
                        ends_in,
                    ));
                }
                _ if looked_before => {
                    return Ok(Attempt::Contended(
                        Contention::unknown(request.name().clone()),
                        None,
                    ));
                }
                _ => looked_before = true,
            }
        }
    }

    /// Sends the acquire, and once more under the same id when the connection turned out to be dead: the same id
    /// is granted again if the first was. Answers also whether it was sent twice.
    async fn send_acquire(
        &self,
        request: &LockRequest,
        keys: &[String],
        lock_id: LockId,
        until: Instant,
    ) -> Result<(AcquireRow, bool), StorageError> {
        let sql = match request.durability() {
            Durability::Durable => &self.table.acquire,
            Durability::WithWrite => &self.table.acquire_with_write,
        };
        let holder = request.holder();
        let mut first = None;
        loop {
            let mut query = diesel::sql_query(sql)
                .into_boxed::<diesel::pg::Pg>()
                .bind::<SqlUuid, _>(lock_id.as_uuid())
                .bind::<Text, _>(&holder.operation)
                .bind::<Text, _>(&holder.owner)
                .bind::<Double, _>(seconds(request.ttl()));
            for key in keys {
                query = query.bind::<Text, _>(key);
            }
            if self.table.own {
                query = query
                    .bind::<Text, _>(&holder.instance)
                    .bind::<Jsonb, _>(Value::Object(holder.metadata.clone()))
                    .bind::<BigInt, _>(first_row_key(request.name()));
            }
            let ask = async |conn: &mut AsyncPgConnection| match Prepared(query).one(conn).await {
                Ok(row) => Ok::<AcquireRow, StorageError>(row),
                Err(error) => Err(StorageError::of_connection(conn, error).await),
            };
            match (self.process.pool.ask_until(until, ask).await, first.take()) {
                (Ok(row), first) => return Ok((row, first.is_some())),
                // Silence is answered by silence: another request would wait as long.
                (Err(error @ StorageError::NoAnswer(_)), None) => return Err(error),
                (Err(error), None) if error.is_outcome_unknown() => first = Some(error),
                (Err(error), None) => return Err(error),
                // The second was not even sent, or was refused: what became of the first is still not known.
                (Err(_), Some(first)) => return Err(first),
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the facts of a grant, each from another place"
    )]
    pub(crate) fn guard(
        &self,
        request: &LockRequest,
        keys: &[String],
        lock_id: LockId,
        sent: leasehold_domain::Monotonic,
        ends: leasehold_domain::Monotonic,
        fencing_token: Option<FencingToken>,
        (acquired_at, expires_at): (DateTime<Utc>, DateTime<Utc>),
    ) -> LockGuard {
        let schedule = next_renewal(sent, request.ttl());
        let hold = Arc::new(LeaseHold::new(
            Arc::clone(&self.table),
            keys.to_vec(),
            request.durability() == Durability::Durable,
            request.max_hold(),
            ends,
            schedule,
        ));
        let parts = GuardParts {
            name: request.name().clone(),
            mode: LockMode::Exclusive,
            lock_id,
            fencing_token,
            holder: request.holder().clone(),
            acquired_at,
            expires_at: Some(expires_at),
            trusted_until: Some(trusted_until(sent, request.ttl(), ends)),
            clock: Arc::new(Boottime),
        };
        let (process, dropped, name) = (
            Arc::clone(&self.process),
            Arc::clone(&hold),
            request.name().clone(),
        );
        let guard = LockGuard::new(parts, move || {
            process.holds.remove(lock_id);
            if !dropped.has_ended() {
                let (table, keys) = (Arc::clone(&dropped.table), dropped.keys.clone());
                process.reaper.release(Lease {
                    table,
                    keys,
                    name,
                    lock_id,
                });
            }
        });
        self.process.holds.insert(guard.control(), Scope::Lease(hold));
        self.process.renewer.expect(schedule.due);
        guard
    }

    async fn send_extend(
        &self,
        table: &LeaseTable,
        keys: &[String],
        lock_id: LockId,
        ttl: Duration,
        max_hold: Duration,
    ) -> Result<Option<ExtendRow>, StorageError> {
        let mut query = diesel::sql_query(&table.extend)
            .into_boxed::<diesel::pg::Pg>()
            .bind::<SqlUuid, _>(lock_id.as_uuid())
            .bind::<Double, _>(seconds(ttl))
            .bind::<Double, _>(seconds(max_hold));
        for key in keys {
            query = query.bind::<Text, _>(key);
        }
        self.process
            .pool
            .ask(async |conn| Ok(Prepared(query).one(conn).await.optional()?))
            .await
    }

    async fn send_release(
        &self,
        table: &LeaseTable,
        keys: &[String],
        lock_id: LockId,
    ) -> Result<Released, StorageError> {
        let mut query = diesel::sql_query(&table.release)
            .into_boxed::<diesel::pg::Pg>()
            .bind::<SqlUuid, _>(lock_id.as_uuid());
        for key in keys {
            query = query.bind::<Text, _>(key);
        }
        let row: Option<ReleaseRow> = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await.optional()?))
            .await?;
        Ok(match row {
            Some(ReleaseRow { live: true }) => Released::Held,
            _ => Released::AlreadyGone,
        })
    }

    /// Takes a lock away from its holder: the hold ends, the token is raised, and who did it and why is recorded
    /// in `leasehold.lock_audit`. The former holder learns of it at its next beat at the latest, and cannot
    /// commit a fenced transaction any more.
    ///
    /// Answers the hold that was ended, or `None` when nobody held the lock.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked; the lock is then as it was, or released.
    ///
    /// # Cancel safety
    /// The lock may or may not have been taken away.
    pub async fn force_release(
        &self,
        name: &LockName,
        by: &str,
        reason: &str,
    ) -> Result<Option<HeldLock>, Unavailable> {
        let Ok(keys) = self.table.key_values(name) else {
            return Ok(None);
        };
        let mut query = diesel::sql_query(&self.table.force_release)
            .into_boxed::<diesel::pg::Pg>()
            .bind::<Text, _>(name.encoded())
            .bind::<Text, _>(by)
            .bind::<Text, _>(reason);
        for key in &keys {
            query = query.bind::<Text, _>(key);
        }
        let row: Option<HolderRow> = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await.optional()?))
            .await?;
        let ended = row.map(|row| row.into_held(name));
        if let Some(lock_id) = ended.as_ref().and_then(|held| held.lock_id) {
            // A holder in this process need not wait for its next beat.
            self.process.holds.lose(lock_id);
            self.process.freed(name);
        }
        Ok(ended)
    }

    /// Removes rows of names that nobody used for `unused_for`, and answers how many. Only for the library's own
    /// table: rows of a caller's table are the caller's.
    ///
    /// The floor of tokens is raised in the same transaction, so a name that comes back goes on above its old
    /// tokens.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// All of it is done or nothing.
    pub async fn remove_unused(&self, unused_for: Duration) -> Result<u64, Unavailable> {
        if !self.table.own {
            return Ok(0);
        }
        let query = diesel::sql_query(REMOVE_UNUSED).bind::<Double, _>(seconds(unused_for));
        let row: CountRow = self
            .process
            .pool
            .ask_until(Instant::now() + SWEEP, async |conn| {
                Ok::<_, StorageError>(Prepared(query).one(conn).await?)
            })
            .await?;
        Ok(u64::try_from(row.removed).unwrap_or(0))
    }

    async fn contention_free_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        let keys = self.checked_keys(request)?;
        match self.attempt(request, &keys, Instant::now() + ANSWER).await? {
            Attempt::Acquired(guard) => Ok(guard),
            Attempt::Contended(contention, _) => Err(AcquireError::Contended(contention)),
        }
    }

    async fn waiting_acquire(
        &self,
        request: &LockRequest,
        wait: Duration,
    ) -> Result<LockGuard, AcquireError> {
        let keys = self.checked_keys(request)?;
        let process = &self.process;
        let attempt = |until| self.attempt(request, &keys, until).boxed();
        process
            .queues
            .acquire(request.name(), wait, &process.signals, attempt)
            .await
    }
}

#[derive(QueryableByName)]
struct CountRow {
    #[diesel(sql_type = BigInt)]
    removed: i64,
}

/// One statement is one snapshot: whoever sees the rows gone also sees the floor raised.
const REMOVE_UNUSED: &str = "\
WITH removed AS (
    DELETE FROM leasehold.leases
    WHERE used_at < clock_timestamp() - $1 * interval '1 second'
      AND (expires_at IS NULL OR expires_at < clock_timestamp() - $1 * interval '1 second')
    RETURNING fencing_token
), raised AS (
    UPDATE leasehold.token_floor SET floor = highest.token
    FROM (SELECT max(fencing_token) AS token FROM removed) AS highest
    WHERE floor < highest.token
)
SELECT count(*) AS removed FROM removed";

/// The advisory key that lets only one make the first row of a name. It is not the key of the name itself, which
/// session and transaction locks take.
fn first_row_key(name: &LockName) -> i64 {
    signals::key(name) ^ 0x6c65_6173_655f_726f
}

/// An acquire whose answer has not been seen. Dropped while armed, it gives back what may have been granted.
struct Unanswered<'a> {
    lease: &'a RowLease,
    name: &'a LockName,
    keys: &'a [String],
    lock_id: LockId,
    armed: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.lease.process.reaper.release_unanswered(Lease {
                table: Arc::clone(&self.lease.table),
                keys: self.keys.to_vec(),
                name: self.name.clone(),
                lock_id: self.lock_id,
            });
        }
    }
}

#[async_trait]
impl DistributedLock for RowLease {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        let span = observe::span("try_acquire", "lease", request.name());
        observe::acquire("lease", self.contention_free_acquire(request))
            .instrument(span)
            .await
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        let span = observe::span("acquire", "lease", request.name());
        let attempt = self.waiting_acquire(request, wait);
        let scope = if self.table.own { "lease" } else { "row_lease" };
        let attempt = self
            .process
            .waits
            .while_it_takes(request, scope, || None, attempt);
        observe::acquire("lease", attempt).instrument(span).await
    }

    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        let span = observe::span("resume", "lease", request.name());
        async {
            let keys = self.checked_keys(request)?;
            // Two guards of one hold would each believe to be the only one.
            let resuming = self.process.holds.resume(lock_id);
            let _resuming = resuming.ok_or(ResumeError::NotHeld { lock_id })?;
            let sent = Boottime.now();
            let row = self
                .send_extend(&self.table, &keys, lock_id, request.ttl(), request.max_hold())
                .await?;
            let row = row.ok_or(ResumeError::NotHeld { lock_id })?;
            let age = Duration::try_from_secs_f64(row.age).unwrap_or_default();
            let ends = sent.plus(request.max_hold().saturating_sub(age));
            let token =
                (request.durability() == Durability::Durable).then_some(FencingToken::new(row.fencing_token));
            Ok(self.guard(
                request,
                &keys,
                lock_id,
                sent,
                ends,
                token,
                (row.acquired_at, row.expires_at),
            ))
        }
        .instrument(span)
        .await
    }

    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        let span = observe::span("extend", "lease", guard.name());
        async {
            let ttl = Ttl::new(ttl)?.get();
            let Some(hold) = self.process.holds.get(guard.lock_id()) else {
                return Err(ExtendError::Lost);
            };
            let Scope::Lease(lease) = hold.scope else {
                return Err(ExtendError::Lost);
            };
            let sent = Boottime.now();
            if lease.ends <= sent {
                return Err(ExtendError::MaxHoldReached);
            }
            if guard.is_lost() || lease.has_ended() {
                return Err(ExtendError::Lost);
            }
            let row = self
                .send_extend(&lease.table, &lease.keys, guard.lock_id(), ttl, lease.max_hold)
                .await?;
            let Some(row) = row else {
                self.process.holds.lose(guard.lock_id());
                return Err(ExtendError::Lost);
            };
            if !hold
                .control
                .renewed(row.expires_at, lease.trusted_until(sent, ttl))
            {
                self.process.holds.lose(guard.lock_id());
                return Err(ExtendError::Lost);
            }
            lease.reschedule(next_renewal(sent, ttl));
            self.process.renewer.expect(lease.schedule().due);
            Ok(())
        }
        .instrument(span)
        .await
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        let span = observe::span("release", "lease", guard.name());
        async {
            let (name, lock_id) = (guard.name().clone(), guard.lock_id());
            // Until the answer is here the guard stays armed: a dropped release goes on in the background.
            let released = match self.process.holds.get(lock_id).map(|hold| hold.scope) {
                Some(Scope::Lease(lease)) if lease.has_ended() => Released::Held,
                Some(Scope::Lease(lease)) => {
                    // A beat that finds the row released meanwhile must not take that for a loss.
                    lease.begin_fencing();
                    self.send_release(&lease.table, &lease.keys, lock_id).await?
                }
                // Another kind of lock, which its guard knows how to end.
                Some(_) => {
                    drop(guard);
                    return Ok(Released::Held);
                }
                None => match self.table.key_values(&name) {
                    Ok(keys) => self.send_release(&self.table, &keys, lock_id).await?,
                    Err(_) => Released::AlreadyGone,
                },
            };
            self.process.holds.remove(lock_id);
            guard.defuse();
            self.process.freed(&name);
            Ok(released)
        }
        .instrument(span)
        .await
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        let span = observe::span("inspect", "lease", name);
        async {
            let Ok(keys) = self.table.key_values(name) else {
                return Ok(None);
            };
            let mut query = diesel::sql_query(&self.table.inspect).into_boxed::<diesel::pg::Pg>();
            for key in &keys {
                query = query.bind::<Text, _>(key);
            }
            let row: Option<HolderRow> = self
                .process
                .pool
                .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await.optional()?))
                .await?;
            Ok(row.map(|row| row.into_held(name)))
        }
        .instrument(span)
        .await
    }
}
