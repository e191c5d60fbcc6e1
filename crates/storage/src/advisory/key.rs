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
    /// In SQL, for the name of the one part `a`:
    ///
    /// ```sql
    /// ('x' || left(encode(sha256(convert_to('leasehold/v1' || '|1:a', 'UTF8')), 'hex'), 16))::bit(64)::bigint
    /// ```
    pub fn of(name: &LockName) -> Self {
        let digest = Sha256::new()
            .chain_update("leasehold/v1")
            .chain_update(name.encoded())
            .finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self::Big(i64::from_be_bytes(first))
    }

    /// The key that `pg_locks` shows so.
    pub(crate) fn from_lock_table_columns(bits: i64, space: i16) -> Self {
        if space == 1 {
            return Self::Big(bits);
        }
        let [a, b, c, d, e, f, g, h] = bits.to_be_bytes();
        Self::Pair(i32::from_be_bytes([a, b, c, d]), i32::from_be_bytes([e, f, g, h]))
    }

    /// The key as `pg_locks` shows it: `classid` and `objid` as one number, and `objsubid`.
    pub(crate) fn as_lock_table_columns(self) -> (i64, i16) {
        match self {
            Self::Big(key) => (key, 1),
            Self::Pair(high, low) => ((i64::from(high) << 32) | i64::from(low.cast_unsigned()), 2),
        }
    }
}

/// Keys as other programs compute them, for fleets that already hold locks which those programs must respect.
pub mod compat {
    use std::hash::Hasher;

    use twox_hash::XxHash64;

    use super::AdvisoryKey;
    use crate::advisory::hashtextextended::hashtextextended;

    /// The key of a tenant's write gate: what Postgres computes for
    /// `hashtextextended('tenant_write|<byte length>:<tenant>', 0)`.
    pub fn tenant_write(tenant: &str) -> AdvisoryKey {
        AdvisoryKey::Big(hashtextextended(
            &format!("tenant_write|{}:{tenant}", tenant.len()),
            0,
        ))
    }

    /// FNV-1a of 64 bits over the bytes of the text.
    pub fn fnv1a(text: &str) -> AdvisoryKey {
        const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let hash = text
            .bytes()
            .fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
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

#[cfg(test)]
mod tests {
    use leasehold_domain::LockName;
    use proptest::prelude::*;

    use super::{AdvisoryKey, compat};

    fn of(parts: &[&str]) -> AdvisoryKey {
        AdvisoryKey::of(&LockName::new(parts).unwrap())
    }

    /// Programs of several versions hold locks at the same time: what is here never changes.
    #[test]
    fn keys_of_names_are_frozen() {
        let golden: [(&[&str], i64); 6] = [
            (&["a"], -3_098_472_954_525_335_543),
            (&["workspace", "acme", "main"], 3_646_699_070_440_056_882),
            (&["session", "tenant-a", "thread-1"], -5_903_616_457_723_041_486),
            (&["lock", "zürich"], -6_960_758_702_235_400_244),
            (&["ab", "c"], 7_988_443_099_726_282_162),
            (&["a", "bc"], 5_776_075_611_097_193_370),
        ];
        for (parts, key) in golden {
            assert_eq!(of(parts), AdvisoryKey::Big(key), "{parts:?}");
        }
    }

    #[test]
    fn keys_of_other_programs_are_frozen() {
        assert_eq!(
            compat::tenant_write("tenant-a"),
            AdvisoryKey::Big(-8_658_709_978_386_951_395)
        );
        let fnv1a = [
            ("", -3_750_763_034_362_895_579),
            ("a", -5_808_556_873_153_909_620),
            ("cas-backend-checker:defaults", 7_576_370_091_015_265_559),
            ("cas-backend-checker:all", 3_005_125_051_256_207_908),
        ];
        for (text, key) in fnv1a {
            assert_eq!(compat::fnv1a(text), AdvisoryKey::Big(key), "{text:?}");
        }
        assert_eq!(
            compat::xxh64_pair(["entelix:lock", "session", "tenant-a", "thread-1"]),
            AdvisoryKey::Pair(-1_697_821_000, 1_881_947_151)
        );
        assert_eq!(compat::from_i64(-7), AdvisoryKey::Big(-7));
        assert_eq!(compat::from_pair(-1, 2), AdvisoryKey::Pair(-1, 2));
    }

    #[test]
    fn keys_read_back_from_the_lock_table() {
        for key in [
            AdvisoryKey::Big(-7),
            AdvisoryKey::Big(i64::MAX),
            AdvisoryKey::Pair(-1, 2),
            AdvisoryKey::Pair(1, -2),
        ] {
            let (bits, space) = key.as_lock_table_columns();
            assert_eq!(AdvisoryKey::from_lock_table_columns(bits, space), key);
        }
    }

    #[test]
    fn the_length_of_a_tenant_counts_bytes() {
        assert_ne!(
            compat::tenant_write("ü"),
            compat::from_i64(super::super::hashtextextended::hashtextextended(
                "tenant_write|1:ü",
                0
            ))
        );
        assert_eq!(
            compat::tenant_write("ü"),
            compat::from_i64(super::super::hashtextextended::hashtextextended(
                "tenant_write|2:ü",
                0
            ))
        );
    }

    proptest! {
        /// Where the parts end matters, not only their text.
        #[test]
        fn borders_make_other_keys(text in "[a-z|:0-9]{2,30}", at in any::<prop::sample::Index>()) {
            let at = 1 + at.index(text.len() - 1);
            prop_assert_ne!(of(&[&text[..at], &text[at..]]), of(&[&text]));
            prop_assert_ne!(
                compat::xxh64_pair([&text[..at], &text[at..]]),
                compat::xxh64_pair([&text])
            );
        }

        #[test]
        fn one_changed_character_makes_another_key(text in "[a-z]{1,30}", at in any::<prop::sample::Index>()) {
            let at = at.index(text.len());
            let other = format!("{}Z{}", &text[..at], &text[at + 1..]);
            prop_assert_ne!(of(&[&text]), of(&[&other]));
            prop_assert_ne!(compat::tenant_write(&text), compat::tenant_write(&other));
            prop_assert_ne!(compat::fnv1a(&text), compat::fnv1a(&other));
            prop_assert_ne!(compat::xxh64_pair([&text]), compat::xxh64_pair([&other]));
        }
    }
}
