//! The routes of workspaces and of their locks.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use leasehold_domain::HeldLock;
use leasehold_http::openapi::{ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, Code, LockView, Locked, Problem};

use crate::auth::{Access, Manage, Write};
use crate::paging::{Page, PageQuery};
use crate::state::{AppState, WorkspaceLock, workspace_lock_name};
use crate::tenants;
use crate::tenants::model::TenantPath;
use crate::workspaces::model::{
    ForceQuery, InWorkspace, NewWorkspace, Workspace, WorkspaceId, WorkspacePatch, WorkspacePath,
};
use crate::workspaces::store::{self, Created};
use crate::workspaces::write::{self, WorkspaceWrite};

/// List the workspaces of a tenant
///
/// Oldest first. Whether one is locked is told by its own resource.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces", tag = "workspaces", operation_id = "list_workspaces",
    params(TenantPath, PageQuery),
    responses((status = 200, description = "A page of workspaces", body = Page<Workspace>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<TenantPath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Workspace>>, Problem> {
    let tenant = access.path.tenant.as_str();
    let rows = state
        .read(async |conn| Ok(store::list(conn, tenant, query.after(), query.rows()).await?))
        .await;
    let rows = rows?;
    Ok(Json(query.page(rows, |row| row.seq, Workspace::from)))
}

/// Make a workspace
///
/// It begins empty, with version 0.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/workspaces", tag = "workspaces", operation_id = "create_workspace",
    params(TenantPath), request_body = NewWorkspace,
    responses((status = 201, description = "The new workspace", body = Workspace), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    access: Access<TenantPath, Write>,
    ApiJson(new): ApiJson<NewWorkspace>,
) -> Result<(StatusCode, Json<Workspace>), Problem> {
    let tenant = access.path.tenant.as_str();
    let made = state.write(async |conn| match store::create(conn, tenant, &new).await? {
        Created::Done(workspace) => Ok(*workspace),
        Created::NameTaken => {
            Err(Problem::new(Code::AlreadyExists, "the tenant has a workspace of that name").into())
        }
        Created::NoSuchTenant => Err(tenants::routes::no_tenant().into()),
    });
    let workspace = made.await?;
    Ok((StatusCode::CREATED, Json(workspace)))
}

/// Get a workspace
///
/// `workspace_lock` tells who holds it, and is absent when nobody does.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}", tag = "workspaces", operation_id = "get_workspace",
    params(WorkspacePath),
    responses((status = 200, description = "The workspace", body = Workspace), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
) -> Result<Json<Workspace>, Problem> {
    let id = access.path.workspace();
    let found = state.read(async |conn| Ok(store::get(conn, id).await?)).await?;
    let mut workspace = found.ok_or_else(store::no_workspace)?;
    if let WorkspaceLock::Advisory(_) = state.workspace_lock() {
        // No row knows of it.
        workspace.workspace_lock = held(&state, id).await?.as_ref().map(LockView::from);
    }
    Ok(Json(workspace))
}

/// Change a workspace's description
///
/// Under the workspace's lock, like every write, but it makes no version.
#[utoipa::path(
    patch, path = "/v1/tenants/{tenant}/workspaces/{workspace}", tag = "workspaces",
    operation_id = "update_workspace",
    params(WorkspacePath, WaitPreference, write::Condition), request_body = WorkspacePatch,
    responses((status = 200, description = "The workspace as it is now", body = Workspace), WriteProblems),
)]
pub(crate) async fn patch(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<WorkspacePath>, ApiJson<WorkspacePatch>>,
) -> Result<Json<Workspace>, Problem> {
    let id = locked.target.path.workspace();
    let ApiJson(patch) = &locked.body;
    let done = write::touch(&state, &locked, async |conn| {
        store::patch(conn, id, patch)
            .await?
            .ok_or_else(|| store::no_workspace().into())
    });
    Ok(Json(done.await?))
}

/// Delete a workspace
///
/// With its configuration and all its versions.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/workspaces/{workspace}", tag = "workspaces",
    operation_id = "delete_workspace",
    params(WorkspacePath, WaitPreference, write::Condition),
    responses((status = 204, description = "It is gone"), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<WorkspacePath>>,
) -> Result<StatusCode, Problem> {
    let id = locked.target.path.workspace();
    match state.workspace_lock() {
        // The fence of a lease is in the row that goes away, so the statement that removes it is the fence.
        WorkspaceLock::Lease(_) => {
            let lock_id = locked.guard.lock_id().as_uuid();
            let deleted = state.write(async |conn| {
                locked.target.check_version(conn).await?;
                match store::delete(conn, id, Some(lock_id)).await? {
                    true => Ok(()),
                    false => Err(Problem::lock_lost().into()),
                }
            });
            deleted.await?;
        }
        WorkspaceLock::Advisory(_) => {
            write::touch(&state, &locked, async |conn| {
                match store::delete(conn, id, None).await? {
                    true => Ok(()),
                    false => Err(store::no_workspace().into()),
                }
            })
            .await?;
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Get the lock of a workspace
///
/// 404 when nobody holds it.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/lock", tag = "workspaces",
    operation_id = "get_workspace_lock",
    params(WorkspacePath),
    responses((status = 200, description = "Who holds it", body = LockView), ReadProblems),
)]
pub(crate) async fn get_lock(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
) -> Result<Json<LockView>, Problem> {
    let held = held(&state, access.path.workspace()).await?;
    held.as_ref()
        .map(|held| Json(LockView::from(held)))
        .ok_or_else(no_lock)
}

/// Take the lock of a workspace away
///
/// What its holder was writing cannot commit any more. Who did it and why is kept on record.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/workspaces/{workspace}/lock", tag = "workspaces",
    operation_id = "force_release_workspace_lock",
    params(WorkspacePath, ForceQuery),
    responses((status = 200, description = "The lock that was ended", body = LockView), WriteProblems),
)]
pub(crate) async fn force_release(
    State(state): State<AppState>,
    access: Access<WorkspacePath, Manage>,
    ApiQuery(force): ApiQuery<ForceQuery>,
) -> Result<Json<LockView>, Problem> {
    let id = access.path.workspace();
    let name = workspace_lock_name(id.tenant, id.name)?;
    let by = &access.caller.subject;
    let ended = match state.workspace_lock() {
        WorkspaceLock::Lease(lock) => lock.force_release(&name, by, &force.reason).await?,
        WorkspaceLock::Advisory(lock) => lock.force_release(&name, by, &force.reason).await?,
    };
    let ended = ended.ok_or_else(no_lock)?;
    tracing::warn!(lock = %name, by, reason = force.reason, lock_id = ?ended.lock_id, "a lock was taken away");
    Ok(Json(LockView::from(&ended)))
}

async fn held(state: &AppState, id: WorkspaceId<'_>) -> Result<Option<HeldLock>, Problem> {
    Ok(state
        .locks()
        .inspect(&workspace_lock_name(id.tenant, id.name)?)
        .await?)
}

fn no_lock() -> Problem {
    Problem::not_found("nobody holds the workspace")
}
