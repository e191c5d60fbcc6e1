//! [`Terminal`]: lends the terminal to a command that is a process group of its own.
//!
//! A terminal listens to one group: who reads from it and is not in that group is stopped, and only that group gets what
//! Ctrl-C and Ctrl-Z send.

use std::thread;

use nix::sys::signal::{SigSet, Signal as BlockedSignal};
use rustix::process::{Pid, getpgrp};
use rustix::stdio::stdin;
use rustix::termios::{tcgetpgrp, tcsetpgrp};

/// The terminal that standard input is.
#[derive(Debug)]
pub(crate) struct Terminal {
    own_group: Pid,
    command: Pid,
}

impl Terminal {
    /// `None` when standard input is no terminal.
    pub(crate) fn of_stdin(command: Pid) -> Option<Self> {
        tcgetpgrp(stdin()).ok()?;
        Some(Self {
            own_group: getpgrp(),
            command,
        })
    }

    /// Whether it listens to us or to the command, and not to a shell that has put us into the background.
    pub(crate) fn is_in_foreground(&self) -> bool {
        self.is_with(self.own_group) || self.is_with(self.command)
    }

    /// Makes it listen to the command, if it listens to us. In the background it is not ours to lend.
    pub(crate) fn lend(&self) {
        if self.is_with(self.own_group) {
            listen_to(self.command);
        }
    }

    /// Makes it listen to us again, if it listens to the command, and answers whether it did.
    pub(crate) fn take_back(&self) -> bool {
        let lent = self.is_with(self.command);
        if lent {
            listen_to(self.own_group);
        }
        lent
    }

    fn is_with(&self, group: Pid) -> bool {
        tcgetpgrp(stdin()) == Ok(group)
    }
}

/// Whoever does this from behind is stopped, unless the thread blocks the signal that does so.
fn listen_to(group: Pid) {
    let set = thread::spawn(move || -> std::io::Result<()> {
        SigSet::from(BlockedSignal::SIGTTOU).thread_block()?;
        tcsetpgrp(stdin(), group)?;
        Ok(())
    });
    match set.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the terminal listens to whom it listened before"),
        Err(_) => tracing::debug!("the terminal listens to whom it listened before"),
    }
}
