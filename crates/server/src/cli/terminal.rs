//! [`Terminal`]: lends the terminal to a command that is a process group of its own.
//!
//! A terminal listens to one group: who reads from it and is not in that group is stopped, and only that group gets what
//! Ctrl-C and Ctrl-Z send.
//!
//! In a sandbox, or after `nsenter`, our group and our session may be of the process namespace outside: then their number
//! is 0 here (`pid_namespaces(7)`), and nothing here can make the terminal listen to them again: that is left to the shell
//! outside.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;

use nix::libc::O_NONBLOCK;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getpgrp, getppid, getsid, tcgetpgrp, tcsetpgrp};

/// The terminal of this session, wherever the standard streams go.
#[derive(Debug)]
pub(crate) struct Terminal {
    device: File,
    command: Pid,
    lent: bool,
}

impl Terminal {
    /// `None` when the session has none.
    pub(crate) fn of_session(command: i32) -> Option<Self> {
        let device = File::options()
            .read(true)
            .write(true)
            .custom_flags(O_NONBLOCK)
            .open("/dev/tty");
        Some(Self {
            device: device.ok()?,
            command: Pid::from_raw(command),
            lent: false,
        })
    }

    /// Whether it listens to us or to the command, and not to a shell that has put us into the background.
    pub(crate) fn is_in_foreground(&self) -> bool {
        self.listens_to_us() || self.listens_to() == Some(self.command)
    }

    /// Makes it listen to the command, if it listens to us. In the background it is not ours to lend.
    pub(crate) fn lend(&mut self) {
        if self.listens_to_us() {
            self.lent = true;
            self.listen_to(self.command);
        }
    }

    /// Makes it listen to us again if it was lent, whomever the command has lent it to, but takes it from no shell.
    /// Answers whether it was lent.
    pub(crate) fn take_back(&mut self) -> bool {
        let lent = std::mem::take(&mut self.lent);
        let is_with_the_shell = getpgrp() != session() && self.listens_to() == Some(session());
        if lent && !is_with_the_shell {
            self.listen_to(getpgrp());
        }
        lent
    }

    fn listens_to(&self) -> Option<Pid> {
        tcgetpgrp(&self.device).ok()
    }

    /// Where our group has no number, a `read` of no bytes tells: Linux fails one in the background, when the signal that
    /// would stop the reader is blocked. While another reads it would wait, were the device not opened to answer at once.
    fn listens_to_us(&self) -> bool {
        if getpgrp().as_raw() > 0 {
            return self.listens_to() == Some(getpgrp());
        }
        let read = unstopped_by(Signal::SIGTTIN, || (&self.device).read(&mut []));
        read.is_ok() || read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    fn listen_to(&self, group: Pid) {
        let done = unstopped_by(Signal::SIGTTOU, || Ok(tcsetpgrp(&self.device, group)?));
        if let Err(error) = done {
            tracing::debug!(%error, "the terminal listens to whom it listened before");
        }
    }
}

/// On a thread that blocks the signal.
fn unstopped_by<T: Send>(signal: Signal, call: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let called = thread::Builder::new().spawn_scoped(scope, || {
            SigSet::from(signal).thread_block()?;
            call()
        });
        called?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread for it panicked")))
    })
}

/// The group of the session's leader, as a rule the shell's.
fn session() -> Pid {
    getsid(None).unwrap_or_else(|_| getpgrp())
}

/// Whether a shell of this session would notice that we stop, and could let us go on. POSIX calls the group of those that
/// have none orphaned, and lets no key stop it.
pub(crate) fn has_a_shell() -> bool {
    // A parent outside of our namespace is 0 here, and asking for the session of 0 would ask for our own.
    let parent = Some(getppid()).filter(|parent| parent.as_raw() > 0);
    let parents = parent.and_then(|parent| getsid(Some(parent)).ok());
    getpgrp() != session() && parents == Some(session())
}
