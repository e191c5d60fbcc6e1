//! Webhooks on the wire.

use std::fmt;

use axum::http::Uri;
use leasehold_http::{FieldError, Timestamp, Validate};
use rand::Rng;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::names::Slug;
use crate::workspaces::model::given;

/// The most bytes of a URL.
const MAX_URL: usize = 2048;

/// Where a tenant's events are sent.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Webhook {
    /// Its id.
    pub id: Uuid,
    /// The tenant that owns it.
    pub tenant_id: String,
    /// Where events are sent.
    #[schema(example = "https://example.com/leasehold")]
    pub url: String,
    /// Whether they are sent.
    pub enabled: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
    /// When the service last looked whether the URL can be reached, which it does every half hour.
    #[schema(required)]
    pub last_checked_at: Option<Timestamp>,
    /// The HTTP status that it found then; `null` when there was no answer.
    #[schema(required, example = 200)]
    pub last_status: Option<i16>,
}

/// A webhook that was just made, with what is told this once.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CreatedWebhook {
    /// The webhook.
    #[serde(flatten)]
    pub webhook: Webhook,
    /// What signs the events that are sent. It is told here and nowhere else, and not when the answer is repeated.
    #[schema(value_type = String, example = "whsec_6b1f…")]
    pub secret: Secret,
}

/// What signs events: `whsec_` and 256 random bits. Logs do not show it.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// A fresh one.
    pub fn new() -> Self {
        let mut bits = [0_u8; 32];
        rand::rng().fill(&mut bits);
        let text = |text: String, byte: &u8| format!("{text}{byte:02x}");
        Self(bits.iter().fold("whsec_".to_owned(), text))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Secret {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A webhook to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewWebhook {
    /// The tenant that owns it. A key of one tenant may leave it out.
    #[serde(default)]
    pub tenant_id: Option<Slug>,
    /// Where events are to be sent: `http` or `https`, with a host, at most 2,048 bytes.
    #[schema(max_length = 2048, example = "https://example.com/leasehold")]
    pub url: String,
    /// Whether they are to be sent.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub enabled: bool,
}

fn yes() -> bool {
    true
}

impl Validate for NewWebhook {
    fn validate(&self) -> Vec<FieldError> {
        check_url(&self.url)
    }
}

/// What to change of a webhook. What is left out stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WebhookPatch {
    /// The tenant that is to own it. Only a key that may see both can move it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Slug, required = false)]
    pub tenant_id: Option<Slug>,
    /// Where events are to be sent.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = String, required = false, max_length = 2048, example = "https://example.com/leasehold")]
    pub url: Option<String>,
    /// Whether they are to be sent.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = bool, required = false)]
    pub enabled: Option<bool>,
}

impl WebhookPatch {
    /// Whether it asks for nothing.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(
            self,
            Self {
                tenant_id: None,
                url: None,
                enabled: None
            }
        )
    }
}

impl Validate for WebhookPatch {
    fn validate(&self) -> Vec<FieldError> {
        self.url.as_deref().map(check_url).unwrap_or_default()
    }
}

/// Whom it leads to is looked at when something is sent: names may lead elsewhere by then.
fn check_url(url: &str) -> Vec<FieldError> {
    let refused = |why: &str| vec![FieldError::new("url", why)];
    if url.len() > MAX_URL {
        return refused(&format!("must have at most {MAX_URL} bytes"));
    }
    let Ok(uri) = url.parse::<Uri>() else {
        return refused("must be a URL such as https://example.com/leasehold");
    };
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    if !matches!(uri.scheme_str(), Some("http" | "https")) || !has_host {
        return refused("must be an http or https URL with a host");
    }
    let port = uri
        .authority()
        .and_then(|authority| authority.as_str().rsplit_once(':'));
    if uri.port_u16().is_none() && port.is_some_and(|(_, port)| !port.ends_with(']')) {
        return refused("must have a port from 0 to 65535, or none");
    }
    if uri
        .authority()
        .is_some_and(|authority| authority.as_str().contains('@'))
    {
        return refused("must not contain a user or a password: whoever sees the webhook would see them");
    }
    Vec::new()
}

/// The path of a webhook.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct WebhookPath {
    /// The webhook.
    pub id: Uuid,
}

/// Which webhooks to list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WebhookFilter {
    /// Only those of this tenant.
    #[serde(default)]
    #[param(value_type = String, required = false)]
    pub tenant_id: Option<Slug>,
}

impl Validate for WebhookFilter {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_url_may_be() {
        let long = format!("https://example.com/{}", "a".repeat(MAX_URL - 20));
        for good in [
            "https://example.com",
            "http://127.0.0.1:9000/a?b=c",
            "https://[::1]/",
            &long,
        ] {
            assert_eq!(check_url(good), Vec::new(), "{good}");
        }
        let too_long = format!("{long}a");
        for bad in [
            "",
            "/path",
            "example.com",
            "ftp://example.com/",
            "https://",
            "https:///path",
            "https://:443/",
            "http://a b/",
            "javascript:alert(1)",
            "https://user:password@example.com/",
            &too_long,
        ] {
            assert_eq!(check_url(bad).len(), 1, "{bad}");
        }
    }

    #[test]
    fn secrets_are_long_and_differ_and_are_not_shown() {
        let (one, other) = (Secret::new(), Secret::new());
        assert!(one.as_str().starts_with("whsec_") && one.as_str().len() == 70);
        assert_ne!(one.as_str(), other.as_str());
        assert!(!format!("{one:?}").contains(&one.as_str()[6..]));
    }
}
