//! The statements on workspaces.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::{BigInt, Bool, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::{LockView, Problem, Timestamp};
use leasehold_storage::Prepared;
use uuid::Uuid;

use crate::failure::Failure;
use crate::workspaces::model::{NewWorkspace, Workspace, WorkspaceId};

/// 404, as whoever looks for a workspace is told it.
pub(crate) fn no_workspace() -> Problem {
    Problem::not_found("there is no such workspace")
}

/// A workspace and its lock, when that is active by the database's clock.
#[derive(Debug, QueryableByName)]
pub(crate) struct WorkspaceRow {
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Nullable<Text>)]
    description: Option<String>,
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    updated_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
    #[diesel(sql_type = Bool)]
    locked: bool,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    workspace_lock_id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Text>)]
    workspace_lock_operation: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    workspace_locked_by: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    workspace_lock_acquired_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    workspace_lock_expires_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = BigInt)]
    workspace_lock_fencing_token: i64,
}

impl From<WorkspaceRow> for Workspace {
    fn from(row: WorkspaceRow) -> Self {
        let workspace_lock = row.locked.then(|| LockView {
            lock_id: row.workspace_lock_id,
            operation: row.workspace_lock_operation,
            locked_by: row.workspace_locked_by,
            acquired_at: row.workspace_lock_acquired_at.map(Timestamp),
            expires_at: row.workspace_lock_expires_at.map(Timestamp),
            fencing_token: Some(row.workspace_lock_fencing_token),
        });
        Self {
            tenant_id: row.tenant_id,
            name: row.name,
            description: row.description,
            version: row.version,
            created_at: Timestamp(row.created_at),
            updated_at: Timestamp(row.updated_at),
            workspace_lock,
        }
    }
}

/// Named one by one: a `*` would change its meaning under a statement that is prepared already.
macro_rules! columns {
    () => {
        "tenant_id, name, description, version, created_at, updated_at, seq, workspace_lock_id,
         workspace_lock_operation, workspace_locked_by, workspace_lock_acquired_at, workspace_lock_expires_at,
         workspace_lock_fencing_token"
    };
}

/// A statement that writes one workspace, and the event that tells of it.
macro_rules! with_event {
    ($type:literal, $write:literal) => {
        concat!(
            "WITH written AS (",
            $write,
            " RETURNING ",
            columns!(),
            "), event AS (
                 INSERT INTO leasehold.outbox (tenant_id, type, data)
                 SELECT tenant_id, '",
            $type,
            "', jsonb_build_object(
                     'tenant_id', tenant_id, 'workspace', name, 'description', description)
                 FROM written
             )
             SELECT false AS locked, ",
            columns!(),
            " FROM written"
        )
    };
}

const CREATE: &str = with_event!(
    "workspace.created",
    "INSERT INTO workspaces (tenant_id, name, description) VALUES ($1, $2, $3)
     ON CONFLICT (tenant_id, name) DO NOTHING"
);

/// What became of a workspace that was to be made.
#[derive(Clone, Debug)]
pub(crate) enum Created {
    Done(Box<Workspace>),
    NameTaken,
    NoSuchTenant,
}

/// Makes a workspace.
pub(crate) async fn create(
    conn: &mut AsyncPgConnection,
    tenant: &str,
    new: &NewWorkspace,
) -> QueryResult<Created> {
    let create = diesel::sql_query(CREATE)
        .bind::<Text, _>(tenant)
        .bind::<Text, _>(new.name.as_str())
        .bind::<Nullable<Text>, _>(&new.description);
    match Prepared(create).one::<WorkspaceRow>(conn).await.optional() {
        Ok(Some(row)) => Ok(Created::Done(Box::new(row.into()))),
        Ok(None) => Ok(Created::NameTaken),
        // It was there when the caller was let in.
        Err(Error::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, _)) => Ok(Created::NoSuchTenant),
        Err(error) => Err(error),
    }
}

const LIST: &str = concat!(
    "SELECT false AS locked, ",
    columns!(),
    " FROM workspaces WHERE tenant_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"
);

/// A page of a tenant's workspaces, without their locks.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    tenant: &str,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<WorkspaceRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<Text, _>(tenant)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

const GET: &str = concat!(
    "SELECT coalesce(workspace_lock_expires_at > clock_timestamp(), false) AS locked, ",
    columns!(),
    " FROM workspaces WHERE tenant_id = $1 AND name = $2"
);

/// A workspace and its lock.
pub(crate) async fn get(conn: &mut AsyncPgConnection, id: WorkspaceId<'_>) -> QueryResult<Option<Workspace>> {
    let get = diesel::sql_query(GET)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name);
    let row: Option<WorkspaceRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(Workspace::from))
}

#[derive(QueryableByName)]
struct VersionRow {
    #[diesel(sql_type = BigInt)]
    version: i64,
}

/// The current version.
pub(crate) async fn version(conn: &mut AsyncPgConnection, id: WorkspaceId<'_>) -> QueryResult<Option<i64>> {
    let get = diesel::sql_query("SELECT version FROM workspaces WHERE tenant_id = $1 AND name = $2")
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name);
    let row: Option<VersionRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(|row| row.version))
}

/// Tells a workspace in which a list is empty from none at all, which is 404.
pub(crate) async fn must_exist(conn: &mut AsyncPgConnection, id: WorkspaceId<'_>) -> Result<(), Failure> {
    version(conn, id).await?.ok_or_else(no_workspace)?;
    Ok(())
}

// The lock is the caller's own: it is about to be released.
const PATCH: &str = with_event!(
    "workspace.updated",
    "UPDATE workspaces SET description = $3, updated_at = clock_timestamp()
     WHERE tenant_id = $1 AND name = $2"
);

/// Changes the description. It locks the workspace's row: nothing comes after it.
pub(crate) async fn patch(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    description: Option<&str>,
) -> QueryResult<Option<Workspace>> {
    let update = diesel::sql_query(PATCH)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Nullable<Text>, _>(description);
    let row: Option<WorkspaceRow> = Prepared(update).one(conn).await.optional()?;
    Ok(row.map(Workspace::from))
}

#[derive(QueryableByName)]
struct Deleted {
    #[diesel(sql_type = BigInt)]
    deleted: i64,
}

// A row that is gone cannot be fenced afterwards: the statement itself asks whether the lock is still ours. A
// workspace of the same name gets higher tokens than this one had.
const DELETE: &str = "
    WITH gone AS (
        DELETE FROM workspaces
        WHERE tenant_id = $1 AND name = $2
          AND ($3 IS NULL OR (workspace_lock_id = $3 AND workspace_lock_expires_at > clock_timestamp()))
        RETURNING workspace_lock_fencing_token AS token
    ), raised AS MATERIALIZED (
        SELECT leasehold.raise_token_floor(token) FROM gone
    ), event AS (
        INSERT INTO leasehold.outbox (tenant_id, type, data)
        SELECT $1, 'workspace.deleted', jsonb_build_object('tenant_id', $1, 'workspace', $2) FROM gone
    )
    SELECT count(*) AS deleted FROM raised";

/// Deletes a workspace with all that is in it. With a lock id: only while that acquisition holds its lease.
pub(crate) async fn delete(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    lock_id: Option<Uuid>,
) -> QueryResult<bool> {
    let delete = diesel::sql_query(DELETE)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Nullable<SqlUuid>, _>(lock_id);
    let row: Deleted = Prepared(delete).one(conn).await?;
    Ok(row.deleted == 1)
}
