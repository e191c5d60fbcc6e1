//! Every clause of every queue.

use std::sync::Arc;
use std::time::Duration;

use leasehold_conformance::{QueueProvider, queue_conformance};
use leasehold_domain::{ClaimKey, WorkQueue};
use leasehold_storage::Database;
use tokio_postgres::Client;

use crate::support::TestDatabase;

struct Postgres {
    database: TestDatabase,
    client: Client,
}

impl Postgres {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let client = database.client().await;
        Self { database, client }
    }
}

impl QueueProvider for Postgres {
    async fn process(&self) -> Arc<dyn WorkQueue> {
        let database = Database::connect(self.database.options(), 4).await.unwrap();
        Arc::new(database.work_queue())
    }

    async fn expire(&self, claim: ClaimKey) {
        let expire = "UPDATE leasehold.work_claims SET expires_at = clock_timestamp() WHERE item_id = $1 AND token = $2";
        let binds = (claim.id.get(), claim.token.as_uuid());
        let expired = self.client.execute(expire, &[&binds.0, &binds.1]).await;
        assert_eq!(expired.unwrap(), 1);
    }

    async fn age_letters(&self, by: Duration) {
        let age = "UPDATE leasehold.dead_letters SET failed_at = failed_at - make_interval(secs => $1)";
        self.client.execute(age, &[&by.as_secs_f64()]).await.unwrap();
    }

    async fn purge_tenant(&self, tenant: &str) {
        for table in ["work_items", "dead_letters"] {
            let purge = format!("DELETE FROM leasehold.{table} WHERE tenant_id = $1");
            self.client.execute(&purge, &[&tenant]).await.unwrap();
        }
    }

    async fn unreachable(&self) -> Option<Arc<dyn WorkQueue>> {
        let database = TestDatabase::create().await;
        let queue = Database::connect(database.options(), 4)
            .await
            .unwrap()
            .work_queue();
        database.close().await;
        Some(Arc::new(queue))
    }

    fn secrets(&self) -> Vec<String> {
        vec![self.database.name(), "leasehold.".to_owned()]
    }
}

queue_conformance!(Postgres::start().await);
