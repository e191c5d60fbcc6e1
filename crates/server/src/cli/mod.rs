//! The `leasehold` command.

mod documents;
mod jobs;
mod keys;
mod migrate;
mod postgres;
mod serve;

use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    drop(writeln!(std::io::stderr(), "error: {why}"));
    ExitCode::from(USAGE)
}

/// An error with all its causes, in one line.
fn complain(error: &dyn Error) {
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
    drop(writeln!(std::io::stderr(), "error: {text}"));
}

/// Prints to standard output. Whoever closed it early has seen enough.
fn print(text: &str) -> Result<(), Failed> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
