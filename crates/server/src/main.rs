//! The `leasehold` command; see [`leasehold_server::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    leasehold_server::cli::run(std::env::args_os())
}
