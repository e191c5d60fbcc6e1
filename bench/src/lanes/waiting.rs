//! Writes of others while hundreds of requests wait for one lock: those hold no connection, so these should not notice.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, StatusCode};
use leasehold_server::app;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::group::Group;
use crate::lanes::http::{self, POOL, Service, TENANT};
use crate::measure::{Client, Clients, Lane, Sample};
use crate::{Bench, Result};

const WAITERS: usize = 500;
const CLIENTS: u32 = 8;
/// Longer than a lane runs.
const WAIT_MS: u64 = 30_000;

/// A client with a connection of its own.
struct Person(SendRequest<Full<Bytes>>);

impl Person {
    async fn send(&mut self, method: Method, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
        let (status, body) = http::ask(&mut self.0, &method, path, body.to_string().into()).await?;
        Ok((status, serde_json::from_slice(&body)?))
    }
}

/// Puts a key of its own workspace.
struct Writer {
    person: Person,
    path: String,
}

impl Client for Writer {
    async fn once(&mut self) -> Result {
        let value = json!({ "value": 7 });
        match self.person.send(Method::PUT, &self.path, &value).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, body) => Err(format!("{status}: {body}").into()),
        }
    }
}

/// The same writers, while others wait.
struct Crowded {
    writers: Box<dyn Lane>,
    address: SocketAddr,
}

#[async_trait]
impl Lane for Crowded {
    fn name(&self) -> &str {
        "500 wait"
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let lock = format!("/v1/tenants/{TENANT}/locks/wanted");
        let acquire = format!("{lock}/acquire");
        let mut holder = Person(http::connect(self.address).await?);
        let (_, held) = holder
            .send(Method::POST, &acquire, &json!({ "ttl_ms": 600_000 }))
            .await?;
        let mut waiting = JoinSet::new();
        for _ in 0..WAITERS {
            let mut person = Person(http::connect(self.address).await?);
            let acquire = acquire.clone();
            waiting.spawn(async move {
                let wanted = json!({ "ttl_ms": 1_000, "wait_ms": WAIT_MS });
                person.send(Method::POST, &acquire, &wanted).await
            });
        }
        loop {
            let (_, shown) = holder.send(Method::GET, &lock, &json!(null)).await?;
            if shown["waiters"].as_u64() >= Some(WAITERS as u64) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let sample = self.writers.run(window).await?;
        if waiting.len() < WAITERS || waiting.try_join_next().is_some() {
            return Err("somebody did not wait to the end".into());
        }
        waiting.shutdown().await;
        let release = json!({ "lock_id": held["lock_id"] });
        holder
            .send(Method::POST, &format!("{lock}/release"), &release)
            .await?;
        Ok(sample)
    }
}

async fn writers(name: &'static str, service: &Service) -> Result<Box<dyn Lane>> {
    let mut writers = Vec::new();
    for number in 0..CLIENTS {
        writers.push(Writer {
            person: Person(http::connect(service.address).await?),
            path: format!("/v1/tenants/{TENANT}/workspaces/lease-{number}/default-config/color"),
        });
    }
    Ok(Clients::lane(name, writers))
}

pub(crate) async fn writes(bench: &Bench) -> Result {
    let mut group = Group::new(
        format!(
            "PUT over HTTP, {CLIENTS} clients, while {WAITERS} are waiting for one lock, {POOL} connections"
        ),
        "PUTs/s",
        &["nobody waits"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let (database, _) = http::set_up(bench).await?;
    let db = database.open(POOL).await?;
    let service = Service::start(app::router(http::state(db, WorkspaceLockMode::Lease)?)).await?;
    group.add(writers("nobody waits", &service).await?);
    group.add(Box::new(Crowded {
        writers: writers("500 wait", &service).await?,
        address: service.address,
    }));
    bench.measure(group).await
}
