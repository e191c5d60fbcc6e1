//! [`LockName`]: what a caller names when it asks for a lock.

use std::fmt;
use std::sync::Arc;

use crate::Invalid;

/// The name of a lock: an ordered list of parts, such as `["workspace", "acme", "main"]`.
///
/// Names are compared byte by byte: they are case-sensitive, and two Unicode normal forms of one word are two
/// names. Parts keep their borders, so `["ab", "c"]` and `["a", "bc"]` are different names wherever a name is
/// encoded.
///
/// A name has at least one part, no part is empty or contains NUL (which Postgres text cannot hold), and all
/// parts together have at most [`LockName::MAX_BYTES`] bytes.
///
/// ```
/// use leasehold_domain::LockName;
///
/// let name = LockName::new(["workspace", "acme", "main"])?;
/// assert_eq!(name.to_string(), "workspace/acme/main");
/// assert_eq!(name.encoded(), "|9:workspace|4:acme|4:main");
/// assert_eq!(LockName::decode(name.encoded())?, name);
/// # Ok::<(), leasehold_domain::Invalid>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockName {
    encoded: Arc<str>,
}

impl LockName {
    /// The most bytes that the parts of one name may have together.
    pub const MAX_BYTES: usize = 512;

    /// Makes a name from its parts.
    ///
    /// # Errors
    /// [`Invalid`] with the field `name` when there is no part, a part is empty or contains NUL, or the parts
    /// have more than [`LockName::MAX_BYTES`] bytes together.
    pub fn new<I>(parts: I) -> Result<Self, Invalid>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let mut encoded = String::new();
        let mut bytes = 0;
        for part in parts {
            let part = part.as_ref();
            if part.is_empty() {
                return Err(Invalid::new("name", "a part of a lock name must not be empty"));
            }
            if part.contains('\0') {
                return Err(Invalid::new("name", "a lock name must not contain NUL"));
            }
            bytes += part.len();
            if bytes > Self::MAX_BYTES {
                return Err(Invalid::new(
                    "name",
                    format!("a lock name has at most {} bytes", Self::MAX_BYTES),
                ));
            }
            encoded.push_str(&format!("|{}:{part}", part.len()));
        }
        if encoded.is_empty() {
            return Err(Invalid::new("name", "a lock name needs at least one part"));
        }
        Ok(Self {
            encoded: encoded.into(),
        })
    }

    /// Reads back what [`LockName::encoded`] wrote.
    ///
    /// # Errors
    /// [`Invalid`] with the field `name` when the text is not such an encoding.
    pub fn decode(encoded: &str) -> Result<Self, Invalid> {
        let parts = Parts { rest: encoded }.collect::<Option<Vec<_>>>();
        let parts = parts.ok_or_else(|| Invalid::new("name", "this is not an encoded lock name"))?;
        Self::new(parts)
    }

    /// The parts, in their order.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        // An encoding that `new` made always splits again.
        Parts { rest: &self.encoded }.flatten()
    }

    /// One text from which the parts can be read back: each part as `|<byte length>:<bytes>`.
    ///
    /// Lease rows are stored under it, and advisory keys are derived from it.
    pub fn encoded(&self) -> &str {
        &self.encoded
    }
}

/// Splits an encoded name; `None` as an item says that the text is malformed.
struct Parts<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Parts<'a> {
    type Item = Option<&'a str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let split = || {
            let (length, rest) = self.rest.strip_prefix('|')?.split_once(':')?;
            rest.split_at_checked(length.parse().ok()?)
        };
        let Some((part, rest)) = split() else {
            self.rest = "";
            return Some(None);
        };
        self.rest = rest;
        Some(Some(part))
    }
}

/// The parts joined by `/`, for people. Not an encoding: a part may contain `/` itself.
impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.parts().enumerate() {
            if index > 0 {
                f.write_str("/")?;
            }
            f.write_str(part)?;
        }
        Ok(())
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.parts()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn borders_of_parts_count() {
        let one = LockName::new(["ab", "c"]).unwrap();
        let other = LockName::new(["a", "bc"]).unwrap();
        assert_ne!(one, other);
        assert_ne!(one.encoded(), other.encoded());
    }

    #[test]
    fn bad_names_are_refused_with_the_field() {
        let long = "x".repeat(LockName::MAX_BYTES + 1);
        let bad: [&[&str]; 5] = [&[], &[""], &["a", ""], &["a\0b"], &[&long]];
        for parts in bad {
            assert_eq!(LockName::new(parts).unwrap_err().field(), "name", "{parts:?}");
        }
    }

    #[test]
    fn malformed_encodings_are_refused() {
        for text in [
            "", "a", "|", "|1:", "|2:a", "|x:a", "|1:ab", "|1:é", "|0:", "|1:a|",
        ] {
            assert!(LockName::decode(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn encoding_reads_back(parts in prop::collection::vec("[^\0]{1,20}", 1..6)) {
            let name = LockName::new(&parts).unwrap();
            prop_assert_eq!(name.parts().collect::<Vec<_>>(), parts);
            prop_assert_eq!(LockName::decode(name.encoded()).unwrap(), name);
        }

        #[test]
        fn decoding_anything_never_panics(text in ".{0,80}") {
            if let Ok(name) = LockName::decode(&text) {
                // Leading zeros in a length read back as another text, never as another name.
                prop_assert_eq!(LockName::decode(name.encoded()).unwrap(), name);
            }
        }
    }
}
