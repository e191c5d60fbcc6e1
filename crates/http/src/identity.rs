//! [`BearerToken`] and [`Caller`]: who asks, in as few words as authentication needs here.

use std::fmt;

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;

use crate::Problem;

const MAX_LENGTH: usize = 4096;

/// The key of `Authorization: Bearer <key>` (RFC 6750). It never shows itself in a log.
///
/// As an extractor it answers 401 when there is no such header, more than one, or none that can be a key.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(String);

impl BearerToken {
    /// The key. Compare it by its hash, not byte by byte.
    pub fn secret(&self) -> &str {
        &self.0
    }

    fn of(parts: &Parts) -> Option<Self> {
        let mut values = parts.headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return None;
        };
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        let key = key.trim_matches(' ');
        // The grammar of RFC 6750: b64token.
        let body = key.trim_end_matches('=');
        let sane = !body.is_empty()
            && key.len() <= MAX_LENGTH
            && body
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte));
        (sane && scheme.eq_ignore_ascii_case("bearer")).then(|| Self(key.to_owned()))
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(..)")
    }
}

impl<S: Sync> FromRequestParts<S> for BearerToken {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::of(parts).ok_or_else(Problem::unauthenticated)
    }
}

/// How a service knows its callers. The state of its router implements it.
pub trait Authenticate: Sync {
    /// What is known of a caller: a name, a role, a tenant.
    type Identity: Send;

    /// Who has this key. [`Problem::unauthenticated`] when nobody does: an unknown key and an expired one
    /// should look the same.
    fn authenticate(
        &self,
        token: BearerToken,
    ) -> impl Future<Output = Result<Self::Identity, Problem>> + Send;
}

/// The caller of a request, as an argument of a handler, or in [`crate::LockTarget::authorize`] by
/// `Caller::from_request_parts(parts, state)`.
#[derive(Clone, Copy, Debug)]
pub struct Caller<I>(pub I);

impl<S, I> FromRequestParts<S> for Caller<I>
where
    S: Authenticate<Identity = I> + Send,
    I: Send,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let token = BearerToken::from_request_parts(parts, state).await?;
        Ok(Self(state.authenticate(token).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    fn token(values: &[&str]) -> Option<String> {
        let mut request = Request::builder();
        for value in values {
            request = request.header(AUTHORIZATION, value.as_bytes());
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        BearerToken::of(&parts).map(|token| token.secret().to_owned())
    }

    #[test]
    fn the_grammar_of_rfc_6750() {
        let some = ["Bearer lh_abc", "bearer lh_abc", "BEARER  lh_abc "];
        for value in some {
            assert_eq!(token(&[value]).as_deref(), Some("lh_abc"), "{value:?}");
        }
        assert_eq!(token(&["Bearer a-b.c~d+e/f=="]).as_deref(), Some("a-b.c~d+e/f=="));
        let long = format!("Bearer {}", "x".repeat(MAX_LENGTH + 1));
        for value in [
            "",
            "Bearer",
            "Bearer ",
            "Basic lh_abc",
            "lh_abc",
            "Bearer a b",
            "Bearer =",
            "Bearer é",
            &long,
        ] {
            assert_eq!(token(&[value]), None, "{value:?}");
        }
        assert_eq!(token(&[]), None);
        assert_eq!(token(&["Bearer a", "Bearer a"]), None);
    }

    #[test]
    fn a_key_does_not_show_itself() {
        assert!(!format!("{:?}", BearerToken("lh_secret".to_owned())).contains("secret"));
    }
}
