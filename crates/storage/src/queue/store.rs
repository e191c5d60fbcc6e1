//! [`PgWorkQueue`]: the queue's promises as statements.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use diesel::sql_types::{Array, BigInt, Bool, Integer, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel::{QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_domain::{
    Claim, ClaimKey, ClaimRequest, ClaimToken, Claimed, DeadLetter, Failure, KindStats, LockName, NewWork,
    Outcome, Page, QueueError, Requeue, Retention, Retry, Scope, WorkId, WorkItem, WorkQueue, WorkState,
    check_delay, check_lease, kept_error,
};
use serde_json::Value;
use uuid::Uuid;

use super::statements;
use crate::error::StorageError;
use crate::process::Process;
use crate::signals;
use crate::statement::Prepared;

/// How many scopes or claims one statement takes.
const CHUNK: usize = 1000;
/// Longer than this nothing is kept; Postgres cannot count back much further.
const LONGEST_AGE: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);

/// A work queue in `leasehold.work_items`. Clones share everything.
///
/// Calls take a connection of the pool for one statement. A transaction of the caller can enqueue and complete as
/// well: [`PgWorkQueue::enqueue_in_tx`], [`PgWorkQueue::complete_in_tx`].
#[derive(Clone)]
pub struct PgWorkQueue {
    pub(super) process: Arc<Process>,
}

impl PgWorkQueue {
    pub(crate) fn new(process: Arc<Process>) -> Self {
        Self { process }
    }

    /// As [`WorkQueue::enqueue_many`], in a transaction of the caller: the work is there when that commits, and never
    /// otherwise. Workers find it by and by; tell them with [`PgWorkQueue::wake`] after the commit.
    ///
    /// Until the transaction ends, others that enqueue the same scopes wait for it, and nobody claims these items; who
    /// has claimed one keeps it and can settle it. Enqueue all scopes in one call: two transactions that make several
    /// calls may deadlock, and Postgres ends one of them. The transaction runs at READ COMMITTED.
    ///
    /// # Errors
    /// [`QueueError`]. The transaction is aborted then, unless the bounds were not kept.
    ///
    /// # Cancel safety
    /// Roll back: the statement may still run.
    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "enqueue"))]
    pub async fn enqueue_in_tx(
        &self,
        conn: &mut AsyncPgConnection,
        work: &[NewWork],
    ) -> Result<(), QueueError> {
        for chunk in Merged::of(work)?.chunks() {
            chunk.insert(conn).await.map_err(StorageError::from)?;
        }
        Ok(())
    }

    /// As [`WorkQueue::complete`], in a transaction of the caller: what the work has written and that it is done
    /// become true together. If the transaction rolls back the claims are as they were.
    ///
    /// From here on the heartbeat passes over these claims; commit soon. The transaction runs at READ COMMITTED.
    ///
    /// # Errors
    /// [`QueueError`]. The transaction is aborted then.
    ///
    /// # Cancel safety
    /// Roll back: the statement may still run.
    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "complete"))]
    pub async fn complete_in_tx(
        &self,
        conn: &mut AsyncPgConnection,
        claims: &[ClaimKey],
    ) -> Result<Vec<Outcome>, QueueError> {
        let mut outcomes = Vec::with_capacity(claims.len());
        for chunk in claims.chunks(CHUNK) {
            let row = complete(conn, chunk).await.map_err(StorageError::from)?;
            outcomes.extend(row.outcomes(chunk));
        }
        Ok(outcomes)
    }

    /// As [`WorkQueue::redrive`], in a transaction of the caller. Workers find the work by and by; tell them with
    /// [`PgWorkQueue::wake`] after the commit.
    ///
    /// # Errors
    /// [`QueueError`]. The transaction is aborted then.
    ///
    /// # Cancel safety
    /// Roll back: the statement may still run.
    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "redrive"))]
    pub async fn redrive_in_tx(
        &self,
        conn: &mut AsyncPgConnection,
        tenant: &str,
        letters: &[i64],
    ) -> Result<u64, QueueError> {
        let row = redrive(conn, tenant, letters).await.map_err(StorageError::from)?;
        Ok(row.number())
    }

    /// Tells the workers of these kinds that there is work. A hint, sent in the background if somebody is known to
    /// wait; whoever misses it polls.
    pub fn wake<K: AsRef<str>>(&self, kinds: impl IntoIterator<Item = K>) {
        let kinds: HashSet<i64> = kinds
            .into_iter()
            .filter_map(|kind| signal_key(kind.as_ref()))
            .collect();
        for key in kinds {
            self.process.signals.added(key);
        }
    }

    /// In how long the first item of these kinds may be claimed that now rests or is somebody's; zero when one may be
    /// now, and `None` when there is none.
    pub(super) async fn next_due(&self, kinds: &[String]) -> Result<Option<Duration>, QueueError> {
        let row: NextDue = self
            .ask(async |conn| {
                let query = diesel::sql_query(statements::NEXT_DUE).bind::<Array<Text>, _>(kinds);
                Prepared(query).one(conn).await
            })
            .await?;
        Ok(row
            .due_us
            .map(|us| Duration::from_micros(u64::try_from(us).unwrap_or(0))))
    }

    /// Removes what is left of claims whose items were removed by others.
    pub(super) async fn sweep(&self) -> Result<(), QueueError> {
        let sweep = async |conn: &mut AsyncPgConnection| {
            Prepared(diesel::sql_query(statements::SWEEP)).execute(conn).await
        };
        while self.ask(sweep).await? == CHUNK {}
        Ok(())
    }

    /// Runs one statement of our own.
    async fn ask<T>(
        &self,
        work: impl AsyncFnOnce(&mut AsyncPgConnection) -> QueryResult<T>,
    ) -> Result<T, QueueError> {
        let ask = async |conn: &mut AsyncPgConnection| match work(conn).await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(StorageError::of_connection(conn, error).await),
        };
        Ok(self.process.pool.ask(ask).await?)
    }

    async fn put_back(&self, items: Vec<PutBack>, uncounted: bool) -> Result<Vec<Outcome>, QueueError> {
        let mut outcomes = Vec::with_capacity(items.len());
        for chunk in items.chunks(CHUNK) {
            let keys: Vec<ClaimKey> = chunk.iter().map(|item| item.claim).collect();
            let (ids, tokens) = columns(&keys);
            let delays: Vec<i64> = chunk.iter().map(|item| micros(item.delay)).collect();
            let errors: Vec<Option<&str>> = chunk.iter().map(|item| item.error.as_deref()).collect();
            let query = diesel::sql_query(statements::PUT_BACK)
                .bind::<Array<BigInt>, _>(ids)
                .bind::<Array<SqlUuid>, _>(tokens)
                .bind::<Array<BigInt>, _>(delays)
                .bind::<Array<Nullable<Text>>, _>(errors)
                .bind::<Bool, _>(uncounted);
            let row: Settled = self.ask(async |conn| Prepared(query).one(conn).await).await?;
            outcomes.extend(row.outcomes(&keys));
        }
        Ok(outcomes)
    }
}

impl fmt::Debug for PgWorkQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgWorkQueue").finish_non_exhaustive()
    }
}

/// The key under which workers wait for work of a kind.
pub(super) fn signal_key(kind: &str) -> Option<i64> {
    let name = LockName::new(["leasehold", "work", kind]).ok()?;
    Some(signals::key(&name))
}

pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

pub(super) fn columns(claims: &[ClaimKey]) -> (Vec<i64>, Vec<Uuid>) {
    claims
        .iter()
        .map(|claim| (claim.id.get(), claim.token.as_uuid()))
        .unzip()
}

async fn complete(conn: &mut AsyncPgConnection, claims: &[ClaimKey]) -> QueryResult<Settled> {
    let (ids, tokens) = columns(claims);
    let query = diesel::sql_query(statements::COMPLETE)
        .bind::<Array<BigInt>, _>(ids)
        .bind::<Array<SqlUuid>, _>(tokens);
    Prepared(query).one(conn).await
}

async fn redrive(conn: &mut AsyncPgConnection, tenant: &str, letters: &[i64]) -> QueryResult<Redriven> {
    let query = diesel::sql_query(statements::REDRIVE)
        .bind::<Array<BigInt>, _>(letters)
        .bind::<Text, _>(tenant);
    Prepared(query).one(conn).await
}

/// A claim on its way back, with an error that replaces the last one.
struct PutBack {
    claim: ClaimKey,
    delay: Duration,
    error: Option<String>,
}

/// The tokens of the claims that were ended, by what was found.
#[derive(QueryableByName)]
struct Settled {
    #[diesel(sql_type = Array<SqlUuid>)]
    done: Vec<Uuid>,
    #[diesel(sql_type = Array<SqlUuid>)]
    changed: Vec<Uuid>,
}

impl Settled {
    fn outcomes(self, claims: &[ClaimKey]) -> Vec<Outcome> {
        // Mostly all are done, in the order of their ids.
        let asked = claims.iter().map(|claim| claim.token.as_uuid());
        if asked.eq(self.done.iter().copied()) {
            return vec![Outcome::Done; claims.len()];
        }
        let done = self.done.into_iter().map(|token| (token, Outcome::Done));
        let changed = self
            .changed
            .into_iter()
            .map(|token| (token, Outcome::DoneButChanged));
        let found: HashMap<Uuid, Outcome> = done.chain(changed).collect();
        claims
            .iter()
            .map(|claim| {
                found
                    .get(&claim.token.as_uuid())
                    .copied()
                    .unwrap_or(Outcome::NotOwned)
            })
            .collect()
    }
}

#[derive(QueryableByName)]
struct NextDue {
    #[diesel(sql_type = Nullable<BigInt>)]
    due_us: Option<i64>,
}

/// Enqueues, one for each scope, in the order of the scopes.
struct Merged<'a>(Vec<(&'a Scope, MergedWork<'a>)>);

struct MergedWork<'a> {
    payload: Option<&'a Value>,
    priority: i32,
    event_at: Option<DateTime<Utc>>,
    /// One of them was an event of now.
    is_now: bool,
    max_attempts: i32,
}

impl<'a> Merged<'a> {
    fn of(work: &'a [NewWork]) -> Result<Self, QueueError> {
        let mut merged = BTreeMap::<&Scope, MergedWork<'a>>::new();
        for work in work {
            work.validate()?;
            let last = MergedWork {
                payload: work.payload(),
                priority: work.priority(),
                event_at: work.event_at(),
                is_now: work.event_at().is_none(),
                max_attempts: i32::try_from(work.max_attempts()).unwrap_or(i32::MAX),
            };
            merged
                .entry(work.scope())
                .and_modify(|before| {
                    before.payload = last.payload;
                    before.priority = before.priority.min(last.priority);
                    before.event_at = before.event_at.max(last.event_at);
                    before.is_now |= last.is_now;
                    before.max_attempts = last.max_attempts;
                })
                .or_insert(last);
        }
        Ok(Self(merged.into_iter().collect()))
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        self.0.chunks(CHUNK).map(Chunk)
    }
}

struct Chunk<'a>(&'a [(&'a Scope, MergedWork<'a>)]);

impl Chunk<'_> {
    async fn insert(&self, conn: &mut AsyncPgConnection) -> QueryResult<()> {
        let scopes =
            |part: fn(&Scope) -> &str| -> Vec<&str> { self.0.iter().map(|(scope, _)| part(scope)).collect() };
        let work = || self.0.iter().map(|(_, work)| work);
        let query = diesel::sql_query(statements::ENQUEUE)
            .bind::<Array<Text>, _>(scopes(|scope| &scope.tenant))
            .bind::<Array<Text>, _>(scopes(|scope| &scope.kind))
            .bind::<Array<Text>, _>(scopes(|scope| &scope.scope_type))
            .bind::<Array<Text>, _>(scopes(|scope| &scope.scope_id))
            .bind::<Array<Nullable<Jsonb>>, _>(work().map(|work| work.payload.cloned()).collect::<Vec<_>>())
            .bind::<Array<Integer>, _>(work().map(|work| work.priority).collect::<Vec<_>>())
            .bind::<Array<Nullable<Timestamptz>>, _>(work().map(|work| work.event_at).collect::<Vec<_>>())
            .bind::<Array<Bool>, _>(work().map(|work| work.is_now).collect::<Vec<_>>())
            .bind::<Array<Integer>, _>(work().map(|work| work.max_attempts).collect::<Vec<_>>());
        Prepared(query).execute(conn).await?;
        Ok(())
    }
}

/// What items, claims and dead letters have in common.
#[derive(QueryableByName)]
struct Common {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Text)]
    tenant_id: String,
    #[diesel(sql_type = Text)]
    kind: String,
    #[diesel(sql_type = Text)]
    scope_type: String,
    #[diesel(sql_type = Text)]
    scope_id: String,
    #[diesel(sql_type = Nullable<Jsonb>)]
    payload: Option<Value>,
    #[diesel(sql_type = Integer)]
    priority: i32,
    #[diesel(sql_type = Timestamptz)]
    event_at: DateTime<Utc>,
    #[diesel(sql_type = Integer)]
    max_attempts: i32,
    #[diesel(sql_type = Integer)]
    attempt_count: i32,
    #[diesel(sql_type = Nullable<Text>)]
    last_error: Option<String>,
}

impl Common {
    fn into_letter(self, failed_at: DateTime<Utc>) -> DeadLetter {
        DeadLetter {
            id: self.id,
            scope: Scope::new(self.tenant_id, self.kind, self.scope_type, self.scope_id),
            payload: self.payload,
            priority: self.priority,
            event_at: self.event_at,
            attempt_count: count(self.attempt_count),
            max_attempts: count(self.max_attempts),
            last_error: self.last_error.unwrap_or_default(),
            failed_at,
        }
    }
}

fn count(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// A claim, or a dead letter that has no token.
#[derive(QueryableByName)]
struct ClaimRow {
    #[diesel(embed)]
    common: Common,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    token: Option<Uuid>,
    #[diesel(sql_type = Timestamptz)]
    at: DateTime<Utc>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    ends_at: Option<DateTime<Utc>>,
}

#[derive(QueryableByName)]
struct ItemRow {
    #[diesel(embed)]
    common: Common,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    expires_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Bool)]
    claimed: bool,
    #[diesel(sql_type = Bool)]
    live: bool,
}

impl From<ItemRow> for WorkItem {
    fn from(row: ItemRow) -> Self {
        let state = match (row.live, row.claimed) {
            (true, true) => WorkState::Claimed,
            (true, false) => WorkState::Delayed,
            (false, _) => WorkState::Ready,
        };
        let common = row.common;
        Self {
            id: WorkId::new(common.id),
            scope: Scope::new(common.tenant_id, common.kind, common.scope_type, common.scope_id),
            state,
            payload: common.payload,
            priority: common.priority,
            event_at: common.event_at,
            attempt_count: count(common.attempt_count),
            max_attempts: count(common.max_attempts),
            not_before: row.expires_at.filter(|_| state == WorkState::Delayed),
            last_error: common.last_error,
        }
    }
}

#[derive(QueryableByName)]
struct LetterRow {
    #[diesel(embed)]
    common: Common,
    #[diesel(sql_type = Timestamptz)]
    failed_at: DateTime<Utc>,
}

#[derive(QueryableByName)]
struct StatsRow {
    #[diesel(sql_type = Text)]
    kind: String,
    #[diesel(sql_type = BigInt)]
    ready: i64,
    #[diesel(sql_type = BigInt)]
    delayed: i64,
    #[diesel(sql_type = BigInt)]
    claimed: i64,
    #[diesel(sql_type = BigInt)]
    dead: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    oldest_us: Option<i64>,
}

impl From<StatsRow> for KindStats {
    fn from(row: StatsRow) -> Self {
        let count = |number: i64| u64::try_from(number).unwrap_or(0);
        Self {
            kind: row.kind,
            ready: count(row.ready),
            delayed: count(row.delayed),
            claimed: count(row.claimed),
            dead: count(row.dead),
            oldest_ready: row.oldest_us.map(|us| Duration::from_micros(count(us))),
        }
    }
}

#[derive(QueryableByName)]
struct Redriven {
    #[diesel(sql_type = BigInt)]
    number: i64,
    #[diesel(sql_type = Array<Text>)]
    kinds: Vec<String>,
}

impl Redriven {
    fn number(&self) -> u64 {
        u64::try_from(self.number).unwrap_or(0)
    }
}

#[async_trait]
impl WorkQueue for PgWorkQueue {
    /// Each thousand scopes are a statement of their own.
    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "enqueue"))]
    async fn enqueue_many(&self, work: &[NewWork]) -> Result<(), QueueError> {
        let merged = Merged::of(work)?;
        for chunk in merged.chunks() {
            self.ask(async |conn| chunk.insert(conn).await).await?;
            self.wake(chunk.0.iter().map(|(scope, _)| &scope.kind));
        }
        Ok(())
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "claim"))]
    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, QueueError> {
        request.validate()?;
        let query = diesel::sql_query(statements::CLAIM)
            .bind::<Array<Text>, _>(request.kinds())
            .bind::<Integer, _>(i32::try_from(request.batch()).unwrap_or(i32::MAX))
            .bind::<Text, _>(request.worker())
            .bind::<BigInt, _>(micros(request.lease()));
        let rows: Vec<ClaimRow> = self.ask(async |conn| Prepared(query).load(conn).await).await?;
        let mut claimed = Claimed::default();
        for ClaimRow {
            common,
            token,
            at,
            ends_at,
        } in rows
        {
            let (Some(token), Some(expires_at)) = (token, ends_at) else {
                claimed.dead.push(common.into_letter(at));
                continue;
            };
            claimed.claims.push(Claim {
                key: ClaimKey {
                    id: WorkId::new(common.id),
                    token: ClaimToken::from(token),
                },
                scope: Scope::new(common.tenant_id, common.kind, common.scope_type, common.scope_id),
                payload: common.payload,
                priority: common.priority,
                event_at: common.event_at,
                attempt: count(common.attempt_count),
                max_attempts: count(common.max_attempts),
                last_error: common.last_error,
                claimed_at: at,
                expires_at,
            });
        }
        let order = |claim: &Claim| (claim.priority, claim.event_at, claim.key.id);
        claimed.claims.sort_unstable_by_key(order);
        Ok(claimed)
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "extend"))]
    async fn extend(&self, claims: &[ClaimKey], lease: Duration) -> Result<Vec<Outcome>, QueueError> {
        check_lease(lease)?;
        let mut outcomes = Vec::with_capacity(claims.len());
        for chunk in claims.chunks(CHUNK) {
            let (ids, tokens) = columns(chunk);
            let query = diesel::sql_query(statements::EXTEND)
                .bind::<Array<BigInt>, _>(ids)
                .bind::<Array<SqlUuid>, _>(tokens)
                .bind::<BigInt, _>(micros(lease));
            let row: Settled = self.ask(async |conn| Prepared(query).one(conn).await).await?;
            outcomes.extend(row.outcomes(chunk));
        }
        Ok(outcomes)
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "complete"))]
    async fn complete(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError> {
        let mut outcomes = Vec::with_capacity(claims.len());
        for chunk in claims.chunks(CHUNK) {
            let row = self.ask(async |conn| complete(conn, chunk).await).await?;
            outcomes.extend(row.outcomes(chunk));
        }
        Ok(outcomes)
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "retry"))]
    async fn retry(&self, retries: &[Retry]) -> Result<Vec<Outcome>, QueueError> {
        let mut items = Vec::with_capacity(retries.len());
        for retry in retries {
            check_delay("backoff", retry.backoff)?;
            items.push(PutBack {
                claim: retry.claim,
                delay: retry.backoff,
                error: Some(kept_error(&retry.error)),
            });
        }
        self.put_back(items, false).await
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "fail"))]
    async fn fail(&self, failures: &[Failure]) -> Result<Vec<Outcome>, QueueError> {
        let mut outcomes = Vec::with_capacity(failures.len());
        for chunk in failures.chunks(CHUNK) {
            let keys: Vec<ClaimKey> = chunk.iter().map(|failure| failure.claim).collect();
            let (ids, tokens) = columns(&keys);
            let errors: Vec<String> = chunk.iter().map(|failure| kept_error(&failure.error)).collect();
            let query = diesel::sql_query(statements::FAIL)
                .bind::<Array<BigInt>, _>(ids)
                .bind::<Array<SqlUuid>, _>(tokens)
                .bind::<Array<Text>, _>(errors);
            let row: Settled = self.ask(async |conn| Prepared(query).one(conn).await).await?;
            outcomes.extend(row.outcomes(&keys));
        }
        Ok(outcomes)
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "put_back"))]
    async fn requeue_after(&self, requeues: &[Requeue]) -> Result<Vec<Outcome>, QueueError> {
        let mut items = Vec::with_capacity(requeues.len());
        for requeue in requeues {
            check_delay("after", requeue.after)?;
            items.push(PutBack {
                claim: requeue.claim,
                delay: requeue.after,
                error: None,
            });
        }
        self.put_back(items, true).await
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "stats"))]
    async fn stats(&self) -> Result<Vec<KindStats>, QueueError> {
        let rows: Vec<StatsRow> = self
            .ask(async |conn| Prepared(diesel::sql_query(statements::STATS)).load(conn).await)
            .await?;
        Ok(rows.into_iter().map(KindStats::from).collect())
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "items"))]
    async fn items(&self, page: &Page) -> Result<Vec<WorkItem>, QueueError> {
        let rows: Vec<ItemRow> = self
            .page(page, statements::ITEMS, statements::ITEMS_OF_TENANT)
            .await?;
        Ok(rows.into_iter().map(WorkItem::from).collect())
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "dead_letters"))]
    async fn dead_letters(&self, page: &Page) -> Result<Vec<DeadLetter>, QueueError> {
        let rows: Vec<LetterRow> = self
            .page(page, statements::LETTERS, statements::LETTERS_OF_TENANT)
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| row.common.into_letter(row.failed_at))
            .collect())
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "redrive"))]
    async fn redrive(&self, tenant: &str, letters: &[i64]) -> Result<u64, QueueError> {
        let row = self
            .ask(async |conn| redrive(conn, tenant, letters).await)
            .await?;
        self.wake(&row.kinds);
        Ok(row.number())
    }

    #[tracing::instrument(level = "debug", name = "queue", skip_all, fields(operation = "purge"))]
    async fn purge_dead_letters(&self, retention: &Retention) -> Result<u64, QueueError> {
        let age = micros(retention.age.min(LONGEST_AGE));
        let number = i64::try_from(retention.number).unwrap_or(i64::MAX);
        let purge = async |conn: &mut AsyncPgConnection| {
            let query = diesel::sql_query(statements::PURGE)
                .bind::<BigInt, _>(age)
                .bind::<BigInt, _>(number);
            Prepared(query).execute(conn).await
        };
        let mut purged = 0;
        loop {
            let chunk = self.ask(purge).await?;
            purged += chunk as u64;
            if chunk < CHUNK {
                return Ok(purged);
            }
        }
    }
}

impl PgWorkQueue {
    async fn page<R>(&self, page: &Page, all: &str, of_tenant: &str) -> Result<Vec<R>, QueueError>
    where
        R: QueryableByName<diesel::pg::Pg> + Send + 'static,
    {
        page.validate()?;
        let sql = if page.tenant.is_some() { of_tenant } else { all };
        let query = diesel::sql_query(sql)
            .bind::<Nullable<Text>, _>(page.tenant.as_deref())
            .bind::<Nullable<Text>, _>(page.kind.as_deref())
            .bind::<BigInt, _>(page.after)
            .bind::<BigInt, _>(i64::try_from(page.limit).unwrap_or(i64::MAX));
        self.ask(async |conn| Prepared(query).load(conn).await).await
    }
}
