//! [`Holds`]: what this process holds, so that renewals, fences and releases find it by its id.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use leasehold_domain::{HoldControl, LockId, LockName};

use crate::advisory::AdvisoryKey;
use crate::advisory::transaction::OpenTransaction;
use crate::lease::LeaseHold;
use crate::observe;

/// The holds of one process. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holds {
    table: Arc<Mutex<Table>>,
}

/// Each kind by itself: who looks after the few transactions often must not pass by a hundred thousand leases.
#[derive(Debug, Default)]
struct Table {
    leases: HashMap<LockId, Hold>,
    transactions: HashMap<LockId, Hold>,
    sessions: HashMap<LockId, Hold>,
    /// The latest transaction-scoped hold of each name.
    by_name: HashMap<LockName, LockId>,
    /// Holds that are just being taken up again.
    resuming: HashSet<LockId>,
}

impl Table {
    fn get(&self, lock_id: LockId) -> Option<&Hold> {
        let kinds = [&self.leases, &self.transactions, &self.sessions];
        kinds.into_iter().find_map(|holds| holds.get(&lock_id))
    }

    fn of(&mut self, scope: &Scope) -> &mut HashMap<LockId, Hold> {
        match scope {
            Scope::Lease(_) => &mut self.leases,
            Scope::Transaction(_) => &mut self.transactions,
            Scope::Session { .. } => &mut self.sessions,
        }
    }
}

/// One hold.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    pub(crate) control: HoldControl,
    pub(crate) scope: Scope,
}

/// While it lives nobody else of this process takes up the hold.
#[must_use]
pub(crate) struct Resuming<'a> {
    holds: &'a Holds,
    lock_id: LockId,
}

impl Drop for Resuming<'_> {
    fn drop(&mut self) {
        self.holds.table().resuming.remove(&self.lock_id);
    }
}

/// What keeps a hold alive.
#[derive(Clone, Debug)]
pub(crate) enum Scope {
    /// A row that must be renewed.
    Lease(Arc<LeaseHold>),
    /// A transaction that must stay open.
    Transaction(Arc<OpenTransaction>),
    /// A session that it shares with others.
    Session { key: AdvisoryKey, backend_pid: i32 },
}

impl Holds {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, control: HoldControl, scope: Scope) {
        metrics::gauge!("leasehold_lock_held", "backend" => scope.backend()).increment(1);
        let (lock_id, name) = (control.parts().lock_id, control.parts().name.clone());
        let mut table = self.table();
        if let Scope::Transaction(_) = scope {
            table.by_name.insert(name, lock_id);
        }
        table.of(&scope).insert(lock_id, Hold { control, scope });
    }

    pub(crate) fn get(&self, lock_id: LockId) -> Option<Hold> {
        self.table().get(lock_id).cloned()
    }

    /// Begins to take up a hold that has no guard here. `None` when it has one, or somebody else is about to get it.
    pub(crate) fn resume(&self, lock_id: LockId) -> Option<Resuming<'_>> {
        let mut table = self.table();
        if table.get(lock_id).is_some() || !table.resuming.insert(lock_id) {
            return None;
        }
        Some(Resuming { holds: self, lock_id })
    }

    /// The transaction-scoped hold of a name in this process, unless its transaction has ended and only its
    /// guard still lives.
    pub(crate) fn transaction(&self, name: &LockName) -> Option<Hold> {
        let table = self.table();
        let hold = table.transactions.get(table.by_name.get(name)?)?;
        match &hold.scope {
            Scope::Transaction(open) if !open.has_ended() => Some(hold.clone()),
            _ => None,
        }
    }

    /// Forgets a hold that has ended. Answers it to the one who ends it, and `None` to everybody after.
    pub(crate) fn remove(&self, lock_id: LockId) -> Option<Hold> {
        let hold = self.hand_over(lock_id)?;
        observe::held(hold.scope.backend(), hold.control.held_for());
        Some(hold)
    }

    /// Forgets a hold, which somebody else goes on with.
    pub(crate) fn hand_over(&self, lock_id: LockId) -> Option<Hold> {
        let hold = {
            let table = &mut *self.table();
            let kinds = [&mut table.leases, &mut table.transactions, &mut table.sessions];
            let hold = kinds.into_iter().find_map(|holds| holds.remove(&lock_id))?;
            let name = &hold.control.parts().name;
            if table.by_name.get(name) == Some(&lock_id) {
                table.by_name.remove(name);
            }
            hold
        };
        metrics::gauge!("leasehold_lock_held", "backend" => hold.scope.backend()).decrement(1);
        Some(hold)
    }

    /// Forgets a hold that has ended without our release, and tells its guard. Answers whether it was still there.
    pub(crate) fn lose(&self, lock_id: LockId) -> bool {
        let Some(hold) = self.remove(lock_id) else {
            return false;
        };
        metrics::counter!("leasehold_lock_lost_total", "backend" => hold.scope.backend()).increment(1);
        tracing::warn!(lock = hold.control.parts().name.to_string(), %lock_id, "a lock was lost");
        hold.control.lose();
        true
    }

    pub(crate) fn leases(&self) -> Vec<Hold> {
        self.table().leases.values().cloned().collect()
    }

    pub(crate) fn transactions(&self) -> Vec<Hold> {
        self.table().transactions.values().cloned().collect()
    }

    pub(crate) fn sessions(&self) -> Vec<Hold> {
        self.table().sessions.values().cloned().collect()
    }
}

impl Hold {
    /// The session of the server that has the lock, where the server only knows that.
    pub(crate) fn backend_pid(&self) -> Option<i32> {
        match &self.scope {
            Scope::Lease(_) => None,
            Scope::Transaction(open) => Some(open.backend_pid),
            Scope::Session { backend_pid, .. } => Some(*backend_pid),
        }
    }
}

impl Scope {
    pub(crate) fn backend(&self) -> &'static str {
        match self {
            Self::Lease(_) => "lease",
            Self::Transaction(_) => "transaction",
            Self::Session { .. } => "session",
        }
    }
}
