//! `leasehold run`: a command under a lock.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use diesel::QueryableByName;
use diesel::sql_types::Text;
use leasehold_domain::{AcquireError, DistributedLock, Holder, LockGuard, LockRequest, Released, Ttl};
use leasehold_storage::{Database, PgLeaseLock};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_current_process_group, kill_process_group,
    test_kill_process_group, waitid,
};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::postgres::Postgres;
use crate::cli::terminal::{Terminal, has_a_shell};
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
/// A hold is trusted until so much before its end, at most.
const MARGIN: Duration = Duration::from_secs(1);
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
        // From here on a signal is not our end, but the command's.
        let mut signals = Signals::listen().map_err(Ending::away)?;
        let db = tokio::select! {
            db = postgres.connect() => db.map_err(Ending::away)?,
            signal = signals.next() => return Ok(KILLED + number(signal)),
        };
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
    let locks = db.leases();
    let acquire = async {
        let request = request(args, db).await?;
        let acquired = if args.wait.is_zero() {
            locks.try_acquire(&request).await
        } else {
            locks.acquire(&request, args.wait).await
        };
        acquired.map_err(Ending::from)
    };
    let guard = tokio::select! {
        acquired = acquire => acquired?,
        // Dropping the wait leaves nothing behind.
        signal = signals.next() => return Ok(KILLED + number(signal)),
    };
    let since = Instant::now();
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
        Ok(_) if since.elapsed() + MARGIN >= args.max_hold => Err(Ending::new(
            LOST,
            "the lock was held for as long as --max-hold allows",
        )),
        Ok(_) => Err(Ending::new(
            LOST,
            "the lock was lost: it was taken away, or could not be renewed in time",
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
        .process_group(0)
        // Should we panic, it must not go on without the lock.
        .kill_on_drop(true);
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
    let mut terminal = Terminal::of_session(group.as_raw_nonzero().get());
    // What it is piped into may be a pager, which needs the terminal: then it is lent when the command asks for it.
    if let Some(terminal) = &mut terminal
        && io::stdin().is_terminal()
        && io::stdout().is_terminal()
    {
        terminal.lend();
    }
    let mut we_are_to_stop = false;
    let ended = loop {
        // A command that somebody has stopped where there is no terminal goes on under its lock when he lets it.
        if (terminal.is_some() || we_are_to_stop)
            && let Some(by) = stopped(group)
        {
            we_are_to_stop = false;
            stop_along(terminal.as_mut(), by, group);
            if guard.is_lost() {
                break end(&mut child, group).await.map(|_| None);
            }
            _ = kill_process_group(group, Signal::CONT);
        }
        tokio::select! {
            biased;
            status = child.wait() => break status.map(Some),
            () = guard.lost() => break end(&mut child, group).await.map(|_| None),
            // It may have ended. What is stopped hears of it only when it goes on.
            signal = signals.next() => for signal in [signal, Signal::CONT] {
                _ = kill_process_group(group, signal);
            },
            asked = stops.next() => if asked {
                we_are_to_stop = true;
                _ = kill_process_group(group, Signal::TSTP);
            }
        }
    };
    if let Some(terminal) = &mut terminal {
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
    keys: tokio::signal::unix::Signal,
    /// What we are piped into wants to read, or to change the terminal, and that is with the command.
    neighbours: [tokio::signal::unix::Signal; 2],
}

impl Stops {
    fn listen() -> io::Result<Self> {
        let stop = |by: Signal| signal(SignalKind::from_raw(by.as_raw()));
        Ok(Self {
            children: signal(SignalKind::child())?,
            keys: stop(Signal::TSTP)?,
            neighbours: [stop(Signal::TTIN)?, stop(Signal::TTOU)?],
        })
    }

    /// Answers whether it is we who are to stop, or whether something has become of the command.
    async fn next(&mut self) -> bool {
        let [reads, writes] = &mut self.neighbours;
        tokio::select! {
            _ = self.keys.recv() => true,
            _ = reads.recv() => true,
            _ = writes.recv() => true,
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
/// Until the shell lets us go on the lock is not renewed. In the foreground, who wants the terminal gets it.
fn stop_along(terminal: Option<&mut Terminal>, by: Signal, group: Pid) {
    let wants_terminal = [Signal::TTIN, Signal::TTOU].contains(&by);
    let Some(terminal) = terminal else {
        stop();
        return;
    };
    if wants_terminal && terminal.is_in_foreground() {
        return terminal.lend();
    }
    let lent = terminal.take_back();
    if !stop() && wants_terminal {
        // It will never get it: as for everybody who is stopped when the last shell has gone.
        _ = kill_process_group(group, Signal::HUP);
    }
    if lent || wants_terminal {
        terminal.lend();
    }
}

/// Stops us, and comes back when the shell lets us go on; answers whether there is one.
fn stop() -> bool {
    let stops = has_a_shell();
    if stops {
        _ = kill_current_process_group(Signal::STOP);
    }
    stops
}

/// Asks the command to end, and then makes it, with all that it has started in its group.
async fn end(child: &mut Child, group: Pid) -> io::Result<ExitStatus> {
    let since = Instant::now();
    for signal in [Signal::TERM, Signal::CONT] {
        // It may have ended.
        _ = kill_process_group(group, signal);
    }
    // A terminal that Ctrl-S has stopped takes nothing, and must not hold this up.
    let tell = || say("leasehold: the lock is not ours any more: the command is stopped");
    // Nor must a machine that has no thread left.
    drop(thread::Builder::new().spawn(tell));
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

/// The signals that are handed on, but for those that whoever started us has us ignore, as `nohup` does: the command
/// ignores them, too.
#[derive(Debug)]
struct Signals(Vec<(Signal, tokio::signal::unix::Signal)>);

impl Signals {
    fn listen() -> io::Result<Self> {
        let ignored = ignored();
        let all = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];
        let handed_on = all.into_iter().filter(|signal| !is_in(ignored, *signal));
        let listen = |by: Signal| Ok((by, signal(SignalKind::from_raw(by.as_raw()))?));
        Ok(Self(handed_on.map(listen).collect::<io::Result<_>>()?))
    }

    async fn next(&mut self) -> Signal {
        std::future::poll_fn(|context| {
            let mut all = self.0.iter_mut();
            let came = all.find_map(|(by, signal)| signal.poll_recv(context).is_ready().then_some(*by));
            came.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// The set of signals that are ignored, where the system tells it as `proc(5)` does.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .unwrap_or(0)
}

fn is_in(set: u64, signal: Signal) -> bool {
    set & (1 << (signal.as_raw() - 1)) != 0
}
