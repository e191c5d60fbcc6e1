//! The default configuration on the wire.

use leasehold_http::{FieldError, Validate};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::names::ConfigKey;
use crate::workspaces::model::check_description;

/// A key with its value.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Entry {
    /// The key.
    #[schema(example = "color")]
    pub key: String,
    /// Any JSON.
    pub value: Value,
    /// What the key is for.
    #[schema(required)]
    pub description: Option<String>,
    /// The version of the workspace that wrote it last.
    pub version: i64,
}

/// The value of a key.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewValue {
    /// Any JSON. Numbers are IEEE 754 doubles, or integers of 64 bits.
    pub value: Value,
    /// What the key is for: at most 4,096 bytes. Left out, the key has none.
    #[serde(default)]
    pub description: Option<String>,
}

impl Validate for NewValue {
    fn validate(&self) -> Vec<FieldError> {
        check_description(self.description.as_deref())
    }
}

/// A key that was deleted.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DeletedKey {
    /// The key.
    #[schema(example = "color")]
    pub key: String,
    /// The version of the workspace without it.
    pub version: i64,
}

/// Changes that are made together or not at all.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// 1 to 1,000 changes, made in their order. A key may be changed more than once.
    #[schema(min_items = 1, max_items = 1000)]
    pub operations: Vec<Operation>,
}

/// One change of a batch.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Operation {
    /// Gives a key a value.
    Put {
        /// The key.
        key: ConfigKey,
        /// Any JSON.
        value: Value,
        /// What the key is for: at most 4,096 bytes. Left out, the key has none.
        #[serde(default)]
        description: Option<String>,
    },
    /// Deletes a key, which must be there.
    Delete {
        /// The key.
        key: ConfigKey,
    },
}

impl Batch {
    /// The most operations of a batch.
    pub const MAX_OPERATIONS: usize = 1_000;
}

impl Validate for Batch {
    const MAX_BYTES: usize = 8 * 1024 * 1024;

    fn validate(&self) -> Vec<FieldError> {
        let count = self.operations.len();
        if !(1..=Self::MAX_OPERATIONS).contains(&count) {
            let allowed = format!("must have 1 to {} items, not {count}", Self::MAX_OPERATIONS);
            return vec![FieldError::new("operations", allowed)];
        }
        let too_long = |(index, operation): (usize, &Operation)| match operation {
            Operation::Put { description, .. } => check_description(description.as_deref())
                .into_iter()
                .map(|error| FieldError::new(format!("operations[{index}].{}", error.field), error.message))
                .collect(),
            Operation::Delete { .. } => Vec::new(),
        };
        self.operations.iter().enumerate().flat_map(too_long).collect()
    }
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct BatchDone {
    /// The one version that all operations made together.
    pub version: i64,
    /// How many operations were applied: all of them.
    pub applied: usize,
}
