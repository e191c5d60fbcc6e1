//! A mock of each trait, for unit tests that script each answer.

use std::time::Duration;

use async_trait::async_trait;

use crate::{
    AcquireError, ClaimKey, ClaimRequest, Claimed, DeadLetter, DistributedLock, ExtendError, Failure,
    HeldLock, KindStats, LockGuard, LockId, LockName, LockRequest, NewWork, Outcome, Page, QueueError,
    ReleaseError, Released, Requeue, ResumeError, Retention, Retry, Unavailable, WorkItem, WorkQueue,
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

mockall::mock! {
    /// A mock of [`WorkQueue`]: every answer is scripted with mockall's `expect_…` methods.
    #[derive(Debug)]
    pub WorkQueue {}

    #[async_trait]
    impl WorkQueue for WorkQueue {
        async fn enqueue(&self, work: &NewWork) -> Result<(), QueueError>;
        async fn enqueue_many(&self, work: &[NewWork]) -> Result<(), QueueError>;
        async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, QueueError>;
        async fn extend(&self, claims: &[ClaimKey], lease: Duration) -> Result<Vec<Outcome>, QueueError>;
        async fn complete(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError>;
        async fn retry(&self, retries: &[Retry]) -> Result<Vec<Outcome>, QueueError>;
        async fn fail(&self, failures: &[Failure]) -> Result<Vec<Outcome>, QueueError>;
        async fn requeue_after(&self, requeues: &[Requeue]) -> Result<Vec<Outcome>, QueueError>;
        async fn give_back(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError>;
        async fn stats(&self) -> Result<Vec<KindStats>, QueueError>;
        async fn items(&self, page: &Page) -> Result<Vec<WorkItem>, QueueError>;
        async fn dead_letters(&self, page: &Page) -> Result<Vec<DeadLetter>, QueueError>;
        async fn redrive(&self, tenant: &str, letters: &[i64]) -> Result<u64, QueueError>;
        async fn purge_dead_letters(&self, retention: &Retention) -> Result<u64, QueueError>;
    }
}
