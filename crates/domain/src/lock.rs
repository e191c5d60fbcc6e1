//! [`DistributedLock`]: what every backend does; [`DistributedLockExt`]: what its users get on top.

use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;

use crate::{
    AcquireError, ExtendError, HeldLock, Holder, Invalid, LockGuard, LockId, LockName, LockRequest,
    ReleaseError, ResumeError, Unavailable, WithLockError,
};

/// The `ttl` of [`with_session_lock`] when the caller names none: 30 seconds.
pub const DEFAULT_SESSION_TTL: Duration = Duration::from_secs(30);
/// The longest wait of [`with_session_lock`] when the caller names none: 5 seconds.
pub const DEFAULT_SESSION_WAIT: Duration = Duration::from_secs(5);

/// What a release found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The hold was ours and has ended.
    Held,
    /// The hold had ended before: it expired, was lost or was taken away. Nothing of a later holder was
    /// touched.
    AlreadyGone,
}

/// A lock that excludes across processes. Object-safe: services keep an `Arc<dyn DistributedLock>`.
///
/// Nothing is re-entrant: a second attempt with the same request is contended, in the same process too.
#[async_trait]
#[cfg_attr(
    not(doc),
    allow(clippy::missing_errors_doc, reason = "each method has its own section")
)]
pub trait DistributedLock: Send + Sync {
    /// Tries once and does not wait.
    ///
    /// # Errors
    /// [`AcquireError::Contended`] when somebody else has it, [`AcquireError::NotFound`],
    /// [`AcquireError::Invalid`], [`AcquireError::Unavailable`] and [`AcquireError::OutcomeUnknown`]; never
    /// [`AcquireError::TimedOut`].
    ///
    /// # Cancel safety
    /// A dropped attempt leaves nothing behind: what it may have been granted is given back in the background,
    /// and ends after its `ttl` at the latest.
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError>;

    /// Tries until the lock is free or `wait` has passed; at least once. Waiting holds no connection, and a backend that
    /// does not answer lengthens it by a moment only.
    ///
    /// # Errors
    /// As [`DistributedLock::try_acquire`], with [`AcquireError::TimedOut`] in the place of
    /// [`AcquireError::Contended`].
    ///
    /// # Cancel safety
    /// As [`DistributedLock::try_acquire`]; the place in the queue is lost.
    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError>;

    /// Takes up a hold whose answer was lost, by the id from [`AcquireError::OutcomeUnknown`].
    ///
    /// # Errors
    /// [`ResumeError::NotHeld`] when there is no such hold, [`ResumeError::Invalid`] and
    /// [`ResumeError::Unavailable`].
    ///
    /// # Cancel safety
    /// Nothing is lost: call it again before the hold expires.
    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError>;

    /// Moves the end of the hold to `ttl` from now, if that is later, but never beyond `max_hold`. The `ttl` is
    /// also the slice of the renewals that follow.
    ///
    /// # Errors
    /// [`ExtendError::Lost`] when the hold is over: success is never answered for a lock that is gone.
    /// [`ExtendError::MaxHoldReached`], [`ExtendError::Invalid`] and [`ExtendError::Unavailable`].
    ///
    /// # Cancel safety
    /// The hold may or may not have been extended; it stays held either way.
    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError>;

    /// Ends the hold, and says when that is done. A later holder is never touched.
    ///
    /// # Errors
    /// [`ReleaseError::Unavailable`] when the backend did not answer; the hold then ends by itself.
    ///
    /// # Cancel safety
    /// The release goes on in the background.
    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError>;

    /// Who holds the lock now. One of them, when shared holders are several.
    ///
    /// # Errors
    /// [`Unavailable`] when the backend cannot be asked.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable>;
}

/// What users of a [`DistributedLock`] get on top of it. There is nothing to implement.
pub trait DistributedLockExt: DistributedLock {
    /// As [`DistributedLock::try_acquire`], with contention as `None` for those who branch on it.
    ///
    /// # Errors
    /// Those of [`DistributedLock::try_acquire`] but [`AcquireError::Contended`].
    ///
    /// # Cancel safety
    /// As [`DistributedLock::try_acquire`].
    fn try_acquire_opt(
        &self,
        request: &LockRequest,
    ) -> impl Future<Output = Result<Option<LockGuard>, AcquireError>> + Send {
        async move {
            match self.try_acquire(request).await {
                Ok(guard) => Ok(Some(guard)),
                Err(AcquireError::Contended(_)) => Ok(None),
                Err(error) => Err(error),
            }
        }
    }

    /// Runs `work` while the lock is held, and answers after the lock was released.
    ///
    /// The work is cancelled when the lock is lost. A panic of the work releases the lock and goes on.
    ///
    /// # Errors
    /// [`WithLockError::Acquire`] when the work did not start, [`WithLockError::Lost`] when the hold did not
    /// last until the work was done.
    ///
    /// # Cancel safety
    /// The work is dropped and the lock released in the background.
    #[expect(
        async_fn_in_trait,
        reason = "whether the future is Send depends on the caller's work"
    )]
    async fn with_lock<T, W>(
        &self,
        request: &LockRequest,
        wait: Duration,
        work: W,
    ) -> Result<T, WithLockError>
    where
        W: AsyncFnOnce(&LockGuard) -> T,
    {
        let guard = self.acquire(request, wait).await?;
        let done = tokio::select! {
            biased;
            () = guard.lost() => None,
            done = work(&guard) => Some(done),
        };
        let Some(done) = done else {
            return Err(WithLockError::Lost);
        };
        match self.release(guard).await {
            Ok(Released::Held) => Ok(done),
            Ok(Released::AlreadyGone) => Err(WithLockError::Lost),
            Err(error) => {
                // The work ended while the hold was trusted: it was exclusive, whatever becomes of the release.
                tracing::warn!(%error, lock = %request.name(), "a lock was not released, it ends by itself");
                Ok(done)
            }
        }
    }

    /// Acquires several locks, all or nothing, within `wait` in all.
    ///
    /// They are taken in the order of their names, so that two callers never wait for each other; of requests
    /// with the same name the first counts.
    ///
    /// # Errors
    /// That of the first lock that could not be acquired; [`AcquireError::Unavailable`] when one was lost while the
    /// others were waited for. Those that are held are released by then.
    ///
    /// # Cancel safety
    /// What was acquired is released in the background.
    fn acquire_all(
        &self,
        mut requests: Vec<LockRequest>,
        wait: Duration,
    ) -> impl Future<Output = Result<LockGuards, AcquireError>> + Send {
        async move {
            requests.sort_by(|a, b| a.name().cmp(b.name()));
            requests.dedup_by(|later, earlier| later.name() == earlier.name());
            for request in &requests {
                request.validate()?;
            }
            let start = tokio::time::Instant::now();
            let mut guards = LockGuards(Vec::with_capacity(requests.len()));
            for request in &requests {
                let left = wait.saturating_sub(start.elapsed());
                let acquired = tokio::select! {
                    biased;
                    () = guards.one_lost() => Err(lost_meanwhile()),
                    acquired = self.acquire(request, left) => acquired,
                };
                match acquired {
                    Ok(guard) => guards.0.push(guard),
                    Err(error) => {
                        self.release_all(guards).await;
                        return Err(error);
                    }
                }
            }
            if guards.iter().any(LockGuard::is_lost) {
                self.release_all(guards).await;
                return Err(lost_meanwhile());
            }
            Ok(guards)
        }
    }

    /// Releases several locks, the last acquired first. What cannot be released ends by itself, and is logged.
    ///
    /// # Cancel safety
    /// The rest is released in the background.
    fn release_all(&self, guards: LockGuards) -> impl Future<Output = ()> + Send {
        async move {
            let mut guards = guards.0;
            while let Some(guard) = guards.pop() {
                if let Err(error) = self.release(guard).await {
                    tracing::warn!(%error, "a lock was not released, it ends by itself");
                }
            }
        }
    }
}

impl<L: DistributedLock + ?Sized> DistributedLockExt for L {}

/// Several locks that were acquired together, in the order of their names.
#[must_use = "the locks are released as soon as the guards are dropped"]
#[derive(Debug)]
pub struct LockGuards(Vec<LockGuard>);

impl LockGuards {
    /// The guards, in the order of their names.
    pub fn iter(&self) -> std::slice::Iter<'_, LockGuard> {
        self.0.iter()
    }

    /// Waits until one of them is lost; for ever where there is none.
    async fn one_lost(&self) {
        let mut all: Vec<_> = self.iter().map(|guard| Box::pin(guard.lost())).collect();
        std::future::poll_fn(|context| {
            let lost = all.iter_mut().any(|lost| lost.as_mut().poll(context).is_ready());
            if lost { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

fn lost_meanwhile() -> AcquireError {
    AcquireError::Unavailable(Unavailable::new("a lock was lost while others were waited for"))
}

/// Runs `work` while the session `thread` of `tenant` is locked: one turn of a conversation at a time.
///
/// The lock's name is `["session", tenant, thread]`. A `None` means [`DEFAULT_SESSION_TTL`] and
/// [`DEFAULT_SESSION_WAIT`].
///
/// # Errors
/// As [`DistributedLockExt::with_lock`]; also when `tenant` or `thread` make no valid name. The tenant is the
/// holder as well, and has at most 256 bytes.
///
/// # Cancel safety
/// As [`DistributedLockExt::with_lock`].
pub async fn with_session_lock<L, T, W>(
    lock: &L,
    tenant: &str,
    thread: &str,
    ttl: Option<Duration>,
    wait: Option<Duration>,
    work: W,
) -> Result<T, WithLockError>
where
    L: DistributedLock + ?Sized,
    W: AsyncFnOnce(&LockGuard) -> T,
{
    let name = LockName::new(["session", tenant, thread]).map_err(AcquireError::Invalid)?;
    if tenant.len() > Holder::MAX_FIELD_BYTES {
        let reason = format!("its tenant has more than {} bytes", Holder::MAX_FIELD_BYTES);
        return Err(AcquireError::Invalid(Invalid::new("name", reason)).into());
    }
    let request =
        LockRequest::new(name, Holder::new(tenant, "session")).with_ttl(ttl.unwrap_or(DEFAULT_SESSION_TTL));
    lock.with_lock(&request, wait.unwrap_or(DEFAULT_SESSION_WAIT), work)
        .await
}
