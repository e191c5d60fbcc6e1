//! [`ApiJson`], [`ApiPath`], [`ApiQuery`], [`NoBody`]: axum's extractors, answering with problems.
//!
//! The line between 400 and 422: what cannot be read is 400 (JSON that is none, a path or query value that does
//! not parse), what can be read and is of a wrong type, out of range or against a rule is 422.

use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use crate::validate::check;
use crate::{Code, FieldError, Problem, Validate};

/// How long a body may take to arrive.
pub const BODY_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of a body that is too large is read and thrown away, so that the client, which may not look at the
/// answer before it has sent everything, gets to see it.
const DRAIN_BYTES: usize = 16 * 1024 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A JSON body that was read whole, within its size and time, and checked.
///
/// 415 when it is not said to be JSON, 413 when it has more than [`Validate::MAX_BYTES`], 408 when it has not
/// arrived within [`BODY_READ_TIMEOUT`], 400 when it is no JSON, and 422, naming the field, when it is not of
/// this type, breaks a rule of [`Validate`] or has a text with NUL, which Postgres cannot store.
#[derive(Clone, Copy, Debug)]
pub struct ApiJson<T>(pub T);

impl<S, T> FromRequest<S> for ApiJson<T>
where
    S: Sync,
    T: DeserializeOwned + Validate,
{
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        must_be_json(&parts.headers)?;
        let bytes = read(&parts.headers, body, T::MAX_BYTES).await?;
        let value = parse(&bytes)?;
        check(&value)?;
        Ok(Self(value))
    }
}

/// No body: for methods such as DELETE, where one would mean nothing. It is not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoBody;

impl<S: Sync> FromRequest<S> for NoBody {
    type Rejection = Infallible;

    async fn from_request(_: Request, _: &S) -> Result<Self, Infallible> {
        Ok(Self)
    }
}

/// The parameters of the path. 400 when one does not parse.
#[derive(Clone, Copy, Debug)]
pub struct ApiPath<T>(pub T);

impl<S, T> FromRequestParts<S> for ApiPath<T>
where
    S: Send + Sync,
    T: DeserializeOwned + Send,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        no_nul("path", parts.uri.path())?;
        let Path(value) = Path::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// The parameters of the query. 400 when one is missing or does not parse, 422 when one breaks a rule of
/// [`Validate`].
#[derive(Clone, Copy, Debug)]
pub struct ApiQuery<T>(pub T);

impl<S, T> FromRequestParts<S> for ApiQuery<T>
where
    S: Send + Sync,
    T: DeserializeOwned + Validate,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        no_nul("query", parts.uri.query().unwrap_or_default())?;
        let Query(value) = Query::try_from_uri(&parts.uri)?;
        check(&value)?;
        Ok(Self(value))
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        let PathRejection::FailedToDeserializePathParams(failed) = rejection else {
            return Self::internal(rejection);
        };
        match failed.kind() {
            ErrorKind::ParseErrorAtKey { key, .. } => Self::malformed(key, "is not of the form it must have"),
            ErrorKind::InvalidUtf8InPathParam { key } => Self::malformed(key, "is not UTF-8"),
            ErrorKind::DeserializeError { key, message, .. } => Self::malformed(key, message),
            ErrorKind::ParseErrorAtIndex { .. } | ErrorKind::ParseError { .. } | ErrorKind::Message(_) => {
                Self::malformed("path", "a part of it is not of the form it must have")
            }
            // The handler's type does not fit its route.
            _ => Self::internal(failed),
        }
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        type AtPath = serde_path_to_error::Error<serde::de::value::Error>;

        let mut source = rejection.source();
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<AtPath>() {
                let FieldError { field, message } =
                    field_error(&error.path().to_string(), &error.inner().to_string(), "query");
                return Self::malformed(field, message);
            }
            source = error.source();
        }
        Self::malformed("query", "cannot be read")
    }
}

/// Postgres has no text with NUL. In a URI it can only stand as `%00`.
fn no_nul(field: &str, part_of_uri: &str) -> Result<(), Problem> {
    if part_of_uri.contains("%00") {
        return Err(Problem::malformed(field, "must not contain NUL"));
    }
    Ok(())
}

fn must_be_json(headers: &HeaderMap) -> Result<(), Problem> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if let Some(coding) = text(header::CONTENT_ENCODING)
        && !coding.eq_ignore_ascii_case("identity")
    {
        return Err(Problem::unsupported_media_type(
            "the body must be sent without Content-Encoding",
        ));
    }
    let essence = text(header::CONTENT_TYPE).and_then(|value| value.split(';').next());
    let essence = essence.unwrap_or_default().trim().to_ascii_lowercase();
    let json = |subtype: &str| subtype == "json" || subtype.ends_with("+json");
    if essence.strip_prefix("application/").is_some_and(json) {
        Ok(())
    } else {
        Err(Problem::unsupported_media_type(
            "the body must be sent with Content-Type: application/json",
        ))
    }
}

async fn read(headers: &HeaderMap, mut body: Body, limit: usize) -> Result<Bytes, Problem> {
    let announced = headers.get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        // Who asks first (`Expect: 100-continue`) has not begun to send.
        if !headers.contains_key(header::EXPECT) {
            drain(&mut body).await;
        }
        return Err(Problem::too_large(limit));
    }
    let whole = Limited::new(&mut body, limit).collect();
    match tokio::time::timeout(BODY_READ_TIMEOUT, whole).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            drain(&mut body).await;
            Err(Problem::too_large(limit))
        }
        Ok(Err(error)) => Err(Problem::malformed("body", "could not be read whole").because(error)),
        Err(_) => Err(Problem::new(
            Code::RequestTimeout,
            format!("the body did not arrive within {} s", BODY_READ_TIMEOUT.as_secs()),
        )),
    }
}

async fn drain(body: &mut Body) {
    let rest = async {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let read = frame.data_ref().map_or(0, Bytes::len);
            let Some(still) = left.checked_sub(read) else {
                return;
            };
            left = still;
        }
    };
    // Whoever sends more, or more slowly, has to notice that nobody listens.
    _ = tokio::time::timeout(DRAIN_TIME, rest).await;
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|_| Problem::malformed("body", "is not UTF-8"))?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let message = error.inner().to_string();
        let message = message
            .split_once(" at line ")
            .map_or(&*message, |(what, _)| what);
        field_error(&error.path().to_string(), message, "body")
    });
    // Something may stand behind the value, and a wrong type before a syntax error: the whole text decides
    // whether it is JSON at all.
    if (parsed.is_err() || deserializer.end().is_err())
        && let Err(error) = serde_json::from_str::<IgnoredAny>(text)
    {
        return Err(Problem::malformed("body", format!("is not JSON: {error}")));
    }
    // serde fills the fields of a struct from an array as well, in the order of the source.
    if !text.trim_start().starts_with('{') {
        return Err(Problem::invalid([FieldError::new("body", "must be an object")]));
    }
    let value = parsed.map_err(|error| Problem::invalid([error]))?;
    refuse_nul(text)?;
    Ok(value)
}

/// Puts the field that serde complains about where programs look for it. Of a field that is missing or comes
/// twice serde gives the path of its parent, and the name in the message alone.
fn field_error(path: &str, message: &str, whole: &str) -> FieldError {
    let parent = if path == "." { "" } else { path };
    let named = |prefix| message.strip_prefix(prefix)?.strip_suffix('`');
    let child = match (named("missing field `"), named("duplicate field `")) {
        (Some(field), _) => Some((field, "is missing")),
        (None, Some(field)) => Some((field, "is there more than once")),
        (None, None) => None,
    };
    match (parent, child) {
        ("", None) => FieldError::new(whole, message),
        (parent, None) => FieldError::new(parent, message),
        ("", Some((field, message))) => FieldError::new(field, message),
        (parent, Some((field, message))) => FieldError::new(format!("{parent}.{field}"), message),
    }
}

/// Postgres has no text with NUL, neither as `text` nor in `jsonb`. In JSON it can only stand as an escape.
fn refuse_nul(text: &str) -> Result<(), Problem> {
    if !text.contains("\\u0000") {
        return Ok(());
    }
    let Ok(value) = serde_json::from_str::<Value>(text) else {
        return Ok(());
    };
    match find_nul(&value, String::new()) {
        Some(path) => {
            let field = if path.is_empty() { "body".to_owned() } else { path };
            Err(Problem::invalid([FieldError::new(field, "must not contain NUL")]))
        }
        // An escaped backslash before `u0000`.
        None => Ok(()),
    }
}

/// The path of the first text or key that has a NUL. The depth is bounded by the parser's.
fn find_nul(value: &Value, path: String) -> Option<String> {
    match value {
        Value::String(text) => text.contains('\0').then_some(path),
        Value::Array(items) => {
            let mut items = items.iter().enumerate();
            items.find_map(|(index, item)| find_nul(item, format!("{path}[{index}]")))
        }
        Value::Object(members) => members.iter().find_map(|(key, value)| {
            if key.contains('\0') {
                return Some(path.clone());
            }
            let dot = if path.is_empty() { "" } else { "." };
            find_nul(value, format!("{path}{dot}{key}"))
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Batch {
        operations: Vec<Put>,
        note: Option<Value>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Put {
        key: String,
        n: u8,
    }

    #[track_caller]
    fn refused(json: &str, status: u16, field: &str) {
        let problem = parse::<Batch>(json.as_bytes()).unwrap_err();
        assert_eq!(problem.body().status, status, "{json}: {problem:?}");
        assert_eq!(problem.body().errors[0].field, field, "{json}: {problem:?}");
    }

    #[test]
    fn what_is_no_json_is_400() {
        let deep_and_open = "[".repeat(100_000);
        for json in [
            "",
            " ",
            "{",
            "{]",
            "{\"operations\":[]} x",
            "\u{feff}{}",
            "'a'",
            "nul",
            &deep_and_open,
        ] {
            refused(json, 400, "body");
        }
        // A wrong type before the syntax error does not change that.
        refused(r#"{"operations":5,"#, 400, "body");
        let problem = parse::<Batch>(b"{\"operations\":\"\xff\"}").unwrap_err();
        assert_eq!(problem.body().status, 400);
    }

    #[test]
    fn what_is_json_and_does_not_fit_is_422_with_the_field() {
        refused("5", 422, "body");
        refused("null", 422, "body");
        refused("{}", 422, "operations");
        refused(r#"{"operations":5}"#, 422, "operations");
        refused(
            r#"{"operations":[{"key":"a","n":1},{"key":2,"n":1}]}"#,
            422,
            "operations[1].key",
        );
        refused(r#"{"operations":[{"key":"a","n":300}]}"#, 422, "operations[0].n");
        refused(r#"{"operations":[{"n":3}]}"#, 422, "operations[0].key");
        refused(r#"{"operations":[],"notes":1}"#, 422, "notes");
        refused(r#"{"operations":[],"operations":[]}"#, 422, "operations");
        refused(r#"{"operations":[],"note":1e999}"#, 422, "note");
        refused(r#"{"operations":[],"note":"\ud800"}"#, 422, "note");
        let deep = format!(
            r#"{{"operations":[],"note":{}1{}}}"#,
            "[".repeat(200),
            "]".repeat(200)
        );
        assert_eq!(parse::<Batch>(deep.as_bytes()).unwrap_err().body().status, 422);
    }

    #[test]
    fn nul_is_422_wherever_it_hides() {
        refused(
            r#"{"operations":[{"key":"a\u0000","n":1}]}"#,
            422,
            "operations[0].key",
        );
        refused(
            r#"{"operations":[],"note":{"a":["x",{"b":"\u0000"}]}}"#,
            422,
            "note.a[1].b",
        );
        refused(r#"{"operations":[],"note":{"a":{"\u0000":1}}}"#, 422, "note.a");
        assert!(parse::<Batch>(br#"{"operations":[],"note":"\\u0000"}"#).is_ok());
    }
}
