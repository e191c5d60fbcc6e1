//! [`FencingToken`] and [`LockId`]: what tells one acquisition from every other.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A number that grows with every durable acquisition of a name: across releases, expiry, restarts and, because
/// its high bits are the WAL timeline, failover.
///
/// A resource outside the database that remembers the highest token it has seen can refuse a late writer whose
/// lease is over; see Kleppmann, "How to do distributed locking" (2016). Tokens of different names do not
/// compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FencingToken(i64);

impl FencingToken {
    /// Wraps a token that a backend has given out.
    pub const fn new(token: i64) -> Self {
        Self(token)
    }

    /// The token as the number that resources compare.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of one acquisition. A later acquisition of the same name by the same holder has another.
///
/// It is made before the acquire is sent, so that an acquisition whose answer was lost can be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LockId(Uuid);

impl LockId {
    /// A fresh identity: random, and never used before.
    #[expect(
        clippy::new_without_default,
        reason = "a default that differs each time would surprise"
    )]
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }

    /// The identity as a UUID.
    pub const fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for LockId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
