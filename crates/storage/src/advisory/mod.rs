//! Advisory locks: locks on numbers, kept in the memory of the server for a session or a transaction.

mod hashtextextended;
pub(crate) mod holder;
mod key;
pub(crate) mod session;
pub(crate) mod transaction;
pub(crate) mod watch;

pub use key::{AdvisoryKey, compat};
