//! The clauses that every [`DistributedLock`](leasehold_domain::DistributedLock) must pass.
//!
//! A backend says in a [`Provider`] how its locks are made and how they are broken, and one line turns every
//! clause into a `#[tokio::test]` of its own name:
//!
//! ```ignore
//! mod leases {
//!     leasehold_conformance::lock_conformance!(LeaseProvider::start().await);
//! }
//! ```
//!
//! The expression is evaluated anew for every test, inside its multi-threaded runtime; a backend in a database
//! makes a database of its own there. Who writes the line needs tokio with `macros` and `rt-multi-thread`.
//!
//! What a provider gives:
//!
//! * **locks**: [`Provider::process`] makes an instance that shares no memory with the others, as a second
//!   process would have it; [`Provider::name`] gives names that can be locked.
//! * **abilities**: [`Abilities`] says what the backend can do. A clause about something that it cannot do
//!   asserts the documented refusal instead, so no clause is ever skipped.
//! * **ways to break it**: [`Provider::lose`] (taken away from outside: a row changed, a session terminated),
//!   [`Provider::expire`] (the end of a lease moved into the past), [`Provider::stop_heartbeats`],
//!   [`Provider::unreachable`], and [`Provider::holder_process`], a real process that holds, exits or is killed.
//! * **a look from behind**: [`Provider::residue`] tells what the backend still keeps. It must be nothing after
//!   every clause.
//!
//! Clauses wait for states with a generous cap and never for time to pass, but where the passing of time is what
//! they are about; then it is [`Provider::pass`], one second at most in real time.

#![allow(
    clippy::missing_panics_doc,
    async_fn_in_trait,
    reason = "a clause panics where the backend breaks it, and nobody needs its future to be Send"
)]

pub mod clauses;
mod holder_process;
mod patience;
mod provider;

pub use holder_process::{hold_as_told, this_test_binary};
pub use patience::leaves_nothing;
pub use provider::{Abilities, Life, Provider};

/// Makes every clause a test of its own name, against the provider that the expression makes.
#[macro_export]
macro_rules! lock_conformance {
    ($provider:expr) => {
        $crate::lock_conformance! { @tests $provider;
            try_acquire_free
            second_is_busy
        }
    };
    (@tests $provider:expr; $($clause:ident)*) => {
        $(
            #[::tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $clause() {
                let provider = $provider;
                $crate::clauses::$clause(&provider).await;
                $crate::leaves_nothing(&provider).await;
            }
        )*
    };
}
