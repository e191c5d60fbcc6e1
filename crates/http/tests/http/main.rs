//! The crate from outside: routers asked directly, and served on loopback to clients that may leave.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail their test")]

mod documented;
mod leaving;
mod logs;
mod openapi;
mod order;
mod problems;
mod rejections;
mod release;
mod support;
