#![doc = include_str!("../README.md")]

mod error;
mod fencing;
mod guard;
mod holder;
mod lock;
mod memory;
#[cfg(feature = "mock")]
mod mock;
mod monotonic;
mod name;
mod queue;
mod request;
mod slot;
mod tenant;

pub use error::{
    AcquireError, Contention, ErrorClass, ExtendError, Invalid, ReleaseError, ResumeError, Unavailable,
    WithLockError,
};
pub use fencing::{FencingToken, LockId};
pub use guard::{GuardParts, HoldControl, LockGuard};
pub use holder::{HeldLock, Holder, HolderSession};
pub use lock::{
    DEFAULT_SESSION_TTL, DEFAULT_SESSION_WAIT, DistributedLock, DistributedLockExt, LockGuards, Released,
    with_session_lock,
};
pub use memory::{MemoryClock, MemoryLock, MemoryQueue};
#[cfg(feature = "mock")]
pub use mock::{MockDistributedLock, MockWorkQueue};
pub use monotonic::{Monotonic, MonotonicClock};
pub use name::LockName;
pub use queue::{
    CLAIM_LEASES, Claim, ClaimKey, ClaimRequest, ClaimToken, Claimed, DEFAULT_MAX_ATTEMPTS, DEFAULT_PRIORITY,
    DeadLetter, Failure, KindStats, MAX_CLAIM_BATCH, MAX_DELAY, NewWork, Outcome, Page, QueueError, Requeue,
    Retention, Retry, Scope, WorkId, WorkItem, WorkQueue, WorkState, check_delay, check_lease, kept_error,
};
pub use request::{Durability, LockMode, LockRequest, MAX_TTL, MIN_TTL, Ttl};
pub use slot::{Interval, IntervalSlots, MAX_TRIES, MissedSlots, OnCrash, Slots};
pub use tenant::{TenantConflict, TenantConflictReason};
