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
pub use memory::{MemoryClock, MemoryLock};
#[cfg(feature = "mock")]
pub use mock::MockDistributedLock;
pub use monotonic::{Monotonic, MonotonicClock};
pub use name::LockName;
pub use request::{Durability, LockMode, LockRequest, MAX_TTL, MIN_TTL, Ttl};
pub use slot::{Interval, IntervalSlots, MAX_TRIES, MissedSlots, OnCrash, Slots};
pub use tenant::{TenantConflict, TenantConflictReason};
