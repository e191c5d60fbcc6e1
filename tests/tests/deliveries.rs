//! Webhooks of a service of two processes: every event arrives, also when one of them is killed over it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use leasehold_system_tests::http::{Api, get, post};
use leasehold_system_tests::patience::eventually;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::world::World;

/// A receiver of events on loopback.
struct Receiver {
    address: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    /// The events that came, each as often as it did.
    events: Mutex<Vec<Value>>,
    /// Whether it keeps its answers to itself.
    silent: watch::Sender<bool>,
    unsigned: AtomicBool,
}

impl Receiver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::<Seen>::default();
        let serving = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&serving);
                let answer = service_fn(move |request| receive(Arc::clone(&seen), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
            }
        });
        Self { address, seen, task }
    }

    fn be_silent(&self, silent: bool) {
        self.seen.silent.send_replace(silent);
    }

    fn count(&self) -> usize {
        self.seen.events.lock().unwrap().len()
    }

    /// What the events are of that came.
    fn records(&self) -> BTreeSet<String> {
        let events = self.seen.events.lock().unwrap();
        let ids = events
            .iter()
            .map(|event| event["data"]["id"].as_str().unwrap().to_owned());
        ids.collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn receive(seen: Arc<Seen>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if !request.headers().contains_key("leasehold-signature") {
        seen.unsigned.store(true, Ordering::Relaxed);
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    seen.events
        .lock()
        .unwrap()
        .push(serde_json::from_slice(&body).unwrap());
    // The sender is in `seen`.
    seen.silent.subscribe().wait_for(|silent| !silent).await.ok();
    Ok(Response::new(Full::default()))
}

async fn make_webhook(api: &Api, receiver: &Receiver) {
    let url = format!("http://{}/", receiver.address);
    let new = json!({"tenant_id": "acme", "url": url});
    api.send(post("/v1/webhooks", &new)).await.expect(201);
}

async fn write(api: &Api, number: usize) -> String {
    let new = json!({"tenant_id": "acme", "value": number});
    let made = api
        .send(post("/v1/feedback-records", &new))
        .await
        .expect(201)
        .json();
    made["id"].as_str().unwrap().to_owned()
}

async fn items(api: &Api) -> Vec<Value> {
    let page = api
        .send(get("/v1/tenants/acme/work-items"))
        .await
        .expect(200)
        .json();
    page["items"].as_array().unwrap().clone()
}

/// A world without events that are of no interest here.
async fn world() -> World {
    let world = World::start_with("lease", |service| service.set("WEBHOOK_ALLOW_PRIVATE", "true")).await;
    eventually("the events of its making are handed on", async || {
        let left = "SELECT count(*) FROM leasehold.outbox";
        world.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_reaches_every_webhook_when_a_process_is_killed() {
    const WRITES: usize = 40;
    let mut world = world().await;
    let (_other, other) = world
        .another(|service| service.set("WEBHOOK_ALLOW_PRIVATE", "true"))
        .await;
    let receivers = [Receiver::start().await, Receiver::start().await];
    for receiver in &receivers {
        make_webhook(&world.api, receiver).await;
    }
    // Enough to keep both busy, and then nobody is answered.
    let mut written = BTreeSet::new();
    for number in 0..WRITES {
        if number == WRITES / 2 {
            receivers.iter().for_each(|receiver| receiver.be_silent(true));
        }
        let api = if number % 2 == 0 { &world.api } else { &other };
        written.insert(write(api, number).await);
    }
    let claimed_by_it = "SELECT count(*) FROM leasehold.work_claims WHERE worker LIKE '%:' || $1";
    let pid = world.service.pid().to_string();
    eventually("it is in the middle of some", async || {
        world
            .client
            .query_one(claimed_by_it, &[&pid])
            .await
            .unwrap()
            .get::<_, i64>(0)
            > 0
    })
    .await;
    world.service.kill();
    receivers.iter().for_each(|receiver| receiver.be_silent(false));
    // Its claims end by themselves; that they have is not waited for. The server may still be making one for it.
    let end = "UPDATE leasehold.work_claims SET expires_at = clock_timestamp()
               WHERE worker LIKE '%:' || $1 AND expires_at > clock_timestamp()";
    assert!(world.client.execute(end, &[&pid]).await.unwrap() > 0);

    eventually("all is done", async || {
        world.client.execute(end, &[&pid]).await.unwrap();
        let left =
            "SELECT (SELECT count(*) FROM leasehold.outbox) + (SELECT count(*) FROM leasehold.work_items)";
        world.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    for receiver in &receivers {
        assert_eq!(receiver.records(), written, "each at least once");
        assert!(receiver.count() < 2 * WRITES, "and few of them twice");
        assert!(!receiver.seen.unsigned.load(Ordering::Relaxed));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_a_killed_process_has_not_handed_on_are_found_by_another() {
    let world = world().await;
    let receiver = Receiver::start().await;
    make_webhook(&world.api, &receiver).await;
    // As left by a write whose process was killed right after the commit: nobody was woken.
    let event =
        "INSERT INTO leasehold.outbox (tenant_id, type, data) VALUES ('acme', 'test', '{\"id\": \"1\"}')";
    world.client.execute(event, &[]).await.unwrap();
    eventually("it arrives", async || receiver.count() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_finishes_what_it_sends() {
    let mut world = world().await;
    let receiver = Receiver::start().await;
    make_webhook(&world.api, &receiver).await;
    receiver.be_silent(true);
    write(&world.api, 1).await;
    eventually("it is being sent", async || receiver.count() == 1).await;
    world.service.signal(rustix::process::Signal::TERM);
    eventually("it takes no new requests", async || {
        world
            .service
            .log()
            .iter()
            .any(|line| line.contains("stopping: no new requests"))
    })
    .await;
    receiver.be_silent(false);
    assert!(world.service.ended().await.success());
    let left =
        "SELECT (SELECT count(*) FROM leasehold.work_items) + (SELECT count(*) FROM leasehold.work_claims)";
    assert_eq!(
        world.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0),
        0
    );
    assert_eq!(receiver.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_to_loopback_unless_the_operator_says_so() {
    let world = World::start("lease").await;
    let receiver = Receiver::start().await;
    make_webhook(&world.api, &receiver).await;
    write(&world.api, 1).await;
    eventually("it has failed", async || {
        items(&world.api).await.iter().any(|item| {
            let error = item["last_error"].as_str();
            item["state"] == "delayed" && error == Some("the URL leads to no address that is public")
        })
    })
    .await;
    assert_eq!(receiver.count(), 0);
}
