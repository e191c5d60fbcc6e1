//! The statements on default configuration.

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Jsonb, Nullable, Text};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_storage::Prepared;
use serde_json::Value;

use crate::default_config::batch::{Present, Put};
use crate::default_config::model::Entry;
use crate::workspaces::model::WorkspaceId;

#[derive(QueryableByName)]
pub(crate) struct EntryRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Jsonb)]
    value: Value,
    #[diesel(sql_type = Nullable<Text>)]
    description: Option<String>,
    #[diesel(sql_type = BigInt)]
    version: i64,
    #[diesel(sql_type = BigInt)]
    pub(crate) seq: i64,
}

impl From<EntryRow> for Entry {
    fn from(row: EntryRow) -> Self {
        Self {
            key: row.key,
            value: row.value,
            description: row.description,
            version: row.version,
        }
    }
}

const LIST: &str = "
    SELECT key, value, description, version, seq FROM default_config
    WHERE tenant_id = $1 AND workspace = $2 AND seq > $3 ORDER BY seq LIMIT $4";

/// A page of the keys of a workspace.
pub(crate) async fn list(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    after: i64,
    rows: i64,
) -> QueryResult<Vec<EntryRow>> {
    let list = diesel::sql_query(LIST)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<BigInt, _>(after)
        .bind::<BigInt, _>(rows);
    Prepared(list).load(conn).await
}

const GET: &str = "
    SELECT key, value, description, version, seq FROM default_config
    WHERE tenant_id = $1 AND workspace = $2 AND key = $3";

/// One key.
pub(crate) async fn get(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    key: &str,
) -> QueryResult<Option<Entry>> {
    let get = diesel::sql_query(GET)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Text, _>(key);
    let row: Option<EntryRow> = Prepared(get).one(conn).await.optional()?;
    Ok(row.map(Entry::from))
}

const PUT: &str = "
    INSERT INTO default_config (tenant_id, workspace, key, value, description, version)
    SELECT w.tenant_id, w.name, $3, $4, $5, w.version + 1 FROM workspaces w
    WHERE w.tenant_id = $1 AND w.name = $2
    ON CONFLICT (tenant_id, workspace, key)
    DO UPDATE SET value = excluded.value, description = excluded.description, version = excluded.version";

/// Gives a key a value. False when there is no such workspace.
pub(crate) async fn put(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    put: Put<'_>,
) -> QueryResult<bool> {
    let query = diesel::sql_query(PUT)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Text, _>(put.key)
        .bind::<Jsonb, _>(put.value)
        .bind::<Nullable<Text>, _>(put.description);
    Ok(Prepared(query).execute(conn).await? == 1)
}

const PUT_ALL: &str = "
    INSERT INTO default_config (tenant_id, workspace, key, value, description, version)
    SELECT w.tenant_id, w.name, p.key, p.value, p.description, w.version + 1
    FROM workspaces w, unnest($3, $4, $5) WITH ORDINALITY AS p (key, value, description, place)
    WHERE w.tenant_id = $1 AND w.name = $2
    ORDER BY p.place
    ON CONFLICT (tenant_id, workspace, key)
    DO UPDATE SET value = excluded.value, description = excluded.description, version = excluded.version";

/// Gives keys, each named once, their values.
pub(crate) async fn put_all(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    puts: &[Put<'_>],
) -> QueryResult<()> {
    let keys: Vec<_> = puts.iter().map(|put| put.key).collect();
    let values: Vec<_> = puts.iter().map(|put| put.value).collect();
    let descriptions: Vec<_> = puts.iter().map(|put| put.description).collect();
    let query = diesel::sql_query(PUT_ALL)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Array<Text>, _>(keys)
        .bind::<Array<Jsonb>, _>(values)
        .bind::<Array<Nullable<Text>>, _>(descriptions);
    Prepared(query).execute(conn).await?;
    Ok(())
}

#[derive(QueryableByName)]
struct PresentRow {
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Bool)]
    overridden: bool,
}

const PRESENT: &str = "
    SELECT d.key, EXISTS (
        SELECT FROM contexts c WHERE c.tenant_id = $1 AND c.workspace = $2 AND c.overrides ? d.key
    ) AS overridden
    FROM default_config d
    WHERE d.tenant_id = $1 AND d.workspace = $2 AND d.key = ANY($3)";

/// Which of these keys exist, and which of them a context overrides.
pub(crate) async fn present(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    keys: &[&str],
) -> QueryResult<Present> {
    let query = diesel::sql_query(PRESENT)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Array<Text>, _>(keys);
    let rows: Vec<PresentRow> = Prepared(query).load(conn).await?;
    let mut present = Present::default();
    for row in rows {
        if row.overridden {
            present.overridden.insert(row.key.clone());
        }
        present.keys.insert(row.key);
    }
    Ok(present)
}

const DELETE: &str = "DELETE FROM default_config WHERE tenant_id = $1 AND workspace = $2 AND key = ANY($3)";

/// Deletes keys.
pub(crate) async fn delete(
    conn: &mut AsyncPgConnection,
    id: WorkspaceId<'_>,
    keys: &[&str],
) -> QueryResult<()> {
    let query = diesel::sql_query(DELETE)
        .bind::<Text, _>(id.tenant)
        .bind::<Text, _>(id.name)
        .bind::<Array<Text>, _>(keys);
    Prepared(query).execute(conn).await?;
    Ok(())
}
