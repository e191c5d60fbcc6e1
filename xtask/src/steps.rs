//! Steps that print their name and how long they took, and commands that must succeed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{env, error, result};

/// Whatever stopped a command, for the person who reads it.
pub(crate) type Result<T = ()> = result::Result<T, Box<dyn error::Error>>;

/// Runs a step; a failure names it.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {name}");
    let started = Instant::now();
    let done = work();
    let took = started.elapsed().as_secs_f32();
    match done {
        Ok(value) => {
            println!("==> {name}: ok, {took:.1} s\n");
            Ok(value)
        }
        Err(error) => {
            println!("==> {name}: FAILED, {took:.1} s\n");
            Err(format!("the step `{name}` failed: {error}").into())
        }
    }
}

/// Runs a command to its end, with our standard output and error.
pub(crate) fn run(command: &mut Command) -> Result {
    let status = command
        .status()
        .map_err(|e| format!("cannot run {}: {e}", shown(command)))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{}: {status}", shown(command)).into())
    }
}

/// Runs a command and takes its standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    command.stderr(std::process::Stdio::inherit());
    let output = command
        .output()
        .map_err(|e| format!("cannot run {}: {e}", shown(command)))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{}: {}", shown(command), output.status).into())
    }
}

/// Whether a tool is installed: it answers to these arguments.
pub(crate) fn answers(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(root());
    command
}

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    let here =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or(here.clone(), Path::to_path_buf)
}

fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut text = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
