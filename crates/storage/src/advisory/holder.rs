//! Who holds an advisory lock, as far as the server and `leasehold.presence` know.

use chrono::{DateTime, Utc};
use diesel::sql_types::{BigInt, Integer, Jsonb, Nullable, SmallInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel::{OptionalExtension, QueryableByName};
use leasehold_domain::{HeldLock, Holder, HolderSession, LockId, LockMode, LockName};
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

use crate::advisory::AdvisoryKey;
use crate::error::StorageError;
use crate::pool::Pool;
use crate::statement::Prepared;

/// Binds: the key's 64 bits, its space (1 bigint, 2 pair), the encoded name.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
const FIND: &str = "\
SELECT l.pid AS backend_pid, l.mode, a.application_name, host(a.client_addr) AS client_address,
       coalesce(p.acquired_at, a.xact_start) AS acquired_at,
       p.lock_id, p.operation, p.locked_by, p.instance, p.metadata
FROM pg_locks AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
LEFT JOIN leasehold.presence AS p
       ON p.backend_pid = l.pid AND p.name = $3 AND p.seen_at > clock_timestamp() - interval '10 seconds'
WHERE l.locktype = 'advisory' AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32) | l.objid::bigint = $1 AND l.objsubid = $2
ORDER BY p.acquired_at
LIMIT 1";

/// A session that has an advisory lock, and what is told of its hold.
#[derive(QueryableByName)]
pub(crate) struct SessionRow {
    #[diesel(sql_type = Integer)]
    backend_pid: i32,
    #[diesel(sql_type = Text)]
    mode: String,
    #[diesel(sql_type = Nullable<Text>)]
    application_name: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    client_address: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    acquired_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    lock_id: Option<Uuid>,
    #[diesel(embed)]
    holder: HolderColumns,
}

/// One holder of the lock, in whatever process; asked for until that moment.
pub(crate) async fn find(
    pool: &Pool,
    key: AdvisoryKey,
    name: &LockName,
    until: Instant,
) -> Result<Option<HeldLock>, StorageError> {
    let (bits, space) = key.as_lock_table_columns();
    let row: Option<SessionRow> = pool
        .ask_until(until, async |conn| {
            let query = diesel::sql_query(FIND)
                .bind::<BigInt, _>(bits)
                .bind::<SmallInt, _>(space)
                .bind::<Text, _>(name.encoded());
            Ok::<_, StorageError>(Prepared(query).one(conn).await.optional()?)
        })
        .await?;
    Ok(row.map(|row| row.into_held(name)))
}

impl SessionRow {
    pub(crate) fn into_held(self, name: &LockName) -> HeldLock {
        let mode = if self.mode == "ShareLock" {
            LockMode::Shared
        } else {
            LockMode::Exclusive
        };
        HeldLock {
            lock_id: self.lock_id.map(LockId::from),
            holder: self.holder.into_holder(),
            acquired_at: self.acquired_at,
            session: Some(HolderSession {
                backend_pid: self.backend_pid,
                application_name: self.application_name,
                client_address: self.client_address,
            }),
            ..HeldLock::unknown(name.clone(), mode)
        }
    }
}

/// A holder as its columns have it.
#[derive(QueryableByName)]
pub(crate) struct HolderColumns {
    #[diesel(sql_type = Nullable<Text>)]
    pub(crate) operation: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(crate) locked_by: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(crate) instance: Option<String>,
    #[diesel(sql_type = Nullable<Jsonb>)]
    pub(crate) metadata: Option<Value>,
}

impl HolderColumns {
    /// `None` where it is not known who it is.
    pub(crate) fn into_holder(self) -> Option<Holder> {
        let metadata = match self.metadata {
            Some(Value::Object(metadata)) => metadata,
            _ => serde_json::Map::new(),
        };
        self.locked_by
            .zip(self.operation)
            .map(|(owner, operation)| Holder {
                owner,
                operation,
                instance: self.instance.unwrap_or_default(),
                metadata,
            })
    }
}
