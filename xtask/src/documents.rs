//! Files that are made from the program and committed: the check that they still say what it does.

use std::fs;
use std::path::Path;
use std::process::Command;

use leasehold_embedded::Cluster;

use crate::steps::{self, Result};

/// What to do with the committed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Write,
    Check,
}

impl Mode {
    pub(crate) fn from_flag(check: bool) -> Self {
        if check { Self::Check } else { Self::Write }
    }
}

/// The document of the HTTP interface, as the server prints it.
pub(crate) fn openapi(server: &Path, mode: Mode) -> Result {
    let made = steps::output(Command::new(server).arg("openapi").env_clear())?;
    settle("openapi/leasehold-v1.json", &made, "cargo xtask openapi", mode)
}

/// The tables after all migrations, as Postgres describes them: a change of the schema shows in its diff.
pub(crate) fn schema(server: &Path, mode: Mode) -> Result {
    let cluster = Cluster::temporary().start()?;
    let url = cluster.url("postgres");
    // Nobody's own settings.
    let on_it = |word: &str| {
        let mut command = Command::new(server);
        command.arg(word).env_clear().env("DATABASE_URL", &url);
        command
    };
    steps::run(&mut on_it("migrate"))?;
    let made = steps::output(&mut on_it("schema"))?;
    settle("migrations/schema.txt", &made, "cargo xtask schema", mode)
}

fn settle(file: &str, made: &[u8], how: &str, mode: Mode) -> Result {
    let path = steps::root().join(file);
    match mode {
        Mode::Write => fs::write(&path, made).map_err(|e| format!("cannot write {file}: {e}"))?,
        Mode::Check => {
            let committed =
                fs::read(&path).map_err(|e| format!("cannot read {file}: {e}; make it with `{how}`"))?;
            if let Some(line) = first_difference(&committed, made) {
                return Err(format!(
                    "{file} is not what the program says, from line {line} on: \
                     run `{how}`, look at the diff and commit it"
                )
                .into());
            }
        }
    }
    println!("{file}: {} bytes", made.len());
    Ok(())
}

/// The number of the first line that differs; a missing end of line differs too.
fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    if one == other {
        return None;
    }
    let (one, other) = (
        one.split_inclusive(|b| *b == b'\n'),
        other.split_inclusive(|b| *b == b'\n'),
    );
    Some(one.zip(other).take_while(|(a, b)| a == b).count() + 1)
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn a_difference_is_found_where_it_is() {
        assert_eq!(first_difference(b"a\nb\n", b"a\nb\n"), None);
        assert_eq!(first_difference(b"a\nb\n", b"a\nc\n"), Some(2));
        assert_eq!(first_difference(b"a\nb\n", b"a\n"), Some(2));
        assert_eq!(first_difference(b"a\nb", b"a\nb\n"), Some(2));
        assert_eq!(first_difference(b"", b"a\n"), Some(1));
    }
}
