//! Building programs of the workspace and learning where cargo put them.

use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cargo_metadata::Message;

use crate::steps::{self, Result};

const SERVER: &str = "leasehold";

/// The `leasehold` program, built with as little as it needs.
pub(crate) fn server_alone() -> Result<PathBuf> {
    program(
        steps::cargo("build").args(["--package", "leasehold-server"]),
        SERVER,
    )
}

/// The `leasehold` program out of the build of all tests. Their features are unified with the server's, so
/// that no dependency is built twice, once for the program and once for the tests.
pub(crate) fn server_among_tests() -> Result<PathBuf> {
    program(
        steps::cargo("build").args(["--workspace", "--bins", "--tests"]),
        SERVER,
    )
}

/// Runs a `cargo build` and returns where the program named `wanted` is.
pub(crate) fn program(cargo: &mut Command, wanted: &str) -> Result<PathBuf> {
    programs(cargo, [wanted]).map(|[found]| found)
}

/// As [`program`], for several.
pub(crate) fn programs<const N: usize>(cargo: &mut Command, wanted: [&str; N]) -> Result<[PathBuf; N]> {
    let mut build = cargo
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()?;
    let output = build.stdout.take().ok_or("no output of cargo to read")?;
    let mut built = Vec::new();
    for message in Message::parse_stream(BufReader::new(output)) {
        if let Message::CompilerArtifact(artifact) = message?
            && !artifact.profile.test
            && let Some(path) = artifact.executable
        {
            built.push((artifact.target.name, path.into_std_path_buf()));
        }
    }
    let status = build.wait()?;
    if !status.success() {
        return Err(format!("cargo build: {status}").into());
    }
    let mut found = wanted.map(|_| PathBuf::new());
    for (slot, name) in found.iter_mut().zip(wanted) {
        let program = built.iter().find(|(target, _)| target == name);
        program
            .ok_or_else(|| format!("the build made no program `{name}`"))?
            .1
            .clone_into(slot);
    }
    Ok(found)
}
