//! [`HttpClient`]: sends a request to where a tenant wants it, and to nowhere that only the service could reach.
//!
//! The address is looked at where the connection is opened, after the name was resolved: what was looked at is what is
//! connected to, whatever the name leads to a moment later. Redirects are not followed, and no proxy is asked.

use std::error::Error;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
use tower::Service;

use crate::deliveries::target::is_public;

/// How long it may take to find a name's addresses and to connect to one of them.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a request may take in all.
const WHOLE: Duration = Duration::from_secs(15);
/// The most bytes of an answer that are read, and thrown away: behind them is the end of the request, and then the
/// connection can be used again.
const MAX_ANSWER: usize = 64 * 1024;
/// How long a connection may stay open for the next request.
const IDLE: Duration = Duration::from_secs(30);

/// What requests say of who sends them.
pub(crate) const USER_AGENT: &str = concat!("leasehold/", env!("CARGO_PKG_VERSION"));

/// Sends requests. Clones share their connections.
#[derive(Clone, Debug)]
pub(crate) struct HttpClient {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
    whole: Duration,
}

/// Why there is no answer. None of it says more of the network around the service than a stranger could find out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("the URL leads to no address that is public")]
    NotPublic,
    #[error("no answer within {0:?}")]
    TooLate(Duration),
    #[error("no answer: {0}")]
    Failed(String),
}

impl HttpClient {
    /// A client that may also connect to private addresses, or not.
    ///
    /// # Errors
    /// When the TLS library refuses its set-up.
    pub(crate) fn new(allow_private: bool) -> Result<Self, rustls::Error> {
        // Given explicitly: without, rustls panics as soon as another crate of the program turns on a second one.
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(system_roots())
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector { allow_private });
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(4)
            .build(connector);
        Ok(Self { client, whole: WHOLE })
    }

    /// Sends a request and answers the status that came back.
    ///
    /// # Errors
    /// [`SendError`]; the request may have arrived, unless it is [`SendError::NotPublic`].
    ///
    /// # Cancel safety
    /// The request may have arrived.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<StatusCode, SendError> {
        let sent = timeout(self.whole, async {
            let response = self.client.request(request).await?;
            let status = response.status();
            Ok((status, response))
        });
        let (status, response) = match sent.await {
            Ok(Ok(answered)) => answered,
            Ok(Err(error)) => return Err(told(&error)),
            Err(_) => return Err(SendError::TooLate(self.whole)),
        };
        finish(response).await;
        Ok(status)
    }
}

/// Reads what else there is, when it is little and comes at once. The status is what counts.
async fn finish<B>(response: Response<B>)
where
    B: axum::body::HttpBody<Data = Bytes, Error: Into<axum::BoxError>>,
{
    let rest = Limited::new(response.into_body(), MAX_ANSWER).collect();
    drop(timeout(Duration::from_secs(1), std::pin::pin!(rest)).await);
}

/// Without any, connections to `https` fail, each telling that the authority is unknown.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A system may well have a few that are too old to be understood.
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        tracing::warn!(
            "no root certificates were found on this system: webhooks with https cannot be reached"
        );
    }
    roots
}

/// The last cause says it best; those before it say who noticed.
fn told(error: &legacy::Error) -> SendError {
    let mut last: &dyn Error = error;
    loop {
        if last.is::<NotPublic>() {
            return SendError::NotPublic;
        }
        // An error of I/O that wraps another hides it from `source`.
        let wrapped = last
            .downcast_ref::<std::io::Error>()
            .and_then(|error| error.get_ref())
            .map(|inner| inner as &dyn Error);
        match wrapped.or_else(|| last.source()) {
            Some(cause) => last = cause,
            None => return SendError::Failed(last.to_string()),
        }
    }
}

/// Opens connections to where it may.
#[derive(Clone, Copy, Debug)]
struct Connector {
    allow_private: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("not a public address")]
struct NotPublic;

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = axum::BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let connect = async { connect(&find(&uri, allow_private).await?).await };
            let connected = timeout(CONNECT, connect)
                .await
                .unwrap_or_else(|_| Err(too_late()));
            connected.map(TokioIo::new)
        })
    }
}

fn too_late() -> axum::BoxError {
    format!("no connection within {} s", CONNECT.as_secs()).into()
}

/// The addresses that may be connected to.
async fn find(uri: &Uri, allow_private: bool) -> Result<Vec<SocketAddr>, axum::BoxError> {
    let host = uri.host().ok_or("the URL has no host")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    let found = lookup_host((host, uri.port_u16().unwrap_or(default))).await;
    // A name that is only known inside is not told from one that is not known at all.
    let found = found.map_err(|_| NotPublic)?;
    let may_connect = |address: &SocketAddr| allow_private || is_public(address.ip());
    Ok(found.filter(may_connect).collect())
}

/// To the first address that answers. One that is silent, as all of IPv6 is on many a machine, leaves the others their
/// share of the time.
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, axum::BoxError> {
    let until = Instant::now() + CONNECT;
    let mut failed: axum::BoxError = NotPublic.into();
    for (index, address) in addresses.iter().enumerate() {
        let left = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let share = until.saturating_duration_since(Instant::now()) / left;
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => failed = error.into(),
            Err(_) => failed = too_late(),
        }
    }
    Err(failed)
}

#[cfg(test)]
mod tests;
