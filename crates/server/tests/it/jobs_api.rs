//! Jobs over HTTP: looking, running, pausing.

use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::deliveries::Deliveries;
use serde_json::{Value, json};

use crate::receiver::Receiver;
use crate::support::{Api, eventually};

const HEALTH: &str = "/v1/jobs/webhook-health";

/// A service with its deliveries.
async fn start() -> (Api, Deliveries) {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let deliveries = Deliveries::start(&api.state, true).await.unwrap();
    (api, deliveries)
}

async fn job(api: &Api) -> Value {
    let jobs = api.get("/v1/jobs").await.is(200);
    let items = jobs["items"].as_array().unwrap();
    let job = items.iter().find(|job| job["name"] == "webhook-health");
    job.unwrap().clone()
}

async fn webhook(api: &Api, url: &str, enabled: bool) -> String {
    let new = json!({"tenant_id": "acme", "url": url, "enabled": enabled});
    let made = api.post("/v1/webhooks", new).await.is(201);
    assert_eq!(
        (&made["last_checked_at"], &made["last_status"]),
        (&Value::Null, &Value::Null)
    );
    format!("/v1/webhooks/{}", made["id"].as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_listed_with_its_schedule() {
    let (api, _deliveries) = start().await;
    let job = job(&api).await;
    assert_eq!(
        (
            &job["schedule"],
            &job["time_zone"],
            &job["paused"],
            &job["last_run"]
        ),
        (&json!("every 30m"), &json!("UTC"), &json!(false), &Value::Null)
    );
    assert!(job["next_slot"].as_str().unwrap().ends_with('Z'), "{job}");
    let page = api.get("/v1/jobs?limit=1").await.is(200);
    assert_eq!(page["items"].as_array().unwrap().len(), 1);
    let mut next = page["next_cursor"].clone();
    let mut seen = 1;
    while let Some(cursor) = next.as_str() {
        let page = api
            .get(&format!("/v1/jobs?limit=1&cursor={cursor}"))
            .await
            .is(200);
        seen += page["items"].as_array().unwrap().len();
        next = page["next_cursor"].clone();
    }
    let all = api.get("/v1/jobs").await.is(200);
    assert_eq!(seen, all["items"].as_array().unwrap().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_for_admins_of_all_tenants() {
    let (api, _deliveries) = start().await;
    let theirs = api.with_key(&api.new_key("theirs", Role::Admin, Some("acme")).await);
    let writer = api.with_key(&api.new_key("writer", Role::Writer, None).await);
    for path in ["/run", "/pause", "/resume"] {
        let path = format!("{HEALTH}{path}");
        theirs.post(&path, Value::Null).await.problem(403, "forbidden");
        writer.post(&path, Value::Null).await.problem(403, "forbidden");
        api.with_key("lh_no")
            .post(&path, Value::Null)
            .await
            .problem(401, "unauthenticated");
    }
    theirs.get("/v1/jobs").await.problem(403, "forbidden");
    writer.get("/v1/jobs").await.problem(403, "forbidden");
    assert_eq!(job(&api).await["paused"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_tells_of_each_enabled_webhook_what_it_found() {
    let (api, _deliveries) = start().await;
    let (well, ill) = (Receiver::start().await, Receiver::start().await);
    ill.answers(503);
    let silent = Receiver::start().await;
    let nowhere = silent.url();
    drop(silent);
    let well_path = webhook(&api, &well.url(), true).await;
    let ill_path = webhook(&api, &ill.url(), true).await;
    let silent_path = webhook(&api, &nowhere, true).await;
    let disabled_path = webhook(&api, &well.url(), false).await;

    let asked = api.post(&format!("{HEALTH}/run"), Value::Null).await.is(202);
    eventually("the job has run", async || {
        let run = job(&api).await["last_run"].clone();
        run["run_id"] == asked["run_id"] && run["outcome"] == "succeeded"
    })
    .await;
    let run = job(&api).await["last_run"].clone();
    assert_eq!(run["holder"], "test");
    for member in ["slot", "started_at", "finished_at"] {
        assert!(run[member].as_str().unwrap().ends_with('Z'), "{run}");
    }

    for (path, status) in [
        (well_path, json!(200)),
        (ill_path, json!(503)),
        (silent_path, Value::Null),
    ] {
        let webhook = api.get(&path).await.is(200);
        assert_eq!(webhook["last_status"], status, "{webhook}");
        assert!(webhook["last_checked_at"].is_string(), "{webhook}");
        assert_eq!(webhook["enabled"], true);
        assert_eq!(
            webhook["updated_at"], webhook["created_at"],
            "a look changes nothing of it"
        );
    }
    let disabled = api.get(&disabled_path).await.is(200);
    assert_eq!(disabled["last_checked_at"], Value::Null);
    let looks: Vec<_> = well
        .received()
        .into_iter()
        .filter(|one| one.method == "HEAD")
        .collect();
    assert_eq!(looks.len(), 1, "one of two is enabled");
    assert!(!looks[0].headers.contains_key("leasehold-signature"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_runs_is_not_started_again() {
    let (api, _deliveries) = start().await;
    let receiver = Receiver::start().await;
    receiver.hold_back();
    webhook(&api, &receiver.url(), true).await;
    let run = format!("{HEALTH}/run");
    api.post(&run, Value::Null).await.is(202);
    eventually("it runs", async || !receiver.received().is_empty()).await;
    let refused = api.post(&run, Value::Null).await.problem(409, "job_running");
    assert_eq!(refused["retryable"], false);
    assert_eq!(job(&api).await["last_run"]["outcome"], Value::Null);
    receiver.let_go();
    eventually("it has run", async || {
        job(&api).await["last_run"]["outcome"] == "succeeded"
    })
    .await;
    api.post(&run, Value::Null).await.is(202);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_is_not_started() {
    let (api, _deliveries) = start().await;
    let run = format!("{HEALTH}/run");
    let paused = api.post(&format!("{HEALTH}/pause"), Value::Null).await.is(200);
    assert_eq!(
        (&paused["paused"], &paused["next_slot"]),
        (&json!(true), &Value::Null)
    );
    api.post(&run, Value::Null).await.problem(409, "job_running");
    let resumed = api.post(&format!("{HEALTH}/resume"), Value::Null).await.is(200);
    assert_eq!(resumed["paused"], false);
    assert!(resumed["next_slot"].is_string());
    api.post(&run, Value::Null).await.is(202);
    for path in ["run", "pause", "resume"] {
        let path = format!("/v1/jobs/unknown/{path}");
        api.post(&path, Value::Null).await.problem(404, "not_found");
    }
    api.post("/v1/jobs/%00/run", Value::Null)
        .await
        .problem(400, "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_asked_for_twice_with_one_key_is_one_run() {
    let (api, _deliveries) = start().await;
    let run = async || {
        let (path, key) = (format!("{HEALTH}/run"), [("idempotency-key", "once")]);
        api.send(axum::http::Method::POST, &path, &key, None).await
    };
    let first = run().await;
    let again = run().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(first.is(202), again.is(202));
}
