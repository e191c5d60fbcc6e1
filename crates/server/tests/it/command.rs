//! The `leasehold` command, as a process.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::workspace_lock_name;
use leasehold_storage::advisory::AdvisoryKey;
use serde_json::Value;

use crate::support::{Api, MAIN, client, database, empty_database, eventually};

const VARIABLES: [&str; 17] = [
    "DATABASE_URL",
    "DATABASE_TLS",
    "DATABASE_POOL_SIZE",
    "LISTEN_ADDR",
    "WORKSPACE_LOCK_MODE",
    "WORKSPACE_LOCK_DEFAULT_TTL_MS",
    "WORKSPACE_LOCK_BATCH_TTL_MS",
    "WORKSPACE_LOCK_LEASE_MS",
    "LOCK_MAX_WAIT_MS",
    "LOCK_MAX_WAITERS",
    "LOCK_MAX_WAITERS_PER_TENANT",
    "LEASE_RETENTION_DAYS",
    "TENANT_PURGE_LOCK_TIMEOUT_SECONDS",
    "WEBHOOK_ALLOW_PRIVATE",
    "SHUTDOWN_GRACE_SECONDS",
    "LOG_FORMAT",
    "RUST_LOG",
];

/// The command with nothing from this environment that would change what it does.
fn leasehold(args: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
    for variable in VARIABLES {
        command.env_remove(variable);
    }
    command
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str], variables: &[(&str, &str)]) -> Output {
    leasehold(args, variables).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_value_that_cannot_be_right_stops_the_start() {
    type Refusal<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let refusals: &[Refusal<'_>] = &[
        (
            &[("LISTEN_ADDR", "8080")],
            &["LISTEN_ADDR", "8080", "127.0.0.1:8080"],
        ),
        (
            &[("LISTEN_ADDR", "localhost:8080")],
            &["LISTEN_ADDR", "localhost:8080", "IP address"],
        ),
        (
            &[("WORKSPACE_LOCK_MODE", "leases")],
            &["WORKSPACE_LOCK_MODE", "leases", "lease, advisory"],
        ),
        (
            &[("WORKSPACE_LOCK_LEASE_MS", "99")],
            &["WORKSPACE_LOCK_LEASE_MS", "99", "100 to 86400000"],
        ),
        (
            &[("WORKSPACE_LOCK_LEASE_MS", "10s")],
            &["WORKSPACE_LOCK_LEASE_MS", "10s", "100 to 86400000"],
        ),
        (
            &[("WORKSPACE_LOCK_BATCH_TTL_MS", "86400001")],
            &["WORKSPACE_LOCK_BATCH_TTL_MS", "86400001", "86400000"],
        ),
        (
            &[("WORKSPACE_LOCK_DEFAULT_TTL_MS", "-1")],
            &["WORKSPACE_LOCK_DEFAULT_TTL_MS", "-1", "100 to 86400000"],
        ),
        (
            &[("WORKSPACE_LOCK_LEASE_MS", "60001")],
            &[
                "WORKSPACE_LOCK_LEASE_MS",
                "60001",
                "at most WORKSPACE_LOCK_DEFAULT_TTL_MS",
                "60000",
            ],
        ),
        (
            &[("WORKSPACE_LOCK_BATCH_TTL_MS", "59999")],
            &[
                "WORKSPACE_LOCK_DEFAULT_TTL_MS",
                "60000",
                "at most WORKSPACE_LOCK_BATCH_TTL_MS",
                "59999",
            ],
        ),
        (
            &[("LOCK_MAX_WAIT_MS", "3600001")],
            &["LOCK_MAX_WAIT_MS", "3600001", "0 to 3600000"],
        ),
        (
            &[("LOCK_MAX_WAITERS", "many")],
            &["LOCK_MAX_WAITERS", "many", "0 to 1000000"],
        ),
        (
            &[("LOCK_MAX_WAITERS_PER_TENANT", "")],
            &["LOCK_MAX_WAITERS_PER_TENANT", "0 to 1000000"],
        ),
        (
            &[("WEBHOOK_ALLOW_PRIVATE", "yes")],
            &["WEBHOOK_ALLOW_PRIVATE", "yes", "true or false"],
        ),
        (
            &[("LEASE_RETENTION_DAYS", "0")],
            &["LEASE_RETENTION_DAYS", "0", "1 to 3650"],
        ),
        (
            &[("TENANT_PURGE_LOCK_TIMEOUT_SECONDS", "0")],
            &["TENANT_PURGE_LOCK_TIMEOUT_SECONDS", "0", "1 to 3600"],
        ),
        (
            &[("TENANT_PURGE_LOCK_TIMEOUT_SECONDS", "-5")],
            &["TENANT_PURGE_LOCK_TIMEOUT_SECONDS", "-5", "1 to 3600"],
        ),
        (
            &[("TENANT_PURGE_LOCK_TIMEOUT_SECONDS", "99999999999999999999")],
            &[
                "TENANT_PURGE_LOCK_TIMEOUT_SECONDS",
                "99999999999999999999",
                "1 to 3600",
            ],
        ),
        (
            &[("DATABASE_POOL_SIZE", "1")],
            &["DATABASE_POOL_SIZE", "1", "2 to 500"],
        ),
        (
            &[("DATABASE_POOL_SIZE", "501")],
            &["DATABASE_POOL_SIZE", "501", "2 to 500"],
        ),
        (
            &[("DATABASE_TLS", "prefer")],
            &["DATABASE_TLS", "prefer", "disable, require, verify-full"],
        ),
        (
            &[("SHUTDOWN_GRACE_SECONDS", "1.5")],
            &["SHUTDOWN_GRACE_SECONDS", "1.5", "0 to 3600"],
        ),
        (&[("LOG_FORMAT", "xml")], &["LOG_FORMAT", "xml", "text, json"]),
        (&[("RUST_LOG", "a=b=c")], &["RUST_LOG", "a=b=c", "info"]),
    ];
    for (variables, said) in refusals {
        let output = run(&["serve"], variables);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{variables:?}: {error}");
        for word in *said {
            assert!(error.contains(word), "{variables:?}: {word} is not in {error}");
        }
    }
    // The same as flags.
    let output = run(&["--database-pool-size", "1"], &[]);
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("DATABASE_POOL_SIZE"));
}

#[test]
fn a_connection_string_is_never_repeated() {
    for (url, said) in [
        ("", "DATABASE_URL is empty"),
        ("postgres://u:s3cret@h:port/db", "DATABASE_URL"),
        ("s3cret", "DATABASE_URL"),
    ] {
        let output = run(&["serve"], &[("DATABASE_URL", url)]);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.contains(said) && error.contains("postgres://user@host"),
            "{error}"
        );
        assert!(!error.contains("s3cret"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_is_made_when_it_is_asked_for() {
    let url = empty_database().await;
    let of = |args: &[&str]| run(args, &[("DATABASE_URL", &url)]);
    let refused = of(&["serve", "--listen-addr", "127.0.0.1:0"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("leasehold migrate"),
        "{}",
        text(&refused.stderr)
    );

    let printed = text(&of(&["migrate", "--print"]).stdout);
    assert!(printed.contains("CREATE TABLE workspaces") && printed.contains("CREATE TABLE leasehold.leases"));
    assert!(of(&["migrate"]).status.success());
    assert!(
        of(&["migrate"]).status.success(),
        "a second time there is nothing to do"
    );
    assert_eq!(text(&of(&["migrate", "--print"]).stdout), "");

    let schema = text(&of(&["schema"]).stdout);
    assert!(
        schema.contains("table public.workspaces") && schema.contains("table leasehold.leases"),
        "{schema}"
    );
    assert_eq!(text(&of(&["schema"]).stdout), schema, "the same each time");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_listed_and_revoked() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let of = |args: &[&str]| run(args, &[("DATABASE_URL", &api.url)]);
    let created = of(&[
        "keys",
        "create",
        "--subject",
        "ops",
        "--role",
        "reader",
        "--tenant",
        "acme",
        "--expires",
        "90days",
    ]);
    let key = text(&created.stdout);
    assert!(created.status.success(), "{}", text(&created.stderr));
    assert!(key.starts_with("lh_") && key.lines().count() == 1, "{key}");
    let with_key = api.with_key(key.trim());
    with_key.get(MAIN).await.is(200);
    with_key.get("/v1/tenants/globex").await.problem(404, "not_found");

    let listed: Value = serde_json::from_slice(&of(&["keys", "list", "--json"]).stdout).unwrap();
    let ops = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|listed| listed["subject"] == "ops")
        .unwrap();
    assert_eq!(
        (&ops["role"], &ops["tenant_id"], &ops["expired"]),
        (&"reader".into(), &"acme".into(), &false.into())
    );
    let shown = text(&of(&["keys", "list"]).stdout);
    assert!(shown.contains("ops") && !shown.contains(key.trim()), "{shown}");

    let id = ops["id"].as_str().unwrap();
    assert!(of(&["keys", "revoke", id]).status.success());
    with_key.get(MAIN).await.problem(401, "unauthenticated");
    assert_eq!(of(&["keys", "revoke", id]).status.code(), Some(1));

    let nowhere = of(&[
        "keys",
        "create",
        "--subject",
        "x",
        "--role",
        "reader",
        "--tenant",
        "none",
    ]);
    assert!(
        text(&nowhere.stderr).contains("there is no tenant none"),
        "{}",
        text(&nowhere.stderr)
    );
    for bad in [
        ["--subject", "", "--role", "reader"],
        ["--subject", "x", "--role", "owner"],
    ] {
        let args: Vec<&str> = ["keys", "create"].into_iter().chain(bad).collect();
        assert_eq!(of(&args).status.code(), Some(64));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_instances_use_the_same_kind_of_lock() {
    let url = database().await;
    let database = [("DATABASE_URL", url.as_str()), ("LISTEN_ADDR", "127.0.0.1:0")];
    let first = Serving::start(&["serve"], &database, Path::new("."));
    let other = run(&["serve", "--workspace-lock-mode", "advisory"], &database);
    let error = text(&other.stderr);
    assert_eq!(other.status.code(), Some(1), "{error}");
    assert!(
        error.contains("used with lease") && error.contains("--workspace-lock-mode advisory"),
        "{error}"
    );

    let change = || run(&["migrate", "--workspace-lock-mode", "advisory"], &database);
    let refused = change();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("an instance of the service is running"),
        "{}",
        text(&refused.stderr)
    );
    first.stop();
    let changed = change();
    assert!(changed.status.success(), "{}", text(&changed.stderr));
    let other = Serving::start(
        &["serve", "--workspace-lock-mode", "advisory"],
        &database,
        Path::new("."),
    );
    other.stop();
    assert_eq!(run(&["serve"], &database).status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_ends_what_it_has_begun() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let key = api.new_key("w", Role::Writer, None).await;
    let guard = api.hold("acme", "main").await;
    let serving = Serving::start(
        &["serve"],
        &[("DATABASE_URL", &api.url), ("LISTEN_ADDR", "127.0.0.1:0")],
        Path::new("."),
    );
    let address = serving.address.clone();
    let path = format!("{MAIN}/default-config/a");
    let waiting = std::thread::spawn(move || {
        request(
            &address,
            "PUT",
            &path,
            &key,
            "Prefer: wait=20\r\n",
            "{\"value\":1}",
        )
    });
    eventually("the request waits", async || {
        // What the service last said on its listening connection: a waiter makes itself known, for this name.
        let AdvisoryKey::Big(key) = AdvisoryKey::of(&workspace_lock_name("acme", "main").unwrap()) else {
            unreachable!("names have big keys")
        };
        let said = format!("NOTIFY leasehold_wait, '{key}'");
        let waits = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND strpos(query, $1) > 0 AND pid <> pg_backend_pid()";
        let row = api.client().await.query_one(waits, &[&said]).await.unwrap();
        row.get::<_, i64>(0) > 0
    })
    .await;
    serving.signal("INT");
    api.release(guard).await;
    let (status, body) = waiting.join().unwrap();
    assert_eq!((status, body["version"].as_i64()), (200, Some(1)), "{body:#}");
    assert!(serving.ended().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_answers_are_deleted_when_they_are_a_day_old() {
    let url = database().await;
    let client = client(&url).await;
    // More than go at once.
    let stored = "INSERT INTO idempotency_keys (credential, key, fingerprint, status, answer, created_at)
                  SELECT gen_random_uuid(), n::text, '', 200, '', clock_timestamp() - n * interval '1 minute'
                  FROM generate_series(1, 5000) AS n";
    client.batch_execute(stored).await.unwrap();
    let variables = [("DATABASE_URL", &*url), ("LISTEN_ADDR", "127.0.0.1:0")];
    let _serving = Serving::start(&["serve"], &variables, Path::new("."));
    eventually("the old ones are gone", async || {
        let count =
            "SELECT count(*), count(*) FILTER (WHERE created_at > clock_timestamp() - interval '23 hours')
                     FROM idempotency_keys";
        let row = client.query_one(count, &[]).await.unwrap();
        let (all, fresh): (i64, i64) = (row.get(0), row.get(1));
        assert!(fresh >= 23 * 60 - 2, "{fresh}");
        all <= 24 * 60
    })
    .await;
}

/// Also as the superuser, who may not run Postgres: then an unprivileged user does.
#[test]
fn the_first_minute_and_the_second_start() {
    let folder = tempfile::tempdir().unwrap();
    // The unprivileged user must be able to enter it.
    let mut open = std::fs::metadata(folder.path()).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let variables = [("LISTEN_ADDR", "127.0.0.1:0")];

    let first = Serving::start(&[], &variables, folder.path());
    let key = first
        .said
        .split_whitespace()
        .find(|word| word.starts_with("lh_"))
        .unwrap()
        .to_owned();
    let curls: Vec<_> = first
        .said
        .lines()
        .filter(|line| line.contains("curl -X PUT"))
        .collect();
    assert_eq!(curls.len(), 2, "{}", first.said);
    let write = |serving: &Serving, workspace: &str, value: &str| {
        let path = format!("/v1/tenants/demo/workspaces/{workspace}/default-config/color");
        assert!(serving.said.contains(&path));
        request(
            &serving.address,
            "PUT",
            &path,
            &key,
            "",
            &format!("{{\"value\":\"{value}\"}}"),
        )
    };
    let (status, body) = write(&first, "main", "blue");
    assert_eq!((status, body["version"].as_i64()), (200, Some(1)), "{body:#}");
    let refused = |serving: &Serving| {
        let start = Instant::now();
        loop {
            let (status, body) = write(serving, "held", "blue");
            if status == 409 {
                return body;
            }
            // The service takes the lock right after its start.
            assert!(start.elapsed() < Duration::from_secs(30), "{status} {body:#}");
        }
    };
    let body = refused(&first);
    assert_eq!(body["code"], "workspace_locked");
    assert_eq!(
        (&body["lock"]["locked_by"], &body["lock"]["operation"]),
        (&"demo".into(), &"demo: a long edit".into())
    );
    first.stop();

    let second = Serving::start(&[], &variables, folder.path());
    let (status, body) = write(&second, "main", "red");
    assert_eq!(
        (status, body["version"].as_i64()),
        (200, Some(2)),
        "it finds its data again: {body:#}"
    );
    refused(&second);

    // Killed, it leaves nothing that the next start does not clean up.
    second.kill();
    let third = Serving::start(&[], &variables, folder.path());
    let (status, body) = write(&third, "main", "green");
    assert_eq!((status, body["version"].as_i64()), (200, Some(3)), "{body:#}");
    third.stop();
}

/// A service that runs as a process, until it is stopped or dropped.
struct Serving {
    process: Child,
    _stdout: BufReader<ChildStdout>,
    address: String,
    said: String,
}

impl Serving {
    /// Waits until it has said where it listens.
    fn start(args: &[&str], variables: &[(&str, &str)], folder: &Path) -> Self {
        let mut command = leasehold(args, variables);
        let mut process = command
            .current_dir(folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut said = String::new();
        let marker = "listens on http://";
        // A database of its own brings more to say, up to the line about Ctrl-C.
        while !(said.contains(marker) && (!args.is_empty() || said.contains("Ctrl-C"))) {
            assert!(
                stdout.read_line(&mut said).unwrap() > 0,
                "it ended early: {said:?} {:?}",
                process.wait()
            );
        }
        let (_, rest) = said.split_once(marker).unwrap();
        let address = rest.split_whitespace().next().unwrap().to_owned();
        Self {
            process,
            _stdout: stdout,
            address,
            said,
        }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args(["-s", signal, &self.process.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    fn ended(mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// As Ctrl-C does.
    fn stop(self) {
        self.signal("INT");
        assert!(self.ended().success());
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.process.kill().ok();
            self.process.wait().ok();
        }
    }
}

/// One request over a connection of its own.
fn request(address: &str, method: &str, path: &str, key: &str, headers: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\
         {headers}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split_whitespace().nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, serde_json::from_str(body).unwrap())
}
