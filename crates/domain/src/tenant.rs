//! [`TenantConflict`]: a tenant takes no writes now, or has too many of them to be drained.

use std::fmt;

/// Writers of a tenant share its gate, and one drain has it alone. Whoever comes at the wrong moment gets this, and may
/// try again soon. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tenant {tenant}: {reason}")]
pub struct TenantConflict {
    /// The tenant whose gate is closed.
    pub tenant: String,
    /// Who is in the way.
    pub reason: TenantConflictReason,
}

/// Who is in the way at a tenant's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TenantConflictReason {
    /// A drain has the tenant for itself, or waits to have it: there are no writes meanwhile.
    PurgeInProgress,
    /// Writes went on for longer than the drain would wait.
    WritesInProgress,
}

impl TenantConflictReason {
    /// As it stands in answers: `purge_in_progress` or `writes_in_progress`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PurgeInProgress => "purge_in_progress",
            Self::WritesInProgress => "writes_in_progress",
        }
    }
}

impl fmt::Display for TenantConflictReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PurgeInProgress => "its data is being removed",
            Self::WritesInProgress => "its writes went on for too long",
        })
    }
}
