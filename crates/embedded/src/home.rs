//! The folder of one server: whose it is, who has the right to run a server in it, and where its socket is.
//!
//! Inside: `lock` (held by the process that runs the server), `data`, `log`, and the socket.

use std::ffi::OsStr;
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::Error;
use crate::account::Account;

pub(crate) const LOG: &str = "log";
const LOCK: &str = "lock";
const DATA: &str = "data";

/// Names the socket file only: nothing listens on a network.
pub(crate) const PORT: &str = "5432";

/// The kernel's limit is 108 bytes with the closing NUL on Linux, 104 on macOS.
const LONGEST_SOCKET: usize = 103;
const SOCKET: &str = "/.s.PGSQL.5432";

/// Where root keeps the data of a project that the server's account cannot reach.
const ROOTS_STATE: &str = "/var/lib/leasehold";

#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) path: PathBuf,
    pub(crate) account: Account,
    /// The kernel frees its lock however the holder dies, so that "does somebody run a server here?" is never
    /// a guess from a process id. The file's content is for those who attach: empty while the server is not
    /// ready, else one line, the folder of the socket.
    lock: fs::File,
}

impl Home {
    /// The folder for data that stays: `postgres-<major>` in `folder`, so that each major version has its own
    /// and `folder` itself is never given away.
    pub(crate) fn persistent(folder: &Path, major: u32, account: Account) -> Result<Self, Error> {
        make_passable(folder, account)?;
        let folder = folder.canonicalize().map_err(Error::io("resolve", folder))?;
        let home = folder.join(name(major));
        let owner = fs::symlink_metadata(&home).map_or(account, |found| account.or_owner_of(&found));
        if !owner.is_other() || owner.can_enter(&folder) {
            return Self::open(&home, account);
        }
        // Typically a project below /root, which lets nobody else through.
        let elsewhere = Path::new(ROOTS_STATE).join(short_hash(folder.as_os_str()));
        make_passable(&elsewhere, account)?;
        Self::open(&elsewhere.join(name(major)), account)
    }

    /// A new folder that nobody else has; fails with `AlreadyExists` otherwise.
    pub(crate) fn create(path: &Path, account: Account) -> Result<Self, Error> {
        make_private(path).map_err(Error::io("create", path))?;
        Self::open(path, account)
    }

    /// Never changes the owner or the mode of a folder that is not ours, nor follows a link to it.
    fn open(path: &Path, account: Account) -> Result<Self, Error> {
        match make_private(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", path)(e)),
            _ => {}
        }
        let found = fs::symlink_metadata(path).map_err(Error::io("look at", path))?;
        if !found.is_dir() {
            return Err(Error::ForeignFolder(path.to_path_buf()));
        }
        let account = account.or_owner_of(&found);
        if found.uid() != account.uid && !account.is_other() {
            let folder = path.to_path_buf();
            return Err(Error::OtherOwner {
                folder,
                uid: found.uid(),
            });
        }
        let file = path.join(LOCK);
        // In this order: another process may be making the folder now, and the lock is the first it puts there.
        let is_empty = fs::read_dir(path)
            .map_err(Error::io("read", path))?
            .next()
            .is_none();
        if !is_empty && !is_plain_file(&file) {
            return Err(Error::ForeignFolder(path.to_path_buf()));
        }
        account.give(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(Error::io("restrict", path))?;
        let mut options = fs::OpenOptions::new();
        let lock = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&file);
        let lock = lock.map_err(Error::io("open", &file))?;
        account.give(&file)?;
        Ok(Self {
            path: path.to_path_buf(),
            account,
            lock,
        })
    }

    /// Takes up a folder that another process left, to clean it. `None` when it is not one of ours.
    pub(crate) fn leftover(path: &Path, account: Account) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        // Root cleans up after itself and after the account, not in folders that others prepared.
        let ours = found.uid() == account.uid || (account.is_other() && found.uid() == 0);
        if !found.is_dir() || !ours || !is_plain_file(&path.join(LOCK)) {
            return None;
        }
        let lock = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path.join(LOCK))
            .ok()?;
        Some(Self {
            path: path.to_path_buf(),
            account,
            lock,
        })
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path.join(DATA)
    }

    /// Whether we may run a server here from now on, until this value is dropped or the process dies.
    pub(crate) fn try_own(&self) -> Result<bool, Error> {
        match self.lock.try_lock() {
            Ok(()) => Ok(true),
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(e)) => Err(Error::io("lock", &self.path.join(LOCK))(e)),
        }
    }

    /// For the owner: tells those who attach where the socket is; `None` that they must wait.
    pub(crate) fn announce(&self, socket: Option<&Path>) -> Result<(), Error> {
        let mut line = socket.map_or_else(Vec::new, |s| s.as_os_str().as_bytes().to_vec());
        let mut file = &self.lock;
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| {
                if !line.is_empty() {
                    line.push(b'\n'); // half a line is not yet an announcement
                }
                file.write_all(&line)
            })
            .map_err(Error::io("write", &self.path.join(LOCK)))
    }

    /// For those who attach: the folder of the socket of a server that is ready.
    pub(crate) fn announced(&self) -> Result<Option<PathBuf>, Error> {
        let mut line = Vec::new();
        let mut file = &self.lock;
        file.rewind()
            .and_then(|()| file.read_to_end(&mut line))
            .map_err(Error::io("read", &self.path.join(LOCK)))?;
        Ok(line
            .strip_suffix(b"\n")
            .map(|folder| PathBuf::from(OsStr::from_bytes(folder))))
    }

    /// The folder itself, or where its path is too long for a socket a short one beside it.
    pub(crate) fn socket_folder(&self) -> Result<PathBuf, Error> {
        if self.path.as_os_str().len() + SOCKET.len() <= LONGEST_SOCKET {
            return Ok(self.path.clone());
        }
        // Always the same, so that a crash leaves one folder and not one more each time.
        let short = PathBuf::from(format!(
            "/tmp/leasehold-socket-{}",
            short_hash(self.path.as_os_str())
        ));
        match make_private(&short) {
            Ok(()) => self.account.give(&short)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Anybody may have put something there: only a private folder of the account will do.
                let found = fs::symlink_metadata(&short).map_err(Error::io("look at", &short))?;
                if !found.is_dir() || found.mode() & 0o077 != 0 {
                    return Err(Error::ForeignFolder(short));
                }
                if found.uid() != self.account.uid {
                    return Err(Error::OtherOwner {
                        folder: short,
                        uid: found.uid(),
                    });
                }
            }
            Err(e) => return Err(Error::io("create", &short)(e)),
        }
        Ok(short)
    }

    pub(crate) fn remove_socket_folder(&self, socket: &Path) {
        if socket != self.path {
            drop(fs::remove_dir(socket)); // only when empty: what we did not make stays
        }
    }
}

/// The major versions that have data in `folder`.
pub(crate) fn versions_in(folder: &Path) -> Vec<(u32, PathBuf)> {
    let hidden = folder
        .canonicalize()
        .map(|f| Path::new(ROOTS_STATE).join(short_hash(f.as_os_str())));
    [Some(folder.to_path_buf()), hidden.ok()]
        .into_iter()
        .flatten()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let major = entry
                .file_name()
                .to_str()?
                .strip_prefix("postgres-")?
                .parse()
                .ok()?;
            entry.path().join(DATA).is_dir().then(|| (major, entry.path()))
        })
        .collect()
}

fn name(major: u32) -> String {
    format!("postgres-{major}")
}

fn make_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// Creates what is missing. What root creates lets others through whatever its umask says: they need to
/// reach their own folder in it, and see nothing else.
fn make_passable(folder: &Path, account: Account) -> Result<(), Error> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(above) = folder.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_passable(above, account)?;
    }
    match fs::create_dir(folder) {
        Ok(()) if account.is_other() => fs::set_permissions(folder, fs::Permissions::from_mode(0o711))
            .map_err(Error::io("open up", folder)),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", folder)(e)),
        _ => Ok(()),
    }
}

/// Not a link to one.
fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}

/// FNV-1a: a name for a path that is the same in every build, which std's hashers do not promise.
fn short_hash(text: &OsStr) -> String {
    let hash = text
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_path_is_frozen() {
        // The published test vectors of FNV-1a 64.
        assert_eq!(short_hash(OsStr::new("")), "cbf29ce484222325");
        assert_eq!(short_hash(OsStr::new("a")), "af63dc4c8601ec8c");
        assert_eq!(short_hash(OsStr::new("foobar")), "85944171f73967e8");
    }
}
