//! [`Answer`]: what a write answers, made inside of its transaction so that it can be kept there.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use leasehold_http::Problem;
use serde::Serialize;

use crate::failure::Failure;

/// Says that an answer was given before, to the first request with the same key.
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The answer to a write that succeeded: a status and JSON, or no content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    body: Vec<u8>,
    /// What a replay has instead.
    replayed_as: Option<Vec<u8>>,
    is_replay: bool,
}

impl Answer {
    /// 200.
    pub(crate) fn ok(body: &impl Serialize) -> Result<Self, Failure> {
        Ok(Self::of(StatusCode::OK, json(body)?))
    }

    /// 201.
    pub(crate) fn created(body: &impl Serialize) -> Result<Self, Failure> {
        Ok(Self::of(StatusCode::CREATED, json(body)?))
    }

    /// 202.
    pub(crate) fn accepted(body: &impl Serialize) -> Result<Self, Failure> {
        Ok(Self::of(StatusCode::ACCEPTED, json(body)?))
    }

    /// 204.
    pub(crate) fn no_content() -> Self {
        Self::of(StatusCode::NO_CONTENT, Vec::new())
    }

    /// The same answer, of which a replay leaves something out.
    pub(crate) fn replayed_as(self, body: &impl Serialize) -> Result<Self, Failure> {
        Ok(Self {
            replayed_as: Some(json(body)?),
            ..self
        })
    }

    /// An answer that was given before.
    pub(crate) fn replay(status: StatusCode, body: Vec<u8>) -> Self {
        Self {
            is_replay: true,
            ..Self::of(status, body)
        }
    }

    /// The body to keep.
    pub(crate) fn for_replay(&self) -> &[u8] {
        self.replayed_as.as_ref().unwrap_or(&self.body)
    }

    fn of(status: StatusCode, body: Vec<u8>) -> Self {
        Self {
            status,
            body,
            replayed_as: None,
            is_replay: false,
        }
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(body).map_err(|error| Problem::internal(error).into())
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = if self.body.is_empty() {
            self.status.into_response()
        } else {
            let json = HeaderValue::from_static("application/json");
            (self.status, [(header::CONTENT_TYPE, json)], self.body).into_response()
        };
        if self.is_replay {
            let replayed = HeaderValue::from_static("true");
            response.headers_mut().insert(IDEMPOTENCY_REPLAYED, replayed);
        }
        response
    }
}
