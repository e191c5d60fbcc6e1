//! [`Code`]: the closed list of what can go wrong, and the one table that says what each means to a client.

use std::fmt;
use std::ops::RangeInclusive;

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

/// What went wrong, for programs. The list is closed: a client may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Another write holds the workspace.
    WorkspaceLocked,
    /// The tenant is being drained, or has writers that a drain would have to wait for.
    TenantWriteConflict,
    /// Somebody else holds the lock.
    LockHeld,
    /// The lock ended before the work under it was done.
    LockLost,
    /// The row moved or changed while it was written.
    ModifiedConcurrently,
    /// There is one of that name already.
    AlreadyExists,
    /// The first request with this idempotency key is still running.
    IdempotencyInProgress,
    /// The idempotency key was used for another request.
    IdempotencyMismatch,
    /// The job runs already, or is paused.
    JobRunning,
    /// `If-Match` names another version than the current one.
    VersionMismatch,
    /// The request can never be served as it is.
    InvalidRequest,
    /// The resource does not know this method.
    MethodNotAllowed,
    /// The request did not arrive in time.
    RequestTimeout,
    /// There are no credentials, or they are not valid.
    Unauthenticated,
    /// The credentials are valid and do not allow this.
    Forbidden,
    /// There is no such thing, or it is not the caller's to see.
    NotFound,
    /// The service cannot do this now.
    Unavailable,
    /// Whether the write took place is not known.
    OutcomeUnknown,
    /// A bug of the service.
    Internal,
}

/// How long refused clients stay away, in milliseconds, when what stands in their way is another request.
const SOON: RangeInclusive<u64> = 100..=2_000;
/// The same when the service itself has too much to do.
const LATER: RangeInclusive<u64> = 1_000..=5_000;

struct Row {
    text: &'static str,
    status: StatusCode,
    title: &'static str,
    advice: &'static str,
    retry: Option<RangeInclusive<u64>>,
}

impl Code {
    /// Every code, in the order of the documentation.
    pub const ALL: [Self; 19] = [
        Self::WorkspaceLocked,
        Self::TenantWriteConflict,
        Self::LockHeld,
        Self::LockLost,
        Self::ModifiedConcurrently,
        Self::AlreadyExists,
        Self::IdempotencyInProgress,
        Self::IdempotencyMismatch,
        Self::JobRunning,
        Self::VersionMismatch,
        Self::InvalidRequest,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::NotFound,
        Self::Unavailable,
        Self::OutcomeUnknown,
        Self::Internal,
    ];

    /// The table. Everything that depends on a code is said here.
    const fn row(self) -> Row {
        const fn row(
            text: &'static str,
            status: StatusCode,
            retry: Option<RangeInclusive<u64>>,
            title: &'static str,
            advice: &'static str,
        ) -> Row {
            Row {
                text,
                status,
                title,
                advice,
                retry,
            }
        }
        match self {
            Self::WorkspaceLocked => row(
                "workspace_locked",
                StatusCode::CONFLICT,
                Some(SOON),
                "The workspace is locked",
                "Another write holds the workspace; `lock` says who, since when and until when. Nothing was \
                 changed. Send the same request again after `Retry-After`, or send `Prefer: wait=<seconds>` to \
                 wait in line.",
            ),
            Self::TenantWriteConflict => row(
                "tenant_write_conflict",
                StatusCode::CONFLICT,
                Some(SOON),
                "The tenant takes no writes now",
                "`reason` is `purge_in_progress` while the tenant's data is being removed, and \
                 `writes_in_progress` when a removal gave up waiting for running writes. Nothing was changed. \
                 Send the same request again after `Retry-After`.",
            ),
            Self::LockHeld => row(
                "lock_held",
                StatusCode::CONFLICT,
                Some(SOON),
                "The lock is held",
                "Somebody else holds the lock; `lock` says who, since when and until when. Send the same \
                 request again after `Retry-After`, or ask to wait.",
            ),
            Self::LockLost => row(
                "lock_lost",
                StatusCode::CONFLICT,
                Some(SOON),
                "The lock was lost",
                "The lock expired, was taken away, or reached its longest hold. A write that was to happen \
                 under it did not happen: when `retryable` is true, send it again. When it is false the hold \
                 itself is over and cannot be extended: acquire the lock anew and look at what it protects \
                 before you go on.",
            ),
            Self::ModifiedConcurrently => row(
                "modified_concurrently",
                StatusCode::CONFLICT,
                Some(SOON),
                "The row changed at the same time",
                "The row moved or changed while it was being written. Nothing was changed by this request. \
                 Send it again.",
            ),
            Self::AlreadyExists => row(
                "already_exists",
                StatusCode::CONFLICT,
                None,
                "It exists already",
                "There is one of that name. Choose another name, or change the one that is there.",
            ),
            Self::IdempotencyInProgress => row(
                "idempotency_in_progress",
                StatusCode::CONFLICT,
                Some(SOON),
                "The first request is still running",
                "A request with the same `Idempotency-Key` has not ended yet. Send the same request again \
                 after `Retry-After`: it answers what the first one answered.",
            ),
            Self::IdempotencyMismatch => row(
                "idempotency_mismatch",
                StatusCode::UNPROCESSABLE_ENTITY,
                None,
                "The idempotency key belongs to another request",
                "The same `Idempotency-Key` came with another method, path, query or body before. Use a fresh \
                 key for each distinct request.",
            ),
            Self::JobRunning => row(
                "job_running",
                StatusCode::CONFLICT,
                None,
                "The job cannot be started now",
                "The job runs already, or is paused. Look at it, and start it when it has ended or was resumed.",
            ),
            Self::VersionMismatch => row(
                "version_mismatch",
                StatusCode::PRECONDITION_FAILED,
                None,
                "The version is another one",
                "`If-Match` names a version that is not the current one. Read the current state, decide again, \
                 and send the request with the new version.",
            ),
            Self::InvalidRequest => row(
                "invalid_request",
                StatusCode::UNPROCESSABLE_ENTITY,
                None,
                "The request is not valid",
                "The request can never be served as it is: `errors` names the fields. 400 says that it could \
                 not be read, 413 that it is too large, 415 that it is in a form that is not understood, and \
                 422 that it breaks a rule. Nothing was changed. Correct it before you send it again.",
            ),
            Self::MethodNotAllowed => row(
                "method_not_allowed",
                StatusCode::METHOD_NOT_ALLOWED,
                None,
                "The method is not allowed",
                "This resource does not know the method; the header `Allow` lists those that it knows.",
            ),
            Self::RequestTimeout => row(
                "request_timeout",
                StatusCode::REQUEST_TIMEOUT,
                Some(SOON),
                "The request took too long",
                "The request did not arrive, or was not served, within its time. Send it again.",
            ),
            Self::Unauthenticated => row(
                "unauthenticated",
                StatusCode::UNAUTHORIZED,
                None,
                "Credentials are needed",
                "Send `Authorization: Bearer <key>` with a key that exists and has not expired.",
            ),
            Self::Forbidden => row(
                "forbidden",
                StatusCode::FORBIDDEN,
                None,
                "Not allowed",
                "The credentials are good, but their role does not allow this. Use others.",
            ),
            Self::NotFound => row(
                "not_found",
                StatusCode::NOT_FOUND,
                None,
                "Not found",
                "There is no such thing, or these credentials may not see it.",
            ),
            Self::Unavailable => row(
                "unavailable",
                StatusCode::SERVICE_UNAVAILABLE,
                Some(LATER),
                "Not available now",
                "The service has too much to do, cannot reach its database, or is shutting down. Nothing was \
                 changed. Send the same request again after `Retry-After`.",
            ),
            Self::OutcomeUnknown => row(
                "outcome_unknown",
                StatusCode::INTERNAL_SERVER_ERROR,
                None,
                "It is not known whether the write took place",
                "The connection to the database broke while the write was being committed. Read the state to \
                 see which it was. Repeat the request only with the same `Idempotency-Key`.",
            ),
            Self::Internal => row(
                "internal",
                StatusCode::INTERNAL_SERVER_ERROR,
                None,
                "An error of the service",
                "This is a bug. Report it with the `request_id`.",
            ),
        }
    }

    /// The code as it is written in a problem.
    pub const fn as_str(self) -> &'static str {
        self.row().text
    }

    /// The status that goes with the code; of `invalid_request`, which has four, the one for broken rules: 422.
    pub const fn status(self) -> StatusCode {
        self.row().status
    }

    /// What it means, in a few words.
    pub const fn title(self) -> &'static str {
        self.row().title
    }

    /// What a client should do about it.
    pub const fn advice(self) -> &'static str {
        self.row().advice
    }

    /// Whether the same request may succeed later without anybody changing it.
    pub const fn is_retryable(self) -> bool {
        self.row().retry.is_some()
    }

    /// A random time to stay away, in milliseconds: jittered, so that refused clients do not come back together.
    pub(crate) fn retry_after_ms(self) -> Option<u64> {
        self.row().retry.map(rand::random_range)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_serde_writes() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn retries_are_between_one_and_five_whole_seconds_and_differ() {
        for code in Code::ALL.into_iter().filter(|code| code.is_retryable()) {
            let times: Vec<_> = (0..100).map(|_| code.retry_after_ms().unwrap()).collect();
            assert!(times.iter().all(|ms| (1..=5).contains(&ms.div_ceil(1000))));
            assert!(times.iter().any(|ms| ms != &times[0]));
        }
    }
}
