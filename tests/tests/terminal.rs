//! `leasehold run` in an interactive shell: who has the terminal, and what Ctrl-C, Ctrl-Z, `fg` and `bg` do.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use leasehold_system_tests::http::{delete, get, post};
use leasehold_system_tests::patience::eventually;
use leasehold_system_tests::process::state;
use leasehold_system_tests::service::{command, program};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::json;

use crate::world::World;

const LOCK: &str = "/v1/tenants/acme/locks/deploy";
const PROMPT: &str = "prompt> ";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_Z: &str = "\x1a";
const CTRL_S: &str = "\x13";
const CTRL_Q: &str = "\x11";
const CTRL_BACKSLASH: &str = "\x1c";

/// A shell at a terminal. Dropping it hangs up.
struct Shell {
    child: Child,
    keyboard: mpsc::Sender<String>,
    screen: Arc<Mutex<String>>,
    seen: usize,
}

impl Shell {
    /// In it `$run` is a run under the lock of these tests.
    fn start(world: &World) -> Self {
        Self::without(world, &["bash", "--norc", "--noprofile", "-i"])
    }

    /// This program in the place of the shell.
    fn without(world: &World, program_and_arguments: &[&str]) -> Self {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let device = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
        let side = || File::options().read(true).write(true).open(&device).unwrap();
        let as_it_runs = command(Some(world.database.url()));
        let variables = as_it_runs.get_envs();
        let mut path = program().parent().unwrap().as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        let child = Command::new("setsid")
            .arg("--ctty")
            .args(program_and_arguments)
            .env_clear()
            .envs(variables.filter_map(|(name, value)| Some((name, value?))))
            .env("RUST_LOG", "warn")
            .env("PATH", path)
            .env("run", "leasehold run --name deploy")
            .envs([("TERM", "dumb"), ("PS1", PROMPT), ("HISTFILE", "/dev/null")])
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap();
        let mut writer = File::from(terminal);
        let screen = Arc::<Mutex<String>>::default();
        let (mut reader, shown) = (writer.try_clone().unwrap(), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..length]);
                shown.lock().unwrap().push_str(&text);
            }
        });
        // What nobody reads must not hold up the test.
        let (keyboard, pressed) = mpsc::channel::<String>();
        std::thread::spawn(move || {
            for keys in pressed {
                writer.write_all(keys.as_bytes()).unwrap();
            }
        });
        Self {
            child,
            keyboard,
            screen,
            seen: 0,
        }
    }

    fn press(&self, keys: &str) {
        self.keyboard.send(keys.to_owned()).unwrap();
    }

    /// Waits until something is on the screen, below what was waited for before.
    async fn shows(&mut self, what: &str) {
        let screen = Arc::clone(&self.screen);
        let mut seen = self.seen;
        eventually(&format!("{what:?} is on the screen"), async || {
            let screen = screen.lock().unwrap();
            let Some(at) = screen[seen..].find(what) else {
                return false;
            };
            seen += at + what.len();
            true
        })
        .await;
        self.seen = seen;
    }

    /// The rest of the line that was waited for.
    async fn line(&mut self) -> String {
        let start = self.seen;
        self.shows("\r\n").await;
        let screen = self.screen.lock().unwrap();
        screen[start..].lines().next().unwrap().to_owned()
    }

    /// Types a line for the shell, when it prompts: what is typed before may be thrown away with what a key has
    /// interrupted. It is on the screen as well, and must look otherwise than what it prints.
    async fn enter(&mut self, line: &str) {
        self.shows(PROMPT).await;
        self.press(&format!("{line}\n"));
    }

    /// All that a line makes the shell say before it prompts again.
    async fn output(&mut self, line: &str) -> String {
        self.enter(line).await;
        let start = self.seen;
        self.shows(PROMPT).await;
        self.seen -= PROMPT.len();
        self.screen.lock().unwrap()[start..self.seen].to_owned()
    }

    /// The shell itself answers, so it has the terminal.
    async fn is_back(&mut self) {
        self.enter("echo the sh''ell").await;
        self.shows("the shell").await;
    }

    async fn says_code(&mut self, code: u8) {
        self.enter("echo co''de $?").await;
        self.shows(&format!("code {code}\r\n")).await;
    }

    /// Types a line for a command that answers each, which shows that it has the terminal.
    async fn answers(&mut self, word: &str) {
        self.press(&format!("{word}\n"));
        self.shows(&format!("got {word}")).await;
    }

    /// Stops the job that has the terminal.
    async fn suspend(&mut self) {
        self.press(CTRL_Z);
        self.shows("Stopped").await;
        self.is_back().await;
    }

    /// Stops the job that has the terminal, with this process in it, and lets it go on there.
    async fn suspend_for_a_while(&mut self, process: &str) {
        self.suspend().await;
        assert_eq!(state(process), Some('T'));
        self.foreground().await;
        eventually("it goes on", async || state(process) != Some('T')).await;
    }

    /// Stops nothing where no shell can let it go on.
    async fn suspends_nothing(&mut self) {
        self.press(CTRL_Z);
        self.shows("^Z").await;
        // What is typed just behind the key may be thrown away with what it has interrupted.
        eventually("it goes on", async || {
            tokio::time::timeout(Duration::from_secs(1), self.answers("two"))
                .await
                .is_ok()
        })
        .await;
    }

    /// Answers the process that the command tells.
    async fn starts(&mut self, line: &str) -> String {
        self.enter(line).await;
        self.shows("command ").await;
        self.line().await
    }

    /// The shell may prompt above or below what the command tells.
    async fn starts_in_background(&mut self, line: &str) -> String {
        let command = self.starts(&format!("{line} &")).await;
        self.press("echo the sh''ell\n");
        self.shows("the shell").await;
        command
    }

    /// Lets the job that was stopped go on.
    async fn foreground(&mut self) {
        self.enter("fg").await;
        self.shows("$run --").await;
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the screen:\n{}", self.screen.lock().unwrap());
            let processes = Command::new("ps")
                .args([
                    "-s",
                    &self.child.id().to_string(),
                    "-o",
                    "pid,ppid,pgid,tpgid,stat,wchan:20,args",
                ])
                .output();
            if let Ok(processes) = processes {
                eprintln!("its processes:\n{}", String::from_utf8_lossy(&processes.stdout));
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn pid(process: &str) -> Pid {
    Pid::from_raw(process.parse().unwrap()).unwrap()
}

async fn is_free(world: &World) -> bool {
    world.api.send(get(LOCK)).await.status == 404
}

/// A loop that reads nothing.
const WAITS: &str = "-- sh -c 'echo com\"\"mand $$; while :; do sleep 0.1; done'";

/// A loop that answers each line that is typed.
const ANSWERS: &str = "-- sh -c 'echo be\"\"gun; while read x; do echo \"go\"t $x; done'";

#[tokio::test(flavor = "multi_thread")]
async fn the_command_reads_what_is_typed() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    shell.enter(&format!("$run {ANSWERS}")).await;
    shell.shows("begun").await;
    shell.answers("one").await;
    shell.press(CTRL_D);
    shell.says_code(0).await;
    assert!(is_free(&world).await);
}

/// A pager, say.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_is_piped_into_reads_what_is_typed() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    let reads = "bash -c 'exec 3</dev/tty; while read x <&3; do echo \"go\"t $x; done; kill $(head -1)'";
    shell
        .enter(&format!(
            "$run -- sh -c 'echo $$; echo be\"\"gun >&2; exec sleep 1000' | {reads}"
        ))
        .await;
    shell.shows("begun").await;
    shell.answers("one").await;
    shell.answers("two").await;
    shell.suspend().await;
    shell.foreground().await;
    shell.answers("three").await;
    shell.press(CTRL_D);
    shell.says_code(0).await;
    assert!(is_free(&world).await);
}

/// Two that want the terminal at once do not get on, but none goes on without the other, or without the lock.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_stops_a_pipe_stops_the_command() {
    let world = World::start("lease").await;
    for wants in ["read y </dev/tty", "stty echo </dev/tty"] {
        let mut shell = Shell::start(&world);
        let command = "echo com\"\"mand $$ >&2; read x; echo $x; exec sleep 1000";
        shell
            .enter(&format!(
                "$run --wait 30s -- sh -c '{command}' | bash -c 'read x; {wants}'"
            ))
            .await;
        shell.shows("command ").await;
        let command = shell.line().await;
        shell.press("one\n");
        shell.shows("Stopped").await;
        assert_eq!(state(&command), Some('T'), "{wants}");
        shell.enter("kill %1; fg").await;
    }
}

/// Where the standard streams go says nothing of the keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirected_command_has_the_terminal_all_the_same() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    let reads = "echo com\"\"mand $$; read x </dev/tty; echo \"go\"t $x; read x </dev/tty";
    let command = shell.starts(&format!("$run -- sh -c '{reads}' </dev/null")).await;
    shell.answers("one").await;
    shell.suspend_for_a_while(&command).await;
    shell.press(CTRL_C);
    shell.says_code(130).await;
    // Also one that never had it.
    let command = shell.starts(&format!("$run {WAITS} </dev/null")).await;
    shell.suspend_for_a_while(&command).await;
    shell.press(CTRL_BACKSLASH);
    shell.says_code(131).await;
    assert!(is_free(&world).await);
}

/// What is to be said waits for Ctrl-Q; the end of a command whose lock is lost does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_that_takes_nothing_holds_up_no_end() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    let stays = "trap \"\" TERM; echo com\"\"mand $$; while :; do sleep 0.1; done";
    let command = shell.starts(&format!("$run --ttl 5s -- sh -c '{stays}'")).await;
    shell.press(CTRL_S);
    let forced = world.api.send(delete(format!("{LOCK}?reason=stuck"))).await;
    forced.expect(200);
    eventually("the command has ended", async || state(&command).is_none()).await;
    shell.press(CTRL_Q);
    shell.says_code(70).await;
}

/// As after `ssh -t host leasehold run`: nobody could let it go on.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_shell_ctrl_z_stops_nothing() {
    let world = World::start("lease").await;
    let answers = "echo begun; while read x; do echo \"got $x\"; done";
    let run = program().to_str().unwrap();
    let mut shell = Shell::without(
        &world,
        &[run, "run", "--name", "deploy", "--", "sh", "-c", answers],
    );
    shell.shows("begun").await;
    shell.answers("one").await;
    shell.suspends_nothing().await;
    shell.press(CTRL_D);
    eventually("it has ended", async || shell.child.try_wait().unwrap().is_some()).await;
    assert!(is_free(&world).await);
}

/// As in a sandbox, or after `nsenter`: our session and our group are of another process namespace, and have no number in
/// ours.
#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_of_another_namespace_is_lent_as_well() {
    let mut namespace = vec!["unshare", "--pid", "--fork", "--kill-child"];
    if !rustix::process::geteuid().is_root() {
        namespace.extend(["--user", "--map-root-user"]);
    }
    let is_allowed = Command::new(namespace[0])
        .args(&namespace[1..])
        .arg("true")
        .status();
    if !is_allowed.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine allows no process namespaces");
        return;
    }
    let world = World::start("lease").await;
    let answers = "echo begun; while read x; do echo \"got $x\"; done";
    let run = program().to_str().unwrap();
    // The first process of a namespace is no ordinary one.
    let from_a_shell = format!("\"$0\" run --name deploy -- sh -c '{answers}'; echo co\"\"de $?");
    let mut shell = Shell::without(
        &world,
        &[&namespace[..], &["sh", "-c", &from_a_shell, run]].concat(),
    );
    shell.shows("begun").await;
    shell.answers("one").await;
    shell.suspends_nothing().await;
    shell.press(CTRL_D);
    shell.shows("code 0").await;
    assert!(is_free(&world).await);
    // In the background it is not lent.
    let mut shell = Shell::start(&world);
    let run = format!("{} $run {WAITS}", namespace.join(" "));
    shell.starts_in_background(&run).await;
    shell.foreground().await;
    shell.press(CTRL_C);
    shell.says_code(130).await;
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_command_and_frees_the_lock() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    shell.enter(&format!("$run {WAITS}")).await;
    shell.shows("command ").await;
    shell.press(CTRL_C);
    shell.says_code(130).await;
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_z_gives_the_terminal_to_the_shell_and_fg_takes_it_back() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    shell.enter(&format!("$run {ANSWERS}")).await;
    shell.shows("begun").await;
    shell.answers("one").await;
    for word in ["two", "three"] {
        shell.suspend().await;
        shell.foreground().await;
        shell.answers(word).await;
    }
    shell.press(CTRL_D);
    shell.says_code(0).await;
    assert!(is_free(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_background_it_leaves_the_terminal_to_the_shell() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    // It reads when it is told to: a job that is stopped again just as it was let go on is Running for ever in the eyes
    // of bash, whatever the job is.
    let reads = "while read x; do echo \"go\"t $x; done";
    let told = format!("trap t=1 USR1; echo com\"\"mand $$; while [ ! $t ]; do sleep 0.1; done; {reads}");
    // Both ways there: sent there, and started there.
    for there in ["bg", "&"] {
        let command = if there == "bg" {
            let command = shell.starts(&format!("$run -- sh -c '{told}'")).await;
            shell.suspend().await;
            shell.enter("bg").await;
            eventually("it goes on", async || state(&command) != Some('T')).await;
            command
        } else {
            shell
                .starts_in_background(&format!("$run -- sh -c '{told}'"))
                .await
        };
        shell.is_back().await;
        // It wants to read, and may not: the shell says so before it prompts.
        kill_process(pid(&command), Signal::USR1).unwrap();
        eventually("the shell has seen it stop", async || {
            shell.output("jobs").await.contains("Stopped")
        })
        .await;
        assert_eq!(state(&command), Some('T'));
        assert!(!is_free(&world).await);
        shell.foreground().await;
        shell.answers("one").await;
        shell.press(CTRL_D);
        shell.says_code(0).await;
        assert!(is_free(&world).await);
    }
    // One that reads nothing comes to its end there, and takes nothing along.
    shell.enter("$run -- true & wait $!").await;
    shell.says_code(0).await;
    shell.is_back().await;
}

/// Ctrl-Z stops the command also when it has never had the terminal.
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_z_stops_what_was_started_in_the_background() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    let command = shell.starts_in_background(&format!("$run {WAITS}")).await;
    shell.foreground().await;
    shell.suspend_for_a_while(&command).await;
    shell.press(CTRL_C);
    shell.says_code(130).await;
    assert!(is_free(&world).await);
}

/// Whoever stops a run stops its renewals. What it finds when it goes on is not its own any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_was_lost_while_it_was_stopped_lets_nothing_go_on() {
    let world = World::start("lease").await;
    let mut shell = Shell::start(&world);
    // It would say so if it was let go on.
    let tells = "trap \"echo aw\"ake CONT; echo be\"\"gun; while read x; do echo \"go\"t $x; done";
    shell.enter(&format!("$run --ttl 3s -- bash -c '{tells}'")).await;
    shell.shows("begun").await;
    shell.answers("one").await;
    shell.press(CTRL_Z);
    shell.shows("Stopped").await;
    let body = json!({"ttl_ms": 60_000, "wait_ms": 30_000});
    let acquired = world.api.send(post(format!("{LOCK}/acquire"), &body)).await;
    acquired.expect(200);
    shell.enter("fg").await;
    shell.shows("the lock was lost").await;
    shell.says_code(70).await;
    let screen = shell.screen.lock().unwrap();
    let (_, since) = screen.rsplit_once("Stopped").unwrap();
    assert!(!since.contains("awake"), "{since}");
}
