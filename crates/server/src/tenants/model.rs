//! Tenants on the wire.

use leasehold_http::{FieldError, Timestamp, Validate};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::names::Slug;

/// The most bytes of a tenant's name.
const MAX_NAME: usize = 256;

/// A tenant.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Tenant {
    /// Its id.
    pub id: String,
    /// What people call it.
    #[schema(required)]
    pub name: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A tenant to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTenant {
    /// Its id, which nobody else has.
    pub id: Slug,
    /// What people call it: at most 256 bytes.
    #[serde(default)]
    pub name: Option<String>,
}

impl Validate for NewTenant {
    fn validate(&self) -> Vec<FieldError> {
        match &self.name {
            Some(name) if name.len() > MAX_NAME => {
                vec![FieldError::new(
                    "name",
                    format!("must have at most {MAX_NAME} bytes"),
                )]
            }
            _ => Vec::new(),
        }
    }
}

/// The path of a tenant.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct TenantPath {
    /// The tenant.
    pub tenant: Slug,
}
