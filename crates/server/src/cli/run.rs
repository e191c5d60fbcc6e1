//! `leasehold run`: a command under a lock.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use clap::Args;
use diesel::QueryableByName;
use diesel::sql_types::Text;
use leasehold_domain::{AcquireError, DistributedLock, Holder, LockGuard, LockRequest, Released, Ttl};
use leasehold_storage::{Database, PgLeaseLock};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process_group, test_kill_process_group, waitid,
};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::postgres::{Postgres, connect_briefly};
use crate::cli::terminal::Terminal;
use crate::cli::{Failed, USAGE, in_one_line, owner, say};
use crate::config::{DatabaseConfig, LogConfig};
use crate::locks::model::{LockPart, lock_name};
use crate::names::Slug;
use crate::state::instance;
use crate::telemetry;

/// The exit codes that are not the command's, as `sysexits.h` and shells number them.
const UNAVAILABLE: u8 = 69;
const LOST: u8 = 70;
const TRY_LATER: u8 = 75;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const KILLED: u8 = 128;

/// How long a command may take to end when its lock is lost.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether all of it has ended.
const LOOK: Duration = Duration::from_millis(20);
/// How long the release may take.
const SHUTDOWN: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The tenant that the lock belongs to; needed when there are several
    #[arg(long, value_parser = slug)]
    tenant: Option<Slug>,
    /// The name of the lock in the tenant, such as `deploy/prod`
    #[arg(long, value_parser = part)]
    name: LockPart,
    /// How long others wait for the lock after a crash of this machine: 100ms to 24h. It is renewed meanwhile
    #[arg(long, default_value = "30s", value_parser = duration)]
    ttl: Duration,
    /// How long to wait while somebody else has the lock
    #[arg(long, default_value = "0s", value_parser = duration)]
    wait: Duration,
    /// How long the command may take: at least the ttl
    #[arg(long, default_value = "24h", value_parser = duration)]
    max_hold: Duration,
    #[command(flatten)]
    database: DatabaseConfig,
    #[command(flatten)]
    log: LogConfig,
    /// What to run. It finds `LEASEHOLD_LOCK_ID` and `LEASEHOLD_FENCING_TOKEN` in its environment
    #[arg(last = true, required = true, num_args = 1..)]
    command: Vec<OsString>,
}

fn slug(text: &str) -> Result<Slug, String> {
    Slug::new(text).map_err(str::to_owned)
}

fn part(text: &str) -> Result<LockPart, String> {
    LockPart::new(text).map_err(str::to_owned)
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "must be a duration, such as 30s, 1m30s or 500ms".to_owned())
}

/// Why this ends otherwise than the command: the exit code, and what to say.
#[derive(Debug)]
struct Ending {
    code: u8,
    why: String,
}

impl Ending {
    fn new(code: u8, why: impl Into<String>) -> Self {
        Self {
            code,
            why: why.into(),
        }
    }

    fn away(error: impl Into<Failed>) -> Self {
        Self::new(UNAVAILABLE, in_one_line(&*error.into()))
    }
}

impl From<AcquireError> for Ending {
    fn from(error: AcquireError) -> Self {
        let code = match &error {
            AcquireError::Contended(_) | AcquireError::TimedOut { .. } | AcquireError::TenantConflict(_) => {
                TRY_LATER
            }
            AcquireError::Invalid(_) => USAGE,
            AcquireError::NotFound { .. }
            | AcquireError::Unavailable(_)
            | AcquireError::OutcomeUnknown { .. } => UNAVAILABLE,
        };
        Self::new(code, in_one_line(&error))
    }
}

pub(crate) fn run(args: &RunArgs) -> ExitCode {
    telemetry::start(&args.log);
    ExitCode::from(run_under_lock(args).unwrap_or_else(|Ending { code, why }| {
        say(&format!("error: {why}"));
        code
    }))
}

fn run_under_lock(args: &RunArgs) -> Result<u8, Ending> {
    check(args)?;
    let postgres = Postgres::find(&args.database).map_err(Ending::away)?;
    postgres.runtime.block_on(async {
        if postgres.is_private() {
            let migrations = crate::schema::migrations();
            migrations.run(&postgres.options).await.map_err(Ending::away)?;
        }
        // From here on a signal is not our end, but the command's.
        let mut signals = Signals::listen().map_err(Ending::away)?;
        let db = connect_briefly(&postgres.options).await.map_err(Ending::away)?;
        let done = acquire_and_run(args, &db, &mut signals).await;
        db.shutdown(SHUTDOWN).await;
        done
    })
}

/// What can be told without a database.
fn check(args: &RunArgs) -> Result<(), Ending> {
    let usage = |why: String| Ending::new(USAGE, why);
    Ttl::new(args.ttl).map_err(|invalid| usage(format!("--ttl: {}", invalid.reason())))?;
    if args.max_hold < args.ttl {
        return Err(usage("--max-hold: must be at least --ttl".to_owned()));
    }
    if let Some(url) = &args.database.database_url {
        args.database.options(url).map_err(usage)?;
    }
    Ok(())
}

async fn acquire_and_run(args: &RunArgs, db: &Database, signals: &mut Signals) -> Result<u8, Ending> {
    let request = request(args, db).await?;
    let locks = db.leases();
    let acquired = tokio::select! {
        acquired = locks.acquire(&request, args.wait) => acquired,
        // Dropping the wait leaves nothing behind.
        signal = signals.next() => return Ok(KILLED + number(signal)),
    };
    let guard = acquired?;
    let ended = match Stops::listen().and_then(|stops| Ok((start(args, &guard)?, stops))) {
        Ok((child, stops)) => attend(child, &guard, signals, stops).await,
        Err(error) => {
            let code = match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND,
                _ => NOT_EXECUTABLE,
            };
            let program = args.command.first().map(|program| program.to_string_lossy());
            let why = format!("{}: {error}", program.unwrap_or_default());
            release(&locks, guard).await;
            return Err(Ending::new(code, why));
        }
    };
    match ended {
        // What ended before its lock did, ended under it. Whether it did is for the database to say.
        Ok(Some(status)) if release(&locks, guard).await => Ok(code(status)),
        Ok(_) => Err(Ending::new(
            LOST,
            "the lock was lost, or held for as long as it may be",
        )),
        Err(error) => Err(Ending::new(
            LOST,
            format!("the command cannot be waited for: {error}"),
        )),
    }
}

async fn request(args: &RunArgs, db: &Database) -> Result<LockRequest, Ending> {
    let tenant = tenant(db, args.tenant.as_ref()).await?;
    let first_word = args
        .command
        .first()
        .map(|word| word.to_string_lossy().into_owned());
    let mut operation = first_word.unwrap_or_default();
    operation.truncate(operation.floor_char_boundary(Holder::MAX_FIELD_BYTES));
    let holder = Holder::new(owner(), operation).with_instance(instance());
    let name = lock_name(&tenant, args.name.as_str());
    let name = name.map_err(|invalid| Ending::new(USAGE, format!("--name: {}", invalid.reason())))?;
    Ok(LockRequest::new(name, holder)
        .with_ttl(args.ttl)
        .with_max_hold(args.max_hold))
}

#[derive(QueryableByName)]
struct TenantRow {
    #[diesel(sql_type = Text)]
    id: String,
}

/// The tenant of this name, or the only one.
async fn tenant(db: &Database, asked: Option<&Slug>) -> Result<String, Ending> {
    use diesel_async::RunQueryDsl;

    let found: Result<Vec<TenantRow>, _> = match asked {
        Some(tenant) => {
            db.read(async |conn| {
                let find = diesel::sql_query("SELECT id FROM tenants WHERE id = $1");
                find.bind::<Text, _>(tenant.as_str()).load(conn).await
            })
            .await
        }
        None => {
            db.read(async |conn| {
                diesel::sql_query("SELECT id FROM tenants ORDER BY id LIMIT 2")
                    .load(conn)
                    .await
            })
            .await
        }
    };
    let mut found = found.map_err(Ending::away)?.into_iter();
    match (found.next(), found.next(), asked) {
        (Some(tenant), None, _) => Ok(tenant.id),
        (Some(_), Some(_), _) => Err(Ending::new(
            USAGE,
            "there are several tenants: name one with --tenant",
        )),
        (None, _, Some(asked)) => Err(Ending::new(USAGE, format!("there is no tenant {asked}"))),
        (None, _, None) => Err(Ending::new(USAGE, "there is no tenant")),
    }
}

fn start(args: &RunArgs, guard: &LockGuard) -> io::Result<Child> {
    let [program, arguments @ ..] = args.command.as_slice() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no command"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LEASEHOLD_LOCK_ID", guard.lock_id().to_string())
        .process_group(0);
    if let Some(token) = guard.fencing_token() {
        command.env("LEASEHOLD_FENCING_TOKEN", token.to_string());
    }
    command.spawn()
}

/// Waits for the end of the command, and makes it end when the lock is lost: then there is no status.
async fn attend(
    mut child: Child,
    guard: &LockGuard,
    signals: &mut Signals,
    mut stops: Stops,
) -> io::Result<Option<ExitStatus>> {
    let id = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let group = id.ok_or_else(|| io::Error::other("it has no process id"))?;
    let terminal = Terminal::of_stdin(group);
    // What it is piped into may be a pager, which needs the terminal: then it is lent when the command asks for it.
    if let Some(terminal) = &terminal
        && io::stdout().is_terminal()
    {
        terminal.lend();
    }
    let ended = loop {
        if let Some(terminal) = &terminal
            && let Some(by) = stopped(group)
        {
            let mut lend = [Signal::TTIN, Signal::TTOU].contains(&by);
            if !(lend && terminal.is_in_foreground()) {
                lend |= terminal.take_back();
                stop_along();
            }
            if guard.is_lost() {
                break end(&mut child, group).await.map(|_| None);
            }
            if lend {
                terminal.lend();
            }
            _ = kill_process_group(group, Signal::CONT);
        }
        tokio::select! {
            biased;
            status = child.wait() => break status.map(Some),
            () = guard.lost() => break end(&mut child, group).await.map(|_| None),
            // It may have ended.
            signal = signals.next() => {
                _ = kill_process_group(group, signal);
            }
            we_are_to_stop = stops.next() => if we_are_to_stop {
                _ = kill_process_group(group, Signal::TSTP);
            }
        }
    };
    if let Some(terminal) = &terminal {
        terminal.take_back();
    }
    ended
}

/// What is to be known from before the command starts, so that no stop is missed.
#[derive(Debug)]
struct Stops {
    /// The command stops, goes on or ends.
    children: tokio::signal::unix::Signal,
    /// Ctrl-Z, while the terminal is ours.
    keys: Option<tokio::signal::unix::Signal>,
    /// What we are piped into wants to read, and the terminal is with the command.
    neighbours: Option<tokio::signal::unix::Signal>,
}

impl Stops {
    fn listen() -> io::Result<Self> {
        let at_a_terminal = io::stdin().is_terminal();
        let stop = |by: Signal| {
            let listen = at_a_terminal.then(|| signal(SignalKind::from_raw(by.as_raw())));
            listen.transpose()
        };
        Ok(Self {
            children: signal(SignalKind::child())?,
            keys: stop(Signal::TSTP)?,
            neighbours: stop(Signal::TTIN)?,
        })
    }

    /// Answers whether it is we who are to stop, or whether something has become of the command.
    async fn next(&mut self) -> bool {
        tokio::select! {
            Some(()) = async { self.keys.as_mut()?.recv().await } => true,
            Some(()) = async { self.neighbours.as_mut()?.recv().await } => true,
            _ = self.children.recv() => false,
        }
    }
}

/// Which signal has stopped the command, told once.
fn stopped(command: Pid) -> Option<Signal> {
    let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::Pid(command), options).ok()??;
    Signal::from_named_raw(status.stopping_signal()?)
}

/// When Ctrl-Z has stopped the command, or it wants to read in the background, its shell waits for us to stop as well.
/// Until the shell lets us go on the lock is not renewed.
fn stop_along() {
    _ = kill_process_group(rustix::process::getpgrp(), Signal::STOP);
}

/// Asks the command to end, and then makes it, with all that it has started in its group.
async fn end(child: &mut Child, group: Pid) -> io::Result<ExitStatus> {
    say("leasehold: the lock is lost: the command is stopped");
    let since = Instant::now();
    for signal in [Signal::TERM, Signal::CONT] {
        // It may have ended.
        _ = kill_process_group(group, signal);
    }
    let ended = tokio::time::timeout(GRACE, child.wait()).await;
    while since.elapsed() < GRACE && test_kill_process_group(group).is_ok() {
        tokio::time::sleep(LOOK).await;
    }
    _ = kill_process_group(group, Signal::KILL);
    match ended {
        Ok(status) => status,
        Err(_) => child.wait().await,
    }
}

/// Releases the lock, and answers whether it was still ours.
async fn release(locks: &PgLeaseLock, guard: LockGuard) -> bool {
    match locks.release(guard).await {
        Ok(Released::Held) => true,
        Ok(Released::AlreadyGone) => false,
        Err(error) => {
            // The command ended while the hold was trusted.
            tracing::warn!(
                error = in_one_line(&error),
                "the lock was not released, it ends by itself"
            );
            true
        }
    }
}

fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| i32::from(KILLED) + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

fn number(signal: Signal) -> u8 {
    u8::try_from(signal.as_raw()).unwrap_or(0)
}

/// The signals that are handed on.
#[derive(Debug)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hang_up.recv() => Signal::HUP,
        }
    }
}
