//! The statements on tenants.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::{BigInt, Nullable, Text, Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::Timestamp;
use leasehold_storage::Prepared;

use crate::tenants::model::{NewTenant, Tenant};

#[derive(QueryableByName)]
pub(crate) struct TenantRow {
    #[diesel(sql_type = Text)]
    id: String,
    #[diesel(sql_type = Nullable<Text>)]
    name: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
}

impl From<TenantRow> for Tenant {
    fn from(row: TenantRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            created_at: Timestamp(row.created_at),
        }
    }
}

const CREATE: &str = "
    INSERT INTO tenants (id, name) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING
    RETURNING id, name, created_at, seq";

/// Makes a tenant; `None` when there is one of that id.
pub(crate) async fn create(conn: &mut AsyncPgConnection, new: &NewTenant) -> QueryResult<Option<Tenant>> {
    let create = diesel::sql_query(CREATE)
        .bind::<Text, _>(new.id.as_str())
        .bind::<Nullable<Text>, _>(&new.name);
    let row: Option<TenantRow> = Prepared(create).one(conn).await.optional()?;
    Ok(row.map(Tenant::from))
}

const LIST: &str = "
    SELECT id, name, created_at, seq FROM tenants
    WHERE seq > $1 AND ($2 IS NULL OR id = $2) ORDER BY seq LIMIT $3";

/// A page of all tenants, or of the only one that the caller may see.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    only: Option<&str>,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<TenantRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<BigInt, _>(after)
        .bind::<Nullable<Text>, _>(only)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

const GET: &str = "SELECT id, name, created_at, seq FROM tenants WHERE id = $1";

/// One tenant.
pub(crate) async fn get(conn: &mut AsyncPgConnection, id: &str) -> QueryResult<Option<Tenant>> {
    let get = diesel::sql_query(GET).bind::<Text, _>(id);
    let row: Option<TenantRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(Tenant::from))
}

/// What became of a tenant that was to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    Done,
    OwnsSomething,
    NoSuchTenant,
}

// What is still to be told of it, what could not be told, the answers that were kept for its clients and the locks that
// they hold mean nothing to another tenant of that id. Tokens go on rising all the same. Binds: id, the first name that a
// lock of it can have, and the first after those.
const DELETE: &str = "
    WITH answers AS (
        DELETE FROM idempotency_keys WHERE tenant_id = $1
    ), events AS (
        DELETE FROM leasehold.outbox WHERE tenant_id = $1
    ), items AS (
        DELETE FROM leasehold.work_items WHERE tenant_id = $1
    ), letters AS (
        DELETE FROM leasehold.dead_letters WHERE tenant_id = $1
    ), locks AS (
        DELETE FROM leasehold.leases WHERE name COLLATE \"C\" >= $2 AND name COLLATE \"C\" < $3
        RETURNING lock_id, fencing_token
    ), asked AS (
        DELETE FROM leasehold.client_leases AS c USING locks WHERE c.lock_id = locks.lock_id
    ), raised AS (
        UPDATE leasehold.token_floor SET floor = highest.token
        FROM (SELECT max(fencing_token) AS token FROM locks) AS highest
        WHERE floor < highest.token
    )
    DELETE FROM tenants WHERE id = $1";

/// Deletes a tenant and its keys, if it owns nothing else: the foreign keys of what it owns say no. The transaction has
/// the tenant for itself. Its locks have names from the first of `locks` on, before the second.
pub(crate) async fn delete(
    conn: &mut AsyncPgConnection,
    id: &str,
    (first, end): &(String, String),
) -> QueryResult<Deleted> {
    let delete = diesel::sql_query(DELETE)
        .bind::<Text, _>(id)
        .bind::<Text, _>(first)
        .bind::<Text, _>(end);
    match Prepared(delete).execute(conn).await {
        Ok(0) => Ok(Deleted::NoSuchTenant),
        Ok(_) => Ok(Deleted::Done),
        Err(Error::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, _)) => Ok(Deleted::OwnsSomething),
        Err(error) => Err(error),
    }
}
