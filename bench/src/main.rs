//! The benchmarks: each of our paths beside raw tokio-postgres and pgbench doing the same statements.
//!
//! Lanes of one group run in short turns, one after another, round after round; every ratio is taken within a
//! round and the median over the rounds is printed, so that the machine's mood falls out. `bench/README.md` says
//! how to read it.
#![allow(clippy::print_stdout, reason = "its whole purpose is to print")]

mod capture;
mod daemon;
mod database;
mod group;
mod lanes;
mod machine;
mod measure;
mod options;
mod pgbench;
mod raw;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::database::Server;
use crate::group::Group;
use crate::options::Options;
use crate::pgbench::Pgbench;

/// Names the program of `bench/peer`.
const PEER: &str = "LEASEHOLD_BENCH_PEER";

/// Whatever goes wrong ends the run.
type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T = ()> = std::result::Result<T, Error>;

/// What every group is made from.
struct Bench {
    options: Options,
    server: Server,
    pgbench: Option<Pgbench>,
    /// The program of the other queue.
    peer: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("leasehold-bench: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result {
    let start = Instant::now();
    let server = Server::from_environment()?;
    machine::describe(&server, &options).await?;
    let pgbench = Pgbench::find().await;
    if pgbench.is_none() {
        println!("pgbench: not found (PG_BIN or PATH); its lanes are left out");
    }
    let bench = Bench {
        options,
        server,
        pgbench,
        peer: std::env::var_os(PEER).map(PathBuf::from),
    };
    lanes::run(&bench).await?;
    println!("\n{:.0} s in all", start.elapsed().as_secs_f64());
    Ok(())
}

impl Bench {
    /// Whether a group was asked for.
    fn wants(&self, title: &str) -> bool {
        self.options
            .only
            .as_ref()
            .is_none_or(|wanted| title.contains(wanted.as_str()))
    }

    /// Measures a group and prints its table.
    async fn measure(&self, mut group: Group) -> Result {
        let table = group.measure(self.options.window(), self.options.rounds).await?;
        println!("\n{table}");
        Ok(())
    }
}
