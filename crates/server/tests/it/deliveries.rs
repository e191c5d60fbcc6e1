//! Deliveries: what becomes of an event, from the write to the webhook, or to the dead letters.

use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::deliveries::Deliveries;
use serde_json::{Value, json};

use crate::receiver::Receiver;
use crate::support::{Api, MAIN, eventually};

/// A service with its deliveries, which may go to loopback.
async fn start() -> (Api, Deliveries) {
    start_with(true).await
}

async fn start_with(allow_private: bool) -> (Api, Deliveries) {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let deliveries = Deliveries::start(&api.state, allow_private).await.unwrap();
    // What the making of the workspaces has told.
    eventually("the outbox is empty", async || events(&api).await == 0).await;
    (api, deliveries)
}

struct Webhook {
    path: String,
    secret: String,
}

async fn webhook(api: &Api, tenant: &str, url: &str) -> Webhook {
    let new = json!({"tenant_id": tenant, "url": url});
    let made = api.post("/v1/webhooks", new).await.is(201);
    Webhook {
        path: format!("/v1/webhooks/{}", made["id"].as_str().unwrap()),
        secret: made["secret"].as_str().unwrap().to_owned(),
    }
}

/// Writes something of which there is an event, and answers its id.
async fn write(api: &Api, tenant: &str) -> Value {
    let new = json!({"tenant_id": tenant, "value": 1});
    api.post("/v1/feedback-records", new).await.is(201)["id"].clone()
}

async fn events(api: &Api) -> i64 {
    count(api, "SELECT count(*) FROM leasehold.outbox").await
}

async fn count(api: &Api, sql: &str) -> i64 {
    api.client().await.query_one(sql, &[]).await.unwrap().get(0)
}

async fn items(api: &Api, tenant: &str) -> Vec<Value> {
    list(api, tenant, "work-items").await
}

async fn dead(api: &Api, tenant: &str) -> Vec<Value> {
    list(api, tenant, "dead-letters").await
}

async fn list(api: &Api, tenant: &str, what: &str) -> Vec<Value> {
    let page = api.get(&format!("/v1/tenants/{tenant}/{what}")).await.is(200);
    page["items"].as_array().unwrap().clone()
}

/// Waits until what a tenant has to be done was tried `attempts` times, and waits to be tried again: for longer than it
/// would by itself.
async fn waits_after(api: &Api, tenant: &str, attempts: i64) -> Value {
    let client = api.client().await;
    let wait = "WITH wait AS (
                    UPDATE leasehold.work_claims SET expires_at = clock_timestamp() + interval '1 hour'
                    WHERE token IS NULL AND expires_at > clock_timestamp() AND attempt_count = $2
                      AND item_id IN (SELECT id FROM leasehold.work_items WHERE tenant_id = $1)
                    RETURNING item_id, expires_at
                )
                UPDATE leasehold.work_items SET parked_until = wait.expires_at FROM wait WHERE id = wait.item_id";
    eventually("it failed and waits", async || {
        client
            .execute(wait, &[&tenant, &i32::try_from(attempts).unwrap()])
            .await
            .unwrap()
            == 1
    })
    .await;
    let item = items(api, tenant).await.remove(0);
    assert_eq!(item["state"], "delayed");
    item
}

/// Lets what waits for its next try be tried now, as if it had been tried `attempts` times.
async fn hurry(api: &Api, attempts: i32) {
    let client = api.client().await;
    let hurry = "UPDATE leasehold.work_claims SET expires_at = clock_timestamp(), attempt_count = $1";
    client.execute(hurry, &[&attempts]).await.unwrap();
    let ready =
        "UPDATE leasehold.work_items SET parked_until = clock_timestamp() WHERE parked_until IS NOT NULL";
    client.execute(ready, &[]).await.unwrap();
    api.db.work_queue().wake(["webhook_delivery"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_reaches_each_enabled_webhook_of_its_tenant() {
    let (api, _deliveries) = start().await;
    let (one, two, off, others) = (
        Receiver::start().await,
        Receiver::start().await,
        Receiver::start().await,
        Receiver::start().await,
    );
    let secrets = [
        webhook(&api, "acme", &one.url()).await.secret,
        webhook(&api, "acme", &two.url()).await.secret,
    ];
    let disabled = webhook(&api, "acme", &off.url()).await;
    api.patch(&disabled.path, json!({"enabled": false})).await.is(200);
    webhook(&api, "globex", &others.url()).await;

    let record = write(&api, "acme").await;
    api.put(&format!("{MAIN}/default-config/color"), json!({"value": "red"}))
        .await
        .is(200);
    for (receiver, secret) in [&one, &two].into_iter().zip(secrets) {
        eventually("both events", async || receiver.received().len() == 2).await;
        let mut bodies: Vec<Value> = Vec::new();
        for received in receiver.received() {
            assert_eq!(received.method, "POST");
            assert_eq!(received.headers["content-type"], "application/json");
            received.is_signed_with(&secret);
            bodies.push(received.json());
        }
        bodies.sort_by_key(|body| body["type"].to_string());
        for body in &bodies {
            assert_eq!(body["tenant_id"], "acme");
            let at = body["created_at"].as_str().unwrap();
            assert!(at.len() == 27 && at.ends_with('Z'), "{at}");
            let members: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
            assert_eq!(members.len(), 5, "{members:?}");
        }
        assert_eq!(bodies[0]["type"], "feedback_record.created");
        assert_eq!(bodies[0]["data"], json!({"tenant_id": "acme", "id": record}));
        assert_eq!(bodies[1]["type"], "workspace.version_created");
    }
    let ids = |receiver: &Receiver| {
        let mut ids: Vec<_> = receiver
            .received()
            .iter()
            .map(|one| one.json()["id"].to_string())
            .collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&one), ids(&two), "an event has one id, whoever is told of it");
    eventually("completed work leaves nothing", async || {
        let left = "SELECT (SELECT count(*) FROM leasehold.work_items) + (SELECT count(*) FROM leasehold.work_claims)";
        count(&api, left).await == 0
    })
    .await;
    assert_eq!(events(&api).await, 0);
    assert!(off.received().is_empty() && others.received().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_taken_is_sent_again_and_then_given_up() {
    let (api, _deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.answers(500);
    let webhook = webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    let item = waits_after(&api, "acme", 1).await;
    assert_eq!(item["kind"], "webhook_delivery");
    assert_eq!(item["last_error"], "answered 500");
    assert!(item["not_before"].is_string(), "{item}");

    receiver.answers(307);
    hurry(&api, 1).await;
    let item = waits_after(&api, "acme", 2).await;
    assert_eq!(item["last_error"], "answered 307: redirects are not followed");
    assert_eq!(api.get(&webhook.path).await.is(200)["enabled"], true);

    receiver.answers(500);
    hurry(&api, 9).await;
    eventually("it is given up", async || dead(&api, "acme").await.len() == 1).await;
    let letter = dead(&api, "acme").await.remove(0);
    assert_eq!(
        (&letter["state"], &letter["attempt_count"]),
        (&json!("dead"), &json!(10)),
        "{letter}"
    );
    assert_eq!(letter["last_error"], "answered 500");
    assert_eq!(letter["payload"]["event"]["type"], "feedback_record.created");
    assert!(items(&api, "acme").await.is_empty());
    assert_eq!(api.get(&webhook.path).await.is(200)["enabled"], false);
    let received = receiver.received();
    assert_eq!(received.len(), 3);
    for again in &received {
        again.is_signed_with(&webhook.secret);
        assert_eq!(again.body, received[0].body, "the same event");
    }

    // Whoever has put it right says so.
    receiver.answers(200);
    api.patch(&webhook.path, json!({"enabled": true})).await.is(200);
    let redrive = format!("/v1/tenants/acme/dead-letters/{}/redrive", letter["id"]);
    assert_eq!(
        api.post(&redrive, Value::Null).await.is(200),
        json!({"redriven": 1})
    );
    eventually("it arrives", async || receiver.received().len() == 4).await;
    assert_eq!(receiver.received()[3].body, received[0].body);
    eventually("it is done", async || items(&api, "acme").await.is_empty()).await;
    assert!(dead(&api, "acme").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_that_it_is_gone_is_not_asked_again() {
    let (api, _deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.answers(410);
    let webhook = webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    eventually("it is given up", async || dead(&api, "acme").await.len() == 1).await;
    assert_eq!(dead(&api, "acme").await[0]["attempt_count"], 1);
    assert_eq!(api.get(&webhook.path).await.is(200)["enabled"], false);
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn private_targets_are_refused_by_default() {
    let (api, _deliveries) = start_with(false).await;
    let receiver = Receiver::start().await;
    webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    let item = waits_after(&api, "acme", 1).await;
    assert_eq!(item["last_error"], "the URL leads to no address that is public");
    assert!(receiver.received().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_nobody_any_more_ends_quietly() {
    let (api, _deliveries) = start().await;
    let receiver = Receiver::start().await;
    for leave in ["disable", "delete", "move"] {
        receiver.answers(500);
        let webhook = webhook(&api, "acme", &receiver.url()).await;
        write(&api, "acme").await;
        waits_after(&api, "acme", 1).await;
        let before = receiver.received().len();
        receiver.answers(200);
        match leave {
            "disable" => drop(api.patch(&webhook.path, json!({"enabled": false})).await.is(200)),
            "delete" => assert_eq!(api.delete(&webhook.path).await.status, 204),
            _ => drop(
                api.patch(&webhook.path, json!({"tenant_id": "globex"}))
                    .await
                    .is(200),
            ),
        }
        hurry(&api, 1).await;
        eventually("it is done", async || items(&api, "acme").await.is_empty()).await;
        assert!(dead(&api, "acme").await.is_empty(), "{leave}");
        assert_eq!(receiver.received().len(), before, "{leave}: nothing was sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_ends_what_is_pending_quietly() {
    let (api, _deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.answers(500);
    webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    waits_after(&api, "acme", 1).await;
    // One is on its way meanwhile.
    receiver.hold_back();
    write(&api, "acme").await;
    eventually("it is being sent", async || receiver.received().len() == 2).await;
    let purged = api.delete("/v1/tenants/acme/data").await.is(200);
    assert_eq!(purged["deleted"]["work_items"], 2, "{purged}");
    receiver.let_go();
    receiver.answers(200);
    // What comes later is handed on as ever.
    let others = Receiver::start().await;
    webhook(&api, "globex", &others.url()).await;
    write(&api, "globex").await;
    eventually("it arrives", async || others.received().len() == 1).await;
    assert_eq!(receiver.received().len(), 2, "nothing more was sent");
    assert!(items(&api, "acme").await.is_empty() && dead(&api, "acme").await.is_empty());
    let left = "SELECT count(*) FROM leasehold.outbox WHERE tenant_id = 'acme'";
    assert_eq!(count(&api, left).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_tenant_that_is_drained_stay_and_hold_nobody_up() {
    let (api, _deliveries) = start().await;
    let (receiver, others) = (Receiver::start().await, Receiver::start().await);
    webhook(&api, "acme", &receiver.url()).await;
    webhook(&api, "globex", &others.url()).await;
    let mut stranger = api.client().await;
    let drain = stranger.transaction().await.unwrap();
    let gate = "SELECT pg_advisory_xact_lock(leasehold.tenant_write_key('acme'))";
    drain.execute(gate, &[]).await.unwrap();
    // It was written before the drain, by somebody who did not hand it on.
    let event = "INSERT INTO leasehold.outbox (tenant_id, type, data) VALUES ('acme', 'test', '{}')";
    api.client().await.execute(event, &[]).await.unwrap();
    for _ in 0..3 {
        let before = others.received().len();
        write(&api, "globex").await;
        eventually("another's event", async || others.received().len() > before).await;
    }
    assert_eq!(events(&api).await, 1);
    assert!(receiver.received().is_empty());
    drain.commit().await.unwrap();
    eventually("its turn has come", async || receiver.received().len() == 1).await;
    assert_eq!(receiver.received()[0].json()["type"], "test");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_says_nothing_holds_up_its_tenant_alone() {
    let (api, _deliveries) = start().await;
    let (silent, good) = (Receiver::start().await, Receiver::start().await);
    silent.hold_back();
    webhook(&api, "acme", &silent.url()).await;
    webhook(&api, "globex", &good.url()).await;
    // More than there are places for all tenants.
    api.client()
        .await
        .batch_execute(
            "INSERT INTO leasehold.outbox (tenant_id, type, data) SELECT 'acme', 'test', '{}' FROM generate_series(1, 60)",
        )
        .await
        .unwrap();
    eventually("some are under way", async || silent.received().len() == 4).await;
    eventually("all are handed on", async || events(&api).await == 0).await;
    write(&api, "globex").await;
    eventually("it has arrived", async || good.received().len() == 1).await;
    assert_eq!(silent.received().len(), 4);
    // None of those that came too early has used up a try.
    for item in items(&api, "acme").await {
        let attempts = item["attempt_count"].as_i64().unwrap();
        assert!(attempts <= 1 && item["last_error"].is_null(), "{item}");
    }
    silent.let_go();
    eventually("all have arrived", async || silent.received().len() >= 60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_was_repaired_meanwhile_stays_enabled() {
    let (api, _deliveries) = start().await;
    let (gone, good) = (Receiver::start().await, Receiver::start().await);
    gone.answers(410);
    gone.hold_back();
    let webhook = webhook(&api, "acme", &gone.url()).await;
    write(&api, "acme").await;
    eventually("it is being sent", async || gone.received().len() == 1).await;
    api.patch(&webhook.path, json!({"url": good.url()})).await.is(200);
    gone.let_go();
    eventually("it is given up", async || dead(&api, "acme").await.len() == 1).await;
    assert_eq!(api.get(&webhook.path).await.is(200)["enabled"], true);
    write(&api, "acme").await;
    eventually("the next has arrived", async || good.received().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_what_is_being_sent() {
    let (api, deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.hold_back();
    webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    eventually("it is being sent", async || receiver.received().len() == 1).await;
    let stopping = tokio::spawn(deliveries.stop(std::time::Duration::from_secs(25)));
    receiver.let_go();
    stopping.await.unwrap();
    assert!(items(&api, "acme").await.is_empty(), "it was finished");
    // From now on it is for others.
    write(&api, "acme").await;
    assert_eq!(events(&api).await, 1);
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_gives_back_what_does_not_end() {
    let (api, deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.hold_back();
    webhook(&api, "acme", &receiver.url()).await;
    write(&api, "acme").await;
    eventually("it is being sent", async || receiver.received().len() == 1).await;
    deliveries.stop(std::time::Duration::from_millis(100)).await;
    let item = items(&api, "acme").await.remove(0);
    assert_eq!(
        (&item["state"], &item["attempt_count"]),
        (&json!("ready"), &json!(0)),
        "{item}"
    );
}
