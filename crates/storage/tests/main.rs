//! What this crate promises, against a real Postgres.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail their test")]

mod commit;
mod fenced;
mod held;
mod inspect;
mod jobs;
mod keys;
mod leases;
mod migrate;
mod providers;
mod queue;
mod session;
mod spans;
mod startup;
mod support;
mod tenant;
mod tls;
