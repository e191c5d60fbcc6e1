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
    let mut bench = Command::new(bench);
    if measures_queue(arguments) {
        let peer = build::program(
            steps::cargo("build").args([
                "--release",
                "--locked",
                "--manifest-path=bench/peer/Cargo.toml",
                "--target-dir=target/peer",
            ]),
            "leasehold-bench-peer",
        )?;
        bench.env("LEASEHOLD_BENCH_PEER", peer);
    }
    let binaries = Binaries::find()?;
    let cluster = Cluster::temporary()
        .binaries(binaries.clone())
        .durability(Durability::Durable)
        // Several lanes keep a connection for each of their clients.
        .set("max_connections", "300")
        .start()?;
    steps::run(
        bench
            .args(arguments)
            .env("LEASEHOLD_BENCH_DATABASE_URL", cluster.url("postgres"))
            .env("PG_BIN", binaries.folder()),
    )
}

/// Whether the only groups that need the other queue may run: it takes minutes to build.
fn measures_queue(arguments: &[OsString]) -> bool {
    let mut arguments = arguments.iter().filter_map(|argument| argument.to_str());
    let only = arguments.find(|argument| argument.starts_with("--only"));
    only.is_none_or(|only| {
        only.contains("queue") || arguments.next().is_some_and(|next| next.contains("queue"))
    })
}
