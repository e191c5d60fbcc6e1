//! [`Flight`]: the claims that a worker has, and the one heartbeat for all of them.
//!
//! The heartbeat runs on the keeper's thread and on a connection of its own, so that neither a blocked runtime nor an
//! exhausted pool lets claims expire.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use leasehold_domain::{Claim, ClaimKey, Monotonic, MonotonicClock};
use tokio::sync::{Notify, mpsc, watch};
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::clock::Boottime;
use crate::connect::ConnectOptions;
use crate::error::{StorageError, chain};
use crate::queue::statements;
use crate::queue::store::{columns, micros};

/// Timers stand still during suspend: look at the clock this often.
const CLOCK_LOOK: Duration = Duration::from_millis(500);
/// A beat of thousands of rows may take this long, however short the lease is.
const LEAST_WAIT: Duration = Duration::from_millis(250);

/// The claims of one worker.
#[derive(Debug)]
pub(super) struct Flight {
    lease: Duration,
    heartbeat: Duration,
    claims: Mutex<HashMap<ClaimKey, Arc<InFlight>>>,
    more: Notify,
}

/// A claim that is not settled yet.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) claim: Claim,
    /// Until when nobody else can have it, whatever the database does.
    trusted_until: Mutex<Monotonic>,
    lost: AtomicBool,
    tell: Notify,
    /// The work is over: what becomes of the claim is for the settlement to find out.
    settling: AtomicBool,
}

impl InFlight {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Comes back when the claim is lost.
    pub(super) async fn lost(&self) {
        while !self.is_lost() {
            self.tell.notified().await;
        }
    }

    pub(super) fn set_settling(&self) {
        self.settling.store(true, Ordering::Relaxed);
    }

    fn is_beating(&self) -> bool {
        !self.is_lost() && !self.settling.load(Ordering::Relaxed)
    }

    fn lose(&self) {
        metrics::counter!("leasehold_queue_lost_total").increment(1);
        self.lost.store(true, Ordering::Relaxed);
        self.tell.notify_one();
    }

    fn trusted_until(&self) -> MutexGuard<'_, Monotonic> {
        self.trusted_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight {
    pub(super) fn new(lease: Duration, heartbeat: Duration) -> Self {
        Self {
            lease,
            heartbeat,
            claims: Mutex::default(),
            more: Notify::new(),
        }
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<ClaimKey, Arc<InFlight>>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what was claimed by a request that was sent at `sent`.
    pub(super) fn take_in(&self, claims: Vec<Claim>, sent: Monotonic) -> Vec<Arc<InFlight>> {
        let trusted_until = self.trusted_from(sent);
        let mut all = self.claims();
        let taken = claims
            .into_iter()
            .map(|claim| {
                let key = claim.key;
                let item = Arc::new(InFlight {
                    claim,
                    trusted_until: Mutex::new(trusted_until),
                    lost: AtomicBool::new(false),
                    tell: Notify::new(),
                    settling: AtomicBool::new(false),
                });
                all.insert(key, Arc::clone(&item));
                item
            })
            .collect();
        drop(all);
        self.more.notify_one();
        taken
    }

    pub(super) fn let_go(&self, claim: ClaimKey) {
        self.claims().remove(&claim);
    }

    /// A margin of 10 % of the lease, at least 10 ms and at most 1 s, as for locks.
    fn trusted_from(&self, sent: Monotonic) -> Monotonic {
        let margin = (self.lease / 10).clamp(Duration::from_millis(10), Duration::from_secs(1));
        sent.plus(self.lease.saturating_sub(margin))
    }

    /// Loses what nobody has extended in time. Answers when the next is.
    fn lose_overdue(&self, now: Monotonic) -> Option<Monotonic> {
        let mut next: Option<Monotonic> = None;
        for item in self.claims().values().filter(|item| item.is_beating()) {
            let until = *item.trusted_until();
            if until <= now {
                tracing::warn!(item = %item.claim.scope, "a claim was not extended in time; its work is cancelled");
                item.lose();
            } else {
                next = Some(next.map_or(until, |next| next.min(until)));
            }
        }
        next
    }

    /// Those that could come too late for the beat after this one. What is done soon is never among them.
    fn due(&self, now: Monotonic) -> Vec<Arc<InFlight>> {
        let claims = self.claims();
        let due =
            |item: &&Arc<InFlight>| item.is_beating() && item.trusted_until().since(now) < self.heartbeat * 2;
        claims.values().filter(due).map(Arc::clone).collect()
    }

    fn is_empty(&self) -> bool {
        self.claims().is_empty()
    }

    /// Beats until `stop` changes. How many leases each beat has extended goes to `beats`.
    pub(super) async fn keep(
        self: Arc<Self>,
        options: ConnectOptions,
        beats: mpsc::UnboundedSender<usize>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut connection = None;
        let mut beating: Option<BoxFuture<'static, Beat>> = None;
        let mut next = Boottime.now();
        loop {
            let now = Boottime.now();
            let deadline = self.lose_overdue(now);
            if beating.is_none() && self.is_empty() {
                tokio::select! {
                    () = self.more.notified() => next = Boottime.now().plus(self.heartbeat),
                    _ = stop.changed() => return,
                }
                continue;
            }
            if beating.is_none() && now >= next {
                next = now.plus(self.heartbeat);
                let items = self.due(now);
                if !items.is_empty() {
                    let patience = self.heartbeat.max(LEAST_WAIT);
                    beating = Some(Box::pin(beat(
                        connection.take(),
                        options.clone(),
                        items,
                        self.lease,
                        patience,
                    )));
                }
            }
            let wake = deadline.map_or(next, |deadline| deadline.min(next)).max(now);
            tokio::select! {
                done = async { match beating.as_mut() { Some(beat) => beat.await, None => std::future::pending().await } } => {
                    beating = None;
                    connection = done.connection;
                    match done.answer {
                        Some(answer) => {
                            self.settle_beat(&done.items, done.sent, &answer);
                            // The worker may have ended.
                            _ = beats.send(answer.extended.len());
                        }
                        None => next = next.min(Boottime.now().plus(self.heartbeat / 4)),
                    }
                }
                () = tokio::time::sleep(wake.since(now).clamp(Duration::from_millis(1), CLOCK_LOOK)) => {}
                _ = stop.changed() => return,
            }
        }
    }

    fn settle_beat(&self, items: &[Arc<InFlight>], sent: Monotonic, answer: &Answer) {
        let trusted_until = self.trusted_from(sent);
        for item in items {
            let token = item.claim.key.token.as_uuid();
            if answer.extended.contains(&token) {
                let mut until = item.trusted_until();
                *until = trusted_until.max(*until);
            } else if !answer.busy.contains(&token) && item.is_beating() {
                tracing::warn!(item = %item.claim.scope, "a claim was lost; its work is cancelled");
                item.lose();
            }
        }
    }
}

struct Beat {
    connection: Option<Client>,
    items: Vec<Arc<InFlight>>,
    sent: Monotonic,
    /// `None` when there was no answer.
    answer: Option<Answer>,
}

struct Answer {
    extended: HashSet<Uuid>,
    /// Somebody has these locked, such as a transaction that completes them.
    busy: HashSet<Uuid>,
}

async fn beat(
    connection: Option<Client>,
    options: ConnectOptions,
    items: Vec<Arc<InFlight>>,
    lease: Duration,
    patience: Duration,
) -> Beat {
    let sent = Boottime.now();
    let done = tokio::time::timeout(patience, send(connection, &options, &items, lease)).await;
    let (connection, answer) = match done {
        Ok(Ok((connection, answer))) => (Some(connection), Some(answer)),
        Ok(Err(error)) => {
            tracing::warn!(error = chain(&error), "claims were not extended");
            (None, None)
        }
        Err(_) => {
            tracing::warn!("claims were not extended: no answer within {patience:?}");
            (None, None)
        }
    };
    Beat {
        connection,
        items,
        sent,
        answer,
    }
}

async fn send(
    connection: Option<Client>,
    options: &ConnectOptions,
    items: &[Arc<InFlight>],
    lease: Duration,
) -> Result<(Client, Answer), StorageError> {
    let client = match connection.filter(|client| !client.is_closed()) {
        Some(client) => client,
        None => {
            let (client, driver) = options.open().await?;
            tokio::spawn(driver);
            client
        }
    };
    let keys: Vec<ClaimKey> = items.iter().map(|item| item.claim.key).collect();
    let (ids, tokens) = columns(&keys);
    let binds: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] = [
        (&ids, Type::INT8_ARRAY),
        (&tokens, Type::UUID_ARRAY),
        (&micros(lease), Type::INT8),
    ];
    let rows = client.query_typed(statements::BEAT, &binds).await?;
    let tokens = |column: &str| -> HashSet<Uuid> {
        let found = rows.first().map(|row| row.get::<_, Vec<Uuid>>(column));
        found.unwrap_or_default().into_iter().collect()
    };
    let answer = Answer {
        extended: tokens("extended"),
        busy: tokens("busy"),
    };
    Ok((client, answer))
}
