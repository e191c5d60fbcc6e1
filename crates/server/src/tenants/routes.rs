//! The routes of tenants.

use axum::Json;
use axum::extract::State;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, Code, FieldError, NoBody, Problem};

use crate::answer::Answer;
use crate::auth::{Access, NoTenant, Operate};
use crate::idempotency::Sent;
use crate::locks::model::names_of;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::tenants::model::{NewTenant, Tenant, TenantPath};
use crate::tenants::store::{self, Deleted};

pub(crate) fn no_tenant() -> Problem {
    Problem::not_found("there is no such tenant")
}

/// List the tenants
///
/// Oldest first. A key of one tenant sees that one only.
#[utoipa::path(
    get, path = "/v1/tenants", tag = "tenants", operation_id = "list_tenants",
    params(PageQuery),
    responses((status = 200, description = "A page of tenants", body = Page<Tenant>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<NoTenant>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Tenant>>, Problem> {
    let only = access.caller.tenant.as_deref();
    let rows = state
        .read(async |conn| Ok(store::list(conn, only, query.after(), query.rows()).await?))
        .await;
    let rows = rows?;
    Ok(Json(query.page(rows, |row| row.seq, Tenant::from)))
}

/// Make a tenant
///
/// Needs an admin's key for all tenants.
#[utoipa::path(
    post, path = "/v1/tenants", tag = "tenants", operation_id = "create_tenant",
    params(IdempotencyKey), request_body = NewTenant,
    responses((status = 201, description = "The new tenant", body = Tenant), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    _: Access<NoTenant, Operate>,
    Sent { body, once }: Sent<ApiJson<NewTenant>>,
) -> Result<Answer, Problem> {
    let ApiJson(new) = body;
    state
        .ungated(&once, async |conn| match store::create(conn, &new).await? {
            Some(tenant) => Answer::created(&tenant),
            None => Err(Problem::new(Code::AlreadyExists, "there is a tenant with that id").into()),
        })
        .await
}

/// Get a tenant
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}", tag = "tenants", operation_id = "get_tenant",
    params(TenantPath),
    responses((status = 200, description = "The tenant", body = Tenant), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<TenantPath>,
) -> Result<Json<Tenant>, Problem> {
    let id = access.path.tenant.as_str();
    let found = state.read(async |conn| Ok(store::get(conn, id).await?)).await;
    found?.map(Json).ok_or_else(no_tenant)
}

/// Delete a tenant
///
/// Only one that owns nothing; its keys go with it, and the locks that its clients hold. Needs an admin's key for all tenants.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}", tag = "tenants", operation_id = "delete_tenant",
    params(TenantPath, IdempotencyKey),
    responses((status = 204, description = "It is gone"), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    access: Access<TenantPath, Operate>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let id = access.path.tenant.as_str();
    let locks = names_of(id)?;
    let timeout = state.settings().purge_wait;
    state
        .drained(&once, id, timeout, async |conn, _| {
            match store::delete(conn, id, &locks).await? {
                Deleted::Done => Ok(Answer::no_content()),
                Deleted::OwnsSomething => {
                    let detail = "owns something: purge its data first";
                    Err(Problem::invalid([FieldError::new("tenant", detail)]).into())
                }
                Deleted::NoSuchTenant => Err(no_tenant().into()),
            }
        })
        .await
}
