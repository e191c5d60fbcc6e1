//! A server from its start to its end, owned by a value.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::account::Account;
use crate::home::{self, Home};
use crate::watchdog::Watchdog;
use crate::{Binaries, Error, binaries, postmaster, temporary};

/// Whether what was committed survives a crash of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It does: `fsync`, `full_page_writes` and `synchronous_commit` are on.
    Durable,
    /// It does not: `fsync` and `full_page_writes` are off. A crash of the server alone loses nothing.
    Fast,
}

/// How to start a server; see [`Cluster::persistent`] and [`Cluster::temporary`].
#[derive(Debug, Clone)]
#[must_use = "nothing runs until `start`"]
pub struct ClusterBuilder {
    folder: Option<PathBuf>,
    durability: Durability,
    binaries: Option<Binaries>,
    settings: Vec<(String, String)>,
}

/// A running private Postgres. Dropping it stops the server, unless another process runs it.
#[derive(Debug)]
#[must_use = "dropping the cluster stops its server"]
pub struct Cluster {
    home: Home,
    socket: PathBuf,
    binaries: Binaries,
    /// `None`: we attached to the server of another process.
    owned: Option<Owned>,
    temporary: bool,
}

#[derive(Debug)]
struct Owned {
    server: Child,
    watchdog: Watchdog,
}

impl Cluster {
    /// A durable server whose data stays in `folder/postgres-<major version>`.
    ///
    /// `folder` is created where it is missing and otherwise left alone. When this process is root and the
    /// account of the server cannot reach `folder`, the data is kept below `/var/lib/leasehold` instead, in
    /// the same place each time; [`home`](Self::home) tells.
    ///
    /// A process that comes while another runs the server of this folder attaches to it: see
    /// [`is_attached`](Self::is_attached).
    pub fn persistent(folder: impl Into<PathBuf>) -> ClusterBuilder {
        ClusterBuilder::new(Some(folder.into()), Durability::Durable)
    }

    /// A server for tests: new, empty and not durable, in a memory disk where there is a large one, and
    /// removed at its end. Any number can run at once.
    pub fn temporary() -> ClusterBuilder {
        ClusterBuilder::new(None, Durability::Fast)
    }

    /// A connection URL for `database`, understood by tokio-postgres and by libpq (`psql`). The superuser is
    /// `postgres`, without a password. The database `postgres` exists from the start.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let socket = percent_encode(self.socket.as_os_str().as_encoded_bytes());
        let database = percent_encode(database.as_bytes());
        format!(
            "postgres:///{database}?host={socket}&port={}&user=postgres",
            home::PORT
        )
    }

    /// The folder of this server: its data and its log.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home.path
    }

    /// True when another process runs the server. It ends with that process, not with this value, and our
    /// settings and programs were not used.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.owned.is_none()
    }

    /// The process id of the server (the postmaster), for tests that break it; `None` when attached.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        self.owned.as_ref().map(|owned| owned.server.id())
    }

    /// The programs that the server was started with.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }
}

impl ClusterBuilder {
    fn new(folder: Option<PathBuf>, durability: Durability) -> Self {
        Self {
            folder,
            durability,
            binaries: None,
            settings: Vec::new(),
        }
    }

    /// Overrides the kind's own choice, such as a temporary server that counts its disk syncs. A durable one
    /// is kept on a disk, not in memory.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Uses these programs, whatever `PG_BIN` says.
    pub fn binaries(mut self, binaries: Binaries) -> Self {
        self.binaries = Some(binaries);
        self
    }

    /// One server setting, as `postgres -c name=value` would take it; the last of a name wins.
    pub fn set(mut self, name: &str, value: impl Into<String>) -> Self {
        self.settings.push((name.to_owned(), value.into()));
        self
    }

    /// Starts the server, or attaches to the one that runs in the folder, and returns when it accepts
    /// connections. Takes under a second for new data and some 50 ms for data that was shut down in order.
    /// Blocks the thread: call it before an async runtime starts, or where blocking is allowed.
    ///
    /// # Errors
    ///
    /// Each [`Error`] says when it comes and what to do. A folder that could not be used is left as it was.
    pub fn start(self) -> Result<Cluster, Error> {
        let account = Account::choose()?;
        let binaries = match self.binaries.clone() {
            Some(given) => given,
            None => self.choose_binaries()?,
        };
        let Some(folder) = &self.folder else {
            let home = temporary::claim(account, &binaries, self.durability)?;
            return self.run(home, binaries);
        };
        let home = Home::persistent(folder, binaries.major(), account)?;
        let started = Instant::now();
        loop {
            if home.try_own()? {
                return self.run(home, binaries);
            }
            if let Some(socket) = home.announced()? {
                return Ok(Cluster {
                    home,
                    socket,
                    binaries,
                    owned: None,
                    temporary: false,
                });
            }
            // The other process starts its server now, or ends.
            if started.elapsed() > postmaster::START {
                return Err(Error::NotReady {
                    home: home.path,
                    seconds: postmaster::START.as_secs(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Data that is there decides the version: a newer Postgres that was installed meanwhile must not make a
    /// service come up empty.
    fn choose_binaries(&self) -> Result<Binaries, Error> {
        let existing = self.folder.as_deref().map(home::versions_in).unwrap_or_default();
        if existing.is_empty() || binaries::named().is_some() {
            return Binaries::find();
        }
        let has_data = |major| existing.iter().any(|(version, _)| *version == major);
        let found = Binaries::find_preferring(has_data)?;
        match existing.first() {
            Some((major, home)) if !has_data(found.major()) => Err(Error::OtherVersion {
                home: home.clone(),
                major: *major,
            }),
            _ => Ok(found),
        }
    }

    /// Runs a server in a folder whose lock is ours.
    fn run(self, home: Home, binaries: Binaries) -> Result<Cluster, Error> {
        let temporary = self.folder.is_none();
        let remove = temporary.then(|| RemoveOnDrop(home.path.clone()));
        home.announce(None)?;
        let crashed = postmaster::crashed(&home);
        postmaster::stop_orphan(&home, &binaries);
        let sync = !temporary && self.durability == Durability::Durable;
        postmaster::initialise(&home, &binaries, sync)?;
        let socket = home.socket_folder()?;
        let settings = self.all_settings();
        let started = Instant::now();
        let owned = loop {
            match launch(&home, &binaries, &socket, &settings, temporary) {
                Ok(owned) => break owned,
                // The backends of a server that was killed see it within moments; until then their shared
                // memory keeps a new server out.
                Err(Error::Failed { .. }) if crashed && started.elapsed() < Duration::from_secs(10) => {
                    thread::sleep(Duration::from_millis(100));
                }
                Err(other) => return Err(other),
            }
        };
        let cluster = Cluster {
            home,
            socket,
            binaries,
            owned: Some(owned),
            temporary,
        };
        if let Some(remove) = remove {
            remove.not_now();
        }
        cluster.home.announce(Some(&cluster.socket))?;
        Ok(cluster)
    }

    fn all_settings(&self) -> Vec<(String, String)> {
        let durable = match self.durability {
            Durability::Durable => "on",
            Durability::Fast => "off",
        };
        let own = [
            ("fsync", durable),
            ("full_page_writes", durable),
            // On in both: a transaction that turns it off must be seen to differ.
            ("synchronous_commit", "on"),
            // Session locks live in the shared lock table, whose size is this times the connections.
            ("max_locks_per_transaction", "256"),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
        own.into_iter().chain(self.settings.iter().cloned()).collect()
    }
}

fn launch(
    home: &Home,
    binaries: &Binaries,
    socket: &Path,
    settings: &[(String, String)],
    temporary: bool,
) -> Result<Owned, Error> {
    let mut server = postmaster::spawn(home, binaries, socket, settings)?;
    // SIGINT: write everything out, then end. SIGQUIT: end.
    let (signal, remove) = if temporary {
        ("QUIT", Some(home.path.as_path()))
    } else {
        ("INT", None)
    };
    let watchdog = match Watchdog::start(server.id(), signal, remove) {
        Ok(watchdog) => watchdog,
        Err(error) => {
            postmaster::stop(home, binaries, server, !temporary);
            return Err(error);
        }
    };
    match postmaster::wait_ready(home, &mut server) {
        Ok(()) => Ok(Owned { server, watchdog }),
        Err(error) => {
            postmaster::stop(home, binaries, server, !temporary);
            watchdog.dismiss();
            Err(error)
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(Owned { server, watchdog }) = self.owned.take() else {
            return;
        };
        // Nobody should attach to a server that is about to end. Failing that, they find out themselves.
        drop(self.home.announce(None));
        postmaster::stop(&self.home, &self.binaries, server, !self.temporary);
        watchdog.dismiss();
        self.home.remove_socket_folder(&self.socket);
        if self.temporary {
            drop(fs::remove_dir_all(&self.home.path));
        }
    }
}

/// Removes the folder of a temporary server that did not come up.
struct RemoveOnDrop(PathBuf);

impl RemoveOnDrop {
    fn not_now(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            drop(fs::remove_dir_all(&self.0));
        }
    }
}

/// Everything but letters, digits and the marks that a query value may hold as they are (RFC 3986).
fn percent_encode(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                out.push(char::from(*byte))
            }
            other => drop(write!(out, "%{other:02X}")), // writing to a String does not fail
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_keeps_plain_paths_and_escapes_the_rest() {
        assert_eq!(
            percent_encode(b"/dev/shm/leasehold-pg_1.x~"),
            "/dev/shm/leasehold-pg_1.x~"
        );
        assert_eq!(
            percent_encode("/tmp/a b&c=%ä".as_bytes()),
            "/tmp/a%20b%26c%3D%25%C3%A4"
        );
    }

    #[test]
    fn the_settings_of_the_caller_come_last() {
        let all = Cluster::temporary().set("fsync", "on").all_settings();
        assert_eq!(all.first(), Some(&("fsync".to_owned(), "off".to_owned())));
        assert_eq!(all.last(), Some(&("fsync".to_owned(), "on".to_owned())));
    }
}
