//! [`TenantGate::drain`]: how a tenant is had alone.

use std::time::Duration;

use diesel::QueryableByName;
use diesel::sql_types::{Integer, Nullable, Text};
use diesel_async::AsyncPgConnection;
use leasehold_domain::{Invalid, TenantConflict, TenantConflictReason};
use tokio::time::Instant;

use super::gate::{GateError, TenantGate, key_of};
use crate::error::StorageError;
use crate::pool::ANSWER;
use crate::statement::Prepared;
use crate::transaction;

const MIN_TIMEOUT: Duration = Duration::from_millis(1);
const MAX_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// What a drain did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained<T> {
    /// What the work answered.
    pub value: T,
    /// How long it waited for writers to end.
    pub waited: Duration,
}

#[derive(QueryableByName)]
struct Outcome {
    #[diesel(sql_type = Text)]
    outcome: String,
    #[diesel(sql_type = Nullable<Text>)]
    transaction: Option<String>,
}

/// Who has a tenant alone and then says nothing for a minute (it was stopped, or its network is gone) is ended by the
/// server, so that the tenant is not closed for ever. A shorter bound of the role's own stays.
const DRAIN: &str = "\
SELECT outcome, CASE outcome WHEN 'drained' THEN pg_current_xact_id()::text END AS transaction,
       CASE WHEN NOT current_setting('idle_in_transaction_session_timeout')::interval
                     BETWEEN interval '1 ms' AND interval '1 min'
            THEN set_config('idle_in_transaction_session_timeout', '1min', true) END AS bound
FROM (SELECT leasehold.drain_tenant($1, $2) AS outcome OFFSET 0) AS attempt";

impl TenantGate {
    /// Runs statements in one transaction that has the tenant for itself.
    ///
    /// From now on new writers are refused; those that are under way are waited for, up to `timeout`: 1 ms to 1 hour,
    /// in whole milliseconds, rounded up. The timeout bounds this wait and not the work, which may take its time, but not
    /// a minute from one statement to the next: then the server ends it. It is the one thing that waits
    /// while it holds a connection, so it opens one of its own: the pool stays free.
    ///
    /// # Errors
    /// [`GateError`]; a conflict when writers did not end in time
    /// ([`TenantConflictReason::WritesInProgress`]), or when somebody else drains this tenant
    /// ([`TenantConflictReason::PurgeInProgress`]).
    ///
    /// # Cancel safety
    /// Rolled back, unless COMMIT was sent. A server that waits for the gate notices within 250 ms that nobody waits for
    /// its answer; until then writers are refused.
    #[tracing::instrument(level = "debug", name = "gate", skip_all, fields(operation = "drain"))]
    pub async fn drain<T, E, W>(
        &self,
        tenant: &str,
        timeout: Duration,
        work: W,
    ) -> Result<Drained<T>, GateError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        key_of(tenant)?;
        let millis = whole_millis(timeout)?;
        let pool = &self.process.pool;
        let mut checkout = transaction::begin(pool.own().await?).await?;
        let start = Instant::now();
        let drain = diesel::sql_query(DRAIN)
            .bind::<Text, _>(tenant)
            .bind::<Integer, _>(millis);
        // The server keeps the time, unless it is one that gives no answer at all.
        let bound = timeout + ANSWER;
        let answer = tokio::time::timeout(bound, Prepared(drain).one(checkout.conn()));
        let Outcome { outcome, transaction } = answer
            .await
            .map_err(|_| StorageError::NoAnswer(bound))?
            .map_err(StorageError::from)?;
        let waited = start.elapsed();
        metrics::histogram!("leasehold_tenant_drain_wait_seconds").record(waited);
        let reason = match outcome.as_str() {
            "drained" => None,
            "purge_in_progress" => Some(TenantConflictReason::PurgeInProgress),
            _ => Some(TenantConflictReason::WritesInProgress),
        };
        if let Some(reason) = reason {
            transaction::rollback(checkout).await;
            return Err(TenantConflict {
                tenant: tenant.to_owned(),
                reason,
            }
            .into());
        }
        let value = transaction::complete(pool, checkout, transaction, work).await;
        match value {
            Ok(value) => Ok(Drained { value, waited }),
            Err(error) => Err(GateError::Transaction(error)),
        }
    }
}

/// Postgres would take 0 for "for ever" and cut what is finer than a millisecond.
fn whole_millis(timeout: Duration) -> Result<i32, Invalid> {
    if !(MIN_TIMEOUT..=MAX_TIMEOUT).contains(&timeout) {
        return Err(Invalid::new("timeout", "must be from 1 ms to 1 hour"));
    }
    let millis = timeout.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis).map_err(|_| Invalid::new("timeout", "must be from 1 ms to 1 hour"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_whole_milliseconds_and_never_none() {
        for (micros, millis) in [
            (999, None),
            (1000, Some(1)),
            (1001, Some(2)),
            (1400, Some(2)),
            (2000, Some(2)),
            (3_600_000_000, Some(3_600_000)),
            (3_600_000_001, None),
        ] {
            let timeout = whole_millis(Duration::from_micros(micros));
            assert_eq!(timeout.ok(), millis, "{micros}");
        }
    }
}
