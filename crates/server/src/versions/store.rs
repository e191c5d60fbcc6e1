//! The statements on versions.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Bool, Jsonb, Nullable, Text, Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::Timestamp;
use leasehold_storage::Prepared;
use serde_json::Value;

use crate::versions::model::Version;
use crate::workspaces::model::WorkspaceId;

/// What is told of the write that makes a version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) operation: &'a str,
    pub(crate) author: &'a str,
    /// Whether the workspace's token is raised here. A lease has raised it when it was acquired.
    pub(crate) raises_token: bool,
}

#[derive(QueryableByName)]
struct Recorded {
    #[diesel(sql_type = BigInt)]
    version: i64,
}

// The statements before it in the transaction have done the write; the snapshot is of what they left. It locks the
// workspace's row, which keeps the heartbeat of the lease away, so it is the last of them.
const RECORD: &str = "
    WITH next AS (
        UPDATE workspaces
        SET version = version + 1,
            updated_at = clock_timestamp(),
            workspace_lock_fencing_token = CASE
                WHEN $5 THEN leasehold.next_token(workspace_lock_fencing_token)
                ELSE workspace_lock_fencing_token
            END
        WHERE tenant_id = $1 AND name = $2
        RETURNING version, workspace_lock_fencing_token AS token
    ), event AS (
        INSERT INTO leasehold.outbox (tenant_id, type, data)
        SELECT $1, 'workspace.version_created', jsonb_build_object(
            'tenant_id', $1, 'workspace', $2, 'version', version, 'operation', $3, 'author', $4)
        FROM next
    )
    INSERT INTO versions (tenant_id, workspace, version, operation, author, fencing_token, snapshot)
    SELECT $1, $2, next.version, $3, $4, next.token, jsonb_build_object(
        'default_config', coalesce(config.keys, '{}'),
        'descriptions', coalesce(config.descriptions, '{}'),
        'contexts', coalesce(contexts.list, '[]'))
    FROM next,
        (SELECT jsonb_object_agg(key, value) AS keys,
                jsonb_object_agg(key, description) FILTER (WHERE description IS NOT NULL) AS descriptions
         FROM default_config WHERE tenant_id = $1 AND workspace = $2) AS config,
        (SELECT jsonb_agg(jsonb_build_object(
                    'id', id, 'condition', condition, 'overrides', overrides, 'priority', priority) ORDER BY seq) AS list
         FROM contexts WHERE tenant_id = $1 AND workspace = $2) AS contexts
    RETURNING version";

/// Makes the next version of what the transaction has written so far. `None` when there is no such workspace.
pub(crate) async fn record(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    entry: &Entry<'_>,
) -> QueryResult<Option<i64>> {
    let record = diesel::sql_query(RECORD)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Text, _>(entry.operation)
        .bind::<Text, _>(entry.author)
        .bind::<Bool, _>(entry.raises_token);
    let row: Option<Recorded> = Prepared(record).one(conn).await.optional()?;
    Ok(row.map(|row| row.version))
}

#[derive(QueryableByName)]
struct Current {
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = Nullable<Jsonb>)]
    snapshot: Option<Value>,
}

const CURRENT: &str = "
    SELECT w.version, v.snapshot
    FROM workspaces w LEFT JOIN versions v
      ON v.tenant_id = w.tenant_id AND v.workspace = w.name AND v.version = w.version
    WHERE w.tenant_id = $1 AND w.name = $2";

/// The current version with its snapshot, which version 0 does not have. `None` when there is no such workspace.
pub(crate) async fn current(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
) -> QueryResult<Option<(i64, Option<Value>)>> {
    let get = diesel::sql_query(CURRENT)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name);
    let row: Option<Current> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(|row| (row.version, row.snapshot)))
}

#[derive(QueryableByName)]
pub(crate) struct VersionRow {
    #[diesel(sql_type = BigInt)]
    pub(crate) version: i64,
    #[diesel(sql_type = Text)]
    operation: String,
    #[diesel(sql_type = Text)]
    author: String,
    #[diesel(sql_type = BigInt)]
    fencing_token: i64,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
}

impl From<VersionRow> for Version {
    fn from(row: VersionRow) -> Self {
        Self {
            version: row.version,
            operation: row.operation,
            author: row.author,
            fencing_token: row.fencing_token,
            created_at: Timestamp(row.created_at),
        }
    }
}

const LIST: &str = "
    SELECT version, operation, author, fencing_token, created_at FROM versions
    WHERE tenant_id = $1 AND workspace = $2 AND version > $3 ORDER BY version LIMIT $4";

/// A page of the versions of a workspace.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<VersionRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

#[derive(QueryableByName)]
struct WholeRow {
    #[diesel(embed)]
    version: VersionRow,
    #[diesel(sql_type = Jsonb)]
    snapshot: Value,
}

const GET: &str = "
    SELECT version, operation, author, fencing_token, created_at, snapshot FROM versions
    WHERE tenant_id = $1 AND workspace = $2 AND version = $3";

/// One version with its snapshot.
pub(crate) async fn get(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    version: i64,
) -> QueryResult<Option<(Version, Value)>> {
    let get = diesel::sql_query(GET)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<BigInt, _>(version);
    let row: Option<WholeRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(|row| (row.version.into(), row.snapshot)))
}

#[derive(QueryableByName)]
struct Cleared {
    #[diesel(sql_type = Bool)]
    found: bool,
}

// Keys that stay keep their place in the list.
const CLEAR: &str = "
    WITH target AS (
        SELECT snapshot FROM versions WHERE tenant_id = $1 AND workspace = $2 AND version = $3
    ), keys AS (
        DELETE FROM default_config d USING target t
        WHERE d.tenant_id = $1 AND d.workspace = $2 AND NOT t.snapshot->'default_config' ? d.key
    ), gone AS (
        DELETE FROM contexts c USING target WHERE c.tenant_id = $1 AND c.workspace = $2
    )
    SELECT EXISTS (SELECT FROM target) AS found";

const REFILL: &str = "
    WITH target AS (
        SELECT v.snapshot, w.version + 1 AS next
        FROM versions v JOIN workspaces w ON w.tenant_id = v.tenant_id AND w.name = v.workspace
        WHERE v.tenant_id = $1 AND v.workspace = $2 AND v.version = $3
    ), keys AS (
        INSERT INTO default_config (tenant_id, workspace, key, value, description, version)
        SELECT $1, $2, k.key, k.value, t.snapshot->'descriptions'->>k.key, t.next
        FROM target t, jsonb_each(t.snapshot->'default_config') AS k
        ON CONFLICT (tenant_id, workspace, key)
        DO UPDATE SET value = excluded.value, description = excluded.description, version = excluded.version
    )
    INSERT INTO contexts (tenant_id, workspace, id, condition, overrides, priority, version)
    SELECT $1, $2, (c.it->>'id')::uuid, c.it->'condition', c.it->'overrides', (c.it->>'priority')::bigint, t.next
    FROM target t, jsonb_array_elements(t.snapshot->'contexts') WITH ORDINALITY AS c (it, place)
    ORDER BY c.place";

/// Makes the workspace what it was at a version. False when there is no such version.
pub(crate) async fn restore(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    version: i64,
) -> QueryResult<bool> {
    let clear = diesel::sql_query(CLEAR)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<BigInt, _>(version);
    let Cleared { found } = Prepared(clear).one(conn).await?;
    if found {
        // A statement of its own: one statement cannot delete a row and insert it again.
        let refill = diesel::sql_query(REFILL)
            .bind::<Text, _>(id.tenant)
            .bind::<Text, _>(id.name)
            .bind::<BigInt, _>(version);
        Prepared(refill).execute(conn).await?;
    }
    Ok(found)
}
