//! `cargo xtask bench`: the benchmarks on a private Postgres that syncs to a disk, as a real one does.

use std::ffi::OsString;
use std::process::Command;

use leasehold_embedded::{Binaries, Cluster, Durability};

use crate::build;
use crate::steps::{self, Result};

/// The `bench` command: everything after it goes to the benchmark program.
pub(crate) fn run(arguments: &[OsString]) -> Result {
    let bench = build::program(
        steps::cargo("build").args(["--release", "--package", "leasehold-bench"]),
        "leasehold-bench",
    )?;
    let binaries = Binaries::find()?;
    let cluster = Cluster::temporary()
        .binaries(binaries.clone())
        .durability(Durability::Durable)
        // Several lanes keep a connection for each of their clients.
        .set("max_connections", "300")
        .start()?;
    steps::run(
        Command::new(bench)
            .args(arguments)
            .env("LEASEHOLD_BENCH_DATABASE_URL", cluster.url("postgres"))
            .env("PG_BIN", binaries.folder()),
    )
}
