//! The `leasehold` command.

mod documents;
mod jobs;
mod keys;
mod locks;
mod migrate;
mod postgres;
mod queue;
mod run;
mod serve;
mod terminal;

use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use leasehold_domain::Holder;

use crate::config::ServeConfig;

/// Bad usage, as `sysexits.h` numbers it.
const USAGE: u8 = 64;

pub(crate) use serve::Stage;

pub(crate) type Failed = Box<dyn Error + Send + Sync>;

#[derive(Debug, Parser)]
#[command(
    name = "leasehold",
    version,
    about = "One writer at a time, on the Postgres you already run"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service (the default)
    Serve(ServeConfig),
    /// Bring the schema of the database up to date
    Migrate(migrate::MigrateArgs),
    /// Make, list and revoke the keys of callers
    Keys(keys::KeysArgs),
    /// Look at what runs once a slot, and intervene
    Jobs(jobs::JobsArgs),
    /// Look at what is to be done, and at what was given up
    Queue(queue::QueueArgs),
    /// Look at locks, and take them away
    Locks(locks::LocksArgs),
    /// Run a command under a lock
    Run(run::RunArgs),
    /// Print the document that describes the API
    #[command(hide = true)]
    Openapi,
    /// Print the tables of the database
    #[command(hide = true)]
    Schema(documents::SchemaArgs),
}

/// Does what the command line says.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(with_default(args)) {
        Ok(cli) => cli,
        Err(error) => {
            // Where it cannot be printed nobody reads it.
            drop(error.print());
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let done = match cli.command {
        Command::Serve(config) => {
            if let Err(error) = config.check() {
                return refuse(&error);
            }
            serve::run(&config)
        }
        Command::Migrate(args) => migrate::run(&args),
        Command::Keys(args) => keys::run(&args),
        Command::Jobs(args) => jobs::run(&args),
        Command::Queue(args) => queue::run(&args),
        Command::Locks(args) => locks::run(&args),
        Command::Run(args) => return run::run(&args),
        Command::Openapi => documents::openapi(),
        Command::Schema(args) => documents::schema(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

/// Without a command, the service is meant.
fn with_default(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let first = args.get(1).and_then(|first| first.to_str());
    let own = ["-h", "--help", "-V", "--version"];
    if first.is_none_or(|first| first.starts_with('-') && !own.contains(&first)) {
        args.insert(args.len().min(1), "serve".into());
    }
    args
}

fn refuse(why: &str) -> ExitCode {
    say(&format!("error: {why}"));
    ExitCode::from(USAGE)
}

fn complain(error: &dyn Error) {
    say(&format!("error: {}", in_one_line(error)));
}

/// Prints a line to standard error, which may be closed.
fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// An error with all its causes. It may tell of others' locks, and so in their words.
fn in_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some repeat their cause.
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    on_one_line(&text)
}

/// Who a command's locks are held by, and who takes others' away: user@host.
fn owner() -> String {
    let user = ["USER", "LOGNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok());
    let user = user.unwrap_or_else(|| format!("uid-{}", rustix::process::getuid().as_raw()));
    let system = rustix::system::uname();
    let mut owner = format!("{user}@{}", system.nodename().to_string_lossy());
    owner.truncate(owner.floor_char_boundary(Holder::MAX_FIELD_BYTES));
    owner
}

/// Prints to standard output. Whoever closed it early has seen enough.
fn print(text: &str) -> Result<(), Failed> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// What others have written, for one line of a terminal: terminals obey some characters.
fn on_one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_others_wrote_is_one_line_and_commands_no_terminal() {
        assert_eq!(on_one_line("naïve/prod 1"), "naïve/prod 1");
        assert_eq!(on_one_line("a\u{1b}[2J\nb\u{9b}"), "a\\u{1b}[2J\\nb\\u{9b}");
        let error = io::Error::other("held by a\n\u{1b}]0;root\u{7}");
        assert_eq!(in_one_line(&error), "held by a\\n\\u{1b}]0;root\\u{7}");
    }

    fn parsed(args: &[&str]) -> Result<Cli, clap::Error> {
        let args = std::iter::once(&"leasehold").chain(args).map(OsString::from);
        Cli::try_parse_from(with_default(args))
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_service_is_the_default() {
        for args in [
            &[][..],
            &["serve"],
            &["--listen-addr", "127.0.0.1:0"],
            &["--migrate"],
        ] {
            assert!(
                matches!(
                    parsed(args),
                    Ok(Cli {
                        command: Command::Serve(_)
                    })
                ),
                "{args:?}"
            );
        }
        assert!(matches!(
            parsed(&["keys", "list"]),
            Ok(Cli {
                command: Command::Keys(_)
            })
        ));
        assert!(parsed(&["--version"]).is_err_and(|error| !error.use_stderr()));
        assert!(parsed(&["sreve"]).is_err_and(|error| error.use_stderr()));
    }
}
