//! A database of its own for each test, since advisory keys and lease names are per database.

use std::sync::OnceLock;

use leasehold_embedded::Cluster;
use leasehold_storage::ConnectOptions;
use leasehold_storage::migrate::Migrations;
use tokio_postgres::{Client, Config, NoTls};
use uuid::Uuid;

/// A database of one test. It stays until its cluster goes.
#[derive(Clone, Debug)]
pub struct TestDatabase {
    url: String,
}

impl TestDatabase {
    /// With the tables of the library, on the cluster of the run.
    pub async fn create() -> Self {
        Self::create_on(maintenance_url()).await
    }

    /// With the tables of the library, on the cluster that this is the URL of.
    pub async fn create_on(server: &str) -> Self {
        let database = Self::create_empty_on(server).await;
        Migrations::storage().run(&database.options()).await.unwrap();
        database
    }

    /// Without any tables, on the cluster of the run.
    pub async fn create_empty() -> Self {
        Self::create_empty_on(maintenance_url()).await
    }

    /// Without any tables, on the cluster that this is the URL of.
    pub async fn create_empty_on(server: &str) -> Self {
        let name = format!("test_{}", Uuid::new_v4().simple());
        let url = with_database(server, &name);
        let create = format!("CREATE DATABASE {name} TEMPLATE template1");
        client(server).await.batch_execute(&create).await.unwrap();
        Self { url }
    }

    /// How to connect to it: a URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// How to connect to it, for tokio-postgres.
    pub fn config(&self) -> Config {
        self.url.parse().unwrap()
    }

    /// How to connect to it, for the library.
    pub fn options(&self) -> ConnectOptions {
        ConnectOptions::parse(&self.url, None).unwrap()
    }

    /// A connection that knows nothing of the library.
    pub async fn client(&self) -> Client {
        client(&self.url).await
    }

    /// How many advisory locks are held or waited for in this database.
    pub async fn advisory_locks(&self, client: &Client) -> i64 {
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        client.query_one(sql, &[]).await.unwrap().get(0)
    }
}

/// A connection whose driver runs in the background of this runtime.
pub async fn client(url: &str) -> Client {
    let (client, driver) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(async move { driver.await.ok() });
    client
}

/// The same server, another database.
pub fn with_database(url: &str, name: &str) -> String {
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let (server, _) = path.rsplit_once('/').unwrap();
    format!("{server}/{name}?{query}")
}

/// The cluster that `cargo xtask test` started for all, or one for this process.
fn maintenance_url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    URL.get_or_init(|| {
        std::env::var("LEASEHOLD_TEST_DATABASE_URL").unwrap_or_else(|_| {
            let start = || {
                Cluster::temporary()
                    .set("max_connections", "400")
                    .set("autovacuum", "off")
                    .start()
            };
            CLUSTER.get_or_init(|| start().unwrap()).url("postgres")
        })
    })
}
