//! [`ConnectOptions`]: how this process reaches Postgres, and what every connection has in common.

use std::fmt;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::{Client, Config, Connection, SimpleQueryMessage, SimpleQueryRow, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::StorageError;
use crate::tls::{self, TlsMode};

/// How long a TCP connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all of it may take, on whichever of several hosts: a server that accepts and then says nothing would
/// otherwise be waited for without end.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long sent data may stay unacknowledged. Keepalives alone do not notice a peer that vanished while data
/// was under way.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(8);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_RETRIES: u32 = 3;

/// A server looks for a vanished client only while it reads or writes, unless it is told to look while it waits
/// for a lock as well. Some platforms cannot: the start says so (see `startup`), and sessions do without.
/// <https://www.postgresql.org/docs/current/runtime-config-connection.html#GUC-CLIENT-CONNECTION-CHECK-INTERVAL>
const CHECK_CLIENT: &str = "SET client_connection_check_interval = '250ms'";
/// The gates and fences are right at READ COMMITTED only.
const ISOLATION: &str = "SET default_transaction_isolation = 'read committed'";

/// Where the database is and how to connect to it.
#[derive(Clone)]
pub struct ConnectOptions {
    config: Config,
    connector: MakeRustlsConnect,
}

pub(crate) type Driver =
    Connection<Socket, <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<Socket>>::Stream>;

/// The connection string or the TLS set-up cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectOptionsError {
    /// The text is not a connection string.
    #[error("not a Postgres connection string")]
    Url(#[source] tokio_postgres::Error),
    /// The TLS set-up cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

impl ConnectOptions {
    /// Reads a connection string (a `postgres://` URL or `key=value` pairs).
    ///
    /// `tls` of `None` means the default: none over a Unix socket and to loopback addresses, else encrypted with
    /// the certificate and the host name verified. A timeout or keepalive in the string wins over the defaults
    /// of this crate; note that tokio-postgres reads `tcp_user_timeout` in seconds. Of several hosts the first one is
    /// taken that lets this user write.
    ///
    /// # Errors
    /// [`ConnectOptionsError`] when the string is malformed or no root certificate can be loaded.
    pub fn parse(url: &str, tls: Option<TlsMode>) -> Result<Self, ConnectOptionsError> {
        let (url, settings) = tls::split_tls_settings(url)?;
        let mut config: Config = url.parse().map_err(ConnectOptionsError::Url)?;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        // The library's own default, two hours, is as good as none.
        if config.get_keepalives_idle() >= Duration::from_secs(2 * 60 * 60) {
            config.keepalives_idle(KEEPALIVE_IDLE);
        }
        if config.get_keepalives_interval().is_none() {
            config.keepalives_interval(KEEPALIVE_INTERVAL);
        }
        if config.get_keepalives_retries().is_none() {
            config.keepalives_retries(KEEPALIVE_RETRIES);
        }
        // A standby, or a server that lets nobody write for a while, may be met at every connection. What was locked there
        // would exclude nobody, and a session keeps what it began with.
        if config.get_target_session_attrs() == TargetSessionAttrs::Any {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        if config.get_application_name().is_none() {
            config.application_name("leasehold");
        }
        let roots = settings.roots.as_ref();
        let mode = tls.or(settings.mode).unwrap_or_else(|| match roots {
            Some(_) => TlsMode::VerifyFull,
            None => default_tls(&config),
        });
        config.ssl_mode(match mode {
            TlsMode::Disable => SslMode::Disable,
            TlsMode::Require | TlsMode::VerifyFull => SslMode::Require,
        });
        Ok(Self {
            connector: tls::connector(mode, roots)?,
            config,
        })
    }

    /// The same options under another `application_name`, at most 63 bytes.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        self.config.application_name(name);
        self
    }

    /// The name that sessions show in `pg_stat_activity`.
    pub fn application_name(&self) -> &str {
        self.config.get_application_name().unwrap_or("leasehold")
    }

    /// The same options, for whatever server is there.
    pub(crate) fn also_read_only(mut self) -> Self {
        self.config.target_session_attrs(TargetSessionAttrs::Any);
        self
    }

    /// Opens a connection and prepares its session. The driver must be polled for the client to work, which this
    /// does while it prepares.
    pub(crate) async fn open(&self) -> Result<(Client, Driver), StorageError> {
        let opening = tokio::time::timeout(OPEN_TIMEOUT, async {
            let (client, mut driver) = self.config.connect(self.connector.clone()).await?;
            {
                let mut setup = std::pin::pin!(set_up(&client));
                tokio::select! {
                    done = &mut setup => done?,
                    ended = &mut driver => {
                        ended?;
                        // The server hung up; the statement knows why.
                        setup.await?;
                    }
                }
            }
            Ok((client, driver))
        });
        let opened = opening.await;
        opened.unwrap_or(Err(StorageError::ConnectTimedOut(OPEN_TIMEOUT)))
    }

    /// As [`open`](Self::open), with the driver in a task of its own, which ends when the client is dropped.
    pub(crate) async fn open_spawned(&self) -> Result<Client, StorageError> {
        let (client, driver) = self.open().await?;
        // An error of the driver is told to the statement that met it.
        tokio::spawn(async move { driver.await.ok() });
        Ok(client)
    }
}

/// Both statements travel together.
async fn set_up(client: &Client) -> Result<(), tokio_postgres::Error> {
    let (check, isolation) = tokio::join!(
        client.batch_execute(CHECK_CLIENT),
        client.batch_execute(ISOLATION)
    );
    match check {
        Err(error) if error.as_db_error().is_none() => Err(error),
        _ => isolation,
    }
}

/// The rows of one statement in the simple protocol, which every pooler passes on. NULL is the empty text.
pub(crate) async fn simple_rows(
    client: &Client,
    sql: &str,
) -> Result<Vec<Vec<String>>, tokio_postgres::Error> {
    let messages = client.simple_query(sql).await?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let texts = |row: SimpleQueryRow| {
        (0..row.len())
            .map(|index| row.get(index).unwrap_or_default().to_owned())
            .collect()
    };
    Ok(rows.map(texts).collect())
}

fn default_tls(config: &Config) -> TlsMode {
    let local = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost"
                || name
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|address| address.is_loopback())
        }
    };
    let addresses_are_local = config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback);
    if config.get_hosts().iter().all(local) && addresses_are_local {
        TlsMode::Disable
    } else {
        TlsMode::VerifyFull
    }
}

/// Hosts, user and password stay out: this may end in a log.
impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("application_name", &self.application_name())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_on_this_machine_goes_unprotected_by_default() {
        let local = [
            "postgres://localhost/db",
            "postgres://127.0.0.1/db",
            "postgres://[::1]/db",
            "postgres:///db?host=/run/postgresql",
            "host=localhost,127.0.0.1",
        ];
        let remote = [
            "postgres://db.example.com/db",
            "postgres://10.0.0.1/db",
            "hostaddr=10.0.0.1",
            "host=localhost hostaddr=10.0.0.1",
            "host=localhost,db.example.com",
        ];
        for text in local {
            assert_eq!(default_tls(&text.parse().unwrap()), TlsMode::Disable, "{text}");
        }
        for text in remote {
            assert_eq!(default_tls(&text.parse().unwrap()), TlsMode::VerifyFull, "{text}");
        }
    }
}
