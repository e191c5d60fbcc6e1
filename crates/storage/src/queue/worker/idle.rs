//! [`Idle`]: how a worker waits for work.

use std::time::Duration;

use futures_util::future::{join_all, select_all};
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::queue::store::{PgWorkQueue, signal_key};
use crate::signals::Subscription;
use crate::waiting::ANNOUNCE;

/// It rests a little longer each time that it found nothing, until somebody wakes it, or an item's time comes.
#[derive(Debug)]
pub(super) struct Idle {
    shortest: Duration,
    longest: Duration,
    pause: Duration,
    /// One for each kind, once it has found nothing.
    ears: Vec<Subscription>,
    announced: Instant,
    /// Who woke us may have forgotten that we wait.
    forgotten: bool,
}

impl Idle {
    pub(super) fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            pause: shortest,
            ears: Vec::new(),
            announced: Instant::now(),
            forgotten: false,
        }
    }

    /// There was work.
    pub(super) fn found(&mut self) {
        self.pause = self.shortest;
    }

    /// Comes back when it is time to look again, or when this process has put something back.
    pub(super) async fn wait(&mut self, queue: &PgWorkQueue, kinds: &[String], again: &Notify) {
        if self.ears.is_empty() {
            let keys = kinds.iter().filter_map(|kind| signal_key(kind));
            self.ears = join_all(keys.map(|key| queue.process.signals.wait_for(key))).await;
            self.announced = Instant::now();
            // What came before the ears were open was not heard.
            return;
        }
        if self.forgotten || self.announced.elapsed() > ANNOUNCE {
            join_all(self.ears.iter().map(Subscription::announce)).await;
            self.announced = Instant::now();
            if std::mem::take(&mut self.forgotten) {
                return;
            }
        }
        let due = queue.next_due(kinds).await.unwrap_or_default();
        let pause = self.jittered();
        let sleep = due.map_or(pause, |due| pause.min(due + Duration::from_millis(1)));
        self.pause = self.longest.min(self.pause * 2);
        tokio::select! {
            () = heard(&self.ears) => {
                self.forgotten = true;
                self.pause = self.shortest;
            }
            () = again.notified() => self.pause = self.shortest,
            () = tokio::time::sleep(sleep.min(ANNOUNCE)) => {}
        }
    }

    /// The database did not answer.
    pub(super) async fn recover(&mut self) {
        tokio::time::sleep(self.jittered()).await;
        self.pause = self.longest.min(self.pause * 2);
    }

    fn jittered(&self) -> Duration {
        rand::rng().random_range(self.pause / 2..=self.pause)
    }
}

async fn heard(ears: &[Subscription]) {
    if ears.is_empty() {
        return std::future::pending().await;
    }
    select_all(ears.iter().map(|ear| Box::pin(ear.freed()))).await;
}
