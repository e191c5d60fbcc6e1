//! [`Hooks`]: the caller's hooks, of which none can break the worker.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::processor::WorkerHooks;

#[derive(Clone)]
pub(super) struct Hooks(Arc<dyn WorkerHooks>);

impl Hooks {
    pub(super) fn new(hooks: impl WorkerHooks) -> Self {
        Self(Arc::new(hooks))
    }

    pub(super) fn tell(&self, what: impl FnOnce(&dyn WorkerHooks)) {
        if catch_unwind(AssertUnwindSafe(|| what(&*self.0))).is_err() {
            tracing::error!("a hook of a worker panicked");
        }
    }
}
