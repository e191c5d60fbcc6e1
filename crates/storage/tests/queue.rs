//! The work queue: the clauses of every queue, and what only this one promises.

mod clauses;
mod interleavings;
mod load;
mod statements;
mod worker;

use std::time::Duration;

use async_trait::async_trait;
use leasehold_domain::{Claim, ClaimRequest, NewWork, Outcome, Scope, WorkQueue};
use leasehold_storage::{Database, Dropped, GivenUp, PgWorkQueue, Processed, Processor, WorkerHooks};
use tokio::sync::mpsc;
use tokio_postgres::Client;

use crate::support::TestDatabase;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

struct Bench {
    database: TestDatabase,
    client: Client,
    process: Database,
    queue: PgWorkQueue,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let process = Database::connect(database.options(), 8).await.unwrap();
        let queue = process.work_queue();
        Self {
            database,
            client,
            process,
            queue,
        }
    }

    /// A queue that shares no memory with ours.
    async fn other(&self) -> PgWorkQueue {
        let process = Database::connect(self.database.options(), 8).await.unwrap();
        process.work_queue()
    }

    async fn enqueue(&self, ids: impl IntoIterator<Item = u32>) {
        let many: Vec<NewWork> = ids.into_iter().map(|id| work(&id.to_string())).collect();
        self.queue.enqueue_many(&many).await.unwrap();
    }

    async fn take(&self) -> Claim {
        let mut claims = self.queue.claim(&request()).await.unwrap().claims;
        assert_eq!(claims.len(), 1);
        claims.remove(0)
    }

    async fn number(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    async fn text(&self, sql: &str) -> String {
        let row = self.client.query_opt(sql, &[]).await.unwrap();
        row.map(|row| row.get(0)).unwrap_or_default()
    }

    async fn is_empty(&self) -> bool {
        let rows = "SELECT (SELECT count(*) FROM leasehold.work_items) + (SELECT count(*) FROM leasehold.work_claims)";
        self.number(rows).await == 0
    }
}

fn work(id: &str) -> NewWork {
    NewWork::new(Scope::new("acme", "reindex", "plan", id))
}

fn request() -> ClaimRequest {
    ClaimRequest::new(["reindex"], "test").with_lease(Duration::from_secs(3600))
}

/// A processor that is a function.
struct Run<F>(F);

#[async_trait]
impl<F, W> Processor for Run<F>
where
    F: Fn(Claim) -> W + Send + Sync + 'static,
    W: Future<Output = Result<Processed, BoxError>> + Send,
{
    async fn process(&self, claim: &Claim) -> Result<Processed, BoxError> {
        (self.0)(claim.clone()).await
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Event {
    Started,
    Stopped,
    Claimed(usize),
    Processed(String, Outcome),
    Retried(String, u32, String, Duration),
    Dropped(String, Dropped),
    DeadLettered(GivenUp),
    Extended(usize),
}

/// Hooks that note everything.
struct Recorder(mpsc::UnboundedSender<Event>);

fn recorder() -> (Recorder, Heard) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Recorder(sender), Heard(receiver))
}

impl Recorder {
    fn note(&self, event: Event) {
        // The test may have heard enough.
        drop(self.0.send(event));
    }
}

impl WorkerHooks for Recorder {
    fn on_started(&self, worker: &str) {
        assert_eq!(worker, "test");
        self.note(Event::Started);
    }

    fn on_stopped(&self, worker: &str) {
        assert_eq!(worker, "test");
        self.note(Event::Stopped);
    }

    fn on_claimed(&self, claims: &[Claim]) {
        self.note(Event::Claimed(claims.len()));
    }

    fn on_processed(&self, claim: &Claim, outcome: Outcome) {
        self.note(Event::Processed(claim.scope.scope_id.clone(), outcome));
    }

    fn on_retried(&self, claim: &Claim, error: &str, pause: Duration) {
        let id = claim.scope.scope_id.clone();
        self.note(Event::Retried(id, claim.attempt, error.to_owned(), pause));
    }

    fn on_dropped(&self, claim: &Claim, why: Dropped) {
        self.note(Event::Dropped(claim.scope.scope_id.clone(), why));
    }

    fn on_dead_lettered(&self, given_up: &GivenUp) {
        self.note(Event::DeadLettered(given_up.clone()));
    }

    fn on_lease_extended(&self, items: usize) {
        self.note(Event::Extended(items));
    }
}

/// What was noted.
struct Heard(mpsc::UnboundedReceiver<Event>);

impl Heard {
    /// Waits for the next event of a kind, and passes over others.
    async fn next<T>(&mut self, what: &str, wanted: impl Fn(Event) -> Option<T>) -> T {
        let wait = async {
            loop {
                let event = self.0.recv().await.expect("the worker lives");
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(30), wait).await;
        found.unwrap_or_else(|_| panic!("nothing heard: {what}"))
    }

    async fn processed(&mut self) -> (String, Outcome) {
        self.next("processed", |event| match event {
            Event::Processed(id, outcome) => Some((id, outcome)),
            _ => None,
        })
        .await
    }

    fn rest(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Ok(event) = self.0.try_recv() {
            events.push(event);
        }
        events
    }
}
