//! As whom the server runs: `initdb` and `postgres` refuse to run as root.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::Error;

/// The user that runs the server and owns its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    gid: u32,
    /// We are root and become this user for every program of Postgres.
    switch: bool,
}

impl Account {
    /// Ourselves, or when we are root the user `postgres`, else `nobody`.
    pub(crate) fn choose() -> Result<Self, Error> {
        let (uid, gid) = (our_id("-u")?, our_id("-g")?);
        if uid != 0 {
            return Ok(Self {
                uid,
                gid,
                switch: false,
            });
        }
        let file = Path::new("/etc/passwd");
        let users = fs::read_to_string(file).map_err(Error::io("read", file))?;
        let (uid, gid) = find_user(&users, &["postgres", "nobody"]).ok_or(Error::NoAccount)?;
        Ok(Self {
            uid,
            gid,
            switch: true,
        })
    }

    /// Root serves an existing folder as the user that it belongs to, so that `sudo` for once does not lock
    /// that user out of their own data.
    pub(crate) fn or_owner_of(self, existing: &fs::Metadata) -> Self {
        match existing.uid() {
            0 => self,
            uid if self.switch => Self {
                uid,
                gid: existing.gid(),
                switch: true,
            },
            _ => self,
        }
    }

    /// True when files made by this process belong to root and must be given to the account.
    pub(crate) fn is_other(self) -> bool {
        self.switch
    }

    pub(crate) fn give(self, path: &Path) -> Result<(), Error> {
        if self.switch {
            chown(path, Some(self.uid), Some(self.gid)).map_err(Error::io("change the owner of", path))?;
        }
        Ok(())
    }

    /// A command run as the account. No `PG…` variable of our caller may change what the programs do, and
    /// the working folder must be one that the account can read.
    pub(crate) fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if self.switch {
            command.uid(self.uid).gid(self.gid); // std drops the supplementary groups as well
        }
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        // Messages in English, whatever the locale, so that what we show of a log can be looked up.
        command.env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        command
    }

    /// Whether the account can enter the folder: every folder above it must let it through.
    pub(crate) fn can_enter(self, folder: &Path) -> bool {
        let mut shell = self.command(Path::new("/bin/sh"));
        shell.args(["-c", "cd -- \"$0\""]).arg(folder);
        shell
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    }
}

/// The standard library has no getuid.
fn our_id(flag: &str) -> Result<u32, Error> {
    let program = Path::new("id");
    let output = Command::new(program)
        .arg(flag)
        .output()
        .map_err(Error::io("run", program))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| Error::Failed {
        program: "id",
        said: text.into_owned(),
    })
}

/// User and group id of the first name that is there, in the format of `passwd(5)`.
fn find_user(passwd: &str, names: &[&str]) -> Option<(u32, u32)> {
    names.iter().find_map(|name| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.next() == Some(name);
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            found.then_some((uid, gid))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::find_user;

    #[test]
    fn the_first_name_wins_whatever_the_order_of_the_file() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\nnobody:x:65534:65533::/:/bin/false\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(find_user(passwd, &["postgres", "nobody"]), Some((101, 104)));
        assert_eq!(find_user(passwd, &["absent", "nobody"]), Some((65534, 65533)));
        assert_eq!(find_user(passwd, &["absent"]), None);
    }
}
