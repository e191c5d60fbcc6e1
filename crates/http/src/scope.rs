//! [`LockScopeLayer`]: a request's locks are released before its response is sent.
//!
//! A lock that is released when the handler's locals are dropped is released while the response is already on
//! its way: a client that writes again at once meets its own lock. So the layer owns a slot in the request's
//! extensions. A handler borrows its guard from there, and whatever becomes of the handler, the guard is back in
//! the slot when the layer goes on; the layer releases it, waits for the answer, and then lets the response go.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::{FromRequestParts, Request};
use axum::http::Extensions;
use axum::http::request::Parts;
use axum::response::Response;
use futures_util::future::BoxFuture;
use leasehold_domain::{DistributedLock, LockGuard};
use tower::{Layer, Service};

use crate::Problem;
use crate::prefer::{PREFERENCE_APPLIED, applied};

/// How long a response waits for the release of its locks. After that the release goes on in the background.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Releases the locks that [`crate::Locked`] took for a request before its response is sent.
///
/// It goes around the layers that catch panics or cut requests off by time, so that their answers too are sent
/// after the release, and inside of [`crate::RequestIdLayer`]. When the request is dropped because its client has
/// gone, or a panic goes through the layer, the locks are released in the background.
#[derive(Clone, Copy, Debug, Default)]
pub struct LockScopeLayer;

impl<I> Layer<I> for LockScopeLayer {
    type Service = WithLockScope<I>;

    fn layer(&self, inner: I) -> WithLockScope<I> {
        WithLockScope(inner)
    }
}

/// The service that [`LockScopeLayer`] makes.
#[derive(Clone, Copy, Debug)]
pub struct WithLockScope<I>(I);

impl<I> Service<Request> for WithLockScope<I>
where
    I: Service<Request, Response = Response> + Clone + Send + 'static,
    I::Future: Send,
    I::Error: Send,
{
    type Response = Response;
    type Error = I::Error;
    type Future = BoxFuture<'static, Result<Response, I::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let scope = LockScope::default();
        request.extensions_mut().insert(scope.clone());
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let (held, wait) = scope.close();
            release(held).await;
            let mut response = answer?;
            if let Some(wait) = wait {
                response.headers_mut().insert(PREFERENCE_APPLIED, applied(wait));
            }
            Ok(response)
        })
    }
}

/// Releases the last taken first.
async fn release(held: Vec<Held>) {
    if held.is_empty() {
        return;
    }
    let all = async {
        for Held { lock, guard } in held.into_iter().rev() {
            let name = guard.name().clone();
            if let Err(error) = lock.release(guard).await {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, lock = %name, "a lock was not released, it ends by itself");
            }
        }
    };
    if tokio::time::timeout(RELEASE_TIMEOUT, all).await.is_err() {
        tracing::warn!("a release takes long: the response is sent before it is done");
    }
}

/// A guard and who can release it.
struct Held {
    lock: Arc<dyn DistributedLock>,
    guard: LockGuard,
}

/// The slot of a request: what is put in here is released before the response is sent.
///
/// [`crate::Locked`] uses it by itself. As an extractor of its own it lets a handler take further locks under
/// the same rule. It fails only where the [`LockScopeLayer`] is missing.
#[derive(Clone, Default)]
pub struct LockScope(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    held: Vec<Held>,
    wait: Option<Duration>,
    closed: bool,
}

impl LockScope {
    pub(crate) fn of(extensions: &Extensions) -> Result<Self, Problem> {
        let scope = extensions.get::<Self>().cloned();
        scope.ok_or_else(|| Problem::internal("locks are taken here, but the router has no LockScopeLayer"))
    }

    /// Notes that the response is to say, in `Preference-Applied`, how long the request was willing to wait.
    pub fn waits(&self, wait: Duration) {
        self.state().wait = Some(wait);
    }

    /// Takes a guard into the scope and lends it out again. `lock` is what acquired it, and what will release
    /// it.
    pub fn lend(&self, lock: Arc<dyn DistributedLock>, guard: LockGuard) -> ScopedGuard {
        ScopedGuard {
            held: Some(Held { lock, guard }),
            scope: self.clone(),
        }
    }

    fn close(&self) -> (Vec<Held>, Option<Duration>) {
        let mut state = self.state();
        state.closed = true;
        (std::mem::take(&mut state.held), state.wait)
    }

    fn give_back(&self, held: Held) {
        let late = {
            let mut state = self.state();
            if state.closed {
                Some(held)
            } else {
                state.held.push(held);
                None
            }
        };
        // The response has gone: a guard that outlived it in a task releases in the background.
        drop(late);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LockScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockScope").finish_non_exhaustive()
    }
}

impl<S: Sync> FromRequestParts<S> for LockScope {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::of(&parts.extensions)
    }
}

/// A [`LockGuard`] on loan from the request's scope. Dropping it gives the guard back, and the lock is released
/// before the response is sent.
///
/// It can be moved into a spawned task whose work must not stop half way when the client goes away: the lock
/// then stays held until the task drops it.
#[must_use = "the lock is released when the handler has ended, or this was dropped"]
#[clippy::has_significant_drop]
pub struct ScopedGuard {
    /// `None` only while it is dropped or taken apart.
    held: Option<Held>,
    scope: LockScope,
}

impl ScopedGuard {
    /// Takes the guard out of the request's scope, for calls that want it by value. Whoever has it then releases
    /// it: the response no longer waits for that.
    pub fn into_inner(mut self) -> LockGuard {
        match self.held.take() {
            Some(held) => held.guard,
            None => unreachable!("the guard is taken only here and in drop"),
        }
    }
}

impl Deref for ScopedGuard {
    type Target = LockGuard;

    fn deref(&self) -> &LockGuard {
        match &self.held {
            Some(held) => &held.guard,
            None => unreachable!("the guard is taken only by value and in drop"),
        }
    }
}

impl Drop for ScopedGuard {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            self.scope.give_back(held);
        }
    }
}

impl fmt::Debug for ScopedGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ScopedGuard").field(&**self).finish()
    }
}
