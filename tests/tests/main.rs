//! Leasehold from outside: what goes over the wire, what reaches the disk, what clients of the service see.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail their test")]

mod answers;
mod bench;
mod bounds;
mod budgets;
mod commands;
mod crashes;
mod deliveries;
mod disturbances;
mod doubt;
mod faults;
mod first_minute;
mod gate;
mod heartbeat;
mod history;
mod idempotency;
mod leaks;
mod locked;
mod metrics;
mod purge_race;
mod run;
mod terminal;
mod world;
