//! Lanes of raw tokio-postgres: one connection a client, statements prepared once.

use tokio_postgres::{Client as Connection, Statement};

use crate::Result;
use crate::measure::Client;

/// Takes an advisory lock and gives it back, in two statements that take the key.
pub(crate) struct AdvisoryPair {
    pub(crate) client: Connection,
    pub(crate) lock: Statement,
    pub(crate) unlock: Statement,
    pub(crate) key: i64,
}

impl AdvisoryPair {
    pub(crate) async fn new(client: Connection, lock: &str, key: i64) -> Result<Self> {
        let lock = client.prepare(lock).await?;
        let unlock = client.prepare(UNLOCK).await?;
        Ok(Self {
            client,
            lock,
            unlock,
            key,
        })
    }
}

pub(crate) const TRY_LOCK: &str = "SELECT pg_try_advisory_lock($1)";
pub(crate) const LOCK: &str = "SELECT pg_advisory_lock($1)";
pub(crate) const UNLOCK: &str = "SELECT pg_advisory_unlock($1)";

impl Client for AdvisoryPair {
    async fn once(&mut self) -> Result {
        self.client.query_one(&self.lock, &[&self.key]).await?;
        self.client.query_one(&self.unlock, &[&self.key]).await?;
        Ok(())
    }
}
