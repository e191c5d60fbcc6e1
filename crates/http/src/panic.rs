//! [`on_panic`]: what a client is told when a handler panics.

use std::any::Any;

use axum::response::{IntoResponse, Response};

use crate::Problem;

/// The answer to a panic, for tower-http's `CatchPanicLayer::custom`: a 500 that says nothing; the message of the
/// panic goes to the log.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that CatchPanicLayer asks for"
)]
pub fn on_panic(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Problem::internal(format!("a handler panicked: {}", message.unwrap_or("no message"))).into_response()
}
