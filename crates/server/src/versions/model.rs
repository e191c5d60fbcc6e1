//! Versions on the wire.

use std::collections::BTreeMap;

use leasehold_http::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

/// What one write did, without its result.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Version {
    /// Its number: 1 for the first write of the workspace.
    pub version: i64,
    /// The request: `"<METHOD> <path>"`.
    #[schema(example = "PUT /v1/tenants/acme/workspaces/main/default-config/color")]
    pub operation: String,
    /// Whose request it was.
    #[schema(example = "alice@example.com")]
    pub author: String,
    /// The token of the lock that it was made under. Later versions have higher ones.
    pub fencing_token: i64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What one write did, and the workspace after it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VersionWithSnapshot {
    /// What one write did.
    #[serde(flatten)]
    pub version: Version,
    /// The workspace after it.
    pub snapshot: Snapshot,
}

/// The whole configuration of a workspace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Every key with its value.
    pub default_config: BTreeMap<String, Value>,
    /// What the keys are for, where somebody said so.
    #[serde(default)]
    pub descriptions: BTreeMap<String, String>,
    /// The contexts, oldest first.
    pub contexts: Vec<SnapshotContext>,
}

/// A context in a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotContext {
    /// Its id.
    pub id: Uuid,
    /// The dimensions that must have these values.
    pub condition: Map<String, Value>,
    /// The values that replace the default ones.
    pub overrides: Map<String, Value>,
    /// The higher wins.
    pub priority: i64,
}

/// The version that a write made.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct NewVersion {
    /// Its number.
    pub version: i64,
}
