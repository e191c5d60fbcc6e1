//! A worker, from the first claim to a graceful stop.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use leasehold_domain::{Claim, NewWork, Outcome, WorkQueue};
use leasehold_storage::{
    Dropped, GivenUp, NonRetryable, Processed, Processor, Worker, WorkerHooks, WorkerOptions,
};
use serde_json::json;
use tokio::sync::{Notify, Semaphore, mpsc};

use super::{Bench, BoxError, Event, Heard, Run, recorder, request, work};
use crate::support::eventually;
use crate::support::measured::measured;

/// More than any test takes.
const LONG: Duration = Duration::from_secs(60);

fn options() -> WorkerOptions {
    WorkerOptions::new(["reindex"], "test")
}

fn start(bench: &Bench, options: WorkerOptions, processor: impl Processor) -> (Worker, Heard) {
    let (hooks, heard) = recorder();
    let worker = Worker::start(&bench.queue, options, processor, hooks).unwrap();
    (worker, heard)
}

async fn done(_: Claim) -> Result<Processed, BoxError> {
    Ok(Processed::Done)
}

/// Says when it is dropped.
struct Canary(Arc<AtomicBool>);

impl Drop for Canary {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is worked on is done, is told, and leaves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn work_is_done_and_leaves_nothing() {
    let bench = Bench::start().await;
    bench.enqueue(0..50).await;
    let (worker, mut heard) = start(&bench, options(), Run(done));
    let mut ids = Vec::new();
    for _ in 0..50 {
        let (id, outcome) = heard.processed().await;
        assert_eq!(outcome, Outcome::Done);
        ids.push(id.parse::<u32>().unwrap());
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..50).collect::<Vec<_>>());
    assert!(bench.is_empty().await);
    worker.stop(LONG).await;
    let rest = heard.rest();
    assert_eq!(rest.last(), Some(&Event::Stopped));
}

/// The hooks are called in order, and what they panic about is nobody else's trouble.
#[tokio::test(flavor = "multi_thread")]
async fn hooks_are_told_in_order_and_may_panic() {
    struct Grumpy(mpsc::UnboundedSender<&'static str>);
    impl WorkerHooks for Grumpy {
        fn on_started(&self, _: &str) {
            self.0.send("started").unwrap();
            panic!("started");
        }
        fn on_claimed(&self, claims: &[Claim]) {
            assert_eq!(claims.len(), 1);
            self.0.send("claimed").unwrap();
            panic!("claimed");
        }
        fn on_processed(&self, _: &Claim, _: Outcome) {
            self.0.send("processed").unwrap();
            panic!("processed");
        }
        fn on_stopped(&self, _: &str) {
            self.0.send("stopped").unwrap();
            panic!("stopped");
        }
    }
    let bench = Bench::start().await;
    bench.enqueue([1]).await;
    let (sender, mut told) = mpsc::unbounded_channel();
    let worker = Worker::start(&bench.queue, options(), Run(done), Grumpy(sender)).unwrap();
    let mut events = Vec::new();
    while events.len() < 3 {
        events.push(tokio::time::timeout(LONG, told.recv()).await.unwrap().unwrap());
    }
    worker.stop(LONG).await;
    events.push(told.recv().await.unwrap());
    assert_eq!(events, ["started", "claimed", "processed", "stopped"]);
    assert!(bench.is_empty().await);
}

/// Options that cannot be right are refused by name, and nothing is started.
#[tokio::test(flavor = "multi_thread")]
async fn bad_options_start_nothing() {
    let bench = Bench::start().await;
    let none = WorkerOptions::new([""; 0], "test");
    let (hooks, mut heard) = recorder();
    let refused = Worker::start(&bench.queue, none, Run(done), hooks).unwrap_err();
    assert_eq!(refused.field(), "kinds");
    assert_eq!(heard.rest(), []);
}

/// No more are worked on at the same time than was said, and that many are.
#[tokio::test(flavor = "multi_thread")]
async fn concurrency_is_bounded() {
    let bench = Bench::start().await;
    bench.enqueue(0..40).await;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let together = Arc::new(tokio::sync::Barrier::new(4));
    let processor = {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        Run(move |_| {
            let (now, most, together) = (Arc::clone(&now), Arc::clone(&most), Arc::clone(&together));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // Four must be here at once, or none goes on.
                together.wait().await;
                now.fetch_sub(1, Ordering::SeqCst);
                Ok(Processed::Done)
            }
        })
    };
    let options = options().with_concurrency(4).with_batch(10);
    let (worker, mut heard) = start(&bench, options, processor);
    for _ in 0..40 {
        heard.processed().await;
    }
    worker.stop(LONG).await;
    assert_eq!(most.load(Ordering::SeqCst), 4);
}

/// One after the other, in the order of their priority.
#[tokio::test(flavor = "multi_thread")]
async fn urgent_work_comes_first() {
    let bench = Bench::start().await;
    let many: Vec<NewWork> = [("c", 30), ("a", 10), ("d", 40), ("b", 20)]
        .map(|(id, priority)| work(id).with_priority(priority))
        .into();
    bench.queue.enqueue_many(&many).await.unwrap();
    let options = options().with_concurrency(1).with_batch(1);
    let (worker, mut heard) = start(&bench, options, Run(done));
    for id in ["a", "b", "c", "d"] {
        assert_eq!(heard.processed().await, (id.to_owned(), Outcome::Done));
    }
    worker.stop(LONG).await;
}

/// An item is worked on over many heartbeats, each of which is one statement for all, while a transaction that enqueued
/// it stays open: it ends, and is worked on again when that commits.
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_do_not_hurt() {
    let bench = Bench::start().await;
    let track = format!(
        "ALTER DATABASE {} SET track_functions = 'pl'",
        bench.database.name()
    );
    bench.client.batch_execute(&track).await.unwrap();
    let bench = Bench {
        client: bench.database.client().await,
        process: leasehold_storage::Database::connect(bench.database.options(), 8)
            .await
            .unwrap(),
        ..bench
    };
    let queue = bench.process.work_queue();
    bench.enqueue(0..20).await;
    let go_on = Arc::new(Semaphore::new(0));
    let processor = {
        let go_on = Arc::clone(&go_on);
        Run(move |_| {
            let go_on = Arc::clone(&go_on);
            async move {
                go_on.acquire().await?.forget();
                Ok(Processed::Done)
            }
        })
    };
    let options = options()
        .with_concurrency(20)
        .with_batch(20)
        .with_lease(Duration::from_secs(3))
        .with_heartbeat(Duration::from_secs(1));
    let (hooks, mut heard) = recorder();
    let worker = Worker::start(&queue, options, processor, hooks).unwrap();
    let mut claimed = 0;
    while claimed < 20 {
        claimed += heard
            .next("claimed", |event| match event {
                Event::Claimed(items) => Some(items),
                _ => None,
            })
            .await;
    }
    let enqueued = bench
        .process
        .transaction(async |conn| {
            queue
                .enqueue_in_tx(conn, &[work("7").with_payload(json!("new"))])
                .await?;
            for _ in 0..8 {
                let items = heard
                    .next("a beat", |event| match event {
                        Event::Extended(items) => Some(items),
                        _ => None,
                    })
                    .await;
                assert_eq!(items, 20, "one statement for all");
            }
            go_on.add_permits(20);
            for _ in 0..20 {
                let (id, outcome) = heard.processed().await;
                let expected = if id == "7" {
                    Outcome::DoneButChanged
                } else {
                    Outcome::Done
                };
                assert_eq!(outcome, expected, "{id}");
            }
            Ok::<_, leasehold_domain::QueueError>(())
        })
        .await;
    enqueued.unwrap();
    go_on.add_permits(1);
    assert_eq!(heard.processed().await, ("7".to_owned(), Outcome::Done));
    worker.stop(LONG).await;
    assert!(bench.is_empty().await);
    bench.process.shutdown(LONG).await;
    // Told when the sessions end. One for each item would be 160; some are sent while nobody listens to what they say.
    eventually("the statements are counted", async || {
        let calls = "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_user_functions WHERE funcname = 'extend_work'";
        bench.client.batch_execute("SELECT pg_stat_clear_snapshot()").await.unwrap();
        let calls = bench.number(calls).await;
        (8..=40).contains(&calls)
    })
    .await;
}

/// A worker that cannot extend in time stops working before anybody else may begin.
#[tokio::test(flavor = "multi_thread")]
async fn an_unextended_claim_cancels_its_work() {
    for cut in ["busy", "away"] {
        let bench = Bench::start().await;
        bench.enqueue([1]).await;
        let (begun, dropped) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let processor = {
            let (begun, dropped) = (Arc::clone(&begun), Arc::clone(&dropped));
            Run(move |_| {
                let (begun, canary) = (Arc::clone(&begun), Canary(Arc::clone(&dropped)));
                async move {
                    let _canary = canary;
                    begun.notify_one();
                    std::future::pending().await
                }
            })
        };
        let lease = Duration::from_secs(2);
        let (worker, mut heard) = start(&bench, options().with_lease(lease), processor);
        tokio::time::timeout(LONG, begun.notified()).await.unwrap();
        let last_beat = Instant::now();
        if cut == "busy" {
            let lock = "BEGIN; SELECT FROM leasehold.work_claims FOR UPDATE";
            bench.client.batch_execute(lock).await.unwrap();
        } else {
            bench.database.close().await;
        }
        eventually("the work is cancelled", async || dropped.load(Ordering::Relaxed)).await;
        // It may have been extended once more, just before.
        assert!(
            last_beat.elapsed() < lease * 5,
            "{cut}: {:?}",
            last_beat.elapsed()
        );
        let lost = heard.next("dropped", |event| match event {
            Event::Dropped(id, why) => Some((id, why)),
            _ => None,
        });
        assert_eq!(lost.await, ("1".to_owned(), Dropped::Lost), "{cut}");
        if cut == "busy" {
            bench.client.batch_execute("ROLLBACK").await.unwrap();
            worker.stop(LONG).await;
        }
    }
}

const LOST: &str = "leasehold_queue_lost_total";

/// A worker whose item somebody else has taken stops working on it, and changes nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_claim_cancels_its_work() {
    let measured = measured();
    let before = measured.counter(LOST);
    let bench = Bench::start().await;
    bench.enqueue([1]).await;
    let begun = Arc::new(Notify::new());
    let processor = {
        let begun = Arc::clone(&begun);
        Run(move |_| {
            let begun = Arc::clone(&begun);
            async move {
                begun.notify_one();
                std::future::pending().await
            }
        })
    };
    // Always due, so that the loss is found at the next beat.
    let options = options()
        .with_lease(Duration::from_secs(1))
        .with_heartbeat(Duration::from_millis(400));
    let (worker, mut heard) = start(&bench, options, processor);
    tokio::time::timeout(LONG, begun.notified()).await.unwrap();
    let expire = "UPDATE leasehold.work_claims SET expires_at = clock_timestamp()";
    let mut taken = Vec::new();
    eventually("another claims it", async || {
        bench.client.batch_execute(expire).await.unwrap();
        taken = bench.queue.claim(&request()).await.unwrap().claims;
        !taken.is_empty()
    })
    .await;
    let lost = heard.next("dropped", |event| match event {
        Event::Dropped(id, why) => Some((id, why)),
        _ => None,
    });
    assert_eq!(lost.await, ("1".to_owned(), Dropped::Lost));
    assert!(measured.counter(LOST) > before);
    worker.stop(LONG).await;
    let outcome = bench.queue.complete(&[taken[0].key]).await.unwrap();
    assert_eq!(outcome, [Outcome::Done]);
}

/// What fails is tried again after a pause that doubles, at its time although nobody enqueues and the next look is far
/// away, and is given up after its attempts.
#[tokio::test(flavor = "multi_thread")]
async fn failures_back_off_and_are_given_up() {
    let bench = Bench::start().await;
    bench
        .queue
        .enqueue(&work("1").with_max_attempts(4).with_payload(json!(5)))
        .await
        .unwrap();
    let begun = Arc::new(Mutex::new(Vec::new()));
    let processor = {
        let begun = Arc::clone(&begun);
        Run(move |claim: Claim| {
            begun
                .lock()
                .unwrap()
                .push((Instant::now(), claim.last_error.clone()));
            async move { Err(format!("failure {}", claim.attempt).into()) }
        })
    };
    let base = Duration::from_millis(100);
    let options = options()
        .with_poll(Duration::from_secs(20))
        .with_backoff(base, base * 6);
    let (worker, mut heard) = start(&bench, options, processor);
    let given_up = heard.next("given up", |event| match event {
        Event::DeadLettered(given_up) => Some(given_up),
        Event::Retried(id, attempt, error, pause) => {
            assert_eq!((id.as_str(), error), ("1", format!("failure {attempt}")));
            let most = (base * 2_u32.pow(attempt)).min(base * 6);
            assert!((most / 2..=most).contains(&pause), "{attempt}: {pause:?}");
            None
        }
        _ => None,
    });
    let given_up = given_up.await;
    let expected = GivenUp {
        scope: work("1").scope().clone(),
        payload: Some(json!(5)),
        attempts: 4,
        error: "failure 4".to_owned(),
    };
    assert_eq!(given_up, expected);
    worker.stop(LONG).await;
    let begun = begun.lock().unwrap().clone();
    let errors: Vec<Option<&str>> = begun.iter().map(|(_, error)| error.as_deref()).collect();
    assert_eq!(
        errors,
        [None, Some("failure 1"), Some("failure 2"), Some("failure 3")]
    );
    for (n, pair) in begun.windows(2).enumerate() {
        let least = [100, 200, 300][n];
        let paused = pair[1].0 - pair[0].0;
        assert!(
            paused >= Duration::from_millis(least),
            "{n}: {paused:?} {begun:?}"
        );
    }
    let whole = begun[3].0 - begun[0].0;
    assert!(
        whole < Duration::from_secs(15),
        "nobody waited for the poll: {whole:?}"
    );
    assert!(bench.is_empty().await);
    let letter = bench.text("SELECT last_error FROM leasehold.dead_letters").await;
    assert_eq!(letter, "failure 4");
}

/// An error that another attempt would not change makes a dead letter at once, and so does the error that caused one.
#[tokio::test(flavor = "multi_thread")]
async fn hopeless_work_is_given_up_at_once() {
    #[derive(Debug, thiserror::Error)]
    #[error("cannot deliver")]
    struct Outer(#[source] NonRetryable);
    let bench = Bench::start().await;
    bench.enqueue([1, 2]).await;
    let processor = Run(async |claim: Claim| {
        let never = NonRetryable::new("the address is malformed");
        match claim.scope.scope_id.as_str() {
            "1" => Err(BoxError::from(never)),
            _ => Err(BoxError::from(Outer(never))),
        }
    });
    let (worker, mut heard) = start(&bench, options(), processor);
    let mut errors = Vec::new();
    for _ in 0..2 {
        errors.push(
            heard
                .next("given up", |event| match event {
                    Event::DeadLettered(given_up) => Some((given_up.attempts, given_up.error)),
                    Event::Retried(..) => panic!("it was tried again"),
                    _ => None,
                })
                .await,
        );
    }
    errors.sort();
    let expected = [
        "cannot deliver: the address is malformed",
        "the address is malformed",
    ];
    assert_eq!(errors, expected.map(|error| (1, error.to_owned())));
    worker.stop(LONG).await;
    assert!(bench.is_empty().await);
}

/// What is put off comes again at its time, and no attempt was counted.
#[tokio::test(flavor = "multi_thread")]
async fn snoozed_work_comes_again_uncounted() {
    let bench = Bench::start().await;
    bench
        .queue
        .enqueue(&work("1").with_max_attempts(1))
        .await
        .unwrap();
    let turns = Arc::new(Mutex::new(Vec::new()));
    let snooze = Duration::from_millis(150);
    let processor = {
        let turns = Arc::clone(&turns);
        Run(move |claim: Claim| {
            let mut turns = turns.lock().unwrap();
            turns.push((Instant::now(), claim.attempt));
            let turn = turns.len();
            async move {
                Ok(if turn < 4 {
                    Processed::After(snooze)
                } else {
                    Processed::Done
                })
            }
        })
    };
    let options = options().with_poll(Duration::from_secs(20));
    let (worker, mut heard) = start(&bench, options, processor);
    heard.processed().await;
    worker.stop(LONG).await;
    let turns = turns.lock().unwrap().clone();
    assert!(turns.iter().all(|(_, attempt)| *attempt == 1), "{turns:?}");
    assert!(
        turns.windows(2).all(|pair| pair[1].0 - pair[0].0 >= snooze),
        "{turns:?}"
    );
    assert!(bench.is_empty().await);
}

/// A processor that panics has failed, and takes nobody with it.
/// An error that panics when it is to tell itself.
#[derive(Debug)]
struct Untellable;

impl std::fmt::Display for Untellable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        panic!("no words")
    }
}

impl std::error::Error for Untellable {}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_a_failure() {
    let bench = Bench::start().await;
    bench.enqueue([1, 2, 3]).await;
    let processor = Run(async |claim: Claim| {
        if claim.scope.scope_id == "2" && claim.attempt == 1 {
            panic!("oh no");
        }
        if claim.scope.scope_id == "3" && claim.attempt == 1 {
            return Err(Untellable.into());
        }
        Ok(Processed::Done)
    });
    let options = options()
        .with_concurrency(1)
        .with_backoff(Duration::ZERO, Duration::ZERO);
    let (worker, mut heard) = start(&bench, options, processor);
    for (id, text) in [("2", "panicked: oh no"), ("3", "panicked: no words")] {
        let failed = heard.next("retried", |event| match event {
            Event::Retried(id, attempt, error, _) => Some((id, attempt, error)),
            _ => None,
        });
        assert_eq!(failed.await, (id.to_owned(), 1, text.to_owned()));
    }
    eventually("all are done", async || bench.is_empty().await).await;
    worker.stop(LONG).await;
}

/// A processor that completes in its own transaction has settled the claim, and its work is true with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_processor_can_settle_in_its_transaction() {
    let bench = Bench::start().await;
    bench
        .client
        .batch_execute("CREATE TABLE effects (id TEXT PRIMARY KEY)")
        .await
        .unwrap();
    bench.enqueue(0..10).await;
    let processor = {
        let (process, queue) = (bench.process.clone(), bench.queue.clone());
        Run(move |claim: Claim| {
            let (process, queue) = (process.clone(), queue.clone());
            async move {
                process
                    .transaction(async |conn| {
                        use diesel_async::RunQueryDsl;
                        diesel::sql_query("INSERT INTO effects VALUES ($1)")
                            .bind::<diesel::sql_types::Text, _>(&claim.scope.scope_id)
                            .execute(conn)
                            .await?;
                        match queue.complete_in_tx(conn, &[claim.key]).await?[..] {
                            [Outcome::Done] => Ok(()),
                            _ => Err(BoxError::from("not ours")),
                        }
                    })
                    .await
                    .map_err(|error| format!("{error:?}"))?;
                Ok(Processed::Settled)
            }
        })
    };
    let (worker, mut heard) = start(&bench, options(), processor);
    for _ in 0..10 {
        assert_eq!(heard.processed().await.1, Outcome::Done);
    }
    worker.stop(LONG).await;
    assert!(bench.is_empty().await);
    assert_eq!(bench.number("SELECT count(*) FROM effects").await, 10);
}

/// An idle worker hears of work that another process enqueues, and one of a transaction when it is told.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_is_woken() {
    let bench = Bench::start().await;
    let other = bench.other().await;
    let options = options().with_poll(Duration::from_secs(60));
    let (worker, mut heard) = start(&bench, options, Run(done));
    for round in 0..5 {
        let id = round.to_string();
        let sent = Instant::now();
        match round {
            0..=2 => other.enqueue(&work(&id)).await.unwrap(),
            3 => bench.queue.enqueue(&work(&id)).await.unwrap(),
            _ => {
                let enqueued = bench
                    .process
                    .transaction(async |conn| other.enqueue_in_tx(conn, &[work(&id)]).await);
                enqueued.await.unwrap();
                other.wake(["reindex"]);
            }
        }
        assert_eq!(heard.processed().await.0, id);
        let waited = sent.elapsed();
        assert!(
            waited < Duration::from_secs(20),
            "{round}: it was not woken: {waited:?}"
        );
    }
    worker.stop(LONG).await;
}

/// Nobody is told of work that nobody waits for, and those who wait are told once, not for each item. No transaction
/// that writes sends a signal.
#[tokio::test(flavor = "multi_thread")]
async fn signals_are_few() {
    let bench = Bench::start().await;
    let (listener, mut driver) = bench
        .database
        .config()
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    let heard = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&heard);
    tokio::spawn(async move {
        let messages = futures_util::stream::poll_fn(move |context| driver.poll_message(context));
        let mut messages = std::pin::pin!(messages);
        while let Some(Ok(message)) = futures_util::StreamExt::next(&mut messages).await {
            if matches!(message, tokio_postgres::AsyncMessage::Notification(_)) {
                counting.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    listener.batch_execute("LISTEN leasehold_free").await.unwrap();
    for id in 0..200 {
        bench.queue.enqueue(&work(&id.to_string())).await.unwrap();
    }
    // An own signal comes after all that were sent before.
    let fence = async |number: usize| {
        bench
            .client
            .batch_execute("NOTIFY leasehold_free, 'fence'")
            .await
            .unwrap();
        eventually("the fence is heard", async || {
            heard.load(Ordering::Relaxed) >= number
        })
        .await;
    };
    fence(1).await;
    assert_eq!(heard.load(Ordering::Relaxed), 1, "nobody waits");
    let other = bench.other().await;
    let (worker, mut told) = start(&bench, options().with_poll(Duration::from_secs(60)), Run(done));
    for _ in 0..200 {
        told.processed().await;
    }
    for batch in 0..4 {
        let ids = (50 * batch..50 * (batch + 1)).map(|id: i32| work(&id.to_string()));
        other.enqueue_many(&ids.collect::<Vec<_>>()).await.unwrap();
    }
    for _ in 0..200 {
        told.processed().await;
    }
    fence(2).await;
    let signals = heard.load(Ordering::Relaxed) - 2;
    // One a batch, and one whenever somebody begins to wait who may have come too late.
    assert!(signals <= 20, "{signals} signals for 200 items");
    worker.stop(LONG).await;
}

/// Stopped under load, a worker ends what it can, gives back the rest, and leaves nothing claimed.
#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_leaves_nothing_claimed() {
    let bench = Bench::start().await;
    bench.enqueue(0..300).await;
    let processor = Run(async |claim: Claim| {
        // Some end within the grace, some do not, and some are never begun.
        match claim.scope.scope_id.parse::<u32>()? % 10 {
            0 => std::future::pending().await,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        Ok(Processed::Done)
    });
    let options = options()
        .with_concurrency(10)
        .with_batch(20)
        .with_lease(Duration::from_secs(3600));
    let (worker, mut heard) = start(&bench, options, processor);
    for _ in 0..20 {
        heard.processed().await;
    }
    let enough = Arc::new(AtomicBool::new(false));
    let producing = {
        let (queue, enough) = (bench.other().await, Arc::clone(&enough));
        tokio::spawn(async move {
            for id in 1000.. {
                if enough.load(Ordering::Relaxed) {
                    return;
                }
                queue.enqueue(&work(&id.to_string())).await.unwrap();
            }
        })
    };
    let grace = Duration::from_millis(500);
    let stopping = Instant::now();
    worker.stop(grace).await;
    let took = stopping.elapsed();
    enough.store(true, Ordering::Relaxed);
    producing.await.unwrap();
    assert!(took < grace + Duration::from_secs(10), "{took:?}");
    let claimed = "SELECT count(*) FROM leasehold.work_claims WHERE expires_at > clock_timestamp()";
    assert_eq!(bench.number(claimed).await, 0, "nothing waits for its lease");
    let events = heard.rest();
    assert_eq!(events.last(), Some(&Event::Stopped));
    let mut ends = HashMap::<&str, u32>::new();
    for event in &events {
        match event {
            Event::Processed(..) => *ends.entry("done").or_default() += 1,
            Event::Dropped(_, why) => {
                assert_eq!(*why, Dropped::GivenBack);
                *ends.entry("given back").or_default() += 1;
            }
            Event::Retried(..) | Event::DeadLettered(_) => panic!("{event:?}"),
            _ => {}
        }
    }
    assert!(ends.contains_key("given back"), "{ends:?}");
    // As if they had not been claimed.
    let attempts = "SELECT coalesce(max(attempt_count), 0)::bigint FROM leasehold.work_claims";
    assert_eq!(bench.number(attempts).await, 0);
    let next = bench
        .queue
        .claim(&request().with_batch(1000))
        .await
        .unwrap()
        .claims;
    let left = bench.number("SELECT count(*) FROM leasehold.work_items").await;
    assert_eq!(i64::try_from(next.len()).unwrap(), left.min(1000));
}

/// A worker that is dropped stops as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_worker_gives_back() {
    let bench = Bench::start().await;
    bench.enqueue(0..30).await;
    let processor = Run(async |_| std::future::pending().await);
    let (worker, mut heard) = start(&bench, options().with_lease(LONG * 60), processor);
    heard
        .next("claimed", |event| {
            matches!(event, Event::Claimed(_)).then_some(())
        })
        .await;
    drop(worker);
    heard
        .next("stopped", |event| (event == Event::Stopped).then_some(()))
        .await;
    let claimed = "SELECT count(*) FROM leasehold.work_claims WHERE expires_at > clock_timestamp()";
    assert_eq!(bench.number(claimed).await, 0);
}

/// The database goes away and comes back: the worker goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_survives_broken_connections() {
    let bench = Bench::start().await;
    let (worker, mut heard) = start(
        &bench,
        options().with_poll(Duration::from_millis(50)),
        Run(async |_| {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(Processed::Done)
        }),
    );
    let break_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let producer = bench.database.client().await;
    let pid: i32 = producer
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    for round in 0..10 {
        let enqueue = "INSERT INTO leasehold.work_items
                (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts)
            SELECT 'acme', 'reindex', 'plan', $1 || '-' || n, 100, clock_timestamp(), 10 FROM generate_series(1, 20) AS n";
        producer.execute(enqueue, &[&round.to_string()]).await.unwrap();
        let break_others = format!("{break_all} AND pid <> {pid}");
        bench.client.batch_execute(&break_others).await.unwrap();
    }
    eventually("everything is done", async || bench.is_empty().await).await;
    worker.stop(LONG).await;
    let failed = heard
        .rest()
        .iter()
        .any(|event| matches!(event, Event::Retried(..) | Event::DeadLettered(_)));
    assert!(!failed, "no item has failed");
}
