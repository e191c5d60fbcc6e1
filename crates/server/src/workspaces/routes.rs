//! The routes of workspaces and of their locks.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::request::Parts;
use axum::response::IntoResponse;
use leasehold_domain::{DistributedLock, HeldLock, LockRequest};
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, Code, Early, LockTarget, LockView, Locked, Problem};

use crate::answer::Answer;
use crate::auth::{Access, Manage, Write};
use crate::idempotency::Sent;
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
    params(TenantPath, IdempotencyKey), request_body = NewWorkspace,
    responses((status = 201, description = "The new workspace", body = Workspace), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    access: Access<TenantPath, Write>,
    Sent { body, once }: Sent<ApiJson<NewWorkspace>>,
) -> Result<Answer, Problem> {
    let (tenant, ApiJson(new)) = (access.path.tenant.as_str(), body);
    state
        .gated(&once, &[tenant], async |conn| {
            match store::create(conn, tenant, &new).await? {
                Created::Done(workspace) => Answer::created(&workspace),
                Created::NameTaken => {
                    let detail = "the tenant has a workspace of that name";
                    Err(Problem::new(Code::AlreadyExists, detail).into())
                }
                Created::NoSuchTenant => Err(tenants::routes::no_tenant().into()),
            }
        })
        .await
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
    current(&state, access.path.workspace()).await.map(Json)
}

/// Change a workspace's description
///
/// Under the workspace's lock, like every write, but it makes no version. One that changes nothing takes no lock, and
/// is not kept for its idempotency key either.
#[utoipa::path(
    patch, path = "/v1/tenants/{tenant}/workspaces/{workspace}", tag = "workspaces",
    operation_id = "update_workspace",
    params(WorkspacePath, WaitPreference, write::Condition, IdempotencyKey), request_body = WorkspacePatch,
    responses((status = 200, description = "The workspace as it is now", body = Workspace), WriteProblems),
)]
pub(crate) async fn patch(
    State(state): State<AppState>,
    locked: Locked<Change, ApiJson<WorkspacePatch>>,
) -> Result<Answer, Problem> {
    let Change(write) = &locked.target;
    let ApiJson(WorkspacePatch { description }) = &locked.body;
    let description = description.as_ref().and_then(Option::as_deref);
    write
        .touch(&state, &locked.guard, async |conn| {
            let changed = store::patch(conn, write.path.workspace(), description).await?;
            Answer::ok(&changed.ok_or_else(store::no_workspace)?)
        })
        .await
}

/// A change of a workspace itself: one that changes nothing needs no lock, and is answered before.
#[derive(Debug)]
pub(crate) struct Change(WorkspaceWrite<WorkspacePath>);

type Patch = ApiJson<WorkspacePatch>;

impl LockTarget<AppState, Patch> for Change {
    const CONFLICT: Code = Code::WorkspaceLocked;

    async fn authorize(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        <WorkspaceWrite<_> as LockTarget<_, Patch>>::authorize(parts, state)
            .await
            .map(Self)
    }

    async fn admit(&self, body: &Patch, state: &AppState) -> Result<(), Early> {
        let Self(write) = self;
        write.admit(body, state).await?;
        let ApiJson(WorkspacePatch { description }) = body;
        if description.is_some() {
            return Ok(());
        }
        let workspace = current(state, write.path.workspace()).await?;
        write.admits(workspace.version)?;
        Err(Early::Answer(Box::new(Json(workspace).into_response())))
    }

    fn lock(&self, state: &AppState) -> Arc<dyn DistributedLock> {
        LockTarget::<_, Patch>::lock(&self.0, state)
    }

    fn request(&self, body: &Patch, state: &AppState) -> Result<LockRequest, Problem> {
        self.0.request(body, state)
    }

    fn max_wait(&self, state: &AppState) -> Duration {
        LockTarget::<_, Patch>::max_wait(&self.0, state)
    }
}

/// Delete a workspace
///
/// With its configuration and all its versions.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/workspaces/{workspace}", tag = "workspaces",
    operation_id = "delete_workspace",
    params(WorkspacePath, WaitPreference, write::Condition, IdempotencyKey),
    responses((status = 204, description = "It is gone"), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<WorkspacePath>>,
) -> Result<Answer, Problem> {
    let write = &locked.target;
    let id = write.path.workspace();
    match state.workspace_lock() {
        // The fence of a lease is in the row that goes away, so the statement that removes it is the fence.
        WorkspaceLock::Lease(_) => {
            let lock_id = locked.guard.lock_id().as_uuid();
            let removing = state.db().removing(&locked.guard);
            // An answer from before may be given again, and then the row stays.
            let mut removed = false;
            let answer = state
                .gated(&write.once, &[id.tenant], async |conn| {
                    write.check_version(conn).await?;
                    removed = store::delete(conn, id, Some(lock_id)).await?;
                    match removed {
                        true => Ok(Answer::no_content()),
                        false => Err(Problem::lock_lost().into()),
                    }
                })
                .await?;
            if removed {
                removing.committed();
            }
            Ok(answer)
        }
        WorkspaceLock::Advisory(_) => {
            write
                .touch(&state, &locked.guard, async |conn| {
                    match store::delete(conn, id, None).await? {
                        true => Ok(Answer::no_content()),
                        false => Err(store::no_workspace().into()),
                    }
                })
                .await
        }
    }
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
    tracing::warn!(lock = name.to_string(), by, reason = force.reason, lock_id = ?ended.lock_id, "a lock was taken away");
    Ok(Json(LockView::from(&ended)))
}

/// The workspace with its lock.
async fn current(state: &AppState, id: WorkspaceId<'_>) -> Result<Workspace, Problem> {
    let found = state.read(async |conn| Ok(store::get(conn, id).await?)).await?;
    let mut workspace = found.ok_or_else(store::no_workspace)?;
    if let WorkspaceLock::Advisory(_) = state.workspace_lock() {
        // No row knows of it.
        workspace.workspace_lock = held(state, id).await?.as_ref().map(LockView::from);
    }
    Ok(workspace)
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
