//! The gate of a tenant: its writers share it, and one drain has it alone.
//!
//! It is an advisory lock of transaction scope, [`compat::tenant_write`](crate::advisory::compat::tenant_write), so that
//! programs in other languages can respect it too. Writers never wait for it, and are refused as soon as a drain waits:
//! Postgres grants no shared lock past somebody who waits for an exclusive one, so no number of writers starves a drain.
//!
//! Lock order: tenant gate, then narrower advisory locks, then row locks. A debug build checks it whenever a gate is
//! entered.

mod drain;
mod gate;
mod gated;

pub use drain::Drained;
pub(crate) use gate::refused_at;
pub use gate::{EnterError, Gate, GateError, TenantGate};
pub use gated::{Gated, TenantOf};
