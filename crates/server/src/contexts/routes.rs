//! The routes of contexts, and of the configuration that comes out of them.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use diesel_async::AsyncPgConnection;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, FieldError, Locked, Problem, ProblemBody};
use serde_json::Map;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::answer::Answer;
use crate::auth::Access;
use crate::contexts::model::{Context, DeletedContext, NewContext, ResolveQuery, Resolved};
use crate::contexts::resolve::resolve;
use crate::contexts::store::{self, Written};
use crate::failure::Failure;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::versions;
use crate::versions::model::Snapshot;
use crate::workspaces;
use crate::workspaces::model::{ContextPath, InWorkspace, WorkspaceId, WorkspacePath};
use crate::workspaces::write::{self, WorkspaceWrite};

fn no_context() -> Problem {
    Problem::not_found("there is no such context")
}

fn done(written: Written) -> Result<(), Failure> {
    let problem = match written {
        Written::Done => return Ok(()),
        Written::UnknownKeys(keys) => {
            let unknown =
                |key| FieldError::new(format!("overrides.{key}"), "is not in the default configuration");
            Problem::invalid(keys.into_iter().map(unknown))
        }
        Written::NoSuchContext => no_context(),
        Written::NoSuchWorkspace => workspaces::store::no_workspace(),
    };
    Err(problem.into())
}

fn written(id: Uuid, new: &NewContext, version: i64) -> Context {
    let (condition, overrides) = (new.condition.clone(), new.overrides());
    Context {
        id,
        condition,
        overrides,
        priority: new.priority,
        version,
    }
}

/// List the contexts of a workspace
///
/// Those that were made first come first.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/contexts", tag = "contexts",
    operation_id = "list_contexts",
    params(WorkspacePath, PageQuery),
    responses((status = 200, description = "A page of contexts", body = Page<Context>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Context>>, Problem> {
    let id = access.path.workspace();
    let rows = state.read(async |conn| {
        let rows = store::list(conn, id, query.after(), query.rows()).await?;
        if rows.is_empty() {
            workspaces::store::must_exist(conn, id).await?;
        }
        Ok(rows)
    });
    let rows = rows.await?;
    Ok(Json(query.page(rows, |row| row.seq, Context::from)))
}

/// Make a context
///
/// Its overrides must be of keys that are in the default configuration.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/workspaces/{workspace}/contexts", tag = "contexts",
    operation_id = "create_context",
    params(WorkspacePath, WaitPreference, write::Condition, IdempotencyKey), request_body = NewContext,
    responses((status = 201, description = "The new context", body = Context), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<WorkspacePath>, ApiJson<NewContext>>,
) -> Result<Answer, Problem> {
    let id = locked.target.path.workspace();
    let ApiJson(new) = &locked.body;
    let context = Uuid::now_v7();
    let work = async |conn: &mut AsyncPgConnection| done(store::create(conn, id, context, new).await?);
    write::change(&state, &locked, work, |version| {
        Answer::created(&written(context, new, version))
    })
    .await
}

/// Replace a context
///
/// It keeps its place among the others. One that does not exist is not made.
#[utoipa::path(
    put, path = "/v1/tenants/{tenant}/workspaces/{workspace}/contexts/{id}", tag = "contexts",
    operation_id = "put_context",
    params(ContextPath, WaitPreference, write::Condition, IdempotencyKey), request_body = NewContext,
    responses((status = 200, description = "The context as it is now", body = Context), WriteProblems),
)]
pub(crate) async fn put(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<ContextPath>, ApiJson<NewContext>>,
) -> Result<Answer, Problem> {
    let (id, context) = (locked.target.path.workspace(), locked.target.path.id);
    let ApiJson(new) = &locked.body;
    let work = async |conn: &mut AsyncPgConnection| done(store::update(conn, id, context, new).await?);
    write::change(&state, &locked, work, |version| {
        Answer::ok(&written(context, new, version))
    })
    .await
}

/// Delete a context
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/workspaces/{workspace}/contexts/{id}", tag = "contexts",
    operation_id = "delete_context",
    params(ContextPath, WaitPreference, write::Condition, IdempotencyKey),
    responses((status = 200, description = "The context that is gone", body = DeletedContext), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<ContextPath>>,
) -> Result<Answer, Problem> {
    let (id, context) = (locked.target.path.workspace(), locked.target.path.id);
    let work = async |conn: &mut AsyncPgConnection| match store::delete(conn, id, context).await? {
        true => Ok(()),
        false => Err(no_context().into()),
    };
    write::change(&state, &locked, work, |version| {
        Answer::ok(&DeletedContext { id: context, version })
    })
    .await
}

/// The header of a read that the client may have the answer of.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is documentation")]
pub(crate) struct Known {
    /// The entity tag of the version that the client has. When that is still the current one the answer is 304.
    #[param(rename = "If-None-Match", value_type = String, required = false, example = "\"7\"")]
    if_none_match: Option<String>,
}

/// Get the configuration
///
/// For a situation of which nothing is known: the default values, with the overrides of contexts that have no
/// condition.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/config", tag = "config",
    operation_id = "get_config",
    params(WorkspacePath, Known),
    responses(
        (status = 200, description = "The configuration", body = Resolved,
         headers(("ETag" = String, description = "The version, as an entity tag"))),
        (status = 304, description = "The client has the current version",
         headers(("ETag" = String, description = "The version, as an entity tag"))),
        ReadProblems,
    ),
)]
pub(crate) async fn config(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (version, snapshot) = current(&state, access.path.workspace()).await?;
    let tag = write::entity_tag(version);
    let etag = [(
        header::ETAG,
        HeaderValue::try_from(&tag).map_err(Problem::internal)?,
    )];
    if is_known(&headers, &tag) {
        return Ok((StatusCode::NOT_MODIFIED, etag).into_response());
    }
    let values = resolve(snapshot, &Map::new());
    Ok((etag, Json(Resolved { version, values })).into_response())
}

/// Whether `If-None-Match` (RFC 9110, 13.1.2) names the tag. It compares weakly.
fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let lines = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|line| line.to_str().ok());
    lines.into_iter().any(|line| {
        let tags = write::entity_tags(line).unwrap_or_default();
        line.trim() == "*"
            || tags
                .iter()
                .any(|known| known.strip_prefix("W/").unwrap_or(known) == tag)
    })
}

/// Resolve the configuration for a situation
///
/// Of the contexts whose every condition matches, the higher priority wins, then the more conditions, then the
/// later made. It reads, and is never locked.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/workspaces/{workspace}/resolve", tag = "config",
    operation_id = "resolve_config",
    params(WorkspacePath), request_body = ResolveQuery,
    responses(
        (status = 200, description = "The configuration", body = Resolved),
        (status = 413, description = "The body is too large", body = ProblemBody,
         content_type = "application/problem+json"),
        (status = 415, description = "The body is not JSON", body = ProblemBody,
         content_type = "application/problem+json"),
        ReadProblems,
    ),
)]
pub(crate) async fn resolve_for(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
    ApiJson(query): ApiJson<ResolveQuery>,
) -> Result<Json<Resolved>, Problem> {
    let (version, snapshot) = current(&state, access.path.workspace()).await?;
    Ok(Json(Resolved {
        version,
        values: resolve(snapshot, &query.context),
    }))
}

async fn current(state: &AppState, id: WorkspaceId<'_>) -> Result<(i64, Snapshot), Problem> {
    let found = state
        .read(async |conn| Ok(versions::store::current(conn, id).await?))
        .await;
    let (version, snapshot) = found?.ok_or_else(workspaces::store::no_workspace)?;
    let snapshot = match snapshot {
        Some(snapshot) => serde_json::from_value(snapshot).map_err(Problem::internal)?,
        None => Snapshot::default(),
    };
    Ok((version, snapshot))
}
