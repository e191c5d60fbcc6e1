//! The statements on feedback records.
//!
//! Those that change something write its event too. An event names the record and does not repeat it: what was erased
//! must not live on in what waits to be sent.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::{Array, BigInt, Bool, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::Timestamp;
use leasehold_storage::{Prepared, TenantGate};
use serde_json::Value;
use uuid::Uuid;

use crate::failure::Failure;
use crate::feedback_records::model::{
    Erased, FeedbackRecord, FeedbackRecordFilter, FeedbackRecordPatch, NewFeedbackRecord,
};

#[derive(Debug, QueryableByName)]
pub(crate) struct FeedbackRow {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = Nullable<Text>)]
    user_id: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    field_id: Option<String>,
    #[diesel(sql_type = Jsonb)]
    value: Value,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    updated_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
}

impl From<FeedbackRow> for FeedbackRecord {
    fn from(row: FeedbackRow) -> Self {
        Self {
            id: row.id,
            tenant_id: row.tenant_id,
            user_id: row.user_id,
            field_id: row.field_id,
            value: row.value,
            created_at: Timestamp(row.created_at),
            updated_at: Timestamp(row.updated_at),
        }
    }
}

macro_rules! columns {
    () => {
        "id, tenant_id, user_id, field_id, value, created_at, updated_at, seq"
    };
}

/// Makes the statement that runs another one, writes an event of each row that it returns, and returns these.
macro_rules! with_event {
    ($event:literal, $write:expr) => {
        concat!(
            "WITH written AS (",
            $write,
            " RETURNING ",
            columns!(),
            "), event AS (
                 INSERT INTO leasehold.outbox (tenant_id, type, data)
                 SELECT tenant_id, '",
            $event,
            "', jsonb_build_object('tenant_id', tenant_id, 'id', id) FROM written
             )
             SELECT ",
            columns!(),
            " FROM written"
        )
    };
}

// The gate is asked once, before the row is made. As one statement without a transaction around it, it is one round
// trip; in a transaction that has the gate already it is let through.
const CREATE: &str = "
    WITH gate AS MATERIALIZED (
        SELECT pg_try_advisory_xact_lock_shared($1) AS open, clock_timestamp() AS now
    ), tenant AS (
        SELECT id FROM tenants WHERE id = $2
    ), written AS (
        INSERT INTO feedback_records (id, tenant_id, user_id, field_id, value, created_at, updated_at)
        SELECT $3, tenant.id, $4, $5, $6, gate.now, gate.now FROM tenant, gate WHERE gate.open
        RETURNING id, tenant_id, value, created_at
    ), event AS (
        INSERT INTO leasehold.outbox (tenant_id, type, data)
        SELECT tenant_id, 'feedback_record.created', jsonb_build_object('tenant_id', tenant_id, 'id', id)
        FROM written
    )
    SELECT EXISTS (SELECT FROM tenant) AS known, written.value, written.created_at
    FROM gate LEFT JOIN written ON true";

#[derive(QueryableByName)]
struct CreatedRow {
    #[diesel(sql_type = Bool)]
    known: bool,
    #[diesel(sql_type = Nullable<Jsonb>)]
    value: Option<Value>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    created_at: Option<DateTime<Utc>>,
}

/// What became of a feedback record that was to be made.
#[derive(Clone, Debug)]
pub(crate) enum Created {
    Done(FeedbackRecord),
    /// The tenant's gate is closed.
    Refused,
    NoSuchTenant,
}

/// Makes a feedback record, if the tenant's gate is open.
pub(crate) async fn create(
    conn: &mut AsyncPgConnection,
    tenant: &str,
    id: Uuid,
    new: &NewFeedbackRecord,
) -> Result<Created, Failure> {
    let key = TenantGate::key(tenant).map_err(leasehold_http::Problem::from)?;
    let create = diesel::sql_query(CREATE)
        .bind::<BigInt, _>(key)
        .bind::<Text, _>(tenant)
        .bind::<SqlUuid, _>(id)
        .bind::<Nullable<Text>, _>(&new.user_id)
        .bind::<Nullable<Text>, _>(&new.field_id)
        .bind::<Jsonb, _>(&new.value);
    match Prepared(create).one(conn).await {
        Ok(CreatedRow {
            value: Some(value),
            created_at: Some(made),
            ..
        }) => Ok(Created::Done(FeedbackRecord {
            id,
            tenant_id: tenant.to_owned(),
            user_id: new.user_id.clone(),
            field_id: new.field_id.clone(),
            value,
            created_at: Timestamp(made),
            updated_at: Timestamp(made),
        })),
        Ok(CreatedRow { known: true, .. }) => Ok(Created::Refused),
        Ok(CreatedRow { known: false, .. }) => Ok(Created::NoSuchTenant),
        // It was there when the statement began.
        Err(Error::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, _)) => Ok(Created::NoSuchTenant),
        Err(error) => Err(error.into()),
    }
}

const LIST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM feedback_records
     WHERE seq > $1 AND ($2 IS NULL OR tenant_id = $2) AND ($3 IS NULL OR user_id = $3)
     ORDER BY seq LIMIT $4"
);

/// A page of the feedback records of a tenant, or of all, and of a user, or of all.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    tenant: Option<&str>,
    filter: &FeedbackRecordFilter,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<FeedbackRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<BigInt, _>(after)
        .bind::<Nullable<Text>, _>(tenant)
        .bind::<Nullable<Text>, _>(&filter.user_id)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

const GET: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM feedback_records WHERE id = $1 AND ($2 IS NULL OR tenant_id = $2)"
);

/// One feedback record, of this tenant or of any.
pub(crate) async fn get(
    conn: &mut AsyncPgConnection,
    id: Uuid,
    tenant: Option<&str>,
) -> QueryResult<Option<FeedbackRecord>> {
    let get = diesel::sql_query(GET)
        .bind::<SqlUuid, _>(id)
        .bind::<Nullable<Text>, _>(tenant);
    let row: Option<FeedbackRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(FeedbackRecord::from))
}

const TENANT: &str =
    "SELECT tenant_id FROM feedback_records WHERE id = $1 AND ($2 IS NULL OR tenant_id = $2)";

#[derive(QueryableByName)]
struct TenantRow {
    #[diesel(sql_type = Text)]
    tenant_id: String,
}

/// The tenant of a feedback record, when it is this one or any.
pub(crate) async fn tenant(
    conn: &mut AsyncPgConnection,
    id: Uuid,
    only: Option<&str>,
) -> QueryResult<Option<String>> {
    let find = diesel::sql_query(TENANT)
        .bind::<SqlUuid, _>(id)
        .bind::<Nullable<Text>, _>(only);
    let row: Option<TenantRow> = Prepared(find).one(conn).await.optional()?;
    Ok(row.map(|row| row.tenant_id))
}

const PATCH: &str = with_event!(
    "feedback_record.updated",
    "UPDATE feedback_records
     SET user_id = CASE WHEN $3 THEN $4 ELSE user_id END,
         field_id = CASE WHEN $5 THEN $6 ELSE field_id END,
         value = CASE WHEN $7 THEN $8 ELSE value END,
         updated_at = clock_timestamp()
     WHERE id = $1 AND tenant_id = ANY ($2)"
);

/// Changes a feedback record of one of these tenants; `None` when they have it no more.
pub(crate) async fn patch(
    conn: &mut AsyncPgConnection,
    id: Uuid,
    tenants: &[String],
    patch: &FeedbackRecordPatch,
) -> QueryResult<Option<FeedbackRecord>> {
    let update = diesel::sql_query(PATCH)
        .bind::<SqlUuid, _>(id)
        .bind::<Array<Text>, _>(tenants)
        .bind::<Bool, _>(patch.user_id.is_some())
        .bind::<Nullable<Text>, _>(patch.user_id.clone().flatten())
        .bind::<Bool, _>(patch.field_id.is_some())
        .bind::<Nullable<Text>, _>(patch.field_id.clone().flatten())
        .bind::<Bool, _>(patch.value.is_some())
        .bind::<Nullable<Jsonb>, _>(&patch.value);
    let row: Option<FeedbackRow> = Prepared(update).one(conn).await.optional()?;
    Ok(row.map(FeedbackRecord::from))
}

const DELETE: &str = with_event!(
    "feedback_record.deleted",
    "DELETE FROM feedback_records WHERE id = $1 AND tenant_id = ANY ($2)"
);

/// Deletes a feedback record of one of these tenants. False when they have it no more.
pub(crate) async fn delete(conn: &mut AsyncPgConnection, id: Uuid, tenants: &[String]) -> QueryResult<bool> {
    let delete = diesel::sql_query(DELETE)
        .bind::<SqlUuid, _>(id)
        .bind::<Array<Text>, _>(tenants);
    let row: Option<FeedbackRow> = Prepared(delete).one(conn).await.optional()?;
    Ok(row.is_some())
}

const TENANTS_OF_USER: &str = "
    SELECT DISTINCT tenant_id FROM feedback_records
    WHERE user_id = $1 AND ($2 IS NULL OR tenant_id = $2)";

/// The tenants in which there is something of a user: of this one, or of all.
pub(crate) async fn tenants_of_user(
    conn: &mut AsyncPgConnection,
    user: &str,
    tenant: Option<&str>,
) -> QueryResult<Vec<String>> {
    let find = diesel::sql_query(TENANTS_OF_USER)
        .bind::<Text, _>(user)
        .bind::<Nullable<Text>, _>(tenant);
    let rows: Vec<TenantRow> = Prepared(find).load(conn).await?;
    Ok(rows.into_iter().map(|row| row.tenant_id).collect())
}

// Two erasures of one user lock the rows in the same order. Answers that are kept to be given again lose what they tell
// of the user, and are still given again: the write is not done anew.
const ERASE: &str = r#"
    WITH found AS MATERIALIZED (
        SELECT id FROM feedback_records WHERE user_id = $1 AND tenant_id = ANY ($2) ORDER BY id FOR UPDATE
    ), gone AS (
        DELETE FROM feedback_records f USING found
        WHERE f.id = found.id AND f.user_id = $1 AND f.tenant_id = ANY ($2)
        RETURNING f.tenant_id
    ), counted AS (
        SELECT tenant_id, count(*) AS deleted FROM gone GROUP BY tenant_id
    ), event AS (
        INSERT INTO leasehold.outbox (tenant_id, type, data)
        SELECT tenant_id, 'feedback_record.erased',
               jsonb_build_object('tenant_id', tenant_id, 'user_id', $1, 'deleted', deleted)
        FROM counted ORDER BY tenant_id
    ), forgotten AS (
        UPDATE idempotency_keys SET answer = convert_to((
            convert_from(answer, 'UTF8')::jsonb || '{"user_id": null, "field_id": null, "value": null}')::text, 'UTF8')
        WHERE tenant_id = ANY ($2) AND EXISTS (SELECT FROM found)
          AND CASE WHEN length(answer) > 0 THEN convert_from(answer, 'UTF8')::jsonb ->> 'user_id' = $1 END
    )
    SELECT tenant_id, deleted FROM counted"#;

#[derive(QueryableByName)]
struct ErasedRow {
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = BigInt)]
    deleted: i64,
}

/// Deletes what there is of a user in these tenants.
pub(crate) async fn erase(
    conn: &mut AsyncPgConnection,
    user: &str,
    tenants: &[String],
) -> QueryResult<Erased> {
    let erase = diesel::sql_query(ERASE)
        .bind::<Text, _>(user)
        .bind::<Array<Text>, _>(tenants);
    let rows: Vec<ErasedRow> = Prepared(erase).load(conn).await?;
    Ok(Erased {
        deleted: rows.iter().map(|row| row.deleted).sum(),
        by_tenant: rows.into_iter().map(|row| (row.tenant_id, row.deleted)).collect(),
    })
}
