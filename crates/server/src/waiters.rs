//! [`BoundedWaiters`]: a lock that lets only so many requests wait for it at once.
//!
//! Waiting costs no connection, but a request and its memory. A crowd that waits, in one tenant or in all, is told
//! to come back later instead.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{
    AcquireError, DistributedLock, ExtendError, HeldLock, LockGuard, LockId, LockName, LockRequest,
    ReleaseError, Released, ResumeError, Unavailable,
};

/// Another lock, with bounds on how many may wait. The second part of a name is its tenant.
pub struct BoundedWaiters {
    inner: Arc<dyn DistributedLock>,
    limits: Limits,
    waiting: Arc<Mutex<Waiting>>,
}

/// How many may wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In all.
    pub total: usize,
    /// In one tenant.
    pub per_tenant: usize,
}

#[derive(Default)]
struct Waiting {
    total: usize,
    by_tenant: HashMap<String, usize>,
    by_name: HashMap<LockName, usize>,
}

impl BoundedWaiters {
    /// Puts bounds on `inner`.
    pub fn new(inner: Arc<dyn DistributedLock>, limits: Limits) -> Self {
        Self {
            inner,
            limits,
            waiting: Arc::default(),
        }
    }

    /// Puts `inner` under the same bounds: those who wait for either of them count together.
    pub fn beside(&self, inner: Arc<dyn DistributedLock>) -> Self {
        Self {
            inner,
            limits: self.limits,
            waiting: Arc::clone(&self.waiting),
        }
    }

    /// How many wait for this name in this process.
    pub fn waiting_for(&self, name: &LockName) -> usize {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.by_name.get(name).copied().unwrap_or_default()
    }

    /// A place among the waiters, until it is dropped.
    fn enter(&self, name: &LockName) -> Result<Place<'_>, Unavailable> {
        let tenant = name.parts().nth(1).unwrap_or_default().to_owned();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let of_tenant = waiting.by_tenant.get(&tenant).copied().unwrap_or_default();
        if waiting.total >= self.limits.total || of_tenant >= self.limits.per_tenant {
            return Err(Unavailable::new(format!(
                "too many requests wait for locks: {} in all, {of_tenant} of them for {tenant}",
                waiting.total
            )));
        }
        waiting.total += 1;
        waiting.by_tenant.insert(tenant.clone(), of_tenant + 1);
        *waiting.by_name.entry(name.clone()).or_default() += 1;
        let name = name.clone();
        Ok(Place {
            lock: self,
            tenant,
            name,
        })
    }
}

impl std::fmt::Debug for BoundedWaiters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoundedWaiters")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

struct Place<'a> {
    lock: &'a BoundedWaiters,
    tenant: String,
    name: LockName,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiting = self.lock.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.total -= 1;
        one_less(&mut waiting.by_tenant, &self.tenant);
        one_less(&mut waiting.by_name, &self.name);
    }
}

/// Nothing is kept of those that nobody waits for.
fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[async_trait]
impl DistributedLock for BoundedWaiters {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        self.inner.try_acquire(request).await
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        let _place = self.enter(request.name()).map_err(AcquireError::Unavailable)?;
        self.inner.acquire(request, wait).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_in_a_tenant_and_in_all_and_come_back() {
        let inner: Arc<dyn DistributedLock> = Arc::new(leasehold_domain::MemoryLock::new());
        let lock = BoundedWaiters::new(
            inner,
            Limits {
                total: 3,
                per_tenant: 2,
            },
        );
        let name = |tenant: &str| LockName::new(["workspace", tenant, "main"]).unwrap();

        let places = [lock.enter(&name("a")).unwrap(), lock.enter(&name("a")).unwrap()];
        assert!(lock.enter(&name("a")).is_err(), "the tenant is full");
        let other = lock.enter(&name("b")).unwrap();
        assert!(lock.enter(&name("c")).is_err(), "all places are taken");
        let second = lock.beside(Arc::new(leasehold_domain::MemoryLock::new()));
        assert!(second.enter(&name("c")).is_err(), "also for another lock");
        assert_eq!(
            (lock.waiting_for(&name("a")), lock.waiting_for(&name("c"))),
            (2, 0)
        );

        drop(places);
        assert!(lock.enter(&name("a")).is_ok());
        drop(other);
        assert!(
            lock.waiting.lock().unwrap().by_tenant.is_empty()
                && lock.waiting.lock().unwrap().by_name.is_empty(),
            "nothing is kept of tenants that do not wait"
        );
    }
}
