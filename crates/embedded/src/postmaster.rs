//! The server process: creating its data, starting it, and ending one that lost its owner.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::home::{Home, LOG, PORT};
use crate::{Binaries, Error};

/// How long a start may take: crash recovery of a large folder on a busy disk is slow.
pub(crate) const START: Duration = Duration::from_secs(120);
/// How long a shutdown that writes everything out may take, before a harder one.
const STOP: Duration = Duration::from_secs(30);
const UNFINISHED: &str = "data.new-";
const POLL: Duration = Duration::from_millis(2);

/// Makes the data folder where there is none. Cut off at any point, it starts over next time: the folder
/// gets its name only when it is complete.
pub(crate) fn initialise(home: &Home, binaries: &Binaries, sync: bool) -> Result<(), Error> {
    let data = home.data();
    if data.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(&home.path)
        .map_err(Error::io("read", &home.path))?
        .flatten()
    {
        if entry.file_name().as_bytes().starts_with(UNFINISHED.as_bytes()) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
    // A name of its own, as an initdb whose caller was killed may still write into the former one.
    let unfinished = home.path.join(format!("{UNFINISHED}{}", std::process::id()));
    let program = binaries.program("initdb");
    let mut initdb = home.account.command(&program);
    // Trust: who can enter the folder may do everything with the data anyway.
    initdb.args([
        "--username=postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--no-locale",
        "--no-instructions",
    ]);
    if !sync {
        initdb.arg("--no-sync");
    }
    let output = initdb
        .arg("--pgdata")
        .arg(&unfinished)
        .output()
        .map_err(Error::io("run", &program))?;
    if !output.status.success() {
        return Err(Error::Failed {
            program: "initdb",
            said: last_lines(&String::from_utf8_lossy(&output.stderr)),
        });
    }
    fs::rename(&unfinished, &data).map_err(Error::io("rename", &unfinished))
}

/// Spawns `postgres` itself and not `pg_ctl start`: it is our child, so that its end is seen and reaped.
pub(crate) fn spawn(
    home: &Home,
    binaries: &Binaries,
    socket: &Path,
    settings: &[(String, String)],
) -> Result<Child, Error> {
    let path = home.path.join(LOG);
    if path.exists() {
        // One earlier run is kept, for whoever asks why it ended.
        fs::rename(&path, home.path.join("log.1")).map_err(Error::io("rename", &path))?;
    }
    let log = fs::File::create(&path).map_err(Error::io("create", &path))?;
    home.account.give(&path)?;
    let second = log.try_clone().map_err(Error::io("open", &path))?;

    let program = binaries.program("postgres");
    let mut postgres = home.account.command(&program);
    postgres
        .arg("-D")
        .arg(home.data())
        .arg("-k")
        .arg(socket)
        .args(["-p", PORT, "-c", "listen_addresses="]);
    for (name, value) in settings {
        postgres.arg("-c").arg(format!("{name}={value}"));
    }
    postgres.stdout(log).stderr(second);
    postgres.process_group(0); // ctrl-c in a terminal is for our process, which may still need the server
    postgres.spawn().map_err(Error::io("run", &program))
}

/// Waits until the server accepts connections.
pub(crate) fn wait_ready(home: &Home, server: &mut Child) -> Result<(), Error> {
    let started = Instant::now();
    loop {
        if let Some(status) = server.try_wait().map_err(Error::io("wait for", &home.path))? {
            return Err(Error::Failed {
                program: "postgres",
                said: why_ended(home, status),
            });
        }
        if PidFile::read(home).is_some_and(|file| file.ready && file.pid == server.id()) {
            return Ok(());
        }
        if started.elapsed() > START {
            return Err(Error::NotReady {
                home: home.path.clone(),
                seconds: START.as_secs(),
            });
        }
        thread::sleep(POLL);
    }
}

/// Ends our own server, and returns when it has ended. Data that nobody keeps is not written out first.
pub(crate) fn stop(home: &Home, binaries: &Binaries, mut server: Child, keep_data: bool) {
    if matches!(server.try_wait(), Ok(Some(_))) {
        return; // what its file says about it is no longer true
    }
    // A stopped backend can hold up the first; the second kills it after 5 s.
    let modes: &[&str] = if keep_data {
        &["fast", "immediate"]
    } else {
        &["immediate"]
    };
    for mode in modes {
        if pg_ctl(home, binaries, &["stop", "--mode", mode, "--no-wait"]) && ended(&mut server) {
            return;
        }
    }
    // Postgres comes up again from this as from any crash.
    drop(server.kill());
    drop(server.wait());
}

fn ended(server: &mut Child) -> bool {
    let started = Instant::now();
    while started.elapsed() < STOP {
        match server.try_wait() {
            Ok(None) => thread::sleep(POLL),
            Ok(Some(_)) | Err(_) => return true,
        }
    }
    false
}

/// Ends a server that runs in a folder whose lock is ours: its owner and its watchdog are gone.
pub(crate) fn stop_orphan(home: &Home, binaries: &Binaries) {
    let Some(PidFile { pid, .. }) = PidFile::read(home) else {
        return;
    };
    match arguments_of(pid) {
        Some(arguments) if arguments.contains(home.data().as_os_str().as_bytes()) => {
            let seconds = STOP.as_secs().to_string();
            if !pg_ctl(home, binaries, &["stop", "--mode", "fast", "--timeout", &seconds]) {
                pg_ctl(
                    home,
                    binaries,
                    &["stop", "--mode", "immediate", "--timeout", &seconds],
                );
            }
        }
        // The id belongs to another program by now, or to a zombie that nobody reaps. Postgres sees only
        // that there is such a process and would refuse to start, for good.
        Some(_) => drop(fs::remove_file(PidFile::path(home))),
        None => {}
    }
}

/// Whether the last server of the folder ended without an orderly shutdown.
pub(crate) fn crashed(home: &Home) -> bool {
    PidFile::path(home).exists()
}

fn pg_ctl(home: &Home, binaries: &Binaries, arguments: &[&str]) -> bool {
    let mut command = home.account.command(&binaries.program("pg_ctl"));
    command
        .args(arguments)
        .arg("--silent")
        .arg("--pgdata")
        .arg(home.data());
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// What the server writes about itself (`src/include/utils/pidfile.h`): its process id on the first line,
/// its state on the eighth.
struct PidFile {
    pid: u32,
    ready: bool,
}

impl PidFile {
    fn path(home: &Home) -> PathBuf {
        home.data().join("postmaster.pid")
    }

    fn read(home: &Home) -> Option<Self> {
        let text = fs::read_to_string(Self::path(home)).ok()?;
        let mut lines = text.lines();
        let pid = lines.next()?.trim().parse().ok()?;
        Some(Self {
            pid,
            ready: lines.nth(6).is_some_and(|state| state.trim() == "ready"),
        })
    }
}

/// The arguments of a live process; empty ones of a zombie; `None` when there is no such process.
fn arguments_of(pid: u32) -> Option<Arguments> {
    if Path::new("/proc/self/cmdline").exists() {
        let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        return Some(Arguments::List(
            bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect(),
        ));
    }
    let output = Command::new("ps")
        .args(["-ww", "-o", "command=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    output.status.success().then_some(Arguments::Line(output.stdout))
}

enum Arguments {
    List(Vec<Vec<u8>>),
    Line(Vec<u8>),
}

impl Arguments {
    fn contains(&self, argument: &[u8]) -> bool {
        match self {
            Self::List(list) => list.iter().any(|one| one == argument),
            Self::Line(line) => line.windows(argument.len()).any(|part| part == argument),
        }
    }
}

fn why_ended(home: &Home, status: ExitStatus) -> String {
    let log = fs::read(home.path.join(LOG)).unwrap_or_default();
    format!("{status}: {}", last_lines(&String::from_utf8_lossy(&log)))
}

/// One line, since an error is one line.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}
