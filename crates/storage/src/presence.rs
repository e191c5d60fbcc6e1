//! Presence: tells other processes who is behind an advisory lock, where the server itself knows only a number, and
//! who waits, of which it knows nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::{Holder, LockId, LockMode, LockName};
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::advisory::AdvisoryKey;
use crate::connect::ConnectOptions;
use crate::error::{StorageError, chain};
use crate::holds::{Hold, Holds, Scope};
use crate::keeper::Keeper;
use crate::waits::{Wait, Waits};

/// How often what is new is told.
const TELL: Duration = Duration::from_millis(250);
/// A hold is told once it is this old: most never are.
const WORTH_TELLING: Duration = Duration::from_millis(250);
/// A server that says nothing for so long is asked again on another connection. Nor is it tried again less often.
const ANSWER: Duration = Duration::from_secs(5);
/// How many times in a row telling fails before somebody should know.
const REPORT: u32 = 3;
/// How often what was told is confirmed; readers ignore what was not for 10 seconds.
const CONFIRM_AFTER: Duration = Duration::from_secs(3);

/// Removes what ended and adds what is new, in one statement. A crash of the server ends what is told of: none of this
/// waits for the disk.
const TELL_CHANGES: &str = "\
WITH told AS (
    SELECT * FROM unnest($3::uuid[], $4::text[], $5::text[], $6::text[], $7::int[], $8::text[], $9::text[],
                         $10::text[], $11::jsonb[], $12::timestamptz[], $13::float8[], $14::bigint[], $15::smallint[])
        AS t(lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at, waited,
             key_bits, key_space)
), ended AS (
    DELETE FROM leasehold.presence WHERE process_id = $1 AND lock_id = ANY ($2)
), new AS (
    INSERT INTO leasehold.presence
           (process_id, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata, acquired_at,
            seen_at, waits, key_bits, key_space)
    SELECT $1, lock_id, name, mode, scope, backend_pid, operation, locked_by, instance, metadata,
           coalesce(acquired_at, clock_timestamp() - waited * interval '1 second'), clock_timestamp(),
           backend_pid IS NULL, key_bits, key_space
    FROM told
)
SELECT set_config('synchronous_commit', 'off', true) AS commit";

/// Says that all is as it was told, and removes what processes told that ended without a word. Answers how much still
/// stands there: somebody else may have believed that of us.
const CONFIRM: &str = "\
WITH silent AS (
    DELETE FROM leasehold.presence
    WHERE process_id <> $1 AND seen_at < clock_timestamp() - interval '1 minute'
), confirmed AS (
    UPDATE leasehold.presence SET seen_at = clock_timestamp() WHERE process_id = $1 RETURNING lock_id
)
SELECT count(*), set_config('synchronous_commit', 'off', true) AS commit FROM confirmed";

/// What was told on a connection that broke still stands: who looks for a hold must find it all the time.
const TOLD: &str = "SELECT lock_id FROM leasehold.presence WHERE process_id = $1";

const TAKE_BACK: &str = "DELETE FROM leasehold.presence WHERE process_id = $1";

/// What is told, by column. A wait has no session of the server, and only this process knows for how long it lasts.
#[derive(Default)]
struct Told {
    lock_id: Vec<Uuid>,
    name: Vec<String>,
    mode: Vec<String>,
    scope: Vec<&'static str>,
    backend_pid: Vec<Option<i32>>,
    operation: Vec<String>,
    locked_by: Vec<String>,
    instance: Vec<String>,
    metadata: Vec<Value>,
    acquired_at: Vec<Option<DateTime<Utc>>>,
    waited: Vec<Option<f64>>,
    key_bits: Vec<Option<i64>>,
    key_space: Vec<Option<i16>>,
}

/// A hold or a wait.
enum Fact {
    Hold(Hold),
    Wait(Arc<Wait>),
}

/// Starts telling, on the keeper's thread. The connection is opened when there is first something to tell.
pub(crate) fn start(keeper: &Keeper, options: ConnectOptions, process_id: Uuid, holds: Holds, waits: Waits) {
    let stopping = keeper.stopping();
    keeper.finish(async move {
        tokio::pin!(stopping);
        let mut teller = None::<Teller>;
        // What was told on a connection that broke stands there until it is taken back on another.
        let mut stale = false;
        let mut failures = 0_u32;
        let mut tick = tokio::time::interval(TELL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = &mut stopping => break,
            }
            let facts = worth_telling(&holds, &waits);
            if teller.is_none() && facts.is_empty() && !stale {
                continue;
            }
            let telling = async {
                let open = match teller.take() {
                    Some(open) => open,
                    None => Teller::open(&options, process_id).await?,
                };
                open.tell(process_id, facts).await
            };
            let told = tokio::time::timeout(ANSWER, telling).await;
            stale = match told.unwrap_or(Err(StorageError::NoAnswer(ANSWER))) {
                Ok(open) => {
                    teller = Some(open);
                    failures = 0;
                    false
                }
                Err(error) => {
                    failures += 1;
                    tick.reset_after((TELL * (1 << failures.min(5))).min(ANSWER));
                    if failures == REPORT {
                        tracing::warn!(error = chain(&error), "nobody else is told of holds and waits");
                    } else {
                        tracing::debug!(error = chain(&error), "holds and waits were not told");
                    }
                    true
                }
            };
        }
        if let Some(teller) = teller {
            // Otherwise it is not believed for long.
            drop(tokio::time::timeout(ANSWER, teller.take_back(process_id)).await);
        }
    });
}

/// A connection, and what was told on it.
struct Teller {
    client: Client,
    told: HashSet<LockId>,
    /// `None` when what stands there was told on another connection.
    confirmed: Option<Instant>,
}

impl Teller {
    async fn open(options: &ConnectOptions, process_id: Uuid) -> Result<Self, StorageError> {
        let client = options.open_spawned().await?;
        let told = told(&client, process_id).await?;
        let confirmed = told.is_empty().then(Instant::now);
        Ok(Self {
            client,
            told,
            confirmed,
        })
    }

    /// Tells what is not told yet. After an error the connection is not used again.
    async fn tell(mut self, process_id: Uuid, facts: HashMap<LockId, Fact>) -> Result<Self, StorageError> {
        let ended: Vec<Uuid> = self
            .told
            .iter()
            .filter(|id| !facts.contains_key(id))
            .map(|id| id.as_uuid())
            .collect();
        let new = Told::of(facts.iter().filter(|(id, _)| !self.told.contains(id)));
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
                        &new.waited,
                        &new.key_bits,
                        &new.key_space,
                    ],
                )
                .await?;
            self.told = facts.into_keys().collect();
        }
        let is_fresh = |confirmed: Instant| confirmed.elapsed() < CONFIRM_AFTER;
        if !self.told.is_empty() && !self.confirmed.is_some_and(is_fresh) {
            let stands: i64 = self.client.query_one(CONFIRM, &[&process_id]).await?.get(0);
            self.confirmed = Some(Instant::now());
            if usize::try_from(stands) != Ok(self.told.len()) {
                self.told = told(&self.client, process_id).await?;
            }
        }
        Ok(self)
    }

    async fn take_back(self, process_id: Uuid) -> Result<(), StorageError> {
        if !self.told.is_empty() {
            self.client.execute(TAKE_BACK, &[&process_id]).await?;
        }
        Ok(())
    }
}

async fn told(client: &Client, process_id: Uuid) -> Result<HashSet<LockId>, StorageError> {
    let rows = client.query(TOLD, &[&process_id]).await?;
    Ok(rows
        .iter()
        .map(|row| LockId::from(row.get::<_, Uuid>(0)))
        .collect())
}

fn worth_telling(holds: &Holds, waits: &Waits) -> HashMap<LockId, Fact> {
    let mut all = holds.transactions();
    all.extend(holds.sessions());
    let holds = all
        .into_iter()
        .filter(|hold| hold.control.held_for() >= WORTH_TELLING)
        .map(|hold| (hold.control.parts().lock_id, Fact::Hold(hold)));
    let waits = waits.all().into_iter().map(|(id, wait)| (id, Fact::Wait(wait)));
    holds.chain(waits).collect()
}

/// The key that the server sees instead of the name.
fn key(hold: &Hold) -> Option<AdvisoryKey> {
    match &hold.scope {
        Scope::Lease(_) => None,
        Scope::Transaction(_) => Some(AdvisoryKey::of(&hold.control.parts().name)),
        Scope::Session { key, .. } => Some(*key),
    }
}

impl Told {
    fn of<'a>(facts: impl Iterator<Item = (&'a LockId, &'a Fact)>) -> Self {
        let mut told = Self::default();
        for (id, fact) in facts {
            match fact {
                Fact::Hold(hold) => {
                    let Some(backend_pid) = hold.backend_pid() else {
                        continue;
                    };
                    let parts = hold.control.parts();
                    told.push(*id, &parts.name, parts.mode, hold.scope.backend(), &parts.holder);
                    told.push_key(key(hold));
                    told.backend_pid.push(Some(backend_pid));
                    told.acquired_at.push(Some(parts.acquired_at));
                    told.waited.push(None);
                }
                Fact::Wait(wait) => {
                    told.push(*id, &wait.name, wait.mode, wait.scope, &wait.holder);
                    told.push_key(wait.key);
                    told.backend_pid.push(None);
                    told.acquired_at.push(None);
                    told.waited.push(Some(wait.since.elapsed().as_secs_f64()));
                }
            }
        }
        told
    }

    fn push(&mut self, id: LockId, name: &LockName, mode: LockMode, scope: &'static str, holder: &Holder) {
        self.lock_id.push(id.as_uuid());
        self.name.push(name.encoded().to_owned());
        self.mode.push(mode.to_string());
        self.scope.push(scope);
        self.operation.push(holder.operation.clone());
        self.locked_by.push(holder.owner.clone());
        self.instance.push(holder.instance.clone());
        self.metadata.push(Value::Object(holder.metadata.clone()));
    }

    fn push_key(&mut self, key: Option<AdvisoryKey>) {
        let (bits, space) = key.map(AdvisoryKey::as_lock_table_columns).unzip();
        self.key_bits.push(bits);
        self.key_space.push(space);
    }
}
