//! The reference service from the outside: each test has a database of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod auth;
mod command;
mod crud;
mod deliveries;
mod document;
mod erasure;
mod feedback;
mod gate;
mod idempotency;
mod isolation;
mod jobs_api;
mod locking;
mod locks;
mod log;
mod metrics;
mod operations;
mod purge;
mod queue_api;
mod receiver;
#[expect(unreachable_pub, reason = "the system tests have it in their library")]
#[path = "../../../../tests/src/secrets.rs"]
mod secrets;
mod support;
mod webhooks;
mod writers;

/// Makes two tests of each function: one for each kind of workspace lock.
macro_rules! in_both_modes {
    ($($test:ident),+ $(,)?) => {
        mod lease {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let api = $crate::support::Api::start(leasehold_server::config::WorkspaceLockMode::Lease).await;
                super::$test(api).await;
            })+
        }
        mod advisory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let api = $crate::support::Api::start(leasehold_server::config::WorkspaceLockMode::Advisory).await;
                super::$test(api).await;
            })+
        }
    };
}
pub(crate) use in_both_modes;
