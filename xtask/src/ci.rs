//! `cargo xtask ci`: what must pass before a change lands, cheapest first.

use leasehold_embedded::Binaries;

use crate::documents::{self, Mode};
use crate::steps::{self, Result, step};
use crate::{build, layers, test};

/// The `ci` command. Stops at the first step that fails and names it.
pub(crate) fn run() -> Result {
    step("format", || {
        steps::run(steps::cargo("fmt").args(["--all", "--", "--check"]))
    })?;
    step("layers", layers::check)?;
    step("dependencies", dependencies)?;
    step("clippy", || {
        let mut clippy = steps::cargo("clippy");
        clippy.args([
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ]);
        steps::run(&mut clippy)
    })?;
    step("docs", || {
        let mut doc = steps::cargo("doc");
        doc.args(["--workspace", "--all-features", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings");
        steps::run(&mut doc)
    })?;
    let server = step("build", build::server_among_tests)?;
    step("schema", || documents::schema(&server, Mode::Check))?;
    step("openapi", || documents::openapi(&server, Mode::Check))?;
    test::on(&Binaries::find()?, &server, &[])
}

/// Licences, advisories and doubles, as `deny.toml` has them.
fn dependencies() -> Result {
    if !steps::answers(steps::cargo("deny").arg("--version")) {
        println!("skipped: cargo-deny is not installed");
        return Ok(());
    }
    steps::run(steps::cargo("deny").arg("check"))
}
