//! Clients that hang up, bodies that are wrong, strangers: afterwards nothing is left behind.

use std::time::Duration;

use leasehold_system_tests::http::{Call, get, post};
use leasehold_system_tests::patience::{eventually, in_time, within};
use leasehold_system_tests::service::ServiceBuilder;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::world::{WORKSPACE, World, in_both_modes, key_path, put_key};

/// How soon the next write must succeed.
const SOON: Duration = Duration::from_secs(5);
const POOL: usize = 4;

in_both_modes!(
    a_client_that_hangs_up_while_it_holds,
    a_client_that_hangs_up_while_it_waits,
    a_client_that_hangs_up_at_any_moment,
    a_client_that_hangs_up_in_the_middle_of_its_body,
    refused_requests_touch_nothing,
);

async fn start(mode: &'static str) -> World {
    World::start_with(mode, small_pool).await
}

fn small_pool(service: ServiceBuilder) -> ServiceBuilder {
    service.set("DATABASE_POOL_SIZE", POOL.to_string())
}

/// The next write succeeds in time, nothing stays held, and the pool has all its connections.
async fn assert_whole(world: &World) {
    within(SOON, "the next write", async || {
        world.api.send(put_key("next", 1)).await.status == 200
    })
    .await;
    world.nothing_is_held().await;
    // Of a pool with leaks, some of these would find no connection until they give up.
    let reads = (0..POOL * 4).map(|_| world.api.send(get(format!("{WORKSPACE}/config"))));
    for answer in in_time("reads on all connections", futures_util::future::join_all(reads)).await {
        answer.expect(200);
    }
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
               AND application_name LIKE 'leasehold%'";
    // The pool, two lock sessions, the heartbeat, the reaper, the listener and presence.
    let most = i64::try_from(POOL).unwrap() + 6;
    eventually(&format!("{most} sessions at most"), async || {
        world.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) <= most
    })
    .await;
}

async fn a_client_that_hangs_up_while_it_holds(mode: &'static str) {
    let world = start(mode).await;
    for _ in 0..POOL + 2 {
        let holding = world.hold().await;
        world.api.send(put_key("next", 1)).await.expect(409);
        // The row it wanted stays locked: nothing but the hang-up frees the workspace.
        let _row_stays_locked = holding.hang_up().await;
        assert_whole(&world).await;
    }
    let gate = world.api.send(get(key_path("gate"))).await.expect(200).json();
    assert_eq!(gate["value"], "open");
}

async fn a_client_that_hangs_up_while_it_waits(mode: &'static str) {
    let world = start(mode).await;
    let holding = world.hold().await;
    let waiting = put_key("waiting", 1).header("prefer", "wait=30");
    let mut waiters = Vec::new();
    for _ in 0..30 {
        waiters.push(world.api.send_only(&waiting).await);
    }
    // They wait, and hold no connection while they do.
    eventually("the service still answers", async || {
        let asked = world.api.send(put_key("next", 1)).await;
        (asked.status, asked.code().as_str()) == (409, "workspace_locked")
    })
    .await;
    for waiter in &mut waiters {
        let nothing = tokio::time::timeout(Duration::from_millis(1), waiter.read_u8()).await;
        assert!(nothing.is_err(), "{nothing:?}");
    }
    drop(waiters);
    holding.go_on().await.expect(200);
    assert_whole(&world).await;
    // None of them has written after all.
    world.api.send(get(key_path("waiting"))).await.expect(404);
}

/// After every little while from the moment the request is sent, until long after its answer.
async fn a_client_that_hangs_up_at_any_moment(mode: &'static str) {
    let world = start(mode).await;
    let batch = post(
        format!("{WORKSPACE}/default-config/batch"),
        &json!({"operations": (0..50).map(|n| json!({"op": "put", "key": format!("k{n}"), "value": n}))
            .collect::<Vec<_>>()}),
    );
    for call in [put_key("swept", 1), batch] {
        for step in 0..40 {
            let stream = world.api.send_only(&call).await;
            tokio::time::sleep(Duration::from_micros(250) * step).await;
            drop(stream);
        }
        // During the answer: its first byte has come.
        for _ in 0..10 {
            let mut stream = world
                .api
                .send_only(&call.clone().header("prefer", "wait=10"))
                .await;
            in_time("the first byte", stream.read_u8()).await.unwrap();
        }
        assert_whole(&world).await;
    }
    // Whatever was written was written whole, and made a version.
    let sql = "SELECT count(*), max(version) FROM versions";
    let row = world.client.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1));
    assert_eq!(world.version().await, row.get::<_, i64>(1));
}

async fn a_client_that_hangs_up_in_the_middle_of_its_body(mode: &'static str) {
    let world = start(mode).await;
    world.api.send(put_key("warm", 1)).await.expect(200);
    let before = row_version(&world).await;
    for _ in 0..20 {
        // More is announced than comes.
        let call = Call::put_text(key_path("a"), "{\"value\": 1}");
        let stream = world.api.send_only(&call.announcing(100)).await;
        drop(stream);
    }
    assert_eq!(row_version(&world).await, before, "the lock was touched");
    assert_whole(&world).await;
    world.api.send(get(key_path("a"))).await.expect(404);
}

async fn refused_requests_touch_nothing(mode: &'static str) {
    let world = start(mode).await;
    world.api.send(put_key("warm", 1)).await.expect(200);
    let before = row_version(&world).await;
    let stranger = world.api.with_key("lh_nobody_has_this_key");
    let mut connection = world.api.connect().await;
    for _ in 0..50 {
        stranger.send(put_key("a", 1)).await.expect(401);
        connection
            .send(Call::put_text(key_path("a"), "{\"value\": "))
            .await
            .expect(400);
        connection
            .send(Call::put_text(key_path("a"), "[]"))
            .await
            .expect(422);
    }
    assert_eq!(row_version(&world).await, before, "the lock was touched");
    assert_whole(&world).await;
}

/// Changes with every change of the workspace's row, its lock included.
async fn row_version(world: &World) -> String {
    let sql = "SELECT xmin::text || ctid::text FROM workspaces WHERE tenant_id = 'acme'";
    world.client.query_one(sql, &[]).await.unwrap().get(0)
}
