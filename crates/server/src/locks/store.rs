//! The locks that stand in the rows of workspaces.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_domain::{FencingToken, HeldLock, Holder, LockId, LockMode};
use uuid::Uuid;

use crate::state::workspace_lock_name;

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = SqlUuid)]
    workspace_lock_id: Uuid,
    #[diesel(sql_type = Text)]
    workspace_lock_operation: String,
    #[diesel(sql_type = Text)]
    workspace_locked_by: String,
    #[diesel(sql_type = Timestamptz)]
    workspace_lock_acquired_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    workspace_lock_expires_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    workspace_lock_fencing_token: i64,
}

const HELD: &str = "
    SELECT tenant_id, name, workspace_lock_id, workspace_lock_operation, workspace_locked_by,
           workspace_lock_acquired_at, workspace_lock_expires_at, workspace_lock_fencing_token
    FROM workspaces WHERE workspace_lock_expires_at > clock_timestamp()";

/// The workspaces that are held by a lease now.
pub(crate) async fn held_workspaces(conn: &mut AsyncPgConnection) -> QueryResult<Vec<HeldLock>> {
    let rows: Vec<Row> = diesel::sql_query(HELD).load(conn).await?;
    // Workspaces have names that can be locked.
    Ok(rows.into_iter().filter_map(Row::into_held).collect())
}

impl Row {
    fn into_held(self) -> Option<HeldLock> {
        let name = workspace_lock_name(&self.tenant_id, &self.name).ok()?;
        Some(HeldLock {
            lock_id: Some(LockId::from(self.workspace_lock_id)),
            holder: Some(Holder::new(
                self.workspace_locked_by,
                self.workspace_lock_operation,
            )),
            acquired_at: Some(self.workspace_lock_acquired_at),
            expires_at: Some(self.workspace_lock_expires_at),
            fencing_token: Some(FencingToken::new(self.workspace_lock_fencing_token)),
            ..HeldLock::unknown(name, LockMode::Exclusive)
        })
    }
}
