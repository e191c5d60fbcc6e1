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
/// A beat of thousands of rows may take this long, however short the slices are.
const LEAST_WAIT: Duration = Duration::from_millis(250);

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
            let shortest = leases.iter().map(|lease| lease.hold.schedule().ttl).min();
            // A third of the shortest slice: then there is time for two more. Also for a table whose own slices are
            // long: one that is locked must not keep the others waiting.
            let limit = (shortest.unwrap_or_default() / 3).max(LEAST_WAIT);
            beat(&options, &mut connection, &holds, due(leases, now), limit).await;
        }
    }
}

struct Lease {
    control: HoldControl,
    hold: Arc<LeaseHold>,
}

fn live_leases(holds: &Holds) -> Vec<Lease> {
    let mut leases = Vec::new();
    for hold in holds.leases() {
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
    limit: Duration,
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
            let failure = match renewals(options, connection).await {
                Ok(open) => match tokio::time::timeout(limit, renew(open, holds, &table, chunk)).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => chain(&error),
                    Err(_) => format!("no answer within {limit:?}"),
                },
                Err(error) => chain(&error),
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

/// The open connection, or a new one. That it may take longer than a beat keeps short slices from closing it again
/// and again before it was ever used.
async fn renewals<'a>(
    options: &ConnectOptions,
    connection: &'a mut Option<Renewals>,
) -> Result<&'a mut Renewals, StorageError> {
    // The server may have ended it between two beats.
    drop(connection.take_if(|open| open.client.is_closed()));
    match connection {
        Some(open) => Ok(open),
        None => {
            let (client, driver) = options.open().await?;
            tokio::spawn(driver);
            Ok(connection.insert(Renewals {
                client,
                statements: HashMap::new(),
            }))
        }
    }
}

async fn renew(
    renewals: &mut Renewals,
    holds: &Holds,
    table: &LeaseTable,
    leases: &[Lease],
) -> Result<(), tokio_postgres::Error> {
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
    let ttls: Vec<Duration> = leases.iter().map(|lease| lease.hold.schedule().ttl).collect();
    let slices: Vec<f64> = ttls.iter().copied().map(seconds).collect();
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
    let mut binds: Vec<&(dyn ToSql + Sync)> = vec![&ids, &slices, &max_holds, &disk_may_wait];
    binds.extend(keys.iter().map(|column| column as &(dyn ToSql + Sync)));
    let rows = renewals.client.query(&statement, &binds).await?;

    let answers: HashMap<Uuid, Answer> = rows
        .iter()
        .map(|row| {
            // Somebody may have set it to an end that is none, 'infinity'.
            let until = row.try_get("expires_at").unwrap_or_default();
            let live = row.get("live");
            (row.get("lock_id"), Answer { until, live })
        })
        .collect();
    for ((lease, id), ttl) in leases.iter().zip(&ids).zip(ttls) {
        let answer = answers.get(id).copied().unwrap_or(Answer::GONE);
        settle(holds, lease, sent, ttl, answer);
    }
    Ok(())
}

/// What the server says of one lease.
#[derive(Clone, Copy)]
struct Answer {
    /// The new end, when it was renewed.
    until: Option<DateTime<Utc>>,
    /// Whether it is ours and not over.
    live: bool,
}

impl Answer {
    const GONE: Self = Self {
        until: None,
        live: false,
    };
}

/// Notes the answer to a renewal by `ttl` that was sent at `sent`. An `extend` may have changed the slice since then,
/// which counts for the next renewal and not for what this answer proves.
fn settle(holds: &Holds, lease: &Lease, sent: Monotonic, ttl: Duration, answer: Answer) {
    let again = |due| {
        lease.hold.reschedule(Schedule {
            due,
            ttl: lease.hold.schedule().ttl,
        });
    };
    match answer.until {
        Some(until) if lease.control.renewed(until, lease.hold.trusted_until(sent, ttl)) => {
            again(next_renewal(sent, ttl).due);
        }
        // Ours, but somebody has the row locked, mostly a fence of our own: it stays as it is until then. Or gone: a
        // fence that releases makes it so before its transaction's end is known here.
        None if answer.live || lease.hold.is_fencing() || lease.hold.has_ended() => {
            again(sent.plus(TRY_AGAIN.min(ttl / 10)));
        }
        Some(_) | None => {
            holds.lose(lease.control.parts().lock_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use leasehold_domain::{GuardParts, Holder, LockGuard, LockId, LockMode, LockName};

    use super::*;

    /// The caller has extended a lease while a beat for the old slice was under way.
    #[test]
    fn an_answer_proves_no_more_than_was_asked_for() {
        let (short, long) = (Duration::from_secs(10), Duration::from_secs(1000));
        let sent = Boottime.now();
        let ends = sent.plus(long * 10);
        let parts = GuardParts {
            name: LockName::new(["a"]).unwrap(),
            mode: LockMode::Exclusive,
            lock_id: LockId::new(),
            fencing_token: None,
            holder: Holder::new("o", "op"),
            acquired_at: DateTime::UNIX_EPOCH,
            expires_at: Some(DateTime::UNIX_EPOCH),
            trusted_until: Some(sent.plus(short)),
            clock: Arc::new(Boottime),
        };
        let guard = LockGuard::new(parts, || {});
        let table = Arc::new(LeaseTable::own());
        let schedule = next_renewal(sent, short);
        let hold = LeaseHold::new(table, vec!["a".into()], true, long * 10, ends, schedule);
        let lease = Lease {
            control: guard.control(),
            hold: Arc::new(hold),
        };
        lease.hold.reschedule(next_renewal(sent, long));
        let answered = sent.plus(Duration::from_secs(1));
        let answer = Answer {
            until: Some(DateTime::UNIX_EPOCH + TimeDelta::seconds(11)),
            live: true,
        };
        settle(&Holds::default(), &lease, answered, short, answer);
        assert!(guard.trusted_until().unwrap() <= answered.plus(short));
        assert_eq!(lease.hold.schedule().ttl, long, "the next renewal asks for more");
    }
}
