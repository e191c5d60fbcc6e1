//! [`WorkQueue`]: work that is claimed. One item a scope, which means "look at this again".

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::{ErrorClass, Invalid, Unavailable};

/// The priority of work when nobody says: lower is more urgent.
pub const DEFAULT_PRIORITY: i32 = 100;
/// How often work is begun when nobody says.
pub const DEFAULT_MAX_ATTEMPTS: u32 = 10;
/// The shortest and the longest lease of a claim.
pub const CLAIM_LEASES: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(24 * 60 * 60));
/// The most items that one claim takes.
pub const MAX_CLAIM_BATCH: usize = 1000;
/// The longest time that work is put off: 366 days.
pub const MAX_DELAY: Duration = Duration::from_secs(366 * 24 * 60 * 60);

const MAX_TEXT_BYTES: usize = 256;
const MAX_KINDS: usize = 100;
const MAX_PAYLOAD_BYTES: usize = 256 * 1024;
const MAX_ERROR_BYTES: usize = 4096;
const MAX_ATTEMPTS: u32 = 1_000_000;
const MAX_PAGE: usize = 1000;

/// What the work is about. There is at most one item for each.
///
/// Scopes are ordered as the database orders them: byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Scope {
    /// Whose it is, 1 to 256 bytes.
    pub tenant: String,
    /// What is to be done, 1 to 256 bytes. Workers claim by it.
    pub kind: String,
    /// What it is done to: the type, 1 to 256 bytes.
    pub scope_type: String,
    /// What it is done to: which one, 1 to 256 bytes.
    pub scope_id: String,
}

impl Scope {
    /// A scope of these parts.
    pub fn new(
        tenant: impl Into<String>,
        kind: impl Into<String>,
        scope_type: impl Into<String>,
        scope_id: impl Into<String>,
    ) -> Self {
        Self {
            tenant: tenant.into(),
            kind: kind.into(),
            scope_type: scope_type.into(),
            scope_id: scope_id.into(),
        }
    }

    /// Checks the bounds of every part.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: `tenant`, `kind`, `scope_type` or `scope_id`.
    pub fn validate(&self) -> Result<(), Invalid> {
        check_text("tenant", &self.tenant)?;
        check_text("kind", &self.kind)?;
        check_text("scope_type", &self.scope_type)?;
        check_text("scope_id", &self.scope_id)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            tenant,
            kind,
            scope_type,
            scope_id,
        } = self;
        write!(f, "{tenant}/{kind}/{scope_type}/{scope_id}")
    }
}

/// Work to be enqueued: a scope that has changed, and what is to be known of that.
///
/// Enqueued again before it was done it is merged into the item that is there: the newest time of the event and the
/// most urgent priority stay, and of the rest what came last.
///
/// ```
/// use leasehold_domain::{NewWork, Scope};
///
/// let work = NewWork::new(Scope::new("acme", "reindex", "plan", "7")).with_priority(10);
/// assert!(work.validate().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NewWork {
    scope: Scope,
    payload: Option<Value>,
    priority: i32,
    event_at: Option<DateTime<Utc>>,
    max_attempts: u32,
}

impl NewWork {
    /// Work with the defaults: no payload, [`DEFAULT_PRIORITY`], an event of now, [`DEFAULT_MAX_ATTEMPTS`].
    pub fn new(scope: Scope) -> Self {
        Self {
            scope,
            payload: None,
            priority: DEFAULT_PRIORITY,
            event_at: None,
            max_attempts: DEFAULT_MAX_ATTEMPTS,
        }
    }

    /// The same work with a payload, at most 256 KiB as JSON.
    #[must_use]
    pub fn with_payload(mut self, payload: Value) -> Self {
        self.payload = Some(payload);
        self
    }

    /// The same work with another priority; lower is more urgent.
    #[must_use]
    pub fn with_priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// The same work for an event of another time than now, in the years 1 to 9999.
    #[must_use]
    pub fn with_event_at(mut self, event_at: DateTime<Utc>) -> Self {
        self.event_at = Some(event_at);
        self
    }

    /// The same work, given up when it was begun this often and not finished: 1 to 1,000,000.
    #[must_use]
    pub fn with_max_attempts(mut self, max_attempts: u32) -> Self {
        self.max_attempts = max_attempts;
        self
    }

    /// What it is about.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// What the worker should know.
    pub fn payload(&self) -> Option<&Value> {
        self.payload.as_ref()
    }

    /// Lower is more urgent.
    pub fn priority(&self) -> i32 {
        self.priority
    }

    /// When it happened; `None` is when it is enqueued.
    pub fn event_at(&self) -> Option<DateTime<Utc>> {
        self.event_at
    }

    /// How often it is begun at most.
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// Checks every bound. Queues call it before they do anything.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: one of the scope's, `payload`, `event_at` or `max_attempts`.
    pub fn validate(&self) -> Result<(), Invalid> {
        self.scope.validate()?;
        if let Some(payload) = &self.payload {
            check_payload(payload)?;
        }
        let years = (1..=9999).contains(&self.event_at.map_or(2000, |at| chrono::Datelike::year(&at)));
        if !years {
            return Err(Invalid::new("event_at", "must be in the years 1 to 9999"));
        }
        if !(1..=MAX_ATTEMPTS).contains(&self.max_attempts) {
            return Err(Invalid::new(
                "max_attempts",
                format!("must be between 1 and {MAX_ATTEMPTS}"),
            ));
        }
        Ok(())
    }
}

/// The identity of an item, until it is done. Items that come later have higher ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkId(i64);

impl WorkId {
    /// Wraps an id that a queue has given out.
    pub const fn new(id: i64) -> Self {
        Self(id)
    }

    /// The id as a number.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for WorkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What tells one claim from every other, also of the same item by the same worker. Random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimToken(Uuid);

impl ClaimToken {
    /// A fresh token, never used before.
    #[expect(
        clippy::new_without_default,
        reason = "a default that differs each time would surprise"
    )]
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }

    /// The token as a UUID.
    pub const fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for ClaimToken {
    fn from(token: Uuid) -> Self {
        Self(token)
    }
}

/// A claim by its item and token: what every call that ends or extends it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimKey {
    /// The item.
    pub id: WorkId,
    /// The claim of it.
    pub token: ClaimToken,
}

/// An item that is ours to work on, until it is settled or somebody else claims it after its lease has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// The item and the token.
    pub key: ClaimKey,
    /// What it is about.
    pub scope: Scope,
    /// The payload of the enqueue that came last.
    pub payload: Option<Value>,
    /// Lower is more urgent.
    pub priority: i32,
    /// When the newest event happened.
    pub event_at: DateTime<Utc>,
    /// How often it was begun, this time included: from 1 on.
    pub attempt: u32,
    /// How often it may be begun.
    pub max_attempts: u32,
    /// What went wrong the last time.
    pub last_error: Option<String>,
    /// When it was claimed, by the queue's clock.
    pub claimed_at: DateTime<Utc>,
    /// When others may claim it, by the same clock.
    pub expires_at: DateTime<Utc>,
}

impl Claim {
    /// Whether there is no further attempt after this one.
    pub fn is_last_attempt(&self) -> bool {
        self.attempt >= self.max_attempts
    }
}

/// What a claim has found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claimed {
    /// What is ours now, the most urgent first.
    pub claims: Vec<Claim>,
    /// What was begun too often, and became dead letters instead.
    pub dead: Vec<DeadLetter>,
}

/// Who wants how much of what work, and for how long at first.
///
/// ```
/// use std::time::Duration;
/// use leasehold_domain::ClaimRequest;
///
/// let request = ClaimRequest::new(["reindex"], "indexer-3").with_batch(10).with_lease(Duration::from_secs(60));
/// assert!(request.validate().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimRequest {
    kinds: Vec<String>,
    worker: String,
    batch: usize,
    lease: Duration,
}

impl ClaimRequest {
    /// Asks for one item of these kinds, with a lease of 30 seconds.
    pub fn new<K: Into<String>>(kinds: impl IntoIterator<Item = K>, worker: impl Into<String>) -> Self {
        let mut kinds: Vec<String> = kinds.into_iter().map(Into::into).collect();
        kinds.sort();
        kinds.dedup();
        Self {
            kinds,
            worker: worker.into(),
            batch: 1,
            lease: Duration::from_secs(30),
        }
    }

    /// The same request for up to this many items, 1 to [`MAX_CLAIM_BATCH`].
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// The same request with another lease, 100 ms to 24 h.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// What work, each kind once.
    pub fn kinds(&self) -> &[String] {
        &self.kinds
    }

    /// Who wants it.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// How much at most.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// For how long.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Checks every bound. Queues call it before they do anything.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: `kinds` (none means none, not all), `worker`, `batch` or `lease`.
    pub fn validate(&self) -> Result<(), Invalid> {
        if !(1..=MAX_KINDS).contains(&self.kinds.len()) {
            return Err(Invalid::new("kinds", format!("must be 1 to {MAX_KINDS}")));
        }
        for kind in &self.kinds {
            check_text("kinds", kind)?;
        }
        check_text("worker", &self.worker)?;
        if !(1..=MAX_CLAIM_BATCH).contains(&self.batch) {
            return Err(Invalid::new(
                "batch",
                format!("must be between 1 and {MAX_CLAIM_BATCH}"),
            ));
        }
        check_lease(self.lease)
    }
}

/// Checks the lease of a claim: 100 ms to 24 h.
///
/// # Errors
/// [`Invalid`] with the field `lease`.
pub fn check_lease(lease: Duration) -> Result<(), Invalid> {
    if (CLAIM_LEASES.0..=CLAIM_LEASES.1).contains(&lease) {
        Ok(())
    } else {
        let reason = format!("{lease:?} is not between 100 ms and 24 h");
        Err(Invalid::new("lease", reason))
    }
}

/// A claim whose work failed and shall be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The claim.
    pub claim: ClaimKey,
    /// What went wrong. Longer than 4 KiB it is cut off.
    pub error: String,
    /// How long nobody takes the item, at most [`MAX_DELAY`].
    pub backoff: Duration,
}

/// A claim whose work is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The claim.
    pub claim: ClaimKey,
    /// What went wrong. Longer than 4 KiB it is cut off.
    pub error: String,
}

/// A claim whose work is put off, without an attempt being counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requeue {
    /// The claim.
    pub claim: ClaimKey,
    /// How long nobody takes the item, at most [`MAX_DELAY`].
    pub after: Duration,
}

/// What a call has made of one claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// What was asked for.
    Done,
    /// The claim is over, but the item was enqueued meanwhile, or may have been: it can be claimed at once, as a new
    /// one with no attempts and no error.
    DoneButChanged,
    /// Somebody else has claimed it, or it is no more. Nothing was changed.
    NotOwned,
}

/// What may be done with an item now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkState {
    /// Whoever comes first may claim it; nobody has, or the lease of whoever has is over.
    Ready,
    /// Its time has not come: it failed, or was put off.
    Delayed,
    /// Somebody works on it.
    Claimed,
}

/// An item as others see it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkItem {
    /// Its identity.
    pub id: WorkId,
    /// What it is about.
    pub scope: Scope,
    /// What may be done with it.
    pub state: WorkState,
    /// The payload of the enqueue that came last.
    pub payload: Option<Value>,
    /// Lower is more urgent.
    pub priority: i32,
    /// When the newest event happened.
    pub event_at: DateTime<Utc>,
    /// How often it was begun.
    pub attempt_count: u32,
    /// How often it may be begun.
    pub max_attempts: u32,
    /// When it may be claimed, while it is delayed.
    pub not_before: Option<DateTime<Utc>>,
    /// What went wrong the last time.
    pub last_error: Option<String>,
}

/// Work that was given up.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// The identity of the letter, which is not that of the item. Later ones are higher.
    pub id: i64,
    /// What it was about.
    pub scope: Scope,
    /// The payload that the item had at the end.
    pub payload: Option<Value>,
    /// Lower is more urgent.
    pub priority: i32,
    /// When the newest event happened.
    pub event_at: DateTime<Utc>,
    /// How often it was begun.
    pub attempt_count: u32,
    /// How often it might have been.
    pub max_attempts: u32,
    /// What went wrong the last time.
    pub last_error: String,
    /// When it was given up.
    pub failed_at: DateTime<Utc>,
}

/// Which items or dead letters to list, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Only those of this tenant.
    pub tenant: Option<String>,
    /// Only those of this kind.
    pub kind: Option<String>,
    /// Only those after this one: the id of the last of the page before.
    pub after: i64,
    /// How many at most, 1 to 1000.
    pub limit: usize,
}

impl Default for Page {
    /// The first hundred of all.
    fn default() -> Self {
        Self {
            tenant: None,
            kind: None,
            after: 0,
            limit: 100,
        }
    }
}

impl Page {
    /// Checks the limit.
    ///
    /// # Errors
    /// [`Invalid`] with the field `limit`.
    pub fn validate(&self) -> Result<(), Invalid> {
        if (1..=MAX_PAGE).contains(&self.limit) {
            Ok(())
        } else {
            Err(Invalid::new("limit", format!("must be between 1 and {MAX_PAGE}")))
        }
    }
}

/// How much there is of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindStats {
    /// The kind.
    pub kind: String,
    /// Items that may be claimed now.
    pub ready: u64,
    /// Items whose time has not come.
    pub delayed: u64,
    /// Items that somebody works on.
    pub claimed: u64,
    /// Dead letters.
    pub dead: u64,
    /// How long ago the oldest event among the ready items happened; `None` when there is none.
    pub oldest_ready: Option<Duration>,
}

/// How long dead letters are kept: each until it is older, or until there are more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How old a dead letter may become.
    pub age: Duration,
    /// How many there may be. The newest stay.
    pub number: u64,
}

impl Default for Retention {
    /// 30 days, and 10,000.
    fn default() -> Self {
        Self {
            age: Duration::from_secs(30 * 24 * 60 * 60),
            number: 10_000,
        }
    }
}

/// Why a queue did not do what it was asked to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QueueError {
    /// The call is out of bounds; nothing was done.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The backend cannot be reached; nothing was done.
    #[error("the work queue is not available")]
    Unavailable(#[source] Unavailable),
    /// The answer never came: it may have been done. Everything but a claim may be repeated, and what was claimed is
    /// free again when the lease is over.
    #[error("whether the work queue was changed is unknown")]
    OutcomeUnknown(#[source] Unavailable),
}

impl QueueError {
    /// The kind of failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Invalid(_) => ErrorClass::Invalid,
            Self::Unavailable(_) => ErrorClass::Unavailable,
            Self::OutcomeUnknown(_) => ErrorClass::Internal,
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Invalid(_) => false,
            Self::Unavailable(_) | Self::OutcomeUnknown(_) => true,
        }
    }
}

/// A queue of work that processes share. Object-safe: services keep an `Arc<dyn WorkQueue>`.
///
/// Work is done at least once: whoever loses a claim may have done some of it, or all. What is done is done by one at a
/// time, as far as a lease can promise that. A claim stays with its worker until it is settled, or until somebody else
/// claims the item after the lease has ended; who has only the token of such a claim changes nothing any more.
///
/// Calls with several claims answer with an outcome for each, in their order; each claim is named once.
#[async_trait]
#[cfg_attr(
    not(doc),
    allow(clippy::missing_errors_doc, reason = "each method has its own section")
)]
pub trait WorkQueue: Send + Sync {
    /// Says that something has changed and must be looked at (again).
    ///
    /// An enqueue is never lost: while the item is claimed, it makes it claimable again afterwards. It does not shorten
    /// the pause after a failure.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done; doing it again does no harm.
    async fn enqueue(&self, work: &NewWork) -> Result<(), QueueError> {
        self.enqueue_many(std::slice::from_ref(work)).await
    }

    /// The same for any number, also of the same scope: then the last of them counts as the last.
    ///
    /// # Errors
    /// [`QueueError`]. When the bounds are not kept nothing was enqueued; else some may have been.
    ///
    /// # Cancel safety
    /// Some may have been enqueued; doing it again does no harm.
    async fn enqueue_many(&self, work: &[NewWork]) -> Result<(), QueueError>;

    /// Takes items that nobody has: by priority, then time of the event, then id. Each was begun once more.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// Items may have been claimed. They are free when the lease is over, with an attempt counted.
    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, QueueError>;

    /// Moves the end of claims to `lease` from now, where that is later.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn extend(&self, claims: &[ClaimKey], lease: Duration) -> Result<Vec<Outcome>, QueueError>;

    /// Says that the work is done: the items are no more.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn complete(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError>;

    /// Says that the work failed and shall be tried again, after a pause.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn retry(&self, retries: &[Retry]) -> Result<Vec<Outcome>, QueueError>;

    /// Gives work up: it becomes a dead letter. An item that was enqueued meanwhile stays besides.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn fail(&self, failures: &[Failure]) -> Result<Vec<Outcome>, QueueError>;

    /// Puts work off. This time does not count as an attempt, and the last error stays.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn requeue_after(&self, requeues: &[Requeue]) -> Result<Vec<Outcome>, QueueError>;

    /// Gives claims back as if they had not been made.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn give_back(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError> {
        let after = Duration::ZERO;
        let requeues: Vec<Requeue> = claims.iter().map(|&claim| Requeue { claim, after }).collect();
        self.requeue_after(&requeues).await
    }

    /// How much there is of each kind, in the order of their names. Kinds of which there is nothing are not listed.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It only reads.
    async fn stats(&self) -> Result<Vec<KindStats>, QueueError>;

    /// The items, oldest first.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It only reads.
    async fn items(&self, page: &Page) -> Result<Vec<WorkItem>, QueueError>;

    /// The dead letters, oldest first.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It only reads.
    async fn dead_letters(&self, page: &Page) -> Result<Vec<DeadLetter>, QueueError>;

    /// Enqueues dead letters of a tenant again, and answers how many there were. Where there is an item of the scope
    /// already it stays, with its own payload, and is looked at again.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// It may have been done.
    async fn redrive(&self, tenant: &str, letters: &[i64]) -> Result<u64, QueueError>;

    /// Removes dead letters that are too old or too many, and answers how many.
    ///
    /// # Errors
    /// [`QueueError`].
    ///
    /// # Cancel safety
    /// Some may have been removed.
    async fn purge_dead_letters(&self, retention: &Retention) -> Result<u64, QueueError>;
}

/// The text of an error as it is kept: at most 4 KiB, without what no database stores.
pub fn kept_error(error: &str) -> String {
    let mut kept = error.replace('\0', "\u{fffd}");
    kept.truncate(kept.floor_char_boundary(MAX_ERROR_BYTES));
    kept
}

/// Checks how long work is put off: at most [`MAX_DELAY`].
///
/// # Errors
/// [`Invalid`] with the field.
pub fn check_delay(field: &'static str, delay: Duration) -> Result<(), Invalid> {
    if delay <= MAX_DELAY {
        Ok(())
    } else {
        Err(Invalid::new(field, format!("{delay:?} is more than 366 days")))
    }
}

fn check_text(field: &'static str, text: &str) -> Result<(), Invalid> {
    if !(1..=MAX_TEXT_BYTES).contains(&text.len()) {
        return Err(Invalid::new(
            field,
            format!("must have 1 to {MAX_TEXT_BYTES} bytes"),
        ));
    }
    if text.contains('\0') {
        return Err(Invalid::new(field, "must not contain NUL"));
    }
    Ok(())
}

fn check_payload(payload: &Value) -> Result<(), Invalid> {
    let bytes = serde_json::to_vec(payload).map_err(|error| Invalid::new("payload", error.to_string()))?;
    if bytes.len() > MAX_PAYLOAD_BYTES {
        let limit = MAX_PAYLOAD_BYTES / 1024;
        return Err(Invalid::new("payload", format!("at most {limit} KiB of JSON")));
    }
    if has_nul(payload) {
        return Err(Invalid::new("payload", "must not contain NUL"));
    }
    Ok(())
}

/// `jsonb` refuses it, also in keys.
fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(has_nul),
        Value::Object(members) => members
            .iter()
            .any(|(key, value)| key.contains('\0') || has_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scope() -> Scope {
        Scope::new("t", "k", "s", "1")
    }

    #[test]
    fn bounds_are_told_by_field() {
        let long = "x".repeat(257);
        let works = [
            (NewWork::new(Scope::new("", "k", "s", "1")), "tenant"),
            (NewWork::new(Scope::new("t", &long, "s", "1")), "kind"),
            (NewWork::new(Scope::new("t", "k", "\0", "1")), "scope_type"),
            (NewWork::new(Scope::new("t", "k", "s", "")), "scope_id"),
            (
                NewWork::new(scope()).with_payload(json!("x".repeat(256 * 1024))),
                "payload",
            ),
            (
                NewWork::new(scope()).with_payload(json!({ "a": ["\0"] })),
                "payload",
            ),
            (NewWork::new(scope()).with_payload(json!({ "\0": 1 })), "payload"),
            (
                NewWork::new(scope()).with_event_at(DateTime::<Utc>::MAX_UTC),
                "event_at",
            ),
            (NewWork::new(scope()).with_max_attempts(0), "max_attempts"),
            (NewWork::new(scope()).with_max_attempts(u32::MAX), "max_attempts"),
        ];
        for (work, field) in works {
            assert_eq!(work.validate().unwrap_err().field(), field);
        }
        // Six characters that only look like one.
        let escaped = NewWork::new(scope()).with_payload(json!("\\u0000"));
        assert!(escaped.validate().is_ok());

        let request = || ClaimRequest::new(["k"], "w");
        let requests = [
            (ClaimRequest::new([""; 0], "w"), "kinds"),
            (ClaimRequest::new([""], "w"), "kinds"),
            (ClaimRequest::new((0..101).map(|n| n.to_string()), "w"), "kinds"),
            (ClaimRequest::new(["k"], ""), "worker"),
            (request().with_batch(0), "batch"),
            (request().with_batch(1001), "batch"),
            (request().with_lease(Duration::from_millis(99)), "lease"),
            (request().with_lease(Duration::MAX), "lease"),
        ];
        for (request, field) in requests {
            assert_eq!(request.validate().unwrap_err().field(), field);
        }
        assert!(
            ClaimRequest::new(["k", "k"], "w")
                .with_batch(1000)
                .validate()
                .is_ok()
        );
        assert_eq!(check_delay("after", Duration::MAX).unwrap_err().field(), "after");
        for limit in [0, 1001] {
            let page = Page {
                limit,
                ..Page::default()
            };
            assert_eq!(page.validate().unwrap_err().field(), "limit");
        }
    }

    #[test]
    fn errors_are_cut_between_characters() {
        assert_eq!(kept_error("a\0b"), "a\u{fffd}b");
        let long = kept_error(&"ä".repeat(3000));
        assert_eq!(long.chars().count(), 2048);
        let odd = kept_error(&format!("x{}", "ä".repeat(3000)));
        assert_eq!(odd.len(), 4095);
    }
}
