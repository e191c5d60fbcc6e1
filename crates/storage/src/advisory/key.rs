//! [`AdvisoryKey`]: the number that Postgres sees instead of a name.

use leasehold_domain::LockName;
use sha2::{Digest, Sha256};

/// The key of an advisory lock.
///
/// Postgres has two key spaces that never meet, one of `bigint` and one of pairs of `integer`; see
/// [Advisory Locks](https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS). Keys are per
/// database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdvisoryKey {
    /// A key of the `bigint` space.
    Big(i64),
    /// A key of the space of pairs.
    Pair(i32, i32),
}

impl AdvisoryKey {
    /// The key of a name: the first 8 bytes, big-endian, of SHA-256 over `leasehold/v1` followed by each part as
    /// `|<byte length>:<bytes>`. This rule is frozen.
    ///
    /// Two names may share a key (with a million names the chance is 3 in 100 million): they then exclude each
    /// other, which delays but never breaks anything.
    ///
    /// In SQL: `('x' || left(encode(sha256(convert_to('leasehold/v1|1:a', 'UTF8')), 'hex'), 16))::bit(64)::bigint`.
    pub fn of(name: &LockName) -> Self {
        let digest = Sha256::new().chain_update("leasehold/v1").chain_update(name.encoded()).finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self::Big(i64::from_be_bytes(first))
    }
}

/// Keys as other programs compute them, for fleets that already hold locks which those programs must respect.
pub mod compat {
    use std::hash::Hasher;

    use twox_hash::XxHash64;

    use super::AdvisoryKey;
    use super::hashtextextended::hashtextextended;

    /// The key of a tenant's write gate: what Postgres computes for
    /// `hashtextextended('tenant_write|<byte length>:<tenant>', 0)`.
    pub fn tenant_write(tenant: &str) -> AdvisoryKey {
        AdvisoryKey::Big(hashtextextended(&format!("tenant_write|{}:{tenant}", tenant.len()), 0))
    }

    /// FNV-1a of 64 bits over the bytes of the text.
    pub fn fnv1a(text: &str) -> AdvisoryKey {
        const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let hash = text.bytes().fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
        AdvisoryKey::Big(hash.cast_signed())
    }

    /// The high and the low half of `XxHash64` with the seed `0x656e74656c69785f` over each part followed by one
    /// NUL byte.
    pub fn xxh64_pair<I>(parts: I) -> AdvisoryKey
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let mut hasher = XxHash64::with_seed(0x656e_7465_6c69_785f);
        for part in parts {
            hasher.write(part.as_ref().as_bytes());
            hasher.write(&[0]);
        }
        let [a, b, c, d, e, f, g, h] = hasher.finish().to_be_bytes();
        AdvisoryKey::Pair(i32::from_be_bytes([a, b, c, d]), i32::from_be_bytes([e, f, g, h]))
    }

    /// A number that is a key already.
    pub fn from_i64(key: i64) -> AdvisoryKey {
        AdvisoryKey::Big(key)
    }

    /// A pair of numbers that is a key already.
    pub fn from_pair(high: i32, low: i32) -> AdvisoryKey {
        AdvisoryKey::Pair(high, low)
    }
}
