//! Jobs: one accepted outcome a slot, whatever becomes of the processes that run them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use leasehold_conformance::this_test_binary;
use leasehold_domain::{MissedSlots, OnCrash};
use leasehold_storage::{
    Database, Job, JobFailure, JobInfo, JobRun, JobRunInfo, JobWork, Jobs, RunNow, RunOutcome, RunningJobs,
    Schedule,
};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio_postgres::Client;

use crate::support::{TestDatabase, eventually};

const URL: &str = "LEASEHOLD_JOBS_DATABASE_URL";
const DELAY_MS: &str = "LEASEHOLD_JOBS_DELAY_MS";
const HOUR: Duration = Duration::from_secs(3600);

struct Bench {
    database: TestDatabase,
    client: Client,
    process: Database,
    jobs: Jobs,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let process = Database::connect(database.options(), 4).await.unwrap();
        let jobs = process.jobs();
        Self {
            database,
            client,
            process,
            jobs,
        }
    }

    /// Another process, as good as.
    async fn other(&self) -> Database {
        Database::connect(self.database.options(), 4).await.unwrap()
    }

    async fn run(&self, job: Job, work: impl JobWork + 'static) -> RunningJobs {
        run(&self.process, "first", job, work).await
    }

    /// Makes the row of a job and nothing else.
    async fn register(&self, job: Job) {
        self.run(job, Done).await.stop(Duration::ZERO).await;
    }

    async fn info(&self) -> JobInfo {
        self.jobs.get("job").await.unwrap().unwrap()
    }

    /// The oldest first.
    async fn runs(&self) -> Vec<JobRunInfo> {
        let mut runs = self.jobs.history("job").await.unwrap();
        runs.reverse();
        runs
    }

    async fn outcomes(&self) -> Vec<Option<RunOutcome>> {
        self.runs().await.iter().map(|run| run.outcome).collect()
    }

    /// Waits for so many runs, none of which is under way.
    async fn settled(&self, count: usize) -> Vec<JobRunInfo> {
        let mut runs = Vec::new();
        eventually("all runs have ended", async || {
            runs = self.runs().await;
            runs.len() >= count && runs.iter().all(|run| run.outcome.is_some())
        })
        .await;
        runs
    }

    async fn ask(&self) -> uuid::Uuid {
        match self.jobs.run_now("job").await.unwrap() {
            RunNow::Asked(id) => id,
            other => panic!("{other:?}"),
        }
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }
}

async fn run(process: &Database, holder: &str, job: Job, work: impl JobWork + 'static) -> RunningJobs {
    let mut scheduler = process.job_scheduler(holder);
    scheduler.register(job, work).unwrap();
    scheduler.start().await.unwrap()
}

fn every(interval: Duration) -> Job {
    Job::new("job", Schedule::every(interval).unwrap())
}

/// Work that is done at once.
struct Done;

#[async_trait]
impl JobWork for Done {
    async fn run(&self, _run: &JobRun) -> Result<(), JobFailure> {
        Ok(())
    }
}

type Running = Pin<Box<dyn Future<Output = Result<(), JobFailure>> + Send>>;

/// Work that a closure makes, which is told the attempt.
struct Work<F>(F);

#[async_trait]
impl<F: Fn(i32) -> Running + Send + Sync> JobWork for Work<F> {
    async fn run(&self, run: &JobRun) -> Result<(), JobFailure> {
        (self.0)(run.attempt()).await
    }
}

/// Work that never ends by itself, and tells when it begins and when it is dropped.
#[derive(Clone, Default)]
struct Endless {
    begun: Arc<Notify>,
    dropped: Arc<AtomicUsize>,
}

struct CountDrop(Arc<AtomicUsize>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl JobWork for Endless {
    async fn run(&self, _run: &JobRun) -> Result<(), JobFailure> {
        let _drop = CountDrop(Arc::clone(&self.dropped));
        self.begun.notify_one();
        std::future::pending().await
    }
}

impl Endless {
    fn dropped(&self) -> usize {
        self.dropped.load(Ordering::SeqCst)
    }
}

const TAKE_AWAY: &str = "\
UPDATE leasehold.jobs
SET run_acquired_at = run_acquired_at - interval '1 day', run_expires_at = clock_timestamp() - interval '1 ms'
WHERE run_id IS NOT NULL";

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_run_by_one_of_five() {
    let bench = Bench::start().await;
    let done = Arc::new(AtomicUsize::new(0));
    let mut running = Vec::new();
    for number in 0..5 {
        let process = bench.other().await;
        let done = Arc::clone(&done);
        let work = Work(move |_| -> Running {
            let done = Arc::clone(&done);
            Box::pin(async move {
                done.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        });
        let job = every(Duration::from_millis(200)).missed(MissedSlots::RunAll);
        running.push(run(&process, &format!("process {number}"), job, work).await);
    }
    eventually("ten slots were run", async || bench.runs().await.len() >= 10).await;
    for running in running {
        running.stop(Duration::from_secs(10)).await;
    }
    let runs = bench.runs().await;
    assert_eq!(done.load(Ordering::SeqCst), runs.len());
    assert!(
        runs.iter()
            .all(|run| run.outcome == Some(RunOutcome::Succeeded) && run.attempt == 1)
    );
    assert_contiguous(&runs, TimeDelta::milliseconds(200));
}

fn assert_contiguous(runs: &[JobRunInfo], every: TimeDelta) {
    for (earlier, later) in runs.iter().zip(&runs[1..]) {
        assert_eq!(later.slot - earlier.slot, every, "{earlier:?} {later:?}");
        assert!(
            later.started_at >= earlier.finished_at.unwrap(),
            "{earlier:?} {later:?}"
        );
    }
}

/// Nobody ran the job for ten slots, and the eleventh begins in some seconds.
async fn after_an_outage(missed: MissedSlots) -> Vec<i64> {
    let bench = Bench::start().await;
    bench.register(every(HOUR).missed(missed)).await;
    bench
        .sql(
            "UPDATE leasehold.jobs
             SET registered_at = clock_timestamp() - interval '11 hours' + interval '3 seconds',
                 handled_until = clock_timestamp() - interval '11 hours' + interval '3 seconds'",
        )
        .await;
    let registered_at: DateTime<Utc> = bench
        .client
        .query_one("SELECT registered_at FROM leasehold.jobs", &[])
        .await
        .unwrap()
        .get(0);
    let running = bench.run(every(HOUR).missed(missed), Done).await;
    let slot = |run: &JobRunInfo| (run.slot - registered_at).num_hours();
    eventually("the eleventh slot was run", async || {
        bench
            .runs()
            .await
            .iter()
            .any(|run| slot(run) == 11 && run.outcome.is_some())
    })
    .await;
    running.stop(Duration::from_secs(10)).await;
    bench.runs().await.iter().map(slot).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn missed_slots_are_passed_over() {
    assert_eq!(after_an_outage(MissedSlots::Skip).await, [11]);
}

#[tokio::test(flavor = "multi_thread")]
async fn missed_slots_are_run_once() {
    assert_eq!(after_an_outage(MissedSlots::RunOnce).await, [10, 11]);
}

#[tokio::test(flavor = "multi_thread")]
async fn missed_slots_are_all_run() {
    let slots = after_an_outage(MissedSlots::RunAll).await;
    assert_eq!(slots, (1..=11).collect::<Vec<_>>());
}

/// The clocks in Berlin went forward on 31 March 2024 at 01:00Z, and back on 27 October 2024.
#[tokio::test(flavor = "multi_thread")]
async fn summer_time_doubles_no_slot_and_skips_none() {
    let bench = Bench::start().await;
    let around = "30 2 26-31 3,10 *";
    let job =
        || Job::new("job", Schedule::cron(around, "Europe/Berlin").unwrap()).missed(MissedSlots::RunAll);
    bench.register(job()).await;
    bench
        .sql("UPDATE leasehold.jobs SET registered_at = '2024-03-29Z', handled_until = '2024-03-29 12:00Z'")
        .await;
    let running = bench.run(job(), Done).await;
    let runs = bench.settled(8).await;
    running.stop(Duration::from_secs(10)).await;
    let slots: Vec<String> = runs
        .iter()
        .map(|run| run.slot.format("%m-%d %H:%M").to_string())
        .collect();
    let expected = [
        "03-30 01:30",
        "03-31 01:00",
        "10-26 00:30",
        "10-27 00:30",
        "10-28 01:30",
        "10-29 01:30",
        "10-30 01:30",
        "10-31 01:30",
    ];
    assert_eq!(slots[..8], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_paused_and_resumed_and_run_now() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let running = bench.run(every(HOUR), work.clone()).await;
    // From another process, which has not got the work.
    let elsewhere = bench.other().await.jobs();

    assert!(elsewhere.pause("job").await.unwrap());
    let paused = bench.info().await;
    assert!(paused.paused);
    assert_eq!(paused.next_slot, None);
    assert_eq!(elsewhere.run_now("job").await.unwrap(), RunNow::Paused);

    // Ten slots begin during the pause.
    bench
        .sql(
            "UPDATE leasehold.jobs SET registered_at = registered_at - interval '10 hours',
                                       handled_until = handled_until - interval '10 hours'",
        )
        .await;
    assert!(elsewhere.resume("job").await.unwrap());
    let resumed = bench.info().await;
    assert!(!resumed.paused);
    assert!(resumed.next_slot.is_some());

    let RunNow::Asked(id) = elsewhere.run_now("job").await.unwrap() else {
        panic!("it is not paused any more");
    };
    work.begun.notified().await;
    assert_eq!(elsewhere.run_now("job").await.unwrap(), RunNow::Running);
    let runs = bench.runs().await;
    assert_eq!(runs.len(), 1, "the slots of the pause are passed over: {runs:?}");
    assert_eq!((runs[0].id, runs[0].asked, runs[0].attempt), (id, true, 1));
    assert_eq!((runs[0].holder.as_str(), runs[0].outcome), ("first", None));
    assert_eq!(bench.info().await.last_run.as_ref(), Some(&runs[0]));

    for answer in [elsewhere.pause("other").await, elsewhere.resume("other").await] {
        assert!(!answer.unwrap());
    }
    assert_eq!(elsewhere.run_now("other").await.unwrap(), RunNow::NotFound);
    assert_eq!(elsewhere.get("other").await.unwrap(), None);
    running.stop(Duration::ZERO).await;
}

/// What was sent while nobody listened is looked for when somebody listens again, long before the next poll.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_asked_for_unheard_begins_soon() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let running = bench.run(every(HOUR), work.clone()).await;
    let listener = "SELECT pid FROM pg_stat_activity
                    WHERE datname = current_database() AND query = 'SELECT pg_backend_pid()' AND state = 'idle'";
    let mut pid = 0_i32;
    eventually("it listens", async || {
        let rows = bench.client.query(listener, &[]).await.unwrap();
        rows.first().is_some_and(|row| {
            pid = row.get(0);
            true
        })
    })
    .await;
    let end = "SELECT pg_terminate_backend($1, 5000)";
    bench.client.query_one(end, &[&pid]).await.unwrap();
    bench.ask().await;
    tokio::time::timeout(Duration::from_secs(8), work.begun.notified())
        .await
        .expect("it does not wait for the poll");
    running.stop(Duration::ZERO).await;
}

/// A pause leaves the run alone that is under way.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_does_not_end_a_run() {
    let bench = Bench::start().await;
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&begun), Arc::clone(&go));
    let work = Work(move |_| -> Running {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        Box::pin(async move {
            tell.notify_one();
            wait.notified().await;
            Ok(())
        })
    });
    let running = bench.run(every(HOUR), work).await;
    bench.ask().await;
    begun.notified().await;
    assert!(bench.jobs.pause("job").await.unwrap());
    go.notify_one();
    bench.settled(1).await;
    running.stop(Duration::from_secs(10)).await;
    assert_eq!(bench.outcomes().await, [Some(RunOutcome::Succeeded)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn max_hold_cancels_the_work() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let bounds = Duration::from_secs(1);
    let job = every(HOUR).lease(bounds).max_hold(bounds);
    let running = bench.run(job, work.clone()).await;
    bench.ask().await;
    let runs = bench.settled(1).await;
    assert_eq!(work.dropped(), 1);
    assert_eq!(runs[0].outcome, Some(RunOutcome::TimedOut));
    assert!(runs[0].error.as_ref().unwrap().contains("1s"), "{runs:?}");
    // It is an outcome: the slot is not run again.
    bench.ask().await;
    assert_eq!(bench.settled(2).await.len(), 2);
    running.stop(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loss_of_the_lease_cancels_the_work() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let job = every(HOUR)
        .lease(Duration::from_millis(600))
        .on_crash(OnCrash::Skip);
    let running = bench.run(job, work.clone()).await;
    bench.ask().await;
    work.begun.notified().await;
    bench.sql(TAKE_AWAY).await;
    eventually("the work was cancelled", async || work.dropped() == 1).await;
    let runs = bench.settled(1).await;
    assert_eq!(runs[0].outcome, Some(RunOutcome::Interrupted));
    // And is not run again.
    bench.ask().await;
    work.begun.notified().await;
    let runs = bench.runs().await;
    assert_eq!(runs.len(), 2);
    assert!(runs[1].asked && runs[1].attempt == 1);
    running.stop(Duration::ZERO).await;
}

/// The lease ends while the outcome is on its way: the first try waits for the row, and finds the run over when it has
/// it. The slot is run again.
#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_after_the_lease_is_not_accepted() {
    let bench = Bench::start().await;
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&begun), Arc::clone(&go));
    let work = Work(move |attempt| -> Running {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        Box::pin(async move {
            if attempt == 1 {
                tell.notify_one();
                wait.notified().await;
            }
            Ok(())
        })
    });
    // Long enough that no beat comes in between.
    let running = bench.run(every(HOUR).lease(Duration::from_secs(120)), work).await;
    bench.ask().await;
    begun.notified().await;
    let blocker = bench.database.client().await;
    let pid: i32 = blocker
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    blocker
        .batch_execute(&format!("BEGIN; {TAKE_AWAY}"))
        .await
        .unwrap();
    go.notify_one();
    eventually("the outcome waits for the row", async || {
        let waiting = "SELECT FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))";
        !bench.client.query(waiting, &[&pid]).await.unwrap().is_empty()
    })
    .await;
    blocker.batch_execute("COMMIT").await.unwrap();
    let runs = bench.settled(2).await;
    running.stop(Duration::from_secs(10)).await;
    let told: Vec<_> = runs
        .iter()
        .map(|run| (run.attempt, run.outcome.unwrap()))
        .collect();
    assert_eq!(told, [(1, RunOutcome::Interrupted), (2, RunOutcome::Succeeded)]);
    assert_eq!(runs[0].slot, runs[1].slot);
}

/// A run of two and a half slots.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_begins_during_a_run_is_missed() {
    let bench = Bench::start().await;
    let work = Work(|_| -> Running {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            Ok(())
        })
    });
    let job = every(Duration::from_millis(200)).missed(MissedSlots::Skip);
    let running = bench.run(job, work).await;
    eventually("four runs were begun", async || bench.runs().await.len() >= 4).await;
    running.stop(Duration::from_secs(10)).await;
    let runs = bench.runs().await;
    for (earlier, later) in runs.iter().zip(&runs[1..]) {
        assert!(later.slot > earlier.finished_at.unwrap(), "{earlier:?} {later:?}");
    }
}

/// The lease is renewed by the heartbeat that renews all others, and fences a transaction as they do.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_many_leases_succeeds_and_fences() {
    struct Long(Database);

    #[async_trait]
    impl JobWork for Long {
        async fn run(&self, run: &JobRun) -> Result<(), JobFailure> {
            let granted = run.guard().expires_at().unwrap();
            let past = granted + TimeDelta::milliseconds(3000);
            while run.guard().expires_at().unwrap() <= past && !run.guard().is_lost() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let insert = diesel::sql_query("INSERT INTO effects VALUES (1)");
            self.0
                .fenced_transaction(run.guard(), async |conn| {
                    diesel_async::RunQueryDsl::execute(insert, conn).await
                })
                .await?;
            Ok(())
        }
    }

    let bench = Bench::start().await;
    bench.sql("CREATE TABLE effects (n INTEGER)").await;
    let job = every(HOUR).lease(Duration::from_secs(1));
    let running = bench.run(job, Long(bench.process.clone())).await;
    bench.ask().await;
    let runs = bench.settled(1).await;
    running.stop(Duration::ZERO).await;
    assert_eq!(
        (runs.len(), runs[0].outcome),
        (1, Some(RunOutcome::Succeeded)),
        "{runs:?}"
    );
    let effects = bench.client.query("SELECT FROM effects", &[]).await.unwrap();
    assert_eq!(effects.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_begun_three_times_at_most() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let running = bench
        .run(every(HOUR).lease(Duration::from_secs(2)), work.clone())
        .await;
    bench.ask().await;
    for _ in 0..3 {
        work.begun.notified().await;
        bench.sql(TAKE_AWAY).await;
    }
    bench.settled(3).await;
    bench.ask().await;
    work.begun.notified().await;
    let runs = bench.runs().await;
    let attempts: Vec<i32> = runs.iter().map(|run| run.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 1]);
    assert!(
        runs[..3]
            .iter()
            .all(|run| run.outcome == Some(RunOutcome::Interrupted))
    );
    running.stop(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_or_panics_has_run() {
    let bench = Bench::start().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let work = Work(move |_| -> Running {
        let number = runs.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            match number {
                0 => Err("the disk is full".into()),
                1 => panic!("a test panics"),
                _ => Ok(()),
            }
        })
    });
    let running = bench.run(every(HOUR), work).await;
    for count in 1..=3 {
        bench.ask().await;
        bench.settled(count).await;
    }
    running.stop(Duration::from_secs(10)).await;
    let runs = bench.runs().await;
    let told: Vec<_> = runs
        .iter()
        .map(|run| (run.outcome.unwrap(), run.error.as_deref()))
        .collect();
    let expected = [
        (RunOutcome::Failed, Some("the disk is full")),
        (RunOutcome::Failed, Some("the job panicked")),
        (RunOutcome::Succeeded, None),
    ];
    assert_eq!(told, expected);
}

/// Long before its lease would end.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stops_hands_its_run_to_another() {
    let bench = Bench::start().await;
    let (work, other) = (Endless::default(), Endless::default());
    let hours = || every(HOUR).lease(HOUR);
    let first = bench.run(hours(), work.clone()).await;
    bench.ask().await;
    work.begun.notified().await;
    let elsewhere = bench.other().await;
    let second = run(&elsewhere, "second", hours(), other.clone()).await;
    first.stop(Duration::ZERO).await;
    assert_eq!(work.dropped(), 1);
    other.begun.notified().await;
    let runs = bench.runs().await;
    assert_eq!(
        (runs[0].outcome, runs[1].outcome),
        (Some(RunOutcome::Interrupted), None)
    );
    assert_eq!((runs[1].attempt, runs[1].holder.as_str()), (2, "second"));
    second.stop(Duration::ZERO).await;
}

/// As a panic of the caller would do it: nothing is settled, and nothing waits for the lease either.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_are_dropped_give_their_runs_back() {
    let bench = Bench::start().await;
    let work = Endless::default();
    let first = bench.run(every(HOUR).lease(HOUR), work.clone()).await;
    bench.ask().await;
    work.begun.notified().await;
    drop(first);
    eventually("the lease was given back", async || {
        bench.outcomes().await == [Some(RunOutcome::Interrupted)]
    })
    .await;
    let again = bench.run(every(HOUR).lease(HOUR), Done).await;
    let runs = bench.settled(2).await;
    assert_eq!(
        (runs[1].attempt, runs[1].outcome),
        (2, Some(RunOutcome::Succeeded))
    );
    again.stop(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stops_lets_its_run_end() {
    let bench = Bench::start().await;
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&begun), Arc::clone(&go));
    let work = Work(move |_| -> Running {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        Box::pin(async move {
            tell.notify_one();
            wait.notified().await;
            Ok(())
        })
    });
    let running = bench.run(every(HOUR), work).await;
    bench.ask().await;
    begun.notified().await;
    let stopping = tokio::spawn(running.stop(Duration::from_secs(30)));
    go.notify_one();
    stopping.await.unwrap();
    assert_eq!(bench.outcomes().await, [Some(RunOutcome::Succeeded)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_has_the_last_hundred_runs() {
    let bench = Bench::start().await;
    bench.register(every(HOUR)).await;
    bench
        .sql(
            "INSERT INTO leasehold.job_runs
                    (id, job, slot, attempt, asked, holder, started_at, finished_at, outcome)
             SELECT gen_random_uuid(), 'job', clock_timestamp() - n * interval '1 day', 1, false, 'old',
                    clock_timestamp() - n * interval '1 day', clock_timestamp() - n * interval '1 day', 'succeeded'
             FROM generate_series(450, 1, -3) AS n",
        )
        .await;
    let running = bench.run(every(HOUR), Done).await;
    let id = bench.ask().await;
    eventually("it has run", async || {
        bench
            .info()
            .await
            .last_run
            .is_some_and(|run| run.id == id && run.outcome.is_some())
    })
    .await;
    running.stop(Duration::ZERO).await;
    let count = "SELECT count(*) FROM leasehold.job_runs";
    assert_eq!(
        bench.client.query_one(count, &[]).await.unwrap().get::<_, i64>(0),
        100
    );
    let runs = bench.runs().await;
    assert_eq!((runs.len(), runs[99].id), (100, id));
    assert!(runs.is_sorted_by_key(|run| run.started_at));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_has_no_runs_older_than_400_days() {
    let bench = Bench::start().await;
    bench.register(every(HOUR)).await;
    bench
        .sql(
            "INSERT INTO leasehold.job_runs
                    (id, job, slot, attempt, asked, holder, started_at, finished_at, outcome)
             SELECT gen_random_uuid(), 'job', at, 1, false, 'old', at, at, 'failed'
             FROM (SELECT clock_timestamp() - n * interval '1 day' AS at FROM unnest(ARRAY[401, 399]) AS n) AS ages",
        )
        .await;
    let running = bench.run(every(HOUR), Done).await;
    bench.ask().await;
    eventually("it has run", async || {
        bench.outcomes().await == [Some(RunOutcome::Failed), Some(RunOutcome::Succeeded)]
    })
    .await;
    running.stop(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_schedule_counts_from_its_registration() {
    let bench = Bench::start().await;
    bench.register(every(HOUR)).await;
    let registered = bench.info().await;
    bench
        .sql("UPDATE leasehold.jobs SET registered_at = registered_at - interval '90 minutes'")
        .await;
    bench.register(every(HOUR).missed(MissedSlots::RunAll)).await;
    let same = bench.info().await;
    assert_eq!(
        same.next_slot,
        registered.next_slot.map(|slot| slot - TimeDelta::minutes(30))
    );
    bench.register(every(HOUR * 2)).await;
    let other = bench.info().await;
    assert_eq!(other.schedule, "every 2h");
    assert!(other.next_slot > registered.next_slot.map(|slot| slot + TimeDelta::minutes(59)));
    assert!(bench.runs().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_slot_has_no_connection() {
    let bench = Bench::start().await;
    let running = bench.run(every(HOUR), Done).await;
    bench.ask().await;
    bench.settled(1).await;
    eventually("every connection is in the pool", async || {
        let pool = bench.process.pool().state();
        pool.idle == pool.open
    })
    .await;
    running.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn two_jobs_of_one_name_are_refused() {
    let bench = Bench::start().await;
    let mut scheduler = bench.process.job_scheduler("first");
    scheduler.register(every(HOUR), Done).unwrap();
    assert_eq!(scheduler.register(every(HOUR), Done).unwrap_err().field(), "name");
    let long = bench
        .process
        .job_scheduler(&"x".repeat(257))
        .register(every(HOUR), Done);
    assert_eq!(long.unwrap_err().field(), "holder.owner");
}

/// The work of the processes: 50 ms, and a row that says who did it. Every tenth slot it becomes a victim first.
struct Tick {
    database: Database,
    victims: bool,
}

#[async_trait]
impl JobWork for Tick {
    async fn run(&self, run: &JobRun) -> Result<(), JobFailure> {
        if self.victims && run.attempt() == 1 && run.slot().timestamp() % 10 == 0 {
            let victim = format!("INSERT INTO victims VALUES ({})", std::process::id());
            self.execute(&victim).await?;
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.execute(&format!(
            "INSERT INTO ticks VALUES ('{}', {})",
            run.slot(),
            std::process::id()
        ))
        .await
    }
}

impl Tick {
    async fn execute(&self, sql: &str) -> Result<(), JobFailure> {
        self.database
            .read(async |conn| diesel_async::RunQueryDsl::execute(diesel::sql_query(sql), conn).await)
            .await?;
        Ok(())
    }
}

/// Runs the job until its standard input ends.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a process for the tests about processes"]
async fn job_process() {
    let url = std::env::var(URL).expect("the test sets it");
    let delay: u64 = std::env::var(DELAY_MS).unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(delay)).await;
    let options = leasehold_storage::ConnectOptions::parse(&url, None).unwrap();
    let database = Database::connect(options, 2).await.unwrap();
    let work = Tick {
        database: database.clone(),
        victims: std::env::var("VICTIMS").is_ok(),
    };
    let job = every(Duration::from_secs(1))
        .missed(MissedSlots::RunAll)
        .lease(Duration::from_millis(1500));
    let running = run(&database, &std::process::id().to_string(), job, work).await;
    tokio::task::spawn_blocking(|| std::io::stdin().lines().next())
        .await
        .unwrap();
    running.stop(Duration::from_secs(10)).await;
}

struct Processes {
    bench: Bench,
    victims: bool,
    children: Vec<Child>,
}

impl Processes {
    async fn start(victims: bool) -> Self {
        let bench = Bench::start().await;
        bench
            .sql("CREATE TABLE ticks (slot TIMESTAMPTZ, pid BIGINT); CREATE TABLE victims (pid BIGINT)")
            .await;
        let mut processes = Self {
            bench,
            victims,
            children: Vec::new(),
        };
        for number in 0..5 {
            processes.spawn(number * 137);
        }
        processes
    }

    fn spawn(&mut self, delay_ms: u64) {
        let mut command: Command = this_test_binary("jobs::job_process");
        command
            .env(URL, self.bench.database.url())
            .env(DELAY_MS, delay_ms.to_string())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .kill_on_drop(true);
        if self.victims {
            command.env("VICTIMS", "yes");
        }
        self.children.push(command.spawn().unwrap());
    }

    /// Kills those who have a run that is to be interrupted, and starts others in their place.
    async fn kill_victims(&mut self) {
        let victims = "DELETE FROM victims RETURNING pid";
        for row in self.bench.client.query(victims, &[]).await.unwrap() {
            let pid: i64 = row.get(0);
            let child = self
                .children
                .iter()
                .position(|child| child.id().is_some_and(|id| i64::from(id) == pid));
            let mut child = self.children.swap_remove(child.unwrap());
            child.kill().await.unwrap();
            self.spawn(0);
        }
    }

    /// Runs 60 slots, and answers all runs.
    async fn sixty_slots(mut self) -> (Bench, Vec<JobRunInfo>) {
        let start = std::time::Instant::now();
        loop {
            self.kill_victims().await;
            let done = "SELECT count(*) FROM leasehold.job_runs WHERE outcome = 'succeeded'";
            let done: i64 = self.bench.client.query_one(done, &[]).await.unwrap().get(0);
            if done >= 60 {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(240), "{done} slots only");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for mut child in self.children {
            drop(child.stdin.take());
            child.wait().await.unwrap();
        }
        let runs = self.bench.runs().await;
        (self.bench, runs)
    }
}

/// Every slot from the first on has one accepted outcome, and was worked on once to its end.
async fn assert_once_per_slot(bench: &Bench, runs: &[JobRunInfo]) {
    let accepted: Vec<JobRunInfo> = runs
        .iter()
        .filter(|run| run.outcome == Some(RunOutcome::Succeeded))
        .cloned()
        .collect();
    assert!(accepted.len() >= 60);
    let first = "SELECT registered_at + interval '1 second' FROM leasehold.jobs";
    let first: DateTime<Utc> = bench.client.query_one(first, &[]).await.unwrap().get(0);
    assert_eq!(accepted[0].slot, first);
    assert_contiguous(&accepted, TimeDelta::seconds(1));
    let ticks = "SELECT slot FROM ticks ORDER BY slot";
    let ticks = bench.client.query(ticks, &[]).await.unwrap();
    let ticks: Vec<DateTime<Utc>> = ticks.iter().map(|row| row.get(0)).collect();
    assert_eq!(ticks, accepted.iter().map(|run| run.slot).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_five_processes_run_every_slot_once() {
    let (bench, runs) = Processes::start(false).await.sixty_slots().await;
    assert_once_per_slot(&bench, &runs).await;
    assert!(
        runs.iter().all(|run| run.outcome == Some(RunOutcome::Succeeded)),
        "{runs:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_processes_killed_in_every_tenth_run_cost_no_slot() {
    let (bench, runs) = Processes::start(true).await.sixty_slots().await;
    assert_once_per_slot(&bench, &runs).await;
    let interrupted: Vec<&JobRunInfo> = runs
        .iter()
        .filter(|run| run.outcome == Some(RunOutcome::Interrupted))
        .collect();
    assert!(interrupted.len() >= 5, "{runs:?}");
    for lost in interrupted {
        assert_eq!((lost.attempt, lost.slot.timestamp() % 10), (1, 0));
        let again = runs
            .iter()
            .find(|run| run.slot == lost.slot && run.attempt == 2)
            .unwrap();
        assert_eq!(again.outcome, Some(RunOutcome::Succeeded));
        assert!(again.started_at >= lost.finished_at.unwrap());
    }
}
