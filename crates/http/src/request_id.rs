//! [`RequestIdLayer`]: one id from the client's header to every log line, answer and problem.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::future::BoxFuture;
use tower::{Layer, Service};
use tracing::Instrument;
use uuid::Uuid;

use crate::{Code, Problem};

/// The header that carries the id, both ways.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const MAX_LENGTH: usize = 128;

/// The id of a request: 1 to 128 of `A-Z a-z 0-9 . _ -`, so that it can stand in a header, a log line and JSON
/// as it is. As an extractor it fails only where the [`RequestIdLayer`] is missing.
#[derive(Clone, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The id that the client chose when it is a sane one, else a fresh one that sorts by time (UUID v7).
    fn of(headers: &HeaderMap) -> Self {
        let sane = |id: &&str| {
            (1..=MAX_LENGTH).contains(&id.len())
                && id
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        let given = headers.get(X_REQUEST_ID).and_then(|value| value.to_str().ok());
        match given.filter(sane) {
            Some(given) => Self(given.into()),
            None => Self(Uuid::now_v7().to_string().into()),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let id = parts.extensions.get::<Self>().cloned();
        id.ok_or_else(|| Problem::internal("the RequestIdLayer is missing"))
    }
}

/// The path of a request as it arrived: nested routers see only the rest of it.
#[derive(Clone)]
pub(crate) struct WholePath(pub(crate) Arc<str>);

/// Goes around everything else. It
/// * takes over the client's `x-request-id` or makes one, puts it on the response, and runs the request inside a
///   tracing span `request` that has it;
/// * completes every [`Problem`] with `request_id` and `instance`, and logs its cause, once;
/// * turns error answers that are no problems yet (the router's own 404 and 405, a plain extractor's text, a
///   time-out or panic layer's empty body) into problems, so that a client meets one shape only. Error answers
///   that have a body in another form are left alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestIdLayer;

impl<I> Layer<I> for RequestIdLayer {
    type Service = WithRequestId<I>;

    fn layer(&self, inner: I) -> WithRequestId<I> {
        WithRequestId(inner)
    }
}

/// The service that [`RequestIdLayer`] makes.
#[derive(Clone, Copy, Debug)]
pub struct WithRequestId<I>(I);

impl<I> Service<Request> for WithRequestId<I>
where
    I: Service<Request, Response = Response> + Clone + Send + 'static,
    I::Future: Send,
{
    type Response = Response;
    type Error = I::Error;
    type Future = BoxFuture<'static, Result<Response, I::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let id = RequestId::of(request.headers());
        let path: Arc<str> = request.uri().path().into();
        let span =
            tracing::info_span!("request", request_id = %id, method = %request.method(), path = &*path);
        request.extensions_mut().insert(id.clone());
        request.extensions_mut().insert(WholePath(Arc::clone(&path)));
        let answer = span.in_scope(|| self.0.call(request));
        let finished = async move {
            let mut response = finish(answer.await?, &id, &path);
            if let Ok(value) = HeaderValue::from_str(id.as_str()) {
                response.headers_mut().insert(X_REQUEST_ID, value);
            }
            Ok(response)
        };
        Box::pin(finished.instrument(span))
    }
}

fn finish(mut response: Response, id: &RequestId, path: &str) -> Response {
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        log(&problem);
        *response.body_mut() = problem.of_request(id.as_str(), path).to_json();
        // Those of the body that was there before.
        response.headers_mut().remove(header::CONTENT_LENGTH);
        response
    } else if let Some(problem) = bare_problem(&response) {
        log(&problem);
        let (mut parts, _) = response.into_parts();
        let (problem_parts, body) = problem.of_request(id.as_str(), path).into_response().into_parts();
        parts.headers.remove(header::CONTENT_LENGTH);
        // Keeps what the first answer said beside its body, such as `Allow`.
        parts.headers.extend(problem_parts.headers);
        Response::from_parts(parts, body)
    } else {
        response
    }
}

/// The problem to put in the place of an error answer without a body that means anything to a program.
fn bare_problem(response: &Response) -> Option<Problem> {
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let bare = content_type.is_none_or(|value| value.as_bytes().starts_with(b"text/plain"));
    bare.then(|| Problem::for_status(response.status())).flatten()
}

fn log(problem: &Problem) {
    let body = problem.body();
    let (code, status) = (body.code.as_str(), body.status);
    match (problem.cause(), body.code) {
        (Some(cause), Code::Internal | Code::OutcomeUnknown) => {
            tracing::error!(code, status, cause = %Chain(&**cause), "the request failed");
        }
        (Some(cause), _) => {
            tracing::warn!(code, status, cause = %Chain(&**cause), "the request was refused");
        }
        (None, Code::Internal | Code::OutcomeUnknown) => {
            tracing::error!(code, status, "the request failed");
        }
        (None, _) => tracing::debug!(code, status, detail = %body.detail, "the request was refused"),
    }
}

/// An error with all its sources, in one line.
struct Chain<'a>(&'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sane_ids_are_taken_over() {
        let of = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            RequestId::of(&headers)
        };
        let longest = "x".repeat(MAX_LENGTH);
        for sane in [
            "a",
            "req-1",
            "A.b_c-9",
            "018f4e2a-0000-7000-8000-000000000000",
            &longest,
        ] {
            assert_eq!(of(sane.as_bytes()).as_str(), sane);
        }
        let too_long = "x".repeat(MAX_LENGTH + 1);
        for insane in [
            "", " ", "a b", "a\tb", "a;b", "a\"b", "a{b", "a/b", "é", &too_long,
        ] {
            let made = of(insane.as_bytes());
            assert_eq!(
                Uuid::parse_str(made.as_str()).unwrap().get_version_num(),
                7,
                "{insane:?}"
            );
        }
        assert_ne!(RequestId::of(&HeaderMap::new()), RequestId::of(&HeaderMap::new()));
    }
}
