//! [`Reaper`]: gives leases back that nobody waits for, because a guard or an acquire was dropped.

use std::sync::Arc;
use std::time::Duration;

use leasehold_domain::{LockId, LockName};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::connect::ConnectOptions;
use crate::keeper::Keeper;
use crate::lease::table::LeaseTable;
use crate::signals::{self, Signals};
use crate::waiting::Queues;

/// How long an answer may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first pause before the next try, and the longest; each is four times the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How long the statement of an acquire that was dropped may still be on its way to the server.
const STILL_COMES: Duration = Duration::from_millis(1500);
/// How long it is tried while the database is away, or a stranger has the row locked. Then the lease ends by itself.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Releases in the background, on a connection of its own that is opened when it is first needed.
#[derive(Clone, Debug)]
pub(crate) struct Reaper {
    keeper: Keeper,
    options: ConnectOptions,
    client: Arc<Mutex<Option<Arc<Client>>>>,
    queues: Queues,
    signals: Signals,
}

/// A lease to give back.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) table: Arc<LeaseTable>,
    pub(crate) keys: Vec<String>,
    pub(crate) name: LockName,
    pub(crate) lock_id: LockId,
}

/// What an attempt to give a lease back found.
#[derive(Clone, Copy)]
enum Found {
    /// It was ours, and has ended.
    Ours,
    /// It is not ours, or not yet.
    Nothing,
    /// It is ours, and somebody has the row locked.
    Locked,
    NoAnswer,
}

impl Reaper {
    pub(crate) fn new(keeper: Keeper, options: ConnectOptions, queues: Queues, signals: Signals) -> Self {
        Self {
            keeper,
            options,
            client: Arc::default(),
            queues,
            signals,
        }
    }

    /// Gives back a lease that is held. Never blocks; works in any thread.
    pub(crate) fn release(&self, lease: Lease) {
        self.give_back(lease, Duration::ZERO);
    }

    /// Gives back what an acquire may have been granted after its caller went away.
    pub(crate) fn release_unanswered(&self, lease: Lease) {
        self.give_back(lease, STILL_COMES);
    }

    /// `may_come` is for how long the lease may still appear.
    fn give_back(&self, lease: Lease, may_come: Duration) {
        let this = self.clone();
        self.keeper.finish(async move {
            let start = Instant::now();
            let (mut pause, longest) = PAUSES;
            loop {
                let look_until = match this.attempt(&lease).await {
                    Found::Ours => return,
                    Found::Nothing => may_come,
                    Found::Locked | Found::NoAnswer => GIVE_UP,
                };
                if start.elapsed() >= look_until {
                    if look_until == GIVE_UP {
                        tracing::warn!(lock = %lease.name, "a lease was not given back; it ends by itself");
                    }
                    return;
                }
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 4);
            }
        });
    }

    async fn attempt(&self, lease: &Lease) -> Found {
        let Some(client) = self.client().await else {
            return Found::NoAnswer;
        };
        let lock_id = lease.lock_id.as_uuid();
        let mut binds: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&lock_id, Type::UUID)];
        binds.extend(
            lease
                .keys
                .iter()
                .map(|key| (key as &(dyn ToSql + Sync), Type::TEXT)),
        );
        let answer = tokio::time::timeout(
            STATEMENT_TIMEOUT,
            client.query_typed(&lease.table.give_back, &binds),
        );
        let failure = match answer.await {
            Ok(Ok(rows)) => {
                let found = rows.first().map(|row| (row.get("ended"), row.get("there")));
                return match found {
                    Some((true, _)) => {
                        self.queues.freed(&lease.name);
                        self.signals.freed(signals::key(&lease.name));
                        Found::Ours
                    }
                    Some((false, true)) => Found::Locked,
                    Some((false, false)) | None => Found::Nothing,
                };
            }
            Ok(Err(error)) => crate::error::chain(&error),
            Err(_) => format!("no answer within {STATEMENT_TIMEOUT:?}"),
        };
        tracing::debug!(error = failure, lock = %lease.name, "a lease is not given back yet");
        *self.client.lock().await = None;
        Found::NoAnswer
    }

    async fn client(&self) -> Option<Arc<Client>> {
        let mut client = self.client.lock().await;
        if let Some(open) = client.as_ref().filter(|client| !client.is_closed()) {
            return Some(Arc::clone(open));
        }
        match self.options.open().await {
            Ok((open, driver)) => {
                self.keeper.spawn(driver);
                let open = Arc::new(open);
                *client = Some(Arc::clone(&open));
                Some(open)
            }
            Err(error) => {
                tracing::debug!(
                    error = crate::error::chain(&error),
                    "cannot connect to give leases back"
                );
                None
            }
        }
    }
}
