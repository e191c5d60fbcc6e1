//! The log of the services in this process. Every line is looked at, whatever is tested.

use std::io::{self, Write};
use std::sync::{Mutex, Once, PoisonError};

use tracing_subscriber::EnvFilter;

use crate::secrets;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps the lines of the log from now on.
pub(crate) fn keep() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let lines = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new("info,leasehold=debug"))
            .with_ansi(false)
            .with_writer(|| Line);
        lines.init();
    });
}

/// Fails if a line that was kept tells what it must not.
pub(crate) fn look() {
    let lines = std::mem::take(&mut *LINES.lock().unwrap_or_else(PoisonError::into_inner));
    for line in lines {
        secrets::assert_none_in_log(&line);
    }
}

/// Each event is written at once.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line).into_owned();
        LINES.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
