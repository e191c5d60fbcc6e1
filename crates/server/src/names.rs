//! The names that clients choose: [`Slug`] for tenants and workspaces, [`ConfigKey`] for keys.
//!
//! They are checked where they are read: in a path a bad one is a 400, in a body a 422.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

/// The id of a tenant or the name of a workspace: 1 to 63 of `a-z 0-9 _ -`, the first a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9_-]{0,62}$", example = "main")]
pub struct Slug(String);

/// A configuration key: 1 to 128 of `A-Z a-z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,128}$", example = "color")]
pub struct ConfigKey(String);

impl Slug {
    /// Checks the form.
    ///
    /// # Errors
    /// What is allowed.
    pub fn new(text: impl Into<String>) -> Result<Self, &'static str> {
        let text = text.into();
        let first = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let ok = (1..=63).contains(&text.len())
            && text.bytes().take(1).all(|byte| first(&byte))
            && text
                .bytes()
                .all(|byte| first(&byte) || matches!(byte, b'_' | b'-'));
        if ok {
            Ok(Self(text))
        } else {
            Err("must be 1 to 63 of a-z 0-9 _ -, the first a letter or digit")
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ConfigKey {
    /// Checks the form.
    ///
    /// # Errors
    /// What is allowed.
    pub fn new(text: impl Into<String>) -> Result<Self, &'static str> {
        let text = text.into();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let ok = (1..=128).contains(&text.len()) && text.bytes().all(allowed);
        if ok {
            Ok(Self(text))
        } else {
            Err("must be 1 to 128 of A-Z a-z 0-9 . _ -")
        }
    }

    /// The key `batch`, which in a path is also the name of another resource.
    pub(crate) fn batch() -> Self {
        Self("batch".to_owned())
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Slug {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for ConfigKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Slug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ConfigKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_slug_may_be() {
        let long = "a".repeat(63);
        for good in ["a", "0", "a-b_c", "main", &long] {
            assert!(Slug::new(good).is_ok(), "{good:?}");
        }
        let too_long = "a".repeat(64);
        for bad in ["", "-a", "_a", "A", "a b", "a/b", "é", "a.b", "a\0", &too_long] {
            assert!(Slug::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_a_key_may_be() {
        let long = "k".repeat(128);
        for good in ["a", "A.b_c-9", ".", "-", &long] {
            assert!(ConfigKey::new(good).is_ok(), "{good:?}");
        }
        let too_long = "k".repeat(129);
        for bad in ["", " ", "a b", "a/b", "é", "a\n", &too_long] {
            assert!(ConfigKey::new(bad).is_err(), "{bad:?}");
        }
    }
}
