//! Contexts on the wire.

use std::collections::BTreeMap;

use leasehold_http::{FieldError, Validate};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::names::ConfigKey;

/// The most bytes of the name of a dimension.
const MAX_DIMENSION: usize = 128;

/// A context to make, or what an existing one is to become.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewContext {
    /// The dimensions that must have these values. An empty condition always matches.
    pub condition: Map<String, Value>,
    /// The values that replace the default ones. Every key must exist in the default configuration.
    #[schema(value_type = BTreeMap<String, Value>)]
    pub overrides: BTreeMap<ConfigKey, Value>,
    /// The higher wins.
    #[serde(default)]
    pub priority: i64,
}

impl NewContext {
    /// The overrides as plain JSON.
    pub(crate) fn overrides(&self) -> Map<String, Value> {
        self.overrides
            .iter()
            .map(|(key, value)| (key.as_str().to_owned(), value.clone()))
            .collect()
    }
}

impl Validate for NewContext {
    fn validate(&self) -> Vec<FieldError> {
        let bad = |dimension: &&String| !(1..=MAX_DIMENSION).contains(&dimension.len());
        let error = |dimension| {
            let allowed = format!("the name of a dimension must have 1 to {MAX_DIMENSION} bytes");
            FieldError::new(format!("condition.{dimension}"), allowed)
        };
        self.condition.keys().filter(bad).map(error).collect()
    }
}

/// A context.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Context {
    /// Its id.
    pub id: Uuid,
    /// The dimensions that must have these values.
    pub condition: Map<String, Value>,
    /// The values that replace the default ones.
    pub overrides: Map<String, Value>,
    /// The higher wins.
    pub priority: i64,
    /// The version of the workspace that wrote it last.
    pub version: i64,
}

/// A context that was deleted.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct DeletedContext {
    /// Its id.
    pub id: Uuid,
    /// The version of the workspace without it.
    pub version: i64,
}

/// The situation to resolve the configuration for.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveQuery {
    /// The value of each dimension that is known.
    pub context: Map<String, Value>,
}

impl Validate for ResolveQuery {}

/// The configuration that comes out.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Resolved {
    /// The version it is of.
    pub version: i64,
    /// Every key with its value.
    pub values: BTreeMap<String, Value>,
}
