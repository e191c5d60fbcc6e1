//! Who holds leases of the library's own table now, a page at a time.

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{BigInt, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use leasehold_domain::{FencingToken, HeldLock, LockId, LockMode, LockName, Unavailable};
use serde_json::Value;
use uuid::Uuid;

use crate::advisory::holder::HolderColumns;
use crate::database::Database;
use crate::error::StorageError;
use crate::statement::Prepared;

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = SqlUuid)]
    lock_id: Uuid,
    #[diesel(sql_type = Text)]
    operation: String,
    #[diesel(sql_type = Text)]
    locked_by: String,
    #[diesel(sql_type = Nullable<Text>)]
    instance: Option<String>,
    #[diesel(sql_type = Nullable<Jsonb>)]
    metadata: Option<Value>,
    #[diesel(sql_type = Timestamptz)]
    acquired_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    expires_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    fencing_token: i64,
}

/// Binds: the beginning of the encoded names; the time and encoded name after which the page begins, or nulls; how
/// many; the end of the names that begin so. It reads only those that begin so, whatever the database's own order is:
/// that of bytes has an index.
const HELD: &str = "\
SELECT name, lock_id, operation, locked_by, instance, metadata, acquired_at, expires_at, fencing_token
FROM leasehold.leases
WHERE expires_at > clock_timestamp() AND name COLLATE \"C\" >= $1 AND name COLLATE \"C\" < $5
  AND ($2 IS NULL OR (acquired_at, name COLLATE \"C\") > ($2, $3))
ORDER BY acquired_at, name COLLATE \"C\" LIMIT $4";

impl Database {
    /// The leases in `leasehold.leases` that are held now and whose names begin with these parts: oldest first, at most
    /// `limit`, those after the hold that began then and has that name.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn held_leases(
        &self,
        first_parts: &[&str],
        after: Option<(DateTime<Utc>, &LockName)>,
        limit: i64,
    ) -> Result<Vec<HeldLock>, Unavailable> {
        let begin = match LockName::new(first_parts) {
            _ if first_parts.is_empty() => String::new(),
            Ok(name) => name.encoded().to_owned(),
            // No name begins so.
            Err(_) => return Ok(Vec::new()),
        };
        // Every part begins with `|`, and `}` is the byte after that.
        let end = format!("{begin}}}");
        let held = diesel::sql_query(HELD)
            .bind::<Text, _>(begin)
            .bind::<Nullable<Timestamptz>, _>(after.map(|(at, _)| at))
            .bind::<Nullable<Text>, _>(after.map(|(_, name)| name.encoded()))
            .bind::<BigInt, _>(limit)
            .bind::<Text, _>(end);
        let rows: Vec<Row> = self
            .process
            .pool
            .ask(async |conn| Ok::<_, StorageError>(Prepared(held).load(conn).await?))
            .await?;
        // A name that was not written by this library cannot be told.
        Ok(rows.into_iter().filter_map(Row::into_held).collect())
    }
}

impl Row {
    fn into_held(self) -> Option<HeldLock> {
        let name = LockName::decode(&self.name).ok()?;
        Some(HeldLock {
            lock_id: Some(LockId::from(self.lock_id)),
            holder: HolderColumns {
                operation: Some(self.operation),
                locked_by: Some(self.locked_by),
                instance: self.instance,
                metadata: self.metadata,
            }
            .into_holder(),
            acquired_at: Some(self.acquired_at),
            expires_at: Some(self.expires_at),
            fencing_token: Some(FencingToken::new(self.fencing_token)),
            ..HeldLock::unknown(name, LockMode::Exclusive)
        })
    }
}
