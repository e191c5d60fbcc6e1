//! [`KnownWorkspaces`]: whoever is refused the lock of a workspace that does not exist is told that.

use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{
    AcquireError, DistributedLock, ExtendError, HeldLock, LockGuard, LockId, LockName, LockRequest,
    ReleaseError, Released, ResumeError, Unavailable,
};
use leasehold_storage::Database;

use crate::workspaces::model::WorkspaceId;
use crate::workspaces::store;

/// A lock that knows nothing of workspaces, which can be taken of one that does not exist. Whoever gets it finds out in
/// its transaction; this looks for those who do not. It costs nothing where the lock is granted.
#[derive(Debug)]
pub(crate) struct KnownWorkspaces<L> {
    inner: L,
    db: Database,
}

impl<L> KnownWorkspaces<L> {
    pub(crate) fn new(inner: L, db: Database) -> Self {
        Self { inner, db }
    }

    async fn told(&self, name: &LockName, refused: AcquireError) -> AcquireError {
        let in_the_way = matches!(
            refused,
            AcquireError::Contended(_) | AcquireError::TimedOut { .. } | AcquireError::TenantConflict(_)
        );
        let mut parts = name.parts().skip(1);
        let (true, Some(tenant), Some(workspace)) = (in_the_way, parts.next(), parts.next()) else {
            return refused;
        };
        let id = WorkspaceId {
            tenant,
            name: workspace,
        };
        match self.db.read(async |conn| store::version(conn, id).await).await {
            Ok(None) => AcquireError::NotFound { name: name.clone() },
            Ok(Some(_)) | Err(_) => refused,
        }
    }
}

#[async_trait]
impl<L: DistributedLock> DistributedLock for KnownWorkspaces<L> {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        match self.inner.try_acquire(request).await {
            Ok(guard) => Ok(guard),
            Err(refused) => Err(self.told(request.name(), refused).await),
        }
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        match self.inner.acquire(request, wait).await {
            Ok(guard) => Ok(guard),
            Err(refused) => Err(self.told(request.name(), refused).await),
        }
    }

    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        self.inner.resume(request, lock_id).await
    }

    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        self.inner.extend(guard, ttl).await
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        self.inner.release(guard).await
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        self.inner.inspect(name).await
    }
}
