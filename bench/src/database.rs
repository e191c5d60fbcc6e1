//! The server that is measured on, and the databases that are made there.

use leasehold_storage::migrate::Migrations;
use leasehold_storage::{ConnectOptions, Database};
use tokio_postgres::{Client, NoTls};

use crate::{Error, Result};

const VARIABLE: &str = "LEASEHOLD_BENCH_DATABASE_URL";

/// A server on which this program may make and drop databases.
pub(crate) struct Server {
    url: String,
}

/// A database of this run.
#[derive(Clone)]
pub(crate) struct BenchDatabase {
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn from_environment() -> Result<Self> {
        let url =
            std::env::var(VARIABLE).map_err(|_| format!("{VARIABLE} is not set; run `cargo xtask bench`"))?;
        Ok(Self { url })
    }

    /// The database that exists from the start.
    pub(crate) async fn client(&self) -> Result<Client> {
        connect(&self.url).await
    }

    /// A new database with the library's tables.
    pub(crate) async fn create(&self, name: &str) -> Result<BenchDatabase> {
        self.create_with(name, &Migrations::storage()).await
    }

    /// A new database with these tables.
    pub(crate) async fn create_with(&self, name: &str, migrations: &Migrations) -> Result<BenchDatabase> {
        let server = self.client().await?;
        server
            .batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            .await?;
        server.batch_execute(&format!("CREATE DATABASE {name}")).await?;
        let (path, query) = self.url.split_once('?').unwrap_or((&self.url, ""));
        let (address, _) = path.rsplit_once('/').ok_or("the URL names no database")?;
        let database = BenchDatabase {
            url: format!("{address}/{name}?{query}"),
        };
        migrations.run(&database.options()?).await?;
        Ok(database)
    }
}

impl BenchDatabase {
    fn options(&self) -> Result<ConnectOptions> {
        Ok(ConnectOptions::parse(&self.url, None)?)
    }

    /// Our library on it, with a pool of its own.
    pub(crate) async fn open(&self, pool_size: u32) -> Result<Database> {
        Ok(Database::connect(self.options()?, pool_size).await?)
    }

    /// A connection that knows nothing of the library.
    pub(crate) async fn client(&self) -> Result<Client> {
        connect(&self.url).await
    }

    /// Does something for each of so many connections.
    pub(crate) async fn clients<C>(
        &self,
        count: u32,
        make: impl AsyncFn(Client, u32) -> Result<C>,
    ) -> Result<Vec<C>> {
        let mut clients = Vec::new();
        for index in 0..count {
            clients.push(make(self.client().await?, index).await?);
        }
        Ok(clients)
    }
}

/// The driver ends when the client is dropped.
async fn connect(url: &str) -> Result<Client> {
    let (client, driver) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = driver.await {
            eprintln!("a connection ended: {}", Error::from(error));
        }
    });
    Ok(client)
}
