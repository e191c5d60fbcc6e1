//! [`Waits`]: who of this process has waited for a lock for so long that others should know.
//!
//! Most waits are over before: they cost a timer, and nothing is written down.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use leasehold_domain::{Holder, LockId, LockMode, LockName, LockRequest};
use tokio::time::{Instant, timeout};

use crate::advisory::AdvisoryKey;

/// A wait is worth telling from then on.
const LONG: Duration = Duration::from_millis(250);
/// How many waits of one process are told, the oldest. It bounds what a crowd costs the database.
const MOST: usize = 10_000;

/// The long waits of one process. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waits {
    long: Arc<Mutex<HashMap<LockId, Arc<Wait>>>>,
}

/// One wait.
#[derive(Debug)]
pub(crate) struct Wait {
    pub(crate) name: LockName,
    pub(crate) mode: LockMode,
    /// As in `leasehold.presence`.
    pub(crate) scope: &'static str,
    /// What the server sees instead of the name, where it does.
    pub(crate) key: Option<AdvisoryKey>,
    pub(crate) holder: Holder,
    pub(crate) since: Instant,
}

impl Waits {
    fn long(&self) -> MutexGuard<'_, HashMap<LockId, Arc<Wait>>> {
        self.long.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what waits for a lock, and makes it known while it takes long.
    pub(crate) async fn while_it_takes<F: Future>(
        &self,
        request: &LockRequest,
        scope: &'static str,
        key: impl FnOnce() -> Option<AdvisoryKey>,
        waiting: F,
    ) -> F::Output {
        let since = Instant::now();
        let mut waiting = pin!(waiting);
        if let Ok(done) = timeout(LONG, &mut waiting).await {
            return done;
        }
        let _known = self.enter(Wait {
            name: request.name().clone(),
            mode: request.mode(),
            scope,
            key: key(),
            holder: request.holder().clone(),
            since,
        });
        waiting.await
    }

    fn enter(&self, wait: Wait) -> Option<Known<'_>> {
        let mut long = self.long();
        if long.len() >= MOST {
            return None;
        }
        let id = LockId::new();
        long.insert(id, Arc::new(wait));
        Some(Known { waits: self, id })
    }

    pub(crate) fn all(&self) -> Vec<(LockId, Arc<Wait>)> {
        let long = self.long();
        long.iter().map(|(id, wait)| (*id, Arc::clone(wait))).collect()
    }
}

/// While it lives the wait is told.
struct Known<'a> {
    waits: &'a Waits,
    id: LockId,
}

impl Drop for Known<'_> {
    fn drop(&mut self) {
        self.waits.long().remove(&self.id);
    }
}
