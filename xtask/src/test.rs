//! `cargo xtask test`: every test, on one private Postgres for the whole run.

use std::ffi::OsString;
use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::thread;

use leasehold_embedded::{Binaries, Cluster};

use crate::build;
use crate::postgres;
use crate::steps::{self, Result, step};

/// The `test` command. `versions`: major versions such as `16,17`, else the Postgres of this machine.
pub(crate) fn run(versions: Option<&str>, selection: &[OsString]) -> Result {
    let server = step("build", build::server_among_tests)?;
    let Some(versions) = versions else {
        return on(&Binaries::find()?, &server, selection);
    };
    let versions = versions
        .split(',')
        .map(|version| Ok(version.trim().parse()?))
        .collect::<Result<Vec<u32>>>()?;
    let installed = step("get Postgres", || postgres::install(&versions))?;
    for binaries in &installed {
        on(binaries, &server, selection)?;
    }
    Ok(())
}

/// All tests and doctests, or those that `selection` selects, on this Postgres.
pub(crate) fn on(binaries: &Binaries, server: &Path, selection: &[OsString]) -> Result {
    let cluster = Cluster::temporary()
        .binaries(binaries.clone())
        .set("max_connections", "400")
        // With a database per test the launcher would start a worker every fraction of a second, and a
        // worker in a template database holds up the next CREATE DATABASE.
        .set("autovacuum", "off")
        // The data may lie in memory, where a gigabyte of WAL is too much.
        .set("max_wal_size", "256MB")
        .start()?;
    let with_database = |command: &mut Command| {
        command
            .env("LEASEHOLD_TEST_DATABASE_URL", cluster.url("postgres"))
            .env("LEASEHOLD_BIN", server)
            .env("PG_BIN", binaries.folder()) // for tests that start a server of their own
            .env_remove("DATABASE_URL") // nobody's real database, whatever the shell has set
            .envs(["NEXTEST_TEST_THREADS", "RUST_TEST_THREADS"].map(|name| (name, threads(name))));
        steps::run(command)
    };
    let major = binaries.major();
    step(&format!("tests on Postgres {major}"), || {
        let nextest = steps::answers(steps::cargo("nextest").arg("--version"));
        let mut tests = steps::cargo(if nextest { "nextest" } else { "test" });
        tests.args(if nextest { ["run"] } else { ["--no-fail-fast"] });
        if !selection.iter().any(names_a_package) {
            tests.arg("--workspace");
        }
        if !nextest && selection.is_empty() {
            tests.args(["--lib", "--bins", "--tests"]); // nextest runs no doctests either
        }
        with_database(tests.args(selection))
    })?;
    if selection.is_empty() {
        step(&format!("doctests on Postgres {major}"), || {
            with_database(steps::cargo("test").args(["--workspace", "--doc"]))
        })?;
    }
    Ok(())
}

/// How many tests run at once: as many as there are processors, within what the server's connections are enough for.
fn threads(variable: &str) -> OsString {
    std::env::var_os(variable).unwrap_or_else(|| {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        processors.min(16).to_string().into()
    })
}

/// Cargo lets `--workspace` win over a package that is named beside it.
fn names_a_package(argument: &OsString) -> bool {
    let argument = argument.as_encoded_bytes();
    argument.starts_with(b"-p") || argument.starts_with(b"--package")
}
