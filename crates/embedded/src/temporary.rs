//! Folders for servers whose data nobody keeps, and what became of earlier ones.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io};

use crate::account::Account;
use crate::home::Home;
use crate::postmaster;
use crate::{Binaries, Durability, Error};

/// Short names that exist for every user, since a socket path is limited.
const MEMORY: &str = "/dev/shm";
const ANYWHERE: &str = "/tmp";
/// Unlike `/tmp` not a memory disk on any system we know: a sync that costs nothing is none.
const DISK: &str = "/var/tmp";
const PREFIX: &str = "leasehold-pg-";

/// Creating a database on a memory disk takes 15 ms. It is one of 8 MB, and a whole run of tests makes more than a thousand;
/// a container's memory disk often has 64 MB, and half of the memory is not enough everywhere.
const ENOUGH_KIB: u64 = 12 * 1024 * 1024;

/// A new folder whose lock we hold.
pub(crate) fn claim(account: Account, binaries: &Binaries, durability: Durability) -> Result<Home, Error> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    sweep(account, binaries);
    let parent = match durability {
        Durability::Durable => DISK,
        Durability::Fast if free_kib(Path::new(MEMORY)) >= Some(ENOUGH_KIB) => MEMORY,
        Durability::Fast => ANYWHERE,
    };
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("{parent}/{PREFIX}{}-{number}", std::process::id()));
        match Home::create(&path, account) {
            Ok(home) if home.try_own()? => return Ok(home),
            // Somebody else sweeps and took it for a leftover before we had the lock.
            Ok(_) => {}
            Err(Error::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                ) => {}
            Err(other) => return Err(other),
        }
    }
}

/// Removes the folders of processes that died together with their watchdog. Best effort: what cannot be
/// removed now is tried again by the next start.
fn sweep(account: Account, binaries: &Binaries) {
    let entries = [MEMORY, ANYWHERE, DISK]
        .into_iter()
        .filter_map(|parent| fs::read_dir(parent).ok())
        .flatten()
        .flatten();
    for entry in entries {
        if !entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
        {
            continue;
        }
        let path = entry.path();
        match Home::leftover(&path, account) {
            Some(home) if home.try_own().is_ok_and(|free| free) => {
                postmaster::stop_orphan(&home, binaries);
                drop(fs::remove_dir_all(&path));
            }
            Some(_) => {} // in use
            // Died between making the folder and the lock. Not empty: not ours.
            None => drop(fs::remove_dir(&path)),
        }
    }
}

/// From `df`, as the standard library does not tell.
fn free_kib(folder: &Path) -> Option<u64> {
    let output = Command::new("df")
        .arg("-Pk")
        .arg(folder)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()
}
