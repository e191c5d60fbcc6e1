//! The parts of an [`OpenApi`] document that every operation shares: problems, their headers and examples.
//!
//! The examples are made of real problems, so that they cannot drift from what is answered.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use chrono::DateTime;
use serde_json::Value;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, HeaderBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder, Type,
};
use utoipa::{IntoParams, IntoResponses, Modify, PartialSchema, ToSchema};
use uuid::Uuid;

use crate::problem::{PROBLEM_JSON, ProblemBody};
use crate::{Code, FieldError, LockView, Problem, Reason, Timestamp};

/// The name of the security scheme that [`ProblemComponents`] adds: `Authorization: Bearer <key>`.
pub const BEARER: &str = "bearer";

/// Adds what the shared responses refer to: the schemas of problems and the security scheme [`BEARER`].
///
/// ```
/// use leasehold_http::openapi::ProblemComponents;
/// use utoipa::OpenApi;
///
/// #[derive(OpenApi)]
/// #[openapi(modifiers(&ProblemComponents))]
/// struct ApiDoc;
///
/// assert!(ApiDoc::openapi().components.unwrap().schemas.contains_key("Problem"));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ProblemComponents;

impl Modify for ProblemComponents {
    fn modify(&self, document: &mut OpenApi) {
        let components = document.components.get_or_insert_default();
        let mut schemas = Vec::new();
        ProblemBody::schemas(&mut schemas);
        schemas.push((ProblemBody::name().into_owned(), ProblemBody::schema()));
        components.schemas.extend(schemas);
        components.add_security_scheme(BEARER, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

/// The problems that any request may meet: 400, 401, 403, 404, 408, 422, 500 and 503.
#[derive(Clone, Copy, Debug)]
pub struct ReadProblems;

impl IntoResponses for ReadProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        responses(READ)
    }
}

/// The problems that a write may meet: those of [`ReadProblems`], and 409, 412, 413 and 415.
#[derive(Clone, Copy, Debug)]
pub struct WriteProblems;

impl IntoResponses for WriteProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut all = responses(READ);
        all.extend(responses(WRITE));
        all
    }
}

/// The header of every operation that takes a lock.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is documentation")]
pub struct WaitPreference {
    /// `wait=<seconds>` asks to wait for the lock instead of being refused at once (RFC 7240). The wait is
    /// bounded by the service; `Preference-Applied` in the answer says how long it would have been at most.
    #[param(rename = "Prefer", value_type = String, required = false, example = "wait=10")]
    prefer: Option<String>,
}

/// The header of every write that is done once however often it is sent.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is documentation")]
pub struct IdempotencyKey {
    /// A word of the client's own choice, a fresh one for each write: 1 to 255 visible ASCII characters. The same
    /// request with the same key is answered as the first one was, and changes nothing more, for 24 hours.
    #[param(rename = "Idempotency-Key", value_type = String, required = false, min_length = 1, max_length = 255,
            pattern = "^[!-~]+$", example = "0190c3a5-6a34-7c1e-9c8c-2f6d0f6f6e11")]
    idempotency_key: Option<String>,
}

/// Says of the successful answers of every operation with an [`IdempotencyKey`] that they may be replays. To be run on
/// the whole document.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReplayedAnswers;

impl Modify for ReplayedAnswers {
    fn modify(&self, document: &mut OpenApi) {
        let items = document.paths.paths.values_mut();
        let operations = items.flat_map(|item| {
            [&mut item.put, &mut item.post, &mut item.patch, &mut item.delete]
                .into_iter()
                .flatten()
        });
        for operation in operations {
            let keyed = operation.parameters.iter().flatten().any(
                |parameter| matches!(parameter, RefOr::T(parameter) if parameter.name == "Idempotency-Key"),
            );
            if !keyed {
                continue;
            }
            let successes = operation.responses.responses.iter_mut();
            for (_, answer) in successes.filter(|(status, _)| status.starts_with('2')) {
                if let RefOr::T(answer) = answer {
                    let only_true = ObjectBuilder::new()
                        .schema_type(Type::String)
                        .enum_values(Some(["true"]));
                    let header = HeaderBuilder::new().schema(Some(only_true)).description(Some(
                        "There when the answer was given before, to the first request with the same `Idempotency-Key`",
                    ));
                    answer
                        .headers
                        .insert("Idempotency-Replayed".to_owned(), header.build().into());
                }
            }
        }
    }
}

const READ: &[StatusCode] = &[
    StatusCode::BAD_REQUEST,
    StatusCode::UNAUTHORIZED,
    StatusCode::FORBIDDEN,
    StatusCode::NOT_FOUND,
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::UNPROCESSABLE_ENTITY,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
];

const WRITE: &[StatusCode] = &[
    StatusCode::CONFLICT,
    StatusCode::PRECONDITION_FAILED,
    StatusCode::PAYLOAD_TOO_LARGE,
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
];

fn responses(statuses: &[StatusCode]) -> BTreeMap<String, RefOr<Response>> {
    let of = |status: &StatusCode| (status.as_str().to_owned(), response(*status).into());
    statuses.iter().map(of).collect()
}

fn response(status: StatusCode) -> Response {
    let codes: Vec<_> = Code::ALL
        .into_iter()
        .filter(|code| statuses(*code).contains(&status))
        .collect();
    let listed = codes
        .iter()
        .map(|code| format!("`{code}`"))
        .collect::<Vec<_>>()
        .join(", ");
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(ProblemBody::name())));
    let content = match examples(status) {
        examples if examples.is_empty() => content,
        examples => content.examples_from_iter(examples.into_iter().map(|(code, problem)| {
            let example = ExampleBuilder::new().summary(code.title()).value(Some(problem));
            (code.as_str(), example.build())
        })),
    };
    let mut response = ResponseBuilder::new()
        .description(format!("Problem: {listed}"))
        .content(PROBLEM_JSON, content.build());
    if codes.iter().any(|code| code.is_retryable()) {
        let seconds = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(1))
            .maximum(Some(5));
        let header = HeaderBuilder::new()
            .schema(Some(seconds))
            .description(Some("Seconds to stay away, when the problem is retryable"));
        response = response.header("Retry-After", header.build());
    }
    response.build()
}

/// Every status that a code is answered with.
fn statuses(code: Code) -> Vec<StatusCode> {
    match code {
        Code::InvalidRequest => vec![
            StatusCode::BAD_REQUEST,
            StatusCode::PAYLOAD_TOO_LARGE,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            StatusCode::UNPROCESSABLE_ENTITY,
        ],
        _ => vec![code.status()],
    }
}

/// Examples where the body says more than the schema: the conflicts, and a rule that was broken.
fn examples(status: StatusCode) -> Vec<(Code, Value)> {
    let at = |micros| DateTime::from_timestamp_micros(micros);
    let lock = LockView {
        lock_id: Some(Uuid::from_u128(0x6f1d_5f0e_3c1b_4e0a_9a53_5b7d_2f0c_8e11)),
        operation: Some("POST /v1/tenants/acme/workspaces/main/default-config/batch".to_owned()),
        locked_by: Some("alice@example.com".to_owned()),
        acquired_at: at(1_935_667_020_123_456).map(Timestamp),
        expires_at: at(1_935_667_030_123_456).map(Timestamp),
        fencing_token: Some(1_099_511_627_818),
    };
    let problems = match status {
        StatusCode::CONFLICT => vec![
            Problem::contended(Code::WorkspaceLocked, lock),
            Problem::new(Code::TenantWriteConflict, "the tenant's data is being removed")
                .with_reason(Reason::PurgeInProgress),
            Problem::lock_lost(),
        ],
        StatusCode::UNPROCESSABLE_ENTITY => vec![Problem::invalid([FieldError::new(
            "operations[3].key",
            "1 to 128 of A-Z a-z 0-9 . _ -",
        )])],
        _ => Vec::new(),
    };
    let path = "/v1/tenants/acme/workspaces/main/default-config/color";
    let render = |problem: Problem| {
        let problem = problem
            .of_request("018f4e2a-7c3d-7a51-9d0e-3b8f6a2c4d10", path)
            .with_fixed_retry();
        (
            problem.body().code,
            serde_json::to_value(problem.body()).unwrap_or_default(),
        )
    };
    problems.into_iter().map(render).collect()
}
