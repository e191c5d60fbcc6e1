//! Who holds leases now, a page at a time: only of those that are asked for, and without a look at all others.

use std::time::Duration;

use leasehold_domain::{DistributedLock, Holder, LockName, LockRequest};
use leasehold_storage::Database;
use leasehold_storage::migrate::Migrations;

use crate::support::{TestDatabase, eventually};

/// A database whose own order is not that of bytes, where there is one: an index in that order tells no beginnings.
async fn database() -> TestDatabase {
    let orders = "SELECT collcollate FROM pg_collation
                  WHERE collprovider = 'c' AND collencoding = pg_char_to_encoding('UTF8')
                    AND collcollate NOT IN ('C', 'POSIX') LIMIT 1";
    let server = TestDatabase::create_empty().await;
    let found = server.client().await.query_opt(orders, &[]).await.unwrap();
    let order: String = found.map_or_else(|| "C".to_owned(), |row| row.get(0));
    TestDatabase::create_with(&format!(
        "TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE '{order}' LC_CTYPE '{order}'"
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_leases_reads_only_those_that_begin_so() {
    let database = database().await;
    Migrations::storage().run(&database.options()).await.unwrap();
    let process = Database::connect(database.options(), 2).await.unwrap();
    let lock = process.leases();
    let mut guards = Vec::new();
    for parts in [
        &["lock", "a", "x"][..],
        &["lock", "a", "x", "y"],
        &["lock", "a", "größe~"],
        &["lock", "ab", "x"],
        &["lock", "a|1:x", "x"],
    ] {
        let request = LockRequest::new(LockName::new(parts).unwrap(), Holder::new("alice", "edit"))
            .with_ttl(Duration::from_secs(600));
        guards.push(lock.try_acquire(&request).await.unwrap());
    }
    let held = async |first_parts: &[&str]| -> Vec<String> {
        let page = process.held_leases(first_parts, None, 100_000).await.unwrap();
        page.iter().map(|lock| lock.name.to_string()).collect()
    };
    let everything = async || {
        assert_eq!(
            held(&["lock", "a"]).await,
            ["lock/a/x", "lock/a/x/y", "lock/a/größe~"]
        );
        assert_eq!(held(&["lock", "a", "x"]).await, ["lock/a/x", "lock/a/x/y"]);
        assert_eq!(held(&["lock", "ab"]).await, ["lock/ab/x"]);
        assert_eq!(held(&["lock", "a|1:x"]).await, ["lock/a|1:x/x"]);
        assert_eq!(held(&["lock", "b"]).await, [""; 0]);
    };
    // More often than it takes for plans to be kept.
    for _ in 0..10 {
        everything().await;
    }
    assert_eq!(held(&[]).await.len(), 5);

    let client = database.client().await;
    client
        .batch_execute(
            "INSERT INTO leasehold.leases (name, lock_id, operation, locked_by, acquired_at, expires_at)
             SELECT '|4:lock|5:other|' || length(n::text) || ':' || n, gen_random_uuid(), 'edit', 'bob',
                    clock_timestamp(), clock_timestamp() + interval '1 hour'
             FROM generate_series(1, 20000) AS n",
        )
        .await
        .unwrap();
    // As the server does by itself soon after.
    client.batch_execute("ANALYZE leasehold.leases").await.unwrap();
    assert_eq!(held(&[]).await.len(), 20_005);

    // Sessions tell what they have read when they end.
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let read = async || -> (i64, i64) {
        eventually("every session has ended", async || {
            client.query_one(ended, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        let read = "SELECT seq_tup_read, coalesce(idx_tup_fetch, 0), pg_stat_clear_snapshot() IS NULL
                    FROM pg_stat_user_tables WHERE schemaname = 'leasehold' AND relname = 'leases'";
        let row = client.query_one(read, &[]).await.unwrap();
        (row.get(0), row.get(1))
    };
    let before = read().await;
    for _ in 0..10 {
        everything().await;
    }
    let after = read().await;
    assert_eq!(after.0 - before.0, 0, "rows read from end to end");
    let fetched = after.1 - before.1;
    assert!((10..1000).contains(&fetched), "{fetched} rows were read");
}
