//! What the first look finds: a tenant with a workspace to write to and one that somebody else holds, a second tenant
//! whose data can go, and a key.

use std::sync::Arc;
use std::time::Duration;

use diesel::QueryResult;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use leasehold_domain::{AcquireError, DistributedLock, Holder, LockRequest};
use tokio::sync::watch;

use crate::auth::{self, NewCredential, Role};
use crate::cli::Stage;
use crate::state::{AppState, WorkspaceLock, workspace_lock_name};

/// Known to everybody, and so accepted only by a service that nobody else can reach.
pub(crate) const KEY: &str = "lh_demo_key_that_works_on_loopback_only";

const TENANT: &str = "demo";
const HELD: &str = "held";
const OLD_TENANT: &str = "demo-old";

const SETUP: &str = "
    INSERT INTO tenants (id, name) VALUES ('demo', 'A tenant to try things with') ON CONFLICT DO NOTHING;
    INSERT INTO workspaces (tenant_id, name, description) VALUES
        ('demo', 'main', 'Nobody holds it: write to it'),
        ('demo', 'held', 'The service itself holds it: writes are refused')
    ON CONFLICT DO NOTHING;
    INSERT INTO tenants (id, name) VALUES ('demo-old', 'A tenant to purge: each start fills it again')
    ON CONFLICT DO NOTHING;
    INSERT INTO workspaces (tenant_id, name, description) VALUES ('demo-old', 'main', 'Nobody needs it any more')
    ON CONFLICT DO NOTHING;
    INSERT INTO feedback_records (id, tenant_id, user_id, field_id, value) VALUES
        ('019aa1b2-0000-7000-8000-000000000001', 'demo-old', 'alice', 'stars', to_jsonb(5)),
        ('019aa1b2-0000-7000-8000-000000000002', 'demo-old', 'bob', 'stars', to_jsonb(2)),
        ('019aa1b2-0000-7000-8000-000000000003', 'demo-old', 'bob', 'comment', to_jsonb('too loud'::text))
    ON CONFLICT DO NOTHING;";

/// Makes what is missing of it.
pub(crate) async fn set_up(conn: &mut AsyncPgConnection) -> QueryResult<()> {
    conn.batch_execute(SETUP).await?;
    let credential = NewCredential {
        subject: "demo-visitor".to_owned(),
        role: Role::Admin,
        tenant: None,
        expires_in_seconds: None,
        only_on_loopback: true,
    };
    auth::store(conn, KEY, &credential).await
}

/// Holds the workspace until the service stops.
pub(crate) async fn hold(state: AppState, mut stage: watch::Receiver<Stage>) {
    const PAUSE: Duration = Duration::from_secs(1);
    let Ok(name) = workspace_lock_name(TENANT, HELD) else {
        return;
    };
    let holder = Holder::new("demo", "demo: a long edit").with_instance(&state.settings().instance);
    let request = LockRequest::new(name, holder)
        .with_ttl(state.settings().lease)
        .with_max_hold(Duration::from_secs(24 * 60 * 60));
    // Not behind the tenant's gate: it writes nothing, and who removes the tenant's data need not wait for it.
    let locks: Arc<dyn DistributedLock> = match state.workspace_lock() {
        WorkspaceLock::Lease(lock) => Arc::new(lock.clone()),
        WorkspaceLock::Advisory(lock) => Arc::new(lock.clone()),
    };
    let holding = async {
        loop {
            match locks.acquire(&request, Duration::from_secs(60)).await {
                // Until an operator takes it away, or a day has passed.
                Ok(guard) => {
                    guard.lost().await;
                    tracing::info!("the demo's lock was lost; it will be taken again");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(AcquireError::TimedOut { .. }) => {}
                Err(error) => {
                    tracing::debug!(%error, "the demo's lock could not be taken");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    };
    // Dropping the guard releases the lock.
    tokio::select! {
        () = holding => {}
        _ = stage.wait_for(|stage| *stage >= Stage::Draining) => {}
    }
}

/// What to paste.
pub(crate) fn welcome(address: &str, accepted: bool) -> String {
    if !accepted {
        return format!(
            "\nLeasehold listens on {address}\n\
             \n\
             The key of the demo works on loopback addresses only. Make one: leasehold keys create --subject me \
             --role admin\n\n"
        );
    }
    let put = |workspace: &str| {
        format!(
            "  curl -X PUT {address}/v1/tenants/{TENANT}/workspaces/{workspace}/default-config/color \\\n    \
             -H 'Authorization: Bearer {KEY}' -H 'Content-Type: application/json' -d '{{\"value\": \"blue\"}}'\n"
        )
    };
    let purge = format!(
        "  curl -X DELETE {address}/v1/tenants/{OLD_TENANT}/data \\\n    -H 'Authorization: Bearer {KEY}'\n"
    );
    format!(
        "\nLeasehold listens on {address} (the API: {address}/docs)\n\
         The key of the demo is {KEY}\n\
         \n\
         A write, which makes a version:\n\n{}\n\
         A write that is refused, because somebody else holds the workspace (409, with the holder):\n\n{}\n\
         A purge, which waits for the writes of a tenant to end and takes all that it owns:\n\n{purge}\n\
         Ctrl-C stops the service and its database. The data stays in .leasehold.\n\n",
        put("main"),
        put(HELD),
    )
}
