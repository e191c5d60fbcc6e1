//! Durable commits, counted as syncs of the write-ahead log on a server that really syncs.

use leasehold_embedded::{Cluster, Durability};
use tokio_postgres::Client;

use crate::database::{TestDatabase, client};

/// A server whose log is synced by nothing but commits that wait for it.
///
/// The background writers are put to sleep: the log writer for 10 seconds at a time, the checkpointer for an hour,
/// and without replication nobody logs snapshots of running transactions.
#[derive(Debug)]
pub struct DurableServer {
    cluster: Cluster,
}

impl DurableServer {
    /// Blocks for about a second.
    pub fn start() -> Self {
        let settings = [
            ("wal_writer_delay", "10s"),
            ("wal_writer_flush_after", "1GB"),
            ("checkpoint_timeout", "1h"),
            ("wal_level", "minimal"),
            ("max_wal_senders", "0"),
            ("autovacuum", "off"),
            ("max_connections", "100"),
        ];
        let builder = Cluster::temporary().durability(Durability::Durable);
        let builder = settings
            .iter()
            .fold(builder, |builder, (name, value)| builder.set(name, *value));
        Self {
            cluster: builder.start().unwrap(),
        }
    }

    /// A database on it, with the tables of the library.
    pub async fn database(&self) -> TestDatabase {
        TestDatabase::create_on(&self.url()).await
    }

    /// The URL of its own database.
    pub fn url(&self) -> String {
        self.cluster.url("postgres")
    }

    /// How often the log was synced until now, as far as sessions have told: they tell for certain when they end.
    /// So whatever is to be counted must have closed its connections, which this waits for.
    pub async fn syncs(&self) -> u64 {
        let client = client(&self.url()).await;
        crate::patience::eventually("all other sessions have ended", async || {
            let others = "SELECT count(*) FROM pg_stat_activity
                          WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
            client.query_one(others, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        syncs(&client).await
    }
}

async fn syncs(client: &Client) -> u64 {
    let version: i32 = client
        .query_one("SELECT current_setting('server_version_num')::int", &[])
        .await
        .unwrap()
        .get(0);
    // The column has moved: https://www.postgresql.org/docs/18/release-18.html
    let sql = if version >= 180_000 {
        "SELECT sum(fsyncs)::bigint FROM pg_stat_io WHERE object = 'wal' AND backend_type = 'client backend'"
    } else {
        "SELECT wal_sync FROM pg_stat_wal"
    };
    let count: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
    u64::try_from(count).unwrap()
}
