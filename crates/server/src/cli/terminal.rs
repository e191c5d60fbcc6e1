//! [`Terminal`]: lends the terminal to a command that is a process group of its own.
//!
//! A terminal listens to one group: who reads from it and is not in that group is stopped, and only that group gets what
//! Ctrl-C and Ctrl-Z send.

use std::fs::File;
use std::io;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{Pid, getpgrp, getppid, getsid};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

/// The terminal of this session, wherever the standard streams go.
#[derive(Debug)]
pub(crate) struct Terminal {
    device: File,
    own_group: Pid,
    command: Pid,
    lent: bool,
}

impl Terminal {
    /// `None` when the session has none.
    pub(crate) fn of_session(command: Pid) -> Option<Self> {
        Some(Self {
            device: File::options().read(true).write(true).open("/dev/tty").ok()?,
            own_group: getpgrp(),
            command,
            lent: false,
        })
    }

    /// Whether it listens to us or to the command, and not to a shell that has put us into the background.
    pub(crate) fn is_in_foreground(&self) -> bool {
        [Some(self.own_group), Some(self.command)].contains(&self.listens_to())
    }

    /// Makes it listen to the command, if it listens to us. In the background it is not ours to lend.
    pub(crate) fn lend(&mut self) {
        if self.listens_to() == Some(self.own_group) {
            self.lent = true;
            self.listen_to(self.command);
        }
    }

    /// Makes it listen to us again if it was lent, whomever the command has lent it to, but takes it from no shell.
    /// Answers whether it was lent.
    pub(crate) fn take_back(&mut self) -> bool {
        let lent = std::mem::take(&mut self.lent);
        let is_with_the_shell = self.own_group != session() && self.listens_to() == Some(session());
        if lent && !is_with_the_shell {
            self.listen_to(self.own_group);
        }
        lent
    }

    fn listens_to(&self) -> Option<Pid> {
        tcgetpgrp(&self.device).ok()
    }

    /// Whoever does this from behind is stopped, unless the thread blocks the signal that does so.
    fn listen_to(&self, group: Pid) {
        let done = thread::scope(|scope| {
            let set = scope.spawn(|| -> io::Result<()> {
                SigSet::from(Signal::SIGTTOU).thread_block()?;
                tcsetpgrp(&self.device, group)?;
                Ok(())
            });
            set.join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread for it panicked")))
        });
        if let Err(error) = done {
            tracing::debug!(%error, "the terminal listens to whom it listened before");
        }
    }
}

/// The group of the session's leader, as a rule the shell's.
fn session() -> Pid {
    getsid(None).unwrap_or_else(|_| getpgrp())
}

/// Whether a shell of this session would notice that we stop, and could let us go on. POSIX calls the group of those that
/// have none orphaned, and lets no key stop it.
pub(crate) fn has_a_shell() -> bool {
    let parents = getppid().and_then(|parent| getsid(Some(parent)).ok());
    getpgrp() != session() && parents == Some(session())
}
