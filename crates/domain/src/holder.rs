//! [`Holder`]: who wants or has a lock, and why; [`HeldLock`]: what is known of a hold from outside.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{FencingToken, Invalid, LockId, LockMode, LockName};

/// Who takes a lock and what for. It is shown to everybody whom the lock refuses.
///
/// ```
/// use leasehold_domain::Holder;
///
/// let holder = Holder::new("alice@example.com", "PUT /v1/plans/7").with_instance("api-3");
/// assert_eq!(holder.owner, "alice@example.com");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The person or service, at most 256 bytes.
    pub owner: String,
    /// What it does under the lock, at most 256 bytes.
    pub operation: String,
    /// The process it runs in, at most 256 bytes; empty when nobody said.
    #[serde(default)]
    pub instance: String,
    /// Anything else a reader of the lock should see, at most 4 KiB as JSON.
    #[serde(default)]
    pub metadata: Map<String, Value>,
}

impl Holder {
    /// The most bytes that each text of a holder may have.
    pub const MAX_FIELD_BYTES: usize = 256;
    /// The most bytes that the metadata may have when written as JSON.
    pub const MAX_METADATA_BYTES: usize = 4096;

    /// A holder with no instance and no metadata.
    pub fn new(owner: impl Into<String>, operation: impl Into<String>) -> Self {
        Self {
            owner: owner.into(),
            operation: operation.into(),
            instance: String::new(),
            metadata: Map::new(),
        }
    }

    /// The same holder in the named process.
    #[must_use]
    pub fn with_instance(mut self, instance: impl Into<String>) -> Self {
        self.instance = instance.into();
        self
    }

    /// The same holder with free metadata.
    #[must_use]
    pub fn with_metadata(mut self, metadata: Map<String, Value>) -> Self {
        self.metadata = metadata;
        self
    }

    /// Checks the bounds of every field.
    ///
    /// # Errors
    /// [`Invalid`] naming the field: `holder.owner`, `holder.operation`, `holder.instance` or
    /// `holder.metadata`.
    pub fn validate(&self) -> Result<(), Invalid> {
        let texts = [
            ("holder.owner", &self.owner),
            ("holder.operation", &self.operation),
            ("holder.instance", &self.instance),
        ];
        for (field, text) in texts {
            if text.len() > Self::MAX_FIELD_BYTES {
                return Err(Invalid::new(
                    field,
                    format!("at most {} bytes", Self::MAX_FIELD_BYTES),
                ));
            }
            if text.contains('\0') {
                return Err(Invalid::new(field, "must not contain NUL"));
            }
        }
        let metadata = serde_json::to_string(&self.metadata)
            .map_err(|error| Invalid::new("holder.metadata", error.to_string()))?;
        if metadata.len() > Self::MAX_METADATA_BYTES {
            let limit = Self::MAX_METADATA_BYTES;
            return Err(Invalid::new(
                "holder.metadata",
                format!("at most {limit} bytes of JSON"),
            ));
        }
        // JSON writes NUL as an escape, which `jsonb` refuses.
        if metadata.contains("\\u0000") {
            return Err(Invalid::new("holder.metadata", "must not contain NUL"));
        }
        Ok(())
    }
}

/// A hold as others see it. What a backend cannot know of a hold in another process is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldLock {
    /// The lock.
    pub name: LockName,
    /// Shared or exclusive.
    pub mode: LockMode,
    /// The acquisition.
    pub lock_id: Option<LockId>,
    /// Who and why.
    pub holder: Option<Holder>,
    /// When it was acquired, by the backend's clock.
    pub acquired_at: Option<DateTime<Utc>>,
    /// When it ends by itself; `None` for holds that live as long as a session or a transaction.
    pub expires_at: Option<DateTime<Utc>>,
    /// The token of this acquisition, where the backend gives tokens and it is final.
    pub fencing_token: Option<FencingToken>,
    /// The database session that has it, for holds that live in one.
    pub session: Option<HolderSession>,
}

impl HeldLock {
    /// A hold of which only the name and the mode are known.
    pub fn unknown(name: LockName, mode: LockMode) -> Self {
        Self {
            name,
            mode,
            lock_id: None,
            holder: None,
            acquired_at: None,
            expires_at: None,
            fencing_token: None,
            session: None,
        }
    }
}

/// The database session that has a lock, as the server's own views tell it. For operators: it never belongs in
/// an answer to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderSession {
    /// The process id of the server's backend.
    pub backend_pid: i32,
    /// What the holder's connection called itself.
    pub application_name: Option<String>,
    /// Where it connects from; `None` for a Unix socket.
    pub client_address: Option<String>,
}
