//! A mock of [`DistributedLock`] for unit tests that script each answer.

use std::time::Duration;

use async_trait::async_trait;

use crate::{
    AcquireError, DistributedLock, ExtendError, HeldLock, LockGuard, LockId, LockName, LockRequest,
    ReleaseError, Released, ResumeError, Unavailable,
};

mockall::mock! {
    /// A mock of [`DistributedLock`]: every answer is scripted with mockall's `expect_…` methods.
    #[derive(Debug)]
    pub DistributedLock {}

    #[async_trait]
    impl DistributedLock for DistributedLock {
        async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError>;
        async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError>;
        async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError>;
        async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError>;
        async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError>;
        async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable>;
    }
}
