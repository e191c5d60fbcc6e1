//! [`ClientLeases`]: leases that clients of a service keep alive themselves.
//!
//! No process renews them, and no process has to know of them: what a client may do with its lease stands in rows, so
//! that it may ask any process to extend or release it. A lease begins as that of the process which waited for it, and
//! is handed over.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{BigInt, Bool, Double, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use leasehold_domain::{
    AcquireError, ExtendError, FencingToken, LockGuard, LockId, LockName, ReleaseError, Released, Ttl,
    Unavailable,
};
use tokio::time::Instant;

use crate::database::Database;
use crate::error::StorageError;
use crate::holds::Scope;
use crate::lease::row::SWEEP;
use crate::lease::seconds;
use crate::observe;
use crate::process::Process;
use crate::statement::Prepared;

/// The leases in `leasehold.leases` that clients keep alive, each by its name and lock id.
#[derive(Clone, Debug)]
pub struct ClientLeases {
    process: Arc<Process>,
}

/// A lease as its client knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLease {
    /// The acquisition.
    pub lock_id: LockId,
    /// Its token.
    pub fencing_token: FencingToken,
    /// When it was acquired, by the database's clock.
    pub acquired_at: DateTime<Utc>,
    /// When it ends unless it is extended.
    pub expires_at: DateTime<Utc>,
}

/// What is known of a lock id that a client has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// Nobody has used it yet, or nobody remembers.
    Unused,
    /// It holds the lock.
    Held(ClientLease),
    /// Its lease is over, or was one of another name.
    Over,
}

/// What became of a lease that was to be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandedOver {
    /// The client has it.
    Done(ClientLease),
    /// The id that the client chose had been used before. The lock is free again.
    AlreadyUsed,
}

#[derive(QueryableByName)]
struct LeaseRow {
    #[diesel(sql_type = Nullable<Timestamptz>)]
    acquired_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    expires_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<BigInt>)]
    fencing_token: Option<i64>,
    /// What the statement says beside the lease.
    #[diesel(sql_type = Bool)]
    told: bool,
}

impl LeaseRow {
    fn lease(&self, lock_id: LockId) -> Option<ClientLease> {
        Some(ClientLease {
            lock_id,
            fencing_token: FencingToken::new(self.fencing_token?),
            acquired_at: self.acquired_at?,
            expires_at: self.expires_at?,
        })
    }
}

#[derive(QueryableByName)]
struct ReleaseRow {
    #[diesel(sql_type = Bool)]
    live: bool,
    /// In seconds.
    #[diesel(sql_type = Nullable<Double>)]
    held_for: Option<f64>,
}

#[derive(QueryableByName)]
struct CountRow {
    #[diesel(sql_type = BigInt)]
    forgotten: i64,
}

/// Binds: lock id, name. `told` says whether the id was used.
const FIND: &str = "\
SELECT t.acquired_at, t.expires_at, t.fencing_token, asked.lock_id IS NOT NULL AS told
FROM (SELECT) AS one
LEFT JOIN leasehold.client_leases AS asked ON asked.lock_id = $1
LEFT JOIN leasehold.leases AS t ON t.name = $2 AND t.name = asked.name AND t.lock_id = asked.lock_id
                               AND t.expires_at > clock_timestamp()";

/// Binds: the process's lock id, name, the client's lock id, ttl and longest hold in seconds, whether the id is the
/// client's choice. `told` says whether the lease was still the process's. Of two that hand over to the same id only
/// one makes the row. This commit also brings the grant to the disk, which the acquire left to it.
const HAND_OVER: &str = "\
WITH mine AS MATERIALIZED (
    SELECT t.name, t.acquired_at FROM leasehold.leases AS t
    WHERE t.name = $2 AND t.lock_id = $1 AND t.expires_at > clock_timestamp()
    FOR NO KEY UPDATE
), asked AS (
    INSERT INTO leasehold.client_leases (lock_id, name, ttl, ends_at, chosen)
    SELECT $3, name, $4, acquired_at + $5 * interval '1 second', $6 FROM mine
    ON CONFLICT (lock_id) DO NOTHING
    RETURNING lock_id, name
), handed AS (
    UPDATE leasehold.leases AS t SET lock_id = asked.lock_id
    FROM asked WHERE t.name = asked.name
    RETURNING t.acquired_at, t.expires_at, t.fencing_token
)
SELECT handed.acquired_at, handed.expires_at, handed.fencing_token, EXISTS (SELECT FROM mine) AS told
FROM (SELECT) AS one LEFT JOIN handed ON true";

/// Binds: lock id, name, ttl in seconds or null. `told` says whether its longest hold is over. The expiry is looked at
/// after the row is locked: a wait for the row must not revive what expired meanwhile.
const EXTEND: &str = "\
WITH asked AS MATERIALIZED (
    SELECT name, ttl, ends_at FROM leasehold.client_leases WHERE lock_id = $1 AND name = $2
), mine AS MATERIALIZED (
    SELECT t.name, t.expires_at AS until FROM leasehold.leases AS t
    WHERE t.name = $2 AND t.lock_id = $1
    FOR NO KEY UPDATE
), extended AS (
    UPDATE leasehold.leases AS t
    SET expires_at = greatest(t.expires_at, least(clock_timestamp() + coalesce($3, asked.ttl) * interval '1 second',
                                                  asked.ends_at))
    FROM mine JOIN asked USING (name)
    WHERE t.name = mine.name AND mine.until > clock_timestamp()
    RETURNING t.acquired_at, t.expires_at, t.fencing_token
)
SELECT extended.acquired_at, extended.expires_at, extended.fencing_token,
       coalesce(asked.ends_at <= clock_timestamp(), false) AS told
FROM (SELECT) AS one LEFT JOIN asked ON true LEFT JOIN extended ON true";

/// Binds: lock id, name. The end of a hold need not reach the disk: after a crash it ends by itself.
const RELEASE: &str = "\
WITH asked AS MATERIALIZED (
    SELECT lock_id, name FROM leasehold.client_leases WHERE lock_id = $1 AND name = $2
), mine AS MATERIALIZED (
    SELECT t.name, t.expires_at AS until, t.acquired_at AS since
    FROM leasehold.leases AS t JOIN asked ON t.name = asked.name AND t.lock_id = asked.lock_id
    FOR NO KEY UPDATE OF t
), ended AS (
    UPDATE leasehold.leases AS t
    SET lock_id = NULL, operation = NULL, locked_by = NULL, acquired_at = NULL, expires_at = NULL
    FROM mine WHERE t.name = mine.name
    RETURNING mine.until > clock_timestamp() AS live,
              extract(epoch FROM clock_timestamp() - mine.since)::float8 AS held_for
), forgotten AS (
    DELETE FROM leasehold.client_leases AS c USING asked WHERE c.lock_id = asked.lock_id AND NOT c.chosen
), remembered AS (
    UPDATE leasehold.client_leases AS c SET ends_at = least(c.ends_at, clock_timestamp())
    FROM asked WHERE c.lock_id = asked.lock_id AND c.chosen
)
SELECT coalesce(ended.live, false) AS live, ended.held_for, set_config('synchronous_commit', 'off', true) AS commit
FROM (SELECT) AS one LEFT JOIN ended ON true";

/// Binds: seconds.
const FORGET: &str = "\
WITH forgotten AS (
    DELETE FROM leasehold.client_leases WHERE ends_at < clock_timestamp() - $1 * interval '1 second'
    RETURNING lock_id
)
SELECT count(*) AS forgotten FROM forgotten";

impl Database {
    /// The leases that clients keep alive themselves.
    pub fn client_leases(&self) -> ClientLeases {
        ClientLeases {
            process: Arc::clone(&self.process),
        }
    }
}

impl ClientLeases {
    /// What is known of an id that a client has chosen for a lease of this name.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "find", backend = "lease", name = name.to_string()))]
    pub async fn find(&self, name: &LockName, chosen: LockId) -> Result<Chosen, Unavailable> {
        let find = diesel::sql_query(FIND)
            .bind::<SqlUuid, _>(chosen.as_uuid())
            .bind::<Text, _>(name.encoded());
        let row: LeaseRow = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(find).one(conn).await?))
            .await?;
        Ok(match row.lease(chosen) {
            Some(lease) => Chosen::Held(lease),
            None if row.told => Chosen::Over,
            None => Chosen::Unused,
        })
    }

    /// Hands a lease of this process to a client, who extends and releases it from here on: within the `ttl` and the
    /// `max_hold` that it was acquired with. It gets the id that the client has `chosen`, or keeps its own. The grant
    /// is on the disk when this answers, so it may be acquired
    /// [`WithWrite`](leasehold_domain::Durability::WithWrite).
    ///
    /// # Errors
    /// [`AcquireError::Unavailable`] when the lease was lost before, or the database cannot be asked;
    /// [`AcquireError::OutcomeUnknown`] when no answer came: the client's lease, if there is one, ends by itself.
    ///
    /// # Cancel safety
    /// The lease is given back, unless it has become the client's under an id of its own choice: then it is found by
    /// that id, and ends by itself.
    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "hand_over", backend = "lease", name = %guard.name()))]
    pub async fn hand_over(
        &self,
        guard: LockGuard,
        chosen: Option<LockId>,
    ) -> Result<HandedOver, AcquireError> {
        let lost =
            || AcquireError::Unavailable(Unavailable::new("the lock was lost before it was handed over"));
        let ours = guard.lock_id();
        let Some(Scope::Lease(lease)) = self.process.holds.get(ours).map(|hold| hold.scope) else {
            return Err(lost());
        };
        // A beat that finds the row with another id must not take that for a loss.
        lease.begin_fencing();
        let theirs = chosen.unwrap_or(ours);
        let hand_over = diesel::sql_query(HAND_OVER)
            .bind::<SqlUuid, _>(ours.as_uuid())
            .bind::<Text, _>(guard.name().encoded())
            .bind::<SqlUuid, _>(theirs.as_uuid())
            .bind::<Double, _>(seconds(lease.schedule().ttl))
            .bind::<Double, _>(seconds(lease.max_hold))
            .bind::<Bool, _>(chosen.is_some());
        let row: LeaseRow = self
            .process
            .pool
            .ask(async |conn| match Prepared(hand_over).one(conn).await {
                Ok(row) => Ok(row),
                Err(error) => Err(StorageError::of_connection(conn, error).await),
            })
            .await
            .map_err(|error| error.into_acquire(theirs))?;
        let Some(handed) = row.lease(theirs) else {
            // Dropping the guard gives the lease back.
            return if row.told {
                Ok(HandedOver::AlreadyUsed)
            } else {
                Err(lost())
            };
        };
        // A process that ends gives back what it has under ids of its own, and may have begun to.
        if self.process.holds.hand_over(ours).is_none() && theirs == ours {
            return Err(lost());
        }
        guard.defuse();
        Ok(HandedOver::Done(handed))
    }

    /// Moves the end of a lease to `ttl` from now, if that is later; without one, to the slice that it was acquired
    /// with. Never beyond its longest hold.
    ///
    /// # Errors
    /// [`ExtendError::Lost`] when it is over or was never handed over, [`ExtendError::MaxHoldReached`],
    /// [`ExtendError::Invalid`] and [`ExtendError::Unavailable`].
    ///
    /// # Cancel safety
    /// The lease may or may not have been extended; it stays held either way.
    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "extend", backend = "lease", name = name.to_string()))]
    pub async fn extend(
        &self,
        name: &LockName,
        lock_id: LockId,
        ttl: Option<Duration>,
    ) -> Result<ClientLease, ExtendError> {
        let ttl = ttl.map(Ttl::new).transpose()?.map(Ttl::get);
        let extend = diesel::sql_query(EXTEND)
            .bind::<SqlUuid, _>(lock_id.as_uuid())
            .bind::<Text, _>(name.encoded())
            .bind::<Nullable<Double>, _>(ttl.map(seconds));
        let row: LeaseRow = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(extend).one(conn).await?))
            .await?;
        row.lease(lock_id).ok_or(if row.told {
            ExtendError::MaxHoldReached
        } else {
            ExtendError::Lost
        })
    }

    /// Ends a lease, and tells whoever waits for it. A later holder is never touched, nor one that no client keeps.
    ///
    /// # Errors
    /// [`ReleaseError::Unavailable`] when the database did not answer; the lease then ends by itself.
    ///
    /// # Cancel safety
    /// The lease may or may not have ended.
    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "release", backend = "lease", name = name.to_string()))]
    pub async fn release(&self, name: &LockName, lock_id: LockId) -> Result<Released, ReleaseError> {
        let release = diesel::sql_query(RELEASE)
            .bind::<SqlUuid, _>(lock_id.as_uuid())
            .bind::<Text, _>(name.encoded());
        let row: ReleaseRow = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(release).one(conn).await?))
            .await?;
        if !row.live {
            return Ok(Released::AlreadyGone);
        }
        if let Some(held_for) = row
            .held_for
            .and_then(|held| Duration::try_from_secs_f64(held).ok())
        {
            observe::held("lease", held_for);
        }
        self.process.freed(name);
        Ok(Released::Held)
    }

    /// Forgets the ids of leases that could not have been held since `unused_for`, and answers how many. A chosen id
    /// that was forgotten can be chosen again.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// All of it is done or nothing.
    pub async fn forget(&self, unused_for: Duration) -> Result<u64, Unavailable> {
        let forget = diesel::sql_query(FORGET).bind::<Double, _>(seconds(unused_for));
        let row: CountRow = self
            .process
            .pool
            .ask_until(Instant::now() + SWEEP, async |conn| {
                Ok::<_, StorageError>(Prepared(forget).one(conn).await?)
            })
            .await?;
        Ok(u64::try_from(row.forgotten).unwrap_or(0))
    }
}
