//! [`Problem`]: every refusal and failure as one shape, `application/problem+json` (RFC 9457).

use std::fmt;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use leasehold_domain::{HeldLock, LockGuard, LockId};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Code;

/// The media type of every problem.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// The most bytes of a text that may repeat what the client sent.
const MAX_TEXT: usize = 300;

pub(crate) type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// An answer that says what went wrong, to whom it may concern: a stable code for programs, a sentence for
/// people, and nothing for operators.
///
/// What operators need is given with [`Problem::because`]. It never becomes part of the answer: it travels in
/// the response's extensions to the [`crate::RequestIdLayer`], which logs it once, with the request id.
#[derive(Clone)]
pub struct Problem(Box<Inner>);

#[derive(Clone)]
struct Inner {
    body: ProblemBody,
    status: StatusCode,
    cause: Option<Cause>,
}

/// A refusal or a failure (RFC 9457).
// What `Problem` looks like on the wire; the text above is for the readers of the API's document.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// Where the kind of problem is described.
    #[schema(value_type = String, format = "uri-reference", example = "/problems/workspace_locked")]
    pub r#type: Type,
    /// The kind of problem, in a few words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong this time.
    pub detail: String,
    /// The path of the request.
    #[schema(required, value_type = String)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// The kind of problem, for programs.
    pub code: Code,
    /// The id under which the service's log knows the request.
    #[schema(required, value_type = String)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Whether the same request may succeed later without being changed.
    pub retryable: bool,
    /// How long to stay away, in milliseconds; `Retry-After` is the same in whole seconds, rounded up.
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The lock that is in the way, or was lost.
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock: Option<LockView>,
    /// Which of the situations that share the code it is.
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// The fields that are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

/// The `type` member of a problem: `/problems/{code}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type(Code);

impl Serialize for Type {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("/problems/{}", self.0))
    }
}

/// Why a tenant takes no writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The tenant's data is being removed, or a removal waits for its turn.
    PurgeInProgress,
    /// A removal did not start, because writes went on for too long.
    WritesInProgress,
}

/// A field that is wrong, and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// Where: a path such as `operations[3].key`, the name of a parameter or header, or `body`.
    #[schema(example = "operations[3].key")]
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// Names the field and says what is wrong. Long messages are cut.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: cut(field.into()),
            message: cut(message.into()),
        }
    }
}

/// A hold as clients see it. What is not known of it is `null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct LockView {
    /// The acquisition.
    #[schema(required)]
    pub lock_id: Option<Uuid>,
    /// What the holder does.
    #[schema(
        required,
        example = "PUT /v1/tenants/acme/workspaces/main/default-config/color"
    )]
    pub operation: Option<String>,
    /// Who holds it.
    #[schema(required, example = "alice@example.com")]
    pub locked_by: Option<String>,
    /// Since when, by the database's clock.
    #[schema(required)]
    pub acquired_at: Option<Timestamp>,
    /// Until when, unless it is renewed.
    #[schema(required)]
    pub expires_at: Option<Timestamp>,
    /// The fencing token of the acquisition.
    #[schema(required)]
    pub fencing_token: Option<i64>,
}

impl From<&HeldLock> for LockView {
    /// Leaves out the database session: it is for operators.
    fn from(held: &HeldLock) -> Self {
        let holder = held.holder.as_ref();
        Self {
            lock_id: held.lock_id.map(LockId::as_uuid),
            operation: holder.map(|holder| holder.operation.clone()),
            locked_by: holder.map(|holder| holder.owner.clone()),
            acquired_at: held.acquired_at.map(Timestamp::from),
            expires_at: held.expires_at.map(Timestamp::from),
            fencing_token: held.fencing_token.map(|token| token.get()),
        }
    }
}

impl From<&LockGuard> for LockView {
    fn from(guard: &LockGuard) -> Self {
        Self {
            lock_id: Some(guard.lock_id().as_uuid()),
            operation: Some(guard.holder().operation.clone()),
            locked_by: Some(guard.holder().owner.clone()),
            acquired_at: Some(guard.acquired_at().into()),
            expires_at: guard.expires_at().map(Timestamp::from),
            fencing_token: guard.fencing_token().map(|token| token.get()),
        }
    }
}

impl From<LockId> for LockView {
    fn from(lock_id: LockId) -> Self {
        Self {
            lock_id: Some(lock_id.as_uuid()),
            ..Self::default()
        }
    }
}

/// An instant on the wire: RFC 3339 in UTC with six decimals and `Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, format = DateTime, example = "2031-05-04T13:37:00.123456Z")]
pub struct Timestamp(pub DateTime<Utc>);

impl From<DateTime<Utc>> for Timestamp {
    fn from(instant: DateTime<Utc>) -> Self {
        Self(instant)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.format("%Y-%m-%dT%H:%M:%S%.6fZ").fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Problem {
    /// A problem with the status, title and retry rule of its code. The detail is shown to the client.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self::with_status(code, code.status(), detail)
    }

    fn with_status(code: Code, status: StatusCode, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            body: ProblemBody {
                r#type: Type(code),
                title: code.title(),
                status: status.as_u16(),
                detail: cut(detail.into()),
                instance: None,
                code,
                request_id: None,
                retryable: code.is_retryable(),
                retry_after_ms: code.retry_after_ms(),
                lock: None,
                reason: None,
                errors: Vec::new(),
            },
            status,
            cause: None,
        }))
    }

    /// 400: the request cannot be read. `field` is `body` or the name of a parameter or header.
    pub fn malformed(field: impl Into<String>, message: impl Into<String>) -> Self {
        let error = FieldError::new(field, message);
        let detail = format!("{}: {}", error.field, error.message);
        Self::with_status(Code::InvalidRequest, StatusCode::BAD_REQUEST, detail).with_errors([error])
    }

    /// 422: the request is well-formed and breaks rules.
    pub fn invalid(errors: impl IntoIterator<Item = FieldError>) -> Self {
        let errors: Vec<_> = errors.into_iter().collect();
        let detail = match errors.as_slice() {
            [] => Code::InvalidRequest.title().to_owned(),
            [only] => format!("{}: {}", only.field, only.message),
            [first, rest @ ..] => format!("{}: {} (and {} more)", first.field, first.message, rest.len()),
        };
        Self::new(Code::InvalidRequest, detail).with_errors(errors)
    }

    /// 413: the body has more than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        let detail = format!("the body has more than {limit} bytes");
        Self::with_status(Code::InvalidRequest, StatusCode::PAYLOAD_TOO_LARGE, detail)
    }

    /// 415: the body is not in a form that is understood here.
    pub fn unsupported_media_type(detail: impl Into<String>) -> Self {
        Self::with_status(Code::InvalidRequest, StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
    }

    /// 401: there are no credentials, or they are not valid. It does not say which.
    pub fn unauthenticated() -> Self {
        Self::new(
            Code::Unauthenticated,
            "no valid credentials came with the request",
        )
    }

    /// 403: the credentials do not allow this.
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(Code::Forbidden, detail)
    }

    /// 404: there is no such thing, or it is not the caller's to see.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(Code::NotFound, detail)
    }

    /// 503: the service cannot do this now. The cause is for the log.
    pub fn unavailable(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::new(Code::Unavailable, "the service cannot do this now").because(cause)
    }

    /// 500: a bug. The client learns nothing but the request id; the cause is for the log.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::bug().because(cause)
    }

    pub(crate) fn bug() -> Self {
        Self::new(
            Code::Internal,
            "an error of the service; report it with the request id",
        )
    }

    /// 409: the lock ended before the work under it was done. Nothing was written; the same request may succeed.
    pub fn lock_lost() -> Self {
        Self::new(
            Code::LockLost,
            "the lock was lost before the work was done; nothing was written",
        )
    }

    /// The problem for an error status that somebody else has answered without saying more; `None` for those
    /// that no code stands for.
    pub(crate) fn for_status(status: StatusCode) -> Option<Self> {
        let invalid = |detail| Some(Self::with_status(Code::InvalidRequest, status, detail));
        match status {
            StatusCode::BAD_REQUEST => invalid("the request cannot be read"),
            StatusCode::UNAUTHORIZED => Some(Self::unauthenticated()),
            StatusCode::FORBIDDEN => Some(Self::forbidden("the credentials do not allow this")),
            StatusCode::NOT_FOUND => Some(Self::not_found("there is nothing at this address")),
            StatusCode::METHOD_NOT_ALLOWED => Some(Self::new(
                Code::MethodNotAllowed,
                "this resource does not know the method",
            )),
            StatusCode::REQUEST_TIMEOUT => Some(Self::new(Code::RequestTimeout, "the request took too long")),
            StatusCode::PAYLOAD_TOO_LARGE => invalid("the body is too large"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => invalid("the body is in a form that is not understood"),
            StatusCode::UNPROCESSABLE_ENTITY => invalid("the request breaks a rule"),
            StatusCode::INTERNAL_SERVER_ERROR => Some(Self::bug()),
            StatusCode::SERVICE_UNAVAILABLE => {
                Some(Self::new(Code::Unavailable, "the service cannot do this now"))
            }
            _ => None,
        }
    }

    /// The same problem with the lock it is about.
    #[must_use]
    pub fn with_lock(mut self, lock: impl Into<LockView>) -> Self {
        self.0.body.lock = Some(lock.into());
        self
    }

    /// The same problem with a reason.
    #[must_use]
    pub fn with_reason(mut self, reason: Reason) -> Self {
        self.0.body.reason = Some(reason);
        self
    }

    /// The same problem with the fields that are wrong.
    #[must_use]
    pub fn with_errors(mut self, errors: impl IntoIterator<Item = FieldError>) -> Self {
        self.0.body.errors = errors.into_iter().collect();
        self
    }

    /// The same problem, which no repetition cures this time.
    #[must_use]
    pub fn not_retryable(mut self) -> Self {
        self.0.body.retryable = false;
        self.0.body.retry_after_ms = None;
        self
    }

    /// The same problem with its cause, for the log alone.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.cause = Some(Arc::from(cause.into()));
        self
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// What the client reads.
    pub fn body(&self) -> &ProblemBody {
        &self.0.body
    }

    pub(crate) fn cause(&self) -> Option<&Cause> {
        self.0.cause.as_ref()
    }

    /// The same problem with what only the request knows.
    pub(crate) fn of_request(mut self, request_id: &str, path: &str) -> Self {
        self.0.body.request_id = Some(request_id.to_owned());
        self.0.body.instance = Some(path.to_owned());
        self
    }

    /// The same problem with a retry time that does not change from one run to the next, for documents.
    pub(crate) fn with_fixed_retry(mut self) -> Self {
        self.0.body.retry_after_ms = self.0.body.retry_after_ms.map(|_| 750);
        self
    }

    /// The body as JSON.
    pub(crate) fn to_json(&self) -> Body {
        // Texts, numbers and a closed set of members: writing them cannot fail.
        serde_json::to_vec(&self.0.body).map_or_else(|_| Body::empty(), Body::from)
    }
}

/// Shows the cause too: for logs, never for clients.
impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Problem")
            .field("code", &self.0.body.code)
            .field("status", &self.0.status)
            .field("detail", &self.0.body.detail)
            .field("errors", &self.0.body.errors)
            .field("cause", &self.0.cause)
            .finish_non_exhaustive()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status(), self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(ms) = self.0.body.retry_after_ms {
            headers.insert(header::RETRY_AFTER, ms.div_ceil(1000).into());
        }
        if self.0.body.code == Code::Unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Cuts a text that may repeat what the client sent, at the border of a character.
fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    text
}
