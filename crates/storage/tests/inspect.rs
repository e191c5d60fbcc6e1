//! Looking at locks of every kind and at who waits for them, and taking session locks away.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold_conformance::this_test_binary;
use leasehold_domain::{
    AcquireError, DistributedLock, ExtendError, Holder, LockGuard, LockMode, LockName, LockRequest, Released,
};
use leasehold_storage::ConnectOptions;
use leasehold_storage::advisory::AdvisoryKey;
use leasehold_storage::{
    Database, HeldView, LeaseColumns, LeaseTable, LockBackend, RowLeaseTable, WaiterView,
};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::{TestDatabase, eventually};

const URL: &str = "LEASEHOLD_CONFORMANCE_DATABASE_URL";
const PATIENT: Duration = Duration::from_secs(60);
const MANY: u32 = 1000;

struct Bench {
    /// Two that share nothing, as processes do.
    one: Database,
    other: Database,
    client: Client,
    database: TestDatabase,
}

impl Bench {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let connect = async || Database::connect(database.options(), 4).await.unwrap();
        Self {
            one: connect().await,
            other: connect().await,
            client: database.client().await,
            database,
        }
    }

    async fn held(&self, tables: &[&LeaseTable]) -> Vec<HeldView> {
        self.other.held_locks(tables, MANY).await.unwrap()
    }

    async fn waiters(&self) -> Vec<WaiterView> {
        self.other.waiters(&[], MANY).await.unwrap()
    }
}

fn name(parts: &[&str]) -> LockName {
    LockName::new(parts).unwrap()
}

fn request(name: &LockName, owner: &str) -> LockRequest {
    let holder = Holder::new(owner, "test").with_instance("here");
    LockRequest::new(name.clone(), holder).with_ttl(PATIENT)
}

fn waiting(lock: Arc<dyn DistributedLock>, request: LockRequest) -> JoinHandle<Option<LockGuard>> {
    tokio::spawn(async move { lock.acquire(&request, PATIENT).await.ok() })
}

async fn plans(client: &Client) -> LeaseTable {
    let table =
        "CREATE TABLE plans (tenant TEXT, number INTEGER, lock_id UUID, lock_operation TEXT, lock_by TEXT,
                     lock_acquired_at TIMESTAMPTZ, lock_expires_at TIMESTAMPTZ,
                     lock_fencing_token BIGINT NOT NULL DEFAULT 0, PRIMARY KEY (tenant, number));
                 INSERT INTO plans VALUES ('grün', 7)";
    client.batch_execute(table).await.unwrap();
    plans_table()
}

fn plans_table() -> LeaseTable {
    RowLeaseTable::new("public", "plans", "plän")
        .key_column("tenant")
        .integer_key_column("number")
        .columns(LeaseColumns::prefixed("lock_"))
        .build()
        .unwrap()
}

/// A lock of some kind as two processes have it.
struct Kind {
    backend: LockBackend,
    here: Arc<dyn DistributedLock>,
    there: Arc<dyn DistributedLock>,
    name: LockName,
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_are_seen_in_one_shape() {
    let bench = Bench::start().await;
    let table = plans(&bench.client).await;
    let kinds = [
        Kind {
            backend: LockBackend::Session,
            here: Arc::new(bench.one.session_locks()),
            there: Arc::new(bench.other.session_locks()),
            name: name(&["seen", "session"]),
        },
        Kind {
            backend: LockBackend::Transaction,
            here: Arc::new(bench.one.transaction_locks()),
            there: Arc::new(bench.other.transaction_locks()),
            name: name(&["seen", "transaction"]),
        },
        Kind {
            backend: LockBackend::Lease,
            here: Arc::new(bench.one.leases()),
            there: Arc::new(bench.other.leases()),
            name: name(&["seen", "lease"]),
        },
        Kind {
            backend: LockBackend::RowLease,
            here: Arc::new(bench.one.row_leases(plans_table())),
            there: Arc::new(bench.other.row_leases(plans_table())),
            name: name(&["plän", "grün", "7"]),
        },
    ];
    let mut guards = Vec::new();
    let mut waits = Vec::new();
    for kind in &kinds {
        let holding = request(&kind.name, "holder");
        guards.push(kind.here.try_acquire(&holding).await.unwrap());
        for contender in [&kind.here, &kind.there] {
            waits.push(waiting(Arc::clone(contender), request(&kind.name, "waiter")));
        }
    }

    let mut held = Vec::new();
    eventually("both waiters of each are told", async || {
        held = bench.held(&[&table]).await;
        held.len() == kinds.len() && held.iter().all(|view| view.waiters == 2)
    })
    .await;
    assert!(held.is_sorted_by_key(|view| view.since), "{held:?}");
    for (Kind { backend, name, .. }, guard) in kinds.iter().zip(&guards) {
        let view = held.iter().find(|view| view.backend == *backend).unwrap();
        assert_eq!(view.name.as_ref(), Some(name));
        assert_eq!(view.mode, LockMode::Exclusive);
        assert_eq!(view.lock_id, Some(guard.lock_id()));
        assert_eq!(view.holder.as_ref().unwrap().owner, "holder");
        assert_eq!(view.since, Some(guard.acquired_at()));
        assert_eq!(view.expires_at, guard.expires_at());
        assert_eq!(view.fencing_token, guard.fencing_token());
        let advisory = matches!(backend, LockBackend::Session | LockBackend::Transaction);
        assert_eq!(view.key, advisory.then(|| AdvisoryKey::of(name)));
        assert_eq!(view.session.is_some(), advisory);
    }

    let waiters = bench.other.waiters(&[&table], MANY).await.unwrap();
    assert_eq!(waiters.len(), 2 * kinds.len(), "{waiters:?}");
    assert!(waiters.is_sorted_by_key(|view| view.since), "{waiters:?}");
    for (guard, Kind { backend, name, .. }) in guards.iter().zip(&kinds) {
        let of_it: Vec<_> = waiters
            .iter()
            .filter(|view| view.name.as_ref() == Some(name))
            .collect();
        assert_eq!(of_it.len(), 2, "{name}");
        for view in of_it {
            assert_eq!(view.backend, *backend);
            assert_eq!(view.holder.as_ref().unwrap().owner, "waiter");
            assert_eq!(view.behind, [guard.lock_id()]);
            assert!(view.since >= Some(guard.acquired_at()), "{view:?}");
            assert_eq!(view.session, None, "a wait has no connection");
        }
    }
    let oldest = bench.other.held_locks(&[&table], 2).await.unwrap();
    assert_eq!(oldest, held[..2]);
    assert_eq!(bench.other.waiters(&[&table], 3).await.unwrap(), waiters[..3]);

    for wait in waits {
        wait.abort();
    }
    eventually("nobody waits any more", async || bench.waiters().await.is_empty()).await;
    drop(guards);
    eventually("nobody holds anything", async || {
        bench.held(&[&table]).await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_share_one_lock() {
    let bench = Bench::start().await;
    let shared = name(&["seen", "shared"]);
    let reading = |owner: &str| request(&shared, owner).with_mode(LockMode::Shared);
    let (here, there) = (bench.one.session_locks(), bench.other.session_locks());
    let a = here.try_acquire(&reading("a")).await.unwrap();
    let b = here.try_acquire(&reading("b")).await.unwrap();
    let c = there.try_acquire(&reading("c")).await.unwrap();
    let writer = waiting(Arc::new(here), request(&shared, "writer"));
    let mut holders = Vec::new();
    eventually("all are told", async || {
        let held = bench.held(&[]).await;
        let told = |view: &HeldView| Some((view.holder.as_ref()?.owner.clone(), view.mode, view.waiters));
        holders = held.iter().filter_map(told).collect();
        holders.len() == 3 && holders.iter().all(|(_, _, waiters)| *waiters == 1)
    })
    .await;
    holders.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    let owners: Vec<&str> = holders.iter().map(|(owner, ..)| owner.as_str()).collect();
    assert_eq!(owners, ["a", "b", "c"]);
    assert!(holders.iter().all(|(_, mode, _)| *mode == LockMode::Shared));
    let waiters = bench.waiters().await;
    let [wait] = waiters.as_slice() else {
        panic!("{waiters:?}");
    };
    assert_eq!(wait.mode, LockMode::Exclusive);
    assert_eq!(
        (wait.behind.len(), wait.behind_sessions.len()),
        (3, 2),
        "{wait:?}"
    );
    drop((a, b, c));
    assert!(writer.await.unwrap().is_some());
}

/// However many locks there are, each is looked at once: the question ends within the time that one may take.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_thousands_of_locks_are_seen_at_once() {
    let bench = Bench::start().await;
    let stranger = bench.database.client().await;
    let many = "SELECT count(pg_advisory_lock(n)) FROM generate_series(1, 10000) AS n";
    stranger.execute(many, &[]).await.unwrap();
    let seen = bench.one.held_locks(&[], 20_000).await.unwrap();
    assert_eq!(seen.len(), 10_000);
    assert_eq!(bench.one.held_locks(&[], 10).await.unwrap().len(), 10);
    let all = "SELECT pg_advisory_unlock_all()";
    stranger.execute(all, &[]).await.unwrap();
}

/// Programs without this library take the same keys, and wait inside the server.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_seen_by_their_keys() {
    let bench = Bench::start().await;
    let ours = name(&["seen", "ours"]);
    let AdvisoryKey::Big(key) = AdvisoryKey::of(&ours) else {
        panic!("names have big keys");
    };
    let guard = bench
        .one
        .session_locks()
        .try_acquire(&request(&ours, "us"))
        .await
        .unwrap();
    let stranger = bench.database.client().await;
    stranger
        .batch_execute("SET application_name = 'stranger'; SELECT pg_advisory_lock(-1, 2)")
        .await
        .unwrap();
    let waits = tokio::spawn(async move {
        stranger
            .batch_execute(&format!("SELECT pg_advisory_lock({key})"))
            .await
            .unwrap();
        stranger
    });
    let mut waiters = Vec::new();
    eventually("the stranger waits, and the lock's name is told", async || {
        waiters = bench.waiters().await;
        waiters
            .iter()
            .any(|view| view.name.is_some() && view.since.is_some())
    })
    .await;
    let [wait] = waiters.as_slice() else {
        panic!("{waiters:?}");
    };
    assert_eq!(
        (wait.name.as_ref(), wait.key),
        (Some(&ours), Some(AdvisoryKey::Big(key)))
    );
    assert_eq!(
        wait.session.as_ref().unwrap().application_name.as_deref(),
        Some("stranger")
    );
    assert_eq!(wait.behind, [guard.lock_id()]);
    assert_eq!(wait.holder, None);

    let held = bench.held(&[]).await;
    let of_ours = held
        .iter()
        .find(|view| view.name.as_ref() == Some(&ours))
        .unwrap();
    assert_eq!(of_ours.waiters, 1);
    let unnamed = held.iter().find(|view| view.name.is_none()).unwrap();
    assert_eq!(unnamed.key, Some(AdvisoryKey::Pair(-1, 2)));
    assert_eq!(unnamed.backend, LockBackend::Session);
    assert_eq!(unnamed.session, wait.session);
    drop(guard);
    waits.await.unwrap();
}

/// What a process told stands there after it was killed, and is believed for ten seconds.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_silent_is_not_believed() {
    let bench = Bench::start().await;
    let insert = "INSERT INTO leasehold.presence (process_id, lock_id, name, mode, scope, operation, locked_by, instance,
                      metadata, acquired_at, seen_at, waits)
                  SELECT gen_random_uuid(), gen_random_uuid(), '|1:a', 'exclusive', 'lease', 'work', 'gone', '', '{}',
                         clock_timestamp(), clock_timestamp() - silent * interval '1 second', true
                  FROM unnest(ARRAY[3, 5.0, 10.1, 60]) AS silent";
    bench.client.batch_execute(insert).await.unwrap();
    assert_eq!(bench.waiters().await.len(), 2);
    let a = name(&["a"]);
    let elsewhere = bench.one.waiting_elsewhere([&a, &name(&["b"])]).await.unwrap();
    assert_eq!(elsewhere.get(&a), Some(&2));
    assert_eq!(elsewhere.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_ended_waits_no_more() {
    let bench = Bench::start().await;
    let busy = name(&["seen", "ended"]);
    let guard = bench.other.leases().try_acquire(&request(&busy, "holder")).await;
    let wait = waiting(Arc::new(bench.one.leases()), request(&busy, "gone"));
    eventually("the wait is seen", async || bench.waiters().await.len() == 1).await;
    wait.abort();
    bench.one.shutdown(PATIENT).await;
    assert_eq!(bench.waiters().await.len(), 0);
    drop(guard);
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_of_this_process_are_not_elsewhere() {
    let bench = Bench::start().await;
    let busy = name(&["seen", "busy"]);
    let (one, other) = (bench.one.leases(), bench.other.leases());
    let guard = one.try_acquire(&request(&busy, "holder")).await.unwrap();
    let waits = [
        waiting(Arc::new(one.clone()), request(&busy, "here")),
        waiting(Arc::new(one), request(&busy, "here")),
        waiting(Arc::new(other), request(&busy, "there")),
    ];
    let elsewhere = async |database: &Database| {
        let counted = database.waiting_elsewhere([&busy]).await.unwrap();
        counted.get(&busy).copied().unwrap_or_default()
    };
    eventually("each sees the other's", async || {
        (elsewhere(&bench.one).await, elsewhere(&bench.other).await) == (1, 2)
    })
    .await;
    for wait in waits {
        wait.abort();
    }
    drop(guard);
}

/// The lock, who took it away, why, the acquisition, and whose it was.
type Record = (LockName, String, String, Option<Uuid>, Option<String>);

/// What `leasehold.lock_audit` has on record: who took what from whom, and why.
async fn audited(client: &Client) -> Vec<Record> {
    let read = "SELECT name, released_by, reason, lock_id, locked_by FROM leasehold.lock_audit ORDER BY id";
    let rows = client.query(read, &[]).await.unwrap();
    rows.into_iter()
        .map(|row| {
            let name = LockName::decode(row.get(0)).unwrap();
            (name, row.get(1), row.get(2), row.get(3), row.get(4))
        })
        .collect()
}

/// The process of the tests about session locks that are taken away.
#[tokio::test]
#[ignore = "a process for tests about locks that are taken away"]
async fn forced_holder() {
    let url = std::env::var(URL).expect("the test sets it");
    let options = ConnectOptions::parse(&url, None).unwrap();
    let process = Database::connect(options, 2).await.unwrap();
    let locks = process.session_locks();
    // In the same lock session, whichever has the first.
    let mut kept = Vec::new();
    for number in 0..KEPT {
        let name = name(&["kept", &number.to_string()]);
        kept.push(locks.try_acquire(&request(&name, "child")).await.unwrap());
    }
    let forced = name(&["forced"]);
    let guard = locks.try_acquire(&request(&forced, "child")).await.unwrap();
    let told = async || {
        let held = process.held_locks(&[], MANY).await.unwrap();
        let owners = held.iter().filter_map(|held| held.holder.as_ref());
        owners.filter(|holder| holder.owner == "child").count()
    };
    eventually("others are told of all", async || told().await == KEPT + 1).await;
    // The server ends a session of which it hears nothing for ten seconds: they begin now.
    for guard in kept.iter().chain([&guard]) {
        locks.extend(guard, PATIENT).await.unwrap();
    }
    // Past the test harness, which captures `println!`.
    writeln!(std::io::stdout(), "\nheld {}", guard.lock_id()).unwrap();
    tokio::time::timeout(PATIENT, guard.lost())
        .await
        .expect("it is told");
    let extended = locks.extend(&guard, PATIENT).await;
    assert!(matches!(extended, Err(ExtendError::Lost)), "{extended:?}");
    let released = locks.release(guard).await;
    assert!(matches!(released, Ok(Released::AlreadyGone)), "{released:?}");
    // The guards of a session are told one after the other.
    let kept = || kept.iter().filter(|guard| !guard.is_lost()).count();
    eventually("each knows whether it is lost", async || told().await == kept()).await;
    let kept = kept();
    writeln!(std::io::stdout(), "\nlost {kept}").unwrap();
}

/// How many other locks it has, in its two sessions.
const KEPT: usize = 4;

/// A process that holds the lock `forced`.
struct Owner {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    lock_id: Uuid,
}

impl Owner {
    async fn start(bench: &Bench) -> Self {
        let mut child = this_test_binary("inspect::forced_holder")
            .env(URL, bench.database.url())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut owner = Self {
            child,
            lines,
            lock_id: Uuid::nil(),
        };
        owner.lock_id = owner.says("held ").await.parse().unwrap();
        owner
    }

    /// Waits for a line that begins so, and answers how it goes on.
    async fn says(&mut self, what: &str) -> String {
        let heard = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("it goes on");
                if let Some(rest) = line.strip_prefix(what) {
                    return rest.to_owned();
                }
            }
        };
        tokio::time::timeout(PATIENT, heard).await.expect("it says so")
    }

    async fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([name, &pid]).status().await.unwrap();
        assert!(sent.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_lock_is_taken_from_another_process() {
    let bench = Bench::start().await;
    let forced = name(&["forced"]);
    let locks = bench.one.session_locks();
    assert_eq!(
        locks.force_release(&forced, "operator", "stuck").await.unwrap(),
        []
    );
    let mut owner = Owner::start(&bench).await;
    let next = waiting(Arc::new(bench.other.session_locks()), request(&forced, "next"));
    let ended = locks.force_release(&forced, "operator", "stuck").await.unwrap();
    let [held] = ended.as_slice() else {
        panic!("{ended:?}");
    };
    assert_eq!(held.lock_id.map(|id| id.as_uuid()), Some(owner.lock_id));
    assert_eq!(held.holder.as_ref().unwrap().owner, "child");
    assert_eq!(
        owner.says("lost ").await,
        KEPT.to_string(),
        "its other locks stay"
    );
    let next = next.await.unwrap().expect("the next one has it");
    assert!(!next.is_lost());
    let record = (
        forced,
        "operator".to_owned(),
        "stuck".to_owned(),
        Some(owner.lock_id),
        Some("child".to_owned()),
    );
    assert_eq!(audited(&bench.client).await, [record]);
    assert!(owner.child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_owner_gives_nothing_up_and_its_session_can_be_ended() {
    let bench = Bench::start().await;
    let forced = name(&["forced"]);
    let locks = bench.one.session_locks();
    let mut owner = Owner::start(&bench).await;
    owner.signal("-STOP").await;
    let start = Instant::now();
    let refused = locks
        .force_release(&forced, "operator", "stuck")
        .await
        .unwrap_err();
    let took = start.elapsed();
    assert!(
        took >= Duration::from_secs(5) && took < Duration::from_secs(8),
        "{took:?}: {refused}"
    );
    let contended = locks.try_acquire(&request(&forced, "next")).await;
    assert!(
        matches!(contended, Err(AcquireError::Contended(_))),
        "{contended:?}"
    );

    let terminated = locks.terminate(&forced, "operator", "still stuck").await.unwrap();
    assert_eq!(terminated.ended.len(), 1, "{terminated:?}");
    assert!(terminated.other_locks <= KEPT, "{terminated:?}");
    let guard = locks
        .try_acquire(&request(&forced, "next"))
        .await
        .expect("it is free");
    let records = audited(&bench.client).await;
    let (first, rest) = records.split_first().unwrap();
    assert_eq!((&first.0, first.2.as_str()), (&forced, "stuck"));
    assert_eq!(rest.len(), 1 + terminated.other_locks, "{rest:?}");
    assert!(
        rest.iter()
            .all(|record| record.2 == "still stuck" && record.4.as_deref() == Some("child"))
    );
    assert!(
        rest.iter()
            .any(|record| record.0 == forced && record.3 == Some(owner.lock_id))
    );

    owner.signal("-CONT").await;
    assert_eq!(
        owner.says("lost ").await,
        (KEPT - terminated.other_locks).to_string()
    );
    assert!(!guard.is_lost());
    assert!(owner.child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_lock_is_taken_from_all_who_share_it() {
    let bench = Bench::start().await;
    let forced = name(&["forced"]);
    let (here, there) = (bench.one.session_locks(), bench.other.session_locks());
    let reading = request(&forced, "reader").with_mode(LockMode::Shared);
    let guards = [
        here.try_acquire(&reading).await.unwrap(),
        here.try_acquire(&reading).await.unwrap(),
        there.try_acquire(&reading).await.unwrap(),
    ];
    let writer = waiting(Arc::new(there.clone()), request(&forced, "writer"));
    // Of the same process as one of them, and of one that holds nothing: at once, before anything is told.
    let ended = here.force_release(&forced, "operator", "stuck").await.unwrap();
    assert_eq!(ended.len(), 3, "{ended:?}");
    for guard in &guards {
        tokio::time::timeout(PATIENT, guard.lost())
            .await
            .expect("it is told");
    }
    assert_eq!(audited(&bench.client).await.len(), 3);
    let writer = writer.await.unwrap().expect("it has it alone");
    assert!(!writer.is_lost());
}

/// A program without this library cannot be asked, and its session can be ended all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_not_asked() {
    let bench = Bench::start().await;
    let forced = name(&["forced"]);
    let AdvisoryKey::Big(key) = AdvisoryKey::of(&forced) else {
        panic!("names have big keys");
    };
    let stranger = bench.database.client().await;
    let lock = format!("SELECT pg_advisory_lock({key}), pg_advisory_lock_shared(5)");
    stranger.batch_execute(&lock).await.unwrap();
    let locks = bench.one.session_locks();
    let refused = locks.force_release(&forced, "operator", "stuck").await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(audited(&bench.client).await, []);
    let terminated = locks.terminate(&forced, "operator", "stuck").await.unwrap();
    assert_eq!(
        (terminated.ended.len(), terminated.other_locks),
        (1, 1),
        "{terminated:?}"
    );
    let record = (
        forced.clone(),
        "operator".to_owned(),
        "stuck".to_owned(),
        None,
        None,
    );
    assert_eq!(audited(&bench.client).await, [record]);
    drop(
        locks
            .try_acquire(&request(&forced, "next"))
            .await
            .expect("it is free"),
    );
}

/// Of a transaction lock of the same name another end is to be made.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_lock_is_no_session_lock() {
    let bench = Bench::start().await;
    let forced = name(&["forced"]);
    let guard = bench
        .one
        .transaction_locks()
        .try_acquire(&request(&forced, "writer"))
        .await
        .unwrap();
    let locks = bench.other.session_locks();
    assert_eq!(
        locks.force_release(&forced, "operator", "stuck").await.unwrap(),
        []
    );
    let terminated = locks.terminate(&forced, "operator", "stuck").await.unwrap();
    assert_eq!(
        (terminated.ended.len(), terminated.other_locks),
        (0, 0),
        "{terminated:?}"
    );
    assert!(!guard.is_lost());
}
