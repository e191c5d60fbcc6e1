//! Session locks: the conformance suite, and what is special about many locks in one connection.

mod injector;

use std::io::Write as _;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use leasehold_conformance::{Abilities, Life, Provider, hold_as_told, this_test_binary};
use leasehold_domain::{
    AcquireError, DistributedLock, DistributedLockExt, ExtendError, Holder, LockGuard, LockMode, LockName,
    LockRequest, ReleaseError, Released, WithLockError,
};
use leasehold_embedded::Cluster;
use leasehold_storage::advisory::{AdvisoryKey, compat};
use leasehold_storage::{ConnectOptions, Database, PgSessionLock};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use self::injector::Injector;
use crate::support::measured::measured;
use crate::support::pooler::{Next, Pooler};
use crate::support::{TestDatabase, eventually};

const URL: &str = "LEASEHOLD_CONFORMANCE_DATABASE_URL";

const ADVISORY: &str = "\
SELECT pid, granted FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// The backend that has the lock of a `bigint` key.
const HOLDER: &str = "\
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (classid::bigint << 32) | objid::bigint = $1";

fn name(part: &str) -> LockName {
    LockName::new(["session test", part]).unwrap()
}

fn request(name: &LockName) -> LockRequest {
    LockRequest::new(name.clone(), Holder::new("tester", "test"))
}

fn shared(name: &LockName) -> LockRequest {
    request(name).with_mode(LockMode::Shared)
}

fn bits(name: &LockName) -> i64 {
    match AdvisoryKey::of(name) {
        AdvisoryKey::Big(key) => key,
        AdvisoryKey::Pair(..) => unreachable!("names have big keys"),
    }
}

async fn connect(database: &TestDatabase) -> Database {
    Database::connect(database.options(), 2).await.unwrap()
}

/// How many advisory locks there are, waited for or granted.
async fn advisory_locks(client: &Client) -> usize {
    client.query(ADVISORY, &[]).await.unwrap().len()
}

async fn nothing_is_left(client: &Client) {
    eventually("no advisory lock", async || advisory_locks(client).await == 0).await;
}

struct Sessions {
    database: TestDatabase,
    client: Client,
}

impl Sessions {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        Self { database, client }
    }
}

impl Provider for Sessions {
    fn abilities(&self) -> Abilities {
        Abilities {
            life: Life::Session,
            shared: true,
            processes: true,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        Arc::new(connect(&self.database).await.session_locks())
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        LockName::new(["plan", scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        match advisory_locks(&self.client).await {
            0 => None,
            locks => Some(format!("{locks} advisory locks")),
        }
    }

    async fn lose(&self, name: &LockName) {
        let holders = self.client.query(HOLDER, &[&bits(name)]).await.unwrap();
        assert!(!holders.is_empty(), "somebody holds {name}");
        let holders: Vec<i32> = holders.iter().map(|row| row.get(0)).collect();
        self.client
            .execute(
                "SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid",
                &[&holders],
            )
            .await
            .unwrap();
        let gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1)";
        eventually("the sessions have ended", async || {
            self.client
                .query_one(gone, &[&holders])
                .await
                .unwrap()
                .get::<_, i64>(0)
                == 0
        })
        .await;
    }

    async fn expire(&self, _name: &LockName) -> bool {
        false
    }

    async fn unreachable(&self) -> Option<Arc<dyn DistributedLock>> {
        let database = TestDatabase::create().await;
        let locks = connect(&database).await.session_locks();
        database.close().await;
        Some(Arc::new(locks))
    }

    fn holder_process(&self) -> Option<Command> {
        let mut command = this_test_binary("session::holder");
        command.env(URL, self.database.url());
        Some(command)
    }
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn holder() {
    let url = std::env::var(URL).expect("the provider sets it");
    let options = ConnectOptions::parse(&url, None).unwrap();
    let database = Database::connect(options, 2).await.unwrap();
    hold_as_told(Arc::new(database.session_locks())).await;
    database.shutdown(Duration::from_secs(5)).await;
}

mod conformance {
    use super::Sessions;
    leasehold_conformance::lock_conformance!(Sessions::start().await);
}

/// Longer than anything takes that works.
const PATIENT: Duration = Duration::from_secs(30);

struct Bench {
    database: TestDatabase,
    client: Client,
    process: Database,
    locks: PgSessionLock,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        let process = connect(&database).await;
        let locks = process.session_locks();
        Self {
            database,
            client,
            process,
            locks,
        }
    }

    async fn holders(&self, name: &LockName) -> Vec<i32> {
        let rows = self.client.query(HOLDER, &[&bits(name)]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// The process hears by now what others say: it answers who asks for a name that it has just released.
    async fn listens(&self) {
        let name = name("listens");
        let mut ears = Ears::open(&self.database).await;
        eventually("it listens", async || {
            give_back(&self.locks, take(&self.locks, &request(&name)).await).await;
            let ask = format!("NOTIFY leasehold_wait, '{}'", bits(&name));
            self.client.batch_execute(&ask).await.unwrap();
            let answer = ears.hear("leasehold_free");
            tokio::time::timeout(Duration::from_millis(100), answer)
                .await
                .is_ok()
        })
        .await;
    }

    async fn terminate(&self, backend_pid: i32) {
        let ended = "SELECT pg_terminate_backend($1)";
        let ended = self.client.query_one(ended, &[&backend_pid]).await.unwrap();
        assert!(ended.get::<_, bool>(0), "there is such a session");
    }

    /// The session that tells others what this process holds.
    async fn teller(&self) -> i32 {
        let teller = "SELECT pid FROM pg_stat_activity
            WHERE query LIKE '%leasehold.presence%' AND pid <> pg_backend_pid() AND datname = current_database()";
        self.client.query_one(teller, &[]).await.unwrap().get(0)
    }
}

async fn take(locks: &PgSessionLock, request: &LockRequest) -> LockGuard {
    locks.try_acquire(request).await.unwrap()
}

async fn give_back(locks: &PgSessionLock, guard: LockGuard) {
    assert_eq!(locks.release(guard).await.unwrap(), Released::Held);
}

type Waiting = Pin<Box<dyn Future<Output = Result<LockGuard, AcquireError>> + Send>>;

/// Has its place in the queue when it is returned.
fn begin_to_wait(locks: &PgSessionLock, request: &LockRequest) -> Waiting {
    let (locks, request) = (locks.clone(), request.clone());
    let mut waiting: Waiting = Box::pin(async move { locks.acquire(&request, PATIENT).await });
    let begun = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(begun.is_pending(), "it is held");
    waiting
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_are_told_when_their_session_is_terminated() {
    let bench = Bench::start().await;
    let mut fastest = Duration::MAX;
    for round in 0..5 {
        let mut guards = Vec::new();
        for number in 0..40 {
            let name = name(&format!("terminated {round} {number}"));
            guards.push(bench.locks.try_acquire(&request(&name)).await.unwrap());
        }
        let victim = bench.holders(guards[0].name()).await[0];
        let mut on_victim = Vec::new();
        let mut elsewhere = Vec::new();
        for guard in guards {
            if bench.holders(guard.name()).await == [victim] {
                on_victim.push(guard);
            } else {
                elsewhere.push(guard);
            }
        }
        assert!(!elsewhere.is_empty(), "there are two sessions");

        bench.terminate(victim).await;
        let terminated = Instant::now();
        for guard in &on_victim {
            tokio::time::timeout(PATIENT, guard.lost())
                .await
                .expect("it is told");
        }
        fastest = fastest.min(terminated.elapsed());

        assert!(elsewhere.iter().all(|guard| !guard.is_lost()));
        for guard in on_victim {
            assert!(guard.is_lost());
            let extended = bench.locks.extend(&guard, Duration::from_secs(1)).await;
            assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
            let again = bench
                .locks
                .acquire(&request(guard.name()), PATIENT)
                .await
                .unwrap();
            assert_eq!(bench.locks.release(guard).await.unwrap(), Released::AlreadyGone);
            assert!(!again.is_lost(), "the late release touched nobody");
            give_back(&bench.locks, again).await;
        }
        for guard in elsewhere {
            give_back(&bench.locks, guard).await;
        }
    }
    // Of five, so that a busy machine does not count. It is some milliseconds, where a ping comes after three seconds.
    assert!(fastest <= Duration::from_secs(1), "{fastest:?}");
    nothing_is_left(&bench.client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_is_cancelled_when_its_session_is_terminated() {
    let bench = Bench::start().await;
    let name = name("cancelled");
    let worked = bench
        .locks
        .with_lock(&request(&name), PATIENT, async |_| {
            bench.terminate(bench.holders(&name).await[0]).await;
            std::future::pending::<()>().await;
        })
        .await;
    assert!(matches!(worked, Err(WithLockError::Lost)), "{worked:?}");
    nothing_is_left(&bench.client).await;
}

/// An attempt whose session ends under it is made again on the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_outlive_their_session() {
    let bench = Bench::start().await;
    let other = connect(&bench.database).await.session_locks();
    let request = request(&name("outlives"));
    // Its session is open, and not the holder's.
    give_back(&bench.locks, take(&bench.locks, &request).await).await;
    let held = take(&other, &request).await;
    let waiting = tokio::spawn(begin_to_wait(&bench.locks, &request));
    let others = bench.holders(request.name()).await[0];
    let sessions = "SELECT pid FROM pg_stat_activity
        WHERE query LIKE '%advisory%' AND pid NOT IN ($1, pg_backend_pid()) AND datname = current_database()";
    for row in bench.client.query(sessions, &[&others]).await.unwrap() {
        bench.terminate(row.get(0)).await;
    }
    give_back(&other, held).await;
    let guard = waiting.await.unwrap().unwrap();
    give_back(&bench.locks, guard).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_locks_need_at_most_four_connections() {
    const LOCKS: usize = 2_000;
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let options = database.options().with_application_name("two thousand");
    let process = Database::connect(options, 8).await.unwrap();
    let locks = process.session_locks();
    let mut tasks = JoinSet::new();
    for number in 0..LOCKS {
        let locks = locks.clone();
        tasks.spawn(async move { take(&locks, &request(&name(&format!("many {number}")))).await });
    }
    let guards = tasks.join_all().await;
    // Others are told of them all, which needs its connection too.
    eventually("all are told", async || {
        let told = client
            .query_one("SELECT count(*) FROM leasehold.presence", &[])
            .await
            .unwrap();
        told.get::<_, i64>(0) == LOCKS as i64
    })
    .await;
    assert_eq!(advisory_locks(&client).await, LOCKS);
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'two thousand'";
    let connections: i64 = client.query_one(connections, &[]).await.unwrap().get(0);
    assert!((1..=4).contains(&connections), "{connections} connections");
    assert!(guards.iter().all(|guard| !guard.is_lost()));
    for guard in guards {
        give_back(&locks, guard).await;
    }
    nothing_is_left(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_waiters_hold_no_connection() {
    const WAITERS: usize = 200;
    let bench = Bench::start().await;
    let options = bench.database.options().with_application_name("two hundred");
    let process = Database::connect(options, 8).await.unwrap();
    let (here, there) = (process.session_locks(), &bench.locks);
    let request = request(&name("waited for"));
    for holder in [&here, there] {
        let held = take(holder, &request).await;
        let mut waiters = JoinSet::new();
        for _ in 0..WAITERS {
            let (waiting, here) = (begin_to_wait(&here, &request), here.clone());
            waiters.spawn(async move { give_back(&here, waiting.await.unwrap()).await });
        }
        let looks =
            "SELECT count(*), count(*) FILTER (WHERE wait_event_type = 'Lock' AND wait_event = 'advisory')
            FROM pg_stat_activity WHERE application_name = 'two hundred'";
        let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        for _ in 0..20 {
            let state = process.pool().state();
            assert_eq!(state.open, state.idle, "nobody has a pooled connection");
            let row = bench.client.query_one(looks, &[]).await.unwrap();
            assert!(row.get::<_, i64>(0) <= 4, "{} connections", row.get::<_, i64>(0));
            assert_eq!(row.get::<_, i64>(1), 0, "nobody waits in the server");
            let waits: i64 = bench.client.query_one(waits, &[]).await.unwrap().get(0);
            assert_eq!(waits, 0);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        give_back(holder, held).await;
        tokio::time::timeout(PATIENT, waiters.join_all())
            .await
            .expect("everybody gets it");
    }
    nothing_is_left(&bench.client).await;
}

/// Whoever waits inside the server gets the lock when this process unlocks, and that is soon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_is_handed_on_sixteen_times_at_most() {
    let bench = Bench::start().await;
    let request = request(&name("handed on"));
    let held = take(&bench.locks, &request).await;
    let outside = bench.database.client().await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    let key = bits(request.name());
    let marks = Arc::clone(&order);
    tasks.spawn(async move {
        outside
            .query_one("SELECT pg_advisory_lock($1)", &[&key])
            .await
            .unwrap();
        marks.lock().unwrap().push("outside");
        outside
            .query_one("SELECT pg_advisory_unlock($1)", &[&key])
            .await
            .unwrap();
    });
    eventually("the other waits", async || {
        advisory_locks(&bench.client).await == 2
    })
    .await;
    for _ in 0..50 {
        let (waiting, locks) = (begin_to_wait(&bench.locks, &request), bench.locks.clone());
        let marks = Arc::clone(&order);
        tasks.spawn(async move {
            let guard = waiting.await.unwrap();
            marks.lock().unwrap().push("inside");
            give_back(&locks, guard).await;
        });
    }
    give_back(&bench.locks, held).await;
    tokio::time::timeout(PATIENT, tasks.join_all())
        .await
        .expect("everybody gets it");
    let order = order.lock().unwrap();
    assert_eq!(order.len(), 51);
    let turn = order.iter().position(|mark| *mark == "outside");
    assert_eq!(turn, Some(16), "{order:?}");
}

/// A process that waits is let in at the next release, not after all who waited longer elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_that_waits_is_next() {
    let bench = Bench::start().await;
    bench.listens().await;
    let other = connect(&bench.database).await.session_locks();
    let request = request(&name("next"));
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    let held = take(&bench.locks, &request).await;
    let wait = |locks: &PgSessionLock, mark: &'static str| {
        let (waiting, locks, order) = (begin_to_wait(locks, &request), locks.clone(), Arc::clone(&order));
        async move {
            let guard = waiting.await.unwrap();
            order.lock().unwrap().push(mark);
            give_back(&locks, guard).await;
        }
    };
    for _ in 0..20 {
        tasks.spawn(wait(&bench.locks, "here"));
    }
    let mut ears = Ears::open(&bench.database).await;
    tasks.spawn(wait(&other, "there"));
    ears.hear("leasehold_wait").await;
    // Notifications come in order: what was said before this has been heard.
    bench.listens().await;
    give_back(&bench.locks, held).await;
    tokio::time::timeout(PATIENT, tasks.join_all())
        .await
        .expect("everybody gets it");
    let order = order.lock().unwrap();
    let turn = order.iter().position(|mark| *mark == "there").unwrap();
    assert_eq!(turn, 0, "{order:?}");
}

/// Hears what processes tell each other.
struct Ears {
    heard: tokio::sync::mpsc::UnboundedReceiver<String>,
    _client: Client,
}

impl Ears {
    async fn open(database: &TestDatabase) -> Self {
        let (client, mut driver) = database.config().connect(tokio_postgres::NoTls).await.unwrap();
        let (tell, heard) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|context| driver.poll_message(context)).await {
                if let tokio_postgres::AsyncMessage::Notification(heard) = message {
                    tell.send(heard.channel().to_owned()).ok();
                }
            }
        });
        client
            .batch_execute("LISTEN leasehold_wait; LISTEN leasehold_free")
            .await
            .unwrap();
        Self {
            heard,
            _client: client,
        }
    }

    async fn hear(&mut self, channel: &str) {
        let heard = async { while self.heard.recv().await.unwrap() != channel {} };
        tokio::time::timeout(PATIENT, heard).await.expect("it is said");
    }
}

/// Six processes' worth of hurry in one: the other one gets its turns all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_process_gives_way() {
    let bench = Bench::start().await;
    let other = connect(&bench.database).await.session_locks();
    let request = request(&name("busy"));
    let mut busy = JoinSet::new();
    for _ in 0..8 {
        let (locks, request) = (bench.locks.clone(), request.clone());
        busy.spawn(async move {
            loop {
                let guard = locks.acquire(&request, PATIENT).await.unwrap();
                tokio::task::yield_now().await;
                give_back(&locks, guard).await;
            }
        });
    }
    for _ in 0..5 {
        let guard = other.acquire(&request, PATIENT).await.unwrap();
        give_back(&other, guard).await;
    }
    busy.shutdown().await;
    nothing_is_left(&bench.client).await;
}

/// One that only polls, and never says that it waits, is not overlooked for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_polls_gets_a_turn() {
    let bench = Bench::start().await;
    let request = request(&name("polled"));
    let mut busy = JoinSet::new();
    for _ in 0..8 {
        let (locks, request) = (bench.locks.clone(), request.clone());
        busy.spawn(async move {
            loop {
                let guard = locks.acquire(&request, PATIENT).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
                give_back(&locks, guard).await;
            }
        });
    }
    let key = bits(request.name());
    eventually("a poll finds it free", async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let poll = bench
            .client
            .query_one("SELECT pg_try_advisory_lock($1)", &[&key])
            .await
            .unwrap();
        poll.get(0)
    })
    .await;
    bench
        .client
        .query_one("SELECT pg_advisory_unlock($1)", &[&key])
        .await
        .unwrap();
    busy.shutdown().await;
    nothing_is_left(&bench.client).await;
}

/// A turn kept for somebody who has given up waiting costs a single attempt next to nothing, and never makes it
/// fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_kept_for_nobody_refuses_nobody() {
    let bench = Bench::start().await;
    let other = connect(&bench.database).await.session_locks();
    let request = request(&name("kept"));
    for round in 0..6 {
        let held = take(&bench.locks, &request).await;
        let mut ears = Ears::open(&bench.database).await;
        let waited = tokio::spawn(begin_to_wait(&other, &request));
        ears.hear("leasehold_wait").await;
        bench.listens().await;
        waited.abort();
        waited.await.expect_err("it was given up");
        // Answered after whatever that one had still sent.
        other.try_acquire(&request).await.unwrap_err();
        give_back(&bench.locks, held).await;
        let next = if round % 2 == 0 {
            bench.locks.try_acquire(&request).await
        } else {
            // It would wait, but not for as long as the turn of others may last.
            bench.locks.acquire(&request, Duration::from_millis(50)).await
        };
        give_back(&bench.locks, next.unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_holders_of_a_process_are_one_in_the_server() {
    let bench = Bench::start().await;
    let name = name("shared");
    let mut guards = Vec::new();
    for _ in 0..50 {
        guards.push(take(&bench.locks, &shared(&name)).await);
    }
    let modes = async || -> Vec<String> {
        let modes = "SELECT mode FROM pg_locks WHERE locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let rows = bench.client.query(modes, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    while let Some(guard) = guards.pop() {
        assert_eq!(modes().await, ["ShareLock"]);
        // The server would grant this to the same session.
        let refused = bench.locks.try_acquire(&request(&name)).await.unwrap_err();
        let held = refused.contention().unwrap().held.as_ref().unwrap();
        assert_eq!(held.mode, LockMode::Shared);
        give_back(&bench.locks, guard).await;
    }
    assert_eq!(modes().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlock_behind_the_back_is_told() {
    let measured = measured();
    for statement in ["SELECT pg_advisory_unlock_all()", "DISCARD ALL"] {
        let bench = Bench::start().await;
        let mut injector = Injector::start(&bench.database).await;
        let process = Database::connect(injector.options(), 2).await.unwrap();
        let locks = process.session_locks();
        // Two of the same session.
        let first = take(&locks, &request(&name("behind the back"))).await;
        let session = bench.holders(first.name()).await;
        let mut second = None;
        for number in 0.. {
            let guard = take(&locks, &request(&name(&format!("beside {number}")))).await;
            if bench.holders(guard.name()).await == session {
                second = Some(guard);
                break;
            }
            // The other session's must not hear the statement.
            give_back(&locks, guard).await;
            let others = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%advisory%'
                AND pid NOT IN ($1, pg_backend_pid()) AND datname = current_database()";
            for row in bench.client.query(others, &[&session[0]]).await.unwrap() {
                bench.terminate(row.get(0)).await;
            }
        }
        let second = second.unwrap();
        injector.run(statement).await;
        assert!(!first.is_lost(), "nobody can know yet");

        assert_eq!(
            locks.release(first).await.unwrap(),
            Released::AlreadyGone,
            "{statement}"
        );
        // What else that session had is not to be relied on.
        tokio::time::timeout(PATIENT, second.lost())
            .await
            .expect("it is told");
        assert_eq!(locks.release(second).await.unwrap(), Released::AlreadyGone);
        let again = locks
            .acquire(&request(&name("behind the back")), PATIENT)
            .await
            .unwrap();
        give_back(&locks, again).await;
    }
    // After the second statement the server has forgotten how to unlock, and says so.
    assert_eq!(measured.counter("leasehold_unlock_false_total"), 1);
}

/// The process of `a_stopped_process_loses_its_locks`.
#[tokio::test]
#[ignore = "a process for a test about stopped processes"]
async fn stopped_holder() {
    let url = std::env::var(URL).expect("the test sets it");
    let options = ConnectOptions::parse(&url, None).unwrap();
    let locks = Database::connect(options, 2).await.unwrap().session_locks();
    let guard = take(&locks, &request(&name("stopped"))).await;
    // Past the test harness, which captures `println!`.
    writeln!(std::io::stdout(), "\nheld").unwrap();
    tokio::time::timeout(3 * PATIENT, guard.lost())
        .await
        .expect("it is told");
    writeln!(std::io::stdout(), "\nlost").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_process_loses_its_locks() {
    let bench = Bench::start().await;
    let mut child = this_test_binary("session::stopped_holder")
        .env(URL, bench.database.url())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut hear = async |what: &str| {
        let heard = async { while lines.next_line().await.unwrap().unwrap() != what {} };
        tokio::time::timeout(2 * PATIENT, heard)
            .await
            .expect("the child says it");
    };
    hear("held").await;
    let signal = |name: &'static str| {
        let pid = child.id().unwrap().to_string();
        async move {
            let sent = Command::new("kill").args([name, &pid]).status().await.unwrap();
            assert!(sent.success());
        }
    };
    signal("-STOP").await;
    let stopped = Instant::now();
    let guard = bench
        .locks
        .acquire(&request(&name("stopped")), 2 * PATIENT)
        .await
        .unwrap();
    let after = stopped.elapsed();
    // Its last ping was at most three seconds before, and its server waits for ten.
    assert!(
        after > Duration::from_secs(5),
        "free after {after:?}, and not because of the stop"
    );
    assert!(after < Duration::from_secs(20), "free only after {after:?}");
    signal("-CONT").await;
    hear("lost").await;
    give_back(&bench.locks, guard).await;
    assert!(child.wait().await.unwrap().success());
}

/// Attempts and waits that are dropped at random points, all at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_dropped_attempts_leaves_nothing() {
    let bench = Bench::start().await;
    let other = connect(&bench.database).await.session_locks();
    let mut tasks = JoinSet::new();
    for number in 0..400_u64 {
        let locks = if number % 3 == 0 {
            other.clone()
        } else {
            bench.locks.clone()
        };
        let name = name(&format!("storm {}", number % 7));
        let request = if number % 2 == 0 {
            request(&name)
        } else {
            shared(&name)
        };
        tasks.spawn(async move {
            let patience = Duration::from_micros(number * 37 % 5_000);
            let work = async {
                let guard = locks.acquire(&request, PATIENT).await.unwrap();
                tokio::task::yield_now().await;
                drop(locks.release(guard).await);
            };
            drop(tokio::time::timeout(patience, work).await);
        });
    }
    tasks.join_all().await;
    nothing_is_left(&bench.client).await;
    for number in 0..7 {
        let request = request(&name(&format!("storm {number}")));
        let guard = bench.locks.acquire(&request, PATIENT).await.unwrap();
        give_back(&bench.locks, guard).await;
    }
}

/// Guards end well without the runtime in which they were made.
#[test]
fn a_guard_outlives_its_runtime() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let (database, process, guard) = runtime().block_on(async {
        let database = TestDatabase::create().await;
        let process = connect(&database).await;
        let guard = take(&process.session_locks(), &request(&name("outlives"))).await;
        (database, process, guard)
    });
    let watching = runtime();
    let client = watching.block_on(database.client());
    watching.block_on(async {
        assert!(!guard.is_lost());
        assert_eq!(advisory_locks(&client).await, 1);
    });
    drop(guard);
    watching.block_on(nothing_is_left(&client));
    // Another runtime can go on with the same locks.
    watching.block_on(async {
        let locks = process.session_locks();
        give_back(&locks, take(&locks, &request(&name("outlives"))).await).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_frees_what_is_held_and_refuses_the_rest() {
    let bench = Bench::start().await;
    let guard = take(&bench.locks, &request(&name("shut down"))).await;
    let waiting = begin_to_wait(&bench.locks, &request(&name("shut down")));
    bench.process.shutdown(PATIENT).await;
    tokio::time::timeout(PATIENT, guard.lost())
        .await
        .expect("it is told");
    for refused in [
        waiting.await,
        bench.locks.try_acquire(&request(&name("shut down"))).await,
    ] {
        assert!(
            matches!(refused, Err(AcquireError::Unavailable(_))),
            "{refused:?}"
        );
    }
    nothing_is_left(&bench.client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_other_programs_exclude_them() {
    let bench = Bench::start().await;
    let name = LockName::new(["session", "tenant-a", "thread-1"]).unwrap();
    let pair = bench
        .locks
        .clone()
        .keyed_by(|name| compat::xxh64_pair(["entelix:lock"].into_iter().chain(name.parts())));
    let big = bench
        .locks
        .clone()
        .keyed_by(|_| compat::fnv1a("cas-backend-checker:all"));
    for (locks, key) in [(pair, "-1697821000, 1881947151"), (big, "3005125051256207908")] {
        let plain = async |function: &str| -> bool {
            let call = format!("SELECT {function}({key})");
            bench.client.query_one(&call, &[]).await.unwrap().get(0)
        };
        assert!(plain("pg_try_advisory_lock").await);
        let refused = locks.try_acquire(&request(&name)).await.unwrap_err();
        let contention = refused.contention().unwrap();
        assert_eq!(contention.name, name);
        let session = contention.held.as_ref().unwrap().session.as_ref().unwrap();
        let own: i32 = bench
            .client
            .query_one("SELECT pg_backend_pid()", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(session.backend_pid, own);
        assert!(plain("pg_advisory_unlock").await);

        let shared = take(&locks, &shared(&name)).await;
        assert!(!plain("pg_try_advisory_lock").await);
        assert!(plain("pg_try_advisory_lock_shared").await);
        assert!(plain("pg_advisory_unlock_shared").await);
        give_back(&locks, shared).await;
        let exclusive = take(&locks, &request(&name)).await;
        assert!(!plain("pg_try_advisory_lock_shared").await);
        give_back(&locks, exclusive).await;
        assert!(plain("pg_try_advisory_lock").await);
        assert!(plain("pg_advisory_unlock").await);
    }
    nothing_is_left(&bench.client).await;
}

/// In the same process at once; in another one as soon as it was told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holder_is_named() {
    let bench = Bench::start().await;
    let other = connect(&bench.database).await.session_locks();
    let name = name("named");
    let holder = Holder::new("alice", "PUT /plans/7").with_instance("api-3");
    let guard = take(&bench.locks, &LockRequest::new(name.clone(), holder.clone())).await;
    let pid = bench.holders(&name).await[0];
    for locks in [&bench.locks, &other] {
        eventually("the holder is known", async || {
            let refused = locks.try_acquire(&request(&name)).await.unwrap_err();
            let held = refused
                .contention()
                .unwrap()
                .held
                .clone()
                .expect("somebody has it");
            let session = held.session.as_ref().expect("the server knows its session");
            assert_eq!(session.backend_pid, pid);
            assert_eq!(session.application_name.as_deref(), Some("leasehold"));
            let Some(told) = held.holder else { return false };
            assert_eq!(told, holder);
            assert_eq!(held.lock_id, Some(guard.lock_id()));
            assert_eq!(held.acquired_at, Some(guard.acquired_at()));
            assert_eq!((held.expires_at, held.fencing_token), (None, None));
            true
        })
        .await;
    }
    give_back(&bench.locks, guard).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_has_half_of_the_lock_table_at_most() {
    let start = || {
        Cluster::temporary()
            .set("max_connections", "20")
            .set("max_locks_per_transaction", "10")
            .start()
    };
    let cluster = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
    let options = ConnectOptions::parse(&cluster.url("postgres"), None).unwrap();
    let process = Database::connect(options, 2).await.unwrap();
    let budget = process.findings().lock_budget;
    assert_eq!(budget, 100);
    let locks = process.session_locks();
    let mut guards = Vec::new();
    for number in 0..budget {
        guards.push(take(&locks, &shared(&name(&format!("budget {number}")))).await);
    }
    let one_more = locks.try_acquire(&shared(&name("one more"))).await;
    assert!(
        matches!(one_more, Err(AcquireError::Unavailable(_))),
        "{one_more:?}"
    );
    // Beside another holder of this process it needs nothing of the server.
    give_back(&locks, take(&locks, &shared(&name("budget 0"))).await).await;
    give_back(&locks, guards.pop().unwrap()).await;
    give_back(&locks, take(&locks, &request(&name("one more"))).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_pooler_is_refused() {
    let database = TestDatabase::create().await;
    let pooler = Pooler::start(&database, 2, Next::RoundRobin).await;
    let process = Database::connect(pooler.options(), 2).await.unwrap();
    let locks = process.session_locks();
    let request = request(&name("pooled"));
    for refused in [
        locks.try_acquire(&request).await,
        locks.acquire(&request, PATIENT).await,
    ] {
        let Err(AcquireError::Unavailable(cause)) = refused else {
            panic!("{refused:?}")
        };
        assert!(cause.to_string().contains("transaction pooler"), "{cause}");
    }
}

/// `max_hold` is what ends a session lock, and an extension moves it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extension_moves_the_longest_hold() {
    let bench = Bench::start().await;
    let bounded = |part: &str| {
        request(&name(part))
            .with_ttl(Duration::from_millis(100))
            .with_max_hold(Duration::from_secs(3))
    };
    let extended = take(&bench.locks, &bounded("extended")).await;
    let left = take(&bench.locks, &bounded("left")).await;
    bench
        .locks
        .extend(&extended, Duration::from_secs(60))
        .await
        .unwrap();
    tokio::time::timeout(PATIENT, left.lost())
        .await
        .expect("it is told");
    assert!(left.held_for() >= Duration::from_secs(3));
    assert!(!extended.is_lost());
    give_back(&bench.locks, extended).await;
    nothing_is_left(&bench.client).await;
}

/// The database is away: told at once, and over as soon as it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_without_an_answer_is_unavailable() {
    let bench = Bench::start().await;
    let guard = take(&bench.locks, &request(&name("unanswered"))).await;
    let victim = bench.holders(guard.name()).await[0];
    // The server stops answering, and its session ends while the unlock is under way.
    let stop = Command::new("kill")
        .args(["-STOP", &victim.to_string()])
        .status()
        .await
        .unwrap();
    assert!(stop.success());
    let released = tokio::spawn({
        let locks = bench.locks.clone();
        async move { locks.release(guard).await }
    });
    let released = tokio::time::timeout(PATIENT, released)
        .await
        .expect("it gives up")
        .unwrap();
    assert!(
        matches!(released, Err(ReleaseError::Unavailable(_))),
        "{released:?}"
    );
    let go_on = Command::new("kill")
        .args(["-CONT", &victim.to_string()])
        .status()
        .await
        .unwrap();
    assert!(go_on.success());
    let again = bench
        .locks
        .acquire(&request(&name("unanswered")), PATIENT)
        .await
        .unwrap();
    give_back(&bench.locks, again).await;
}

/// What others are told stays fresh, outlives the connection it was told on, and goes with its hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_is_confirmed_and_taken_back() {
    let bench = Bench::start().await;
    let guard = take(&bench.locks, &request(&name("present"))).await;
    let told = async || -> Vec<(uuid::Uuid, chrono::DateTime<chrono::Utc>)> {
        let rows = "SELECT lock_id, seen_at FROM leasehold.presence";
        let rows = bench.client.query(rows, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let is_told_after = async |time: Option<chrono::DateTime<chrono::Utc>>| {
        eventually("it is told", async || {
            matches!(told().await[..], [(id, seen)] if id == guard.lock_id().as_uuid() && Some(seen) > time)
        })
        .await;
    };
    is_told_after(None).await;
    let first = told().await[0].1;
    is_told_after(Some(first)).await;

    // Whoever takes the lock away believes that it was given up when nobody tells of it any more.
    let note = "CREATE TABLE taken_back (lock_id UUID);
                CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql
                    AS 'BEGIN INSERT INTO taken_back VALUES (OLD.lock_id); RETURN NULL; END';
                CREATE TRIGGER note AFTER DELETE ON leasehold.presence FOR EACH ROW EXECUTE FUNCTION note()";
    bench.client.batch_execute(note).await.unwrap();
    bench.terminate(bench.teller().await).await;
    let before = told().await[0].1;
    is_told_after(Some(before)).await;
    let taken_back = bench.client.query("SELECT FROM taken_back", &[]).await.unwrap();
    assert_eq!(taken_back.len(), 0);
    // Who was silent for a minute, being stopped, is believed to have ended.
    let forget = "DELETE FROM leasehold.presence";
    bench.client.batch_execute(forget).await.unwrap();
    is_told_after(None).await;
    // Its connection breaks again, and before that is noticed there is nothing left to tell.
    let teller = bench.teller().await;
    bench.terminate(teller).await;
    let gone = "SELECT FROM pg_stat_activity WHERE pid = $1";
    eventually("its connection has ended", async || {
        bench.client.query(gone, &[&teller]).await.unwrap().is_empty()
    })
    .await;
    give_back(&bench.locks, guard).await;
    eventually("it is taken back", async || told().await.is_empty()).await;
}
