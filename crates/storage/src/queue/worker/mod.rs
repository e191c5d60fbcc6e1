//! [`Worker`]: claims items and has a processor work on them.
//!
//! One task fetches into a buffer, some take from it and work, one settles what they leave in batches, and the
//! heartbeat goes on beside them. An item is in one place at a time: buffered, worked on, or being settled; the
//! [`Flight`] knows it as long as it is in any.

mod flight;
mod idle;
mod options;
mod processor;
mod settler;
mod tell;

use std::collections::VecDeque;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use leasehold_domain::{ClaimRequest, Claimed, Invalid, MAX_DELAY, Monotonic, MonotonicClock, WorkQueue};
use rand::Rng;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tracing::Instrument;

use self::flight::{Flight, InFlight};
use self::idle::Idle;
pub use self::options::WorkerOptions;
pub use self::processor::{Dropped, GivenUp, NonRetryable, Processed, Processor, WorkerHooks};
use self::settler::{Settler, Verdict};
use self::tell::Hooks;
use crate::clock::Boottime;
use crate::error::chain;
use crate::queue::store::PgWorkQueue;

/// How long it may take, after the grace, to drop what is still worked on and to settle everything.
const LAST: Duration = Duration::from_secs(5);
/// How often what is too old is removed.
const TIDY: Duration = Duration::from_secs(60);

/// A worker that works. Dropped it stops in the background, at once.
pub struct Worker {
    stop: watch::Sender<Option<Instant>>,
    supervisor: JoinHandle<()>,
}

impl Worker {
    /// Starts to work. Call it inside a tokio runtime, where the processor will run.
    ///
    /// Claims and settlements take connections of the pool, up to two at a time; the heartbeat has one of its own.
    ///
    /// # Errors
    /// [`Invalid`] when the options are not, by the name of the field. Nothing was started.
    pub fn start(
        queue: &PgWorkQueue,
        options: WorkerOptions,
        processor: impl Processor,
        hooks: impl WorkerHooks,
    ) -> Result<Self, Invalid> {
        options.validate()?;
        let shared = Arc::new(Shared {
            flight: Arc::new(Flight::new(options.request.lease(), options.heartbeat())),
            queue: queue.clone(),
            options,
            processor: Box::new(processor),
            hooks: Hooks::new(hooks),
            buffer: Buffer::default(),
            settler: Settler::default(),
            occupied: AtomicUsize::new(0),
            room: Notify::new(),
            again: Notify::new(),
            phase: watch::Sender::new(Phase::Working),
        });
        let (stop, stopped) = watch::channel(None);
        let supervisor = tokio::spawn(supervise(shared, stopped));
        Ok(Self { stop, supervisor })
    }

    /// Claims nothing more, and ends when all is settled: what was not begun is given back, what is worked on has
    /// `grace` to end, and is then dropped and given back. Afterwards nothing waits for a lease to end, unless the
    /// database was away.
    ///
    /// # Cancel safety
    /// The worker goes on to stop.
    pub async fn stop(mut self, grace: Duration) {
        // A grace beyond what the clock can count is as good as none at all.
        let far = || Instant::now() + Duration::from_secs(365 * 24 * 60 * 60);
        let deadline = Instant::now().checked_add(grace).unwrap_or_else(far);
        self.stop.send_replace(Some(deadline));
        if let Err(error) = (&mut self.supervisor).await {
            tracing::error!(%error, "a worker did not end by itself");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.send_if_modified(|stop| {
            let running = stop.is_none();
            stop.get_or_insert_with(Instant::now);
            running
        });
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Working,
    /// Nothing is begun any more.
    Stopping,
    /// What is worked on is dropped.
    Dropping,
}

struct Shared {
    queue: PgWorkQueue,
    options: WorkerOptions,
    processor: Box<dyn Processor>,
    hooks: Hooks,
    flight: Arc<Flight>,
    buffer: Buffer,
    settler: Settler,
    /// How many items are buffered or worked on.
    occupied: AtomicUsize,
    /// Told when there are fewer.
    room: Notify,
    /// Told when items may be claimed again sooner than it seemed.
    again: Notify,
    phase: watch::Sender<Phase>,
}

/// Items that are claimed and not begun.
struct Buffer {
    items: Mutex<VecDeque<Arc<InFlight>>>,
    /// One permit for each.
    filled: Semaphore,
}

impl Default for Buffer {
    fn default() -> Self {
        Self {
            items: Mutex::default(),
            filled: Semaphore::new(0),
        }
    }
}

impl Buffer {
    fn items(&self) -> MutexGuard<'_, VecDeque<Arc<InFlight>>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, items: Vec<Arc<InFlight>>) {
        let number = items.len();
        self.items().extend(items);
        self.filled.add_permits(number);
    }

    /// The next one; `None` when nothing is to be begun any more.
    async fn next(&self) -> Option<Arc<InFlight>> {
        self.filled.acquire().await.ok()?.forget();
        self.items().pop_front()
    }

    /// Nothing is begun any more. Answers what is left.
    fn close(&self) -> VecDeque<Arc<InFlight>> {
        self.filled.close();
        std::mem::take(&mut self.items())
    }
}

async fn supervise(shared: Arc<Shared>, mut stop: watch::Receiver<Option<Instant>>) {
    let name = shared.options.request.worker().to_owned();
    shared.hooks.tell(|hooks| hooks.on_started(&name));

    let (beats, heard) = mpsc::unbounded_channel();
    let (still, beating) = watch::channel(false);
    let process = &shared.queue.process;
    process
        .keeper
        .spawn(Arc::clone(&shared.flight).keep(process.options.clone(), beats, beating));
    let telling = tokio::spawn(tell_beats(shared.hooks.clone(), heard));
    let tidying = tokio::spawn(tidy(Arc::clone(&shared)));
    let fetching = tokio::spawn(fetch(Arc::clone(&shared)));
    let mut working = JoinSet::new();
    for _ in 0..shared.options.concurrency {
        working.spawn(work(Arc::clone(&shared)));
    }
    let settling = tokio::spawn({
        let shared = Arc::clone(&shared);
        async move {
            let Shared {
                queue,
                flight,
                hooks,
                room,
                again,
                ..
            } = &*shared;
            shared.settler.run(queue, flight, hooks, room, again).await;
        }
    });

    // A sender that is gone has said so.
    let deadline = match stop.wait_for(Option::is_some).await {
        Ok(deadline) => deadline.unwrap_or_else(Instant::now),
        Err(_) => Instant::now(),
    };
    tidying.abort();
    shared.phase.send_replace(Phase::Stopping);
    // What a claim on its way brings is given back as well.
    drop(fetching.await);
    for item in shared.buffer.close() {
        shared.settler.push(item, Verdict::GiveBack);
    }
    let all_ended = async { while working.join_next().await.is_some() {} };
    if tokio::time::timeout_at(deadline, all_ended).await.is_err() {
        shared.phase.send_replace(Phase::Dropping);
        let all_dropped = async { while working.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST, all_dropped).await.is_err() {
            tracing::error!(
                worker = name,
                "processors block their threads; their leases end by themselves"
            );
            working.abort_all();
        }
    }
    shared.settler.close();
    if tokio::time::timeout(LAST, settling).await.is_err() {
        tracing::error!(
            worker = name,
            "the database does not answer; leases end by themselves"
        );
    }
    // The heart stops only now: until it is settled an item stays ours.
    still.send_replace(true);
    telling.abort();
    shared.queue.wake(shared.options.request.kinds());
    shared.hooks.tell(|hooks| hooks.on_stopped(&name));
}

async fn tell_beats(hooks: Hooks, mut heard: mpsc::UnboundedReceiver<usize>) {
    while let Some(items) = heard.recv().await {
        hooks.tell(|hooks| hooks.on_lease_extended(items));
    }
}

/// Removes what is too old, now and then.
async fn tidy(shared: Arc<Shared>) {
    loop {
        let purged = shared.queue.purge_dead_letters(&shared.options.retention).await;
        let swept = shared.queue.sweep().await;
        if let Err(error) = purged.and(swept) {
            tracing::debug!(error = chain(&error), "the work queue was not tidied");
        }
        let jittered = rand::rng().random_range(TIDY / 2..TIDY * 3 / 2);
        tokio::time::sleep(jittered).await;
    }
}

/// Claims whenever there is room, until the worker stops.
async fn fetch(shared: Arc<Shared>) {
    let options = &shared.options;
    let mut idle = Idle::new(options.poll, options.longest_poll());
    let mut phase = shared.phase.subscribe();
    let mut stopping = std::pin::pin!(async {
        drop(phase.wait_for(|phase| *phase >= Phase::Stopping).await);
    });
    loop {
        let room = tokio::select! {
            biased;
            () = &mut stopping => return,
            room = shared.wait_for_room() => room,
        };
        let request: ClaimRequest = options.request.clone().with_batch(room);
        let sent = Boottime.now();
        // Not given up when the worker stops: what it brings must be given back.
        let nothing = match shared.queue.claim(&request).await {
            Ok(claimed) if claimed.claims.is_empty() && claimed.dead.is_empty() => true,
            Ok(claimed) => {
                idle.found();
                shared.take_in(claimed, sent);
                continue;
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "nothing could be claimed");
                false
            }
        };
        tokio::select! {
            biased;
            () = &mut stopping => return,
            () = async {
                if nothing {
                    idle.wait(&shared.queue, request.kinds(), &shared.again).await;
                } else {
                    idle.recover().await;
                }
            } => {}
        }
    }
}

/// Works on one item after the other, until nothing is to be begun any more.
async fn work(shared: Arc<Shared>) {
    let mut phase = shared.phase.subscribe();
    while let Some(item) = shared.buffer.next().await {
        let verdict = shared.process(&item, &mut phase).await;
        shared.settler.push(item, verdict);
        shared.occupied.fetch_sub(1, Ordering::Relaxed);
        shared.room.notify_one();
    }
}

impl Shared {
    /// How many items may be claimed now: not less than what is worth a statement, unless nothing is buffered.
    async fn wait_for_room(&self) -> usize {
        let batch = self.options.request.batch();
        let capacity = self.options.capacity();
        loop {
            let free = capacity.saturating_sub(self.occupied.load(Ordering::Relaxed));
            let buffered = self.buffer.filled.available_permits();
            let keeps_up = self.settler.len() <= 4 * capacity;
            if free > 0 && 2 * buffered <= batch && keeps_up {
                return free.min(batch);
            }
            self.room.notified().await;
        }
    }

    fn take_in(&self, claimed: Claimed, sent: Monotonic) {
        for letter in claimed.dead {
            metrics::counter!("leasehold_queue_settled_total", "outcome" => "failed").increment(1);
            self.hooks.tell(|hooks| hooks.on_dead_lettered(&letter.into()));
        }
        let claims = claimed.claims;
        if claims.is_empty() {
            return;
        }
        metrics::counter!("leasehold_queue_claimed_total").increment(claims.len() as u64);
        self.occupied.fetch_add(claims.len(), Ordering::Relaxed);
        self.hooks.tell(|hooks| hooks.on_claimed(&claims));
        self.buffer.push(self.flight.take_in(claims, sent));
    }

    async fn process(&self, item: &InFlight, phase: &mut watch::Receiver<Phase>) -> Verdict {
        if item.is_lost() {
            return Verdict::Lost;
        }
        let claim = &item.claim;
        let _timed = Timed {
            kind: &claim.scope.kind,
            start: Instant::now(),
        };
        let span = tracing::debug_span!("work", kind = claim.scope.kind, id = %claim.key.id, attempt = claim.attempt);
        // In a future of ours: a processor may panic before it has made its own, and an error while it tells itself.
        let processed = async {
            match self.processor.process(claim).instrument(span).await {
                Ok(processed) => Ok(processed),
                Err(error) => Err((chain(&*error), NonRetryable::is_in(&*error))),
            }
        };
        let processed = AssertUnwindSafe(processed).catch_unwind();
        let result = tokio::select! {
            biased;
            result = processed => result,
            () = item.lost() => return Verdict::Lost,
            _ = phase.wait_for(|phase| *phase == Phase::Dropping) => return Verdict::GiveBack,
        };
        let (error, hopeless) = match result {
            Ok(Ok(Processed::Done)) => return Verdict::Complete,
            Ok(Ok(Processed::Settled)) => return Verdict::Settled,
            Ok(Ok(Processed::After(after))) => return Verdict::PutOff(after.min(MAX_DELAY)),
            Ok(Err(error)) => error,
            Err(panic) => {
                let text = panic
                    .downcast_ref::<&str>()
                    .copied()
                    .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                (format!("panicked: {}", text.unwrap_or("with no text")), false)
            }
        };
        if hopeless || claim.is_last_attempt() {
            Verdict::Fail { error }
        } else {
            let pause = self.options.pause_after(claim.attempt);
            Verdict::Retry { error, pause }
        }
    }
}

/// Measures how long an item is worked on, however that ends.
struct Timed<'a> {
    kind: &'a str,
    start: Instant,
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        // Kinds are few, and named by programs.
        metrics::histogram!("leasehold_queue_processing_seconds", "kind" => self.kind.to_owned())
            .record(self.start.elapsed());
    }
}
