//! Why a private server did not start, each in one line that says what to do.

use std::path::{Path, PathBuf};
use std::{fmt, io};

/// Why a private server did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// No Postgres server programs were found on this machine.
    NoBinaries,
    /// A folder that was named explicitly has no usable server programs.
    UnusableBinaries {
        /// Who named the folder: `PG_BIN`, or the caller.
        named_by: &'static str,
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder holds data of another major version than any that is installed.
    OtherVersion {
        /// The folder with the data.
        home: PathBuf,
        /// The major version that made it.
        major: u32,
    },
    /// The folder is in use for something else; it was left untouched.
    ForeignFolder(PathBuf),
    /// The folder belongs to another user and we are not root.
    OtherOwner {
        /// The folder.
        folder: PathBuf,
        /// The user that owns it.
        uid: u32,
    },
    /// This process is root, and there is neither a user `postgres` nor `nobody` to run the server as.
    NoAccount,
    /// `initdb` or `postgres` ended with an error.
    Failed {
        /// The program.
        program: &'static str,
        /// The end of what it said.
        said: String,
    },
    /// The server neither became ready nor ended.
    NotReady {
        /// The folder of the server, with its log.
        home: PathBuf,
        /// How long we waited, in seconds.
        seconds: u64,
    },
    /// A file, folder or program could not be used.
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: which step failed, and on what.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBinaries => f.write_str(
                "no Postgres server programs found: install them (Debian, Ubuntu: `apt install postgresql`; \
                 Fedora: `dnf install postgresql-server`; macOS: `brew install postgresql`), or set PG_BIN to \
                 the folder with `postgres` and `initdb`, or set DATABASE_URL to a running server",
            ),
            Self::UnusableBinaries { named_by, folder, reason } => {
                write!(f, "{named_by} is {}: {reason}", folder.display())
            }
            Self::OtherVersion { home, major } => write!(
                f,
                "{} holds data of Postgres {major}, which is not installed: install it, set PG_BIN to the folder \
                 of its programs, or move that folder away to start empty",
                home.display()
            ),
            Self::ForeignFolder(folder) => write!(
                f,
                "{} is not empty and was not made by this program: choose another folder",
                folder.display()
            ),
            Self::OtherOwner { folder, uid } => write!(
                f,
                "{} belongs to the user with id {uid}: run as that user or as root, or choose another folder",
                folder.display()
            ),
            Self::NoAccount => f.write_str(
                "Postgres does not run as root, and there is no user `postgres` or `nobody` to run it as: \
                 run as a normal user, or set DATABASE_URL to a running server",
            ),
            Self::Failed { program, said } => write!(f, "{program} failed: {said}"),
            Self::NotReady { home, seconds } => write!(
                f,
                "Postgres was not ready after {seconds} s: see {}",
                home.join(crate::home::LOG).display()
            ),
            Self::Io { action, path, .. } => write!(f, "cannot {action} {}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::NoBinaries
            | Self::UnusableBinaries { .. }
            | Self::OtherVersion { .. }
            | Self::ForeignFolder(_)
            | Self::OtherOwner { .. }
            | Self::NoAccount
            | Self::Failed { .. }
            | Self::NotReady { .. } => None,
        }
    }
}
