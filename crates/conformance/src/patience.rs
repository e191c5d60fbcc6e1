//! Waiting for a state: looked at again and again, with a cap that only a hang reaches.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::Provider;

/// After which a state that was waited for counts as never reached: far beyond what a busy machine needs.
pub(crate) const CAP: Duration = Duration::from_secs(30);

/// How long clauses ask to wait for a lock: so much longer than the cap that whoever gets it only at the end of the
/// wait is too late.
pub(crate) const LONG_WAIT: Duration = Duration::from_secs(600);

/// The result of `future`, which must come before the cap.
pub(crate) async fn within_cap<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(CAP, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not within {CAP:?}"),
    }
}

/// Looks until `state` answers `None`; fails with its last answer at the cap.
pub(crate) async fn until_none<T: std::fmt::Debug>(what: &str, mut state: impl AsyncFnMut() -> Option<T>) {
    let start = Instant::now();
    while let Some(now) = state().await {
        assert!(start.elapsed() < CAP, "{what}: still {now:?} after {CAP:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until the backend keeps nothing of what a clause did.
pub async fn leaves_nothing<P: Provider>(provider: &P) {
    until_none("the backend keeps something", async || provider.residue().await).await;
}
