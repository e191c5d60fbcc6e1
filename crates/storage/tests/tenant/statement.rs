//! The gate as a condition of an insert.

use diesel::expression::IntoSql;
use diesel::sql_types::{BigInt, Text};
use diesel::{Insertable, QueryDsl};
use leasehold_storage::{Prepared, TenantGate};

use super::{Bench, Failure, LONG, SHORT, UnderWay, assert_conflict, purge, purge_in_background};
use crate::support::eventually;
use leasehold_domain::TenantConflictReason::WritesInProgress;

diesel::table! {
    rows (value) {
        tenant_id -> Text,
        value -> BigInt,
    }
}

/// The statement of the docs.
macro_rules! gated_insert {
    ($tenant:expr, $value:expr) => {
        diesel::select(($tenant.into_sql::<Text>(), $value.into_sql::<BigInt>()))
            .filter(TenantGate::gate($tenant).unwrap())
            .insert_into(rows::table)
            .into_columns((rows::tenant_id, rows::value))
    };
}

async fn insert(bench: &Bench, tenant: &'static str, value: i64) -> usize {
    let inserted = bench.process.read(async |conn| {
        diesel_async::RunQueryDsl::execute(Prepared(gated_insert!(tenant, value)), conn).await
    });
    inserted
        .await
        .map_err(|error: leasehold_storage::WorkError<Failure>| error)
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_insert_inserts_nothing_under_a_drain() {
    let bench = Bench::start().await;
    assert_eq!(insert(&bench, "a", 1).await, 1);
    let writer = UnderWay::write(&bench, "a", 2).await;
    let waiting = purge_in_background(&bench, "a", LONG);
    bench.waiting_drain("a").await;
    assert_eq!(insert(&bench, "a", 3).await, 0);
    assert_eq!(insert(&bench, "b", 3).await, 1);
    writer.end().await;
    assert_eq!(waiting.await.unwrap().unwrap().value, 2);
    let drain = UnderWay::purge(&bench, "a").await;
    assert_eq!(insert(&bench, "a", 4).await, 0);
    drain.end().await;
    assert_eq!(insert(&bench, "a", 5).await, 1);
    assert_eq!(bench.values("a").await, [5]);
    bench.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_insert_inside_a_transaction_is_waited_for() {
    let bench = Bench::start().await;
    bench
        .process
        .transaction(async |conn| {
            let insert = Prepared(gated_insert!("a", 1));
            assert_eq!(diesel_async::RunQueryDsl::execute(insert, conn).await?, 1);
            assert_conflict(&purge(&bench.gate(), "a", SHORT).await, "a", WritesInProgress);
            Ok::<_, Failure>(())
        })
        .await
        .unwrap();
    assert_eq!(purge(&bench.gate(), "a", SHORT).await.unwrap().value, 1);
}

/// As a condition of each row it might be asked for once a row, and some rows be inserted and others not.
#[tokio::test(flavor = "multi_thread")]
async fn a_gate_in_a_statement_is_asked_for_once() {
    let bench = Bench::start().await;
    let explain = async |sql: String| -> String {
        let rows = bench.client.query(&sql, &[]).await.unwrap();
        rows.iter()
            .map(|row| row.get::<_, &str>(0).to_owned() + "\n")
            .collect()
    };
    // The statement as Diesel writes it.
    let text = diesel::debug_query::<diesel::pg::Pg, _>(&gated_insert!("a", 1)).to_string();
    let (sql, _) = text.split_once(" -- binds").unwrap();
    bench
        .client
        .batch_execute(&format!("PREPARE gated AS {sql}"))
        .await
        .unwrap();
    let key = TenantGate::key("a").unwrap();
    let plan = explain(format!("EXPLAIN (COSTS OFF) EXECUTE gated ('a', 1, {key})")).await;
    assert!(
        plan.contains("InitPlan") && plan.contains("One-Time Filter"),
        "{plan}"
    );
    // And one by hand that inserts several rows.
    let plan = explain(format!(
        "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF)
         INSERT INTO rows SELECT 'a', number FROM generate_series(1, 3) AS number
         WHERE (SELECT pg_try_advisory_xact_lock_shared({key}))"
    ));
    let plan = plan.await;
    let (_, asked) = plan.split_once("InitPlan").expect(&plan);
    assert!(plan.contains("One-Time Filter"), "{plan}");
    // From 18 on rows have decimals.
    let asked = asked.replace("rows=1.00 ", "rows=1 ");
    assert!(asked.contains("rows=1 loops=1"), "{plan}");
    assert_eq!(bench.values("a").await, [1, 2, 3]);
}

/// Why it is offered for inserts that read nothing: what a statement reads was there when it began, and its gate comes
/// afterwards. A whole drain may lie in between, and what it removed comes back.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_statement_reads_is_older_than_its_gate() {
    /// Copies the rows of a tenant; until the lock 42 is free it has begun and not asked for the gate.
    const COPY: &str = "
        WITH begun AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(42) AS late),
             gate AS MATERIALIZED (SELECT pg_try_advisory_xact_lock_shared($1) AS open FROM begun)
        INSERT INTO rows SELECT tenant_id, value + 100 FROM rows, gate WHERE open AND tenant_id = 'a'";
    let bench = Bench::start().await;
    let key = TenantGate::key("a").unwrap();
    let has_begun = async || {
        eventually("the copy has begun", async || {
            let sql = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            !bench.client.query(sql, &[]).await.unwrap().is_empty()
        })
        .await;
    };
    let copy = |client: tokio_postgres::Client, in_a_statement_of_its_own: bool| {
        tokio::spawn(async move {
            client.batch_execute("BEGIN").await.unwrap();
            if in_a_statement_of_its_own {
                let enter = "SELECT pg_try_advisory_xact_lock_shared($1)";
                assert!(client.query_one(enter, &[&key]).await.unwrap().get::<_, bool>(0));
            }
            let copied = client.execute(COPY, &[&key]).await.unwrap();
            client.batch_execute("COMMIT").await.unwrap();
            copied
        })
    };

    bench
        .client
        .batch_execute("INSERT INTO rows VALUES ('a', 1); SELECT pg_advisory_lock(42)")
        .await
        .unwrap();
    let copying = copy(bench.database.client().await, false);
    has_begun().await;
    assert_eq!(purge(&bench.gate(), "a", SHORT).await.unwrap().value, 1);
    bench
        .client
        .batch_execute("SELECT pg_advisory_unlock(42)")
        .await
        .unwrap();
    assert_eq!(copying.await.unwrap(), 1);
    assert_eq!(bench.values("a").await, [101], "what was removed has come back");

    // Who enters first is waited for.
    bench
        .client
        .batch_execute("SELECT pg_advisory_lock(42)")
        .await
        .unwrap();
    let copying = copy(bench.database.client().await, true);
    has_begun().await;
    assert_conflict(&purge(&bench.gate(), "a", SHORT).await, "a", WritesInProgress);
    bench
        .client
        .batch_execute("SELECT pg_advisory_unlock(42)")
        .await
        .unwrap();
    assert_eq!(copying.await.unwrap(), 1);
    assert_eq!(purge(&bench.gate(), "a", SHORT).await.unwrap().value, 2);
    assert!(bench.values("a").await.is_empty());
}
