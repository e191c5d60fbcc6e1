//! Every operation of locks, gates, the queue and jobs runs in a span that says which it is.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use diesel::result::Error;
use leasehold_domain::{
    ClaimRequest, DistributedLock, Holder, LockName, LockRequest, NewWork, Scope, WorkQueue,
};
use leasehold_storage::Database;
use tracing::field::{Field, Visit};
use tracing::span::Attributes;
use tracing::{Id, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

use crate::support::TestDatabase;

/// What was begun: the names of spans, with their operations.
#[derive(Clone, Default)]
struct Begun(Arc<Mutex<BTreeSet<String>>>);

impl<S: Subscriber> Layer<S> for Begun {
    fn on_new_span(&self, span: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let mut operation = Operation(span.metadata().name().to_owned());
        span.record(&mut operation);
        self.0.lock().unwrap().insert(operation.0);
    }
}

struct Operation(String);

impl Visit for Operation {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "operation" {
            self.0 = format!("{} {value}", self.0);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[tokio::test]
async fn every_operation_has_a_span() {
    let database = TestDatabase::create().await;
    let process = Database::connect(database.options(), 4).await.unwrap();
    let begun = Begun::default();
    let watched = tracing::subscriber::set_default(tracing_subscriber::registry().with(begun.clone()));

    let name = LockName::new(["tests", "spans"]).unwrap();
    let request = LockRequest::new(name.clone(), Holder::new("alice", "edit"));
    let locks: [&dyn DistributedLock; 3] = [
        &process.leases(),
        &process.session_locks(),
        &process.transaction_locks(),
    ];
    for lock in locks {
        let guard = lock.try_acquire(&request).await.unwrap();
        lock.inspect(&name).await.unwrap();
        lock.extend(&guard, Duration::from_secs(1)).await.unwrap();
        lock.release(guard).await.unwrap();
        let guard = lock.acquire(&request, Duration::from_secs(1)).await.unwrap();
        lock.release(guard).await.unwrap();
    }
    let leases = process.leases();
    let guard = leases.try_acquire(&request).await.unwrap();
    let work = async |_: &mut _| Ok::<_, Error>(());
    process.fenced_transaction(&guard, work).await.unwrap();
    process.client_leases().hand_over(guard, None).await.unwrap();

    let gate = process.tenant_gate();
    gate.write(&["acme"], work).await.unwrap();
    gate.drain("acme", Duration::from_secs(1), work).await.unwrap();

    let queue = process.work_queue();
    let scope = Scope::new("acme", "spans", "test", "1");
    queue.enqueue_many(&[NewWork::new(scope)]).await.unwrap();
    let claimed = queue
        .claim(&ClaimRequest::new(["spans"], "worker"))
        .await
        .unwrap();
    queue.complete(&[claimed.claims[0].key]).await.unwrap();
    queue.stats().await.unwrap();

    let jobs = process.jobs();
    jobs.list().await.unwrap();
    jobs.run_now("none").await.unwrap();
    jobs.pause("none").await.unwrap();
    jobs.resume("none").await.unwrap();

    drop(watched);
    let begun = begun.0.lock().unwrap();
    for expected in [
        "lock try_acquire",
        "lock acquire",
        "lock extend",
        "lock inspect",
        "lock release",
        "lock fence",
        "lock hand_over",
        "gate write",
        "gate drain",
        "queue enqueue",
        "queue claim",
        "queue complete",
        "queue stats",
        "job list",
        "job run_now",
        "job pause",
        "job resume",
    ] {
        assert!(begun.contains(expected), "{expected}: {begun:?}");
    }
}
