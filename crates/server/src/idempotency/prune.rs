//! Answers that are older than a day are deleted, a few at a time.

use std::time::Duration;

use leasehold_storage::Database;

use super::store;

/// How often they are looked for.
const PERIOD: Duration = Duration::from_secs(10 * 60);

/// Deletes stored answers when they have become too old, for ever.
pub(crate) async fn prune(db: Database) {
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        // Each bite is a transaction of its own: it holds its rows for a moment only.
        loop {
            match db.read(async |conn| store::forget(conn).await).await {
                Ok(0) => break,
                Ok(forgotten) => tracing::debug!(forgotten, "old answers were deleted"),
                Err(error) => {
                    tracing::warn!(%error, "old answers could not be deleted");
                    break;
                }
            }
        }
    }
}
