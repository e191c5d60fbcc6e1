//! [`Process`]: what all locks of one process share.

use std::sync::Arc;

use leasehold_domain::LockName;
use uuid::Uuid;

use crate::advisory::session::Sessions;
use crate::advisory::watch::Watch;
use crate::connect::ConnectOptions;
use crate::holds::{Holds, Scope};
use crate::keeper::Keeper;
use crate::lease::reaper::{Lease, Reaper};
use crate::lease::renewer::Renewer;
use crate::pool::Pool;
use crate::presence;
use crate::signals::{self, Signals};
use crate::startup::Findings;
use crate::waiting::Queues;
use crate::waits::Waits;

/// The shared parts. It lives as long as a guard does: a guard must be able to release.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) options: ConnectOptions,
    pub(crate) findings: Findings,
    pub(crate) pool: Pool,
    pub(crate) keeper: Keeper,
    pub(crate) holds: Holds,
    /// What this process is called in `leasehold.presence`.
    pub(crate) id: Uuid,
    pub(crate) waits: Waits,
    /// Who waits for a lease, and who for a transaction lock: other locks, which may have the same names.
    pub(crate) queues: Queues,
    pub(crate) transaction_queues: Queues,
    pub(crate) signals: Signals,
    pub(crate) sessions: Sessions,
    pub(crate) renewer: Renewer,
    pub(crate) reaper: Reaper,
    pub(crate) watch: Watch,
}

impl Process {
    pub(crate) fn start(
        options: ConnectOptions,
        pool_size: u32,
        findings: Findings,
    ) -> std::io::Result<Arc<Self>> {
        let keeper = Keeper::start()?;
        let holds = Holds::default();
        let queues = Queues::default();
        let signals = Signals::start(&keeper, options.clone(), !findings.pooled);
        let renewer = Renewer::start(&keeper, options.clone(), holds.clone());
        let reaper = Reaper::new(keeper.clone(), options.clone(), queues.clone(), signals.clone());
        let (id, waits) = (Uuid::new_v4(), Waits::default());
        presence::start(&keeper, options.clone(), id, holds.clone(), waits.clone());
        let sessions = Sessions::start(&keeper, &options, findings.lock_budget, &holds, &signals);
        let pool = Pool::new(options.clone(), pool_size);
        let process = Arc::new(Self {
            options,
            findings,
            pool,
            keeper,
            holds,
            id,
            waits,
            queues,
            transaction_queues: Queues::default(),
            signals,
            sessions,
            renewer,
            reaper,
            watch: Watch::default(),
        });
        Watch::start(&process);
        Ok(process)
    }

    /// Gives back the leases whose guards still live: no other hold outlives the process.
    pub(crate) fn end_leases(&self) {
        for hold in self.holds.leases() {
            let Scope::Lease(lease) = hold.scope else { continue };
            let parts = hold.control.parts();
            // What was handed over meanwhile is its client's.
            if self.holds.lose(parts.lock_id) && !lease.has_ended() {
                self.reaper.release(Lease {
                    table: Arc::clone(&lease.table),
                    keys: lease.keys.clone(),
                    name: parts.name.clone(),
                    lock_id: parts.lock_id,
                });
            }
        }
    }

    /// Tells everybody who waits that this process has freed a name.
    pub(crate) fn freed(&self, name: &LockName) {
        self.queues.freed(name);
        self.transaction_queues.freed(name);
        self.signals.freed(signals::key(name));
    }
}
