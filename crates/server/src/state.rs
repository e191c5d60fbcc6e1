//! [`AppState`]: what all handlers share, and the one choice between the two kinds of workspace lock.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use leasehold_domain::{DistributedLock, Invalid, LockName};
use leasehold_storage::tenant::Gated;
use leasehold_storage::{Database, LeaseColumns, PgTransactionLock, RowLease, RowLeaseTable};
use tokio::sync::Notify;

use crate::config::{ServeConfig, WorkspaceLockMode};
use crate::metrics::Sampler;
use crate::waiters::{BoundedWaiters, Limits};
use crate::workspaces::known::KnownWorkspaces;

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What a workspace lock is.
    pub lock_mode: WorkspaceLockMode,
    /// The slice of a workspace lock that is renewed by heartbeat.
    pub lease: Duration,
    /// The longest that an ordinary write may hold its workspace.
    pub write_hold: Duration,
    /// The longest that a batch may hold its workspace.
    pub batch_hold: Duration,
    /// The longest that a request may wait for a lock.
    pub max_wait: Duration,
    /// How long the removal of a tenant's data waits for writes that are under way: 1 ms to 1 hour.
    pub purge_wait: Duration,
    /// How many requests may wait.
    pub waiters: Limits,
    /// Whether only this machine can reach the service: then keys for the first look are accepted.
    pub on_loopback: bool,
    /// What this process calls itself to others: host and process id.
    pub instance: String,
}

impl Settings {
    /// The settings of a service that listens on `address`.
    pub fn new(config: &ServeConfig, address: SocketAddr) -> Self {
        Self {
            lock_mode: config.workspace_lock_mode,
            lease: config.workspace_lock_lease_ms.0,
            write_hold: config.workspace_lock_default_ttl_ms.0,
            batch_hold: config.workspace_lock_batch_ttl_ms.0,
            max_wait: config.lock_max_wait_ms.0,
            purge_wait: config.tenant_purge_lock_timeout(),
            waiters: Limits {
                total: config.lock_max_waiters,
                per_tenant: config.lock_max_waiters_per_tenant,
            },
            on_loopback: address.ip().is_loopback(),
            instance: instance(),
        }
    }
}

/// The host's name and this process's id.
pub fn instance() -> String {
    let system = rustix::system::uname();
    format!("{}:{}", system.nodename().to_string_lossy(), std::process::id())
}

/// The lock of a workspace. Everything but a forced release is the same in both modes.
#[derive(Clone, Debug)]
pub(crate) enum WorkspaceLock {
    Lease(RowLease),
    Advisory(PgTransactionLock),
}

/// What all handlers share. Clones are the same.
#[derive(Clone, Debug)]
pub struct AppState(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    db: Database,
    settings: Settings,
    workspace_lock: WorkspaceLock,
    /// The same lock, behind the gates of tenants and with bounds on who may wait.
    locks: Arc<BoundedWaiters>,
    /// Leases on names of their own, with the same bounds.
    leases: Arc<BoundedWaiters>,
    written: Arc<Notify>,
    draining: AtomicBool,
    sampler: Sampler,
}

impl AppState {
    /// The state of a service on a database whose schema is current.
    ///
    /// # Errors
    /// Never, as long as the names of the lock's columns are identifiers.
    pub fn new(db: Database, settings: Settings) -> Result<Self, Invalid> {
        let workspace_lock = match settings.lock_mode {
            WorkspaceLockMode::Lease => WorkspaceLock::Lease(db.row_leases(workspaces_table()?)),
            WorkspaceLockMode::Advisory => WorkspaceLock::Advisory(db.transaction_locks()),
        };
        let gate = db.tenant_gate();
        let inner: Arc<dyn DistributedLock> = match &workspace_lock {
            WorkspaceLock::Lease(lock) => Arc::new(Gated::new(lock.clone(), gate, tenant_of)),
            WorkspaceLock::Advisory(lock) => {
                let lock = lock.clone().behind_gates(tenant_of);
                Arc::new(KnownWorkspaces::new(
                    Gated::new(lock, gate, tenant_of),
                    db.clone(),
                ))
            }
        };
        let locks = Arc::new(BoundedWaiters::new(inner, settings.waiters));
        let leases = Arc::new(locks.beside(Arc::new(db.leases())));
        Ok(Self(Arc::new(Inner {
            db,
            settings,
            workspace_lock,
            locks,
            leases,
            written: Arc::default(),
            draining: AtomicBool::new(false),
            sampler: Sampler::default(),
        })))
    }

    /// The database.
    pub fn db(&self) -> &Database {
        &self.0.db
    }

    /// How the service behaves.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// The lock that every write of a workspace takes.
    pub fn locks(&self) -> Arc<dyn DistributedLock> {
        Arc::clone(&self.0.locks) as _
    }

    /// The lock behind the lock endpoints.
    pub(crate) fn leases(&self) -> &BoundedWaiters {
        &self.0.leases
    }

    pub(crate) fn workspace_lock(&self) -> &WorkspaceLock {
        &self.0.workspace_lock
    }

    /// Told after each write that succeeded: there may be events to hand on.
    pub(crate) fn written(&self) -> Arc<Notify> {
        Arc::clone(&self.0.written)
    }

    /// What looks up what is measured only when somebody asks.
    pub(crate) fn sampler(&self) -> &Sampler {
        &self.0.sampler
    }

    /// From now on the service says that it is not ready: it is about to stop.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the service is about to stop.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Relaxed)
    }
}

/// The name of a workspace's lock.
///
/// # Errors
/// Never for names that were checked.
pub fn workspace_lock_name(tenant: &str, workspace: &str) -> Result<LockName, Invalid> {
    LockName::new(["workspace", tenant, workspace])
}

/// The tenant of a workspace's lock.
fn tenant_of(name: &LockName) -> Option<&str> {
    name.parts().nth(1)
}

pub(crate) fn workspaces_table() -> Result<leasehold_storage::LeaseTable, Invalid> {
    RowLeaseTable::new("public", "workspaces", "workspace")
        .key_column("tenant_id")
        .key_column("name")
        .columns(LeaseColumns {
            by: "workspace_locked_by".to_owned(),
            ..LeaseColumns::prefixed("workspace_lock_")
        })
        .build()
}
