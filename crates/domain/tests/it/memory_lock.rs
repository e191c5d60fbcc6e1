//! `MemoryLock` keeps every clause that the backends keep.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{Abilities, Life, Provider, lock_conformance};
use leasehold_domain::{DistributedLock, LockName, MemoryLock};

struct Memory(MemoryLock);

impl Provider for Memory {
    fn abilities(&self) -> Abilities {
        Abilities {
            life: Life::Lease,
            shared: true,
            processes: false,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        Arc::new(self.0.clone())
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        LockName::new([scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        (!self.0.is_idle()).then(|| format!("{:?}", self.0))
    }

    async fn lose(&self, name: &LockName) {
        self.0.lose(name);
    }

    async fn expire(&self, name: &LockName) -> bool {
        self.0.stop_heartbeats(name);
        if let Some(expires_at) = self.0.inspect(name).await.unwrap().and_then(|held| held.expires_at) {
            let left = expires_at - self.0.clock().wall();
            self.0.advance(left.to_std().unwrap());
        }
        true
    }

    async fn stop_heartbeats(&self, name: &LockName) -> bool {
        self.0.stop_heartbeats(name);
        true
    }

    async fn pass(&self, time: Duration) {
        self.0.advance(time);
    }
}

lock_conformance!(Memory(MemoryLock::new()));
