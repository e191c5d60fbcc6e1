//! `Idempotency-Key`: a write that is sent again is answered again, and done once.
//!
//! The answer of a write is stored in the write's own transaction, so that there is one exactly when there was an
//! effect. Who looks for it finds it for a day. Of two requests with the same key at once, one is done and the other is
//! told so: nobody waits.
//!
//! A handler of a write that takes no workspace lock has [`Sent`] as its last argument, after
//! [`Access`](crate::auth::Access); those that take one have it in
//! [`WorkspaceWrite`](crate::workspaces::write::WorkspaceWrite). Both look the key up when the body has been read and
//! checked, and hand on a [`Once`] to the transaction of the write.

mod fingerprint;
mod prune;
mod store;

use std::sync::{Arc, OnceLock};

use axum::extract::{FromRequest, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use diesel_async::AsyncPgConnection;
use leasehold_http::{Code, Early, Problem};
use uuid::Uuid;

pub(crate) use prune::prune;

use crate::answer::Answer;
use crate::auth::Identity;
use crate::failure::Failure;
use crate::state::AppState;
use fingerprint::Fingerprint;
use store::Found;

/// The header with the key.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const MAX_KEY: usize = 255;

/// Takes the fingerprint of a request that has a key, for the extractors. It goes around all routes.
///
/// A request that finds nothing to write to is looked up once more: a twin of it may have been done since it looked
/// first, and have deleted just that.
pub(crate) async fn answer_once(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if !request.headers().contains_key(IDEMPOTENCY_KEY) {
        return next.run(request).await;
    }
    let (mut request, fingerprint) = Fingerprint::take(request);
    let asked = Asked {
        fingerprint,
        key: Arc::default(),
    };
    request.extensions_mut().insert(asked.clone());
    let answer = next.run(request).await;
    match asked.key.get() {
        Some(key) if answer.status() == StatusCode::NOT_FOUND => {
            let found = state.read(async |conn| key.find(conn).await).await;
            found.ok().flatten().map_or(answer, Answer::into_response)
        }
        _ => answer,
    }
}

/// What goes along with a request that has a key.
#[derive(Clone)]
struct Asked {
    fingerprint: Fingerprint,
    /// As soon as the caller is known.
    key: Arc<OnceLock<Key>>,
}

/// What is known of a request's idempotency key. A request without one is not asked about, and its answer not stored.
#[derive(Clone, Debug)]
pub(crate) struct Once(Option<Box<Key>>);

#[derive(Clone, Debug)]
struct Key {
    credential: Uuid,
    text: String,
    fingerprint: Fingerprint,
}

impl Once {
    /// Reads the header of a request whose caller is known.
    pub(crate) fn of(parts: &Parts, caller: &Identity) -> Result<Self, Problem> {
        let Some(text) = key(&parts.headers)? else {
            return Ok(Self(None));
        };
        let asked = parts.extensions.get::<Asked>();
        let asked = asked.ok_or_else(|| Problem::internal("nothing has taken the request's fingerprint"))?;
        let key = asked.key.get_or_init(|| Key {
            credential: caller.credential,
            text,
            fingerprint: asked.fingerprint.clone(),
        });
        Ok(Self(Some(Box::new(key.clone()))))
    }

    /// Whether the request has a key.
    pub(crate) fn has_key(&self) -> bool {
        self.0.is_some()
    }

    /// Before the work, when the body has been read: ends the request if it was answered before, if it is another one
    /// than that, or if another one is under way. One round trip when there is a key, else none.
    pub(crate) async fn look(&self, state: &AppState) -> Result<(), Early> {
        let Some(key) = &self.0 else { return Ok(()) };
        match state.read(async |conn| key.find(conn).await).await? {
            None => Ok(()),
            Some(answer) => Err(Early::Answer(Box::new(answer.into_response()))),
        }
    }

    /// In the transaction of the work: takes the key, looks again, and stores what the work answers. `tenant` is whose
    /// data the answer tells of: it goes when they go.
    pub(crate) async fn run<W>(
        &self,
        conn: &mut AsyncPgConnection,
        tenant: Option<&str>,
        work: W,
    ) -> Result<Answer, Failure>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let Some(key) = &self.0 else {
            return work(conn).await;
        };
        if !store::take(conn, key.credential, &key.text).await? {
            return Err(in_progress().into());
        }
        if let Some(answer) = key.find(conn).await? {
            return Ok(answer);
        }
        let answer = work(conn).await?;
        let fingerprint = key.fingerprint.finish();
        store::put(conn, key.credential, &key.text, &fingerprint, tenant, &answer).await?;
        Ok(answer)
    }
}

impl Key {
    async fn find(&self, conn: &mut AsyncPgConnection) -> Result<Option<Answer>, Failure> {
        let fingerprint = self.fingerprint.finish();
        match store::find(conn, self.credential, &self.text, &fingerprint).await? {
            Found::Nothing => Ok(None),
            Found::Answer(answer) => Ok(Some(answer)),
            Found::InProgress => Err(in_progress().into()),
            Found::OtherRequest => {
                let detail = "the Idempotency-Key came with another method, path, query or body before";
                Err(Problem::new(Code::IdempotencyMismatch, detail).into())
            }
        }
    }
}

fn in_progress() -> Problem {
    Problem::new(
        Code::IdempotencyInProgress,
        "a request with this Idempotency-Key is under way",
    )
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
    if values.next().is_some() || !(1..=MAX_KEY).contains(&text.len()) || !visible {
        let allowed = format!("must be one value of 1 to {MAX_KEY} visible ASCII characters");
        return Err(Problem::malformed("Idempotency-Key", allowed));
    }
    Ok(Some(text.to_owned()))
}

/// A write that takes no workspace lock, as the last argument of its handler: its body was read and checked, and then
/// it was found that it was not done before.
#[derive(Debug)]
pub(crate) struct Sent<B> {
    /// The body.
    pub(crate) body: B,
    /// For the transaction.
    pub(crate) once: Once,
}

impl<B> FromRequest<AppState> for Sent<B>
where
    B: FromRequest<AppState> + Send,
    Problem: From<B::Rejection>,
{
    type Rejection = Early;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Early> {
        let (parts, body) = request.into_parts();
        let caller = parts.extensions.get::<Identity>();
        let caller = caller.ok_or_else(|| Problem::internal("the request's caller is not known"))?;
        let once = Once::of(&parts, caller)?;
        let body = B::from_request(Request::from_parts(parts, body), state)
            .await
            .map_err(Problem::from)?;
        once.look(state).await?;
        Ok(Self { body, once })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of(values: &[&[u8]]) -> Result<Option<String>, u16> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(value).unwrap());
        }
        key(&headers).map_err(|problem| problem.body().status)
    }

    #[test]
    fn a_key_is_one_visible_word() {
        let longest = "k".repeat(MAX_KEY);
        for good in ["a", "!~", "018f4e2a-7c3d-7a51", "\"quoted\"", &longest] {
            assert_eq!(of(&[good.as_bytes()]), Ok(Some(good.to_owned())));
        }
        let too_long = "k".repeat(MAX_KEY + 1);
        for bad in ["", "a b", "a\tb", "é", &too_long] {
            assert_eq!(of(&[bad.as_bytes()]), Err(400), "{bad:?}");
        }
        assert_eq!(of(&[b"a", b"a"]), Err(400));
        assert_eq!(of(&[]), Ok(None));
    }
}
