//! The routes of feedback records.

use axum::Json;
use axum::extract::State;
use diesel_async::AsyncPgConnection;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, NoBody, Problem};
use leasehold_storage::TenantGate;
use uuid::Uuid;

use crate::answer::Answer;
use crate::auth::{Access, Manage, NoTenant, Write};
use crate::failure::Failure;
use crate::feedback_records::erasure;
use crate::feedback_records::model::{
    Erased, Erasure, FeedbackRecord, FeedbackRecordFilter, FeedbackRecordPatch, FeedbackRecordPath,
    NewFeedbackRecord,
};
use crate::feedback_records::store::{self, Created};
use crate::idempotency::Sent;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::tenants::owner;
use crate::tenants::routes::no_tenant;

fn no_record() -> Problem {
    Problem::not_found("there is no such feedback record")
}

/// Make a feedback record
///
/// A key for all tenants must say which one it is for.
#[utoipa::path(
    post, path = "/v1/feedback-records", tag = "feedback-records", operation_id = "create_feedback_record",
    params(IdempotencyKey), request_body = NewFeedbackRecord,
    responses((status = 201, description = "The new feedback record", body = FeedbackRecord), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    access: Access<NoTenant, Write>,
    Sent { body, once }: Sent<ApiJson<NewFeedbackRecord>>,
) -> Result<Answer, Problem> {
    let ApiJson(new) = body;
    let tenant = owner::of_new(&access.caller, new.tenant_id.as_ref())?;
    let id = Uuid::now_v7();
    let make = async |conn: &mut AsyncPgConnection| make(conn, tenant, id, &new).await;
    if once.has_key() {
        state.gated(&once, &[tenant], make).await
    } else {
        state.autocommitted(make).await
    }
}

async fn make(
    conn: &mut AsyncPgConnection,
    tenant: &str,
    id: Uuid,
    new: &NewFeedbackRecord,
) -> Result<Answer, Failure> {
    match store::create(conn, tenant, id, new).await? {
        Created::Done(record) => Answer::created(&record),
        Created::Refused => Err(Problem::from(TenantGate::refused(tenant)).into()),
        Created::NoSuchTenant => Err(no_tenant().into()),
    }
}

/// List feedback records
///
/// Oldest first, of all tenants that the key may see.
#[utoipa::path(
    get, path = "/v1/feedback-records", tag = "feedback-records", operation_id = "list_feedback_records",
    params(FeedbackRecordFilter, PageQuery),
    responses((status = 200, description = "A page of feedback records", body = Page<FeedbackRecord>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<NoTenant>,
    ApiQuery(filter): ApiQuery<FeedbackRecordFilter>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<FeedbackRecord>>, Problem> {
    let tenant = owner::seen(&access.caller, filter.tenant_id.as_ref())?;
    let rows = state.read(async |conn| {
        let rows = store::list(conn, tenant, &filter, query.after(), query.rows()).await?;
        if rows.is_empty() {
            owner::must_exist(conn, tenant).await?;
        }
        Ok(rows)
    });
    let rows = rows.await?;
    Ok(Json(query.page(rows, |row| row.seq, FeedbackRecord::from)))
}

/// Get a feedback record
#[utoipa::path(
    get, path = "/v1/feedback-records/{id}", tag = "feedback-records", operation_id = "get_feedback_record",
    params(FeedbackRecordPath),
    responses((status = 200, description = "The feedback record", body = FeedbackRecord), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<FeedbackRecordPath>,
) -> Result<Json<FeedbackRecord>, Problem> {
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    let found = state
        .read(async |conn| Ok(store::get(conn, id, only).await?))
        .await;
    found?.map(Json).ok_or_else(no_record)
}

/// Change a feedback record
///
/// What is left out stays; when all is left out, nothing is written.
#[utoipa::path(
    patch, path = "/v1/feedback-records/{id}", tag = "feedback-records", operation_id = "update_feedback_record",
    params(FeedbackRecordPath, IdempotencyKey), request_body = FeedbackRecordPatch,
    responses(
        (status = 200, description = "The feedback record as it is now", body = FeedbackRecord),
        WriteProblems,
    ),
)]
pub(crate) async fn patch(
    State(state): State<AppState>,
    access: Access<FeedbackRecordPath, Write>,
    Sent { body, once }: Sent<ApiJson<FeedbackRecordPatch>>,
) -> Result<Answer, Problem> {
    let ApiJson(patch) = body;
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    if patch.is_empty() {
        let read = async |conn: &mut AsyncPgConnection| {
            let record = store::get(conn, id, only).await?;
            Answer::ok(&record.ok_or_else(no_record)?)
        };
        return state.read(read).await;
    }
    let tenants = async |conn: &mut AsyncPgConnection| Ok(vec![must_find(conn, id, only).await?]);
    let write = async |conn: &mut AsyncPgConnection, tenants: &[String]| {
        if let Some(record) = store::patch(conn, id, tenants, &patch).await? {
            return Answer::ok(&record);
        }
        must_find(conn, id, only).await?;
        Err(owner::moved().into())
    };
    state.gated_row(&once, tenants, write).await
}

/// Delete a feedback record
#[utoipa::path(
    delete, path = "/v1/feedback-records/{id}", tag = "feedback-records", operation_id = "delete_feedback_record",
    params(FeedbackRecordPath, IdempotencyKey),
    responses((status = 204, description = "It is gone"), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    access: Access<FeedbackRecordPath, Write>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    let tenants = async |conn: &mut AsyncPgConnection| Ok(vec![must_find(conn, id, only).await?]);
    let write = async |conn: &mut AsyncPgConnection, tenants: &[String]| {
        if store::delete(conn, id, tenants).await? {
            return Ok(Answer::no_content());
        }
        must_find(conn, id, only).await?;
        Err(owner::moved().into())
    };
    state.gated_row(&once, tenants, write).await
}

/// The tenant of a feedback record, if the caller may see it.
async fn must_find(conn: &mut AsyncPgConnection, id: Uuid, only: Option<&str>) -> Result<String, Failure> {
    let tenant = store::tenant(conn, id, only).await?;
    Ok(tenant.ok_or_else(no_record)?)
}

/// Erase a user
///
/// Deletes everything that there is of a user in all tenants that the key may see, or in one of them: all of it, or
/// nothing when one of these tenants takes no writes. Answers to these tenants that are kept to be given again tell
/// nothing more of the user. Needs an admin's key.
#[utoipa::path(
    delete, path = "/v1/feedback-records", tag = "feedback-records", operation_id = "erase_user",
    params(Erasure, IdempotencyKey),
    responses((status = 200, description = "What was erased", body = Erased), WriteProblems),
)]
pub(crate) async fn erase(
    State(state): State<AppState>,
    access: Access<NoTenant, Manage>,
    ApiQuery(erasure): ApiQuery<Erasure>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let tenant = owner::seen(&access.caller, erasure.tenant_id.as_ref())?;
    erasure::erase(&state, &once, &erasure.user_id, tenant).await
}
