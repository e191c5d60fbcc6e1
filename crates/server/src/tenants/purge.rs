//! The purge: everything that a tenant owns, gone at once, and counted.
//!
//! It has the tenant's gate for itself: writes that were under way have ended, new ones are refused until it has
//! committed. So what it counts is all there was, and nothing of it comes back. The tenant stays, with its keys, the
//! record of locks that were taken away, and the numbers of its tokens, which only rise.

use std::time::Duration;

use axum::extract::State;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Text};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::openapi::{IdempotencyKey, WriteProblems};
use leasehold_http::{NoBody, Problem};
use leasehold_storage::Prepared;
use serde::Serialize;
use utoipa::ToSchema;

use crate::answer::Answer;
use crate::auth::{Access, Manage};
use crate::idempotency::Sent;
use crate::state::AppState;
use crate::tenants::model::TenantPath;

/// What a purge did.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Purged {
    /// The tenant.
    pub tenant_id: String,
    /// How many rows went, by table.
    pub deleted: Deleted,
    /// How long it took to have the tenant alone, in milliseconds: to get there, and to wait for writes that were under
    /// way.
    pub waited_ms: u64,
}

/// How many rows of each table were deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Deleted {
    /// Versions of workspaces.
    pub versions: i64,
    /// Contexts.
    pub contexts: i64,
    /// Keys of default configurations.
    pub default_config: i64,
    /// Workspaces.
    pub workspaces: i64,
    /// Feedback records.
    pub feedback_records: i64,
    /// Webhooks.
    pub webhooks: i64,
    /// Work that was still to be done.
    pub work_items: i64,
    /// Work that was given up.
    pub dead_letters: i64,
    /// Events that were not handed on yet.
    pub outbox: i64,
    /// Answers that were kept to be given again.
    pub idempotency_keys: i64,
}

/// Delete everything that a tenant owns
///
/// Writes that are under way are waited for, up to a bound; new ones are refused meanwhile. The tenant itself stays,
/// with its keys. Needs an admin's key.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/data", tag = "tenants", operation_id = "purge_tenant",
    params(TenantPath, IdempotencyKey),
    responses((status = 200, description = "What was deleted", body = Purged), WriteProblems),
)]
pub(crate) async fn purge(
    State(state): State<AppState>,
    access: Access<TenantPath, Manage>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let tenant = access.path.tenant.as_str();
    let timeout = state.settings().purge_wait;
    let work = async |conn: &mut AsyncPgConnection, waited: Duration| {
        let purged = Purged {
            tenant_id: tenant.to_owned(),
            deleted: delete_all(conn, tenant).await?,
            waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        };
        Answer::ok(&purged)
    };
    let answer = state.drained(&once, tenant, timeout, work).await?;
    tracing::warn!(tenant, by = access.caller.subject, "a tenant's data was removed");
    Ok(answer)
}

/// Makes the statement that deletes the rows of a tenant and counts them.
macro_rules! delete_from {
    ($table:literal) => {
        concat!(
            "WITH gone AS (DELETE FROM ",
            $table,
            " WHERE tenant_id = $1 RETURNING true) SELECT count(*) AS deleted FROM gone"
        )
    };
}

const DELETE_WORKSPACES: &str = "
    WITH gone AS (
        DELETE FROM workspaces WHERE tenant_id = $1 RETURNING workspace_lock_fencing_token AS token
    )
    SELECT count(*) AS deleted, coalesce(max(token), 0) AS token FROM gone";

// A workspace of the same name gets higher tokens than the one that is gone.
const RAISE_TOKEN_FLOOR: &str = "SELECT leasehold.raise_token_floor($1)";

/// Children go before their parents: what a parent takes along is not counted. The floor of tokens comes last: it is one
/// row for all tenants.
async fn delete_all(conn: &mut AsyncPgConnection, tenant: &str) -> QueryResult<Deleted> {
    let versions = delete(conn, delete_from!("versions"), tenant).await?;
    let contexts = delete(conn, delete_from!("contexts"), tenant).await?;
    let default_config = delete(conn, delete_from!("default_config"), tenant).await?;
    let workspaces = diesel::sql_query(DELETE_WORKSPACES).bind::<Text, _>(tenant);
    let workspaces: Workspaces = Prepared(workspaces).one(conn).await?;
    let deleted = Deleted {
        versions,
        contexts,
        default_config,
        workspaces: workspaces.deleted,
        feedback_records: delete(conn, delete_from!("feedback_records"), tenant).await?,
        webhooks: delete(conn, delete_from!("webhooks"), tenant).await?,
        work_items: delete(conn, delete_from!("leasehold.work_items"), tenant).await?,
        dead_letters: delete(conn, delete_from!("leasehold.dead_letters"), tenant).await?,
        outbox: delete(conn, delete_from!("leasehold.outbox"), tenant).await?,
        idempotency_keys: delete(conn, delete_from!("idempotency_keys"), tenant).await?,
    };
    let raise = diesel::sql_query(RAISE_TOKEN_FLOOR).bind::<BigInt, _>(workspaces.token);
    Prepared(raise).execute(conn).await?;
    Ok(deleted)
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    deleted: i64,
}

#[derive(QueryableByName)]
struct Workspaces {
    #[diesel(sql_type = BigInt)]
    deleted: i64,
    #[diesel(sql_type = BigInt)]
    token: i64,
}

async fn delete(conn: &mut AsyncPgConnection, sql: &'static str, tenant: &str) -> QueryResult<i64> {
    let delete = diesel::sql_query(sql).bind::<Text, _>(tenant);
    let row: Count = Prepared(delete).one(conn).await?;
    Ok(row.deleted)
}
