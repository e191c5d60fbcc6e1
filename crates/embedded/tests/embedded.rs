//! A private Postgres through every way in which it, its owner or its folder can end or be found.
#![allow(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in #[test] functions only, not in what they share"
)]
#![allow(
    clippy::print_stdout,
    reason = "how the process that owns a server tells the test about it"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use leasehold_embedded::{Binaries, Cluster, ClusterBuilder, Durability, Error};

// ---- a folder of our own, that the account of the server can reach

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "/tmp/leasehold-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        fs::create_dir(&name).unwrap();
        fs::set_permissions(&name, fs::Permissions::from_mode(0o755)).unwrap(); // whatever our umask says
        Self(PathBuf::from(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A server whose owner was killed may be writing its last files.
        let started = Instant::now();
        while fs::remove_dir_all(&self.0).is_err() && started.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What we make belongs to us.
fn we_are_root(made: &Folder) -> bool {
    fs::metadata(&made.0).unwrap().uid() == 0
}

/// Its id everywhere.
const NOBODY: &str = "65534";

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "still not after 30 s: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn signal(name: &str, pid: u32) -> bool {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .stderr(Stdio::null())
        .status();
    status.unwrap().success()
}

/// A zombie that nobody has reaped yet counts as gone.
fn runs(pid: u32) -> bool {
    let output = Command::new("ps")
        .args(["-o", "stat=", "-p", &pid.to_string()])
        .output()
        .unwrap();
    let state = String::from_utf8(output.stdout).unwrap();
    !state.trim().is_empty() && !state.trim().starts_with('Z')
}

// ---- one statement over the wire, so that "it runs" means that it answers

fn decode(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).unwrap()
}

/// The first column of the rows that the statement returns, or the error's text.
fn query(url: &str, sql: &str) -> Result<Vec<String>, String> {
    let host = decode(url.split("host=").nth(1).unwrap().split('&').next().unwrap());
    let mut server = UnixStream::connect(format!("{host}/.s.PGSQL.5432")).map_err(|e| e.to_string())?;
    server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut hello = vec![0, 3, 0, 0];
    hello.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
    let mut out = u32::to_be_bytes(hello.len() as u32 + 4).to_vec();
    out.extend(hello);
    out.push(b'Q');
    out.extend(u32::to_be_bytes(sql.len() as u32 + 5));
    out.extend(sql.bytes().chain([0]));
    server.write_all(&out).map_err(|e| e.to_string())?;
    let (mut rows, mut ready) = (Vec::new(), 0);
    loop {
        let mut head = [0; 5];
        server.read_exact(&mut head).map_err(|e| e.to_string())?;
        let mut body = vec![0; u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4];
        server.read_exact(&mut body).map_err(|e| e.to_string())?;
        match head[0] {
            b'E' => return Err(String::from_utf8_lossy(&body).into_owned()),
            b'D' => {
                let length = u32::from_be_bytes(body[2..6].try_into().unwrap()) as usize;
                rows.push(String::from_utf8(body[6..6 + length].to_vec()).unwrap());
            }
            b'Z' if ready == 1 => return Ok(rows), // the first came before our statement
            b'Z' => ready += 1,
            _ => {}
        }
    }
}

/// Data that stays, without the wait for the disk: none of these tests cuts the power.
fn persistent(folder: impl Into<PathBuf>) -> ClusterBuilder {
    Cluster::persistent(folder).durability(Durability::Fast)
}

fn show(cluster: &Cluster, setting: &str) -> String {
    query(&cluster.url("postgres"), &format!("SHOW {setting}"))
        .unwrap()
        .remove(0)
}

// ---- another process that owns a server: this very binary, told what to do by its environment

const ROLE: &str = "LEASEHOLD_EMBEDDED_TEST_OWNER";

#[test]
#[ignore = "not a test: the process that other tests start and kill"]
fn owner_process() {
    let Some(folder) = env::var_os(ROLE) else { return };
    let builder = if folder.is_empty() {
        Cluster::temporary()
    } else {
        persistent(PathBuf::from(folder))
    };
    match builder.start() {
        Ok(cluster) => {
            let pid = cluster.server_pid().unwrap_or(0);
            println!(
                "\nSTARTED\t{}\t{}\t{pid}",
                cluster.home().display(),
                cluster.url("postgres")
            );
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
        Err(error) => println!("\nERROR\t{error}"),
    }
}

struct Owner {
    process: Child,
    /// Kept open: the process says more at its end.
    _output: BufReader<ChildStdout>,
    home: PathBuf,
    url: String,
    server: u32,
}

fn owner_command(folder: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "owner_process", "--ignored", "--nocapture"])
        .env(ROLE, folder);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// The first line that the other process says, in fields, and the rest of its output.
fn first_words(process: &mut Child) -> (Vec<String>, BufReader<ChildStdout>) {
    let mut output = BufReader::new(process.stdout.take().unwrap());
    let mut line = String::new();
    while !(line.starts_with("STARTED\t") || line.starts_with("ERROR\t")) {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended without a word");
    }
    (line.trim_end().split('\t').map(str::to_owned).collect(), output)
}

impl Owner {
    fn start(folder: &Path) -> Self {
        let mut process = owner_command(folder).spawn().unwrap();
        let (words, _output) = first_words(&mut process);
        assert_eq!(words[0], "STARTED", "{words:?}");
        Self {
            process,
            _output,
            home: words[1].clone().into(),
            url: words[2].clone(),
            server: words[3].parse().unwrap(),
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// The shell beside the server.
    fn watchdog(&self) -> u32 {
        let output = Command::new("ps")
            .args(["-A", "-o", "pid=,ppid=,comm="])
            .output()
            .unwrap();
        let parent = self.process.id().to_string();
        let text = String::from_utf8(output.stdout).unwrap();
        let children = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let shells: Vec<_> = children
            .filter(|c| c[1] == parent && c[0] != self.server.to_string())
            .collect();
        assert_eq!(shells.len(), 1, "{shells:?}");
        shells[0][0].parse().unwrap()
    }
}

// ---- the tests

#[test]
fn a_temporary_server_answers_and_leaves_nothing() {
    let cluster = Cluster::temporary().set("max_connections", "17").start().unwrap();
    assert!(!cluster.is_attached());
    assert_eq!(query(&cluster.url("postgres"), "SELECT 40 + 2").unwrap(), ["42"]);
    assert_eq!(show(&cluster, "fsync"), "off");
    assert_eq!(show(&cluster, "full_page_writes"), "off");
    assert_eq!(show(&cluster, "synchronous_commit"), "on");
    assert_eq!(show(&cluster, "max_locks_per_transaction"), "256");
    assert_eq!(show(&cluster, "max_connections"), "17");
    assert_eq!(show(&cluster, "listen_addresses"), "");
    assert_eq!(show(&cluster, "server_encoding"), "UTF8");
    assert_eq!(fs::metadata(cluster.home()).unwrap().mode() & 0o777, 0o700);
    let (home, pid) = (cluster.home().to_path_buf(), cluster.server_pid().unwrap());
    assert!(runs(pid));
    drop(cluster);
    assert!(!home.exists());
    assert!(!runs(pid));
}

#[test]
fn a_temporary_server_can_be_durable_for_tests_that_count_syncs() {
    let cluster = Cluster::temporary()
        .durability(Durability::Durable)
        .start()
        .unwrap();
    assert_eq!(show(&cluster, "fsync"), "on");
    assert_eq!(show(&cluster, "full_page_writes"), "on");
    assert_eq!(show(&cluster, "synchronous_commit"), "on");
}

#[test]
fn persistent_data_is_durable_and_found_again() {
    let folder = Folder::new();
    let mode = fs::metadata(&folder.0).unwrap().mode();
    let cluster = Cluster::persistent(&folder.0).start().unwrap();
    assert_eq!(
        cluster.home(),
        folder.0.join(format!("postgres-{}", cluster.binaries().major()))
    );
    for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
        assert_eq!(show(&cluster, setting), "on", "{setting}");
    }
    query(
        &cluster.url("postgres"),
        "CREATE TABLE kept AS SELECT 'here' AS word",
    )
    .unwrap();
    drop(cluster);

    let cluster = Cluster::persistent(&folder.0).start().unwrap();
    assert_eq!(
        query(&cluster.url("postgres"), "SELECT word FROM kept").unwrap(),
        ["here"]
    );
    let found = fs::metadata(&folder.0).unwrap();
    assert_eq!(found.mode(), mode, "the caller's folder was left alone");
}

#[test]
fn settings_that_cannot_be_end_in_an_error_that_says_why() {
    let error = Cluster::temporary()
        .set("max_connections", "none")
        .start()
        .unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(
            error,
            Error::Failed {
                program: "postgres",
                ..
            }
        ),
        "{text}"
    );
    assert!(text.contains("max_connections"), "{text}");
    assert_eq!(text.lines().count(), 1);
}

#[test]
fn a_killed_owner_of_a_temporary_server_leaves_nothing() {
    let mut owner = Owner::start(Path::new(""));
    assert_eq!(query(&owner.url, "SELECT 1").unwrap(), ["1"]);
    owner.kill();
    until("the watchdog stopped the server", || !runs(owner.server));
    until("the watchdog removed the folder", || !owner.home.exists());
}

#[test]
fn a_killed_owner_of_a_persistent_server_leaves_its_data_to_the_next() {
    let folder = Folder::new();
    let mut owner = Owner::start(&folder.0);
    query(&owner.url, "CREATE TABLE kept AS SELECT 'here' AS word").unwrap();
    owner.kill();
    // At once: the watchdog may be at work still.
    let cluster = persistent(&folder.0).start().unwrap();
    assert!(!cluster.is_attached());
    assert_eq!(
        query(&cluster.url("postgres"), "SELECT word FROM kept").unwrap(),
        ["here"]
    );
    assert!(!runs(owner.server));
}

#[test]
fn an_orphan_whose_watchdog_died_too_is_stopped_by_the_next_start() {
    let folder = Folder::new();
    let mut owner = Owner::start(&folder.0);
    query(&owner.url, "CREATE TABLE kept AS SELECT 'here' AS word").unwrap();
    assert!(signal("KILL", owner.watchdog()));
    owner.kill();
    assert!(runs(owner.server), "there is an orphan to deal with");
    let cluster = persistent(&folder.0).start().unwrap();
    assert!(!runs(owner.server));
    assert_eq!(
        query(&cluster.url("postgres"), "SELECT word FROM kept").unwrap(),
        ["here"]
    );
}

#[test]
fn a_temporary_orphan_is_swept_by_the_next_temporary_start() {
    let mut owner = Owner::start(Path::new(""));
    assert!(signal("KILL", owner.watchdog()));
    owner.kill();
    assert!(owner.home.exists());
    // Another test's start may be quicker than this one; either way it is gone.
    drop(Cluster::temporary().start().unwrap());
    until("somebody's sweep is through", || {
        !owner.home.exists() && !runs(owner.server)
    });
}

#[test]
fn a_killed_server_comes_up_again_with_its_data() {
    let folder = Folder::new();
    let cluster = persistent(&folder.0).start().unwrap();
    query(
        &cluster.url("postgres"),
        "CREATE TABLE kept AS SELECT 'here' AS word",
    )
    .unwrap();
    assert!(signal("KILL", cluster.server_pid().unwrap()));
    drop(cluster);
    assert!(
        folder
            .0
            .read_dir()
            .unwrap()
            .flatten()
            .any(|home| home.path().join("data/postmaster.pid").exists())
    );
    let cluster = persistent(&folder.0).start().unwrap();
    assert_eq!(
        query(&cluster.url("postgres"), "SELECT word FROM kept").unwrap(),
        ["here"]
    );
}

#[test]
fn a_process_id_that_was_given_to_somebody_else_is_neither_believed_nor_harmed() {
    let folder = Folder::new();
    let cluster = persistent(&folder.0).start().unwrap();
    let pid_file = cluster.home().join("data/postmaster.pid");
    let stale = fs::read_to_string(&pid_file).unwrap();
    let owner = fs::metadata(cluster.home()).unwrap();
    drop(cluster);

    // Of the same user: such a process Postgres itself takes for a running server.
    let mut bystander = Command::new("sleep");
    bystander.arg("300");
    if we_are_root(&folder) {
        bystander.uid(owner.uid()).gid(owner.gid());
    }
    let mut bystander = bystander.spawn().unwrap();
    let (_, rest) = stale.split_once('\n').unwrap();
    fs::write(&pid_file, format!("{}\n{rest}", bystander.id())).unwrap();
    if we_are_root(&folder) {
        chown(&pid_file, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    let started = persistent(&folder.0).start();
    let unharmed = bystander.try_wait().unwrap().is_none();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(
        query(&started.unwrap().url("postgres"), "SELECT 1").unwrap(),
        ["1"]
    );
    assert!(unharmed);
}

#[test]
fn an_interrupted_first_start_is_done_over() {
    let folder = Folder::new();
    let cluster = persistent(&folder.0).start().unwrap();
    let home = cluster.home().to_path_buf();
    drop(cluster);
    fs::rename(home.join("data"), home.join("data.new-1")).unwrap();
    fs::remove_dir_all(home.join("data.new-1/global")).unwrap();
    let cluster = persistent(&folder.0).start().unwrap();
    assert_eq!(query(&cluster.url("postgres"), "SELECT 1").unwrap(), ["1"]);
    assert!(!home.join("data.new-1").exists());
}

#[test]
fn a_second_process_attaches_and_does_not_stop_the_server() {
    let folder = Folder::new();
    let mut owner = Owner::start(&folder.0);
    let cluster = persistent(&folder.0).start().unwrap();
    assert!(cluster.is_attached());
    assert_eq!(cluster.server_pid(), None);
    assert_eq!(cluster.url("postgres"), owner.url);
    drop(cluster);
    assert_eq!(query(&owner.url, "SELECT 1").unwrap(), ["1"]);
    owner.process.stdin.take().unwrap().write_all(b"end\n").unwrap();
    assert!(owner.process.wait().unwrap().success());
    assert!(!runs(owner.server));
}

#[test]
fn of_several_first_starts_at_once_one_owns_the_server() {
    let folder = Folder::new();
    let clusters: Vec<Cluster> = thread::scope(|scope| {
        let starts: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| persistent(&folder.0).start()))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().unwrap().unwrap())
            .collect()
    });
    assert_eq!(
        clusters.iter().filter(|cluster| !cluster.is_attached()).count(),
        1
    );
    for cluster in &clusters {
        assert_eq!(query(&cluster.url("postgres"), "SELECT 1").unwrap(), ["1"]);
    }
}

#[test]
fn a_folder_in_use_for_something_else_is_left_untouched() {
    let folder = Folder::new();
    let home = folder
        .0
        .join(format!("postgres-{}", Binaries::find().unwrap().major()));
    fs::create_dir(&home).unwrap();
    fs::write(home.join("diary.txt"), "dear diary").unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    let before = fs::metadata(&home).unwrap();

    let error = persistent(&folder.0).start().unwrap_err();
    assert!(
        matches!(&error, Error::ForeignFolder(found) if *found == home),
        "{error}"
    );
    let after = fs::metadata(&home).unwrap();
    assert_eq!((before.uid(), before.mode()), (after.uid(), after.mode()));
    assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
}

#[test]
fn a_link_is_not_followed() {
    let (folder, target) = (Folder::new(), Folder::new());
    let home = folder
        .0
        .join(format!("postgres-{}", Binaries::find().unwrap().major()));
    std::os::unix::fs::symlink(&target.0, &home).unwrap();
    let error = persistent(&folder.0).start().unwrap_err();
    assert!(matches!(error, Error::ForeignFolder(_)), "{error}");
    assert_eq!(fs::read_dir(&target.0).unwrap().count(), 0);
}

#[test]
fn a_wrong_pg_bin_is_named() {
    let mut process = owner_command(Path::new(""))
        .env("PG_BIN", "/nonexistent/bin")
        .spawn()
        .unwrap();
    let (words, _output) = first_words(&mut process);
    process.wait().unwrap();
    assert_eq!(
        words,
        [
            "ERROR",
            "PG_BIN is /nonexistent/bin: there is no program `postgres`"
        ]
    );
}

#[test]
fn where_there_is_no_postgres_one_line_says_how_to_get_one() {
    let text = Error::NoBinaries.to_string();
    assert_eq!(text.lines().count(), 1);
    for way in [
        "apt install postgresql",
        "brew install postgresql",
        "PG_BIN",
        "DATABASE_URL",
    ] {
        assert!(text.contains(way), "{way}: {text}");
    }
}

#[test]
fn data_of_a_version_that_is_not_installed_is_not_passed_over_in_silence() {
    let folder = Folder::new();
    fs::create_dir_all(folder.0.join("postgres-9/data")).unwrap();
    let path = format!(
        "{}:{}",
        Binaries::find().unwrap().folder().display(),
        env::var("PATH").unwrap()
    );
    let mut process = owner_command(&folder.0)
        .env("PG_BIN", "")
        .env("PATH", path)
        .spawn()
        .unwrap();
    let (words, _output) = first_words(&mut process);
    process.wait().unwrap();
    assert_eq!(words[0], "ERROR");
    assert!(
        words[1].contains("postgres-9 holds data of Postgres 9, which is not installed"),
        "{words:?}"
    );
}

#[test]
fn a_path_too_long_for_a_socket_gets_a_short_one_beside_it() {
    let folder = Folder::new();
    let long = folder.0.join("n".repeat(120)).join("deep and odd %&");
    let cluster = persistent(&long).start().unwrap();
    assert!(cluster.home().starts_with(&long));
    let url = cluster.url("postgres");
    assert_eq!(query(&url, "SELECT 1").unwrap(), ["1"]);
    // Who attaches must be told the other place too.
    let second = persistent(&long).start().unwrap();
    assert!(second.is_attached());
    assert_eq!(second.url("postgres"), url);
    drop((second, cluster));
    let socket = url.split("host=").nth(1).unwrap().split('&').next().unwrap();
    assert!(!Path::new(socket).exists(), "the short folder is removed");
}

#[test]
fn a_url_survives_odd_characters_in_the_path() {
    let folder = Folder::new();
    let odd = folder.0.join("a b&c=%?#ä");
    let cluster = persistent(&odd).start().unwrap();
    assert_eq!(query(&cluster.url("postgres"), "SELECT 1").unwrap(), ["1"]);
}

#[test]
fn root_keeps_the_data_elsewhere_when_the_server_cannot_reach_the_folder() {
    let folder = Folder::new();
    if !we_are_root(&folder) {
        return; // a normal user runs the server as itself, and reaches what it can create
    }
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o700)).unwrap();
    let cluster = persistent(folder.0.join("project")).start().unwrap();
    let home = cluster.home().to_path_buf();
    assert!(home.starts_with("/var/lib/leasehold"), "{}", home.display());
    query(
        &cluster.url("postgres"),
        "CREATE TABLE kept AS SELECT 'here' AS word",
    )
    .unwrap();
    drop(cluster);
    let cluster = persistent(folder.0.join("project")).start().unwrap();
    assert_eq!(cluster.home(), home, "the same place each time");
    assert_eq!(
        query(&cluster.url("postgres"), "SELECT word FROM kept").unwrap(),
        ["here"]
    );
    drop(cluster);
    fs::remove_dir_all(home.parent().unwrap()).unwrap();
    drop(fs::remove_dir("/var/lib/leasehold")); // unless somebody uses it
}

#[test]
fn root_serves_a_folder_as_the_user_that_owns_it() {
    let folder = Folder::new();
    if !we_are_root(&folder) {
        return; // only root can become another user
    }
    let cluster = persistent(&folder.0).start().unwrap();
    let home = cluster.home().to_path_buf();
    drop(cluster);
    let status = Command::new("chown")
        .args(["-R", NOBODY])
        .arg(&home)
        .status()
        .unwrap();
    assert!(status.success());
    let cluster = persistent(&folder.0).start().unwrap();
    assert_eq!(query(&cluster.url("postgres"), "SELECT 1").unwrap(), ["1"]);
    let socket = fs::metadata(cluster.home().join(".s.PGSQL.5432")).unwrap();
    assert_eq!(
        socket.uid().to_string(),
        NOBODY,
        "so that this user finds its own data again"
    );
}

#[test]
fn a_normal_user_runs_the_server_as_itself_and_not_in_a_folder_of_another() {
    let folder = Folder::new();
    if !we_are_root(&folder) {
        return; // then every other test is this one
    }
    // This program may lie where nobody else can read it.
    let program = folder.0.join("program");
    fs::copy(env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let project = folder.0.join("project");
    fs::create_dir(&project).unwrap();
    let nobody = NOBODY.parse().unwrap();
    chown(&project, Some(nobody), None).unwrap();

    let start_as = |user: u32| {
        let mut command = Command::new(&program);
        command
            .args(["--exact", "owner_process", "--ignored", "--nocapture"])
            .env(ROLE, &project);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut process = command.uid(user).gid(user).current_dir("/").spawn().unwrap();
        let (words, _output) = first_words(&mut process);
        process.kill().unwrap();
        process.wait().unwrap();
        words
    };
    let words = start_as(nobody);
    assert_eq!(words[0], "STARTED", "{words:?}");
    let home = Path::new(&words[1]);
    assert_eq!(fs::metadata(home.join("data")).unwrap().uid(), nobody);
    let words = start_as(nobody - 1);
    assert_eq!(words[0], "ERROR", "{words:?}");
    assert!(
        words[1].contains("belongs to the user with id 65534"),
        "{words:?}"
    );
}
