//! [`Renewer`]: one heartbeat for all leases of the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::{HoldControl, Monotonic, MonotonicClock};
use tokio::sync::Notify;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use crate::clock::Boottime;
use crate::connect::ConnectOptions;
use crate::error::{StorageError, chain};
use crate::holds::{Holds, Scope};
use crate::keeper::Keeper;
use crate::lease::table::LeaseTable;
use crate::lease::{LeaseHold, Schedule, next_renewal, seconds};

/// How many leases one statement renews.
const CHUNK: usize = 10_000;
/// How soon a lease is tried again whose row was locked, or whose beat failed.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// Timers stand still during suspend: look at the clock this often.
const CLOCK_LOOK: Duration = Duration::from_millis(500);

/// Keeps the leases of the process alive, from the keeper's thread and on a connection of its own, so that
/// neither a blocked runtime nor an exhausted pool lets them expire.
#[derive(Clone, Debug)]
pub(crate) struct Renewer {
    next: Arc<Mutex<Option<Monotonic>>>,
    wake: Arc<Notify>,
}

impl Renewer {
    pub(crate) fn start(keeper: &Keeper, options: ConnectOptions, holds: Holds) -> Self {
        let renewer = Self {
            next: Arc::default(),
            wake: Arc::default(),
        };
        keeper.spawn(renewer.clone().run(options, holds));
        renewer
    }

    /// Says that a renewal will be due; wakes the renewer only if that is sooner than it knew.
    pub(crate) fn expect(&self, due: Monotonic) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_none_or(|next| due < next) {
            *next = Some(due);
            self.wake.notify_one();
        }
    }

    /// Forgets what was expected: from here on every registration wakes.
    fn look(&self) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Notes what was found; what was registered meanwhile and is due sooner has woken us already.
    fn found(&self, due: Monotonic) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = Some(next.map_or(due, |next| next.min(due)));
    }

    async fn run(self, options: ConnectOptions, holds: Holds) {
        let mut connection = None;
        loop {
            self.look();
            let leases = live_leases(&holds);
            let Some(first) = leases.iter().map(|lease| lease.hold.schedule().due).min() else {
                self.wake.notified().await;
                continue;
            };
            let now = Boottime.now();
            if now < first {
                self.found(first);
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = tokio::time::sleep(first.since(now).min(CLOCK_LOOK)) => {}
                }
                continue;
            }
            metrics::histogram!("leasehold_heartbeat_late_seconds").record(now.since(first));
            beat(&options, &mut connection, &holds, due(leases, now)).await;
        }
    }
}

struct Lease {
    control: HoldControl,
    hold: Arc<LeaseHold>,
}

fn live_leases(holds: &Holds) -> Vec<Lease> {
    let mut leases = Vec::new();
    for hold in holds.all() {
        let Scope::Lease(lease) = hold.scope else { continue };
        if lease.has_ended() {
            continue;
        }
        if hold.control.is_lost() {
            holds.lose(hold.control.parts().lock_id);
            continue;
        }
        leases.push(Lease {
            control: hold.control,
            hold: lease,
        });
    }
    leases
}

/// What is due now or so soon that it may go along: leases that are renewed together stay together.
fn due(leases: Vec<Lease>, now: Monotonic) -> Vec<Lease> {
    leases
        .into_iter()
        .filter(|lease| {
            let Schedule { due, ttl } = lease.hold.schedule();
            due.since(now) <= ttl / 6
        })
        .collect()
}

/// A client with its prepared renewals, one a table.
struct Renewals {
    client: Client,
    statements: HashMap<String, Statement>,
}

async fn beat(
    options: &ConnectOptions,
    connection: &mut Option<Renewals>,
    holds: &Holds,
    leases: Vec<Lease>,
) {
    let mut tables: Vec<(Arc<LeaseTable>, Vec<Lease>)> = Vec::new();
    for lease in leases {
        match tables
            .iter_mut()
            .find(|(table, _)| Arc::ptr_eq(table, &lease.hold.table))
        {
            Some((_, leases)) => leases.push(lease),
            None => tables.push((Arc::clone(&lease.hold.table), vec![lease])),
        }
    }
    for (table, leases) in tables {
        for chunk in leases.chunks(CHUNK) {
            // A third of the shortest slice: then there is time for two more.
            let limit = chunk
                .iter()
                .map(|lease| lease.hold.schedule().ttl)
                .min()
                .unwrap_or_default()
                / 3;
            let result = tokio::time::timeout(limit, renew(options, connection, holds, &table, chunk)).await;
            let failure = match result {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => chain(&error),
                Err(_) => format!("no answer within {limit:?}"),
            };
            tracing::warn!(
                error = failure,
                leases = chunk.len(),
                "a heartbeat failed; it is tried again"
            );
            *connection = None;
            let again = Boottime.now().plus(TRY_AGAIN.min(limit));
            for lease in chunk {
                lease.hold.reschedule(Schedule {
                    due: again,
                    ..lease.hold.schedule()
                });
            }
        }
    }
}

async fn renew(
    options: &ConnectOptions,
    connection: &mut Option<Renewals>,
    holds: &Holds,
    table: &LeaseTable,
    leases: &[Lease],
) -> Result<(), StorageError> {
    let renewals = match connection {
        Some(open) => open,
        None => {
            let (client, driver) = options.open().await?;
            tokio::spawn(driver);
            connection.insert(Renewals {
                client,
                statements: HashMap::new(),
            })
        }
    };
    let statement = match renewals.statements.get(&table.renew) {
        Some(statement) => statement.clone(),
        None => {
            let statement = renewals.client.prepare(&table.renew).await?;
            renewals.statements.insert(table.renew.clone(), statement.clone());
            statement
        }
    };

    let sent = Boottime.now();
    let ids: Vec<Uuid> = leases
        .iter()
        .map(|lease| lease.control.parts().lock_id.as_uuid())
        .collect();
    let ttls: Vec<f64> = leases
        .iter()
        .map(|lease| seconds(lease.hold.schedule().ttl))
        .collect();
    let max_holds: Vec<f64> = leases.iter().map(|lease| seconds(lease.hold.max_hold)).collect();
    let disk_may_wait = !leases.iter().any(|lease| lease.hold.durable);
    let columns = leases.first().map_or(0, |lease| lease.hold.keys.len());
    let keys: Vec<Vec<&str>> = (0..columns)
        .map(|column| {
            leases
                .iter()
                .filter_map(|lease| lease.hold.keys.get(column).map(String::as_str))
                .collect()
        })
        .collect();
    let mut binds: Vec<&(dyn ToSql + Sync)> = vec![&ids, &ttls, &max_holds, &disk_may_wait];
    binds.extend(keys.iter().map(|column| column as &(dyn ToSql + Sync)));
    let rows = renewals.client.query(&statement, &binds).await?;

    let answers: HashMap<Uuid, (Option<DateTime<Utc>>, bool)> = rows
        .iter()
        .map(|row| (row.get("lock_id"), (row.get("expires_at"), row.get("live"))))
        .collect();
    for (lease, id) in leases.iter().zip(&ids) {
        settle(
            holds,
            lease,
            sent,
            answers.get(id).copied().unwrap_or((None, false)),
        );
    }
    Ok(())
}

fn settle(holds: &Holds, lease: &Lease, sent: Monotonic, answer: (Option<DateTime<Utc>>, bool)) {
    let ttl = lease.hold.schedule().ttl;
    match answer {
        (Some(expires_at), _) => {
            if lease
                .control
                .renewed(expires_at, lease.hold.trusted_until(sent, ttl))
            {
                lease.hold.reschedule(next_renewal(sent, ttl));
            } else {
                holds.lose(lease.control.parts().lock_id);
            }
        }
        // Ours, but somebody has the row locked, mostly a fence of our own: it stays as it is until then.
        (None, true) => lease.hold.reschedule(Schedule {
            due: sent.plus(TRY_AGAIN.min(ttl / 10)),
            ttl,
        }),
        // Gone. A fence that releases makes it so before its transaction's end is known here.
        (None, false) if lease.hold.is_fencing() || lease.hold.has_ended() => {
            lease.hold.reschedule(Schedule {
                due: sent.plus(TRY_AGAIN.min(ttl / 10)),
                ttl,
            });
        }
        (None, false) => holds.lose(lease.control.parts().lock_id),
    }
}
