//! [`Provider`]: what a backend must give so that the clauses can be run against it.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{DistributedLock, Holder, LockName};
use tokio::process::Command;

/// What bounds the life of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It ends by itself after its `ttl` unless renewed: it has `expires_at`, `trusted_until` and, when
    /// exclusive and durable, a fencing token, and it can be resumed by its id.
    Lease,
    /// It lives as long as a session of the backend: it has none of these.
    Session,
}

/// What a backend can do.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// What bounds the life of its holds.
    pub life: Life,
    /// Whether it has `LockMode::Shared`. One that has not must refuse it as invalid, naming `mode`.
    pub shared: bool,
    /// Whether it excludes across processes; then [`Provider::holder_process`] gives one.
    pub processes: bool,
}

/// Makes locks of one backend, and breaks them. One provider serves one test.
pub trait Provider {
    /// What the backend can do.
    fn abilities(&self) -> Abilities;

    /// A lock on the same backend that shares no memory with those made before, as in another process. Where
    /// holds live in the memory of one process it is another handle on the same.
    async fn process(&self) -> Arc<dyn DistributedLock>;

    /// A name with these last two parts that can be locked (in a table of the caller: whose row exists) and that
    /// no other test uses. Equal parts give the equal name, and whatever comes before them is always the same.
    async fn name(&self, scope: &str, item: &str) -> LockName;

    /// What the backend holds in any name just now, or who waits there, for a reader; `None` when it is nothing.
    /// Leases that are over do not count.
    async fn residue(&self) -> Option<String>;

    /// Takes the lock away from its holder behind the back of its process: an operator ends the lease, the
    /// server terminates the session. Returns when the backend has no holder any more.
    async fn lose(&self, name: &LockName);

    /// Moves the end of the lease into the past, as if its heartbeats had not come. `false`, and nothing done,
    /// where holds are no leases.
    async fn expire(&self, name: &LockName) -> bool;

    /// Keeps the renewals of the lease from arriving, from now on; its holder is not told. `false`, and nothing
    /// done, where that cannot be had without stopping a process.
    async fn stop_heartbeats(&self, name: &LockName) -> bool {
        _ = name;
        false
    }

    /// Lets time pass on the clock of the backend.
    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// How to start a process that connects to the same backend and calls [`crate::hold_as_told`]. `None` where
    /// holds live in one process, as [`Abilities::processes`] says.
    fn holder_process(&self) -> Option<Command> {
        None
    }

    /// What the backend tells others of a holder, where it has no room for all of it.
    fn told(&self, holder: &Holder) -> Holder {
        holder.clone()
    }

    /// A lock whose backend cannot be reached, or was never there. `None` where there is nothing to reach.
    async fn unreachable(&self) -> Option<Arc<dyn DistributedLock>> {
        None
    }

    /// A name that could be locked if what it stands for existed. `None` where every name can be locked.
    async fn absent_name(&self) -> Option<LockName> {
        None
    }

    /// Texts that no error may show to a client: passwords, hosts, users of the database.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }
}
