//! Work items on the wire.

use leasehold_domain::{KindStats, WorkState};
use leasehold_http::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use crate::names::Slug;

/// Something that is to be done.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WorkItem {
    /// Its id, until it is done.
    pub id: i64,
    /// What is to be done.
    #[schema(example = "webhook_delivery")]
    pub kind: String,
    /// What it is done to: the type.
    #[schema(example = "webhook_event")]
    pub scope_type: String,
    /// What it is done to: which one.
    pub scope_id: String,
    /// What may be done with it now.
    pub state: ItemState,
    /// Lower is more urgent.
    #[schema(example = 100)]
    pub priority: i32,
    /// How often it was begun.
    pub attempt_count: u32,
    /// When it may be begun again, while it is delayed.
    #[schema(required)]
    pub not_before: Option<Timestamp>,
    /// What went wrong the last time.
    #[schema(required)]
    pub last_error: Option<String>,
}

/// What may be done with an item now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ItemState {
    /// Whoever comes first may begin it.
    Ready,
    /// It waits for its next try.
    Delayed,
    /// Somebody works on it.
    Claimed,
    /// It was given up.
    Dead,
}

/// Something that was given up.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DeadLetter {
    /// What it was.
    #[serde(flatten)]
    pub item: WorkItem,
    /// When it was given up.
    pub failed_at: Timestamp,
    /// What whoever did it was told.
    #[schema(required, value_type = Option<Object>)]
    pub payload: Option<Value>,
}

impl From<leasehold_domain::WorkItem> for WorkItem {
    fn from(item: leasehold_domain::WorkItem) -> Self {
        Self {
            id: item.id.get(),
            kind: item.scope.kind,
            scope_type: item.scope.scope_type,
            scope_id: item.scope.scope_id,
            state: match item.state {
                WorkState::Ready => ItemState::Ready,
                WorkState::Delayed => ItemState::Delayed,
                WorkState::Claimed => ItemState::Claimed,
            },
            priority: item.priority,
            attempt_count: item.attempt_count,
            not_before: item.not_before.map(Timestamp),
            last_error: item.last_error,
        }
    }
}

impl From<leasehold_domain::DeadLetter> for DeadLetter {
    fn from(letter: leasehold_domain::DeadLetter) -> Self {
        Self {
            item: WorkItem {
                id: letter.id,
                kind: letter.scope.kind,
                scope_type: letter.scope.scope_type,
                scope_id: letter.scope.scope_id,
                state: ItemState::Dead,
                priority: letter.priority,
                attempt_count: letter.attempt_count,
                not_before: None,
                last_error: Some(letter.last_error),
            },
            failed_at: Timestamp(letter.failed_at),
            payload: letter.payload,
        }
    }
}

/// The path of a dead letter.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct DeadLetterPath {
    /// The tenant.
    pub tenant: Slug,
    /// The dead letter.
    pub id: i64,
}

/// What became of dead letters that were to be tried again.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct Redriven {
    /// How many there were.
    pub redriven: u64,
}

/// How much there is to be done.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct QueueStats {
    /// By kind. Kinds of which there is nothing are not listed.
    pub kinds: Vec<KindOfWork>,
}

/// How much there is of one kind.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KindOfWork {
    /// The kind.
    #[schema(example = "webhook_delivery")]
    pub kind: String,
    /// Items that may be begun now.
    pub ready: u64,
    /// Items that wait for their next try.
    pub delayed: u64,
    /// Items that somebody works on.
    pub claimed: u64,
    /// Dead letters.
    pub dead: u64,
    /// How old the oldest event of the ready items is, in seconds; `null` when there are none.
    #[schema(required)]
    pub oldest_ready_seconds: Option<f64>,
}

impl From<KindStats> for KindOfWork {
    fn from(stats: KindStats) -> Self {
        Self {
            kind: stats.kind,
            ready: stats.ready,
            delayed: stats.delayed,
            claimed: stats.claimed,
            dead: stats.dead,
            oldest_ready_seconds: stats.oldest_ready.map(|age| age.as_secs_f64()),
        }
    }
}
