//! [`Sampler`]: what cannot be counted as it happens is looked up when somebody asks.

use std::collections::HashSet;
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use leasehold_domain::{KindStats, WorkQueue};
use leasehold_storage::Database;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

/// For so long an answer of the database is new enough, however many ask.
const FRESH: Duration = Duration::from_secs(5);
/// How long the database may take to answer. Who scrapes does not wait much longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Looks up the pool and the queue.
#[derive(Debug, Default)]
pub(crate) struct Sampler(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    asked: Option<Instant>,
    /// A kind of which there is nothing is not in the answer, and must not stay what it was.
    kinds: HashSet<String>,
}

impl Sampler {
    /// Asks the database, unless somebody has just done it or is doing it.
    ///
    /// # Cancel safety
    /// The next one asks.
    pub(crate) async fn sample(&self, db: &Database) {
        let pool = db.pool().state();
        let used = pool.open.saturating_sub(pool.idle);
        metrics::gauge!("leasehold_pool_connections", "state" => "idle").set(pool.idle);
        metrics::gauge!("leasehold_pool_connections", "state" => "used").set(used);

        let Ok(mut last) = self.0.try_lock() else { return };
        if last.asked.is_some_and(|asked| asked.elapsed() < FRESH) {
            return;
        }
        let ask = db.read(async |conn| conn.batch_execute("SELECT").await);
        let up = matches!(timeout(PATIENCE, ask).await, Ok(Ok(())));
        metrics::gauge!("leasehold_database_up").set(u8::from(up));
        // Of a queue that is too long to be counted it is not said that the database is away.
        let counted = timeout(PATIENCE, db.work_queue().stats()).await;
        last.asked = Some(Instant::now());
        match counted {
            Ok(Ok(kinds)) => last.set(kinds),
            Ok(Err(error)) => tracing::warn!(%error, "the queue cannot be measured"),
            Err(_) => tracing::warn!("the queue cannot be measured: no answer within {PATIENCE:?}"),
        }
    }
}

impl Last {
    fn set(&mut self, kinds: Vec<KindStats>) {
        let there: HashSet<String> = kinds.iter().map(|stats| stats.kind.clone()).collect();
        for gone in self.kinds.difference(&there) {
            set(KindStats {
                kind: gone.clone(),
                ready: 0,
                delayed: 0,
                claimed: 0,
                dead: 0,
                oldest_ready: None,
            });
        }
        self.kinds.extend(there);
        for stats in kinds {
            set(stats);
        }
    }
}

fn set(stats: KindStats) {
    let KindStats {
        kind,
        ready,
        delayed,
        claimed,
        dead,
        oldest_ready,
    } = stats;
    for (state, items) in [
        ("ready", ready),
        ("delayed", delayed),
        ("claimed", claimed),
        ("dead", dead),
    ] {
        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
        metrics::gauge!("leasehold_queue_items", "kind" => kind.clone(), "state" => state).set(items as f64);
    }
    let oldest = oldest_ready.unwrap_or_default();
    metrics::gauge!("leasehold_queue_oldest_ready_seconds", "kind" => kind).set(oldest);
}
