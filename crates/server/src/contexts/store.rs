//! The statements on contexts.

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Jsonb, Text, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_storage::Prepared;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::contexts::model::{Context, NewContext};
use crate::workspaces::model::WorkspaceId;

#[derive(QueryableByName)]
pub(crate) struct ContextRow {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
    #[diesel(sql_type = Jsonb)]
    condition: Value,
    #[diesel(sql_type = Jsonb)]
    overrides: Value,
    #[diesel(sql_type = BigInt)]
    priority: i64,
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
}

impl From<ContextRow> for Context {
    fn from(row: ContextRow) -> Self {
        Self {
            id: row.id,
            condition: object(row.condition),
            overrides: object(row.overrides),
            priority: row.priority,
            version: row.version,
        }
    }
}

/// The table holds objects only.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

const LIST: &str = "
    SELECT id, condition, overrides, priority, version, seq FROM contexts
    WHERE tenant_id = $1 AND workspace = $2 AND seq > $3 ORDER BY seq LIMIT $4";

/// A page of the contexts of a workspace.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<ContextRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

/// What became of a context that was to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    Done,
    /// These keys are not in the default configuration.
    UnknownKeys(Vec<String>),
    NoSuchContext,
    NoSuchWorkspace,
}

#[derive(QueryableByName)]
struct WrittenRow {
    #[diesel(sql_type = Bool)]
    workspace: bool,
    #[diesel(sql_type = Array<Text>)]
    unknown: Vec<String>,
    #[diesel(sql_type = Bool)]
    done: bool,
}

impl From<WrittenRow> for Written {
    fn from(row: WrittenRow) -> Self {
        match row {
            WrittenRow { workspace: false, .. } => Self::NoSuchWorkspace,
            WrittenRow { unknown, .. } if !unknown.is_empty() => Self::UnknownKeys(unknown),
            WrittenRow { done: true, .. } => Self::Done,
            WrittenRow { .. } => Self::NoSuchContext,
        }
    }
}

/// What both statements look at first, and what they answer last.
macro_rules! written {
    ($write:literal) => {
        concat!(
            "WITH home AS (
                 SELECT version + 1 AS next FROM workspaces WHERE tenant_id = $1 AND name = $2
             ), unknown AS (
                 SELECT o.key FROM jsonb_object_keys($5) AS o (key)
                 WHERE NOT EXISTS (
                     SELECT FROM default_config d WHERE d.tenant_id = $1 AND d.workspace = $2 AND d.key = o.key
                 )
             ), written AS (",
            $write,
            " RETURNING true)
             SELECT EXISTS (SELECT FROM home) AS workspace,
                    ARRAY(SELECT key FROM unknown ORDER BY key) AS unknown,
                    EXISTS (SELECT FROM written) AS done"
        )
    };
}

const CREATE: &str = written!(
    "INSERT INTO contexts (tenant_id, workspace, id, condition, overrides, priority, version)
     SELECT $1, $2, $3, $4, $5, $6, home.next FROM home WHERE NOT EXISTS (SELECT FROM unknown)"
);

const UPDATE: &str = written!(
    "UPDATE contexts c SET condition = $4, overrides = $5, priority = $6, version = home.next
     FROM home
     WHERE c.tenant_id = $1 AND c.workspace = $2 AND c.id = $3 AND NOT EXISTS (SELECT FROM unknown)"
);

/// Makes a context.
pub(crate) async fn create(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    context: Uuid,
    new: &NewContext,
) -> QueryResult<Written> {
    write(conn, CREATE, id, context, new).await
}

/// Replaces a context, which keeps its place among the others.
pub(crate) async fn update(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    context: Uuid,
    new: &NewContext,
) -> QueryResult<Written> {
    write(conn, UPDATE, id, context, new).await
}

async fn write(
    conn: &mut AsyncPgConnection,
    sql: &'static str,
    id: WorkspaceId<'_>,
    context: Uuid,
    new: &NewContext,
) -> QueryResult<Written> {
    let query = diesel::sql_query(sql)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<SqlUuid, _>(context)
        .bind::<Jsonb, _>(Value::Object(new.condition.clone()))
        .bind::<Jsonb, _>(Value::Object(new.overrides()))
        .bind::<BigInt, _>(new.priority);
    let row: WrittenRow = Prepared(query).one(conn).await?;
    Ok(row.into())
}

const DELETE: &str = "DELETE FROM contexts WHERE tenant_id = $1 AND workspace = $2 AND id = $3";

/// Deletes a context. False when there is none.
pub(crate) async fn delete(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    context: Uuid,
) -> QueryResult<bool> {
    let query = diesel::sql_query(DELETE)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<SqlUuid, _>(context);
    Ok(Prepared(query).execute(conn).await? == 1)
}
