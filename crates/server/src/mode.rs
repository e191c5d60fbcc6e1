//! The kind of workspace lock that a database's instances have agreed on.
//!
//! A lease does not keep out an advisory lock, nor the other way round: all instances must use the same kind. It
//! stands in `leasehold.settings`. Every instance holds a shared lock as long as it lives, and whoever changes the
//! kind takes the same lock for itself alone, so that nobody is there who believes in the old one.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel_async::RunQueryDsl;
use leasehold_domain::{
    AcquireError, DistributedLock, Holder, Invalid, LockGuard, LockMode, LockName, LockRequest,
};
use leasehold_storage::{Database, Prepared, TransactionError};

use crate::config::WorkspaceLockMode;

const SETTING: &str = "workspace_lock_mode";
/// How long a start waits for a change of the mode to end.
const WAIT: Duration = Duration::from_secs(10);
/// The lock ends with its session, and an instance may live for years.
const MAX_HOLD: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Why the kind of lock could not be agreed on, or changed.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    /// Other instances use another kind.
    #[error(
        "WORKSPACE_LOCK_MODE is {asked}, but this database is used with {agreed}: start with {agreed}, or stop every \
         instance and run `leasehold migrate --workspace-lock-mode {asked}`"
    )]
    Disagree {
        /// What this instance was told.
        asked: &'static str,
        /// What stands in the database.
        agreed: String,
    },
    /// Somebody uses the database.
    #[error("an instance of the service is running: stop all of them to change the workspace lock mode")]
    InUse,
    /// The lock of the instances could not be taken.
    #[error("cannot take the lock of the running instances")]
    Lock(#[source] AcquireError),
    /// A name or a bound is wrong.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The setting could not be read or written.
    #[error("cannot read or write the setting {SETTING}")]
    Setting(#[from] TransactionError<diesel::result::Error>),
}

/// What was found in the database: the mode that it is used with.
#[derive(QueryableByName)]
struct Agreed {
    #[diesel(sql_type = Text)]
    value: String,
}

fn request(mode: LockMode, instance: &str) -> Result<LockRequest, Invalid> {
    let name = LockName::new(["leasehold", "server", "instances"])?;
    let holder = Holder::new("leasehold", "serve").with_instance(instance);
    Ok(LockRequest::new(name, holder)
        .with_mode(mode)
        .with_ttl(Duration::from_secs(30))
        .with_max_hold(MAX_HOLD))
}

/// Tells that this instance lives, until the guard is released or lost. `None` behind a pooler that gives each
/// transaction another session: there, nobody can be told.
///
/// # Errors
/// [`ModeError::Lock`].
pub async fn enter(db: &Database, instance: &str) -> Result<Option<LockGuard>, ModeError> {
    if db.findings().pooled {
        tracing::warn!(
            "behind a transaction pooler `leasehold migrate --workspace-lock-mode` cannot see that this instance lives"
        );
        return Ok(None);
    }
    let request = request(LockMode::Shared, instance)?;
    db.session_locks()
        .acquire(&request, WAIT)
        .await
        .map(Some)
        .map_err(ModeError::Lock)
}

/// Agrees with the other instances on the kind of lock: the first one decides.
///
/// # Errors
/// [`ModeError::Disagree`] and [`ModeError::Setting`].
pub async fn agree(db: &Database, mode: WorkspaceLockMode) -> Result<(), ModeError> {
    let asked = mode.as_str();
    let agreed = db
        .transaction(async |conn| -> QueryResult<String> {
            diesel::sql_query(
                "INSERT INTO leasehold.settings (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            )
            .bind::<Text, _>(SETTING)
            .bind::<Text, _>(asked)
            .execute(conn)
            .await?;
            let find = diesel::sql_query("SELECT value FROM leasehold.settings WHERE name = $1");
            let Agreed { value } = Prepared(find.bind::<Text, _>(SETTING)).one(conn).await?;
            Ok(value)
        })
        .await?;
    if agreed == asked {
        Ok(())
    } else {
        Err(ModeError::Disagree { asked, agreed })
    }
}

/// Changes the kind of lock, while no instance lives.
///
/// # Errors
/// [`ModeError::InUse`] when one does, [`ModeError::Lock`] and [`ModeError::Setting`].
pub async fn change(db: &Database, mode: WorkspaceLockMode, instance: &str) -> Result<(), ModeError> {
    let locks = db.session_locks();
    let guard = match locks.try_acquire(&request(LockMode::Exclusive, instance)?).await {
        Ok(guard) => guard,
        Err(AcquireError::Contended(_)) => return Err(ModeError::InUse),
        Err(error) => return Err(ModeError::Lock(error)),
    };
    let changed = db.transaction(async |conn| -> QueryResult<()> {
        diesel::sql_query(
            "INSERT INTO leasehold.settings (name, value) VALUES ($1, $2)
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )
        .bind::<Text, _>(SETTING)
        .bind::<Text, _>(mode.as_str())
        .execute(conn)
        .await?;
        Ok(())
    });
    changed.await?;
    if let Err(error) = locks.release(guard).await {
        tracing::warn!(%error, "the lock of the instances ends with its session");
    }
    Ok(())
}
