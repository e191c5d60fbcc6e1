//! What must be true of the server, looked at once at the start.
//!
//! What would break a promise is refused; what is unwise, or makes a promise weaker, is a warning. Both say what
//! to do. Everything is asked in the simple protocol, which every pooler passes on.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::Client;

use crate::connect::{ConnectOptions, simple_rows};
use crate::migrate::{self, MigrateError};

/// The first version with `client_connection_check_interval`.
const OLDEST: u32 = 14;
/// How long all of it may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// What a process opens besides its pool: two lock sessions, and one connection each to renew leases, to give
/// back what was dropped, to listen, and to tell what it holds.
const BESIDES_THE_POOL: u32 = 6;

/// What was found at the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Findings {
    /// A pooler in between gives each transaction another session of the server. Leases and locks of transaction
    /// scope work, waiters poll instead of listening, and session locks are refused.
    pub pooled: bool,
    /// What is unwise, each with what to do about it. Logged once, at the start.
    pub warnings: Vec<String>,
    /// How many session locks this process may hold: half of the server's lock table, which everybody shares.
    pub lock_budget: u32,
}

/// The server is not one that locks can rely on.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// The database cannot be reached, or does not let this user in. Trying again later may help.
    #[error("cannot connect to the database")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A question about the server was not answered.
    #[error("cannot ask the server for its settings")]
    Ask(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server did not answer in time. Trying again later may help.
    #[error("the database did not answer within {0:?}")]
    TimedOut(Duration),
    /// The server is a standby, where locks exclude nobody on the primary.
    #[error("the server is in recovery (a standby): point the connection string at the primary")]
    InRecovery,
    /// Nobody may write, or this user may not.
    #[error(
        "the database lets this user read only: see default_transaction_read_only of the server, the database and the \
         role, and whether the server's disk is full"
    )]
    ReadOnly,
    /// The server is too old to notice that a waiting client is gone.
    #[error("the server is PostgreSQL {0}: version {OLDEST} or later is needed")]
    TooOld(String),
    /// Names are UTF-8, and so must the database be, or two names could become one.
    #[error("the database is encoded in {0}: create one with ENCODING 'UTF8'")]
    Encoding(String),
    /// Transactions do not run at READ COMMITTED although every session asks for it.
    #[error(
        "transactions start at isolation level {0:?}, and a pooler gives them to sessions where this cannot be \
         changed: ALTER DATABASE … SET default_transaction_isolation = 'read committed'"
    )]
    Isolation(String),
    /// A crash of the server would empty the table of leases, and two holders could be the result.
    #[error("the table leasehold.leases is not logged: ALTER TABLE leasehold.leases SET LOGGED")]
    UnloggedLeases,
    /// The schema is of a newer version of this program.
    #[error(transparent)]
    SchemaTooNew(#[from] migrate::TooNew),
    /// The schema could not be looked at.
    #[error("cannot look at the schema")]
    Schema(#[source] MigrateError),
    /// The background thread could not be started.
    #[error("cannot start the background thread")]
    Thread(#[source] std::io::Error),
}

impl From<tokio_postgres::Error> for StartupError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Ask(error.into())
    }
}

/// Looks at the server through two connections of its own, which end with the call, and logs the warnings.
///
/// # Cancel safety
/// Nothing is left behind.
pub(crate) async fn check(options: &ConnectOptions, pool_size: u32) -> Result<Findings, StartupError> {
    let looking = tokio::time::timeout(TIMEOUT, look(options, pool_size));
    let findings = looking.await.map_err(|_| StartupError::TimedOut(TIMEOUT))??;
    for warning in &findings.warnings {
        tracing::warn!("{warning}");
    }
    Ok(findings)
}

async fn look(options: &ConnectOptions, pool_size: u32) -> Result<Findings, StartupError> {
    let connect = || async {
        match options.open_spawned().await {
            Ok(client) => Ok(client),
            Err(error) => Err(read_only(options)
                .await
                .unwrap_or_else(|| StartupError::Connect(error.into()))),
        }
    };
    let first = connect().await?;
    let version = scalar(&first, "SHOW server_version").await?;
    if major(&version).is_some_and(|major| major < OLDEST) {
        return Err(StartupError::TooOld(version));
    }
    let pooled = is_pooled(&first, &connect().await?).await?;
    let settings = Settings::read(&first, pooled).await?;
    settings.refuse()?;
    if scalar(&first, LEASES_PERSISTENCE).await? == "u" {
        return Err(StartupError::UnloggedLeases);
    }
    let mut warnings = settings.warnings(pool_size);
    let schema = migrate::State::read(&first).await.map_err(StartupError::Schema)?;
    schema.accept(&[migrate::STORAGE])?;
    let missing = schema.missing(&migrate::STORAGE);
    if !missing.is_empty() {
        warnings.push(format!(
            "the schema is not current, {} missing: run the migrations (`leasehold migrate`)",
            missing.join(", ")
        ));
    }
    if pooled {
        warnings.push(POOLED.to_owned());
    }
    Ok(Findings {
        pooled,
        warnings,
        lock_budget: settings.lock_budget(),
    })
}

/// Why no server lets us write, where one lets us in.
async fn read_only(options: &ConnectOptions) -> Option<StartupError> {
    let client = options.clone().also_read_only().open_spawned().await.ok()?;
    let recovers = scalar(&client, "SELECT pg_is_in_recovery()").await.ok()?;
    Some(if recovers == "t" {
        StartupError::InRecovery
    } else {
        StartupError::ReadOnly
    })
}

const POOLED: &str = "a pooler in between gives each transaction another session: session locks are refused and \
    waiting for leases polls instead of listening. The pooler must know prepared statements (pgbouncer 1.21 or \
    later with max_prepared_statements above 0). For everything to work, point the connection string at the \
    server itself or at a pool in session mode";

const LEASES_PERSISTENCE: &str = "SELECT c.relpersistence FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'leasehold' AND c.relname = 'leases'";

/// Whether the two connections do not have a session each for themselves.
///
/// Each in turn keeps a transaction open, which pins its session, while the other asks which one it has. It takes
/// no lock to find out: behind a pooler, that one would stay.
async fn is_pooled(first: &Client, second: &Client) -> Result<bool, StartupError> {
    let (of_first, of_second) = (backend(first).await?, backend(second).await?);
    if of_first == of_second {
        return Ok(true);
    }
    for (pinned, of_pinned, other, of_other) in [
        (second, &of_second, first, &of_first),
        (first, &of_first, second, &of_second),
    ] {
        pinned.batch_execute("BEGIN").await?;
        let now_of_pinned = backend(pinned).await?;
        let now_of_other = backend(other).await?;
        pinned.batch_execute("COMMIT").await?;
        if now_of_pinned != *of_pinned || now_of_other != *of_other {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn backend(client: &Client) -> Result<String, StartupError> {
    scalar(client, "SELECT pg_backend_pid()").await
}

/// The first value of the first row; empty when there is none.
async fn scalar(client: &Client, sql: &str) -> Result<String, StartupError> {
    let rows = simple_rows(client, sql).await?;
    Ok(rows.into_iter().flatten().next().unwrap_or_default())
}

/// `15.18 (Debian 15.18-0+deb12u1)`, `18beta1`, `9.6.24`.
fn major(version: &str) -> Option<u32> {
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Like settings, where there are any that count. Who may do everything has none.
const CONNECTION_LIMITS: &str = "\
SELECT 'rolconnlimit', rolconnlimit::text FROM pg_roles
WHERE rolname = session_user AND rolconnlimit >= 0 AND NOT rolsuper
UNION ALL
SELECT 'datconnlimit', datconnlimit::text FROM pg_database
WHERE datname = current_database() AND datconnlimit >= 0
  AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)";

/// Server settings by name, times in milliseconds.
struct Settings(BTreeMap<String, String>);

impl Settings {
    async fn read(client: &Client, pooled: bool) -> Result<Self, StartupError> {
        // What a session was given when it began, before it set anything itself: behind a pooler a statement may
        // run in any session.
        let value = if pooled { "reset_val" } else { "setting" };
        let ask = format!("SELECT name, {value} FROM pg_settings UNION ALL {CONNECTION_LIMITS}");
        let rows = simple_rows(client, &ask).await?;
        let pairs = rows
            .into_iter()
            .filter_map(|row| <[String; 2]>::try_from(row).ok());
        Ok(Self(pairs.map(|[name, value]| (name, value)).collect()))
    }

    /// Empty for a setting that the server does not have.
    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> u32 {
        self.text(name).parse().unwrap_or(0)
    }

    fn refuse(&self) -> Result<(), StartupError> {
        match self.text("server_encoding") {
            "UTF8" => {}
            other => return Err(StartupError::Encoding(other.to_owned())),
        }
        match self.text("default_transaction_isolation") {
            "read committed" => Ok(()),
            other => Err(StartupError::Isolation(other.to_owned())),
        }
    }

    fn warnings(&self, pool_size: u32) -> Vec<String> {
        let durability = [
            (
                "synchronous_commit",
                "a crash of the server forgets the last grants, and two holders are possible; set it to on",
            ),
            (
                "fsync",
                "a crash of the machine can ruin the whole database, leases included; set it to on",
            ),
            (
                "full_page_writes",
                "a crash of the machine can ruin pages of the database, leases included; set it to on",
            ),
        ];
        let off = durability
            .into_iter()
            .filter(|(name, _)| self.text(name) == "off")
            .map(|(name, so)| format!("{name} is off: {so}"));
        let limits = [
            (
                "statement_timeout",
                "statements of guarded writes that take longer are ended, and the write with them",
            ),
            (
                "lock_timeout",
                "statements of guarded writes that wait longer for a row are ended, and the write with them",
            ),
            (
                "idle_in_transaction_session_timeout",
                "a guarded write that does something else for longer between two statements loses its connection \
                 and with it the write and its transaction-scoped locks",
            ),
            (
                "transaction_timeout",
                "a guarded write that takes longer loses its connection, and the write with it",
            ),
            (
                "idle_session_timeout",
                "connections that rest for longer are closed: the pool opens new ones, and waiters miss \
                 notifications until they listen again",
            ),
        ];
        let limited = limits
            .into_iter()
            .filter(|(name, _)| self.number(name) > 0)
            .map(|(name, so)| {
                format!(
                    "{name} is {} ms: {so}; to be without, ALTER ROLE … SET {name} = 0",
                    self.number(name)
                )
            });
        let mut warnings: Vec<String> = off.chain(limited).collect();
        if self.number("client_connection_check_interval") == 0 {
            warnings.push(
                "client_connection_check_interval is 0 and sessions cannot set it: when a client disappears while \
                 the server works for it, its locks stay until that statement ends"
                    .to_owned(),
            );
        }
        let reserved = self.number("superuser_reserved_connections") + self.number("reserved_connections");
        let available = self.number("max_connections").saturating_sub(reserved);
        let needed = pool_size.saturating_add(BESIDES_THE_POOL);
        let limits = [
            ("max_connections", Some(available)),
            (
                "the CONNECTION LIMIT of the role",
                self.text("rolconnlimit").parse().ok(),
            ),
            (
                "the CONNECTION LIMIT of the database",
                self.text("datconnlimit").parse().ok(),
            ),
        ];
        for (limit, available) in limits {
            if let Some(available) = available.filter(|available| needed > *available) {
                warnings.push(format!(
                    "this process may open {needed} connections, {pool_size} of them for its pool, but {limit} lets in \
                     {available} in all: make the pool smaller or raise it"
                ));
            }
        }
        warnings
    }

    fn lock_budget(&self) -> u32 {
        let sessions = self
            .number("max_connections")
            .saturating_add(self.number("max_prepared_transactions"));
        self.number("max_locks_per_transaction").saturating_mul(sessions) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server as it comes, with these settings changed.
    fn settings(changed: &[(&str, &str)]) -> Settings {
        let usual = [
            ("server_encoding", "UTF8"),
            ("default_transaction_isolation", "read committed"),
            ("client_connection_check_interval", "250"),
            ("max_connections", "100"),
            ("max_prepared_transactions", "0"),
            ("max_locks_per_transaction", "64"),
            ("superuser_reserved_connections", "3"),
        ];
        let all = usual.iter().chain(changed);
        Settings(
            all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    #[test]
    fn versions_are_read_however_they_are_written() {
        let versions = [
            ("15.18 (Debian 15.18-0+deb12u1)", 15),
            ("18beta1", 18),
            ("13.23", 13),
            ("9.6.24", 9),
        ];
        for (text, number) in versions {
            assert_eq!(major(text), Some(number), "{text}");
        }
        assert_eq!(major("whatever"), None);
    }

    #[test]
    fn a_usual_server_gives_no_warning() {
        assert_eq!(settings(&[]).warnings(91), [""; 0]);
        settings(&[]).refuse().unwrap();
    }

    /// No server on Linux refuses it, so that the others are told from here only.
    #[test]
    fn a_platform_without_the_check_of_clients_is_warned_about() {
        let warnings = settings(&[("client_connection_check_interval", "0")]).warnings(8);
        assert!(
            matches!(&warnings[..], [one] if one.contains("client_connection_check_interval")),
            "{warnings:?}"
        );
    }

    #[test]
    fn the_pool_is_compared_to_what_the_server_lets_in() {
        assert_eq!(settings(&[]).warnings(91).len(), 0);
        assert_eq!(settings(&[]).warnings(92).len(), 1);
        assert_eq!(settings(&[("reserved_connections", "1")]).warnings(91).len(), 1);
        assert_eq!(settings(&[]).warnings(u32::MAX).len(), 1);
    }

    #[test]
    fn the_lock_budget_is_half_of_the_lock_table() {
        assert_eq!(settings(&[]).lock_budget(), 3_200);
        assert_eq!(
            settings(&[("max_prepared_transactions", "20")]).lock_budget(),
            3_840
        );
    }
}
