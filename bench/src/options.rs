//! The flags.

use std::time::Duration;

use clap::Parser;

/// Benchmarks on the Postgres that `LEASEHOLD_BENCH_DATABASE_URL` names; `cargo xtask bench` starts a private one.
#[derive(Clone, Debug, Parser)]
pub(crate) struct Options {
    /// How long each lane runs in each round, in whole seconds.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) seconds: u64,
    /// How many rounds; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    pub(crate) rounds: u64,
    /// How many clients work at once, a list.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32], value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) clients: Vec<u32>,
    /// Only groups with this text in their title: session, lease, transaction, write, gated, PUT, hand-off, waiting,
    /// http-lock, queue, rows, renewal
    #[arg(long)]
    pub(crate) only: Option<String>,
}

impl Options {
    pub(crate) fn window(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}
