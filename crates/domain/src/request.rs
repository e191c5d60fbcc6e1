//! [`LockRequest`]: everything a caller says when it asks for a lock.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Holder, Invalid, LockName};

/// The shortest slice that may be granted.
pub const MIN_TTL: Duration = Duration::from_millis(100);
/// The longest slice that may be granted.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

const DEFAULT_TTL: Duration = Duration::from_secs(30);
const DEFAULT_MAX_HOLD: Duration = Duration::from_secs(60 * 60);

/// Who else may hold the lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockMode {
    /// Every other shared holder, and no exclusive one.
    Shared,
    /// Nobody.
    Exclusive,
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Exclusive => "exclusive",
        })
    }
}

/// When a grant must have reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// Before it is answered. For everything that is guarded outside the database.
    Durable,
    /// With the write it protects. For a hold whose only effect is a fenced transaction in the same database:
    /// WAL is flushed in order, so the write's own commit carries the grant to the disk. Its fencing token is
    /// final only inside that transaction.
    WithWrite,
}

/// A slice of time that a lock is granted for: 100 ms to 24 h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl(Duration);

impl Ttl {
    /// Checks the bounds.
    ///
    /// # Errors
    /// [`Invalid`] with the field `ttl` when the duration is shorter than [`MIN_TTL`] or longer than
    /// [`MAX_TTL`].
    pub fn new(ttl: Duration) -> Result<Self, Invalid> {
        if (MIN_TTL..=MAX_TTL).contains(&ttl) {
            Ok(Self(ttl))
        } else {
            Err(Invalid::new(
                "ttl",
                format!("{ttl:?} is not between 100 ms and 24 h"),
            ))
        }
    }

    /// The slice as a duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// What to lock, how, for how long and for whom.
///
/// `ttl` is the slice that is granted and renewed by heartbeat: a crashed process is replaced after at most
/// `ttl`. `max_hold` is the bound after which the hold is renewed no more: a hung process is replaced after at
/// most `max_hold`. The defaults are an exclusive, durable hold with a `ttl` of 30 seconds and a `max_hold` of
/// one hour, or `ttl` when that is longer.
///
/// ```
/// use std::time::Duration;
/// use leasehold_domain::{Holder, LockName, LockRequest};
///
/// let name = LockName::new(["deploy", "prod"])?;
/// let request = LockRequest::new(name, Holder::new("ci", "deploy")).with_ttl(Duration::from_secs(10));
/// assert!(request.validate().is_ok());
/// # Ok::<(), leasehold_domain::Invalid>(())
/// ```
#[derive(Clone, Debug)]
pub struct LockRequest {
    name: LockName,
    holder: Holder,
    mode: LockMode,
    ttl: Duration,
    max_hold: Option<Duration>,
    durability: Durability,
}

impl LockRequest {
    /// A request with the defaults.
    pub fn new(name: LockName, holder: Holder) -> Self {
        Self {
            name,
            holder,
            mode: LockMode::Exclusive,
            ttl: DEFAULT_TTL,
            max_hold: None,
            durability: Durability::Durable,
        }
    }

    /// The same request in another mode.
    #[must_use]
    pub fn with_mode(mut self, mode: LockMode) -> Self {
        self.mode = mode;
        self
    }

    /// The same request with another slice, 100 ms to 24 h.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// The same request with another bound on the whole hold, at least `ttl`.
    #[must_use]
    pub fn with_max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = Some(max_hold);
        self
    }

    /// The same request with another durability.
    #[must_use]
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// What is locked.
    pub fn name(&self) -> &LockName {
        &self.name
    }

    /// Who wants it, and why.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Shared or exclusive.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// The slice that is granted and renewed.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// The bound on the whole hold.
    pub fn max_hold(&self) -> Duration {
        self.max_hold.unwrap_or_else(|| self.ttl.max(DEFAULT_MAX_HOLD))
    }

    /// When the grant must be on the disk.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Checks every bound. Backends call it before they send anything.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: `ttl`, `max_hold` or one of the holder's.
    pub fn validate(&self) -> Result<(), Invalid> {
        Ttl::new(self.ttl)?;
        let max_hold = self.max_hold();
        if max_hold < self.ttl {
            return Err(Invalid::new(
                "max_hold",
                format!("{max_hold:?} is shorter than the ttl of {:?}", self.ttl),
            ));
        }
        self.holder.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> LockRequest {
        LockRequest::new(LockName::new(["a"]).unwrap(), Holder::new("o", "op"))
    }

    #[test]
    fn bounds_are_told_by_field() {
        let long = "x".repeat(257);
        let metadata = |text: &str| serde_json::from_value(serde_json::json!({ "m": text })).unwrap();
        let cases = [
            (request().with_ttl(Duration::from_millis(99)), "ttl"),
            (request().with_ttl(Duration::ZERO), "ttl"),
            (request().with_ttl(Duration::MAX), "ttl"),
            (request().with_max_hold(Duration::from_secs(29)), "max_hold"),
            (
                LockRequest {
                    holder: Holder::new(&long, "op"),
                    ..request()
                },
                "holder.owner",
            ),
            (
                LockRequest {
                    holder: Holder::new("o", &long),
                    ..request()
                },
                "holder.operation",
            ),
            (
                LockRequest {
                    holder: Holder::new("o\0", "op"),
                    ..request()
                },
                "holder.owner",
            ),
            (
                LockRequest {
                    holder: Holder::new("o", "").with_instance(&long),
                    ..request()
                },
                "holder.instance",
            ),
            (
                LockRequest {
                    holder: Holder::new("o", "").with_metadata(metadata(&"x".repeat(4096))),
                    ..request()
                },
                "holder.metadata",
            ),
            (
                LockRequest {
                    holder: Holder::new("o", "").with_metadata(metadata("\0")),
                    ..request()
                },
                "holder.metadata",
            ),
        ];
        for (request, field) in cases {
            assert_eq!(request.validate().unwrap_err().field(), field);
        }
        assert!(request().with_ttl(MIN_TTL).validate().is_ok());
        assert!(request().with_ttl(MAX_TTL).validate().is_ok());
    }

    #[test]
    fn a_long_slice_raises_the_default_bound() {
        let day = Duration::from_secs(24 * 60 * 60);
        assert_eq!(request().with_ttl(day).max_hold(), day);
    }
}
