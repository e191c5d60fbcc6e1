//! The statements of deliveries: events out of the outbox, webhooks as they are when something is sent.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Jsonb, Nullable, SmallInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_storage::Prepared;
use serde_json::Value;
use uuid::Uuid;

/// A tenant that has something.
#[derive(QueryableByName)]
struct TenantRow {
    #[diesel(sql_type = Nullable<Text>)]
    tenant_id: Option<String>,
}

// From tenant to tenant along the index: however many events there are, it reads one of each.
const TENANTS: &str = "
    WITH RECURSIVE waiting (tenant_id) AS (
        SELECT min(tenant_id) FROM leasehold.outbox
        UNION ALL
        SELECT (SELECT min(o.tenant_id) FROM leasehold.outbox o WHERE o.tenant_id > w.tenant_id)
        FROM waiting w WHERE w.tenant_id IS NOT NULL
    )
    SELECT tenant_id FROM waiting WHERE tenant_id IS NOT NULL";

/// The tenants of which there are events.
pub(super) async fn tenants(conn: &mut AsyncPgConnection) -> QueryResult<Vec<String>> {
    let rows: Vec<TenantRow> = Prepared(diesel::sql_query(TENANTS)).load(conn).await?;
    Ok(rows.into_iter().filter_map(|row| row.tenant_id).collect())
}

/// An event and a webhook that is to be told of it, if there is one.
#[derive(Debug, QueryableByName)]
pub(super) struct Taken {
    #[diesel(sql_type = SqlUuid)]
    pub(super) id: Uuid,
    #[diesel(sql_type = Text)]
    pub(super) r#type: String,
    #[diesel(sql_type = Jsonb)]
    pub(super) data: Value,
    #[diesel(sql_type = Timestamptz)]
    pub(super) created_at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    pub(super) webhook: Option<Uuid>,
}

// The disk need not be waited for: a crash undoes all of the transaction, and the events are there again.
const TAKE: &str = "
    WITH event AS MATERIALIZED (
        SELECT seq, id, type, data, created_at, set_config('synchronous_commit', 'off', true) AS commit
        FROM leasehold.outbox
        WHERE tenant_id = $1 ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM leasehold.outbox o USING event e WHERE o.seq = e.seq
    )
    SELECT e.id, e.type, e.data, e.created_at, e.commit, w.id AS webhook
    FROM event e LEFT JOIN webhooks w ON w.tenant_id = $1 AND w.enabled
    ORDER BY e.seq, w.seq";

/// Takes events of a tenant out of the outbox, the oldest that nobody else is taking; each with each of the webhooks
/// that are enabled now, or with none.
pub(super) async fn take(conn: &mut AsyncPgConnection, tenant: &str, events: i64) -> QueryResult<Vec<Taken>> {
    let take = diesel::sql_query(TAKE)
        .bind::<Text, _>(tenant)
        .bind::<BigInt, _>(events);
    Prepared(take).load(conn).await
}

/// Where an event goes, and what signs it.
#[derive(QueryableByName)]
pub(super) struct Receiver {
    #[diesel(sql_type = Text)]
    pub(super) url: String,
    #[diesel(sql_type = Text)]
    pub(super) secret: String,
    /// Seconds since 1970, now.
    #[diesel(sql_type = BigInt)]
    pub(super) now: i64,
}

const RECEIVER: &str = "
    SELECT url, secret, floor(extract(epoch FROM clock_timestamp()))::bigint AS now
    FROM webhooks WHERE id = $1 AND tenant_id = $2 AND enabled";

/// A webhook of a tenant, if it is still there and enabled.
pub(super) async fn receiver(
    conn: &mut AsyncPgConnection,
    webhook: Uuid,
    tenant: &str,
) -> QueryResult<Option<Receiver>> {
    let find = diesel::sql_query(RECEIVER)
        .bind::<SqlUuid, _>(webhook)
        .bind::<Text, _>(tenant);
    Prepared(find).one(conn).await.optional()
}

const DISABLE: &str = "
    UPDATE webhooks SET enabled = false, updated_at = clock_timestamp()
    WHERE id = $1 AND tenant_id = $2 AND url = $3 AND enabled";

/// Disables a webhook of a tenant that has this URL. False when it was disabled already, has another URL, or is not
/// there.
pub(super) async fn disable(
    conn: &mut AsyncPgConnection,
    webhook: Uuid,
    tenant: &str,
    url: &str,
) -> QueryResult<bool> {
    let disable = diesel::sql_query(DISABLE)
        .bind::<SqlUuid, _>(webhook)
        .bind::<Text, _>(tenant)
        .bind::<Text, _>(url);
    Ok(Prepared(disable).execute(conn).await? == 1)
}

/// A webhook to look at.
#[derive(Debug, QueryableByName)]
pub(super) struct Enabled {
    #[diesel(sql_type = SqlUuid)]
    pub(super) id: Uuid,
    #[diesel(sql_type = Text)]
    pub(super) tenant_id: String,
    #[diesel(sql_type = Text)]
    pub(super) url: String,
    #[diesel(sql_type = BigInt)]
    pub(super) seq: i64,
}

const ENABLED: &str = "
    SELECT id, tenant_id, url, seq FROM webhooks WHERE enabled AND seq > $1 ORDER BY seq LIMIT $2";

/// A page of the webhooks that are enabled, of all tenants.
pub(super) async fn enabled(
    conn: &mut AsyncPgConnection,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<Enabled>> {
    let list = diesel::sql_query(ENABLED)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

// A URL that was changed meanwhile was not looked at.
const RECORD: &str = "
    UPDATE webhooks SET last_checked_at = clock_timestamp(), last_status = $4
    WHERE id = $1 AND tenant_id = $2 AND url = $3";

/// Records what was found behind a webhook's URL.
pub(super) async fn record(
    conn: &mut AsyncPgConnection,
    webhook: &Enabled,
    status: Option<i16>,
) -> QueryResult<()> {
    let record = diesel::sql_query(RECORD)
        .bind::<SqlUuid, _>(webhook.id)
        .bind::<Text, _>(&webhook.tenant_id)
        .bind::<Text, _>(&webhook.url)
        .bind::<Nullable<SmallInt>, _>(status);
    Prepared(record).execute(conn).await.map(|_| ())
}
