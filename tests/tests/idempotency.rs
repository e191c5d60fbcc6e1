//! A write that is sent again with its `Idempotency-Key`, after whatever became of the first answer: one effect, and
//! the first answer.

use leasehold_system_tests::http::{Answer, Call, post};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::proxy::{Fault, Proxy};
use serde_json::json;

use crate::world::{World, in_both_modes, put_key};

in_both_modes!(
    a_key_makes_four_round_trips_more,
    a_write_is_done_once_whichever_round_trip_breaks,
    an_answer_that_was_lost_is_given_again,
    a_service_that_was_killed_behind_its_commit_has_stored_the_answer,
);

fn keyed(call: &Call, key: &str) -> Call {
    call.clone().header("idempotency-key", key)
}

fn is_replay(answer: &Answer) -> bool {
    answer.headers.contains_key("idempotency-replayed")
}

/// Sends it until it is done, as a client would that was told to try again or was told nothing.
async fn done(world: &World, call: &Call, key: &str) -> Answer {
    let again = async {
        loop {
            let answer = world.api.send(keyed(call, key)).await;
            match (answer.status, answer.code().as_str()) {
                (200..300, _) => return answer,
                (503, "unavailable")
                | (409, "lock_lost" | "workspace_locked" | "idempotency_in_progress") => {}
                _ => panic!("{answer:?}"),
            }
        }
    };
    in_time("the write", again).await
}

/// Keeps a line of every event that is written, before it is hushed or handed on.
const COUNT_EVENTS: &str = "
    CREATE TABLE events_written (id UUID);
    CREATE FUNCTION count_event() RETURNS TRIGGER LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO events_written VALUES (NEW.id);
        RETURN NEW;
    END
    $$;
    CREATE TRIGGER count_event BEFORE INSERT ON leasehold.outbox FOR EACH ROW EXECUTE FUNCTION count_event()";

/// What writes have left: versions, events, workspaces, stored answers.
async fn effects(world: &World) -> [i64; 4] {
    let count = "SELECT (SELECT count(*) FROM versions), (SELECT count(*) FROM events_written),
                        (SELECT count(*) FROM workspaces), (SELECT count(*) FROM idempotency_keys)";
    let row = world.client.query_one(count, &[]).await.unwrap();
    [0, 1, 2, 3].map(|column| row.get(column))
}

/// The writes that go two different ways, and what each of them leaves.
fn writes(name: &str) -> [(Call, [i64; 4]); 2] {
    let workspaces = "/v1/tenants/acme/workspaces";
    [
        (put_key("key", name), [1, 1, 0, 1]),
        (post(workspaces, &json!({"name": name})), [0, 1, 1, 1]),
    ]
}

fn sum(one: [i64; 4], other: [i64; 4]) -> [i64; 4] {
    [0, 1, 2, 3].map(|column| one[column] + other[column])
}

async fn warm_up(world: &World) {
    for number in 0..20 {
        let call = put_key("key", number);
        world
            .api
            .send(keyed(&call, &format!("warm-{number}")))
            .await
            .expect(200);
    }
}

async fn behind_a_proxy(mode: &'static str) -> (World, Proxy) {
    let (world, proxy) = World::behind_a_proxy(mode).await;
    world.client.batch_execute(COUNT_EVENTS).await.unwrap();
    warm_up(&world).await;
    (world, proxy)
}

/// One to look before the lock; in the transaction one to take the key, one to look again, and one to store.
async fn a_key_makes_four_round_trips_more(mode: &'static str) {
    let (world, proxy) = behind_a_proxy(mode).await;
    let cost = async |call: Call| {
        // A ping may fall among some.
        let mut least = usize::MAX;
        for number in 0..5 {
            let call = keyed(&call, &format!("cost-{number}"));
            let (answer, traffic) = proxy.watch(world.api.send(call)).await;
            answer.expect(200);
            least = least.min(traffic.round_trips);
        }
        let mut without = usize::MAX;
        for _ in 0..5 {
            let (answer, traffic) = proxy.watch(world.api.send(call.clone())).await;
            answer.expect(200);
            without = without.min(traffic.round_trips);
        }
        let mut replay = usize::MAX;
        for _ in 0..5 {
            let (answer, traffic) = proxy.watch(world.api.send(keyed(&call, "cost-0"))).await;
            assert!(is_replay(&answer));
            replay = replay.min(traffic.round_trips);
        }
        (least, without, replay)
    };
    let (with, without, replay) = cost(put_key("key", 1)).await;
    assert_eq!(with, without + 4);
    assert!(
        replay <= 3,
        "the credentials, the key, and perhaps a ping: {replay}"
    );
}

async fn a_write_is_done_once_whichever_round_trip_breaks(mode: &'static str) {
    let (world, proxy) = behind_a_proxy(mode).await;
    let steps: &[&str] = match mode {
        "lease" => &[
            "seen AS MATERIALIZED",
            "WITH ORDINALITY AS gates",
            "mine AS MATERIALIZED",
        ],
        _ => &["pg_try_advisory_xact_lock($1)"],
    };
    let everywhere = [
        "FROM credentials",
        "LEFT JOIN idempotency_keys",
        "BEGIN",
        "pg_try_advisory_xact_lock(hashtextextended('idempotency|",
        "INSERT INTO default_config",
        "INSERT INTO versions",
        "INSERT INTO idempotency_keys",
        "COMMIT",
    ];
    let mut number = 0;
    for fault in [Fault::LoseStatement, Fault::LoseAnswer, Fault::CutBehind] {
        for step in everywhere.iter().chain(steps) {
            number += 1;
            let (call, key) = (put_key("key", number), format!("{fault:?}-{number}"));
            let what = format!("{fault:?} of {step}");
            let before = effects(&world).await;
            let mut hit = match *step {
                "COMMIT" => proxy.on_commit_of("INSERT INTO idempotency_keys", fault),
                step => proxy.on(step, fault),
            };
            let first = world.api.send(keyed(&call, &key)).await;
            hit.happened().await;
            let again = done(&world, &call, &key).await;
            assert_eq!(
                effects(&world).await,
                sum(before, [1, 1, 0, 1]),
                "{what}: {first:?}"
            );
            if first.status == 200 {
                assert!(is_replay(&again), "{what}");
                assert_eq!(again.body, first.body, "{what}");
            }
            let once_more = done(&world, &call, &key).await;
            assert!(is_replay(&once_more) && once_more.body == again.body, "{what}");
        }
    }
    world.nothing_is_held().await;
}

/// The service itself does not learn what became of its commit: the client is told so, and asks again.
async fn an_answer_that_was_lost_is_given_again(mode: &'static str) {
    let (world, proxy) = behind_a_proxy(mode).await;
    for (call, effect) in writes("unknown") {
        let key = format!("key-{}", effect[0]);
        let before = effects(&world).await;
        let mut hit = proxy.on_commit_of("INSERT INTO idempotency_keys", Fault::LoseAnswerAndGoAway);
        let lost = world.api.send(keyed(&call, &key)).await;
        hit.happened().await;
        assert_eq!(
            (lost.status, lost.code().as_str()),
            (500, "outcome_unknown"),
            "{lost:?}"
        );
        proxy.come_back();
        let again = done(&world, &call, &key).await;
        assert!(is_replay(&again), "{again:?}");
        assert_eq!(effects(&world).await, sum(before, effect), "{again:?}");
    }
}

async fn a_service_that_was_killed_behind_its_commit_has_stored_the_answer(mode: &'static str) {
    for (call, effect) in writes("killed") {
        let (mut world, proxy) = behind_a_proxy(mode).await;
        let before = effects(&world).await;
        let mut hit = proxy.on_commit_of("INSERT INTO idempotency_keys", Fault::HoldAnswer);
        let (api, first) = (world.api.clone(), keyed(&call, "key"));
        let first = tokio::spawn(async move { api.try_send(first).await });
        hit.happened().await;
        eventually("it has committed", async || effects(&world).await != before).await;
        world.service.kill();
        let told = in_time("the end of the connection", first).await.unwrap();
        assert!(told.is_none(), "{told:?}");

        (world.service, world.api) = world.another(|service| service).await;
        let again = done(&world, &call, "key").await;
        assert!(is_replay(&again), "{again:?}");
        assert_eq!(effects(&world).await, sum(before, effect), "{again:?}");
    }
}
