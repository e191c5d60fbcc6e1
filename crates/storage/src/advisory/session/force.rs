//! Taking session locks away: the owner is asked, because its session has other locks as well, or the session is ended
//! with all that it has.

use std::time::Duration;

use diesel::QueryableByName;
use diesel::sql_types::{Array, BigInt, Bool, Integer, SmallInt, Text, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use leasehold_domain::{HeldLock, LockId, LockName, Unavailable};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{LockSession, PgSessionLock, Sessions};
use crate::advisory::AdvisoryKey;
use crate::advisory::holder::SessionRow;
use crate::error::StorageError;
use crate::holds::{Holds, Scope};
use crate::pool::ANSWER;
use crate::statement::Prepared;

/// How long the owner has to give a lock up.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(5);
/// A hold of a process of this library is told within this time.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked whether the lock is free.
const LOOK: Duration = Duration::from_millis(50);
/// How often the owner is asked again: it may not have listened.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the statement that ends sessions waits for their end.
const TERMINATION: Duration = Duration::from_secs(5);

/// Sessions that have the key; whose transaction has an id has it by a transaction lock.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
macro_rules! sessions_with_the_key {
    ($then:literal) => {
        concat!(
            "\
WITH owner AS MATERIALIZED (
    SELECT l.pid, min(l.mode) AS mode FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (l.classid::bigint << 32) | l.objid::bigint = $1 AND l.objsubid = $2
      AND NOT EXISTS (SELECT FROM pg_locks AS t
                      WHERE t.pid = l.pid AND t.locktype = 'transactionid' AND t.mode = 'ExclusiveLock' AND t.granted)
    GROUP BY l.pid
)",
            $then
        )
    };
}

/// Binds: the key's 64 bits, its space.
const FIND: &str = sessions_with_the_key!(
    "
SELECT o.pid AS backend_pid, o.mode, a.application_name, host(a.client_addr) AS client_address,
       p.lock_id, p.operation, p.locked_by, p.instance, p.metadata, p.acquired_at
FROM owner AS o
LEFT JOIN pg_stat_activity AS a ON a.pid = o.pid
LEFT JOIN leasehold.presence AS p
       ON p.backend_pid = o.pid AND p.key_bits = $1 AND p.key_space = $2
          AND p.seen_at > clock_timestamp() - interval '10 seconds'
ORDER BY p.acquired_at, o.pid"
);

/// Binds: the encoded name, who, why, the lock ids. It is on record before anybody gives anything up.
const ASK: &str = "\
WITH asked AS (
    INSERT INTO leasehold.lock_audit (name, released_by, reason, lock_id, operation, locked_by, acquired_at)
    SELECT $1, $2, $3, lock_id, operation, locked_by, acquired_at
    FROM leasehold.presence WHERE lock_id = ANY ($4)
    RETURNING lock_id
)
SELECT count(pg_notify('leasehold_release', lock_id::text)) AS asked FROM asked";

const ASK_AGAIN: &str =
    "SELECT count(pg_notify('leasehold_release', lock_id::text)) AS asked FROM unnest($1::uuid[]) AS lock_id";

/// Binds: the key's 64 bits, its space, the lock ids. A hold is over when its process says so, or its session lacks it.
const LEFT: &str = sessions_with_the_key!(
    "
SELECT p.lock_id FROM leasehold.presence AS p JOIN owner AS o ON o.pid = p.backend_pid
WHERE p.lock_id = ANY ($3)"
);

/// Binds: the key's 64 bits, its space, the encoded name, who, why. All that is to be known of the sessions is read
/// before they end.
const TERMINATE: &str = sessions_with_the_key!(
    ", going AS MATERIALIZED (
    SELECT l.pid, count(*) AS locks FROM pg_locks AS l JOIN owner USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted GROUP BY l.pid
), lost AS MATERIALIZED (
    SELECT p.* FROM leasehold.presence AS p JOIN owner AS o ON o.pid = p.backend_pid
    WHERE p.seen_at > clock_timestamp() - interval '10 seconds'
), ended AS MATERIALIZED (
    SELECT going.pid, going.locks, pg_terminate_backend(going.pid, 5000) AS done
    FROM going, (SELECT count(*) FROM lost) AS known
), audited AS (
    INSERT INTO leasehold.lock_audit (name, released_by, reason, lock_id, operation, locked_by, acquired_at)
    SELECT lost.name, $4, $5, lost.lock_id, lost.operation, lost.locked_by, lost.acquired_at
    FROM ended JOIN lost ON lost.backend_pid = ended.pid WHERE done
    UNION ALL
    SELECT $3, $4, $5, NULL, NULL, NULL, NULL FROM ended
    WHERE done AND NOT EXISTS (SELECT FROM lost WHERE lost.backend_pid = ended.pid AND lost.key_bits = $1
                                                  AND lost.key_space = $2)
)
SELECT pid, locks, done FROM ended"
);

#[derive(QueryableByName)]
struct AskedRow {
    #[diesel(sql_type = BigInt)]
    asked: i64,
}

#[derive(QueryableByName)]
struct LeftRow {
    #[diesel(sql_type = SqlUuid)]
    lock_id: Uuid,
}

#[derive(QueryableByName)]
struct EndedRow {
    #[diesel(sql_type = Integer)]
    pid: i32,
    #[diesel(sql_type = BigInt)]
    locks: i64,
    #[diesel(sql_type = Bool)]
    done: bool,
}

/// What ended with the sessions that had a lock.
#[derive(Clone, Debug, PartialEq)]
pub struct Terminated {
    /// The holds of that lock.
    pub ended: Vec<HeldLock>,
    /// How many other advisory locks the same sessions had.
    pub other_locks: usize,
}

/// Gives up what other processes ask for.
pub(super) async fn give_up_when_asked(
    sessions: Sessions,
    holds: Holds,
    mut asked: broadcast::Receiver<LockId>,
) {
    loop {
        match asked.recv().await {
            Ok(lock_id) => sessions.give_up(&holds, lock_id),
            // Whoever asked asks again.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

impl Sessions {
    /// Ends a hold of this process, if it has it, and those that share the server's lock with it. Others have their turn
    /// before this process asks for the lock again.
    fn give_up(&self, holds: &Holds, lock_id: LockId) {
        let Some(Scope::Session { key, .. }) = holds.get(lock_id).map(|hold| hold.scope) else {
            return;
        };
        let session: &LockSession = self.of(key);
        let sharing = session.table().sharing(key, lock_id);
        for lock_id in sharing {
            // Told before anybody else can have it.
            holds.lose(lock_id);
            session.table().leave(key, lock_id, || true, None);
        }
    }
}

impl PgSessionLock {
    /// Takes a lock away from all who hold it as a session lock, in whatever process, and records in
    /// `leasehold.lock_audit` who did it and why. Each owner is asked, gives the lock up, and its guard is lost at once;
    /// the other locks of its session stay.
    ///
    /// Answers the holds that were ended, none when nobody held the lock. The record is written with the question: it
    /// stands also where the owner was asked in vain.
    ///
    /// # Errors
    /// [`Unavailable`] when an owner does not give the lock up within 5 seconds, or it is held by a session of a program
    /// without this library, which nobody can ask; see [`terminate`](Self::terminate). Or when the database cannot be
    /// asked.
    ///
    /// # Cancel safety
    /// The lock may or may not have been taken away.
    pub async fn force_release(
        &self,
        name: &LockName,
        by: &str,
        reason: &str,
    ) -> Result<Vec<HeldLock>, Unavailable> {
        let key = (self.key_of)(name);
        let held = self.told(key, name).await?;
        let ids: Vec<Uuid> = held
            .iter()
            .filter_map(|held| held.lock_id.map(LockId::as_uuid))
            .collect();
        if !ids.is_empty() {
            self.ask(name, by, reason, &ids).await?;
            for id in &ids {
                let holds = &self.process.holds;
                self.process.sessions.give_up(holds, LockId::from(*id));
            }
            let left = self.left(key, &ids).await?;
            let in_vain = held
                .iter()
                .filter(|held| held.lock_id.is_some_and(|id| left.contains(&id.as_uuid())));
            if let Some(sessions) = named(in_vain) {
                return Err(Unavailable::new(format!(
                    "the owner of {name} was asked and did not give it up within {GIVEN_UP_WITHIN:?}: {sessions}, \
                     which can be ended instead, with all locks that it has"
                )));
            }
        }
        if let Some(sessions) = named(held.iter().filter(|held| held.lock_id.is_none())) {
            return Err(Unavailable::new(format!(
                "{name} is held by a program that cannot be asked for it: {sessions}, which can be ended instead, \
                 with all locks that it has"
            )));
        }
        Ok(held)
    }

    /// Takes a lock away from all who hold it as a session lock by ending their sessions, and with them every other lock
    /// that these have. All of them are recorded in `leasehold.lock_audit`, as far as their names are known.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked, does not let this role end a session, or a session does not
    /// end within 5 seconds.
    ///
    /// # Cancel safety
    /// The sessions may or may not have been ended.
    pub async fn terminate(
        &self,
        name: &LockName,
        by: &str,
        reason: &str,
    ) -> Result<Terminated, Unavailable> {
        let key = (self.key_of)(name);
        let held = self.find_all(key, name).await?;
        let (bits, space) = key.as_lock_table_columns();
        let until = Instant::now() + ANSWER + TERMINATION;
        let query = diesel::sql_query(TERMINATE)
            .bind::<BigInt, _>(bits)
            .bind::<SmallInt, _>(space)
            .bind::<Text, _>(name.encoded())
            .bind::<Text, _>(by)
            .bind::<Text, _>(reason);
        let rows: Vec<EndedRow> = self
            .process
            .pool
            .ask_until(until, async |conn| {
                Ok::<_, StorageError>(Prepared(query).load(conn).await?)
            })
            .await?;
        if let Some(row) = rows.iter().find(|row| !row.done) {
            return Err(Unavailable::new(format!(
                "the session {} of the server did not end within {TERMINATION:?}",
                row.pid
            )));
        }
        let ended = |held: &HeldLock| {
            let pid = held.session.as_ref().map(|session| session.backend_pid);
            rows.iter().any(|row| Some(row.pid) == pid)
        };
        let others: i64 = rows.iter().map(|row| row.locks - 1).sum();
        Ok(Terminated {
            ended: held.into_iter().filter(ended).collect(),
            other_locks: usize::try_from(others).unwrap_or_default(),
        })
    }

    async fn find_all(&self, key: AdvisoryKey, name: &LockName) -> Result<Vec<HeldLock>, StorageError> {
        let (bits, space) = key.as_lock_table_columns();
        let query = diesel::sql_query(FIND)
            .bind::<BigInt, _>(bits)
            .bind::<SmallInt, _>(space);
        let rows: Vec<SessionRow> = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(query).load(conn).await?))
            .await?;
        Ok(rows.into_iter().map(|row| row.into_held(name)).collect())
    }

    /// Who holds it, once their processes have told; a moment later those who are still not known are strangers.
    async fn told(&self, key: AdvisoryKey, name: &LockName) -> Result<Vec<HeldLock>, StorageError> {
        let start = Instant::now();
        loop {
            let held = self.find_all(key, name).await?;
            if held.iter().all(|held| held.lock_id.is_some()) || start.elapsed() >= TOLD_WITHIN {
                return Ok(held);
            }
            sleep(LOOK).await;
        }
    }

    async fn ask(&self, name: &LockName, by: &str, reason: &str, ids: &[Uuid]) -> Result<(), StorageError> {
        let query = diesel::sql_query(ASK)
            .bind::<Text, _>(name.encoded())
            .bind::<Text, _>(by)
            .bind::<Text, _>(reason)
            .bind::<Array<SqlUuid>, _>(ids);
        let row: AskedRow = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await?))
            .await?;
        tracing::debug!(
            asked = row.asked,
            "owners of a session lock were asked to give it up"
        );
        Ok(())
    }

    /// Waits until they are given up, and answers those that were not.
    async fn left(&self, key: AdvisoryKey, ids: &[Uuid]) -> Result<Vec<Uuid>, StorageError> {
        let (bits, space) = key.as_lock_table_columns();
        let start = Instant::now();
        let mut asked = start;
        loop {
            let query = diesel::sql_query(LEFT)
                .bind::<BigInt, _>(bits)
                .bind::<SmallInt, _>(space)
                .bind::<Array<SqlUuid>, _>(ids);
            let rows: Vec<LeftRow> = self
                .process
                .pool
                .ask(async |conn| Ok::<_, StorageError>(Prepared(query).load(conn).await?))
                .await?;
            let left: Vec<Uuid> = rows.into_iter().map(|row| row.lock_id).collect();
            if left.is_empty() || start.elapsed() >= GIVEN_UP_WITHIN {
                return Ok(left);
            }
            if asked.elapsed() >= AGAIN {
                asked = Instant::now();
                let query = diesel::sql_query(ASK_AGAIN).bind::<Array<SqlUuid>, _>(&left);
                let _: AskedRow = self
                    .process
                    .pool
                    .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await?))
                    .await?;
            }
            sleep(LOOK).await;
        }
    }
}

/// The sessions of some holds, for a message.
fn named<'a>(held: impl Iterator<Item = &'a HeldLock>) -> Option<String> {
    let mut names: Vec<String> = held
        .filter_map(|held| held.session.as_ref())
        .map(|session| {
            let program = session.application_name.as_deref().unwrap_or_default();
            format!("session {} of the server ({program})", session.backend_pid)
        })
        .collect();
    names.dedup();
    (!names.is_empty()).then(|| names.join(", "))
}
