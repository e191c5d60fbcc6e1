//! Others at a tenant's gate, and what is behind it.

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::{Answer, Api, eventually};

/// The tables that a purge counts, as it names them, in the order of its answer.
pub(crate) const TABLES: [&str; 10] = [
    "versions",
    "contexts",
    "default_config",
    "workspaces",
    "feedback_records",
    "webhooks",
    "work_items",
    "dead_letters",
    "outbox",
    "idempotency_keys",
];

const LOCK_COLUMNS: &str = "'{workspace_lock_id, workspace_lock_operation, workspace_locked_by,
    workspace_lock_acquired_at, workspace_lock_expires_at, workspace_lock_fencing_token}'::text[]";

/// The key as other programs compute it.
const KEY: &str = "hashtextextended('tenant_write|' || octet_length($1) || ':' || $1, 0)";

impl Api {
    /// A transaction of another program that writes to a tenant, as far as the gate tells.
    pub(crate) async fn writer_in_flight(&self, tenant: &str) -> Client {
        self.at_the_gate(tenant, "pg_advisory_xact_lock_shared").await
    }

    /// A transaction of another program that has a tenant for itself.
    pub(crate) async fn close_gate(&self, tenant: &str) -> Client {
        self.at_the_gate(tenant, "pg_advisory_xact_lock").await
    }

    async fn at_the_gate(&self, tenant: &str, function: &str) -> Client {
        let client = self.client().await;
        client.batch_execute("BEGIN").await.unwrap();
        let ask = format!("SELECT {function}({KEY})");
        client.execute(&ask, &[&tenant]).await.unwrap();
        client
    }

    /// Waits until a purge waits for this tenant's gate.
    pub(crate) async fn purge_waits(&self, tenant: &str) {
        self.exclusive_at_gate(tenant, false).await;
    }

    /// Waits until a purge has this tenant's gate.
    pub(crate) async fn purge_holds(&self, tenant: &str) {
        self.exclusive_at_gate(tenant, true).await;
    }

    async fn exclusive_at_gate(&self, tenant: &str, granted: bool) {
        let client = self.client().await;
        eventually("a purge is at the gate", async || {
            purges(&client, tenant, granted).await == 1
        })
        .await;
    }

    /// How many purges wait for this tenant's gate.
    pub(crate) async fn waiting_purges(&self, tenant: &str) -> i64 {
        purges(&self.client().await, tenant, false).await
    }

    pub(crate) async fn purge(&self, tenant: &str) -> Answer {
        self.delete(&format!("/v1/tenants/{tenant}/data")).await
    }

    /// Waits until so many statements wait for a row or a table.
    pub(crate) async fn statements_wait(&self, statements: i64) {
        // Not in a transaction, where the first answer would be given for ever.
        let client = self.client().await;
        let count = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock'
                       AND wait_event IN ('transactionid', 'tuple', 'relation')";
        eventually("statements wait", async || {
            client.query_one(count, &[]).await.unwrap().get::<_, i64>(0) == statements
        })
        .await;
    }

    /// How many rows of each table of [`TABLES`] a tenant has.
    pub(crate) async fn counts(&self, tenant: &str) -> Vec<i64> {
        let client = self.client().await;
        let mut counts = Vec::new();
        for table in TABLES {
            let schema = match table {
                "work_items" | "dead_letters" | "outbox" => "leasehold",
                _ => "public",
            };
            let count = format!("SELECT count(*) FROM {schema}.{table} WHERE tenant_id = $1");
            counts.push(client.query_one(&count, &[&tenant]).await.unwrap().get(0));
        }
        counts
    }

    /// Every row of every table that a tenant owns, whole but for who has the lock of a workspace: a write may have it
    /// before it is refused.
    pub(crate) async fn rows(&self, tenant: &str) -> Value {
        let client = self.client().await;
        let tables = "SELECT format('%I.%I', table_schema, table_name) FROM information_schema.columns
                      JOIN information_schema.tables USING (table_schema, table_name)
                      WHERE column_name = 'tenant_id' AND table_type = 'BASE TABLE' ORDER BY 1";
        let mut rows = serde_json::Map::new();
        for table in client.query(tables, &[]).await.unwrap() {
            let table: String = table.get(0);
            let all = format!(
                "SELECT coalesce(jsonb_agg(r ORDER BY r), '[]')
                 FROM {table} t, LATERAL (SELECT to_jsonb(t) - {LOCK_COLUMNS} AS r) AS row WHERE tenant_id = $1"
            );
            rows.insert(table, client.query_one(&all, &[&tenant]).await.unwrap().get(0));
        }
        assert!(rows.len() > TABLES.len(), "credentials too: {:?}", rows.keys());
        Value::Object(rows)
    }

    /// The types of all events that wait to be handed on, in their order.
    pub(crate) async fn events(&self, tenant: &str) -> Vec<(String, Value)> {
        let events = "SELECT type, data FROM leasehold.outbox WHERE tenant_id = $1 ORDER BY seq";
        let rows = self.client().await.query(events, &[&tenant]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

async fn purges(client: &Client, tenant: &str, granted: bool) -> i64 {
    let count = format!(
        "SELECT count(*) FROM pg_locks
         WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND objsubid = 1 AND granted = $2
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND (classid::bigint << 32) | objid::bigint = {KEY}"
    );
    client
        .query_one(&count, &[&tenant, &granted])
        .await
        .unwrap()
        .get(0)
}
