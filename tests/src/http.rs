//! A thin HTTP/1.1 client: one connection for many requests or for one, which can be dropped at any moment.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{HeaderMap, Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::patience::in_time;
use crate::secrets;

/// Whom to ask, and as whom.
#[derive(Clone, Debug)]
pub struct Api {
    /// Where the service listens.
    pub address: SocketAddr,
    /// The key; none for a stranger.
    pub key: Option<String>,
}

/// A request.
#[derive(Clone, Debug)]
#[must_use = "nothing is sent until it is given to an `Api` or a `Connection`"]
pub struct Call {
    method: Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
    announced: Option<usize>,
}

/// An answer, all of it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// A connection that stays open between requests. Dropping it closes the socket at once.
#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
    api: Api,
}

/// `GET path`.
pub fn get(path: impl Into<String>) -> Call {
    Call::new(Method::GET, path)
}

/// `DELETE path`.
pub fn delete(path: impl Into<String>) -> Call {
    Call::new(Method::DELETE, path)
}

/// `PUT path` with a JSON body.
pub fn put(path: impl Into<String>, body: &Value) -> Call {
    Call::new(Method::PUT, path).json(body)
}

/// `POST path` with a JSON body.
pub fn post(path: impl Into<String>, body: &Value) -> Call {
    Call::new(Method::POST, path).json(body)
}

impl Call {
    /// A request without a body.
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            headers: Vec::new(),
            body: Bytes::new(),
            announced: None,
        }
    }

    /// `PUT path` with a body that claims to be JSON.
    pub fn put_text(path: impl Into<String>, body: &str) -> Self {
        Self::new(Method::PUT, path).body(body.to_owned())
    }

    /// With a JSON body.
    pub fn json(self, body: &Value) -> Self {
        self.body(body.to_string())
    }

    /// With a body that claims to be JSON.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self.header("content-type", "application/json")
    }

    /// For [`Api::send_only`]: says that the body is longer than it is.
    pub fn announcing(mut self, length: usize) -> Self {
        self.announced = Some(length);
        self
    }

    /// With a header more.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

impl Api {
    /// The same service, asked by somebody else.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: Some(key.to_owned()),
            ..self.clone()
        }
    }

    /// Asks on a connection of its own.
    pub async fn send(&self, call: Call) -> Answer {
        self.connect().await.send(call).await
    }

    /// As [`Api::send`]; `None` when no whole answer came.
    pub async fn try_send(&self, call: Call) -> Option<Answer> {
        let stream = TcpStream::connect(self.address).await.ok()?;
        self.on(stream).await?.try_send(call).await
    }

    /// Opens a connection.
    pub async fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).await.unwrap();
        self.on(stream).await.unwrap()
    }

    async fn on(&self, stream: TcpStream) -> Option<Connection> {
        stream.set_nodelay(true).ok()?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.ok()?;
        // Its error is told to the request that meets it.
        let driver = tokio::spawn(async move { drop(driver.await) });
        Some(Connection {
            sender,
            driver,
            api: self.clone(),
        })
    }

    /// Sends a request and does not wait for its answer. Dropping the stream hangs up.
    pub async fn send_only(&self, call: &Call) -> TcpStream {
        let mut head = format!(
            "{} {} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n",
            call.method,
            call.path,
            self.address,
            call.announced.unwrap_or(call.body.len())
        );
        let key = self
            .key
            .iter()
            .map(|key| ("authorization".to_owned(), format!("Bearer {key}")));
        for (name, value) in call.headers.iter().cloned().chain(key) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&call.body).await.unwrap();
        stream
    }
}

impl Connection {
    /// Asks and reads the whole answer.
    pub async fn send(&mut self, call: Call) -> Answer {
        let what = format!("{} {}", call.method, call.path);
        let answer = in_time(&what, self.try_send(call)).await;
        answer.unwrap_or_else(|| panic!("no answer to {what}"))
    }

    /// As [`Connection::send`]; `None` when no whole answer came.
    pub async fn try_send(&mut self, call: Call) -> Option<Answer> {
        let place = format!("the answer to {} {}", call.method, call.path);
        let mut request = Request::builder()
            .method(call.method)
            .uri(call.path)
            .header("host", self.api.address.to_string());
        for (name, value) in call.headers {
            request = request.header(name, value);
        }
        if let Some(key) = &self.api.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(call.body)).unwrap();
        self.sender.ready().await.ok()?;
        let (head, body) = self.sender.send_request(request).await.ok()?.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        if secrets::may_have_none(&place) {
            secrets::assert_none(
                &place,
                &format!("{:?} {}", head.headers, String::from_utf8_lossy(&body)),
            );
        }
        Some(Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Answer {
    /// The body, which must be JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The `code` of a problem; empty when there is none.
    pub fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["code"].as_str().unwrap_or_default().to_owned()
    }

    /// This answer, which must have this status.
    pub fn expect(self, status: u16) -> Self {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{body}");
        self
    }
}
