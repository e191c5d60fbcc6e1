//! The process that ends the server when ours is gone.
//!
//! A shell waits at the other end of a pipe. When this process dies, the kernel closes the pipe, whatever
//! the reason was: none of our code has to run for it. (Linux can signal a child at the death of its
//! parent, but means the *thread* that spawned it, and it takes unsafe code.)

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::Error;

/// `$0` the server's process id, `$1` the signal that ends it, `$2` a folder to remove or nothing.
/// A line means that the server was stopped and reaped: its process id may be somebody else's by now.
const SCRIPT: &str = r#"
read -r _ && exit
kill -s "$1" "$0" 2>/dev/null
[ -n "$2" ] || exit
n=0
while kill -0 "$0" 2>/dev/null && [ $n -lt 200 ]; do sleep 0.05; n=$((n + 1)); done
rm -rf -- "$2"
"#;

#[derive(Debug)]
pub(crate) struct Watchdog {
    shell: Child,
    pipe: ChildStdin,
}

impl Watchdog {
    /// `remove`: a folder that nobody needs once the server has ended.
    pub(crate) fn start(server: u32, signal: &str, remove: Option<&Path>) -> Result<Self, Error> {
        let program = Path::new("/bin/sh");
        let mut shell = Command::new(program)
            .args(["-c", SCRIPT, &server.to_string(), signal])
            .args(remove)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null()) // whoever reads our output must not wait for this one to end
            .stderr(Stdio::null())
            .process_group(0) // ctrl-c in a terminal is for our process
            .spawn()
            .map_err(Error::io("run", program))?;
        match shell.stdin.take() {
            Some(pipe) => Ok(Self { shell, pipe }),
            None => Err(Error::Failed {
                program: "sh",
                said: "no pipe to its standard input".to_owned(),
            }),
        }
    }

    /// Ends the watch after the server was reaped.
    pub(crate) fn dismiss(mut self) {
        // Fails only when somebody killed the shell, and then there is no watch to end.
        drop(self.pipe.write_all(b"ended\n"));
        drop(self.pipe);
        drop(self.shell.wait());
    }
}
