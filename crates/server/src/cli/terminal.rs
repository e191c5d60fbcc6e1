//! [`Terminal`]: lends the terminal to a command that is a process group of its own.
//!
//! A terminal listens to one group: who reads from it and is not in that group is stopped, and only that group gets what
//! Ctrl-C and Ctrl-Z send.

use std::thread;

use nix::sys::signal::{SigSet, Signal as BlockedSignal};
use rustix::process::{Pid, Signal, getpgrp, kill_process_group};
use rustix::stdio::stdin;
use rustix::termios::{tcgetpgrp, tcsetpgrp};

/// The terminal that standard input is, while it listens to us.
#[derive(Debug)]
pub(crate) struct Terminal {
    own_group: Pid,
}

impl Terminal {
    /// `None` when standard input is no terminal, or one that listens to somebody else.
    pub(crate) fn of_stdin() -> Option<Self> {
        let own_group = getpgrp();
        let listens_to = tcgetpgrp(stdin()).ok()?;
        (listens_to == own_group).then_some(Self { own_group })
    }

    /// Makes it listen to another group, which may have been stopped because it did not.
    pub(crate) fn lend(&self, group: Pid) {
        listen_to(group);
        // It may have ended.
        _ = kill_process_group(group, Signal::CONT);
    }

    /// Makes it listen to us again.
    pub(crate) fn take_back(&self) {
        listen_to(self.own_group);
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
