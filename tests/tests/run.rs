//! `leasehold run` and the programs of `examples/`, beside clients of the service and holders in Rust: whoever has a
//! lock, the others do not, and a command ends as it was promised to.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest};
use leasehold_storage::Database;
use leasehold_storage::advisory::AdvisoryKey;
use leasehold_system_tests::http::{delete, get, post};
use leasehold_system_tests::patience::{PATIENCE, eventually, in_time, within};
use leasehold_system_tests::process::state;
use leasehold_system_tests::secrets;
use leasehold_system_tests::service::{command, through};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use crate::world::World;

const LOCK: &str = "/v1/tenants/acme/locks/deploy%2Fprod";
const NAME: [&str; 2] = ["--name", "deploy/prod"];

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("leasehold-run-{}", Uuid::new_v4().simple()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A run whose output is kept. Dropping it kills what is left of it.
struct Running {
    child: Child,
    /// The command that it runs, once it has told its own process id.
    command: Option<Pid>,
    output: PathBuf,
    _folder: Folder,
}

/// `leasehold run` with these arguments.
fn run(world: &World, arguments: &[&str]) -> Command {
    let mut command = command(Some(world.database.url()));
    command.arg("run").args(arguments).env("RUST_LOG", "warn");
    command
}

/// Runs a script under the lock of these tests, with these options.
fn script(world: &World, options: &[&str], script: &str) -> Command {
    let name = if options.contains(&"--name") {
        &[][..]
    } else {
        &NAME
    };
    let arguments = [name, options, &["--", "sh", "-c", script]].concat();
    run(world, &arguments)
}

async fn output(mut command: Command) -> Output {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = in_time("the end of a run", output).await.unwrap();
    for text in [&output.stdout, &output.stderr] {
        secrets::assert_none("what a run says", &String::from_utf8_lossy(text));
    }
    output
}

async fn code(command: Command) -> (Option<i32>, String) {
    let output = output(command).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

impl Running {
    /// Starts a script that must first print its process id, and waits for that.
    async fn start(world: &World, options: &[&str], text: &str) -> Self {
        let folder = Folder::new();
        let path = folder.file("output");
        let file = fs::File::create(&path).unwrap();
        let child = script(world, options, &format!("echo command $$; {text}"))
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        let mut running = Self {
            child,
            command: None,
            output: path,
            _folder: folder,
        };
        eventually("the command runs", async || {
            let output = running.output();
            if let Some(status) = running.child.try_wait().unwrap() {
                panic!("{status}: {output}");
            }
            let mut lines = output.lines();
            let told = lines.find_map(|line| line.strip_prefix("command ")?.parse().ok());
            running.command = told.and_then(Pid::from_raw);
            running.command.is_some()
        })
        .await;
        running
    }

    fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    async fn says(&self, what: &str) {
        eventually(what, async || self.output().contains(what)).await;
    }

    async fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it did not end: {}", self.output());
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn command_runs(&self) -> bool {
        self.command.is_some_and(|pid| test_kill_process(pid).is_ok())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both may have ended.
        drop(self.child.kill());
        drop(self.child.wait());
        if let Some(pid) = self.command {
            _ = kill_process(pid, Signal::KILL);
        }
    }
}

async fn world() -> World {
    World::start("lease").await
}

async fn acquire(world: &World, body: &Value) -> leasehold_system_tests::http::Answer {
    world.api.send(post(format!("{LOCK}/acquire"), body)).await
}

async fn release(world: &World, granted: &Value) {
    let body = json!({"lock_id": granted["lock_id"]});
    let released = world.api.send(post(format!("{LOCK}/release"), &body)).await;
    assert_eq!(released.expect(200).json(), json!({"released": true}));
}

async fn is_free(world: &World) -> bool {
    world.api.send(get(LOCK)).await.status == 404
}

/// A command that is stopped must go on to hear that it is to end.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_command_that_is_stopped() {
    let world = world().await;
    let mut running = Running::start(&world, &[], "kill -STOP $$; echo went on").await;
    let command = running.command.unwrap().as_raw_nonzero();
    eventually("it is stopped", async || state(command) == Some('T')).await;
    running.signal(Signal::TERM);
    assert_eq!(running.ended().await.code(), Some(143));
    assert!(!running.output().contains("went on"));
    assert!(is_free(&world).await);
}

/// As `nohup` starts it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_to_be_ignored_is_ignored() {
    let world = world().await;
    let folder = Folder::new();
    let (begun, end) = (folder.file("begun"), folder.file("end"));
    let wait = "echo > \"$begun\"; until test -e \"$end\"; do sleep 0.02; done; exit 3";
    let mut ran = script(&world, &[], wait);
    ran.env("begun", &begun).env("end", &end);
    let mut nohup = through("trap '' HUP INT; exec \"$@\"", &ran);
    let mut child = nohup.stdin(Stdio::null()).spawn().unwrap();
    eventually("it runs", async || begun.exists()).await;
    for signal in [Signal::HUP, Signal::INT] {
        kill_process(Pid::from_child(&child), signal).unwrap();
    }
    fs::write(&end, "").unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
    assert_eq!(in_time("the end", ended).await.unwrap().code(), Some(3));
    assert!(is_free(&world).await);
}

/// As when the disk of the log is full, or whoever read it has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_when_nobody_takes_what_it_says() {
    let world = world().await;
    let nobody = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut ran = script(&world, &["--ttl", "2s"], "read x; exit $x");
    let mut child = ran.stdin(Stdio::piped()).stderr(nobody).spawn().unwrap();
    let until = async || world.api.send(get(LOCK)).await.json()["expires_at"].clone();
    eventually("it has the lock", async || until().await.is_string()).await;
    world.end_sessions().await;
    for _ in 0..3 {
        let before = until().await;
        eventually("it renews the lock", async || until().await != before).await;
    }
    child.stdin.take().unwrap().write_all(b"3\n").unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
    assert_eq!(in_time("the end", ended).await.unwrap().code(), Some(3));
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_commands() {
    let world = world().await;
    for wanted in [0, 1, 3, 42, 255] {
        let (code, _) = code(script(&world, &[], &format!("exit {wanted}"))).await;
        assert_eq!(code, Some(wanted));
    }
    for (signal, wanted) in [("TERM", 143), ("KILL", 137), ("INT", 130)] {
        let (code, _) = code(script(&world, &[], &format!("kill -{signal} $$"))).await;
        assert_eq!(code, Some(wanted), "{signal}");
    }
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_exit_codes_are_those_of_sysexits_and_shells() {
    let world = world().await;
    let refused = async |arguments: &[&str], wanted: i32, says: &str| {
        let (code, text) = code(run(&world, arguments)).await;
        assert_eq!(code, Some(wanted), "{arguments:?}: {text}");
        assert!(text.contains(says), "{arguments:?}: {text}");
    };
    refused(&["--name", "a"], 64, "COMMAND").await;
    refused(&["--", "true"], 64, "--name").await;
    refused(&["--name", "", "--", "true"], 64, "1 to 256").await;
    refused(&["--name", "a", "--ttl", "soon", "--", "true"], 64, "30s").await;
    refused(&["--name", "a", "--ttl", "1ms", "--", "true"], 64, "--ttl").await;
    refused(
        &["--name", "a", "--max-hold", "1s", "--", "true"],
        64,
        "--max-hold",
    )
    .await;
    refused(
        &["--name", "a", "--tenant", "none", "--", "true"],
        64,
        "no tenant none",
    )
    .await;
    refused(
        &["--name", "a", "--", "/no/such/program"],
        127,
        "/no/such/program",
    )
    .await;
    refused(
        &["--name", "a", "--", "no-such-program-anywhere"],
        127,
        "no-such-program",
    )
    .await;
    let folder = Folder::new();
    let text = folder.file("text");
    fs::write(&text, "no program").unwrap();
    refused(&["--name", "a", "--", text.to_str().unwrap()], 126, "text").await;
    assert_eq!(world.api.send(get("/v1/tenants/acme/locks/a")).await.status, 404);

    // Nobody listens there.
    let mut nowhere = command(Some("postgres://me@127.0.0.1:1/none"));
    nowhere.args(["run", "--name", "a", "--", "true"]);
    assert_eq!(code(nowhere).await.0, Some(69));
    let mut malformed = command(Some("nonsense"));
    malformed.args(["run", "--name", "a", "--", "true"]);
    assert_eq!(code(malformed).await.0, Some(64));

    let other = post("/v1/tenants", &json!({"id": "globex"}));
    world.api.send(other).await.expect(201);
    refused(&["--name", "a", "--", "true"], 64, "--tenant").await;
    refused(&["--name", "a", "--tenant", "globex", "--", "true"], 0, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_gets_the_lock_standard_input_and_a_group_of_its_own() {
    let world = world().await;
    let text = "echo $LEASEHOLD_LOCK_ID $LEASEHOLD_FENCING_TOKEN; cut -d ' ' -f 5 /proc/$$/stat; echo $$; cat; exit 4";
    let mut running = script(&world, &["--tenant", "acme"], text)
        .env("USER", "alice")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = Value::Null;
    eventually("it is held", async || {
        let answer = world.api.send(get(LOCK)).await;
        shown = if answer.status == 200 {
            answer.json()
        } else {
            Value::Null
        };
        !shown.is_null()
    })
    .await;
    let holder = &shown["holder"];
    assert!(holder["owner"].as_str().unwrap().starts_with("alice@"), "{shown}");
    assert_eq!(holder["operation"], "sh");
    let instance = holder["instance"].as_str().unwrap();
    assert!(instance.ends_with(&format!(":{}", running.id())), "{shown}");

    let mut input = running.stdin.take().unwrap();
    input.write_all(b"from far away\n").unwrap();
    drop(input);
    let mut output = String::new();
    running
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(4));
    let lines: Vec<&str> = output.lines().collect();
    let ids = format!(
        "{} {}",
        shown["lock_id"].as_str().unwrap(),
        shown["fencing_token"]
    );
    assert_eq!((lines[0], lines[3]), (&*ids, "from far away"));
    assert_eq!(lines[1], lines[2], "it leads its group");
    assert!(is_free(&world).await, "it is released before the run ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_commands_and_rust_exclude_each_other() {
    let world = world().await;
    let db = Database::connect(world.database.options(), 2).await.unwrap();
    let locks = db.leases();
    let name = LockName::new(["lock", "acme", "deploy/prod"]).unwrap();
    let request = LockRequest::new(name, Holder::new("cron", "nightly"));
    let mut tokens = Vec::new();

    // A client has it.
    let granted = acquire(&world, &json!({"ttl_ms": 60_000}))
        .await
        .expect(200)
        .json();
    tokens.push(granted["fencing_token"].as_i64().unwrap());
    let (refused, text) = code(script(&world, &[], "exit 0")).await;
    assert_eq!(refused, Some(75), "{text}");
    assert!(text.contains("tester"), "it tells the holder: {text}");
    let start = Instant::now();
    let (refused, _) = code(script(&world, &["--wait", "500ms"], "exit 0")).await;
    assert_eq!(refused, Some(75));
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert!(
        locks
            .try_acquire(&request)
            .await
            .unwrap_err()
            .contention()
            .is_some()
    );

    // A command waits for it, and has it next.
    let waiting = script(&world, &["--wait", "30s"], "echo $LEASEHOLD_FENCING_TOKEN");
    let waiting = tokio::spawn(output(waiting));
    release(&world, &granted).await;
    let next = waiting.await.unwrap();
    assert!(next.status.success());
    tokens.push(String::from_utf8(next.stdout).unwrap().trim().parse().unwrap());

    let mut running = Running::start(&world, &[], "echo $LEASEHOLD_FENCING_TOKEN; exec sleep 1000").await;
    running.says("\n1").await;
    let problem = acquire(&world, &json!({"ttl_ms": 60_000}))
        .await
        .expect(409)
        .json();
    assert_eq!(problem["code"], "lock_held");
    assert_eq!(problem["lock"]["operation"], "sh");
    tokens.push(problem["lock"]["fencing_token"].as_i64().unwrap());
    assert!(
        locks
            .try_acquire(&request)
            .await
            .unwrap_err()
            .contention()
            .is_some()
    );
    assert_eq!(code(script(&world, &[], "exit 0")).await.0, Some(75));

    // Rust waits for it, and has it next.
    let waiting = locks.acquire(&request, PATIENCE);
    let (guard, ()) = tokio::join!(waiting, async { running.signal(Signal::TERM) });
    let guard = guard.unwrap();
    assert_eq!(running.ended().await.code(), Some(143));
    tokens.push(guard.fencing_token().unwrap().get());
    assert_eq!(
        acquire(&world, &json!({"ttl_ms": 60_000})).await.code(),
        "lock_held"
    );
    let (refused, text) = code(script(&world, &[], "exit 0")).await;
    assert!(refused == Some(75) && text.contains("cron"), "{text}");

    // A client waits for it, and has it next.
    let body = json!({"ttl_ms": 60_000, "wait_ms": 20_000});
    let waiting = acquire(&world, &body);
    let (granted, released) = tokio::join!(waiting, locks.release(guard));
    released.unwrap();
    tokens.push(granted.expect(200).json()["fencing_token"].as_i64().unwrap());
    assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]), "{tokens:?}");
    db.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_are_the_commands() {
    let world = world().await;
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP")] {
        let text = format!("trap 'exit 7' {name}; echo ready; while :; do sleep 0.02; done");
        let mut running = Running::start(&world, &[], &text).await;
        running.says("ready").await;
        running.signal(signal);
        assert_eq!(running.ended().await.code(), Some(7), "{name}");
        assert!(is_free(&world).await, "{name}");
    }

    // One that does not care is waited for.
    let folder = Folder::new();
    let go = folder.file("go");
    let text = format!(
        "trap '' TERM; echo ready; while ! test -e '{}'; do sleep 0.02; done; exit 5",
        go.display()
    );
    let mut running = Running::start(&world, &[], &text).await;
    running.says("ready").await;
    running.signal(Signal::TERM);
    assert_eq!(
        acquire(&world, &json!({"ttl_ms": 1_000})).await.code(),
        "lock_held"
    );
    assert!(running.child.try_wait().unwrap().is_none());
    fs::write(go, "").unwrap();
    assert_eq!(running.ended().await.code(), Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_the_wait() {
    let world = world().await;
    let granted = acquire(&world, &json!({"ttl_ms": 600_000}))
        .await
        .expect(200)
        .json();
    let mut waiting = script(&world, &["--wait", "10m"], "exit 0")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let AdvisoryKey::Big(key) = AdvisoryKey::of(&LockName::new(["lock", "acme", "deploy/prod"]).unwrap())
    else {
        unreachable!("names have big keys")
    };
    eventually("it waits", async || {
        // It says so for this name, and then only listens.
        let said = format!("NOTIFY leasehold_wait, '{key}'");
        let sql = "SELECT FROM pg_stat_activity
                   WHERE datname = current_database() AND strpos(query, $1) > 0 AND pid <> pg_backend_pid()";
        !world.client.query(sql, &[&said]).await.unwrap().is_empty()
    })
    .await;
    kill_process(Pid::from_child(&waiting), Signal::INT).unwrap();
    let status = in_time(
        "its end",
        tokio::task::spawn_blocking(move || waiting.wait().unwrap()),
    )
    .await;
    assert_eq!(status.unwrap().code(), Some(130));
    release(&world, &granted).await;
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_lock_is_taken_away_is_stopped() {
    let world = world().await;
    let mut running = Running::start(&world, &["--ttl", "5s"], "echo ready; exec sleep 1000").await;
    running.says("ready").await;
    let before = acquire(&world, &json!({"ttl_ms": 1_000})).await.json()["lock"]["fencing_token"].clone();
    let ended = world
        .api
        .send(delete(format!("{LOCK}?reason=stuck")))
        .await
        .expect(200)
        .json();
    assert_eq!(ended["fencing_token"], before);
    assert_eq!(running.ended().await.code(), Some(70), "{}", running.output());
    assert!(!running.command_runs());
    assert!(running.output().contains("lost"), "{}", running.output());
    let next = acquire(&world, &json!({"ttl_ms": 1_000}))
        .await
        .expect(200)
        .json();
    assert!(next["fencing_token"].as_i64() > before.as_i64());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_does_not_stop_is_killed_with_all_it_has_started() {
    let world = world().await;
    let text = "trap '' TERM; sleep 1000 & echo child $! ready; while :; do sleep 0.1; done";
    let mut running = Running::start(&world, &["--ttl", "5s"], text).await;
    running.says("ready").await;
    let output = running.output();
    let child = output
        .split("child ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap();
    let child = Pid::from_raw(child.parse().unwrap()).unwrap();
    world
        .api
        .send(delete(format!("{LOCK}?reason=stuck")))
        .await
        .expect(200);
    assert_eq!(running.ended().await.code(), Some(70), "{}", running.output());
    assert!(!running.command_runs());
    // Who has lost its parent is buried by somebody else.
    let child = child.as_raw_nonzero();
    eventually("its child has ended", async || {
        matches!(state(child), None | Some('Z'))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_takes_too_long_is_stopped() {
    let world = world().await;
    let options = ["--ttl", "500ms", "--max-hold", "1s"];
    let mut running = Running::start(&world, &options, "exec sleep 1000").await;
    assert_eq!(running.ended().await.code(), Some(70), "{}", running.output());
    assert!(running.output().contains("--max-hold"), "{}", running.output());
    assert!(!running.command_runs());
    within(Duration::from_secs(2), "it is free", async || {
        is_free(&world).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_killed_frees_the_lock_within_its_ttl() {
    let world = world().await;
    let mut running = Running::start(&world, &["--ttl", "2s"], "exec sleep 1000").await;
    running.signal(Signal::KILL);
    let killed = Instant::now();
    running.ended().await;
    let body = json!({"ttl_ms": 1_000, "wait_ms": 20_000});
    acquire(&world, &body).await.expect(200);
    let took = killed.elapsed();
    assert!(took < crate::world::grace(Duration::from_secs(2)), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_are_listed_shown_and_taken_away() {
    let world = world().await;
    let locks = |arguments: &[&str]| locks(&world, arguments);
    let json_of = async |arguments: &[&str]| json_of(&world, arguments).await;
    // The service itself has locks as well.
    let leases = async || -> Vec<Value> {
        let Value::Array(mut items) = json_of(&["list", "--json"]).await else {
            panic!("a list");
        };
        items.retain(|item| item["backend"] != "session" && item["backend"] != "transaction");
        items
    };
    assert_eq!(leases().await, [] as [Value; 0]);

    let held = world.hold().await;
    let granted = acquire(&world, &json!({"ttl_ms": 60_000, "operation": "deploy"})).await;
    let granted = granted.expect(200).json();
    let mut running = Running::start(&world, &["--name", "other"], "exec sleep 1000").await;

    let listed = leases().await;
    let names: Vec<&str> = listed.iter().map(|item| item["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["workspace/acme/main", "lock/acme/deploy/prod", "lock/acme/other"]
    );
    let members = [
        "name",
        "mode",
        "backend",
        "lock_id",
        "holder",
        "acquired_at",
        "expires_at",
        "fencing_token",
        "waiters",
    ];
    for item in &listed {
        assert!(members.iter().all(|member| item.get(member).is_some()), "{item}");
    }
    assert_eq!(json_of(&["list", "--json", "--tenant", "none"]).await, json!([]));
    let text = String::from_utf8(output(locks(&["list", "--tenant", "acme"])).await.stdout).unwrap();
    assert!(
        text.lines().count() == 4 && text.starts_with("name ") && text.contains("tester (deploy)"),
        "{text}"
    );

    for name in ["deploy/prod", "lock/acme/deploy/prod"] {
        let shown = json_of(&["show", name, "--json"]).await;
        assert_eq!(shown["lock_id"], granted["lock_id"]);
        assert_eq!(shown["holder"]["owner"], "tester");
    }
    let (none, text) = code(locks(&["show", "nothing"])).await;
    assert!(none == Some(1) && text.contains("nobody holds nothing"), "{text}");
    assert_eq!(
        code(locks(&["release", "deploy/prod"])).await.0,
        Some(64),
        "a reason is needed"
    );
    let ended = json_of(&["release", "deploy/prod", "--reason", "stuck", "--json"]).await;
    assert_eq!(ended["lock_id"], granted["lock_id"]);
    assert!(is_free(&world).await);
    let audit = "SELECT released_by, reason FROM leasehold.lock_audit";
    let row = world.client.query_one(audit, &[]).await.unwrap();
    assert!(row.get::<_, &str>(0).starts_with("bob@"));
    assert_eq!(row.get::<_, &str>(1), "stuck");

    running.signal(Signal::TERM);
    running.ended().await;
    held.go_on().await.expect(200);
}

/// `leasehold locks` with these arguments.
fn locks(world: &World, arguments: &[&str]) -> Command {
    let mut command = command(Some(world.database.url()));
    command
        .arg("locks")
        .args(arguments)
        .env("USER", "bob")
        .env("RUST_LOG", "warn");
    command
}

async fn json_of(world: &World, arguments: &[&str]) -> Value {
    let output = output(locks(world, arguments)).await;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_every_kind_are_listed_with_those_who_wait() {
    let world = world().await;
    let (second, second_api) = world.another(|service| service).await;
    let connect = async || Database::connect(world.database.options(), 4).await.unwrap();
    let (one, other) = (connect().await, connect().await);
    let request = |part: &str, owner: &str| {
        let name = LockName::new(["nightly", part]).unwrap();
        LockRequest::new(name, Holder::new(owner, "report"))
    };
    let (sessions, transactions) = (one.session_locks(), one.transaction_locks());
    let session = sessions.try_acquire(&request("session", "alice")).await.unwrap();
    let kept = sessions.try_acquire(&request("kept", "alice")).await.unwrap();
    let transaction = transactions
        .try_acquire(&request("transaction", "alice"))
        .await
        .unwrap();
    let granted = acquire(&world, &json!({"ttl_ms": 600_000, "operation": "deploy"})).await;
    granted.expect(200);
    let held = world.hold().await;

    let mut waits = Vec::new();
    for part in ["session", "transaction"] {
        let (other, request) = (other.clone(), request(part, "carol"));
        waits.push(tokio::spawn(async move {
            let guard = match request.name().parts().nth(1) {
                Some("session") => other.session_locks().acquire(&request, PATIENCE).await,
                _ => other.transaction_locks().acquire(&request, PATIENCE).await,
            };
            drop(guard.unwrap());
        }));
    }
    let body = json!({"ttl_ms": 1_000, "wait_ms": 25_000});
    let mut calls = vec![(
        world.api.clone(),
        crate::world::put_key("a", 1).header("prefer", "wait=25"),
    )];
    for api in [&world.api, &second_api] {
        calls.push((api.clone(), post(format!("{LOCK}/acquire"), &body)));
    }
    for (api, call) in calls {
        waits.push(tokio::spawn(async move {
            drop(api.try_send(call).await);
        }));
    }

    let wanted = [
        ("nightly/session", "session", "alice", 1),
        ("nightly/transaction", "transaction", "alice", 1),
        ("lock/acme/deploy/prod", "lease", "tester", 2),
        ("workspace/acme/main", "row_lease", "tester", 1),
    ];
    let mut listed = Value::Null;
    eventually("all are listed, and who waits for them", async || {
        listed = json_of(&world, &["list", "--json"]).await;
        wanted.iter().all(|(name, _, _, waiters)| {
            let items = listed.as_array().unwrap();
            let of_it = |item: &&Value| item["name"] == *name && item["holder"].is_object();
            items
                .iter()
                .find(of_it)
                .is_some_and(|item| item["waiters"] == *waiters)
        })
    })
    .await;
    for (name, backend, owner, _) in wanted {
        let items = listed.as_array().unwrap();
        let item = items.iter().find(|item| item["name"] == name).unwrap();
        assert_eq!(item["backend"], backend, "{item}");
        assert_eq!(item["mode"], "exclusive", "{item}");
        assert_eq!(item["holder"]["owner"], owner, "{item}");
        assert!(
            item["acquired_at"].is_string() && item["lock_id"].is_string(),
            "{item}"
        );
        let is_lease = backend.ends_with("lease");
        assert_eq!(item["expires_at"].is_string(), is_lease, "{item}");
        assert_eq!(item["session"].is_object(), !is_lease, "{item}");
    }
    let text = String::from_utf8(output(locks(&world, &["list"])).await.stdout).unwrap();
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
    assert!(line("nightly/session").contains("alice (report)"), "{text}");
    assert!(line("workspace/acme/main").contains("  in "), "{text}");
    // A client is told of its tenant's locks alone, and of all who wait for them.
    for api in [&world.api, &second_api] {
        let page = api.send(get("/v1/tenants/acme/locks")).await.expect(200).json();
        assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");
        assert_eq!(page["items"][0]["waiters"], 2, "{page}");
    }

    let ended = json_of(
        &world,
        &["release", "nightly/session", "--reason", "stuck", "--json"],
    )
    .await;
    assert_eq!(ended["lock_id"], session.lock_id().to_string());
    in_time("the guard is lost", session.lost()).await;
    assert!(
        !kept.is_lost(),
        "of the same process, and perhaps the same session"
    );
    let audit = "SELECT locked_by, released_by, reason FROM leasehold.lock_audit";
    let row = world.client.query_one(audit, &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(2)), ("alice", "stuck"));
    assert!(row.get::<_, &str>(1).starts_with("bob@"));
    in_time("the next one has it", waits.remove(0)).await.unwrap();

    eventually("the other lock is told", async || {
        code(locks(&world, &["show", "nightly/kept"])).await.0 == Some(0)
    })
    .await;
    let release = ["release", "nightly/kept", "--reason", "stuck", "--terminate"];
    let (status, text) = code(locks(&world, &release)).await;
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("sessions that ended with it: 0"), "{text}");
    in_time("the guard is lost", kept.lost()).await;
    let (status, text) = code(locks(
        &world,
        &["release", "nightly/transaction", "--reason", "stuck"],
    ))
    .await;
    assert_eq!(status, Some(0), "{text}");
    in_time("the guard is lost", transaction.lost()).await;

    held.go_on().await.expect(200);
    for wait in waits {
        wait.abort();
    }
    drop(second);
}

/// Of a lock that some other program has taken the server knows a number.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_without_a_name_is_shown_by_its_number() {
    let world = world().await;
    let sql = "SELECT pg_advisory_lock(4200000000), pg_advisory_lock_shared(4, 2), pg_backend_pid()";
    let pid: i32 = world.client.query_one(sql, &[]).await.unwrap().get(2);
    for (number, mode) in [("4200000000", "exclusive"), ("4,2", "shared")] {
        let called = format!("(key {number})");
        let list = output(locks(&world, &["list"])).await.stdout;
        let list = String::from_utf8(list).unwrap();
        assert!(list.lines().any(|line| line.starts_with(&called)), "{list}");
        let shown = json_of(&world, &["show", &called, "--json"]).await;
        assert_eq!((&shown["key"], &shown["name"]), (&json!(number), &Value::Null));
        assert_eq!(shown["mode"], mode);
        assert_eq!(shown["session"]["pid"], pid);
        let (status, text) = code(locks(&world, &["release", &called, "--reason", "stuck"])).await;
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains(&format!("pg_terminate_backend({pid})")), "{text}");
    }
}

/// Reads `n token` lines, which must be in the order of both.
fn in_order(lines: impl IntoIterator<Item = String>) -> usize {
    let mut done: Vec<(u64, i64)> = lines
        .into_iter()
        .map(|line| {
            let (number, token) = line.trim().split_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            (number.parse().unwrap(), token.parse().unwrap())
        })
        .collect();
    done.sort_unstable();
    assert!(
        done.windows(2)
            .all(|pair| pair[0].0 + 1 == pair[1].0 && pair[0].1 < pair[1].1),
        "{done:?}"
    );
    done.len()
}

/// As `counting`, by a holder in this process.
async fn counting_in_rust(db: Database, file: PathBuf) -> String {
    let name = LockName::new(["lock", "acme", "examples/counter"]).unwrap();
    let request = LockRequest::new(name, Holder::new("cron", "counting"));
    let locks = db.leases();
    let guard = locks.acquire(&request, PATIENCE).await.unwrap();
    let token = guard.fencing_token().unwrap().get();
    let number: u64 = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    sleep(Duration::from_millis(50)).await;
    fs::write(&file, format!("{}\n", number + 1)).unwrap();
    locks.release(guard).await.unwrap();
    format!("{} {token}", number + 1)
}

fn counting(world: &World, file: &Path) -> Command {
    let text = "n=$(cat \"$1\"); echo $((n + 1)) > \"$1\"; echo $((n + 1)) $LEASEHOLD_FENCING_TOKEN";
    let mut command = run(
        world,
        &[
            "--name",
            "examples/counter",
            "--wait",
            "2m",
            "--",
            "sh",
            "-c",
            text,
            "sh",
        ],
    );
    command.arg(file);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_two_hundred_runs_lose_no_update() {
    const RUNS: usize = 200;
    const AT_ONCE: usize = 10;
    let world = world().await;
    let folder = Folder::new();
    let file = folder.file("counter");
    fs::write(&file, "0\n").unwrap();
    let workers: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let commands: Vec<Command> = (0..RUNS / AT_ONCE).map(|_| counting(&world, &file)).collect();
            tokio::task::spawn_blocking(move || {
                let outputs = commands.into_iter().map(|mut command| command.output().unwrap());
                outputs.collect::<Vec<_>>()
            })
        })
        .collect();
    let mut lines = Vec::new();
    for worker in workers {
        for output in worker.await.unwrap() {
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            lines.push(String::from_utf8(output.stdout).unwrap());
        }
    }
    assert_eq!(in_order(lines), RUNS);
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), RUNS.to_string());
}

/// Whether this machine has the program; says so when it has not.
fn there_is(program: &str) -> bool {
    let there = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !there {
        eprintln!("there is no {program} here: its example is not tested");
    }
    there
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_in_other_languages_commands_and_rust_exclude_each_other() {
    const EACH: usize = 5;
    let world = world().await;
    let folder = Folder::new();
    let file = folder.file("counter");
    fs::write(&file, "0\n").unwrap();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let example = |interpreter: &str, name: &str| {
        let mut command = Command::new(interpreter);
        command
            .arg(examples.join(name))
            .arg(&file)
            .env("LEASEHOLD_URL", format!("http://{}", world.service.address()))
            .env("LEASEHOLD_KEY", world.api.key.as_deref().unwrap())
            .env("LEASEHOLD_TENANT", "acme")
            .env("no_proxy", "*")
            .stdin(Stdio::null());
        command
    };
    let mut commands = Vec::new();
    for _ in 0..EACH {
        commands.push(counting(&world, &file));
    }
    if there_is("python3") {
        commands.extend((0..EACH).map(|_| example("python3", "lock.py")));
    }
    if there_is("curl") {
        commands.extend((0..EACH).map(|_| example("sh", "lock.sh")));
    }
    let all = commands.len() + EACH;
    let db = Database::connect(world.database.options(), 2).await.unwrap();
    let holders: Vec<_> = (0..EACH)
        .map(|_| tokio::spawn(counting_in_rust(db.clone(), file.clone())))
        .collect();
    let running: Vec<_> = commands
        .into_iter()
        .map(|command| tokio::spawn(output(command)))
        .collect();
    let mut lines = Vec::new();
    for output in running {
        let output = output.await.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        lines.push(String::from_utf8(output.stdout).unwrap());
    }
    for holder in holders {
        lines.push(in_time("its turn", holder).await.unwrap());
    }
    assert_eq!(in_order(lines), all);
    let free = "/v1/tenants/acme/locks/examples%2Fcounter";
    assert_eq!(world.api.send(get(free)).await.status, 404, "all have let go");
}
