//! [`Locked`]: the extractor that takes a lock, last of all.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use leasehold_domain::{DistributedLock, Holder, LockRequest};

use crate::prefer::preferred_wait;
use crate::request_id::WholePath;
use crate::scope::{LockScope, ScopedGuard};
use crate::{Code, NoBody, Problem};

/// What a request locks. [`Locked`] calls the methods in their order here, and stops at the first refusal: a
/// request that is not allowed, or cannot be read, never touches the lock.
///
/// `S` is the state of the router, `B` the extractor of the body.
pub trait LockTarget<S, B = NoBody>: Sized + Send + Sync {
    /// The code of the 409 when somebody else has the lock.
    const CONFLICT: Code = Code::LockHeld;

    /// Finds out who asks, whether they may, and what for: 401, 403, 404.
    ///
    /// The path and the query are read here too, after the credentials, so that a stranger learns nothing: the
    /// extractors [`crate::ApiPath`] and [`crate::ApiQuery`] work on `parts`. As arguments of the handler they
    /// would come before.
    fn authorize(parts: &mut Parts, state: &S) -> impl Future<Output = Result<Self, Problem>> + Send;

    /// A last look at the whole request before the lock is asked for. Everything is admitted unless the target
    /// says otherwise: by a problem, or by an answer that needs no lock.
    fn admit(&self, body: &B, state: &S) -> impl Future<Output = Result<(), Early>> + Send {
        let _ = (body, state);
        std::future::ready(Ok(()))
    }

    /// Who gives the lock.
    fn lock(&self, state: &S) -> Arc<dyn DistributedLock>;

    /// The lock to ask for, and in whose name.
    ///
    /// # Errors
    /// What cannot be locked: 404, 422.
    fn request(&self, body: &B, state: &S) -> Result<LockRequest, Problem>;

    /// The longest that `Prefer: wait=<seconds>` may make a request wait: 30 seconds unless the target says
    /// otherwise.
    fn max_wait(&self, state: &S) -> Duration {
        let _ = state;
        Duration::from_secs(30)
    }
}

/// What ends a request before it has its lock.
#[derive(Debug)]
pub enum Early {
    /// It is refused.
    Problem(Problem),
    /// It is answered: there is nothing left to do for it.
    Answer(Box<Response>),
}

impl From<Problem> for Early {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl IntoResponse for Early {
    fn into_response(self) -> Response {
        match self {
            Self::Problem(problem) => problem.into_response(),
            Self::Answer(answer) => *answer,
        }
    }
}

/// What a request does, as others may read it while it holds its lock: `"<METHOD> <path>"`, cut to what fits into
/// a [`Holder`]'s operation.
pub fn operation(parts: &Parts) -> String {
    let whole = parts.extensions.get::<WholePath>();
    let path = whole.map_or(parts.uri.path(), |path| &*path.0);
    let mut operation = format!("{} {path}", parts.method);
    operation.truncate(operation.floor_char_boundary(Holder::MAX_FIELD_BYTES));
    operation
}

/// A request that holds its lock. As the last argument of a handler it authorizes the request, reads and checks
/// the body, and only then takes the lock that the target names; see [`LockTarget`].
///
/// The lock is tried once, or waited for as long as `Prefer: wait=<seconds>` asks and
/// [`LockTarget::max_wait`] allows. It is released before the response is sent; that is what
/// [`crate::LockScopeLayer`] does, and without it every request is refused with a 500.
///
/// Whoever only reads does not ask for `Locked`, whatever the method.
#[derive(Debug)]
pub struct Locked<T, B = NoBody> {
    /// What [`LockTarget::authorize`] found.
    pub target: T,
    /// The body, as its extractor made it.
    pub body: B,
    /// The lock.
    pub guard: ScopedGuard,
}

impl<S, T, B> FromRequest<S> for Locked<T, B>
where
    S: Send + Sync,
    T: LockTarget<S, B>,
    B: FromRequest<S> + Send + Sync,
    Problem: From<B::Rejection>,
{
    type Rejection = Early;

    async fn from_request(request: Request, state: &S) -> Result<Self, Early> {
        let (mut parts, body) = request.into_parts();
        let scope = LockScope::of(&parts.extensions)?;
        let target = T::authorize(&mut parts, state).await?;
        let wait = preferred_wait(&parts.headers).map(|wait| wait.min(target.max_wait(state)));
        let body = B::from_request(Request::from_parts(parts, body), state)
            .await
            .map_err(Problem::from)?;
        target.admit(&body, state).await?;

        let request = target.request(&body, state)?;
        let lock = target.lock(state);
        let acquired = match wait {
            None => lock.try_acquire(&request).await,
            Some(wait) => {
                scope.waits(wait);
                lock.acquire(&request, wait).await
            }
        };
        match acquired {
            Ok(guard) => Ok(Self {
                target,
                body,
                guard: scope.lend(lock, guard),
            }),
            Err(error) => Err(Early::Problem(match error.contention() {
                Some(contention) => Problem::contended(T::CONFLICT, contention),
                None => error.into(),
            })),
        }
    }
}
