//! What fails at its commit was not done. The server sends the rows of a statement before it commits, and they are all
//! there when the commit then fails, or the server ends in the middle of it.

use std::time::Duration;

use leasehold_domain::{
    ClaimRequest, DistributedLock, Holder, LockName, LockRequest, NewWork, Scope, WorkQueue,
};

use leasehold_storage::{Database, LeaseColumns, RowLeaseTable};
use tokio_postgres::Client;

use crate::support::TestDatabase;

async fn start() -> (Database, Client) {
    let database = TestDatabase::create().await;
    let process = Database::connect(database.options(), 4).await.unwrap();
    (process, database.client().await)
}

/// From here on nothing that changes this table can be committed.
async fn fail_at_commit(client: &Client, table: &str) {
    let sql = format!(
        "CREATE OR REPLACE FUNCTION too_late() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION 'not committed'; END $$;
         CREATE CONSTRAINT TRIGGER too_late AFTER INSERT OR UPDATE OR DELETE ON {table}
             DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION too_late()"
    );
    client.batch_execute(&sql).await.unwrap();
}

fn request(parts: [&str; 2]) -> LockRequest {
    LockRequest::new(LockName::new(parts).unwrap(), Holder::new("alice", "edit"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_whose_commit_fails_is_not_held() {
    let (process, client) = start().await;
    let leases = process.leases();
    let (released, handed) = (request(["leases", "released"]), request(["leases", "handed"]));
    let released = leases.try_acquire(&released).await.unwrap();
    let handed = leases.try_acquire(&handed).await.unwrap();
    fail_at_commit(&client, "leasehold.leases").await;

    let refused = leases.try_acquire(&request(["leases", "new"])).await;
    assert!(refused.is_err(), "{refused:?}");
    let refused = process.client_leases().hand_over(handed, None).await;
    assert!(refused.is_err(), "{refused:?}");
    let name = released.name().clone();
    let refused = leases.release(released).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(leases.inspect(&name).await.unwrap().is_some(), "it is still held");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_in_a_row_whose_commit_fails_is_not_held() {
    let (process, client) = start().await;
    let table = "CREATE TABLE plans (name TEXT PRIMARY KEY, lock_id UUID, lock_operation TEXT, lock_by TEXT,
                     lock_acquired_at TIMESTAMPTZ, lock_expires_at TIMESTAMPTZ,
                     lock_fencing_token BIGINT NOT NULL DEFAULT 0);
                 INSERT INTO plans VALUES ('a')";
    client.batch_execute(table).await.unwrap();
    fail_at_commit(&client, "plans").await;
    let table = RowLeaseTable::new("public", "plans", "plan")
        .key_column("name")
        .columns(LeaseColumns::prefixed("lock_"))
        .build()
        .unwrap();
    let refused = process
        .row_leases(table)
        .try_acquire(&request(["plan", "a"]))
        .await;
    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn work_whose_commit_fails_is_not_there() {
    let (process, client) = start().await;
    let queue = process.work_queue();
    let work = |id: &str| NewWork::new(Scope::new("acme", "reindex", "plan", id));
    queue.enqueue(&work("1")).await.unwrap();
    fail_at_commit(&client, "leasehold.work_claims").await;
    let claim = ClaimRequest::new(["reindex"], "tester").with_lease(Duration::from_secs(60));
    let refused = queue.claim(&claim).await;
    assert!(refused.is_err(), "{refused:?}");
    fail_at_commit(&client, "leasehold.work_items").await;
    let refused = queue.enqueue(&work("2")).await;
    assert!(refused.is_err(), "{refused:?}");
}
