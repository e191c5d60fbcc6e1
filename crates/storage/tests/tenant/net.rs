//! Tables that take the gate themselves: what writes that know nothing of it meet.

use leasehold_domain::TenantConflictReason::WritesInProgress;
use leasehold_storage::TenantGate;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use crate::support::eventually;

use super::{Bench, Failure, LONG, SHORT, UnderWay, assert_conflict, purge, purge_in_background};

/// The table of [`Bench`], and one that has a lock in its rows.
async fn gated() -> Bench {
    let bench = Bench::start().await;
    let tables = "
        SELECT leasehold.gate_table('rows', 'tenant_id');
        CREATE TABLE notes (id BIGINT PRIMARY KEY, \"the tenant\" TEXT, note TEXT, lock_by TEXT);
        SELECT leasehold.gate_table('notes', 'the tenant', watched => '{id,note}');
        INSERT INTO rows SELECT tenant, 1 FROM unnest('{a,b,c}'::text[]) AS tenant;
        INSERT INTO notes VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, NULL)";
    bench.client.batch_execute(tables).await.unwrap();
    bench
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, table: &str) {
    let error = result.expect_err("refused");
    let told = error.as_db_error().unwrap();
    assert_eq!(*told.code(), SqlState::LOCK_NOT_AVAILABLE, "{told:?}");
    assert_eq!(told.table(), Some(table), "{told:?}");
}

/// How many rows a plain statement changes.
async fn run(client: &Client, sql: &str) -> Result<u64, Error> {
    client.execute(sql, &[]).await
}

const WRITES: [&str; 5] = [
    "INSERT INTO rows VALUES ('a', 2)",
    "UPDATE rows SET value = value + 1 WHERE tenant_id = 'a'",
    "DELETE FROM rows WHERE tenant_id = 'a'",
    "WITH more AS (INSERT INTO rows VALUES ('b', 9), ('a', 9) RETURNING 1) SELECT FROM more",
    "INSERT INTO rows SELECT 'a', 7 FROM generate_series(1, 3)",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_knows_no_gate_is_refused_while_a_drain_has_the_tenant_or_waits() {
    let bench = gated().await;
    let writer = UnderWay::write(&bench, "a", 2).await;
    let waiting = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    for sql in WRITES {
        assert_refused(run(&bench.client, sql).await, "rows");
    }
    writer.end().await;
    waiting.await.unwrap().unwrap();
    bench
        .client
        .batch_execute("INSERT INTO rows VALUES ('a', 1)")
        .await
        .unwrap();
    let drain = UnderWay::idle_drain(&bench, "a").await;
    for sql in WRITES {
        assert_refused(run(&bench.client, sql).await, "rows");
    }
    let copy = bench.client.copy_in("COPY rows FROM STDIN").await.unwrap();
    let mut copy = Box::pin(copy);
    futures_util::SinkExt::send(&mut copy, "a\t1\n".as_bytes())
        .await
        .unwrap();
    assert_refused(copy.as_mut().finish().await, "rows");
    // Others write on.
    assert_eq!(
        run(&bench.client, "INSERT INTO rows VALUES ('b', 2)")
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        run(&bench.client, "UPDATE rows SET value = 3 WHERE tenant_id = 'b'")
            .await
            .unwrap(),
        2
    );
    drain.end().await;
    assert_eq!(bench.values("a").await, [1]);
    assert_eq!(run(&bench.client, WRITES[0]).await.unwrap(), 1);
    assert_eq!(bench.values("b").await, [3, 3]);
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_a_write_that_knows_no_gate() {
    for sql in WRITES {
        let bench = gated().await;
        let stranger = bench.database.client().await;
        stranger.batch_execute("BEGIN").await.unwrap();
        run(&stranger, sql).await.unwrap();
        assert_conflict(&purge(&bench.gate(), "a", SHORT).await, "a", WritesInProgress);
        let waiting = purge_in_background(&bench, "a", LONG);
        bench.waiting_drain("a").await;
        // It goes on although a drain waits: it has entered.
        run(&stranger, "INSERT INTO rows VALUES ('a', 100)")
            .await
            .unwrap();
        stranger.batch_execute("COMMIT").await.unwrap();
        assert!(waiting.await.unwrap().unwrap().value >= 1, "{sql}");
        assert!(bench.values("a").await.is_empty(), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_moves_takes_both_gates() {
    let bench = gated().await;
    let stranger = bench.database.client().await;
    for (drained, table, moves) in [
        (
            "a",
            "rows",
            "UPDATE rows SET tenant_id = 'b' WHERE tenant_id = 'a'",
        ),
        (
            "b",
            "rows",
            "UPDATE rows SET tenant_id = 'b' WHERE tenant_id = 'a'",
        ),
        // Its tenant is watched whether it is listed or not.
        ("a", "notes", "UPDATE notes SET \"the tenant\" = 'b' WHERE id = 1"),
        ("b", "notes", "UPDATE notes SET \"the tenant\" = 'b' WHERE id = 1"),
    ] {
        let drain = UnderWay::idle_drain(&bench, drained).await;
        assert_refused(run(&stranger, moves).await, table);
        drain.end().await;
        run(&stranger, "INSERT INTO rows VALUES ('a', 1)").await.unwrap();
        stranger.batch_execute("BEGIN").await.unwrap();
        run(&stranger, moves).await.unwrap();
        for tenant in ["a", "b"] {
            assert_conflict(
                &purge(&bench.gate(), tenant, SHORT).await,
                tenant,
                WritesInProgress,
            );
        }
        purge(&bench.gate(), "c", SHORT).await.unwrap();
        stranger.batch_execute("ROLLBACK").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_are_not_watched_are_no_write_of_the_tenant() {
    let bench = gated().await;
    let drain = UnderWay::idle_drain(&bench, "a").await;
    let by = "UPDATE notes SET lock_by = 'alice' WHERE id = 1";
    assert_eq!(run(&bench.client, by).await.unwrap(), 1);
    for sql in [
        "UPDATE notes SET note = 'x' WHERE id = 1",
        "UPDATE notes SET lock_by = 'bob', note = 'x' WHERE id = 1",
        "INSERT INTO notes VALUES (1, 'a') ON CONFLICT (id) DO UPDATE SET lock_by = 'bob'",
        "DELETE FROM notes WHERE id = 1",
    ] {
        assert_refused(run(&bench.client, sql).await, "notes");
    }
    drain.end().await;
    // A row without a tenant has no gate.
    assert_eq!(
        run(&bench.client, "UPDATE notes SET note = 'x' WHERE id = 4")
            .await
            .unwrap(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_inside_writes_on_although_a_drain_waits() {
    let bench = gated().await;
    let gate = bench.gate();
    let waiting = gate
        .write(&["a"], async |conn| {
            let waiting = purge_in_background(&bench, "a", LONG);
            bench.waiting_drain("a").await;
            TenantGate::enter_in_tx(conn, &["a"])
                .await
                .expect("it is entered already");
            super::insert(conn, "a", 5).await?;
            Ok::<_, Failure>(waiting)
        })
        .await;
    let waiting = waiting.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().value, 2);
}

/// A row that the drain has removed already is waited for as every row is that somebody else has changed, and is gone then.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_row_that_the_drain_has_removed_finds_none() {
    let bench = gated().await;
    let drain = UnderWay::purge(&bench, "a").await;
    let stranger = bench.database.client().await;
    let changing = tokio::spawn(async move { run(&stranger, WRITES[1]).await });
    eventually("it waits for the row", async || {
        let sql = "SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
                   WHERE datname = current_database() AND locktype = 'transactionid' AND NOT granted";
        !bench.client.query(sql, &[]).await.unwrap().is_empty()
    })
    .await;
    assert_eq!(drain.end().await.value, 1);
    assert_eq!(changing.await.unwrap().unwrap(), 0);
}

/// The statements of the drain itself pass, and what they cascade to.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_writes_to_its_own_tenant() {
    let bench = gated().await;
    let children = "
        CREATE TABLE parents (id BIGINT PRIMARY KEY, tenant_id TEXT);
        CREATE TABLE children (parent BIGINT REFERENCES parents ON DELETE CASCADE, tenant_id TEXT);
        SELECT leasehold.gate_table('parents', 'tenant_id'), leasehold.gate_table('children', 'tenant_id');
        INSERT INTO parents VALUES (1, 'a'), (2, 'b');
        INSERT INTO children VALUES (1, 'a'), (2, 'b')";
    bench.client.batch_execute(children).await.unwrap();
    let gate = bench.gate();
    let drained = gate.drain("a", SHORT, async |conn| {
        diesel_async::SimpleAsyncConnection::batch_execute(
            conn,
            "DELETE FROM parents WHERE tenant_id = 'a'; INSERT INTO rows VALUES ('a', 3)",
        )
        .await
    });
    drained.await.unwrap();
    let left = "SELECT (SELECT count(*) FROM parents), (SELECT count(*) FROM children)";
    let row = bench.client.query_one(left, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 1));
    assert_eq!(bench.values("a").await, [1, 3]);
}

/// A program needs no right to anything of ours.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_only_write_the_table_passes_and_is_refused_like_others() {
    let bench = gated().await;
    let role = format!("writer_{}", bench.database.name());
    let make = format!("CREATE ROLE {role}; GRANT INSERT ON rows TO {role}");
    bench.client.batch_execute(&make).await.unwrap();
    let stranger = bench.database.client().await;
    stranger.batch_execute(&format!("SET ROLE {role}")).await.unwrap();
    assert_eq!(run(&stranger, WRITES[0]).await.unwrap(), 1);
    let drain = UnderWay::idle_drain(&bench, "a").await;
    assert_refused(run(&stranger, WRITES[0]).await, "rows");
    drain.end().await;
    drop(stranger);
    let drop = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    bench.client.batch_execute(&drop).await.unwrap();
}

/// What the net does not catch: a statement that names no rows.
#[tokio::test(flavor = "multi_thread")]
async fn truncate_passes() {
    let bench = gated().await;
    let writer = UnderWay::write(&bench, "c", 2).await;
    let drain = purge_in_background(&bench, "c", LONG);
    bench.waiting_drain("c").await;
    bench.client.batch_execute("TRUNCATE notes").await.unwrap();
    writer.end().await;
    drain.await.unwrap().unwrap();
}
