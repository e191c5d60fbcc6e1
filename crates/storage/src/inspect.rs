//! Looking at locks of every kind in one shape: who holds, who waits, and behind whom.
//!
//! The server knows sessions and numbers, lease rows know holders, and processes tell the rest through
//! `leasehold.presence`. One statement reads all of it.

use std::collections::HashMap;
use std::fmt::{self, Write};

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::pg::Pg;
use diesel::sql_types::{Array, BigInt, Integer, Nullable, SmallInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use leasehold_domain::{FencingToken, Holder, HolderSession, LockId, LockMode, LockName, Unavailable};
use uuid::Uuid;

use crate::advisory::AdvisoryKey;
use crate::advisory::holder::HolderColumns;
use crate::database::Database;
use crate::error::StorageError;
use crate::lease::table::LeaseTable;
use crate::statement::Prepared;

/// What keeps a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LockBackend {
    /// A session of the server.
    Session,
    /// A transaction.
    Transaction,
    /// A row of `leasehold.leases`.
    Lease,
    /// A row of a table of the caller.
    RowLease,
}

impl LockBackend {
    /// `session`, `transaction`, `lease` or `row_lease`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Lease => "lease",
            Self::RowLease => "row_lease",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "transaction" => Self::Transaction,
            "lease" => Self::Lease,
            "row_lease" => Self::RowLease,
            _ => Self::Session,
        }
    }
}

impl fmt::Display for LockBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A hold as an operator sees it. What nobody tells is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldView {
    /// What keeps it. Of an advisory lock that no process tells of, this is a guess: a session whose transaction has
    /// written is believed to hold it by that transaction.
    pub backend: LockBackend,
    /// The lock. `None` for an advisory lock under a number whose name no process tells.
    pub name: Option<LockName>,
    /// The number that the server sees, of an advisory lock.
    pub key: Option<AdvisoryKey>,
    /// Shared or exclusive.
    pub mode: LockMode,
    /// The acquisition.
    pub lock_id: Option<LockId>,
    /// Who and why.
    pub holder: Option<Holder>,
    /// Since when, by the database's clock.
    pub since: Option<DateTime<Utc>>,
    /// When it ends by itself; `None` for what lives as long as a session or a transaction.
    pub expires_at: Option<DateTime<Utc>>,
    /// The token of this acquisition, of a lease.
    pub fencing_token: Option<FencingToken>,
    /// The session of the server that has it, of an advisory lock.
    pub session: Option<HolderSession>,
    /// How many wait for this lock, in every process, and since more than 250 ms.
    pub waiters: usize,
}

/// Somebody who waits, as an operator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct WaiterView {
    /// What would keep the lock; a guess as that of [`HeldView::backend`] for a session that waits in the server.
    pub backend: LockBackend,
    /// The lock. `None` for an advisory lock under a number whose name no process tells.
    pub name: Option<LockName>,
    /// The number that the server sees, of an advisory lock.
    pub key: Option<AdvisoryKey>,
    /// Shared or exclusive.
    pub mode: LockMode,
    /// Who waits, and why.
    pub holder: Option<Holder>,
    /// Since when, by the database's clock. Not told of a session that has just begun to wait in the
    /// server.
    pub since: Option<DateTime<Utc>>,
    /// The session that waits inside the server. Those who wait for locks of this library have none.
    pub session: Option<HolderSession>,
    /// The acquisitions that have the lock now, where they are known.
    pub behind: Vec<LockId>,
    /// The sessions of the server that have the lock now.
    pub behind_sessions: Vec<i32>,
}

/// What every question begins with. `{leases}` stands for the lease tables, each with `UNION ALL` before it.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
const EVERYTHING: &str = "\
WITH live AS MATERIALIZED (
    SELECT * FROM leasehold.presence WHERE seen_at > clock_timestamp() - interval '10 seconds'
), told AS MATERIALIZED (
    SELECT DISTINCT ON (key_bits, key_space) key_bits, key_space, name
    FROM live WHERE key_bits IS NOT NULL ORDER BY key_bits, key_space, name
), writing AS MATERIALIZED (
    SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted
), server AS MATERIALIZED (
    SELECT l.pid, l.granted, l.waitstart, CASE l.mode WHEN 'ShareLock' THEN 'shared' ELSE 'exclusive' END AS mode,
           (l.classid::bigint << 32) | l.objid::bigint AS key_bits, l.objsubid AS key_space,
           CASE WHEN writing.pid IS NULL THEN 'session' ELSE 'transaction' END AS backend,
           a.application_name, host(a.client_addr) AS client_address, a.xact_start
    FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid LEFT JOIN writing ON writing.pid = l.pid
    WHERE l.locktype = 'advisory'
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
), held AS MATERIALIZED (
    SELECT coalesce(p.scope, s.backend) AS backend, coalesce(p.name, told.name) AS name, s.key_bits, s.key_space, s.mode,
           p.lock_id, p.operation, p.locked_by, p.instance, p.metadata,
           coalesce(p.acquired_at, CASE s.backend WHEN 'transaction' THEN s.xact_start END) AS since,
           NULL::timestamptz AS expires_at, NULL::bigint AS fencing_token,
           s.pid AS backend_pid, s.application_name, s.client_address,
           s.key_space || ':' || s.key_bits AS lock
    FROM server AS s
    LEFT JOIN live AS p ON p.backend_pid = s.pid AND p.key_bits = s.key_bits AND p.key_space = s.key_space
    LEFT JOIN told ON told.key_bits = s.key_bits AND told.key_space = s.key_space
    WHERE s.granted{leases}
), waiting AS MATERIALIZED (
    SELECT p.scope AS backend, p.name, p.key_bits, p.key_space, p.mode, p.operation, p.locked_by, p.instance, p.metadata,
           p.acquired_at AS since, NULL::int AS backend_pid, NULL::text AS application_name,
           NULL::text AS client_address,
           coalesce(p.key_space || ':' || p.key_bits, p.scope || p.name) AS lock
    FROM live AS p WHERE p.waits
    UNION ALL
    SELECT s.backend, told.name, s.key_bits, s.key_space, s.mode, NULL, NULL, NULL, NULL,
           s.waitstart, s.pid, s.application_name, s.client_address, s.key_space || ':' || s.key_bits
    FROM server AS s
    LEFT JOIN told ON told.key_bits = s.key_bits AND told.key_space = s.key_space
    WHERE NOT s.granted
)";

/// Binds: how many, then what the lease tables want.
const HELD: &str = "
SELECT oldest.*, coalesce(behind.waiters, 0) AS waiters
FROM (SELECT * FROM held ORDER BY since NULLS LAST, lock, lock_id LIMIT $1) AS oldest
LEFT JOIN (SELECT lock, count(*) AS waiters FROM waiting GROUP BY lock) AS behind USING (lock)
ORDER BY since NULLS LAST, lock, lock_id";

/// Binds as for those who hold.
const WAITING: &str = "
SELECT oldest.*, coalesce(before.lock_ids, '{}') AS behind, coalesce(before.sessions, '{}') AS behind_sessions
FROM (SELECT * FROM waiting ORDER BY since NULLS LAST, lock LIMIT $1) AS oldest
LEFT JOIN (SELECT lock, array_remove(array_agg(lock_id), NULL) AS lock_ids,
                  array_remove(array_agg(DISTINCT backend_pid), NULL) AS sessions
           FROM held GROUP BY lock) AS before USING (lock)
ORDER BY since NULLS LAST, lock";

/// Binds: the process that asks, encoded names.
const WAITING_ELSEWHERE: &str = "\
SELECT name, count(*) AS waiters FROM leasehold.presence
WHERE name = ANY ($2) AND waits AND scope = 'lease' AND process_id <> $1
  AND seen_at > clock_timestamp() - interval '10 seconds'
GROUP BY name";

#[derive(QueryableByName)]
struct LockRow {
    #[diesel(sql_type = Text)]
    backend: String,
    #[diesel(sql_type = Nullable<Text>)]
    name: Option<String>,
    #[diesel(sql_type = Nullable<BigInt>)]
    key_bits: Option<i64>,
    #[diesel(sql_type = Nullable<SmallInt>)]
    key_space: Option<i16>,
    #[diesel(sql_type = Text)]
    mode: String,
    #[diesel(embed)]
    holder: HolderColumns,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    since: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Integer>)]
    backend_pid: Option<i32>,
    #[diesel(sql_type = Nullable<Text>)]
    application_name: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    client_address: Option<String>,
}

#[derive(QueryableByName)]
struct HeldRow {
    #[diesel(embed)]
    lock: LockRow,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    lock_id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    expires_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<BigInt>)]
    fencing_token: Option<i64>,
    #[diesel(sql_type = BigInt)]
    waiters: i64,
}

#[derive(QueryableByName)]
struct WaitingRow {
    #[diesel(embed)]
    lock: LockRow,
    #[diesel(sql_type = Array<SqlUuid>)]
    behind: Vec<Uuid>,
    #[diesel(sql_type = Array<Integer>)]
    behind_sessions: Vec<i32>,
}

#[derive(QueryableByName)]
struct CountRow {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = BigInt)]
    waiters: i64,
}

impl Database {
    /// Who holds locks of any kind in this database, in every process: the `limit` oldest holds. Leases in tables of
    /// the caller are among them where the tables are given.
    ///
    /// An advisory lock has a name and a holder once its process has told them, which it does when it has held it for
    /// 250 ms; what a process tells is believed for 10 s. This reads whole tables: it is for operators.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn held_locks(&self, tables: &[&LeaseTable], limit: u32) -> Result<Vec<HeldView>, Unavailable> {
        let rows: Vec<HeldRow> = self.look(tables, HELD, limit).await?;
        Ok(rows.into_iter().map(HeldRow::into_view).collect())
    }

    /// Who waits for locks of any kind in this database since more than 250 ms, in every process, and behind whom: the
    /// `limit` longest waits. `tables` as for [`Database::held_locks`].
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn waiters(&self, tables: &[&LeaseTable], limit: u32) -> Result<Vec<WaiterView>, Unavailable> {
        let rows: Vec<WaitingRow> = self.look(tables, WAITING, limit).await?;
        Ok(rows.into_iter().map(WaitingRow::into_view).collect())
    }

    async fn look<R>(
        &self,
        tables: &[&LeaseTable],
        question: &str,
        limit: u32,
    ) -> Result<Vec<R>, StorageError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        let mut leases = String::new();
        let mut fixed_parts = Vec::new();
        for table in std::iter::once(&*self.leases).chain(tables.iter().copied()) {
            leases.push_str("\n    UNION ALL ");
            match table.fixed_part() {
                Some(fixed) => {
                    fixed_parts.push(fixed);
                    leases.push_str(
                        &table
                            .held
                            .replace("{fixed}", &format!("${}", 1 + fixed_parts.len())),
                    );
                }
                None => leases.push_str(&table.held),
            }
        }
        let mut text = EVERYTHING.replace("{leases}", &leases);
        // Writing to a string never fails.
        _ = text.write_str(question);
        let mut query = diesel::sql_query(text)
            .into_boxed::<Pg>()
            .bind::<BigInt, _>(i64::from(limit));
        for fixed in fixed_parts {
            query = query.bind::<Text, _>(fixed);
        }
        self.process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(query.load(conn).await?))
            .await
    }

    /// How many wait in other processes for leases of these names since more than 250 ms; names that nobody waits for
    /// are left out.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn waiting_elsewhere<'a>(
        &self,
        names: impl IntoIterator<Item = &'a LockName>,
    ) -> Result<HashMap<LockName, usize>, Unavailable> {
        let names: Vec<&str> = names.into_iter().map(LockName::encoded).collect();
        let query = diesel::sql_query(WAITING_ELSEWHERE)
            .bind::<SqlUuid, _>(self.process.id)
            .bind::<Array<Text>, _>(names);
        let rows: Vec<CountRow> = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(query).load(conn).await?))
            .await?;
        let counted = |row: CountRow| Some((LockName::decode(&row.name).ok()?, count(row.waiters)));
        Ok(rows.into_iter().filter_map(counted).collect())
    }
}

fn count(rows: i64) -> usize {
    usize::try_from(rows).unwrap_or_default()
}

/// What of a row those who hold and those who wait have in common.
struct Parts {
    backend: LockBackend,
    name: Option<LockName>,
    key: Option<AdvisoryKey>,
    mode: LockMode,
    holder: Option<Holder>,
    since: Option<DateTime<Utc>>,
    session: Option<HolderSession>,
}

impl LockRow {
    fn into_parts(self) -> Parts {
        let (application_name, client_address) = (self.application_name, self.client_address);
        Parts {
            backend: LockBackend::parse(&self.backend),
            name: self.name.and_then(|name| LockName::decode(&name).ok()),
            key: self
                .key_bits
                .zip(self.key_space)
                .map(|(bits, space)| AdvisoryKey::from_lock_table_columns(bits, space)),
            mode: match self.mode.as_str() {
                "shared" => LockMode::Shared,
                _ => LockMode::Exclusive,
            },
            holder: self.holder.into_holder(),
            since: self.since,
            session: self.backend_pid.map(|backend_pid| HolderSession {
                backend_pid,
                application_name,
                client_address,
            }),
        }
    }
}

impl HeldRow {
    fn into_view(self) -> HeldView {
        let parts = self.lock.into_parts();
        HeldView {
            backend: parts.backend,
            name: parts.name,
            key: parts.key,
            mode: parts.mode,
            lock_id: self.lock_id.map(LockId::from),
            holder: parts.holder,
            since: parts.since,
            expires_at: self.expires_at,
            fencing_token: self.fencing_token.map(FencingToken::new),
            session: parts.session,
            waiters: count(self.waiters),
        }
    }
}

impl WaitingRow {
    fn into_view(self) -> WaiterView {
        let parts = self.lock.into_parts();
        WaiterView {
            backend: parts.backend,
            name: parts.name,
            key: parts.key,
            mode: parts.mode,
            holder: parts.holder,
            since: parts.since,
            session: parts.session,
            behind: self.behind.into_iter().map(LockId::from).collect(),
            behind_sessions: self.behind_sessions,
        }
    }
}
