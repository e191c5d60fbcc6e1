//! Tells the guards of transaction locks that their transaction is gone: the connection ended, or `max_hold` did.

use std::sync::{Arc, Weak};
use std::time::Duration;

use leasehold_domain::MonotonicClock;
use tokio::sync::Notify;

use crate::clock::Boottime;
use crate::holds::Scope;
use crate::process::Process;
use crate::transaction::rollback;

/// How often the connections are looked at while there are any. It asks the sockets' drivers, not the server.
const LOOK: Duration = Duration::from_millis(20);

/// Wakes the watcher when there is something to watch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    wake: Arc<Notify>,
}

impl Watch {
    pub(crate) fn begin(&self) {
        self.wake.notify_one();
    }

    /// Watches on the keeper's thread, until the process is gone.
    pub(crate) fn start(process: &Arc<Process>) {
        let (wake, keeper) = (Arc::clone(&process.watch.wake), &process.keeper);
        let process = Arc::downgrade(process);
        keeper.spawn(async move {
            while let Some(watching) = look(&process) {
                if watching {
                    tokio::time::sleep(LOOK).await;
                } else {
                    wake.notified().await;
                }
            }
        });
    }
}

/// Looks at every hold once. Answers whether there are any, and `None` when the process is gone.
fn look(process: &Weak<Process>) -> Option<bool> {
    let process = process.upgrade()?;
    let now = Boottime.now();
    let mut watching = false;
    for hold in process.holds.transactions() {
        let Scope::Transaction(open) = &hold.scope else {
            continue;
        };
        watching = true;
        if open.has_ended() || (now < open.ends && !open.is_broken()) {
            continue;
        }
        let parts = hold.control.parts();
        process.holds.lose(parts.lock_id);
        let (process, open, name) = (Arc::clone(&process), Arc::clone(open), parts.name.clone());
        // Beside the others, which may be told while a server that is silent is waited for.
        process.keeper.clone().finish(async move {
            if let Some((checkout, _)) = open.take().await {
                rollback(checkout).await;
                process.freed(&name);
            }
        });
    }
    Some(watching)
}
