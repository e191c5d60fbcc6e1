//! The crate from outside, in one binary.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod extras;
mod guard;
mod memory_lock;
mod memory_queue;
