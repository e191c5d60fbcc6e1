//! What an operator can set: the same names as environment variables and as flags.
//!
//! A value that cannot be right stops the start. The message names the variable, the value and what is allowed.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use leasehold_storage::{ConnectOptions, TlsMode};
use tracing_subscriber::EnvFilter;

/// Where the database is.
#[derive(Args, Clone, Debug)]
pub struct DatabaseConfig {
    /// A Postgres connection string. Without it a private Postgres is started in the folder `.leasehold` of the
    /// project.
    #[arg(long, env, hide_env_values = true)]
    pub database_url: Option<String>,

    /// How connections are protected [default: disable for loopback and sockets, else verify-full].
    #[arg(long, env, value_enum)]
    pub database_tls: Option<DatabaseTls>,
}

/// How the service runs.
#[derive(Args, Clone, Debug)]
pub struct ServeConfig {
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseConfig,

    /// Bring the schema up to date first. A private Postgres always is.
    #[arg(long)]
    pub migrate: bool,

    /// The address to listen on.
    #[arg(long, env, default_value = "127.0.0.1:8080", value_parser = socket_address)]
    pub listen_addr: SocketAddr,

    /// What a workspace lock is: a lease in the workspace's row, or a transaction's advisory lock.
    #[arg(long, env, value_enum, default_value_t)]
    pub workspace_lock_mode: WorkspaceLockMode,

    /// The longest that an ordinary write may hold its workspace, in milliseconds.
    #[arg(long, env, default_value = "60000", value_parser = TTL)]
    pub workspace_lock_default_ttl_ms: Millis,

    /// The longest that a batch may hold its workspace, in milliseconds.
    #[arg(long, env, default_value = "1200000", value_parser = TTL)]
    pub workspace_lock_batch_ttl_ms: Millis,

    /// The slice of a workspace lock that is renewed by heartbeat, in milliseconds: how long a workspace stays
    /// locked after a crash.
    #[arg(long, env, default_value = "10000", value_parser = TTL)]
    pub workspace_lock_lease_ms: Millis,

    /// The longest that `Prefer: wait=<seconds>` can make a request wait for a lock, in milliseconds.
    #[arg(long, env, default_value = "30000", value_parser = Number::new("milliseconds", 0..=3_600_000).millis())]
    pub lock_max_wait_ms: Millis,

    /// How many requests of this process may wait for locks at once.
    #[arg(long, env, default_value = "10000", value_parser = Number::new("requests", 0..=1_000_000).count())]
    pub lock_max_waiters: usize,

    /// The same for each tenant.
    #[arg(long, env, default_value = "1000", value_parser = Number::new("requests", 0..=1_000_000).count())]
    pub lock_max_waiters_per_tenant: usize,

    /// After how many days without use the row of a lock name is removed.
    #[arg(long, env, default_value = "7", value_parser = Number::new("days", 1..=3_650).count())]
    pub lease_retention_days: usize,

    /// How long the removal of a tenant's data waits for writes that are under way, in seconds.
    #[arg(long, env, default_value = "5", value_parser = Number::new("seconds", 1..=3_600).count())]
    pub tenant_purge_lock_timeout_seconds: usize,

    /// Whether events may be sent to addresses that are not of the open Internet: private ones, loopback.
    #[arg(long, env, default_value = "false", default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = yes_or_no)]
    pub webhook_allow_private: bool,

    /// The most connections in the pool.
    #[arg(long, env, default_value = "8", value_parser = Number::new("connections", 2..=500).count())]
    pub database_pool_size: usize,

    /// How long running requests may take to end after a signal to stop, in seconds.
    #[arg(long, env, default_value = "25", value_parser = Number::new("seconds", 0..=3_600).count())]
    pub shutdown_grace_seconds: usize,

    /// How to log.
    #[command(flatten)]
    pub log: LogConfig,
}

/// How to log.
#[derive(Args, Clone, Debug)]
pub struct LogConfig {
    /// The form of log lines, which go to standard error.
    #[arg(long, env, value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// Which log lines are written, such as `info` or `leasehold=debug,warn`.
    #[arg(long, env, default_value = "info", value_parser = log_filter)]
    pub rust_log: String,
}

impl DatabaseConfig {
    /// How to reach the database at `url`, which is the configured one or the private server's.
    ///
    /// # Errors
    /// What is wrong. The value is not repeated: it may hold a password.
    pub fn options(&self, url: &str) -> Result<ConnectOptions, String> {
        if url.trim().is_empty() {
            return Err(
                "DATABASE_URL is empty: set it to a Postgres connection string, such as \
                        postgres://user@host:5432/database, or unset it to use a private Postgres"
                    .to_owned(),
            );
        }
        ConnectOptions::parse(url, self.database_tls.map(TlsMode::from)).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!(
                "DATABASE_URL (its value is not shown, it may hold a password) or DATABASE_TLS cannot be used: \
                 {error}{cause}; allowed are connection strings such as postgres://user@host:5432/database"
            )
        })
    }
}

/// What a workspace lock is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum WorkspaceLockMode {
    /// A lease in the workspace's row, renewed by heartbeat, fenced at the commit.
    #[default]
    Lease,
    /// An advisory lock of the write's own transaction.
    Advisory,
}

impl WorkspaceLockMode {
    /// As it is written in the environment and in `leasehold.settings`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::Advisory => "advisory",
        }
    }
}

/// How connections to the database are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatabaseTls {
    /// Not at all.
    Disable,
    /// Encrypted; whoever answers is believed.
    Require,
    /// Encrypted, and the server proves its name.
    VerifyFull,
}

impl From<DatabaseTls> for TlsMode {
    fn from(tls: DatabaseTls) -> Self {
        match tls {
            DatabaseTls::Disable => Self::Disable,
            DatabaseTls::Require => Self::Require,
            DatabaseTls::VerifyFull => Self::VerifyFull,
        }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one object a line.
    Json,
}

/// A duration that was given in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub Duration);

impl ServeConfig {
    /// Checks what no value can tell alone.
    ///
    /// # Errors
    /// A sentence that names both variables and their values.
    pub fn check(&self) -> Result<(), String> {
        let order = [
            ("WORKSPACE_LOCK_LEASE_MS", self.workspace_lock_lease_ms),
            (
                "WORKSPACE_LOCK_DEFAULT_TTL_MS",
                self.workspace_lock_default_ttl_ms,
            ),
            ("WORKSPACE_LOCK_BATCH_TTL_MS", self.workspace_lock_batch_ttl_ms),
        ];
        for [(smaller, low), (larger, high)] in [[order[0], order[1]], [order[1], order[2]]] {
            if low > high {
                let (low, high) = (low.0.as_millis(), high.0.as_millis());
                return Err(format!(
                    "{smaller} is {low} and must be at most {larger}, which is {high}"
                ));
            }
        }
        Ok(())
    }

    /// How long the row of a lock name stays without use.
    pub fn lease_retention(&self) -> Duration {
        Duration::from_secs(self.lease_retention_days as u64 * 24 * 60 * 60)
    }

    /// How long the removal of a tenant's data waits for writes that are under way.
    pub fn tenant_purge_lock_timeout(&self) -> Duration {
        Duration::from_secs(self.tenant_purge_lock_timeout_seconds as u64)
    }

    /// How long running requests may take to end.
    pub fn shutdown_grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_seconds as u64)
    }
}

/// A slice or a bound of a lock: what the locks themselves allow, 100 ms to 24 h.
const TTL: fn(&str) -> Result<Millis, String> = |text| {
    Number::new("milliseconds", 100..=86_400_000)
        .read(text)
        .map(|ms| Millis(Duration::from_millis(ms)))
};

/// Reads whole numbers of something, within a range.
#[derive(Clone)]
struct Number {
    unit: &'static str,
    allowed: RangeInclusive<u64>,
}

impl Number {
    fn new(unit: &'static str, allowed: RangeInclusive<u64>) -> Self {
        Self { unit, allowed }
    }

    fn read(&self, text: &str) -> Result<u64, String> {
        let number = text.parse().ok().filter(|number| self.allowed.contains(number));
        number.ok_or_else(|| {
            let (unit, low, high) = (self.unit, self.allowed.start(), self.allowed.end());
            format!("must be a whole number of {unit} from {low} to {high}")
        })
    }

    fn millis(self) -> impl Fn(&str) -> Result<Millis, String> + Clone {
        move |text| self.read(text).map(|ms| Millis(Duration::from_millis(ms)))
    }

    fn count(self) -> impl Fn(&str) -> Result<usize, String> + Clone {
        // Every range above fits.
        move |text| {
            self.read(text)
                .map(|number| usize::try_from(number).unwrap_or(usize::MAX))
        }
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "must be true or false".to_owned())
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an IP address and a port, such as 127.0.0.1:8080 or [::]:8080".to_owned())
}

fn log_filter(text: &str) -> Result<String, String> {
    let said = "must be levels for targets, such as `info` or `leasehold_storage=debug,warn`";
    EnvFilter::try_new(text)
        .map(|_| text.to_owned())
        .map_err(|error| format!("{said}: {error}"))
}
