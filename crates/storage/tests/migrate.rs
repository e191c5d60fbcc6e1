//! Migrations: once each, whole or not at all, from any number of processes, past newer and older versions.

use futures_util::future::join_all;
use leasehold_storage::migrate::{MigrateError, Migration, MigrationSet, Migrations};

use crate::support::TestDatabase;
use crate::support::pooler::{Next, Pooler};

const PLANS: Migration = Migration {
    name: "2026-11-21-000001_plans",
    sql: "CREATE TABLE plans (id BIGINT PRIMARY KEY);\n",
};
const OWNERS: Migration = Migration {
    name: "2027-01-05-000001_owners",
    sql: "-- It's a comment; with a quote\nALTER TABLE plans ADD COLUMN owner TEXT NOT NULL DEFAULT 'it''s; me'",
};

/// A component of somebody else. Its first version is one that the library's own steps have as well.
const OLD: MigrationSet = MigrationSet {
    component: "plans",
    schema: "public",
    works_since: "2026-11-21-000001",
    steps: &[PLANS],
};
/// A later version of it, which the old one still works with.
const ADDED: MigrationSet = MigrationSet {
    component: "plans",
    schema: "public",
    works_since: "2026-11-21-000001",
    steps: &[PLANS, OWNERS],
};
/// The same, but the old one does not.
const BREAKING: MigrationSet = MigrationSet {
    component: "plans",
    schema: "public",
    works_since: "2027-01-05-000001",
    steps: &[PLANS, OWNERS],
};

fn with(set: MigrationSet) -> Migrations {
    Migrations::storage().and(set)
}

/// All columns of all tables of ours, as the server describes them.
async fn schema(database: &TestDatabase) -> Vec<String> {
    let sql =
        "SELECT concat_ws(' ', table_schema, table_name, column_name, data_type, is_nullable, column_default)
        FROM information_schema.columns WHERE table_schema IN ('public', 'leasehold') ORDER BY 1";
    let rows = database.client().await.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn six_at_once() {
    let database = TestDatabase::create_empty().await;
    let migrations = with(ADDED);
    let expected = migrations.status(&database.options()).await.unwrap().pending;
    let runs = join_all((0..6).map(async |_| migrations.run(&database.options()).await.unwrap())).await;
    let mut made = runs.concat();
    made.sort_by_key(|name| expected.iter().position(|other| other == name));
    assert_eq!(made, expected, "each step once");
    let status = migrations.status(&database.options()).await.unwrap();
    assert!(status.pending.is_empty(), "{status:?}");
}

#[tokio::test]
async fn six_at_once_make_each_step_once() {
    six_at_once().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn six_at_once_make_each_step_once_on_many_threads() {
    six_at_once().await;
}

#[tokio::test]
async fn status_tells_what_is_missing_and_what_is_there() {
    let database = TestDatabase::create_empty().await;
    let (migrations, options) = (with(OLD), database.options());
    let before = migrations.status(&options).await.unwrap();
    assert!(before.applied.is_empty() && before.newer.is_empty(), "{before:?}");
    assert_eq!(
        before.pending.first().unwrap(),
        "storage/2026-11-21-000001_leases"
    );
    assert_eq!(before.pending.last().unwrap(), "plans/2026-11-21-000001_plans");
    assert!(schema(&database).await.is_empty(), "looking makes nothing");

    assert_eq!(migrations.run(&options).await.unwrap(), before.pending);
    let after = migrations.status(&options).await.unwrap();
    assert_eq!((after.applied, after.pending), (before.pending, vec![]));
    assert!(
        migrations.run(&options).await.unwrap().is_empty(),
        "nothing twice"
    );
}

#[tokio::test]
async fn the_printed_sql_does_what_running_does() {
    let (printed, run) = (
        TestDatabase::create_empty().await,
        TestDatabase::create_empty().await,
    );
    let migrations = with(ADDED);
    let sql = migrations.pending_sql(&printed.options()).await.unwrap();
    printed.client().await.batch_execute(&sql).await.unwrap();
    migrations.run(&run.options()).await.unwrap();
    assert_eq!(schema(&printed).await, schema(&run).await);
    let status = migrations.status(&printed.options()).await.unwrap();
    assert_eq!(status, migrations.status(&run.options()).await.unwrap());
    assert!(status.pending.is_empty(), "{status:?}");
    assert_eq!(migrations.pending_sql(&printed.options()).await.unwrap(), "");
}

#[tokio::test]
async fn a_step_that_fails_leaves_nothing_and_is_tried_again() {
    let database = TestDatabase::create_empty().await;
    const BROKEN: Migration = Migration {
        name: "2027-02-01-000001_broken",
        sql: "CREATE TABLE half (); SELECT 1 / 0;",
    };
    let broken = with(MigrationSet {
        steps: &[PLANS, BROKEN, OWNERS],
        ..OLD
    });
    let error = broken.run(&database.options()).await.unwrap_err();
    assert!(
        matches!(&error, MigrateError::Step { name, .. } if name == "plans/2027-02-01-000001_broken"),
        "{error:?}"
    );
    let status = broken.status(&database.options()).await.unwrap();
    assert_eq!(
        status.pending,
        ["plans/2027-02-01-000001_broken", "plans/2027-01-05-000001_owners"]
    );
    assert!(
        !schema(&database)
            .await
            .iter()
            .any(|column| column.contains("half"))
    );
    assert_eq!(
        with(ADDED).run(&database.options()).await.unwrap(),
        ["plans/2027-01-05-000001_owners"]
    );
}

#[tokio::test]
async fn a_newer_schema_is_accepted_while_it_works_with_the_old_program() {
    let database = TestDatabase::create_empty().await;
    with(ADDED).run(&database.options()).await.unwrap();
    let status = with(OLD).status(&database.options()).await.unwrap();
    assert_eq!(status.newer, ["plans/2027-01-05-000001_owners"]);
    assert!(status.pending.is_empty(), "{status:?}");
    assert!(with(OLD).run(&database.options()).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_newer_schema_is_refused_once_it_does_not() {
    let database = TestDatabase::create_empty().await;
    with(BREAKING).run(&database.options()).await.unwrap();
    let errors = [
        with(OLD).run(&database.options()).await.unwrap_err(),
        with(OLD).status(&database.options()).await.unwrap_err(),
        with(OLD).pending_sql(&database.options()).await.unwrap_err(),
    ];
    for error in errors {
        let MigrateError::TooNew(too_new) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(too_new.component, "plans");
        assert_eq!(too_new.needed, "2027-01-05-000001");
        assert_eq!(too_new.built_for, "2026-11-21-000001");
        assert!(error.to_string().contains("run a newer version"), "{error}");
    }
}

/// A step that an old program makes late, say from a branch, does not let older ones in again.
#[tokio::test]
async fn what_works_is_never_set_back() {
    let database = TestDatabase::create_empty().await;
    with(BREAKING).run(&database.options()).await.unwrap();
    const LATE: Migration = Migration {
        name: "2026-12-01-000001_late",
        sql: "CREATE TABLE late ();",
    };
    let late = with(MigrationSet {
        steps: &[PLANS, LATE, OWNERS],
        ..OLD
    });
    assert_eq!(
        late.run(&database.options()).await.unwrap(),
        ["plans/2026-12-01-000001_late"]
    );
    assert!(matches!(
        with(OLD).run(&database.options()).await,
        Err(MigrateError::TooNew(_))
    ));
}

/// Between two statements of one transaction a pooler keeps the session, and nothing else is relied on.
#[tokio::test]
async fn several_migrate_at_once_through_a_transaction_pooler() {
    let database = TestDatabase::create_empty().await;
    let pooler = Pooler::start(&database, 3, Next::RoundRobin).await;
    let migrations = with(ADDED);
    let runs = join_all((0..3).map(async |_| migrations.run(&pooler.options()).await.unwrap())).await;
    assert_eq!(
        runs.concat().len(),
        migrations
            .status(&database.options())
            .await
            .unwrap()
            .applied
            .len()
    );
    let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let left: i64 = database.client().await.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told_from_a_broken_step() {
    let database = TestDatabase::create_empty().await;
    let url = crate::support::with_database(database.url(), "no_such_database");
    let options = leasehold_storage::ConnectOptions::parse(&url, None).unwrap();
    assert!(matches!(
        Migrations::storage().run(&options).await,
        Err(MigrateError::Connect(_))
    ));
}
