#![doc = include_str!("../README.md")]

mod code;
mod error;
mod extract;
mod identity;
mod locked;
pub mod openapi;
mod panic;
mod prefer;
mod problem;
mod request_id;
mod scope;
mod validate;

pub use code::Code;
pub use extract::{ApiJson, ApiPath, ApiQuery, BODY_READ_TIMEOUT, NoBody};
pub use identity::{Authenticate, BearerToken, Caller};
pub use locked::{Early, LockTarget, Locked, operation};
pub use panic::on_panic;
pub use prefer::{PREFER, PREFERENCE_APPLIED, preferred_wait};
pub use problem::{FieldError, LockView, PROBLEM_JSON, Problem, ProblemBody, Reason, Timestamp, Type};
pub use request_id::{RequestId, RequestIdLayer, WithRequestId, X_REQUEST_ID};
pub use scope::{LockScope, LockScopeLayer, RELEASE_TIMEOUT, ScopedGuard, WithLockScope};
pub use validate::Validate;
