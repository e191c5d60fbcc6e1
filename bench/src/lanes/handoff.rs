//! One name that everybody wants: how fast it goes from hand to hand.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{DistributedLock, Durability, LockRequest};

use crate::database::BenchDatabase;
use crate::group::Group;
use crate::lanes::request;
use crate::measure::{Client, Clients, Lane};
use crate::raw::{self, AdvisoryPair};
use crate::{Bench, Result, pgbench};

const WAITERS: u32 = 32;
/// Only a fault takes so long.
const WAIT: Duration = Duration::from_secs(30);
const KEY: i64 = 4_711;

struct Waiter {
    lock: Arc<dyn DistributedLock>,
    request: LockRequest,
}

impl Client for Waiter {
    async fn once(&mut self) -> Result {
        let guard = self.lock.acquire(&self.request, WAIT).await?;
        self.lock.release(guard).await?;
        Ok(())
    }
}

fn waiters(name: &'static str, lock: impl DistributedLock + 'static, request: &LockRequest) -> Box<dyn Lane> {
    let lock: Arc<dyn DistributedLock> = Arc::new(lock);
    let waiter = |_| Waiter {
        lock: Arc::clone(&lock),
        request: request.clone(),
    };
    Clients::lane(name, (0..WAITERS).map(waiter).collect())
}

pub(crate) async fn one_name(bench: &Bench, database: &BenchDatabase) -> Result {
    let mut group = Group::new(
        format!("hand-off of one name, {WAITERS} waiters in one process"),
        "hand-offs/s",
        &["server queue"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let db = database.open(8).await?;
    group.add(waiters(
        "session",
        db.session_locks(),
        &request(&["wanted", "session"])?,
    ));
    group.add(waiters(
        "transaction",
        db.transaction_locks(),
        &request(&["wanted", "transaction"])?,
    ));
    group.add(waiters("lease", db.leases(), &request(&["wanted", "lease"])?));
    let with_write = request(&["wanted", "with-write"])?.with_durability(Durability::WithWrite);
    group.add(waiters("lease, with write", db.leases(), &with_write));
    let queue = database.clients(WAITERS, async |client, _| {
        AdvisoryPair::new(client, raw::LOCK, KEY).await
    });
    group.add(Clients::lane("server queue", queue.await?));
    if let Some(pgbench) = &bench.pgbench {
        let script = [raw::LOCK, raw::UNLOCK].map(|sql| pgbench::statement(sql, &["4712"]));
        group.add(pgbench.lane("pgbench", database, WAITERS, &script.concat())?);
    }
    bench.measure(group).await
}
