//! Where the programs of Postgres are.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, iter};

use crate::Error;

/// The variable that names the folder of the programs.
const VARIABLE: &str = "PG_BIN";

/// What we run. `pg_ctl` is needed only to stop an orphan, but every server package has it.
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];

/// Where packages put a version each: the folder above, what stands before and after the version.
/// Debian and PGDG deb, PGDG rpm, Homebrew (arm, intel, Linux), `MacPorts`, Postgres.app.
const PLACES: [(&str, &str, &str); 7] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    ("/opt/local/lib", "postgresql", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// The server programs of one Postgres version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    folder: PathBuf,
    major: u32,
}

impl Binaries {
    /// The programs to use on this machine: in the folder named by `PG_BIN`, else on `PATH`, else where
    /// `pg_config` says, else the newest version in the places where packages put them.
    ///
    /// # Errors
    ///
    /// [`Error::UnusableBinaries`] when `PG_BIN` is set to a folder without them, [`Error::NoBinaries`] when
    /// it is not set and there are none.
    pub fn find() -> Result<Self, Error> {
        match from_variable()? {
            Some(named) => Ok(named),
            None => installed().next().ok_or(Error::NoBinaries),
        }
    }

    /// As [`find`](Self::find) without `PG_BIN`, but a version for which `wanted` holds comes first.
    pub(crate) fn find_preferring(wanted: impl Fn(u32) -> bool) -> Result<Self, Error> {
        let mut first = None;
        for found in installed() {
            if wanted(found.major) {
                return Ok(found);
            }
            first.get_or_insert(found);
        }
        first.ok_or(Error::NoBinaries)
    }

    /// The programs in a folder that the caller names.
    ///
    /// # Errors
    ///
    /// [`Error::UnusableBinaries`] when `postgres`, `initdb` or `pg_ctl` is missing there or does not run.
    pub fn at(folder: impl Into<PathBuf>) -> Result<Self, Error> {
        let folder = folder.into();
        Self::probe(&folder).map_err(|reason| Error::UnusableBinaries {
            named_by: "the folder of the Postgres programs",
            folder,
            reason,
        })
    }

    /// The folder of the programs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The major version, such as 17.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.major
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn probe(folder: &Path) -> Result<Self, String> {
        if let Some(missing) = PROGRAMS.iter().find(|p| !folder.join(p).is_file()) {
            return Err(format!("there is no program `{missing}`"));
        }
        // A link on PATH may stand alone; its target has the libraries and the share folder beside it.
        let folder = match fs::canonicalize(folder.join("postgres"))
            .ok()
            .as_deref()
            .and_then(Path::parent)
        {
            Some(real) if PROGRAMS.iter().all(|p| real.join(p).is_file()) => real.to_path_buf(),
            _ => std::path::absolute(folder).map_err(|e| e.to_string())?,
        };
        let output = Command::new(folder.join("postgres"))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("`postgres` does not run: {e}"))?;
        let said = String::from_utf8_lossy(if output.status.success() {
            &output.stdout
        } else {
            &output.stderr
        });
        match major_version(&said) {
            Some(major) if output.status.success() => Ok(Self { folder, major }),
            _ => Err(format!("`postgres --version` said: {}", said.trim())),
        }
    }
}

/// The folder that the user named.
pub(crate) fn named() -> Option<PathBuf> {
    env::var_os(VARIABLE)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn from_variable() -> Result<Option<Binaries>, Error> {
    let Some(folder) = named() else { return Ok(None) };
    match Binaries::probe(&folder) {
        Ok(found) => Ok(Some(found)),
        Err(reason) => Err(Error::UnusableBinaries {
            named_by: VARIABLE,
            folder,
            reason,
        }),
    }
}

/// Every version found, the preferred first. Lazy, since each one is asked for its version.
fn installed() -> impl Iterator<Item = Binaries> {
    let path = env::var_os("PATH")
        .map(|p| env::split_paths(&p).collect::<Vec<_>>())
        .unwrap_or_default();
    let configured = iter::once_with(|| {
        let output = Command::new("pg_config")
            .arg("--bindir")
            .stderr(Stdio::null())
            .output()
            .ok()?;
        Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    });
    path.into_iter()
        .chain(configured.flatten())
        .chain(
            PLACES
                .into_iter()
                .flat_map(|(above, before, after)| versions_in(above, before, after)),
        )
        .filter_map(|folder| Binaries::probe(&folder).ok())
}

/// Newest first.
fn versions_in(above: &str, before: &str, after: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(above)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_prefix(before)?.parse().ok()?, entry.path().join(after)))
        })
        .collect();
    versions.sort_unstable();
    versions.into_iter().rev().map(|(_, folder)| folder)
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` and `postgres (PostgreSQL) 18beta1` alike.
fn major_version(said: &str) -> Option<u32> {
    let version = said.split_whitespace().nth(2)?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::major_version;

    #[test]
    fn the_major_version_is_read_from_releases_and_betas() {
        assert_eq!(
            major_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"),
            Some(15)
        );
        assert_eq!(major_version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(
            major_version("postgres: error while loading shared libraries"),
            None
        );
        assert_eq!(major_version(""), None);
    }
}
