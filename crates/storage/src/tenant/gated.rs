//! [`Gated`]: a lock behind a tenant's gate, where a closed gate is told before a held lock.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{
    AcquireError, DistributedLock, ExtendError, HeldLock, LockGuard, LockId, LockName, LockRequest,
    ReleaseError, Released, ResumeError, Unavailable,
};
use tokio::time::Instant;

use super::gate::TenantGate;
use crate::pool::ANSWER;

/// The tenant behind whose gate a name stands, if any.
pub type TenantOf = fn(&LockName) -> Option<&str>;

/// A lock whose refusals look at the gate of the name's tenant: while the tenant is drained that is what is in the way,
/// whoever has the lock. An attempt that succeeds costs nothing more, and has not entered the gate.
#[derive(Clone)]
pub struct Gated<L> {
    inner: L,
    gate: TenantGate,
    tenant_of: TenantOf,
}

impl<L> Gated<L> {
    /// Puts a lock behind the gates of tenants.
    pub fn new(inner: L, gate: TenantGate, tenant_of: TenantOf) -> Self {
        Self {
            inner,
            gate,
            tenant_of,
        }
    }

    async fn told(&self, refused: AcquireError) -> AcquireError {
        let Some(contention) = refused.contention() else {
            return refused;
        };
        let Some(tenant) = (self.tenant_of)(&contention.name) else {
            return refused;
        };
        self.gate
            .conflict(tenant, Instant::now() + ANSWER)
            .await
            .map_or(refused, AcquireError::from)
    }
}

impl<L: fmt::Debug> fmt::Debug for Gated<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gated").field(&self.inner).finish()
    }
}

#[async_trait]
impl<L: DistributedLock> DistributedLock for Gated<L> {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        match self.inner.try_acquire(request).await {
            Ok(guard) => Ok(guard),
            Err(refused) => Err(self.told(refused).await),
        }
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        match self.inner.acquire(request, wait).await {
            Ok(guard) => Ok(guard),
            Err(refused) => Err(self.told(refused).await),
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
