//! The clauses, by what they are about. Each is a promise in one sentence, and the experiment that tests it.

mod basics;
mod bounds;
mod cancellation;
mod errors;
mod guards;
mod leases;
mod loss;
mod names;
mod processes;
mod races;
mod several;
mod sharing;
mod waiting;
mod work;

use std::time::Duration;

use leasehold_domain::{
    AcquireError, Contention, DistributedLock, Holder, LockGuard, LockMode, LockName, LockRequest, Released,
};

pub use basics::*;
pub use bounds::*;
pub use cancellation::*;
pub use errors::*;
pub use guards::*;
pub use leases::*;
pub use loss::*;
pub use names::*;
pub use processes::*;
pub use races::*;
pub use several::*;
pub use sharing::*;
pub use waiting::*;
pub use work::*;

use crate::patience::{LONG_WAIT, within_cap};
use crate::{Life, Provider};

/// A slice short enough that its heartbeat finds a loss soon, and long enough that a busy machine does not miss
/// it.
const SHORT_TTL: Duration = Duration::from_secs(1);

fn request(name: &LockName) -> LockRequest {
    LockRequest::new(name.clone(), Holder::new("conformance", "clause"))
}

fn shared(name: &LockName) -> LockRequest {
    request(name).with_mode(LockMode::Shared)
}

fn is_lease<P: Provider>(provider: &P) -> bool {
    match provider.abilities().life {
        Life::Lease => true,
        Life::Session => false,
    }
}

/// Takes a lock that must be free now.
async fn take(lock: &dyn DistributedLock, request: &LockRequest) -> LockGuard {
    within_cap("an attempt", lock.try_acquire(request))
        .await
        .unwrap_or_else(|error| panic!("{} is free: {error:?}", request.name()))
}

/// Tries a lock that must be held now; who holds it is answered.
async fn refused(lock: &dyn DistributedLock, request: &LockRequest) -> Contention {
    match within_cap("an attempt", lock.try_acquire(request)).await {
        Err(AcquireError::Contended(contention)) => {
            assert_eq!(contention.name, *request.name());
            contention
        }
        other => panic!("{} is held: {other:?}", request.name()),
    }
}

/// Takes a lock that must become free without anybody's doing.
async fn take_soon(lock: &dyn DistributedLock, request: &LockRequest) -> LockGuard {
    within_cap("a wait", lock.acquire(request, LONG_WAIT))
        .await
        .unwrap_or_else(|error| panic!("{} becomes free: {error:?}", request.name()))
}

/// Gives a lock back that must still be held.
async fn give_back(lock: &dyn DistributedLock, guard: LockGuard) {
    let released = within_cap("a release", lock.release(guard)).await;
    assert_eq!(released.expect("the backend answers"), Released::Held);
}

/// Gives a lock back that must have been lost.
async fn give_back_lost(lock: &dyn DistributedLock, guard: LockGuard) {
    let released = within_cap("a release", lock.release(guard)).await;
    assert_eq!(released.expect("the backend answers"), Released::AlreadyGone);
}

/// The lock is free now, or becomes free by itself, for everybody.
async fn becomes_free(lock: &dyn DistributedLock, request: &LockRequest) {
    let guard = take_soon(lock, request).await;
    give_back(lock, guard).await;
}

/// The field that an attempt was refused for.
fn invalid_field(answer: Result<LockGuard, AcquireError>) -> &'static str {
    match answer {
        Err(AcquireError::Invalid(invalid)) => invalid.field(),
        other => panic!("out of bounds, but {other:?}"),
    }
}

/// Lets the lease of `guard` end without its heartbeats. `false` where there are no leases, which the guard and
/// the abilities must say too.
async fn expire<P: Provider>(provider: &P, guard: &LockGuard) -> bool {
    let expired = provider.expire(guard.name()).await;
    assert_eq!(expired, is_lease(provider));
    assert_eq!(guard.expires_at().is_some(), expired);
    expired
}

/// Where there is no shared mode, every way to ask for it is refused by name, and holds nothing. `true` there.
async fn shared_is_refused<P: Provider>(provider: &P, name: &LockName) -> bool {
    if provider.abilities().shared {
        return false;
    }
    let lock = provider.process().await;
    assert_eq!(invalid_field(lock.try_acquire(&shared(name)).await), "mode");
    assert_eq!(
        invalid_field(lock.acquire(&shared(name), LONG_WAIT).await),
        "mode"
    );
    give_back(&*lock, take(&*lock, &request(name)).await).await;
    true
}
