//! The statements on stored answers.

use axum::http::StatusCode;
use diesel::prelude::*;
use diesel::sql_types::{Bool, Bytea, Nullable, SmallInt, Text, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_storage::Prepared;
use uuid::Uuid;

use crate::answer::Answer;

/// What there is under a key.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing, or nothing any more.
    Nothing,
    /// A request has it that has not ended.
    InProgress,
    /// The same request was answered.
    Answer(Answer),
    /// Another request was answered.
    OtherRequest,
}

#[derive(QueryableByName)]
struct Free {
    #[diesel(sql_type = Bool)]
    free: bool,
}

/// A lock of a key: credentials have the same length, so no two keys are written alike.
macro_rules! lock_key {
    ($which:literal) => {
        concat!("hashtextextended('", $which, "|' || $1::text || '|' || $2, 0)")
    };
}

/// The first lock is for those who want to do the work. The second tells those who look that somebody does it. They share
/// it for the length of their statement: who has the first waits for that long, or a look would refuse the work.
const TAKE: &str = concat!(
    "SELECT CASE WHEN pg_try_advisory_xact_lock(",
    lock_key!("idempotency"),
    ") THEN pg_advisory_xact_lock(",
    lock_key!("idempotency shown"),
    ") IS NOT NULL ELSE false END AS free"
);

/// Takes a key until the transaction ends. False when a request has it that has not ended.
pub(super) async fn take(conn: &mut AsyncPgConnection, credential: Uuid, key: &str) -> QueryResult<bool> {
    let take = diesel::sql_query(TAKE)
        .bind::<SqlUuid, _>(credential)
        .bind::<Text, _>(key);
    let row: Free = Prepared(take).one(conn).await?;
    Ok(row.free)
}

#[derive(QueryableByName)]
struct FoundRow {
    #[diesel(sql_type = Bool)]
    free: bool,
    #[diesel(sql_type = Nullable<Bool>)]
    same: Option<bool>,
    #[diesel(sql_type = Nullable<SmallInt>)]
    status: Option<i16>,
    #[diesel(sql_type = Nullable<Bytea>)]
    answer: Option<Vec<u8>>,
}

// Who has taken the key itself finds it free.
const FIND: &str = concat!(
    "SELECT asked.free, k.fingerprint = $3 AS same, k.status, k.answer
     FROM (SELECT pg_try_advisory_xact_lock_shared(",
    lock_key!("idempotency shown"),
    ") AS free OFFSET 0) AS asked
     LEFT JOIN idempotency_keys k
       ON k.credential = $1 AND k.key = $2 AND k.created_at > clock_timestamp() - interval '24 hours'"
);

/// Looks a key up.
pub(super) async fn find(
    conn: &mut AsyncPgConnection,
    credential: Uuid,
    key: &str,
    fingerprint: &[u8],
) -> QueryResult<Found> {
    let find = diesel::sql_query(FIND)
        .bind::<SqlUuid, _>(credential)
        .bind::<Text, _>(key)
        .bind::<Bytea, _>(fingerprint);
    let row: FoundRow = Prepared(find).one(conn).await?;
    Ok(match row {
        FoundRow {
            same: Some(true),
            status: Some(status),
            answer: Some(answer),
            ..
        } => {
            let status = u16::try_from(status).ok();
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            Found::Answer(Answer::replay(status.unwrap_or(StatusCode::OK), answer))
        }
        FoundRow { same: Some(_), .. } => Found::OtherRequest,
        FoundRow { free: false, .. } => Found::InProgress,
        FoundRow { .. } => Found::Nothing,
    })
}

// What is there is too old to count.
const PUT: &str = "
    INSERT INTO idempotency_keys (credential, key, fingerprint, status, answer, tenant_id)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (credential, key) DO UPDATE SET
        fingerprint = excluded.fingerprint, status = excluded.status, answer = excluded.answer,
        tenant_id = excluded.tenant_id, created_at = excluded.created_at";

/// Stores the answer to a request that has taken its key.
pub(super) async fn put(
    conn: &mut AsyncPgConnection,
    credential: Uuid,
    key: &str,
    fingerprint: &[u8],
    tenant: Option<&str>,
    answer: &Answer,
) -> QueryResult<()> {
    let status = i16::try_from(answer.status.as_u16()).unwrap_or_default();
    let put = diesel::sql_query(PUT)
        .bind::<SqlUuid, _>(credential)
        .bind::<Text, _>(key)
        .bind::<Bytea, _>(fingerprint)
        .bind::<SmallInt, _>(status)
        .bind::<Bytea, _>(answer.for_replay())
        .bind::<Nullable<Text>, _>(tenant);
    Prepared(put).execute(conn).await.map(|_| ())
}

const FORGET: &str = "
    WITH old AS MATERIALIZED (
        SELECT credential, key FROM idempotency_keys
        WHERE created_at <= clock_timestamp() - interval '24 hours'
        ORDER BY created_at LIMIT 1000 FOR UPDATE SKIP LOCKED
    )
    DELETE FROM idempotency_keys k USING old WHERE k.credential = old.credential AND k.key = old.key";

/// Deletes up to a thousand answers that count no more, and says how many.
pub(super) async fn forget(conn: &mut AsyncPgConnection) -> QueryResult<usize> {
    Prepared(diesel::sql_query(FORGET)).execute(conn).await
}
