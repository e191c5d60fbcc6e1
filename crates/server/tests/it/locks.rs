//! Locks by name, for programs that keep them alive themselves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Method;
use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest};
use leasehold_server::Settings;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::waiters::Limits;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Answer, Api, eventually, settings};

const LOCKS: &str = "/v1/tenants/acme/locks";

async fn start() -> Api {
    Api::start(WorkspaceLockMode::Lease).await
}

async fn start_with(change: impl FnOnce(&mut Settings)) -> Api {
    let mut settings = settings(WorkspaceLockMode::Lease);
    change(&mut settings);
    Api::start_with(settings).await
}

async fn act(api: &Api, name: &str, action: &str, body: Value) -> Answer {
    api.post(&format!("{LOCKS}/{name}/{action}"), body).await
}

async fn acquire(api: &Api, name: &str, body: Value) -> Answer {
    act(api, name, "acquire", body).await
}

fn id(grant: &Value) -> &str {
    grant["lock_id"].as_str().unwrap()
}

fn token(grant: &Value) -> i64 {
    grant["fencing_token"].as_i64().unwrap()
}

/// Moves the end of a lock into the past, as if time had passed.
async fn expire(api: &Api) {
    let expire = "UPDATE leasehold.leases SET acquired_at = acquired_at - interval '1 day',
                         expires_at = clock_timestamp() - interval '1 ms' WHERE lock_id IS NOT NULL";
    assert_eq!(api.client().await.execute(expire, &[]).await.unwrap(), 1);
}

/// How many wait for a lock that somebody holds.
async fn waiters(api: &Api, name: &str) -> Option<u64> {
    let lock = api.get(&format!("{LOCKS}/{name}")).await;
    (lock.status == 200).then(|| lock.body["waiters"].as_u64().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time_with_rising_tokens() {
    let api = start().await;
    let alice = api.with_key(&api.new_key("alice", Role::Writer, Some("acme")).await);
    let body = json!({"ttl_ms": 60_000, "operation": "deploy 7", "metadata": {"build": 7}});
    let first = acquire(&alice, "deploy%2Fprod", body).await.is(200);
    assert_eq!(first["name"], "deploy/prod");
    let times = ["acquired_at", "expires_at"].map(|time| first[time].as_str().unwrap().to_owned());
    assert!(
        times.iter().all(|time| time.ends_with('Z') && time.len() == 27),
        "{times:?}"
    );

    let refused = acquire(&api, "deploy%2Fprod", json!({"ttl_ms": 1_000})).await;
    let problem = refused.problem(409, "lock_held");
    assert_eq!(
        (
            &problem["lock"]["locked_by"],
            &problem["lock"]["operation"],
            &problem["lock"]["lock_id"]
        ),
        (&json!("alice"), &json!("deploy 7"), &first["lock_id"])
    );
    assert_eq!(problem["lock"]["fencing_token"], first["fencing_token"]);

    let shown = api.get(&format!("{LOCKS}/deploy%2Fprod")).await.is(200);
    assert_eq!(
        shown,
        json!({
            "name": "deploy/prod", "mode": "exclusive", "backend": "lease", "lock_id": first["lock_id"],
            "holder": {"owner": "alice", "operation": "deploy 7", "instance": "", "metadata": {"build": 7}},
            "acquired_at": first["acquired_at"], "expires_at": first["expires_at"],
            "fencing_token": first["fencing_token"], "waiters": 0,
        })
    );

    let release = json!({"lock_id": first["lock_id"]});
    let released = act(&alice, "deploy%2Fprod", "release", release.clone())
        .await
        .is(200);
    assert_eq!(released, json!({"released": true}));
    let again = act(&alice, "deploy%2Fprod", "release", release).await.is(200);
    assert_eq!(again, json!({"released": false}));
    api.get(&format!("{LOCKS}/deploy%2Fprod"))
        .await
        .problem(404, "not_found");

    let second = acquire(&api, "deploy%2Fprod", json!({"ttl_ms": 60_000}))
        .await
        .is(200);
    assert!(token(&second) > token(&first));
    let shown = api.get(&format!("{LOCKS}/deploy%2Fprod")).await.is(200);
    assert_eq!(
        shown["holder"]["operation"],
        format!("POST {LOCKS}/deploy%2Fprod/acquire")
    );
    let none = api
        .client()
        .await
        .query_one(
            "SELECT count(*) FROM leasehold.client_leases WHERE lock_id <> $1",
            &[&Uuid::parse_str(id(&second)).unwrap()],
        )
        .await
        .unwrap();
    assert_eq!(none.get::<_, i64>(0), 0, "what is over is not remembered");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_renews_it_but_its_client() {
    let api = start().await;
    let start = Instant::now();
    let first = acquire(&api, "a", json!({"ttl_ms": 600})).await.is(200);
    let next = acquire(&api, "a", json!({"ttl_ms": 600, "wait_ms": 10_000}))
        .await
        .is(200);
    assert!(start.elapsed() >= Duration::from_millis(600));
    assert!(token(&next) > token(&first));
    act(&api, "a", "extend", json!({"lock_id": first["lock_id"]}))
        .await
        .problem(409, "lock_lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn extended_by_any_process_up_to_the_longest_hold() {
    let api = start().await;
    let other = Api::start_on(&api.url, settings(WorkspaceLockMode::Lease)).await;
    let body = json!({"ttl_ms": 10_000, "max_hold_ms": 60_000});
    let granted = acquire(&api, "a", body).await.is(200);
    let time = |value: &Value, member: &str| -> chrono::DateTime<chrono::Utc> {
        value[member].as_str().unwrap().parse().unwrap()
    };
    let extend = async |body: Value| act(&other, "a", "extend", body).await.is(200);

    let same = extend(json!({"lock_id": granted["lock_id"]})).await;
    assert!(
        time(&same, "expires_at") > time(&granted, "expires_at"),
        "by the slice it was acquired with"
    );
    assert!(time(&same, "expires_at") < time(&granted, "expires_at") + Duration::from_secs(10));
    assert_eq!(
        (
            &same["lock_id"],
            &same["fencing_token"],
            &same["acquired_at"],
            &same["name"]
        ),
        (
            &granted["lock_id"],
            &granted["fencing_token"],
            &granted["acquired_at"],
            &json!("a")
        )
    );
    let shorter = extend(json!({"lock_id": granted["lock_id"], "ttl_ms": 100})).await;
    assert_eq!(shorter["expires_at"], same["expires_at"], "never sooner");
    let longest = extend(json!({"lock_id": granted["lock_id"], "ttl_ms": 3_600_000})).await;
    assert_eq!(
        time(&longest, "expires_at"),
        time(&granted, "acquired_at") + Duration::from_secs(60),
        "never later than the longest hold"
    );

    let released = act(&other, "a", "release", json!({"lock_id": granted["lock_id"]}))
        .await
        .is(200);
    assert_eq!(released["released"], true);
    let lost = act(&api, "a", "extend", json!({"lock_id": granted["lock_id"]})).await;
    let problem = lost.problem(409, "lock_lost");
    assert_eq!(problem["retryable"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_id_of_the_clients_own_makes_acquire_repeatable() {
    let api = start().await;
    let chosen = Uuid::new_v4();
    let body = json!({"ttl_ms": 60_000, "lock_id": chosen});
    let first = acquire(&api, "a", body.clone()).await.is(200);
    assert_eq!(id(&first), chosen.to_string());
    assert_eq!(
        acquire(&api, "a", body.clone()).await.is(200),
        first,
        "the same grant"
    );
    let other = Api::start_on(&api.url, settings(WorkspaceLockMode::Lease)).await;
    assert_eq!(acquire(&other, "a", body.clone()).await.is(200), first);

    // Not for another name, and not for another client who knows another id.
    acquire(&api, "b", body.clone()).await.problem(409, "lock_lost");
    acquire(&api, "a", json!({"ttl_ms": 60_000, "lock_id": Uuid::new_v4()}))
        .await
        .problem(409, "lock_held");

    act(&api, "a", "release", json!({"lock_id": chosen}))
        .await
        .is(200);
    let problem = acquire(&api, "a", body.clone()).await.problem(409, "lock_lost");
    assert_eq!(problem["retryable"], false);
    // Also when another had it since, and when it is over because it was not extended.
    let next = acquire(&api, "a", json!({"ttl_ms": 60_000, "lock_id": Uuid::new_v4()}))
        .await
        .is(200);
    acquire(&api, "a", body.clone()).await.problem(409, "lock_lost");
    expire(&api).await;
    acquire(&api, "a", json!({"ttl_ms": 60_000, "lock_id": id(&next)}))
        .await
        .problem(409, "lock_lost");

    // Ids are forgotten a while after their locks could have been held.
    let leases = api.db.client_leases();
    assert_eq!(leases.forget(Duration::from_secs(60)).await.unwrap(), 0);
    let client = api.client().await;
    let age = "UPDATE leasehold.client_leases SET ends_at = ends_at - interval '3 days'";
    client.execute(age, &[]).await.unwrap();
    assert_eq!(leases.forget(Duration::from_secs(60)).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_twice_at_once_is_granted_once() {
    let api = Arc::new(start().await);
    let blocker = acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let body = json!({"ttl_ms": 60_000, "lock_id": Uuid::new_v4(), "wait_ms": 10_000});
    let twice: Vec<_> = (0..2)
        .map(|_| {
            let (api, body) = (api.clone(), body.clone());
            tokio::spawn(async move { acquire(&api, "a", body).await })
        })
        .collect();
    eventually("both wait", async || waiters(&api, "a").await == Some(2)).await;
    act(&api, "a", "release", json!({"lock_id": blocker["lock_id"]}))
        .await
        .is(200);
    let mut grants = Vec::new();
    for answer in twice {
        grants.push(answer.await.unwrap().is(200));
    }
    assert_eq!(grants[0], grants[1]);
}

/// A request that is sent again does not wait for itself: soon after the first one was granted, the second is told.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_waits_not_for_itself() {
    let api = Arc::new(start().await);
    let other = Arc::new(Api::start_on(&api.url, settings(WorkspaceLockMode::Lease)).await);
    let blocker = acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let body = json!({"ttl_ms": 29_000, "lock_id": Uuid::new_v4(), "wait_ms": 30_000});
    let sent: Vec<_> = [&api, &api, &other]
        .map(|api| {
            let (api, body) = (api.clone(), body.clone());
            tokio::spawn(async move { acquire(&api, "a", body).await })
        })
        .into();
    eventually("all wait", async || {
        waiters(&api, "a").await.is_some_and(|waiters| waiters >= 2)
    })
    .await;
    act(&api, "a", "release", json!({"lock_id": blocker["lock_id"]}))
        .await
        .is(200);
    let released = Instant::now();
    let mut grants = Vec::new();
    for answer in sent {
        grants.push(answer.await.unwrap().is(200));
    }
    assert!(
        released.elapsed() < Duration::from_secs(25),
        "{:?}",
        released.elapsed()
    );
    assert!(grants.iter().all(|grant| *grant == grants[0]), "{grants:?}");
    // The other instance tells of its waits once in a while.
    eventually("nobody waits", async || waiters(&api, "a").await == Some(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_excludes_rust_holders_and_is_excluded_by_them() {
    let api = start().await;
    let locks = api.db.leases();
    let name = LockName::new(["lock", "acme", "deploy/prod"]).unwrap();
    let request = LockRequest::new(name, Holder::new("cron", "nightly")).with_ttl(Duration::from_secs(60));

    let guard = locks.try_acquire(&request).await.unwrap();
    let body = json!({"ttl_ms": 60_000});
    let problem = acquire(&api, "deploy%2Fprod", body.clone())
        .await
        .problem(409, "lock_held");
    assert_eq!(problem["lock"]["locked_by"], "cron");
    // Who reads its id can neither release nor extend it: no client keeps it.
    let its = json!({"lock_id": guard.lock_id().as_uuid()});
    let released = act(&api, "deploy%2Fprod", "release", its.clone()).await.is(200);
    assert_eq!(released["released"], false);
    act(&api, "deploy%2Fprod", "extend", its)
        .await
        .problem(409, "lock_lost");
    assert!(!guard.is_lost());
    let before = guard.fencing_token().unwrap().get();
    locks.release(guard).await.unwrap();

    let granted = acquire(&api, "deploy%2Fprod", body).await.is(200);
    assert!(token(&granted) > before);
    let refused = locks.try_acquire(&request).await.unwrap_err();
    let held = refused.contention().unwrap().held.as_ref().unwrap();
    assert_eq!(held.lock_id.unwrap().as_uuid().to_string(), id(&granted));
    let (waited, released) = tokio::join!(
        locks.acquire(&request, Duration::from_secs(10)),
        act(
            &api,
            "deploy%2Fprod",
            "release",
            json!({"lock_id": granted["lock_id"]})
        ),
    );
    assert_eq!(released.is(200)["released"], true);
    assert!(waited.unwrap().fencing_token().unwrap().get() > token(&granted));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_when_it_was_told_to() {
    let api = start_with(|settings| settings.max_wait = Duration::from_millis(400)).await;
    let held = acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let waited = async |headers: &[(&str, &str)], body: Value| {
        let start = Instant::now();
        let path = format!("{LOCKS}/a/acquire");
        let answer = api
            .send(Method::POST, &path, headers, Some(body.to_string()))
            .await;
        let applied = answer.header("preference-applied").map(str::to_owned);
        answer.problem(409, "lock_held");
        (start.elapsed(), applied)
    };
    let ms = Duration::from_millis;
    // On an idle machine it is a quarter of a second.
    let margin = ms(20_000);
    let (took, applied) = waited(&[], json!({"ttl_ms": 1000})).await;
    assert!(took < margin && applied.is_none(), "{took:?}");
    let (took, _) = waited(&[], json!({"ttl_ms": 1000, "wait_ms": 200})).await;
    assert!((ms(200)..ms(200) + margin).contains(&took), "{took:?}");
    let (took, _) = waited(&[], json!({"ttl_ms": 1000, "wait_ms": 60_000})).await;
    assert!((ms(400)..ms(400) + margin).contains(&took), "clamped: {took:?}");
    let (took, applied) = waited(&[("prefer", "wait=60")], json!({"ttl_ms": 1000})).await;
    assert!((ms(400)..ms(400) + margin).contains(&took), "{took:?}");
    assert_eq!(
        applied.as_deref(),
        Some("wait=0"),
        "whole seconds of what was clamped"
    );
    let (took, applied) = waited(&[("prefer", "wait=60")], json!({"ttl_ms": 1000, "wait_ms": 0})).await;
    assert!(
        took < margin && applied.is_none(),
        "the body beats the header: {took:?}"
    );
    act(&api, "a", "release", json!({"lock_id": held["lock_id"]}))
        .await
        .is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_release_wakes_one() {
    let api = Arc::new(start().await);
    let first = acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let api = api.clone();
            tokio::spawn(async move {
                acquire(&api, "a", json!({"ttl_ms": 60_000, "wait_ms": 20_000}))
                    .await
                    .is(200)
            })
        })
        .collect();
    eventually("all wait", async || waiters(&api, "a").await == Some(5)).await;
    let mut last = first;
    for left in (0..5).rev() {
        act(&api, "a", "release", json!({"lock_id": last["lock_id"]}))
            .await
            .is(200);
        eventually("one has it", async || waiters(&api, "a").await == Some(left)).await;
        let now = api.get(&format!("{LOCKS}/a")).await.is(200);
        assert!(token(&now) > token(&last));
        last = now;
    }
    for waiter in waiting {
        waiter.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_waiters_are_sent_away() {
    let limits = Limits {
        total: 3,
        per_tenant: 2,
    };
    let api = Arc::new(start_with(|settings| settings.waiters = limits).await);
    acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let api = api.clone();
            tokio::spawn(async move { acquire(&api, "a", json!({"ttl_ms": 1000, "wait_ms": 20_000})).await })
        })
        .collect();
    eventually("two wait", async || waiters(&api, "a").await == Some(2)).await;
    let refused = acquire(&api, "b", json!({"ttl_ms": 60_000, "wait_ms": 1})).await;
    assert!(refused.header("retry-after").is_some());
    refused.problem(503, "unavailable");
    acquire(&api, "b", json!({"ttl_ms": 60_000})).await.is(200);
    // Those who wait for a workspace stand in the same room.
    let main = "/v1/tenants/acme/workspaces/main/default-config/k";
    let body = Some(json!({"value": 1}).to_string());
    let put = api.send(Method::PUT, main, &[("prefer", "wait=1")], body).await;
    put.problem(503, "unavailable");
    for waiter in waiting {
        waiter.abort();
    }
    eventually("they are gone", async || waiters(&api, "a").await == Some(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_hangs_up_waits_no_longer_and_holds_nothing() {
    let api = Arc::new(start().await);
    let held = acquire(&api, "a", json!({"ttl_ms": 60_000})).await.is(200);
    let waiting = {
        let api = api.clone();
        tokio::spawn(async move { acquire(&api, "a", json!({"ttl_ms": 60_000, "wait_ms": 20_000})).await })
    };
    eventually("it waits", async || waiters(&api, "a").await == Some(1)).await;
    waiting.abort();
    eventually("it waits no longer", async || waiters(&api, "a").await == Some(0)).await;
    act(&api, "a", "release", json!({"lock_id": held["lock_id"]}))
        .await
        .is(200);

    // At whatever moment it hangs up: either it was answered, or nothing stays held.
    for round in 0..40 {
        let asked = tokio::spawn({
            let api = api.clone();
            async move { acquire(&api, "b", json!({"ttl_ms": 60_000})).await }
        });
        tokio::time::sleep(Duration::from_micros(150 * round)).await;
        asked.abort();
        match asked.await {
            Ok(answer) => {
                let granted = answer.is(200);
                act(&api, "b", "release", json!({"lock_id": granted["lock_id"]}))
                    .await
                    .is(200);
            }
            Err(_) => {
                eventually("nobody holds it", async || {
                    api.get(&format!("{LOCKS}/b")).await.status == 404
                })
                .await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_takes_a_lock_away() {
    let api = start().await;
    let writer = api.with_key(&api.new_key("w", Role::Writer, Some("acme")).await);
    let held = json!({"ttl_ms": 60_000, "metadata": {"run": 7}});
    let granted = acquire(&writer, "a", held).await.is(200);
    let shown = api.get(&format!("{LOCKS}/a")).await.is(200);
    let path = format!("{LOCKS}/a?reason=stuck");
    writer.delete(&path).await.problem(403, "forbidden");
    api.delete(&format!("{LOCKS}/a"))
        .await
        .problem(400, "invalid_request");
    api.delete(&format!("{LOCKS}/a?reason="))
        .await
        .problem(422, "invalid_request");
    let ended = api.delete(&path).await.is(200);
    assert_eq!(
        (&ended["lock_id"], &ended["name"]),
        (&granted["lock_id"], &json!("a"))
    );
    assert_eq!(ended["holder"]["owner"], "w");
    assert_eq!(ended["holder"]["metadata"], json!({"run": 7}));
    assert_eq!(ended["holder"], shown["holder"]);
    api.delete(&path).await.problem(404, "not_found");
    act(&writer, "a", "extend", json!({"lock_id": granted["lock_id"]}))
        .await
        .problem(409, "lock_lost");
    let next = acquire(&writer, "a", json!({"ttl_ms": 60_000})).await.is(200);
    assert!(
        token(&next) > token(&granted) + 1,
        "the token was raised in between"
    );
    let audit = "SELECT name, released_by, reason FROM leasehold.lock_audit";
    let row = api.client().await.query_one(audit, &[]).await.unwrap();
    assert_eq!(
        (row.get(0), row.get(1), row.get(2)),
        ("|4:lock|4:acme|1:a", "root", "stuck")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_are_listed_by_tenant_and_page() {
    let api = start().await;
    for name in ["c", "a", "b", "e%2Ff", "d"] {
        acquire(&api, name, json!({"ttl_ms": 60_000})).await.is(200);
    }
    let elsewhere = "/v1/tenants/globex/locks/a/acquire";
    api.post(elsewhere, json!({"ttl_ms": 60_000})).await.is(200);
    // A name that only begins alike is another tenant's, and one with more parts is no lock of this kind.
    let locks = api.db.leases();
    for parts in [&["lock", "acme-b", "x"][..], &["lock", "acme", "x", "y"]] {
        let request = LockRequest::new(LockName::new(parts).unwrap(), Holder::new("o", "op"));
        std::mem::drop(tokio::spawn({
            let locks = locks.clone();
            async move {
                let guard = locks.try_acquire(&request).await.unwrap();
                guard.lost().await;
            }
        }));
    }
    eventually("all are held", async || {
        let count = "SELECT count(*) FROM leasehold.leases WHERE lock_id IS NOT NULL";
        api.client()
            .await
            .query_one(count, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 8
    })
    .await;
    let mut names = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("{LOCKS}?limit=2{cursor}")).await.is(200);
        names.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|item| item["name"].clone()),
        );
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(names, ["c", "a", "b", "e/f", "d"], "oldest first");
    // The second is long before every time of the database.
    for bad in ["x", "lf0000000000000007c343a6c6f636b7c343a61636d657c313a61"] {
        api.get(&format!("{LOCKS}?cursor={bad}"))
            .await
            .problem(400, "invalid_request");
    }
    api.get(&format!("{LOCKS}?limit=201"))
        .await
        .problem(422, "invalid_request");
    let reader = api.with_key(&api.new_key("r", Role::Reader, Some("globex")).await);
    reader.get(LOCKS).await.problem(404, "not_found");
    let items = reader.get("/v1/tenants/globex/locks").await.is(200)["items"].clone();
    assert_eq!(items.as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_before_anything_is_held() {
    let api = start().await;
    let reader = api.with_key(&api.new_key("r", Role::Reader, None).await);
    let good = json!({"ttl_ms": 1_000});
    acquire(&api.with_key("lh_no"), "a", good.clone())
        .await
        .problem(401, "unauthenticated");
    acquire(&reader, "a", good.clone())
        .await
        .problem(403, "forbidden");
    let nowhere = "/v1/tenants/none/locks/a/acquire";
    api.post(nowhere, good.clone()).await.problem(404, "not_found");
    let long = "x".repeat(257);
    acquire(&api, &long, good.clone())
        .await
        .problem(400, "invalid_request");
    acquire(&api, &"x".repeat(256), good.clone()).await.is(200);
    acquire(&api, "a%00b", good).await.problem(400, "invalid_request");
    for (body, field) in [
        (json!({}), "ttl_ms"),
        (json!({"ttl_ms": 99}), "ttl_ms"),
        (json!({"ttl_ms": -1}), "ttl_ms"),
        (json!({"ttl_ms": 86_400_001}), "ttl_ms"),
        (json!({"ttl_ms": 1000, "max_hold_ms": 999}), "max_hold_ms"),
        (json!({"ttl_ms": 1000, "wait_ms": -1}), "wait_ms"),
        (json!({"ttl_ms": 1000, "lock_id": "seven"}), "lock_id"),
        (json!({"ttl_ms": 1000, "operation": "x".repeat(257)}), "operation"),
        (
            json!({"ttl_ms": 1000, "metadata": {"m": "x".repeat(4096)}}),
            "metadata",
        ),
        (json!({"ttl_ms": 1000, "metadata": []}), "metadata"),
        (json!({"ttl_ms": 1000, "wiat_ms": 1}), "wiat_ms"),
    ] {
        let problem = acquire(&api, "a", body.clone())
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], field, "{body}");
    }
    api.get(&format!("{LOCKS}/a")).await.problem(404, "not_found");
    act(&api, "a", "release", json!({}))
        .await
        .problem(422, "invalid_request");
    act(
        &api,
        "a",
        "extend",
        json!({"lock_id": Uuid::new_v4(), "ttl_ms": 1}),
    )
    .await
    .problem(422, "invalid_request");
    act(&api, "a", "extend", json!({"lock_id": Uuid::new_v4()}))
        .await
        .problem(409, "lock_lost");
}

/// Five hundred who wait for one name hold none of the eight connections.
#[tokio::test(flavor = "multi_thread")]
async fn heavy_five_hundred_wait_and_others_are_served() {
    let api = Arc::new(start().await);
    let held = acquire(&api, "a", json!({"ttl_ms": 600_000})).await.is(200);
    let asked = Instant::now();
    let waiting: Vec<_> = (0..500)
        .map(|_| {
            let api = api.clone();
            tokio::spawn(async move {
                let start = Instant::now();
                let answer = acquire(&api, "a", json!({"ttl_ms": 600_000, "wait_ms": 15_000})).await;
                (answer, start.elapsed())
            })
        })
        .collect();
    eventually("all wait", async || waiters(&api, "a").await == Some(500)).await;
    assert!(asked.elapsed() < Duration::from_secs(14), "they still wait");
    for n in 0..20 {
        let name = format!("free-{n}");
        let granted = acquire(&api, &name, json!({"ttl_ms": 60_000})).await.is(200);
        act(&api, &name, "release", json!({"lock_id": granted["lock_id"]}))
            .await
            .is(200);
    }
    act(&api, "a", "release", json!({"lock_id": held["lock_id"]}))
        .await
        .is(200);
    let (mut granted, mut refused) = (0, 0);
    for waiter in waiting {
        let (answer, took) = waiter.await.unwrap();
        match answer.status {
            200 => granted += 1,
            _ => {
                answer.problem(409, "lock_held");
                refused += 1;
                // On an idle machine it is less than a quarter of a second more than was asked for.
                let longest = Duration::from_secs(30);
                assert!((Duration::from_secs(15)..longest).contains(&took), "{took:?}");
            }
        }
    }
    assert_eq!((granted, refused), (1, 499), "one release wakes one");
}
