//! Locks on the wire, and their names.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::{HeldLock, Holder, Invalid, LockId, LockMode, LockName};
use leasehold_http::{FieldError, Timestamp, Validate};
use leasehold_storage::ClientLease;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::names::Slug;

/// The first part of the names of these locks.
pub(crate) const FIRST_PART: &str = "lock";
/// The longest hold of a lock that nobody gave another one.
pub(crate) const DEFAULT_MAX_HOLD: Duration = Duration::from_secs(24 * 60 * 60);

const MIN_TTL: u64 = 100;
const MAX_TTL: u64 = 86_400_000;

/// The name of a lock of a tenant.
///
/// # Errors
/// Never for names that were checked.
pub(crate) fn lock_name(tenant: &str, name: &str) -> Result<LockName, Invalid> {
    LockName::new([FIRST_PART, tenant, name])
}

/// Between which names, as they are stored, those of a tenant's locks are: from the first on, before the second.
///
/// # Errors
/// Never for names that were checked.
pub(crate) fn names_of(tenant: &str) -> Result<(String, String), Invalid> {
    let first = LockName::new([FIRST_PART, tenant])?.encoded().to_owned();
    // The next part begins with `|`, which `}` comes after.
    let end = format!("{first}}}");
    Ok((first, end))
}

/// What the clients of a tenant call a lock: 1 to 256 bytes, in which `/` means nothing.
#[derive(Clone, Debug, PartialEq, Eq, ToSchema)]
#[schema(value_type = String, min_length = 1, max_length = 256, example = "deploy/prod")]
pub struct LockPart(String);

impl LockPart {
    /// Checks the length.
    ///
    /// # Errors
    /// What is allowed.
    pub fn new(text: impl Into<String>) -> Result<Self, &'static str> {
        let text = text.into();
        if (1..=256).contains(&text.len()) && !text.contains('\0') {
            Ok(Self(text))
        } else {
            Err("must have 1 to 256 bytes, none of them NUL")
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for LockPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// The path of a lock.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct LockPath {
    /// The tenant.
    pub tenant: Slug,
    /// The name of the lock in the tenant: one part of the path, with `/` written as `%2F`.
    #[param(value_type = String, min_length = 1, max_length = 256, example = "deploy%2Fprod")]
    pub name: LockPart,
}

/// A lock to acquire.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AcquireLock {
    /// How long it is held without being extended, in milliseconds.
    #[schema(minimum = 100, maximum = 86_400_000, example = 30_000)]
    pub ttl_ms: u64,
    /// How long it can be held in all, however often it is extended: at least `ttl_ms`.
    #[serde(default)]
    #[schema(default = 86_400_000)]
    pub max_hold_ms: Option<u64>,
    /// How long to wait while somebody else has it. The service has a bound of its own. Given, it counts and `Prefer`
    /// does not.
    #[serde(default)]
    #[schema(default = 0)]
    pub wait_ms: Option<u64>,
    /// An id of the client's own choice, a fresh one for each lock that it wants: the same request can then be sent again
    /// when its answer was lost. While it holds the lock the same grant is answered; afterwards it never holds one again.
    #[serde(default)]
    pub lock_id: Option<Uuid>,
    /// What it is for: at most 256 bytes; without, the method and path of the request.
    #[serde(default)]
    #[schema(example = "deploy 4711")]
    pub operation: Option<String>,
    /// Anything else that others should see: at most 4 KiB.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
}

impl AcquireLock {
    pub(crate) fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms)
    }

    pub(crate) fn max_hold(&self) -> Duration {
        self.max_hold_ms.map_or(DEFAULT_MAX_HOLD, Duration::from_millis)
    }
}

impl Validate for AcquireLock {
    fn validate(&self) -> Vec<FieldError> {
        let mut errors = check_ttl(self.ttl_ms);
        if self.max_hold_ms.is_some_and(|max_hold| max_hold < self.ttl_ms) {
            errors.push(FieldError::new("max_hold_ms", "must be at least ttl_ms"));
        }
        let holder = Holder::new("", self.operation.as_deref().unwrap_or_default())
            .with_metadata(self.metadata.clone().unwrap_or_default());
        if let Err(invalid) = holder.validate() {
            let field = invalid.field();
            let field = field.strip_prefix("holder.").unwrap_or(field);
            errors.push(FieldError::new(field, invalid.reason()));
        }
        errors
    }
}

/// A lock to extend.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtendLock {
    /// The id that the lock was granted with.
    pub lock_id: Uuid,
    /// How long it is held from now on, in milliseconds; without, as long as it was acquired for. It never ends sooner
    /// than it would have.
    #[serde(default)]
    #[schema(minimum = 100, maximum = 86_400_000)]
    pub ttl_ms: Option<u64>,
}

impl Validate for ExtendLock {
    fn validate(&self) -> Vec<FieldError> {
        self.ttl_ms.map(check_ttl).unwrap_or_default()
    }
}

fn check_ttl(ttl_ms: u64) -> Vec<FieldError> {
    if (MIN_TTL..=MAX_TTL).contains(&ttl_ms) {
        Vec::new()
    } else {
        let allowed = format!("must be from {MIN_TTL} to {MAX_TTL} milliseconds");
        vec![FieldError::new("ttl_ms", allowed)]
    }
}

/// A lock to release.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseLock {
    /// The id that the lock was granted with.
    pub lock_id: Uuid,
}

impl Validate for ReleaseLock {}

/// What a release found.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ReleasedLock {
    /// Whether it was still held; `false` when it had ended before.
    pub released: bool,
}

/// A lock that the client has.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GrantedLock {
    /// Its name in the tenant.
    #[schema(example = "deploy/prod")]
    pub name: String,
    /// What to extend and release it by.
    pub lock_id: Uuid,
    /// Grows with every acquisition of the name. A resource that remembers the highest it has seen can refuse whoever
    /// comes late with a lower one.
    pub fencing_token: i64,
    /// Since when, by the database's clock.
    pub acquired_at: Timestamp,
    /// Until when, unless it is extended.
    pub expires_at: Timestamp,
}

impl GrantedLock {
    pub(crate) fn of(name: &LockPart, lease: &ClientLease) -> Self {
        Self {
            name: name.as_str().to_owned(),
            lock_id: lease.lock_id.as_uuid(),
            fencing_token: lease.fencing_token.get(),
            acquired_at: lease.acquired_at.into(),
            expires_at: lease.expires_at.into(),
        }
    }
}

/// What keeps a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// A row that ends by itself.
    Lease,
}

/// A lock that somebody holds. What is not known of it is `null`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LockItem {
    /// Its name.
    #[schema(example = "deploy/prod")]
    pub name: String,
    /// Whether others may hold it at the same time.
    #[schema(value_type = String, example = "exclusive")]
    pub mode: LockMode,
    /// What keeps it.
    pub backend: Backend,
    /// The acquisition.
    #[schema(required)]
    pub lock_id: Option<Uuid>,
    /// Who holds it.
    #[schema(required)]
    pub holder: Option<HolderView>,
    /// Since when, by the database's clock.
    #[schema(required)]
    pub acquired_at: Option<Timestamp>,
    /// Until when, unless it is extended.
    #[schema(required)]
    pub expires_at: Option<Timestamp>,
    /// The fencing token of the acquisition.
    #[schema(required)]
    pub fencing_token: Option<i64>,
    /// How many wait for it: those in other processes are counted once they have waited for a moment.
    pub waiters: usize,
}

/// Who holds a lock, and why.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HolderView {
    /// The person or service.
    #[schema(example = "alice@example.com")]
    pub owner: String,
    /// What it does under the lock.
    #[schema(example = "deploy 4711")]
    pub operation: String,
    /// The process it runs in; empty when nobody said.
    pub instance: String,
    /// Anything else it has told.
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
}

impl From<&Holder> for HolderView {
    fn from(holder: &Holder) -> Self {
        Self {
            owner: holder.owner.clone(),
            operation: holder.operation.clone(),
            instance: holder.instance.clone(),
            metadata: holder.metadata.clone(),
        }
    }
}

impl LockItem {
    pub(crate) fn of(name: String, held: &HeldLock, waiters: usize) -> Self {
        Self {
            name,
            mode: held.mode,
            backend: Backend::Lease,
            lock_id: held.lock_id.map(LockId::as_uuid),
            holder: held.holder.as_ref().map(HolderView::from),
            acquired_at: held.acquired_at.map(Timestamp::from),
            expires_at: held.expires_at.map(Timestamp::from),
            fencing_token: held.fencing_token.map(|token| token.get()),
            waiters,
        }
    }
}

/// Which page of the locks to answer.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LockPageQuery {
    /// The most items of the page.
    #[serde(default)]
    #[param(value_type = i64, required = false, minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `next_cursor` of the page before.
    #[serde(default)]
    #[param(value_type = String, required = false, min_length = 1)]
    pub(crate) cursor: Option<LockCursor>,
}

impl LockPageQuery {
    pub(crate) fn limit(&self) -> usize {
        self.limit
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(50)
    }
}

impl Validate for LockPageQuery {
    fn validate(&self) -> Vec<FieldError> {
        match self.limit {
            Some(limit) if !(1..=200).contains(&limit) => {
                vec![FieldError::new("limit", "must be from 1 to 200")]
            }
            _ => Vec::new(),
        }
    }
}

/// A page of locks.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LockPage {
    /// Oldest first.
    pub items: Vec<LockItem>,
    /// Where the next page begins; `null` on the last one.
    #[schema(value_type = Option<String>, required)]
    pub next_cursor: Option<LockCursor>,
}

/// A position among the locks of a tenant: since when one is held, and its name, as no number orders them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockCursor {
    pub(crate) acquired_at: DateTime<Utc>,
    pub(crate) name: LockName,
}

impl fmt::Display for LockCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "l{:016x}", self.acquired_at.timestamp_micros())?;
        let mut bytes = self.name.encoded().bytes();
        bytes.try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for LockCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl LockCursor {
    fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix('l')?;
        if !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let (time, name) = hex.split_at_checked(16)?;
        // No lock is held since before 1970, and the database knows no time long before that.
        let micros = i64::from_str_radix(time, 16).ok()?;
        let bytes = (0..name.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(name.get(at..at + 2)?, 16).ok())
            .collect::<Option<Vec<u8>>>()?;
        Some(Self {
            acquired_at: DateTime::from_timestamp_micros(micros)?,
            name: LockName::decode(&String::from_utf8(bytes).ok()?).ok()?,
        })
    }
}

impl<'de> Deserialize<'de> for LockCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| serde::de::Error::custom("must be the next_cursor of an earlier answer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_and_nothing_else_does() {
        let cursor = LockCursor {
            acquired_at: DateTime::from_timestamp_micros(1_935_667_020_123_456).unwrap(),
            name: lock_name("acme", "größe/1").unwrap(),
        };
        let text = cursor.to_string();
        assert_eq!(LockCursor::parse(&text), Some(cursor));
        let short = text.get(..text.len() - 1).unwrap();
        // A time that no database has.
        let negative = format!("lf0{}", text.get(3..).unwrap());
        for bad in [
            "",
            "l",
            "l0000000000000001",
            "c000000000000000161",
            short,
            "l00000000000000ö161",
            &negative,
        ] {
            assert_eq!(LockCursor::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_an_acquire_may_ask_for() {
        let fields = |body: Value| -> Vec<String> {
            let acquire: AcquireLock = serde_json::from_value(body).unwrap();
            acquire.validate().into_iter().map(|error| error.field).collect()
        };
        let long = "x".repeat(257);
        let much = "x".repeat(4096);
        for (body, wrong) in [
            (serde_json::json!({"ttl_ms": 100}), &[][..]),
            (serde_json::json!({"ttl_ms": 86_400_000}), &[]),
            (serde_json::json!({"ttl_ms": 99}), &["ttl_ms"]),
            (serde_json::json!({"ttl_ms": 86_400_001}), &["ttl_ms"]),
            (
                serde_json::json!({"ttl_ms": 1000, "max_hold_ms": 999}),
                &["max_hold_ms"],
            ),
            (
                serde_json::json!({"ttl_ms": 1000, "operation": long}),
                &["operation"],
            ),
            (
                serde_json::json!({"ttl_ms": 1000, "metadata": {"a": much}}),
                &["metadata"],
            ),
        ] {
            assert_eq!(fields(body), wrong);
        }
    }
}
