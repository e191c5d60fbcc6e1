//! Presence: tells other processes who is behind an advisory lock, where the server itself knows only a number.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::LockId;
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::connect::ConnectOptions;
use crate::error::{StorageError, chain};
use crate::holds::{Hold, Holds};
use crate::keeper::Keeper;

/// How often new holds are told.
const TELL: Duration = Duration::from_millis(250);
/// A hold is told once it is this old: most never are.
const WORTH_TELLING: Duration = Duration::from_millis(250);
/// A server that says nothing for so long is asked again on another connection.
const ANSWER: Duration = Duration::from_secs(5);
/// How often what was told is confirmed; readers ignore what was not for 10 seconds.
const CONFIRM_AFTER: Duration = Duration::from_secs(3);

/// Removes what ended and adds what is new, in one statement.
const TELL_CHANGES: &str = "\
WITH told AS (
    SELECT * FROM unnest($3::uuid[], $4::text[], $5::text[], $6::text[], $7::int[], $8::text[], $9::text[],
                         $10::text[], $11::jsonb[], $12::timestamptz[])
        AS t(lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at)
), ended AS (
    DELETE FROM leasehold.presence WHERE process_id = $1 AND lock_id = ANY ($2)
)
INSERT INTO leasehold.presence
       (process_id, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at,
        seen_at)
SELECT $1, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at,
       clock_timestamp()
FROM told";

/// Says that all is as it was told, and removes what processes told that ended without a word.
const CONFIRM: &str = "\
WITH silent AS (
    DELETE FROM leasehold.presence
    WHERE process_id <> $1 AND seen_at < clock_timestamp() - interval '1 minute'
)
UPDATE leasehold.presence SET seen_at = clock_timestamp() WHERE process_id = $1";

/// What was told on a connection that broke is told anew.
const START_AGAIN: &str = "DELETE FROM leasehold.presence WHERE process_id = $1";

/// Holds by column.
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
        let mut teller = None::<Teller>;
        // What was told on a connection that broke stands there until it is taken back on another.
        let mut stale = false;
        let mut tick = tokio::time::interval(TELL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let holds = worth_telling(&holds);
            if teller.is_none() && holds.is_empty() && !stale {
                continue;
            }
            let telling = async {
                let open = match teller.take() {
                    Some(open) => open,
                    None => Teller::open(&options, process_id).await?,
                };
                open.tell(process_id, holds).await
            };
            let told = tokio::time::timeout(ANSWER, telling).await;
            stale = match told.unwrap_or(Err(StorageError::NoAnswer(ANSWER))) {
                Ok(open) => {
                    teller = Some(open);
                    false
                }
                Err(error) => {
                    tracing::debug!(error = chain(&error), "holds were not told");
                    true
                }
            };
        }
    });
}

/// A connection, and what was told on it.
struct Teller {
    client: Client,
    told: HashSet<LockId>,
    confirmed: Instant,
}

impl Teller {
    async fn open(options: &ConnectOptions, process_id: Uuid) -> Result<Self, StorageError> {
        let client = options.open_spawned().await?;
        client.execute(START_AGAIN, &[&process_id]).await?;
        Ok(Self {
            client,
            told: HashSet::new(),
            confirmed: Instant::now(),
        })
    }

    /// Tells what is not told yet. After an error the connection is not used again.
    async fn tell(mut self, process_id: Uuid, holds: HashMap<LockId, Hold>) -> Result<Self, StorageError> {
        let ended: Vec<Uuid> = self
            .told
            .iter()
            .filter(|lock_id| !holds.contains_key(lock_id))
            .map(|lock_id| lock_id.as_uuid())
            .collect();
        let new = Told::of(holds.values().filter(|hold| {
            let lock_id = hold.control.parts().lock_id;
            !self.told.contains(&lock_id)
        }));
        if !ended.is_empty() || !new.lock_id.is_empty() {
            self.client
                .execute(
                    TELL_CHANGES,
                    &[
                        &process_id,
                        &ended,
                        &new.lock_id,
                        &new.name,
                        &new.mode,
                        &new.scope,
                        &new.backend_pid,
                        &new.operation,
                        &new.locked_by,
                        &new.instance,
                        &new.metadata,
                        &new.acquired_at,
                    ],
                )
                .await?;
            self.told = holds.into_keys().collect();
        }
        if !self.told.is_empty() && self.confirmed.elapsed() >= CONFIRM_AFTER {
            self.client.execute(CONFIRM, &[&process_id]).await?;
            self.confirmed = Instant::now();
        }
        Ok(self)
    }
}

fn worth_telling(holds: &Holds) -> HashMap<LockId, Hold> {
    let mut all = holds.transactions();
    all.extend(holds.sessions());
    all.into_iter()
        .filter(|hold| hold.control.held_for() >= WORTH_TELLING)
        .map(|hold| (hold.control.parts().lock_id, hold))
        .collect()
}

impl Told {
    fn of<'a>(holds: impl Iterator<Item = &'a Hold>) -> Self {
        let mut told = Self::default();
        for hold in holds {
            let Some(backend_pid) = hold.backend_pid() else {
                continue;
            };
            let parts = hold.control.parts();
            told.lock_id.push(parts.lock_id.as_uuid());
            told.name.push(parts.name.encoded().to_owned());
            told.mode.push(parts.mode.to_string());
            told.scope.push(hold.scope.backend());
            told.backend_pid.push(backend_pid);
            told.operation.push(parts.holder.operation.clone());
            told.locked_by.push(parts.holder.owner.clone());
            told.instance.push(parts.holder.instance.clone());
            told.metadata.push(Value::Object(parts.holder.metadata.clone()));
            told.acquired_at.push(parts.acquired_at);
        }
        told
    }
}
