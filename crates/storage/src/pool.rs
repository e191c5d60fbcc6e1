//! [`Pool`]: connections for statements that end, each refused by the pool until it is proven clean.
//!
//! A future that is dropped in the middle of a statement leaves the statement running on the server, and neither
//! bb8 nor diesel-async notices: the connection would go back with whatever the statement then takes. So every
//! connection is tainted from checkout on, and only the end of the work clears it. A tainted connection is
//! closed, and the end of its session ends all that it had.

use std::fmt;
use std::time::Duration;

use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::PoolableConnection;
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, timeout_at};

use crate::connect::ConnectOptions;
use crate::error::StorageError;
use crate::incarnation::{self, Incarnation, IncarnationRow};
use crate::statement::Prepared;

/// How long a caller waits for a connection before it is told that the database is not available.
const CHECKOUT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a statement of our own may take that nobody gave another time. A server that is stopped, or keeps the
/// statement waiting for somebody else's lock, is not waited for any longer.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);

/// A pool of connections to one database. Clones share it.
#[derive(Clone)]
pub struct Pool {
    inner: bb8::Pool<Manager>,
}

/// How many connections a [`Pool`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolState {
    /// Connections that are open, in use or not.
    pub open: u32,
    /// Connections that are not in use.
    pub idle: u32,
}

impl Pool {
    /// A pool of at most `size` connections; none is opened yet.
    pub(crate) fn new(options: ConnectOptions, size: u32) -> Self {
        let inner = bb8::Pool::builder()
            .max_size(size)
            // `is_valid` asks the client, not the server: no round trip.
            .test_on_check_out(true)
            .connection_timeout(CHECKOUT_TIMEOUT)
            .error_sink(Box::new(LogErrors))
            .build_unchecked(Manager { options });
        Self { inner }
    }

    /// Runs statements on one connection.
    ///
    /// The connection goes back to the pool when `work` has ended, whether well or not; `work` must not give up
    /// on a statement of its own (with a timeout, say) and go on.
    ///
    /// # Errors
    /// What `work` answers, or that no connection could be had.
    ///
    /// # Cancel safety
    /// The connection is closed: what the server was doing for it ends there.
    pub(crate) async fn run<T, E, W>(&self, work: W) -> Result<T, E>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
        E: From<StorageError>,
    {
        let mut checkout = self.checkout().await?;
        let result = work(checkout.conn()).await;
        checkout.settle();
        result
    }

    /// As [`run`](Self::run), for statements of our own: they may take [`ANSWER`].
    pub(crate) async fn ask<T, E, W>(&self, work: W) -> Result<T, E>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
        E: From<StorageError>,
    {
        self.ask_until(Instant::now() + ANSWER, work).await
    }

    /// As [`ask`](Self::ask), until another moment. Then the connection is closed, and with it the server gives up as
    /// well; what was sent may have had its effect.
    pub(crate) async fn ask_until<T, E, W>(&self, until: Instant, work: W) -> Result<T, E>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
        E: From<StorageError>,
    {
        let start = Instant::now();
        let checkout = timeout_at(until, self.checkout()).await;
        let mut checkout = checkout.unwrap_or(Err(StorageError::NoConnection))?;
        match timeout_at(until, work(checkout.conn())).await {
            Ok(result) => {
                checkout.settle();
                result
            }
            Err(_) => Err(StorageError::NoAnswer(start.elapsed()).into()),
        }
    }

    /// Takes a connection that is closed when it is dropped, unless [`Checkout::settle`] is called.
    pub(crate) async fn checkout(&self) -> Result<Checkout, StorageError> {
        let start = tokio::time::Instant::now();
        let result = self.inner.get_owned().await;
        metrics::histogram!("leasehold_pool_wait_seconds").record(start.elapsed());
        let mut conn = result.map_err(|error| match error {
            bb8::RunError::User(error) => error,
            bb8::RunError::TimedOut => {
                metrics::counter!("leasehold_pool_timeouts_total").increment(1);
                StorageError::NoConnection
            }
        })?;
        conn.tainted = true;
        Ok(Checkout(Loan::Pooled(conn)))
    }

    /// A connection that is none of the pool's, for what must wait: it is closed when it is dropped.
    pub(crate) async fn own(&self) -> Result<Checkout, StorageError> {
        Ok(Checkout(Loan::Own(self.inner.dedicated_connection().await?)))
    }

    /// How many connections there are now.
    pub fn state(&self) -> PoolState {
        let state = self.inner.state();
        PoolState {
            open: state.connections,
            idle: state.idle_connections,
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

/// A connection on loan.
pub(crate) struct Checkout(Loan);

enum Loan {
    Pooled(bb8::PooledConnection<'static, Manager>),
    Own(Pooled),
}

impl Checkout {
    fn pooled(&mut self) -> &mut Pooled {
        match &mut self.0 {
            Loan::Pooled(conn) => conn,
            Loan::Own(conn) => conn,
        }
    }

    pub(crate) fn conn(&mut self) -> &mut AsyncPgConnection {
        &mut self.pooled().conn
    }

    /// Whether the connection is known to have ended. Asks the driver, not the server.
    pub(crate) fn is_broken(&mut self) -> bool {
        // The driver hands on its end like a notification; diesel-async's own answer is "broken" for every
        // connection with an open transaction.
        let mut ends = std::pin::pin!(self.conn().notifications_stream());
        matches!(ends.next().now_or_never(), Some(None | Some(Err(_))))
    }

    /// The life of the server that the connection was made in.
    pub(crate) fn incarnation(&mut self) -> Option<Incarnation> {
        self.pooled().incarnation
    }

    /// Says that no statement is under way, so that the connection may serve others.
    pub(crate) fn settle(mut self) {
        self.pooled().tainted = false;
    }
}

/// Makes connections for bb8 and says which it may keep.
struct Manager {
    options: ConnectOptions,
}

/// A connection and whether it may still be doing something.
struct Pooled {
    conn: AsyncPgConnection,
    tainted: bool,
    incarnation: Option<Incarnation>,
}

impl bb8::ManageConnection for Manager {
    type Connection = Pooled;
    type Error = StorageError;

    async fn connect(&self) -> Result<Pooled, StorageError> {
        let (client, driver) = self.options.open().await?;
        // Unlike `try_from(client)` this closes the socket as soon as the connection is dropped.
        let mut conn = AsyncPgConnection::try_from_client_and_connection(client, driver).await?;
        let ask = diesel::sql_query(format!("SELECT {}", incarnation::COLUMN));
        let row: IncarnationRow = Prepared(ask).one(&mut conn).await?;
        Ok(Pooled {
            conn,
            tainted: false,
            incarnation: row.get(),
        })
    }

    async fn is_valid(&self, pooled: &mut Pooled) -> Result<(), StorageError> {
        if self.has_broken(pooled) {
            Err(StorageError::Ended)
        } else {
            Ok(())
        }
    }

    /// True closes the connection. An open transaction, and a socket that has ended, break it as well.
    fn has_broken(&self, pooled: &mut Pooled) -> bool {
        if pooled.tainted {
            metrics::counter!("leasehold_tainted_connections_closed_total").increment(1);
        }
        pooled.tainted || PoolableConnection::is_broken(&mut pooled.conn)
    }
}

#[derive(Clone, Copy, Debug)]
struct LogErrors;

impl bb8::ErrorSink<StorageError> for LogErrors {
    fn sink(&self, error: StorageError) {
        let told = crate::error::chain(&error);
        match error {
            StorageError::Ended => tracing::debug!(error = told, "another connection is made"),
            _ => tracing::warn!(error = told, "cannot connect to the database"),
        }
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<StorageError>> {
        Box::new(*self)
    }
}
