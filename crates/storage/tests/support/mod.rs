//! A database of its own for each test, since advisory keys and lease names are per database.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use leasehold_embedded::Cluster;
use leasehold_storage::ConnectOptions;
use leasehold_storage::migrate::Migrations;
use tokio_postgres::{Client, Config, NoTls, error::SqlState};
use uuid::Uuid;

pub(crate) mod measured;
pub(crate) mod pooler;

/// How long a state may take to come. Only a fault takes so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An empty database with the tables of the library. It stays until its cluster goes.
#[derive(Debug)]
pub(crate) struct TestDatabase {
    url: String,
}

impl TestDatabase {
    /// A copy of a template, which takes some 20 ms.
    pub(crate) async fn create() -> Self {
        let template = template_name();
        let server = client(maintenance_url()).await;
        let database = Self::named(&format!("test_{}", Uuid::new_v4().simple()));
        let create = format!("CREATE DATABASE {} TEMPLATE {template}", database.name());
        match server.batch_execute(&create).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_DATABASE) => {
                make_template(&server, &template).await;
                server.batch_execute(&create).await.unwrap();
            }
            other => other.unwrap(),
        }
        database
    }

    /// Without any tables.
    pub(crate) async fn create_empty() -> Self {
        Self::create_with("TEMPLATE template1").await
    }

    /// Without any tables, made with other options.
    pub(crate) async fn create_with(options: &str) -> Self {
        let database = Self::named(&format!("test_{}", Uuid::new_v4().simple()));
        let create = format!("CREATE DATABASE {} {options}", database.name());
        client(maintenance_url())
            .await
            .batch_execute(&create)
            .await
            .unwrap();
        database
    }

    fn named(name: &str) -> Self {
        Self {
            url: with_database(maintenance_url(), name),
        }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn name(&self) -> String {
        self.config().get_dbname().unwrap().to_owned()
    }

    pub(crate) fn config(&self) -> Config {
        self.url.parse().unwrap()
    }

    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::parse(&self.url, None).unwrap()
    }

    /// Lets nobody in any more, and ends every session that is in.
    pub(crate) async fn close(&self) {
        let name = self.name();
        let server = client(maintenance_url()).await;
        let close = format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false");
        server.batch_execute(&close).await.unwrap();
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1";
        eventually("every session has ended", async || {
            server.query_one(end, &[&name]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }

    /// A connection that knows nothing of the library.
    pub(crate) async fn client(&self) -> Client {
        client(&self.url).await
    }
}

/// A connection whose driver runs in the background of this runtime.
pub(crate) async fn client(url: &str) -> Client {
    let (client, driver) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(async move { driver.await.ok() });
    client
}

/// The same server, another database.
pub(crate) fn with_database(url: &str, name: &str) -> String {
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

/// Other migrations, another template: the cluster may outlive a build.
fn template_name() -> String {
    let mut hasher = DefaultHasher::new();
    Migrations::storage().hash(&mut hasher);
    format!("leasehold_storage_{:016x}", hasher.finish())
}

/// It gets its name last, when it is whole. Of several processes that make it at once, one wins.
async fn make_template(server: &Client, name: &str) {
    let made = TestDatabase::create_empty().await;
    Migrations::storage().run(&made.options()).await.unwrap();
    let own = made.name();
    // A template with a connection cannot be copied.
    server
        .batch_execute(&format!("ALTER DATABASE {own} WITH ALLOW_CONNECTIONS false"))
        .await
        .unwrap();
    match server
        .batch_execute(&format!("ALTER DATABASE {own} RENAME TO {name}"))
        .await
    {
        Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => {}
        // It was given the name between the check and the row.
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {}
        other => other.unwrap(),
    }
}

/// Waits for a state, asking every few milliseconds.
pub(crate) async fn eventually(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !reached().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
