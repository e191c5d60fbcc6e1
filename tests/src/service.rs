//! The `leasehold` program as a child process.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::database::TestDatabase;
use crate::http::Api;
use crate::patience::PATIENCE;
use crate::secrets;

const LISTENS: &str = "Leasehold listens on http://";

/// A running service. Dropping it kills the process and waits for its end.
#[derive(Debug)]
pub struct Service {
    child: Child,
    address: SocketAddr,
    out: Lines,
    log: Lines,
}

/// The lines of a stream, as they come.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

/// How to start a service.
#[derive(Debug)]
#[must_use = "nothing runs until `start`"]
pub struct ServiceBuilder {
    command: Command,
    log: Option<File>,
}

/// The built program: what `LEASEHOLD_BIN` names, else what cargo builds now.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("LEASEHOLD_BIN") {
            return path.into();
        }
        let build = [
            "build",
            "--quiet",
            "--package",
            "leasehold-server",
            "--bin",
            "leasehold",
        ];
        let built = Command::new(env!("CARGO")).args(build).status().unwrap();
        assert!(built.success(), "cargo build: {built}");
        // .../target/debug/deps/system-0123456789abcdef
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().join("leasehold")
    })
}

/// The program with this database and nothing else from the environment that it would read.
pub fn command(database_url: Option<&str>) -> Command {
    let mut command = Command::new(program());
    command
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| {
            ["PATH", "HOME", "USER", "PG_BIN", "TMPDIR", "RUST_BACKTRACE"]
                .iter()
                .any(|kept| name == kept)
        }))
        .env("RUST_LOG", "info,leasehold_storage=debug")
        .stdin(Stdio::null());
    if let Some(url) = database_url {
        let with = if url.contains('?') { '&' } else { '?' };
        let password = secrets::DATABASE_PASSWORD;
        command.env("DATABASE_URL", format!("{url}{with}password={password}"));
    }
    command
}

/// The command, started by a line of the shell that ends with `exec "$@"`.
pub fn through(line: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", line, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
    shell
}

impl Service {
    /// A service on a database of its own or shared with others, which brings the schema up to date itself.
    pub fn on(database: &TestDatabase) -> ServiceBuilder {
        Self::on_url(database.url())
    }

    /// As [`Service::on`], with the schema left as it is.
    pub fn without_migrating(database: &TestDatabase) -> ServiceBuilder {
        let mut command = command(Some(database.url()));
        command.arg("serve");
        ServiceBuilder { command, log: None }
    }

    /// As [`Service::on`], on whatever is behind this URL.
    pub fn on_url(url: &str) -> ServiceBuilder {
        let mut command = command(Some(url));
        command.args(["serve", "--migrate"]);
        ServiceBuilder { command, log: None }
    }

    /// A service that finds itself a Postgres, started without arguments in this folder.
    pub fn private_in(folder: &Path) -> ServiceBuilder {
        let mut command = command(None);
        command.current_dir(folder);
        ServiceBuilder { command, log: None }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// To ask it, as the one who has this key.
    pub fn api(&self, key: &str) -> Api {
        Api {
            address: self.address,
            key: Some(key.to_owned()),
        }
    }

    /// What it printed.
    pub fn output(&self) -> Vec<String> {
        self.out.all()
    }

    /// What it logged.
    pub fn log(&self) -> Vec<String> {
        self.log.all()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the service did not end within {PATIENCE:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Asks it to end, and waits for that.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }
}

impl ServiceBuilder {
    /// With an environment variable more.
    pub fn set(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self.command.env(name, value.as_ref());
        self
    }

    /// Started by a line of the shell that ends with `exec "$@"`.
    pub fn through(mut self, line: &str) -> Self {
        self.command = through(line, &self.command);
        self
    }

    /// With its log lines to this file, instead of to [`Service::log`].
    pub fn log_to(mut self, file: File) -> Self {
        self.log = Some(file);
        self
    }

    /// Starts the process, and returns when it listens.
    pub async fn start(self) -> Service {
        match self.try_start().await {
            Ok(service) => service,
            Err((status, log)) => panic!("the service ended with {status}:\n{}", log.join("\n")),
        }
    }

    /// Starts the process, and returns when it listens, or how it ended and what it had logged.
    ///
    /// # Errors
    /// When it ended.
    pub async fn try_start(mut self) -> Result<Service, (ExitStatus, Vec<String>)> {
        if !self.command.get_envs().any(|(name, _)| name == "LISTEN_ADDR") {
            self.command.env("LISTEN_ADDR", "127.0.0.1:0");
        }
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(self.log.map_or_else(Stdio::piped, Stdio::from))
            .spawn()
            .unwrap();
        let out = Lines::read(child.stdout.take().unwrap());
        let log = child.stderr.take().map(Lines::read).unwrap_or_default();
        let unknown = SocketAddr::from(([0; 4], 0));
        let mut service = Service {
            child,
            address: unknown,
            out,
            log,
        };
        let start = Instant::now();
        loop {
            if let Some(address) = service.out.all().iter().find_map(|line| {
                let rest = line.strip_prefix(LISTENS)?;
                rest.split_whitespace().next()?.parse().ok()
            }) {
                service.address = address;
                return Ok(service);
            }
            if let Some(status) = service.child.try_wait().unwrap() {
                return Err((status, service.log.until_end()));
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the service does not listen: {:?}",
                service.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Makes a key by the command, as an operator would. The schema must be there.
pub fn make_key(database: &TestDatabase, subject: &str, role: &str, tenant: Option<&str>) -> String {
    let mut command = command(Some(database.url()));
    command.args(["keys", "create", "--subject", subject, "--role", role]);
    command.args(tenant.into_iter().flat_map(|tenant| ["--tenant", tenant]));
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let key = text.trim_end();
    assert!(
        key.starts_with("lh_") && !key.contains(char::is_whitespace),
        "{text:?}"
    );
    key.to_owned()
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
        let log = self.log.until_end();
        if std::thread::panicking() {
            let last = log.len().saturating_sub(60);
            eprintln!("the last log lines of the service:\n{}", log[last..].join("\n"));
        } else {
            for line in log {
                secrets::assert_none_in_log(&line);
            }
        }
    }
}

impl Lines {
    /// Reads in a thread, until the end of the stream.
    fn read(stream: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let kept = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                kept.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        lines
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The process has ended; its last lines may still be on their way to us.
    fn until_end(&self) -> Vec<String> {
        let start = Instant::now();
        while Arc::strong_count(&self.0) > 1 && start.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.all()
    }
}
