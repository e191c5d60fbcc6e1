//! [`Reaper`]: gives leases back that nobody waits for, because a guard or an acquire was dropped.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{LockId, LockName};
use tokio::sync::Mutex;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::connect::ConnectOptions;
use crate::keeper::Keeper;
use crate::lease::table::LeaseTable;
use crate::signals::{self, Signals};
use crate::waiting::Queues;

/// A row that somebody has locked is not waited for longer than this; the lease ends by itself.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
/// When to look again for an acquire that was dropped: its statement may reach the server after our release.
const LOOK_AGAIN: [Duration; 4] = [
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_secs(1),
];

/// Releases in the background, on a connection of its own that is opened when it is first needed.
#[derive(Clone, Debug)]
pub(crate) struct Reaper {
    keeper: Keeper,
    options: ConnectOptions,
    client: Arc<Mutex<Option<Arc<Client>>>>,
    queues: Queues,
    signals: Signals,
}

/// A lease to give back.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) table: Arc<LeaseTable>,
    pub(crate) keys: Vec<String>,
    pub(crate) name: LockName,
    pub(crate) lock_id: LockId,
}

impl Reaper {
    pub(crate) fn new(keeper: Keeper, options: ConnectOptions, queues: Queues, signals: Signals) -> Self {
        Self {
            keeper,
            options,
            client: Arc::default(),
            queues,
            signals,
        }
    }

    /// Gives back a lease that is held. Never blocks; works in any thread.
    pub(crate) fn release(&self, lease: Lease) {
        let this = self.clone();
        self.keeper.finish(async move {
            for pause in LOOK_AGAIN {
                if this.attempt(&lease).await.is_some() {
                    break;
                }
                tokio::time::sleep(pause).await;
            }
        });
    }

    /// Gives back what an acquire may have been granted after its caller went away.
    pub(crate) fn release_unanswered(&self, lease: Lease) {
        let this = self.clone();
        self.keeper.finish(async move {
            for pause in LOOK_AGAIN {
                if this.attempt(&lease).await == Some(true) {
                    break;
                }
                tokio::time::sleep(pause).await;
            }
        });
    }

    /// Whether the lease was there; `None` when the database did not answer.
    async fn attempt(&self, lease: &Lease) -> Option<bool> {
        let client = self.client().await?;
        let lock_id = lease.lock_id.as_uuid();
        let mut binds: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&lock_id, Type::UUID)];
        binds.extend(
            lease
                .keys
                .iter()
                .map(|key| (key as &(dyn ToSql + Sync), Type::TEXT)),
        );
        match tokio::time::timeout(
            STATEMENT_TIMEOUT,
            client.query_typed(&lease.table.release, &binds),
        )
        .await
        {
            Ok(Ok(rows)) => {
                if !rows.is_empty() {
                    self.queues.freed(&lease.name);
                    self.signals.freed(signals::key(&lease.name));
                }
                Some(!rows.is_empty())
            }
            Ok(Err(error)) => {
                tracing::warn!(error = crate::error::chain(&error), lock = %lease.name, "a lease was not given back");
                *self.client.lock().await = None;
                None
            }
            Err(_) => {
                tracing::warn!(lock = %lease.name, "a lease was not given back in time; it ends by itself");
                *self.client.lock().await = None;
                None
            }
        }
    }

    async fn client(&self) -> Option<Arc<Client>> {
        let mut client = self.client.lock().await;
        if let Some(open) = client.as_ref().filter(|client| !client.is_closed()) {
            return Some(Arc::clone(open));
        }
        match self.options.open().await {
            Ok((open, driver)) => {
                self.keeper.spawn(driver);
                let open = Arc::new(open);
                *client = Some(Arc::clone(&open));
                Some(open)
            }
            Err(error) => {
                tracing::warn!(
                    error = crate::error::chain(&error),
                    "cannot connect to give leases back"
                );
                None
            }
        }
    }
}
