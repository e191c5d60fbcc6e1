//! What the kernel says of a process.

use std::fmt::Display;
use std::fs;

/// As `proc(5)` has it: `T` is stopped, `Z` has ended and is not buried yet. `None` when there is none.
pub fn state(process: impl Display) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it may have any sign in it.
    stat.rsplit_once(") ")?.1.chars().next()
}
