//! Feedback records on the wire.

use std::collections::BTreeMap;

use leasehold_http::{FieldError, Timestamp, Validate};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::names::Slug;
use crate::workspaces::model::given;

/// The most bytes of the id of a user or of a field.
const MAX_ID: usize = 256;

/// What a user has said of something.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FeedbackRecord {
    /// Its id.
    pub id: Uuid,
    /// The tenant that owns it.
    pub tenant_id: String,
    /// Who said it, as the tenant calls them.
    #[schema(required)]
    pub user_id: Option<String>,
    /// Of what, as the tenant calls it.
    #[schema(required)]
    pub field_id: Option<String>,
    /// Any JSON.
    pub value: Value,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
}

/// A feedback record to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewFeedbackRecord {
    /// The tenant that owns it. A key of one tenant may leave it out.
    #[serde(default)]
    pub tenant_id: Option<Slug>,
    /// Who said it: 1 to 256 bytes.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 256)]
    pub user_id: Option<String>,
    /// Of what: 1 to 256 bytes.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 256)]
    pub field_id: Option<String>,
    /// Any JSON. Numbers are IEEE 754 doubles, or integers of 64 bits.
    pub value: Value,
}

impl Validate for NewFeedbackRecord {
    fn validate(&self) -> Vec<FieldError> {
        check_ids(self.user_id.as_deref(), self.field_id.as_deref())
    }
}

/// What to change of a feedback record. What is left out stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedbackRecordPatch {
    /// Who said it: 1 to 256 bytes; `null` removes it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 256)]
    pub user_id: Option<Option<String>>,
    /// Of what: 1 to 256 bytes; `null` removes it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 256)]
    pub field_id: Option<Option<String>>,
    /// Any JSON, `null` included.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Value, required = false)]
    pub value: Option<Value>,
}

impl FeedbackRecordPatch {
    /// Whether it asks for nothing.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(
            self,
            Self {
                user_id: None,
                field_id: None,
                value: None
            }
        )
    }
}

impl Validate for FeedbackRecordPatch {
    fn validate(&self) -> Vec<FieldError> {
        let text = |field: &Option<Option<String>>| field.clone().flatten();
        check_ids(text(&self.user_id).as_deref(), text(&self.field_id).as_deref())
    }
}

fn check_ids(user: Option<&str>, field: Option<&str>) -> Vec<FieldError> {
    let ids = [("user_id", user), ("field_id", field)];
    let bad = ids
        .into_iter()
        .filter(|(_, id)| id.is_some_and(|id| !(1..=MAX_ID).contains(&id.len())));
    bad.map(|(name, _)| FieldError::new(name, format!("must have 1 to {MAX_ID} bytes")))
        .collect()
}

/// The path of a feedback record.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct FeedbackRecordPath {
    /// The feedback record.
    pub id: Uuid,
}

/// Which feedback records to list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct FeedbackRecordFilter {
    /// Only those of this tenant.
    #[serde(default)]
    #[param(value_type = String, required = false)]
    pub tenant_id: Option<Slug>,
    /// Only those of this user.
    #[serde(default)]
    #[param(value_type = String, required = false, min_length = 1, max_length = 256)]
    pub user_id: Option<String>,
}

impl Validate for FeedbackRecordFilter {
    fn validate(&self) -> Vec<FieldError> {
        check_ids(self.user_id.as_deref(), None)
    }
}

/// Whom to forget.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Erasure {
    /// The user.
    #[param(min_length = 1, max_length = 256)]
    pub user_id: String,
    /// Only in this tenant.
    #[serde(default)]
    #[param(value_type = String, required = false)]
    pub tenant_id: Option<Slug>,
}

impl Validate for Erasure {
    fn validate(&self) -> Vec<FieldError> {
        check_ids(Some(&self.user_id), None)
    }
}

/// What was erased.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Erased {
    /// How many feedback records.
    pub deleted: i64,
    /// How many in each tenant that had any.
    pub by_tenant: BTreeMap<String, i64>,
}
