//! The routes of default configuration.

use axum::Json;
use axum::extract::State;
use diesel_async::AsyncPgConnection;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, FieldError, Locked, Problem};

use crate::answer::Answer;
use crate::auth::Access;
use crate::default_config::batch::{self, Put};
use crate::default_config::model::{Batch, BatchDone, DeletedKey, Entry, NewValue};
use crate::default_config::store;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::workspaces;
use crate::workspaces::model::{BatchPath, InWorkspace, KeyPath, WorkspacePath};
use crate::workspaces::write::{self, WorkspaceWrite};

fn no_key() -> Problem {
    Problem::not_found("there is no such key")
}

/// List the default configuration
///
/// The keys that were made first come first.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config", tag = "default-config",
    operation_id = "list_default_config",
    params(WorkspacePath, PageQuery),
    responses((status = 200, description = "A page of keys", body = Page<Entry>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<WorkspacePath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Entry>>, Problem> {
    let id = access.path.workspace();
    let rows = state.read(async |conn| {
        let rows = store::list(conn, id, query.after(), query.rows()).await?;
        if rows.is_empty() {
            workspaces::store::must_exist(conn, id).await?;
        }
        Ok(rows)
    });
    let rows = rows.await?;
    Ok(Json(query.page(rows, |row| row.seq, Entry::from)))
}

/// Get a key
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/{key}", tag = "default-config",
    operation_id = "get_default_config",
    params(KeyPath),
    responses((status = 200, description = "The key with its value", body = Entry), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<KeyPath>,
) -> Result<Json<Entry>, Problem> {
    let (id, key) = (access.path.workspace(), access.path.key.as_str());
    let found = state
        .read(async |conn| Ok(store::get(conn, id, key).await?))
        .await;
    found?.map(Json).ok_or_else(no_key)
}

/// Put a key
///
/// Makes it, or replaces it; either makes one version, also when the value stays the same.
#[utoipa::path(
    put, path = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/{key}", tag = "default-config",
    operation_id = "put_default_config",
    params(KeyPath, WaitPreference, write::Condition, IdempotencyKey), request_body = NewValue,
    responses((status = 200, description = "The key with its value", body = Entry), WriteProblems),
)]
pub(crate) async fn put(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<KeyPath>, ApiJson<NewValue>>,
) -> Result<Answer, Problem> {
    let (id, key) = (locked.target.path.workspace(), locked.target.path.key.as_str());
    let ApiJson(NewValue { value, description }) = &locked.body;
    let put = Put {
        key,
        value,
        description: description.as_deref(),
    };
    let work = async |conn: &mut AsyncPgConnection| match store::put(conn, id, put).await? {
        true => Ok(()),
        false => Err(workspaces::store::no_workspace().into()),
    };
    write::change(&state, &locked, work, |version| {
        Answer::ok(&Entry {
            key: key.to_owned(),
            value: value.clone(),
            description: description.clone(),
            version,
        })
    })
    .await
}

/// Delete a key
///
/// A key that a context overrides cannot be deleted.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/{key}", tag = "default-config",
    operation_id = "delete_default_config",
    params(KeyPath, WaitPreference, write::Condition, IdempotencyKey),
    responses((status = 200, description = "The key that is gone", body = DeletedKey), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<KeyPath>>,
) -> Result<Answer, Problem> {
    let (id, key) = (locked.target.path.workspace(), locked.target.path.key.as_str());
    let work = async |conn: &mut AsyncPgConnection| {
        let present = store::present(conn, id, &[key]).await?;
        if present.overridden.contains(key) {
            return Err(Problem::invalid([FieldError::new("key", "is overridden by a context")]).into());
        }
        if !present.keys.contains(key) {
            return Err(no_key().into());
        }
        Ok(store::delete(conn, id, &[key]).await?)
    };
    write::change(&state, &locked, work, |version| {
        Answer::ok(&DeletedKey {
            key: key.to_owned(),
            version,
        })
    })
    .await
}

/// Change many keys at once
///
/// In order, all or nothing, and one version for all of them. A batch may hold the workspace for longer than other
/// writes.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/batch", tag = "default-config",
    operation_id = "batch_default_config",
    params(BatchPath, WaitPreference, write::Condition, IdempotencyKey), request_body = Batch,
    responses((status = 200, description = "The version that it made", body = BatchDone), WriteProblems),
)]
pub(crate) async fn apply_batch(
    State(state): State<AppState>,
    locked: Locked<WorkspaceWrite<BatchPath>, ApiJson<Batch>>,
) -> Result<Answer, Problem> {
    let id = locked.target.path.workspace();
    let ApiJson(Batch { operations }) = &locked.body;
    let work = async |conn: &mut AsyncPgConnection| {
        let deleted = batch::deleted_keys(operations);
        let present = if deleted.is_empty() {
            batch::Present::default()
        } else {
            store::present(conn, id, &deleted).await?
        };
        let plan = batch::plan(operations, &present).map_err(Problem::invalid)?;
        if !plan.deletes.is_empty() {
            store::delete(conn, id, &plan.deletes).await?;
        }
        if !plan.puts.is_empty() {
            store::put_all(conn, id, &plan.puts).await?;
        }
        Ok(())
    };
    write::change(&state, &locked, work, |version| {
        Answer::ok(&BatchDone {
            version,
            applied: operations.len(),
        })
    })
    .await
}
