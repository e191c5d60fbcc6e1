//! The statements on webhooks. Secrets are written and, until something is sent, not read.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::{Array, BigInt, Bool, Nullable, SmallInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::Timestamp;
use leasehold_storage::Prepared;
use uuid::Uuid;

use crate::names::Slug;
use crate::webhooks::model::{NewWebhook, Secret, Webhook, WebhookPatch};

#[derive(Debug, QueryableByName)]
pub(crate) struct WebhookRow {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = Text)]
    url: String,
    #[diesel(sql_type = Bool)]
    enabled: bool,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    updated_at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    last_checked_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<SmallInt>)]
    last_status: Option<i16>,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
}

impl From<WebhookRow> for Webhook {
    fn from(row: WebhookRow) -> Self {
        Self {
            id: row.id,
            tenant_id: row.tenant_id,
            url: row.url,
            enabled: row.enabled,
            created_at: Timestamp(row.created_at),
            updated_at: Timestamp(row.updated_at),
            last_checked_at: row.last_checked_at.map(Timestamp),
            last_status: row.last_status,
        }
    }
}

macro_rules! columns {
    () => {
        "id, tenant_id, url, enabled, created_at, updated_at, last_checked_at, last_status, seq"
    };
}

const CREATE: &str = concat!(
    "INSERT INTO webhooks (id, tenant_id, url, enabled, secret, created_at, updated_at)
     SELECT $1, $2, $3, $4, $5, now, now FROM clock_timestamp() AS now
     WHERE (SELECT count(*) FROM webhooks WHERE tenant_id = $2) < $6
     RETURNING ",
    columns!()
);

/// How many webhooks a tenant may have: each event is handed on to all of them in one transaction. Some that are made at
/// the same moment may be more.
pub(crate) const MOST_OF_A_TENANT: i64 = 100;

/// What became of a webhook that was to be made.
#[derive(Debug)]
pub(crate) enum Made {
    Done(Box<Webhook>),
    NoSuchTenant,
    TooMany,
}

/// Makes a webhook.
pub(crate) async fn create(
    conn: &mut AsyncPgConnection,
    tenant: &str,
    new: &NewWebhook,
    secret: &Secret,
) -> QueryResult<Made> {
    let create = diesel::sql_query(CREATE)
        .bind::<SqlUuid, _>(Uuid::now_v7())
        .bind::<Text, _>(tenant)
        .bind::<Text, _>(&new.url)
        .bind::<Bool, _>(new.enabled)
        .bind::<Text, _>(secret.as_str())
        .bind::<BigInt, _>(MOST_OF_A_TENANT);
    match Prepared(create).one::<WebhookRow>(conn).await.optional() {
        Ok(Some(row)) => Ok(Made::Done(Box::new(row.into()))),
        Ok(None) => Ok(Made::TooMany),
        Err(Error::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, _)) => Ok(Made::NoSuchTenant),
        Err(error) => Err(error),
    }
}

const LIST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM webhooks WHERE seq > $1 AND ($2 IS NULL OR tenant_id = $2) ORDER BY seq LIMIT $3"
);

/// A page of the webhooks of a tenant, or of all.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    tenant: Option<&str>,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<WebhookRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<BigInt, _>(after)
        .bind::<Nullable<Text>, _>(tenant)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

const GET: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM webhooks WHERE id = $1 AND ($2 IS NULL OR tenant_id = $2)"
);

/// One webhook, of this tenant or of any.
pub(crate) async fn get(
    conn: &mut AsyncPgConnection,
    id: Uuid,
    tenant: Option<&str>,
) -> QueryResult<Option<Webhook>> {
    let get = diesel::sql_query(GET)
        .bind::<SqlUuid, _>(id)
        .bind::<Nullable<Text>, _>(tenant);
    let row: Option<WebhookRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(Webhook::from))
}

const TENANT: &str = "SELECT tenant_id FROM webhooks WHERE id = $1 AND ($2 IS NULL OR tenant_id = $2)";

#[derive(QueryableByName)]
struct TenantRow {
    #[diesel(sql_type = Text)]
    tenant_id: String,
}

/// The tenant of a webhook, when it is this one or any.
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

const PATCH: &str = concat!(
    "UPDATE webhooks
     SET tenant_id = coalesce($3, tenant_id), url = coalesce($4, url), enabled = coalesce($5, enabled),
         updated_at = clock_timestamp()
     WHERE id = $1 AND tenant_id = ANY ($2)
     RETURNING ",
    columns!()
);

/// What became of a webhook that was to be changed.
#[derive(Clone, Debug)]
pub(crate) enum Patched {
    Done(Webhook),
    /// The tenants have it no more.
    Gone,
    /// There is no tenant that it could be moved to.
    NoSuchTenant,
}

/// Changes a webhook of one of these tenants, and which of them it belongs to.
pub(crate) async fn patch(
    conn: &mut AsyncPgConnection,
    id: Uuid,
    tenants: &[String],
    patch: &WebhookPatch,
) -> QueryResult<Patched> {
    let update = diesel::sql_query(PATCH)
        .bind::<SqlUuid, _>(id)
        .bind::<Array<Text>, _>(tenants)
        .bind::<Nullable<Text>, _>(patch.tenant_id.as_ref().map(Slug::as_str))
        .bind::<Nullable<Text>, _>(&patch.url)
        .bind::<Nullable<Bool>, _>(patch.enabled);
    match Prepared(update).one::<WebhookRow>(conn).await.optional() {
        Ok(Some(row)) => Ok(Patched::Done(row.into())),
        Ok(None) => Ok(Patched::Gone),
        Err(Error::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, _)) => Ok(Patched::NoSuchTenant),
        Err(error) => Err(error),
    }
}

const DELETE: &str = "DELETE FROM webhooks WHERE id = $1 AND tenant_id = ANY ($2)";

/// Deletes a webhook of one of these tenants. False when they have it no more.
pub(crate) async fn delete(conn: &mut AsyncPgConnection, id: Uuid, tenants: &[String]) -> QueryResult<bool> {
    let delete = diesel::sql_query(DELETE)
        .bind::<SqlUuid, _>(id)
        .bind::<Array<Text>, _>(tenants);
    Ok(Prepared(delete).execute(conn).await? == 1)
}
