//! What users get on top of a lock, where a clause cannot see it or it is not about the backend.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use leasehold_domain::{
    AcquireError, DEFAULT_SESSION_TTL, DEFAULT_SESSION_WAIT, DistributedLock, DistributedLockExt, Holder,
    LockGuard, LockName, LockRequest, MemoryLock, MockDistributedLock, ReleaseError, Released, Unavailable,
    WithLockError, with_session_lock,
};

#[tokio::test]
async fn a_session_is_locked_under_its_tenant_and_thread() {
    let lock = MemoryLock::new();
    let name = LockName::new(["session", "acme", "thread-1"]).unwrap();
    let answer = with_session_lock(
        &lock,
        "acme",
        "thread-1",
        None,
        None,
        async |guard: &LockGuard| {
            assert_eq!(*guard.name(), name);
            let held = lock.inspect(&name).await.unwrap().unwrap();
            let slice = held.expires_at.unwrap() - held.acquired_at.unwrap();
            assert_eq!(slice.to_std().unwrap(), DEFAULT_SESSION_TTL);
            "done"
        },
    );
    assert_eq!(answer.await.unwrap(), "done");
    assert!(lock.is_idle());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_busy_is_waited_for_as_long_as_said() {
    let lock = MemoryLock::new();
    let name = LockName::new(["session", "acme", "thread-1"]).unwrap();
    let _turn = lock
        .try_acquire(&LockRequest::new(name, Holder::new("o", "op")))
        .await
        .unwrap();
    for (said, waits) in [
        (None, DEFAULT_SESSION_WAIT),
        (Some(Duration::from_secs(90)), Duration::from_secs(90)),
    ] {
        let answer = with_session_lock(&lock, "acme", "thread-1", None, said, async |_| {
            unreachable!("it is busy")
        });
        match answer.await {
            Err::<(), _>(WithLockError::Acquire(AcquireError::TimedOut { waited, .. })) => {
                assert!(
                    (waits..waits + Duration::from_millis(10)).contains(&waited),
                    "{waited:?}"
                );
            }
            other => panic!("{other:?}"),
        }
        let other = with_session_lock(&lock, "acme", "thread-2", None, said, async |_| 2);
        assert_eq!(other.await.unwrap(), 2);
    }
}

#[tokio::test]
async fn a_session_without_a_thread_is_invalid() {
    let lock = MemoryLock::new();
    let answer = with_session_lock(&lock, "acme", "", None, None, async |_| unreachable!("no name"));
    let error: WithLockError = Result::<(), _>::unwrap_err(answer.await);
    assert!(
        matches!(error, WithLockError::Acquire(AcquireError::Invalid(invalid)) if invalid.field() == "name")
    );
}

/// The tenant is the holder as well, which has less room than a name. It is the name that the caller gave.
#[tokio::test]
async fn a_session_of_a_tenant_that_is_too_long_is_invalid() {
    let lock = MemoryLock::new();
    let longest = "t".repeat(Holder::MAX_FIELD_BYTES);
    let answer = with_session_lock(&lock, &longest, "thread-1", None, None, async |_| 1);
    assert_eq!(answer.await.unwrap(), 1);
    let longer = longest + "t";
    let answer = with_session_lock(&lock, &longer, "thread-1", None, None, async |_| 1);
    let error = answer.await.unwrap_err();
    assert!(
        matches!(&error, WithLockError::Acquire(AcquireError::Invalid(invalid)) if invalid.field() == "name"),
        "{error:?}"
    );
}

/// The last was had, and the first is gone: that is no success.
#[tokio::test]
async fn locks_of_which_one_was_lost_meanwhile_are_not_had() {
    let memory = MemoryLock::new();
    let mut lock = MockDistributedLock::new();
    let (grants, releases) = (memory.clone(), memory.clone());
    lock.expect_acquire().returning(move |request, _| {
        let guard = grants.try_acquire(request).now_or_never().unwrap();
        if request.name().to_string() == "b" {
            grants.lose(&LockName::new(["a"]).unwrap());
        }
        guard
    });
    lock.expect_release()
        .times(2)
        .returning(move |guard| releases.release(guard).now_or_never().unwrap());
    let requests =
        ["a", "b"].map(|item| LockRequest::new(LockName::new([item]).unwrap(), Holder::new("o", "op")));
    let error = lock
        .acquire_all(requests.to_vec(), Duration::ZERO)
        .await
        .unwrap_err();
    assert!(matches!(error, AcquireError::Unavailable(_)), "{error:?}");
    assert!(memory.is_idle());
}

#[tokio::test]
async fn sessions_can_be_locked_in_a_spawned_task() {
    let lock: Arc<dyn DistributedLock> = Arc::new(MemoryLock::new());
    let turn = tokio::spawn(async move {
        with_session_lock(&*lock, "acme", "thread-1", None, None, async |_: &LockGuard| {
            tokio::task::yield_now().await;
            1
        })
        .await
    });
    assert_eq!(turn.await.unwrap().unwrap(), 1);
}

#[tokio::test]
async fn work_that_ended_in_time_counts_though_its_release_failed() {
    let mut lock = MockDistributedLock::new();
    lock.expect_acquire()
        .returning(|request, _| Ok(LockGuard::for_test(request.name().clone())));
    lock.expect_release()
        .times(1)
        .returning(|_| Err(ReleaseError::Unavailable(Unavailable::new("the network is down"))));
    let request = LockRequest::new(LockName::new(["a"]).unwrap(), Holder::new("o", "op"));
    assert_eq!(
        lock.with_lock(&request, Duration::ZERO, async |_| 7)
            .await
            .unwrap(),
        7
    );
}

#[tokio::test]
async fn locks_taken_together_go_back_last_first() {
    let mut lock = MockDistributedLock::new();
    let mut order = mockall::Sequence::new();
    for item in ["a", "b"] {
        lock.expect_acquire()
            .withf(move |request, _| request.name().to_string() == item)
            .times(1)
            .in_sequence(&mut order)
            .returning(|request, _| Ok(LockGuard::for_test(request.name().clone())));
    }
    for item in ["b", "a"] {
        lock.expect_release()
            .withf(move |guard| guard.name().to_string() == item)
            .times(1)
            .in_sequence(&mut order)
            .returning(|_| Ok(Released::Held));
    }
    let requests =
        ["b", "a"].map(|item| LockRequest::new(LockName::new([item]).unwrap(), Holder::new("o", "op")));
    let guards = lock.acquire_all(requests.to_vec(), Duration::ZERO).await.unwrap();
    lock.release_all(guards).await;
}

#[tokio::test]
async fn of_several_requests_with_one_out_of_bounds_none_is_sent() {
    // Whatever is asked of it fails the test: nothing is expected.
    let lock = MockDistributedLock::new();
    let [good, bad] =
        ["a", "b"].map(|item| LockRequest::new(LockName::new([item]).unwrap(), Holder::new("o", "op")));
    let requests = vec![good, bad.with_ttl(Duration::ZERO)];
    let error = lock.acquire_all(requests, Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, AcquireError::Invalid(invalid) if invalid.field() == "ttl"));
}
