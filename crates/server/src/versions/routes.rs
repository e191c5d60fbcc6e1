//! The routes of versions.

use axum::Json;
use axum::extract::State;
use diesel_async::AsyncPgConnection;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiQuery, Locked, Problem};

use crate::answer::Answer;
use crate::auth::Access;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::versions::model::{NewVersion, Snapshot, Version, VersionWithSnapshot};
use crate::versions::store;
use crate::workspaces;
use crate::workspaces::model::{InWorkspace, VersionPath, WorkspacePath};
use crate::workspaces::write::{self, WorkspaceWrite};

fn no_version() -> Problem {
    Problem::not_found("there is no such version")
}

/// List the versions of a workspace
///
/// Oldest first, without their snapshots.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/versions", tag = "versions",
    operation_id = "list_versions",
    params(WorkspacePath, PageQuery),
    responses((status = 200, description = "A page of versions", body = Page<Version>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Version>>, Problem> {
    let id = access.path.workspace();
    let rows = state.read(async |conn| {
        let rows = store::list(conn, id, query.after(), query.rows()).await?;
        if rows.is_empty() {
            workspaces::store::must_exist(conn, id).await?;
        }
        Ok(rows)
    });
    let rows = rows.await?;
    Ok(Json(query.page(rows, |row| row.version, Version::from)))
}

/// Get a version
///
/// With the whole configuration as it was then.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/versions/{n}", tag = "versions",
    operation_id = "get_version",
    params(VersionPath),
    responses((status = 200, description = "The version", body = VersionWithSnapshot), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<VersionPath>,
) -> Result<Json<VersionWithSnapshot>, Problem> {
    let id = access.path.workspace();
    let found = state
        .read(async |conn| Ok(store::get(conn, id, access.path.n).await?))
        .await;
    let (version, snapshot) = found?.ok_or_else(no_version)?;
    let snapshot = serde_json::from_value::<Snapshot>(snapshot).map_err(Problem::internal)?;
    Ok(Json(VersionWithSnapshot { version, snapshot }))
}

/// Go back to a version
///
/// Makes a new version that is equal to the old one.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/workspaces/{workspace}/versions/{n}/restore", tag = "versions",
    operation_id = "restore_version",
    params(VersionPath, WaitPreference, write::Condition, IdempotencyKey),
    responses((status = 200, description = "The version that was made", body = NewVersion), WriteProblems),
)]
pub(crate) async fn restore(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<VersionPath>>,
) -> Result<Answer, Problem> {
    let (id, n) = (locked.target.path.workspace(), locked.target.path.n);
    let work = async |conn: &mut AsyncPgConnection| match store::restore(conn, id, n).await? {
        true => Ok(()),
        false => Err(no_version().into()),
    };
    write::change(&state, &locked, work, |version| {
        Answer::ok(&NewVersion { version })
    })
    .await
}
