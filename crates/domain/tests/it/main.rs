//! The crate from outside, in one binary.

mod memory_lock;
