//! Waiting for a state instead of a time.

use std::time::{Duration, Instant};

/// How long a state may take to come. Only a fault takes so long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a state, asking every few milliseconds.
pub async fn eventually(what: &str, reached: impl AsyncFnMut() -> bool) {
    within(PATIENCE, what, reached).await;
}

/// Waits for a state that must come within a bound that is promised. Answers how long it took.
pub async fn within(bound: Duration, what: &str, mut reached: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    loop {
        if reached().await {
            return start.elapsed();
        }
        assert!(start.elapsed() < bound, "not within {bound:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The answer of a future that must end.
pub async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}
