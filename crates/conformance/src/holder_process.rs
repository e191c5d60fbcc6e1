//! A process that holds a lock, so that a clause can end it in every way a process ends.

use std::env;
use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::Provider;
use crate::patience::within_cap;

const NAME: &str = "LEASEHOLD_CONFORMANCE_NAME";
const TTL_MS: &str = "LEASEHOLD_CONFORMANCE_TTL_MS";
const HELD: &str = "conformance: held";
const RELEASED: &str = "conformance: released";

/// Who holds in the other process.
pub(crate) fn child_holder() -> Holder {
    Holder::new("conformance child", "hold as told")
}

/// The test binary that runs just now, told to run only its ignored test `test` (its full path): that test
/// connects to the backend and calls [`hold_as_told`].
///
/// ```ignore
/// #[tokio::test]
/// #[ignore = "a process for the clauses about processes"]
/// async fn lease_holder() {
///     let url = std::env::var("CONFORMANCE_URL").unwrap(); // set by the provider on the command
///     leasehold_conformance::hold_as_told(connect(&url).await).await;
/// }
/// ```
pub fn this_test_binary(test: &str) -> Command {
    let binary = env::current_exe().expect("a test binary knows where it is");
    let mut command = Command::new(binary);
    command.args([test, "--exact", "--ignored", "--nocapture"]);
    command
}

/// In the other process: acquires what the clause asked for, says so, and does what it is told. Returns once it
/// was told to release; told to exit, or left alone, it ends the process with the lock held.
pub async fn hold_as_told(lock: Arc<dyn DistributedLock>) {
    let name = env::var(NAME).expect("a clause starts this process");
    let ttl_ms = env::var(TTL_MS).expect("a clause starts this process");
    let request = LockRequest::new(LockName::decode(&name).expect("an encoded name"), child_holder())
        .with_ttl(Duration::from_millis(ttl_ms.parse().expect("milliseconds")));
    let guard = lock.try_acquire(&request).await.expect("the lock is free");
    say(HELD);
    let order = tokio::task::spawn_blocking(|| std::io::stdin().lines().next()).await;
    match order.expect("reading does not panic") {
        Some(Ok(order)) if order == "release" => {
            lock.release(guard).await.expect("the backend is there");
            say(RELEASED);
        }
        // Not a return: that would drop the guard, and a process that just ends does not.
        _ => std::process::exit(0),
    }
}

fn say(line: &str) {
    // Written past the test harness, which captures `println!`. A parent that is gone does not listen.
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// The clause's end of such a process. Dropped, it is killed.
pub(crate) struct HolderProcess {
    child: Child,
    orders: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl HolderProcess {
    /// Starts it and waits until it holds; `None` where the backend lives in one process.
    pub(crate) async fn start<P: Provider>(provider: &P, name: &LockName, ttl: Duration) -> Option<Self> {
        let command = provider.holder_process();
        assert_eq!(
            command.is_some(),
            provider.abilities().processes,
            "the abilities say whether there are processes"
        );
        let mut child = command?
            .env(NAME, name.encoded())
            .env(TTL_MS, ttl.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the process starts");
        let orders = child.stdin.take().expect("its input is a pipe");
        let output = child.stdout.take().expect("its output is a pipe");
        let mut process = Self {
            child,
            orders,
            lines: BufReader::new(output).lines(),
        };
        process.hear(HELD).await;
        Some(process)
    }

    /// Has it release and end.
    pub(crate) async fn release(mut self) {
        self.order("release\n").await;
        self.hear(RELEASED).await;
        self.ended().await;
    }

    /// Has it end by itself with the lock held.
    pub(crate) async fn exit(mut self) {
        self.order("exit\n").await;
        self.ended().await;
    }

    /// Kills it at once.
    pub(crate) async fn kill(mut self) {
        self.child.start_kill().expect("it lives");
        self.ended().await;
    }

    async fn order(&mut self, order: &str) {
        self.orders.write_all(order.as_bytes()).await.expect("it listens");
    }

    async fn ended(&mut self) {
        let ended = within_cap("the end of the process", self.child.wait()).await;
        ended.expect("the process can be waited for");
    }

    /// Reads on until it says `line`; a test harness says much besides.
    async fn hear(&mut self, line: &str) {
        let heard = within_cap(line, async {
            while let Some(said) = self.lines.next_line().await.expect("its output is text") {
                // The harness prints the name of the test and no line break before the test runs.
                if said.ends_with(line) {
                    return true;
                }
            }
            false
        });
        assert!(heard.await, "the process ended before it said {line:?}");
    }
}
