//! The statements on `leasehold.jobs` and `leasehold.job_runs`, and their rows.
//!
//! Whoever changes a job's runs has the job's row locked. Each grant raises the token in it, so a statement that names
//! the token it has seen acts on what it has seen, or not at all.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::sql_types::{Array, BigInt, Bool, Double, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel::{OptionalExtension, QueryResult, QueryableByName};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_domain::{Invalid, MissedSlots, OnCrash};
use uuid::Uuid;

use crate::error::StorageError;
use crate::jobs::control::RunNow;
use crate::jobs::schedule::JobSlots;
use crate::jobs::{Job, JobRunInfo, RunOutcome, Schedule};
use crate::lease::seconds;
use crate::pool::Pool;
use crate::statement::Prepared;

/// What the lease says that its holder does.
pub(crate) const OPERATION: &str = "job";
/// How much of an error the history keeps, in bytes.
const ERROR: usize = 1024;

/// Slots count from here when the job is new, or its schedule is.
const REGISTER: &str = "\
INSERT INTO leasehold.jobs AS j (name, schedule, time_zone, missed, on_crash, registered_at, handled_until)
SELECT $1, $2, $3, $4, $5, at.now, at.now FROM (SELECT clock_timestamp() AS now) AS at
ON CONFLICT (name) DO UPDATE
SET schedule = excluded.schedule, time_zone = excluded.time_zone, missed = excluded.missed,
    on_crash = excluded.on_crash,
    registered_at = CASE WHEN (j.schedule, j.time_zone) = (excluded.schedule, excluded.time_zone)
                         THEN j.registered_at ELSE excluded.registered_at END,
    handled_until = CASE WHEN (j.schedule, j.time_zone) = (excluded.schedule, excluded.time_zone)
                         THEN j.handled_until ELSE greatest(j.handled_until, excluded.handled_until) END
WHERE (j.schedule, j.time_zone, j.missed, j.on_crash)
      IS DISTINCT FROM (excluded.schedule, excluded.time_zone, excluded.missed, excluded.on_crash)";

/// The jobs of these names, or all, each with its last run. `live`: that has its lease. `over`: it has lost it, and has no
/// outcome.
const LOOK: &str = "\
SELECT j.name, j.schedule, j.time_zone, j.missed, j.on_crash, j.paused, j.registered_at, j.handled_until, j.asked_id,
       j.asked_at, j.run_fencing_token, at.now,
       CASE WHEN j.run_expires_at > at.now THEN extract(epoch FROM j.run_expires_at - at.now)::float8 END AS run_ends_in,
       last.id, last.slot, last.attempt, last.asked, last.holder, last.started_at, last.finished_at, last.outcome,
       last.error, last.id = j.run_id AND j.run_expires_at > at.now AS live,
       coalesce(j.run_expires_at <= at.now, false) OR (j.run_id IS NULL AND last.id IS NOT NULL AND last.outcome IS NULL)
           AS over
FROM (SELECT clock_timestamp() AS now) AS at
CROSS JOIN leasehold.jobs AS j
LEFT JOIN LATERAL (
    SELECT * FROM leasehold.job_runs AS r WHERE r.job = j.name ORDER BY r.seq DESC LIMIT 1
) AS last ON true
WHERE $1 IS NULL OR j.name = ANY ($1)
ORDER BY j.name";

const HISTORY: &str = "\
SELECT r.id, r.slot, r.attempt, r.asked, r.holder, r.started_at, r.finished_at, r.outcome, r.error,
       r.id = j.run_id AND j.run_expires_at > clock_timestamp() AS live
FROM leasehold.job_runs AS r JOIN leasehold.jobs AS j ON j.name = r.job
WHERE r.job = $1
ORDER BY r.seq DESC
LIMIT 100";

/// Claims a slot: settles it, leases the row, and makes the row of the run. No row: another was first, or something has
/// changed. Of the history, the newest 100 stay, and nothing that is older than 400 days.
const CLAIM: &str = "\
WITH open AS MATERIALIZED (
    SELECT name FROM leasehold.jobs
    WHERE name = $1 AND run_fencing_token = $3 AND handled_until = $4 AND run_id IS NULL AND NOT paused
      AND $6 <= clock_timestamp() AND (NOT $8 OR asked_id = $2)
    FOR NO KEY UPDATE SKIP LOCKED
), taken AS (
    UPDATE leasehold.jobs AS j
    SET run_id = $2, run_operation = 'job', run_by = $10, run_acquired_at = at.now,
        run_expires_at = at.now + $11 * interval '1 second',
        run_fencing_token = leasehold.next_token(j.run_fencing_token), handled_until = $5,
        asked_id = CASE WHEN NOT $8 THEN j.asked_id END, asked_at = CASE WHEN NOT $8 THEN j.asked_at END
    FROM open, (SELECT clock_timestamp() AS now) AS at
    WHERE j.name = open.name
    RETURNING j.run_acquired_at, j.run_expires_at, j.run_fencing_token
), started AS (
    INSERT INTO leasehold.job_runs (id, job, slot, attempt, asked, holder, started_at)
    SELECT $2, $1, $6, $7, $9, $10, run_acquired_at FROM taken
), forgotten AS (
    DELETE FROM leasehold.job_runs
    WHERE job = $1 AND outcome IS NOT NULL AND EXISTS (SELECT FROM taken)
      AND (started_at < clock_timestamp() - interval '400 days'
           OR seq <= (SELECT seq FROM leasehold.job_runs WHERE job = $1 ORDER BY seq DESC OFFSET 99 LIMIT 1))
)
SELECT run_acquired_at, run_expires_at, run_fencing_token FROM taken";

/// Ends a run with its outcome, if it is still ours: that is looked at after the row is locked. An outcome that was
/// accepted before, and whose answer was lost, is accepted. Who waits is told that a slot may be run again.
const SETTLE: &str = "\
WITH mine AS MATERIALIZED (
    SELECT name, run_expires_at AS until FROM leasehold.jobs WHERE name = $1 AND run_id = $2 FOR NO KEY UPDATE
), ended AS (
    UPDATE leasehold.jobs AS j
    SET run_id = NULL, run_operation = NULL, run_by = NULL, run_acquired_at = NULL, run_expires_at = NULL
    FROM mine WHERE j.name = mine.name AND mine.until > clock_timestamp()
    RETURNING j.name
), told AS (
    UPDATE leasehold.job_runs AS r SET finished_at = clock_timestamp(), outcome = $3, error = $4
    FROM ended WHERE r.id = $2 AND r.outcome IS NULL
    RETURNING CASE WHEN $3 = 'interrupted' THEN pg_notify('leasehold_jobs', '')::text END AS told
)
SELECT (SELECT count(*) + count(told) FROM told) > 0
       OR coalesce((SELECT outcome = $3 FROM leasehold.job_runs WHERE id = $2), false) AS accepted";

/// Records that a run ended without an outcome.
const CLOSE: &str = "\
WITH gone AS MATERIALIZED (
    SELECT name, run_expires_at AS at FROM leasehold.jobs
    WHERE name = $1 AND run_fencing_token = $2 AND (run_id IS NULL OR run_expires_at <= clock_timestamp())
    FOR NO KEY UPDATE SKIP LOCKED
), ended AS (
    UPDATE leasehold.jobs AS j
    SET run_id = NULL, run_operation = NULL, run_by = NULL, run_acquired_at = NULL, run_expires_at = NULL
    FROM gone WHERE j.name = gone.name
)
UPDATE leasehold.job_runs AS r
SET finished_at = greatest(r.started_at, coalesce(gone.at, clock_timestamp())), outcome = 'interrupted'
FROM gone WHERE r.job = gone.name AND r.outcome IS NULL
RETURNING r.id";

const ASK: &str = "\
WITH job AS MATERIALIZED (
    SELECT name, paused, asked_id IS NOT NULL OR coalesce(run_expires_at > clock_timestamp(), false) AS running
    FROM leasehold.jobs WHERE name = $1 FOR NO KEY UPDATE
), asked AS (
    UPDATE leasehold.jobs AS j SET asked_id = $2, asked_at = clock_timestamp()
    FROM job WHERE j.name = job.name AND NOT job.paused AND NOT job.running
    RETURNING pg_notify('leasehold_jobs', '')::text AS told
)
SELECT paused, running, (SELECT count(told) FROM asked) AS told FROM job";

const PAUSE: &str = "UPDATE leasehold.jobs SET paused = true WHERE name = $1 RETURNING name";

/// Slots that began meanwhile are passed over.
const RESUME: &str = "\
UPDATE leasehold.jobs
SET paused = false,
    handled_until = CASE WHEN paused THEN greatest(handled_until, clock_timestamp()) ELSE handled_until END
WHERE name = $1
RETURNING name, pg_notify('leasehold_jobs', '')::text AS told";

#[derive(QueryableByName)]
pub(crate) struct JobRow {
    #[diesel(sql_type = Text)]
    pub(crate) name: String,
    #[diesel(sql_type = Text)]
    pub(crate) schedule: String,
    #[diesel(sql_type = Text)]
    pub(crate) time_zone: String,
    #[diesel(sql_type = Text)]
    missed: String,
    #[diesel(sql_type = Text)]
    on_crash: String,
    #[diesel(sql_type = Bool)]
    pub(crate) paused: bool,
    #[diesel(sql_type = Timestamptz)]
    registered_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    pub(crate) handled_until: DateTime<Utc>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    pub(crate) asked_id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub(crate) asked_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = BigInt)]
    pub(crate) run_fencing_token: i64,
    #[diesel(sql_type = Timestamptz)]
    pub(crate) now: DateTime<Utc>,
    /// Seconds until the lease of the run that is under way ends, if it is not renewed.
    #[diesel(sql_type = Nullable<Double>)]
    pub(crate) run_ends_in: Option<f64>,
    /// A run has ended without an outcome, and nobody has recorded that yet.
    #[diesel(sql_type = Bool)]
    over: bool,
    #[diesel(embed)]
    last: LastRow,
}

/// A run, or nulls where there is none.
#[derive(QueryableByName)]
struct LastRow {
    #[diesel(sql_type = Nullable<SqlUuid>)]
    id: Option<Uuid>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    slot: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Integer>)]
    attempt: Option<i32>,
    #[diesel(sql_type = Nullable<Bool>)]
    asked: Option<bool>,
    #[diesel(sql_type = Nullable<Text>)]
    holder: Option<String>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    started_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    finished_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<Text>)]
    outcome: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    error: Option<String>,
    #[diesel(sql_type = Nullable<Bool>)]
    live: Option<bool>,
}

/// What the last run of a job is at.
pub(crate) enum Last {
    /// Its lease has not ended. Its end is in this time, unless it is renewed.
    Running(Duration),
    /// Its lease is over, and nobody has recorded that yet.
    Over,
    /// It ended without an outcome.
    Interrupted(JobRunInfo),
    /// It has its outcome, or there was none: the job has not run since then.
    Settled(DateTime<Utc>),
}

impl LastRow {
    fn run(&self) -> Option<JobRunInfo> {
        let outcome = match &self.outcome {
            Some(text) => RunOutcome::parse(text),
            None if self.live == Some(true) => None,
            None => Some(RunOutcome::Interrupted),
        };
        Some(JobRunInfo {
            id: self.id?,
            slot: self.slot?,
            attempt: self.attempt?,
            asked: self.asked?,
            holder: self.holder.clone()?,
            started_at: self.started_at?,
            finished_at: self.finished_at,
            outcome,
            error: self.error.clone(),
        })
    }
}

impl JobRow {
    /// The table has no other policies than those that are written by this.
    pub(crate) fn missed(&self) -> MissedSlots {
        MissedSlots::parse(&self.missed).unwrap_or_default()
    }

    pub(crate) fn on_crash(&self) -> OnCrash {
        OnCrash::parse(&self.on_crash).unwrap_or_default()
    }

    /// The slots of the schedule that stands in the row, which may be that of another version of the program.
    pub(crate) fn slots(&self) -> Result<JobSlots, Invalid> {
        let schedule = Schedule::read(&self.schedule, &self.time_zone)?;
        Ok(schedule.slots(self.registered_at))
    }

    pub(crate) fn last_run(&self) -> Option<JobRunInfo> {
        self.last.run()
    }

    pub(crate) fn last(&self) -> Last {
        if let Some(seconds) = self.run_ends_in {
            return Last::Running(Duration::try_from_secs_f64(seconds).unwrap_or_default());
        }
        if self.over {
            return Last::Over;
        }
        match self.last.run() {
            None => Last::Settled(self.registered_at),
            Some(run) if run.outcome == Some(RunOutcome::Interrupted) => Last::Interrupted(run),
            Some(run) => Last::Settled(run.finished_at.unwrap_or(run.started_at)),
        }
    }
}

/// A run to begin.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) id: Uuid,
    pub(crate) slot: DateTime<Utc>,
    pub(crate) attempt: i32,
    pub(crate) asked: bool,
    /// It is the one that stands in the row as asked for.
    pub(crate) takes_up: bool,
    /// All slots until here are settled with it.
    pub(crate) handled_until: DateTime<Utc>,
}

#[derive(QueryableByName)]
pub(crate) struct Claimed {
    #[diesel(sql_type = Timestamptz)]
    pub(crate) run_acquired_at: DateTime<Utc>,
    #[diesel(sql_type = Timestamptz)]
    pub(crate) run_expires_at: DateTime<Utc>,
    #[diesel(sql_type = BigInt)]
    pub(crate) run_fencing_token: i64,
}

#[derive(QueryableByName)]
struct Accepted {
    #[diesel(sql_type = Bool)]
    accepted: bool,
}

#[derive(QueryableByName)]
struct Ended {
    #[diesel(sql_type = SqlUuid)]
    #[expect(dead_code, reason = "that there is a row is the answer")]
    id: Uuid,
}

#[derive(QueryableByName)]
struct AskRow {
    #[diesel(sql_type = Bool)]
    paused: bool,
    #[diesel(sql_type = Bool)]
    running: bool,
}

#[derive(QueryableByName)]
struct Named {
    #[diesel(sql_type = Text)]
    #[expect(dead_code, reason = "that there is a row is the answer")]
    name: String,
}

pub(crate) async fn register(pool: &Pool, job: &Job) -> Result<(), StorageError> {
    let query = diesel::sql_query(REGISTER)
        .bind::<Text, _>(&job.name)
        .bind::<Text, _>(job.schedule.to_string())
        .bind::<Text, _>(job.schedule.time_zone())
        .bind::<Text, _>(job.missed.as_str())
        .bind::<Text, _>(job.on_crash.as_str());
    pool.ask(async |conn| Prepared(query).execute(conn).await.map_err(StorageError::from))
        .await?;
    Ok(())
}

/// The jobs of these names, or all.
pub(crate) async fn look(pool: &Pool, names: Option<&[String]>) -> Result<Vec<JobRow>, StorageError> {
    pool.ask(async |conn| Ok(look_on(conn, names).await?)).await
}

pub(crate) async fn look_on(
    conn: &mut AsyncPgConnection,
    names: Option<&[String]>,
) -> QueryResult<Vec<JobRow>> {
    let query = diesel::sql_query(LOOK).bind::<Nullable<Array<Text>>, _>(names);
    Prepared(query).load(conn).await
}

pub(crate) async fn history(pool: &Pool, name: &str) -> Result<Vec<JobRunInfo>, StorageError> {
    let query = diesel::sql_query(HISTORY).bind::<Text, _>(name);
    let rows: Vec<LastRow> = pool
        .ask(async |conn| Ok::<_, StorageError>(Prepared(query).load(conn).await?))
        .await?;
    Ok(rows.iter().filter_map(LastRow::run).collect())
}

/// `None`: the row is not as it was seen, or locked.
pub(crate) async fn claim(
    pool: &Pool,
    seen: &JobRow,
    claim: &Claim,
    holder: &str,
    lease: Duration,
) -> Result<Option<Claimed>, StorageError> {
    let query = diesel::sql_query(CLAIM)
        .bind::<Text, _>(&seen.name)
        .bind::<SqlUuid, _>(claim.id)
        .bind::<BigInt, _>(seen.run_fencing_token)
        .bind::<Timestamptz, _>(seen.handled_until)
        .bind::<Timestamptz, _>(claim.handled_until)
        .bind::<Timestamptz, _>(claim.slot)
        .bind::<Integer, _>(claim.attempt)
        .bind::<Bool, _>(claim.takes_up)
        .bind::<Bool, _>(claim.asked)
        .bind::<Text, _>(holder)
        .bind::<Double, _>(seconds(lease));
    let ask = async |conn: &mut AsyncPgConnection| match Prepared(query).one(conn).await.optional() {
        Ok(row) => Ok(row),
        Err(error) => Err(StorageError::of_connection(conn, error).await),
    };
    pool.ask(ask).await
}

/// Whether the outcome was accepted: the run was still ours.
pub(crate) async fn settle(
    pool: &Pool,
    name: &str,
    id: Uuid,
    outcome: RunOutcome,
    error: Option<&str>,
) -> Result<bool, StorageError> {
    let query = diesel::sql_query(SETTLE)
        .bind::<Text, _>(name)
        .bind::<SqlUuid, _>(id)
        .bind::<Text, _>(outcome.as_str())
        .bind::<Nullable<Text>, _>(error.map(kept));
    let row: Accepted = pool
        .ask(async |conn| Ok::<_, StorageError>(Prepared(query).one(conn).await?))
        .await?;
    Ok(row.accepted)
}

/// What the history keeps of an error.
fn kept(error: &str) -> String {
    // Postgres has no text with NUL.
    let end = error.floor_char_boundary(ERROR);
    error.get(..end).unwrap_or(error).replace('\0', "\u{fffd}")
}

/// Whether there was a run whose lease is over.
pub(crate) async fn close(pool: &Pool, seen: &JobRow) -> Result<bool, StorageError> {
    let query = diesel::sql_query(CLOSE)
        .bind::<Text, _>(&seen.name)
        .bind::<BigInt, _>(seen.run_fencing_token);
    let ended: Vec<Ended> = pool
        .ask(async |conn| Ok::<_, StorageError>(Prepared(query).load(conn).await?))
        .await?;
    Ok(!ended.is_empty())
}

pub(crate) async fn ask(conn: &mut AsyncPgConnection, name: &str, id: Uuid) -> QueryResult<RunNow> {
    let query = diesel::sql_query(ASK)
        .bind::<Text, _>(name)
        .bind::<SqlUuid, _>(id);
    let row: Option<AskRow> = Prepared(query).one(conn).await.optional()?;
    Ok(match row {
        None => RunNow::NotFound,
        Some(AskRow { paused: true, .. }) => RunNow::Paused,
        Some(AskRow { running: true, .. }) => RunNow::Running,
        Some(_) => RunNow::Asked(id),
    })
}

/// Whether there is such a job.
pub(crate) async fn pause(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<bool> {
    change(conn, PAUSE, name).await
}

/// Whether there is such a job.
pub(crate) async fn resume(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<bool> {
    change(conn, RESUME, name).await
}

async fn change(conn: &mut AsyncPgConnection, sql: &'static str, name: &str) -> QueryResult<bool> {
    let query = diesel::sql_query(sql).bind::<Text, _>(name);
    let row: Option<Named> = Prepared(query).one(conn).await.optional()?;
    Ok(row.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_errors_are_cut_between_characters() {
        let long = "ä".repeat(ERROR);
        assert_eq!(kept(&long).len(), ERROR);
        assert_eq!(kept(&format!("x{long}")).len(), ERROR - 1);
        assert_eq!(kept("a\0b"), "a\u{fffd}b");
    }
}
