//! [`Holds`]: what this process holds, so that renewals, fences and releases find it by its id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use leasehold_domain::{HoldControl, LockId, LockName};

use crate::advisory::AdvisoryKey;
use crate::advisory::transaction::OpenTransaction;
use crate::lease::LeaseHold;

/// The holds of one process. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holds {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    holds: HashMap<LockId, Hold>,
    /// Transaction-scoped holds by name: they are exclusive, so there is one.
    transactions: HashMap<LockName, LockId>,
}

/// One hold.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    pub(crate) control: HoldControl,
    pub(crate) scope: Scope,
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
            table.transactions.insert(name, lock_id);
        }
        table.holds.insert(lock_id, Hold { control, scope });
    }

    pub(crate) fn get(&self, lock_id: LockId) -> Option<Hold> {
        self.table().holds.get(&lock_id).cloned()
    }

    /// The transaction-scoped hold of a name in this process, unless its transaction has ended and only its
    /// guard still lives.
    pub(crate) fn transaction(&self, name: &LockName) -> Option<Hold> {
        let table = self.table();
        let hold = table.holds.get(table.transactions.get(name)?)?;
        match &hold.scope {
            Scope::Transaction(open) if !open.has_ended() => Some(hold.clone()),
            _ => None,
        }
    }

    /// Forgets a hold. Answers it to the one who ends it, and `None` to everybody after.
    pub(crate) fn remove(&self, lock_id: LockId) -> Option<Hold> {
        let hold = {
            let mut table = self.table();
            let hold = table.holds.remove(&lock_id)?;
            let name = &hold.control.parts().name;
            if table.transactions.get(name) == Some(&lock_id) {
                table.transactions.remove(name);
            }
            hold
        };
        let backend = hold.scope.backend();
        metrics::gauge!("leasehold_lock_held", "backend" => backend).decrement(1);
        metrics::histogram!("leasehold_lock_hold_seconds", "backend" => backend)
            .record(hold.control.held_for());
        Some(hold)
    }

    /// Forgets a hold that has ended without our release, and tells its guard.
    pub(crate) fn lose(&self, lock_id: LockId) {
        if let Some(hold) = self.remove(lock_id) {
            metrics::counter!("leasehold_lock_lost_total", "backend" => hold.scope.backend()).increment(1);
            tracing::warn!(lock = %hold.control.parts().name, %lock_id, "a lock was lost");
            hold.control.lose();
        }
    }

    pub(crate) fn all(&self) -> Vec<Hold> {
        self.table().holds.values().cloned().collect()
    }
}

impl Scope {
    fn backend(&self) -> &'static str {
        match self {
            Self::Lease(_) => "lease",
            Self::Transaction(_) => "transaction",
            Self::Session { .. } => "session",
        }
    }
}
