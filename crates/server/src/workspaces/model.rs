//! Workspaces on the wire, and the paths that lead into one.

use leasehold_http::{FieldError, LockView, Timestamp, Validate};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::names::{ConfigKey, Slug};

/// The most bytes of a description.
pub(crate) const MAX_DESCRIPTION: usize = 4096;

/// A workspace: a configuration with its versions.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Workspace {
    /// The tenant that owns it.
    pub tenant_id: String,
    /// Its name in the tenant.
    pub name: String,
    /// What it is for.
    #[schema(required)]
    pub description: Option<String>,
    /// The number of its current version; 0 before the first write.
    pub version: i64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
    /// Who holds it now; absent when nobody does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workspace_lock: Option<LockView>,
}

/// A workspace to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewWorkspace {
    /// Its name, unique in the tenant.
    pub name: Slug,
    /// What it is for: at most 4,096 bytes.
    #[serde(default)]
    pub description: Option<String>,
}

impl Validate for NewWorkspace {
    fn validate(&self) -> Vec<FieldError> {
        check_description(self.description.as_deref())
    }
}

/// What to change of a workspace. What is left out stays.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkspacePatch {
    /// What it is for: at most 4,096 bytes; `null` removes it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    pub description: Option<Option<String>>,
}

impl Validate for WorkspacePatch {
    fn validate(&self) -> Vec<FieldError> {
        check_description(self.description.as_ref().and_then(Option::as_deref))
    }
}

/// Tells `null` from absent: for members of a patch, which are `None` by default.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

pub(crate) fn check_description(description: Option<&str>) -> Vec<FieldError> {
    match description {
        Some(text) if text.len() > MAX_DESCRIPTION => {
            vec![FieldError::new(
                "description",
                format!("must have at most {MAX_DESCRIPTION} bytes"),
            )]
        }
        _ => Vec::new(),
    }
}

/// Why a lock is taken away from its holder.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ForceQuery {
    /// For the record: 1 to 256 characters.
    #[param(min_length = 1, max_length = 256)]
    pub reason: String,
}

impl Validate for ForceQuery {
    fn validate(&self) -> Vec<FieldError> {
        if (1..=256).contains(&self.reason.chars().count()) {
            Vec::new()
        } else {
            vec![FieldError::new("reason", "must have 1 to 256 characters")]
        }
    }
}

/// The path of a workspace.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct WorkspacePath {
    /// The tenant.
    pub tenant: Slug,
    /// The workspace.
    pub workspace: Slug,
}

/// The path of a workspace's batch, which may hold it for longer.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct BatchPath {
    /// The tenant.
    pub tenant: Slug,
    /// The workspace.
    pub workspace: Slug,
}

/// The path of a configuration key.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct KeyPath {
    /// The tenant.
    pub tenant: Slug,
    /// The workspace.
    pub workspace: Slug,
    /// The key.
    // The one key that is also the name of another resource arrives by a route without this parameter.
    #[serde(default = "batch")]
    pub key: ConfigKey,
}

fn batch() -> ConfigKey {
    ConfigKey::batch()
}

/// The path of a context.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ContextPath {
    /// The tenant.
    pub tenant: Slug,
    /// The workspace.
    pub workspace: Slug,
    /// The context.
    pub id: Uuid,
}

/// The path of a version.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct VersionPath {
    /// The tenant.
    pub tenant: Slug,
    /// The workspace.
    pub workspace: Slug,
    /// The number of the version.
    #[param(minimum = 1)]
    pub n: i64,
}

/// A path that leads into a workspace.
pub trait InWorkspace: Send + Sync {
    /// Whether a write there may take as long as a batch.
    const BATCH: bool = false;

    /// The workspace.
    fn workspace(&self) -> WorkspaceId<'_>;
}

/// Which workspace.
#[derive(Clone, Copy, Debug)]
pub struct WorkspaceId<'a> {
    /// Its tenant.
    pub tenant: &'a str,
    /// Its name.
    pub name: &'a str,
}

macro_rules! in_workspace {
    ($($path:ty: $batch:literal),*) => {
        $(impl InWorkspace for $path {
            const BATCH: bool = $batch;

            fn workspace(&self) -> WorkspaceId<'_> {
                WorkspaceId { tenant: self.tenant.as_str(), name: self.workspace.as_str() }
            }
        })*
    };
}
in_workspace!(WorkspacePath: false, BatchPath: true, KeyPath: false, ContextPath: false, VersionPath: false);
