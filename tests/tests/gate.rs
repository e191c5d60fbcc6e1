//! The gate of a tenant over the wire: what it costs, and what is told when an answer is lost.

use diesel::expression::IntoSql;
use diesel::sql_types::BigInt;
use diesel::{Insertable, QueryDsl};
use diesel_async::RunQueryDsl;
use leasehold_domain::{AcquireError, DistributedLock, LockName};
use leasehold_storage::tenant::{GateError, Gated};
use leasehold_storage::{Database, Prepared, TenantGate, TransactionError};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::proxy::Fault;

use crate::bench::{Bench, Failure, insert, named, write_unguarded};

diesel::table! {
    written (value) {
        value -> BigInt,
    }
}

/// What only the statement that enters gates contains.
const ENTER: &str = "WITH ORDINALITY AS gates";

async fn write(process: &Database, tenants: &[&str], value: i64) -> Result<(), GateError<Failure>> {
    process
        .tenant_gate()
        .write(tenants, async |conn| insert(conn, value).await)
        .await
}

/// Answers how many rows were inserted.
async fn insert_gated(process: &Database, value: i64) -> usize {
    let inserted = process.read(async |conn| {
        let values = diesel::select(value.into_sql::<BigInt>()).filter(TenantGate::gate("acme").unwrap());
        let insert = values.insert_into(written::table).into_columns(written::value);
        // By path: the trait has an `execute` for everything, the raw client included.
        RunQueryDsl::execute(Prepared(insert), conn).await
    });
    inserted
        .await
        .map_err(|error: leasehold_storage::WorkError<Failure>| error)
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_insert_is_one_round_trip() {
    let bench = Bench::start(1).await;
    insert_gated(&bench.process, 1).await;
    let (inserted, traffic) = bench.proxy.watch(insert_gated(&bench.process, 2)).await;
    assert_eq!(inserted, 1);
    assert_eq!(
        (traffic.round_trips, traffic.statements.len()),
        (1, 1),
        "{traffic:#?}"
    );
    assert!(traffic.statements[0].contains("pg_try_advisory_xact_lock_shared"));
    assert_eq!(bench.written().await, [1, 2]);
}

/// Whatever the number of tenants.
#[tokio::test(flavor = "multi_thread")]
async fn a_gated_write_costs_one_round_trip_more() {
    let bench = Bench::start(1).await;
    let many: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    write_unguarded(&bench.process, -1).await;
    write(&bench.process, &["acme"], -2).await.unwrap();
    let ((), plain) = bench.proxy.watch(write_unguarded(&bench.process, 1)).await;
    for (value, tenants) in (2..).zip([&["acme"], many.as_slice()]) {
        let (result, gated) = bench.proxy.watch(write(&bench.process, tenants, value)).await;
        result.unwrap();
        assert_eq!(gated.round_trips, plain.round_trips + 1, "{gated:#?} {plain:#?}");
        assert_eq!(gated.count(ENTER), 1, "{gated:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_and_a_transaction_lock_are_one_statement() {
    fn tenant_of(name: &LockName) -> Option<&str> {
        name.parts().nth(1)
    }
    let bench = Bench::start(1).await;
    let plain = bench.process.transaction_locks();
    let behind = bench.process.transaction_locks().behind_gates(tenant_of);
    let mut costs = Vec::new();
    for lock in [&plain, &behind] {
        let pair = async || {
            let guard = lock.try_acquire(&named("acme")).await.unwrap();
            lock.release(guard).await.unwrap();
        };
        pair().await;
        let mut least = usize::MAX;
        // What goes on in the background may fall among some of them.
        for _ in 0..5 {
            let ((), traffic) = bench.proxy.watch(pair()).await;
            assert_eq!(traffic.count("pg_try_advisory_xact_lock"), 1, "{traffic:#?}");
            least = least.min(traffic.round_trips);
        }
        costs.push(least);
    }
    assert_eq!(costs[0], costs[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_lease_costs_something_only_when_it_is_refused() {
    fn tenant_of(name: &LockName) -> Option<&str> {
        name.parts().nth(1)
    }
    let bench = Bench::start(1).await;
    let lock = Gated::new(bench.process.leases(), bench.process.tenant_gate(), tenant_of);
    let refuse = async || {
        let refused = lock.try_acquire(&named("acme")).await;
        assert!(matches!(refused, Err(AcquireError::Contended(_))), "{refused:?}");
    };
    lock.release(lock.try_acquire(&named("acme")).await.unwrap())
        .await
        .unwrap();
    let (guard, traffic) = bench.proxy.watch(lock.try_acquire(&named("acme"))).await;
    assert_eq!(traffic.round_trips, 1, "{traffic:#?}");
    refuse().await;
    let ((), traffic) = bench.proxy.watch(refuse()).await;
    assert_eq!(traffic.round_trips, 2, "{traffic:#?}");
    lock.release(guard.unwrap()).await.unwrap();
}

/// A drain waits on a connection of its own: the pool is free meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_waits_holds_no_pooled_connection() {
    let bench = Bench::start(1).await;
    let stranger = bench.database.client().await;
    let key = TenantGate::key("acme").unwrap();
    let shared = format!("BEGIN; SELECT pg_advisory_xact_lock_shared({key})");
    stranger.batch_execute(&shared).await.unwrap();
    let gate = bench.process.tenant_gate();
    let draining = tokio::spawn(async move {
        let minute = std::time::Duration::from_secs(60);
        gate.drain("acme", minute, async |conn| insert(conn, 1).await)
            .await
    });
    eventually("it waits", async || {
        let waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        !bench.client.query(waiting, &[]).await.unwrap().is_empty()
    })
    .await;
    let pool = bench.process.pool().state();
    assert_eq!(pool.open, pool.idle);
    in_time("a write of another tenant", write(&bench.process, &["globex"], 2))
        .await
        .unwrap();
    stranger.batch_execute("COMMIT").await.unwrap();
    in_time("the drain", draining).await.unwrap().unwrap();
    assert_eq!(bench.written().await, [1, 2]);
}

/// The transaction's id came with the gate: its fate can be asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_gated_write_whose_commit_is_not_answered_is_told_as_it_went() {
    let bench = Bench::start(2).await;
    let drain = async |value| {
        let second = std::time::Duration::from_secs(1);
        let drained = bench
            .process
            .tenant_gate()
            .drain("acme", second, async |conn| insert(conn, value).await)
            .await;
        drained.map(|drained| drained.value)
    };
    for (value, fault) in [
        (1, Fault::LoseAnswer),
        (3, Fault::LoseAnswerWithWord),
        (5, Fault::LoseStatement),
    ] {
        let mut lost = bench.proxy.on_commit(fault);
        let written = in_time("the write", write(&bench.process, &["acme"], value)).await;
        lost.happened().await;
        // The server may not have seen yet that the session is gone, and the gate with it.
        eventually("the gate is free", async || {
            bench.database.advisory_locks(&bench.client).await == 0
        })
        .await;
        let mut lost = bench.proxy.on_commit(fault);
        let drained = in_time("the drain", drain(value + 1)).await;
        lost.happened().await;
        for (value, result) in [(value, written), (value + 1, drained)] {
            let there = bench.written().await.contains(&value);
            match result {
                Ok(()) => assert!(there && fault != Fault::LoseStatement, "{fault:?} {value}"),
                Err(GateError::Transaction(TransactionError::Unavailable(_))) => {
                    assert!(!there && fault == Fault::LoseStatement, "{fault:?} {value}");
                }
                other => panic!("{fault:?} {value} {other:?}"),
            }
        }
    }
    assert_eq!(bench.written().await, [1, 2, 3, 4]);
}

/// However long it may wait for writers, nobody waits much longer for a server that says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_at_the_gate_is_not_waited_for() {
    let bench = Bench::start(2).await;
    let second = std::time::Duration::from_secs(1);
    let mut entering = bench.proxy.on(ENTER, Fault::HoldAnswer);
    let mut draining = bench.proxy.on("leasehold.drain_tenant", Fault::HoldAnswer);
    let gate = bench.process.tenant_gate();
    let (written, drained) = tokio::join!(
        in_time("the write", write(&bench.process, &["acme"], 1)),
        in_time(
            "the drain",
            gate.drain("globex", second, async |conn| insert(conn, 2).await)
        ),
    );
    entering.happened().await;
    draining.happened().await;
    for result in [written, drained.map(|drained| drained.value)] {
        assert!(
            matches!(
                result,
                Err(GateError::Transaction(TransactionError::Unavailable(_)))
            ),
            "{result:?}"
        );
    }
    entering.let_go().await;
    draining.let_go().await;
    eventually("the gates are free", async || {
        bench.database.advisory_locks(&bench.client).await == 0
    })
    .await;
    assert!(bench.written().await.is_empty());
}
