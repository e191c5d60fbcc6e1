//! One lock of the service that all its clients want, beside Redis and etcd: how fast it goes from hand to hand.
//!
//! Each client has a connection of its own, takes the lock, does nothing under it and gives it back. The service shares
//! this process with its clients; Redis and etcd are processes of their own, taken from `PATH`.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, header};
use leasehold_server::app;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::daemon::{Daemon, free_address};
use crate::group::Group;
use crate::lanes::http::{self, KEY, POOL, Service, TENANT};
use crate::measure::{Client, Clients};
use crate::{Bench, Result};

/// How long it is held at most. Only a fault takes so long.
const HOLD_MS: u64 = 30_000;

/// With JSON over HTTP, as the service and etcd have it.
struct Posts {
    /// Who asks, where somebody wants to know.
    key: Option<&'static str>,
    sender: SendRequest<Full<Bytes>>,
}

impl Posts {
    async fn new(address: SocketAddr, key: Option<&'static str>) -> Result<Self> {
        let sender = http::connect(address).await?;
        Ok(Self { key, sender })
    }

    async fn post(&mut self, path: &str, body: &Value) -> Result<Value> {
        let mut request = Request::post(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body.to_string().into()))?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if status.is_success() {
            Ok(serde_json::from_slice(&body)?)
        } else {
            Err(format!("{path}: {status}: {}", String::from_utf8_lossy(&body)).into())
        }
    }
}

struct OfService {
    posts: Posts,
    lock: String,
}

impl Client for OfService {
    async fn once(&mut self) -> Result {
        let wanted = json!({ "ttl_ms": HOLD_MS, "wait_ms": HOLD_MS });
        let granted = self
            .posts
            .post(&format!("{}/acquire", self.lock), &wanted)
            .await?;
        let held = json!({ "lock_id": granted["lock_id"] });
        let released = self.posts.post(&format!("{}/release", self.lock), &held).await?;
        (released["released"] == true)
            .then_some(())
            .ok_or_else(|| "the lock was lost".into())
    }
}

/// How long a client of Redis waits before it asks again: Redis tells nobody that a lock is free.
const ASK_AGAIN: Duration = Duration::from_millis(1);
/// Only its holder may end it: <https://redis.io/docs/latest/commands/set/#patterns>.
const RELEASE: &str =
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end";

/// Speaks the protocol of Redis, as far as two commands need it.
struct OfRedis {
    stream: BufReader<TcpStream>,
    token: String,
}

impl OfRedis {
    async fn new(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
            token: Uuid::new_v4().to_string(),
        })
    }

    /// The first line of the answer, which is all of it here.
    async fn ask(&mut self, words: &[&str]) -> Result<String> {
        let mut text = format!("*{}\r\n", words.len());
        for word in words {
            text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.write_all(text.as_bytes()).await?;
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        match line.trim_end() {
            "" => Err("Redis has closed the connection".into()),
            error if error.starts_with('-') => Err(format!("Redis: {error}").into()),
            line => Ok(line.to_owned()),
        }
    }
}

impl Client for OfRedis {
    async fn once(&mut self) -> Result {
        let (token, hold) = (self.token.clone(), HOLD_MS.to_string());
        while self.ask(&["SET", "wanted", &token, "NX", "PX", &hold]).await? != "+OK" {
            tokio::time::sleep(ASK_AGAIN).await;
        }
        match self
            .ask(&["EVAL", RELEASE, "1", "wanted", &token])
            .await?
            .as_str()
        {
            ":1" => Ok(()),
            other => Err(format!("the lock was lost: {other}").into()),
        }
    }
}

async fn redis() -> Result<Option<Daemon>> {
    Daemon::start("redis-server", |address| {
        let words = format!(
            "--bind {} --port {} --appendonly no --save",
            address.ip(),
            address.port()
        );
        let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        // Never.
        words.push(String::new());
        Ok(words)
    })
    .await
}

/// Waits in etcd's queue, by the gateway that speaks JSON.
struct OfEtcd {
    posts: Posts,
    lease: Value,
}

impl OfEtcd {
    async fn new(address: SocketAddr) -> Result<Self> {
        let mut posts = Posts::new(address, None).await?;
        // Longer than any run of a group.
        let granted = posts.post("/v3/lease/grant", &json!({ "TTL": 3600 })).await?;
        let lease = granted["ID"].clone();
        Ok(Self { posts, lease })
    }
}

impl Client for OfEtcd {
    async fn once(&mut self) -> Result {
        // "wanted" in Base64, as JSON has bytes there.
        let wanted = json!({ "name": "d2FudGVk", "lease": self.lease });
        let granted = self.posts.post("/v3/lock/lock", &wanted).await?;
        let held = json!({ "key": granted["key"] });
        self.posts.post("/v3/lock/unlock", &held).await?;
        Ok(())
    }
}

async fn etcd() -> Result<Option<Daemon>> {
    Daemon::start("etcd", |address| {
        let peers = free_address()?;
        let words = format!(
            "--data-dir data --listen-client-urls http://{address} --advertise-client-urls http://{address} \
             --listen-peer-urls http://{peers} --initial-advertise-peer-urls http://{peers} \
             --initial-cluster default=http://{peers}"
        );
        Ok(words.split(' ').map(str::to_owned).collect())
    })
    .await
}

pub(crate) async fn one_name(bench: &Bench, clients: u32) -> Result {
    let mut group = Group::new(
        format!("http-lock: one name from hand to hand, {clients} clients"),
        "hand-offs/s",
        &["redis", "etcd"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let (database, _) = http::set_up(bench).await?;
    let db = database.open(POOL).await?;
    let service = Service::start(app::router(http::state(db, WorkspaceLockMode::Lease)?)).await?;
    let mut own = Vec::new();
    for _ in 0..clients {
        own.push(OfService {
            posts: Posts::new(service.address, Some(KEY)).await?,
            lock: format!("/v1/tenants/{TENANT}/locks/wanted"),
        });
    }
    group.add(Clients::lane("leasehold", own));

    let redis = redis().await?;
    match &redis {
        Some(redis) => {
            let mut others = Vec::new();
            for _ in 0..clients {
                others.push(OfRedis::new(redis.address).await?);
            }
            group.add(Clients::lane("redis", others));
        }
        None => println!("redis-server: not found on PATH; its lane is left out"),
    }
    let etcd = etcd().await?;
    match &etcd {
        Some(etcd) => {
            let mut others = Vec::new();
            for _ in 0..clients {
                others.push(OfEtcd::new(etcd.address).await?);
            }
            group.add(Clients::lane("etcd", others));
        }
        None => println!("etcd: not found on PATH; its lane is left out"),
    }
    bench.measure(group).await
}
