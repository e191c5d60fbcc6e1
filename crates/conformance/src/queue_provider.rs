//! [`QueueProvider`]: what a queue must give so that the clauses can be run against it.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{ClaimKey, WorkQueue};

/// Makes queues of one backend, and breaks them. One provider serves one test, and starts with an empty queue.
pub trait QueueProvider {
    /// The same queue, sharing no memory with those made before, as in another process. Where items live in the memory
    /// of one process it is another handle on the same.
    async fn process(&self) -> Arc<dyn WorkQueue>;

    /// Ends the lease of a claim, as if its heartbeats had not come.
    async fn expire(&self, claim: ClaimKey);

    /// Lets time pass on the clock of the queue.
    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Makes every dead letter older by this.
    async fn age_letters(&self, by: Duration);

    /// Removes every item of a tenant behind the back of its workers.
    async fn purge_tenant(&self, tenant: &str);

    /// A queue whose backend cannot be reached, or was never there. `None` where there is nothing to reach.
    async fn unreachable(&self) -> Option<Arc<dyn WorkQueue>> {
        None
    }

    /// Texts that no error may show to a client: passwords, hosts, users of the database.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }
}
