//! What the service says of itself, to anybody: health, readiness, and what its problems mean.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use leasehold_http::{ApiPath, Code, Problem, ProblemBody};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::metrics;
use crate::state::AppState;

/// How long the database may take to answer a service that says it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// The service is well.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    #[schema(example = "ok")]
    status: &'static str,
}

/// Whether the process lives
#[utoipa::path(
    get, path = "/healthz", tag = "service", operation_id = "health", security(()),
    responses((status = 200, description = "It lives", body = Health)),
)]
pub(crate) async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Whether the service takes requests
///
/// Not while it is about to stop, and not without its database.
#[utoipa::path(
    get, path = "/readyz", tag = "service", operation_id = "readiness", security(()),
    responses(
        (status = 200, description = "It does", body = Health),
        (status = 503, description = "It does not", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn ready(State(state): State<AppState>) -> Result<Json<Health>, Problem> {
    if state.is_draining() {
        return Err(Problem::new(Code::Unavailable, "the service is about to stop"));
    }
    let ask = async |conn: &mut AsyncPgConnection| Ok(conn.batch_execute("SELECT").await?);
    state.read_within(READY_TIMEOUT, ask).await?;
    Ok(Json(Health { status: "ok" }))
}

/// What the service has counted and measured
///
/// For Prometheus. Numbers of the queue are those of all instances, and may be some seconds old.
#[utoipa::path(
    get, path = "/metrics", tag = "service", operation_id = "metrics", security(()),
    responses((status = 200, description = "In the text format of Prometheus", body = String,
               content_type = "text/plain; version=0.0.4")),
)]
pub(crate) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    // Before anything is set: the first to ask may start it all.
    metrics::start();
    state.sampler().sample(state.db()).await;
    metrics::render()
}

/// The path of a kind of problem.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(crate) struct ProblemPath {
    /// The code of a problem.
    #[param(example = "workspace_locked")]
    code: String,
}

/// A kind of problem.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct ProblemKind {
    /// For programs.
    code: Code,
    /// In a few words.
    title: &'static str,
    /// The HTTP status; of `invalid_request`, which has several, the one for broken rules.
    status: u16,
    /// Whether the same request may succeed later.
    retryable: bool,
    /// What a client should do.
    advice: &'static str,
}

/// What a problem means
///
/// And what a client should do about it: as JSON, or as text for people when `Accept` asks for `text/markdown`.
#[utoipa::path(
    get, path = "/problems/{code}", tag = "service", operation_id = "describe_problem", security(()),
    params(ProblemPath),
    responses(
        (status = 200, description = "The kind of problem",
         content((ProblemKind = "application/json"), (String = "text/markdown"))),
        (status = 404, description = "There is no such code", body = ProblemBody,
         content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn problem(
    ApiPath(path): ApiPath<ProblemPath>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let code = Code::ALL.into_iter().find(|code| code.as_str() == path.code);
    let code = code.ok_or_else(|| Problem::not_found("there is no such code"))?;
    let (title, status, advice) = (code.title(), code.status().as_u16(), code.advice());
    let mut accepted = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    if accepted.any(|value| value.contains("text/markdown")) {
        let text = format!("# {title}\n\n`{code}`, HTTP {status}\n\n{advice}\n");
        return Ok(([(header::CONTENT_TYPE, "text/markdown; charset=utf-8")], text).into_response());
    }
    let kind = ProblemKind {
        code,
        title,
        status,
        retryable: code.is_retryable(),
        advice,
    };
    Ok(Json(kind).into_response())
}
