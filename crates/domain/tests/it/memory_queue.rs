//! `MemoryQueue` keeps every clause that the backends keep.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{QueueProvider, queue_conformance};
use leasehold_domain::{ClaimKey, MemoryQueue, WorkQueue};

struct Memory(MemoryQueue);

impl QueueProvider for Memory {
    async fn process(&self) -> Arc<dyn WorkQueue> {
        Arc::new(self.0.clone())
    }

    async fn expire(&self, claim: ClaimKey) {
        assert!(self.0.expire(claim));
    }

    async fn pass(&self, time: Duration) {
        self.0.advance(time);
    }

    async fn age_letters(&self, by: Duration) {
        self.0.advance(by);
    }

    async fn purge_tenant(&self, tenant: &str) {
        self.0.purge_tenant(tenant);
    }
}

queue_conformance!(Memory(MemoryQueue::new()));
