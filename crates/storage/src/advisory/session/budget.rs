//! [`Budget`]: how many of the server's locks this process may have at once.
//!
//! The lock table of Postgres is shared by everybody who uses the server. When it is full, statements of others
//! fail that have nothing to do with us.
//! <https://www.postgresql.org/docs/current/runtime-config-locks.html#GUC-MAX-LOCKS-PER-TRANSACTION>

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use leasehold_domain::Unavailable;

#[derive(Debug)]
pub(super) struct Budget {
    limit: u32,
    used: AtomicU32,
}

/// One lock of the server, asked for or held.
#[derive(Debug)]
pub(super) struct ServerLock(Arc<Budget>);

impl Budget {
    pub(super) fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU32::new(0),
        })
    }

    pub(super) fn take(self: &Arc<Self>) -> Option<ServerLock> {
        let one_more = |used: u32| (used < self.limit).then(|| used + 1);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()
            .map(|_| ServerLock(Arc::clone(self)))
    }

    pub(super) fn exhausted(&self) -> Unavailable {
        let limit = self.limit;
        Unavailable::new(format!(
            "this process holds as many session locks as it may have, {limit}, half of the server's lock table: \
             raise max_locks_per_transaction"
        ))
    }
}

impl Drop for ServerLock {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}
