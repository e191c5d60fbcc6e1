//! Presence: tells other processes who is behind an advisory lock, where the server itself knows only a number.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::LockId;
use serde_json::Value;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::connect::ConnectOptions;
use crate::error::chain;
use crate::holds::{Holds, Scope};
use crate::keeper::Keeper;

/// How often new holds are told.
const TELL: Duration = Duration::from_millis(250);
/// A hold is told once it is this old: most never are.
const WORTH_TELLING: Duration = Duration::from_millis(250);
/// How often all holds are told again; readers ignore what was not told for 10 seconds.
const TELL_AGAIN: Duration = Duration::from_secs(3);

/// One statement for all holds, which removes those that ended, and those of processes that ended without a word.
const PUBLISH: &str = "\
WITH told AS (
    SELECT * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::int[], $7::text[], $8::text[],
                         $9::text[], $10::jsonb[], $11::timestamptz[])
        AS t(lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at)
), ended AS (
    DELETE FROM leasehold.presence
    WHERE (process_id = $1 AND lock_id <> ALL ($2)) OR seen_at < clock_timestamp() - interval '1 minute'
)
INSERT INTO leasehold.presence
       (process_id, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at,
        seen_at)
SELECT $1, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at,
       clock_timestamp()
FROM told
ON CONFLICT (process_id, lock_id) DO UPDATE SET seen_at = excluded.seen_at";

#[derive(Default)]
struct Told {
    lock_id: Vec<Uuid>,
    name: Vec<String>,
    mode: Vec<String>,
    scope: Vec<&'static str>,
    backend_pid: Vec<i32>,
    operation: Vec<String>,
    locked_by: Vec<String>,
    instance: Vec<String>,
    metadata: Vec<Value>,
    acquired_at: Vec<DateTime<Utc>>,
}

/// Starts telling, on the keeper's thread. The connection is opened when there is first something to tell.
pub(crate) fn start(keeper: &Keeper, options: ConnectOptions, holds: Holds) {
    let process_id = Uuid::new_v4();
    keeper.spawn(async move {
        let mut client: Option<Client> = None;
        let mut last: HashSet<LockId> = HashSet::new();
        let mut told_at = tokio::time::Instant::now();
        let mut tick = tokio::time::interval(TELL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let (ids, told) = worth_telling(&holds);
            if ids == last && (ids.is_empty() || told_at.elapsed() < TELL_AGAIN) {
                continue;
            }
            if client.as_ref().is_none_or(Client::is_closed) {
                client = match options.open().await {
                    Ok((open, driver)) => {
                        tokio::spawn(driver);
                        Some(open)
                    }
                    Err(error) => {
                        tracing::debug!(error = chain(&error), "cannot connect to tell holds");
                        None
                    }
                };
            }
            let Some(open) = &client else { continue };
            match publish(open, process_id, &told).await {
                Ok(()) => {
                    last = ids;
                    told_at = tokio::time::Instant::now();
                }
                Err(error) => {
                    tracing::debug!(error = chain(&error), "holds were not told");
                    client = None;
                }
            }
        }
    });
}

fn worth_telling(holds: &Holds) -> (HashSet<LockId>, Told) {
    let mut ids = HashSet::new();
    let mut told = Told::default();
    for hold in holds.all() {
        let (scope, backend_pid) = match &hold.scope {
            Scope::Lease(_) => continue,
            Scope::Transaction(open) => ("transaction", open.backend_pid),
            Scope::Session { backend_pid, .. } => ("session", *backend_pid),
        };
        if hold.control.held_for() < WORTH_TELLING {
            continue;
        }
        let parts = hold.control.parts();
        ids.insert(parts.lock_id);
        told.lock_id.push(parts.lock_id.as_uuid());
        told.name.push(parts.name.encoded().to_owned());
        told.mode.push(parts.mode.to_string());
        told.scope.push(scope);
        told.backend_pid.push(backend_pid);
        told.operation.push(parts.holder.operation.clone());
        told.locked_by.push(parts.holder.owner.clone());
        told.instance.push(parts.holder.instance.clone());
        told.metadata.push(Value::Object(parts.holder.metadata.clone()));
        told.acquired_at.push(parts.acquired_at);
    }
    (ids, told)
}

async fn publish(client: &Client, process_id: Uuid, told: &Told) -> Result<(), tokio_postgres::Error> {
    client
        .execute(
            PUBLISH,
            &[
                &process_id,
                &told.lock_id,
                &told.name,
                &told.mode,
                &told.scope,
                &told.backend_pid,
                &told.operation,
                &told.locked_by,
                &told.instance,
                &told.metadata,
                &told.acquired_at,
            ],
        )
        .await
        .map(|_| ())
}
