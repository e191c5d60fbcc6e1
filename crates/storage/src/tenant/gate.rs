//! [`TenantGate`]: how writers pass.

use std::num::NonZeroU32;
use std::sync::Arc;

use diesel::QueryableByName;
use diesel::expression::{AsExpression, SqlLiteral, UncheckedBind};
use diesel::pg::sql_types::Array;
use diesel::sql_types::{BigInt, Bool, Nullable, Text};
use diesel_async::{AnsiTransactionManager, AsyncPgConnection, TransactionManager};
use leasehold_domain::{Invalid, TenantConflict, TenantConflictReason};
use tokio::time::{Instant, timeout};

use crate::advisory::AdvisoryKey;
use crate::advisory::compat;
use crate::error::StorageError;
use crate::pool::ANSWER;
use crate::process::Process;
use crate::statement::Prepared;
use crate::transaction::{self, TransactionError};

/// The most tenants that one transaction may write to: each takes a place in the lock table of the server, which
/// everybody shares.
const MAX_TENANTS: usize = 1000;
const MAX_TENANT_BYTES: usize = 256;

/// The gates of the tenants of one database; see [the module](crate::tenant).
#[derive(Clone, Debug)]
pub struct TenantGate {
    pub(super) process: Arc<Process>,
}

/// Why a gated write, or a drain, is not known to have happened.
#[derive(Debug, thiserror::Error)]
pub enum GateError<E> {
    /// The gate is closed, or could not be closed in time. Nothing was written.
    #[error(transparent)]
    Conflict(#[from] TenantConflict),
    /// The tenants or the timeout are out of bounds; nothing was sent.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The transaction did not commit, or not as far as is known.
    #[error(transparent)]
    Transaction(TransactionError<E>),
}

/// Why a gate was not entered.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// A drain has one of the tenants, or waits for it. Roll back: some of the other gates may have been entered.
    #[error(transparent)]
    Conflict(#[from] TenantConflict),
    /// The tenants are out of bounds, or the transaction is none in which a gate protects anything; nothing was sent,
    /// or at most the question.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The statement failed.
    #[error("the gate could not be asked for")]
    Database(#[from] diesel::result::Error),
}

impl<E> From<StorageError> for GateError<E> {
    fn from(error: StorageError) -> Self {
        Self::Transaction(error.into())
    }
}

impl<E> From<EnterError> for GateError<E> {
    fn from(error: EnterError) -> Self {
        match error {
            EnterError::Conflict(conflict) => conflict.into(),
            EnterError::Invalid(invalid) => invalid.into(),
            EnterError::Database(error) => StorageError::from(error).into(),
        }
    }
}

impl TenantGate {
    pub(crate) fn new(process: Arc<Process>) -> Self {
        Self { process }
    }

    /// Runs statements in one READ COMMITTED transaction that shares the gates of all these tenants with other
    /// writers. It waits for nobody.
    ///
    /// # Errors
    /// [`GateError`]; a conflict as soon as a drain of one of them runs or waits, and then `work` did not start.
    ///
    /// # Cancel safety
    /// Rolled back, unless COMMIT was sent.
    #[tracing::instrument(level = "debug", name = "gate", skip_all, fields(operation = "write"))]
    pub async fn write<T, E, W>(&self, tenants: &[impl AsRef<str>], work: W) -> Result<T, GateError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        let gates = Gates::of(tenants)?;
        let pool = &self.process.pool;
        let mut checkout = transaction::begin(pool.checkout().await?).await?;
        let id = match timeout(ANSWER, gates.enter(checkout.conn())).await {
            Ok(Ok(id)) => id,
            Err(_) => return Err(StorageError::NoAnswer(ANSWER).into()),
            Ok(Err(refused)) => {
                transaction::rollback(checkout).await;
                return Err(refused.into());
            }
        };
        let written = transaction::complete(pool, checkout, id, work).await;
        written.map_err(GateError::Transaction)
    }

    /// Enters the gates of these tenants in a transaction that is already open; they are left with its end.
    ///
    /// It belongs before whatever the transaction reads for its writes, and before its other locks. One round trip,
    /// whatever their number.
    ///
    /// # Errors
    /// [`EnterError`]; invalid also outside of a transaction, where the gate would be left at once, inside of a savepoint,
    /// with which it may be left, and above READ COMMITTED, where the transaction may not see what a drain before it did.
    ///
    /// # Cancel safety
    /// The gates may be entered: roll back.
    #[tracing::instrument(level = "debug", name = "gate", skip_all, fields(operation = "enter"))]
    pub async fn enter_in_tx(
        conn: &mut AsyncPgConnection,
        tenants: &[impl AsRef<str>],
    ) -> Result<(), EnterError> {
        Gates::of(tenants)?.enter(conn).await.map(|_| ())
    }

    /// The gate as a condition: `INSERT … SELECT … WHERE gate` is a gated write in one statement, which inserts nothing
    /// when the gate is closed.
    ///
    /// A statement reads what was there when it began, and takes the gate afterwards. So this is for inserts alone, and
    /// only for those that read nothing a drain may remove: everything else enters first, by [`TenantGate::write`].
    ///
    /// Outside of a transaction a row that the statement returns is sent before its commit. Ask by
    /// [`Prepared::one`](crate::Prepared::one), `load` or `execute`, which wait for the end, and not by `get_result`.
    ///
    /// # Errors
    /// [`Invalid`] when no tenant can be called so.
    pub fn gate(tenant: &str) -> Result<Gate, Invalid> {
        let key = key_of(tenant)?;
        // As a subquery it is asked once; as a plain condition it might be once for each row.
        Ok(
            diesel::dsl::sql::<Bool>("(SELECT pg_try_advisory_xact_lock_shared(")
                .bind::<BigInt, _>(key)
                .sql("))"),
        )
    }

    /// The key to bind where a statement is written by hand:
    /// `… WHERE (SELECT pg_try_advisory_xact_lock_shared($1))`; see [`TenantGate::gate`].
    ///
    /// # Errors
    /// [`Invalid`] when no tenant can be called so.
    pub fn key(tenant: &str) -> Result<i64, Invalid> {
        key_of(tenant)
    }

    /// The conflict of a write that has asked for the gate in a statement of its own and found it closed: see
    /// [`TenantGate::gate`]. Counts it.
    pub fn refused(tenant: &str) -> TenantConflict {
        refused_at(tenant)
    }

    /// The conflict that a write of the tenant would meet now, if any. One round trip. Who cannot be told by that moment
    /// is not held up: the write itself asks again.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    #[tracing::instrument(level = "debug", name = "gate", skip_all, fields(operation = "look"))]
    pub(crate) async fn conflict(&self, tenant: &str, until: Instant) -> Option<TenantConflict> {
        let key = key_of(tenant).ok()?;
        let open = self.process.pool.ask_until(until, async |conn| {
            let ask = diesel::sql_query("SELECT pg_try_advisory_xact_lock_shared($1) AS open")
                .bind::<BigInt, _>(key);
            let row: Open = Prepared(ask).one(conn).await?;
            Ok::<_, StorageError>(row.open)
        });
        matches!(open.await, Ok(false)).then(|| refused_at(tenant))
    }
}

/// The condition of [`TenantGate::gate`].
pub type Gate = SqlLiteral<Bool, UncheckedBind<SqlLiteral<Bool>, <i64 as AsExpression<BigInt>>::Expression>>;

#[derive(QueryableByName)]
struct Open {
    #[diesel(sql_type = Bool)]
    open: bool,
}

/// The gates of some tenants, each once, in the order of their keys.
struct Gates {
    tenants: Vec<(i64, String)>,
}

#[derive(QueryableByName)]
struct Entered {
    #[diesel(sql_type = Nullable<BigInt>)]
    refused: Option<i64>,
    #[diesel(sql_type = Text)]
    isolation: String,
    #[diesel(sql_type = Nullable<Text>)]
    transaction: Option<String>,
    #[diesel(sql_type = Bool)]
    late: bool,
}

const ENTER: &str = "\
SELECT min(n) FILTER (WHERE NOT open) AS refused, current_setting('transaction_isolation') AS isolation,
       CASE WHEN bool_and(open) THEN pg_current_xact_id()::text END AS transaction, false AS late
FROM (SELECT n, pg_try_advisory_xact_lock_shared(key) AS open
      FROM unnest($1::bigint[]) WITH ORDINALITY AS gates (key, n) OFFSET 0) AS attempts";

/// As above, and looks whether the transaction has locks that come after the gate. Row locks stand in the rows; what
/// `pg_locks` shows is the lock on their table that comes before.
const ENTER_AND_CHECK_ORDER: &str = "\
SELECT min(n) FILTER (WHERE NOT open) AS refused, current_setting('transaction_isolation') AS isolation,
       CASE WHEN bool_and(open) THEN pg_current_xact_id()::text END AS transaction,
       EXISTS (SELECT FROM pg_locks
               WHERE pid = pg_backend_pid() AND granted
                 AND (locktype = 'advisory' AND mode = 'ExclusiveLock'
                      OR locktype = 'relation' AND mode IN ('RowShareLock', 'RowExclusiveLock'))) AS late
FROM (SELECT n, pg_try_advisory_xact_lock_shared(key) AS open
      FROM unnest($1::bigint[]) WITH ORDINALITY AS gates (key, n) OFFSET 0) AS attempts";

impl Gates {
    fn of(tenants: &[impl AsRef<str>]) -> Result<Self, Invalid> {
        if tenants.is_empty() {
            return Err(Invalid::new("tenants", "must name at least one"));
        }
        let mut gates = Vec::with_capacity(tenants.len());
        for tenant in tenants {
            let tenant = tenant.as_ref();
            gates.push((key_of(tenant)?, tenant.to_owned()));
        }
        gates.sort_unstable();
        gates.dedup();
        if gates.len() > MAX_TENANTS {
            return Err(Invalid::new("tenants", format!("must be at most {MAX_TENANTS}")));
        }
        Ok(Self { tenants: gates })
    }

    /// Answers the id of the transaction.
    async fn enter(&self, conn: &mut AsyncPgConnection) -> Result<Option<String>, EnterError> {
        let depth = AnsiTransactionManager::transaction_manager_status_mut(conn)
            .transaction_depth()
            .ok()
            .flatten();
        match depth.map(NonZeroU32::get) {
            Some(1) => {}
            None => return Err(Invalid::new("transaction", "a gate is entered inside of one").into()),
            // With the savepoint the gate would be left, and the transaction go on.
            Some(_) => {
                return Err(Invalid::new("transaction", "a gate is entered outside of savepoints").into());
            }
        }
        let keys: Vec<i64> = self.tenants.iter().map(|(key, _)| *key).collect();
        let statement = if cfg!(debug_assertions) {
            ENTER_AND_CHECK_ORDER
        } else {
            ENTER
        };
        let enter = diesel::sql_query(statement).bind::<Array<BigInt>, _>(keys);
        let entered: Entered = Prepared(enter).one(conn).await?;
        if entered.isolation != "read committed" {
            let reason = format!(
                "is {}, where a gate protects nothing: use read committed",
                entered.isolation
            );
            return Err(Invalid::new("transaction isolation", reason).into());
        }
        debug_assert!(
            !entered.late,
            "the gates of tenants come before narrower advisory locks and before row locks"
        );
        let refused = entered.refused.and_then(|n| usize::try_from(n - 1).ok());
        match refused.and_then(|index| self.tenants.get(index)) {
            None => Ok(entered.transaction),
            Some((_, tenant)) => Err(refused_at(tenant).into()),
        }
    }
}

/// The conflict of a writer that a drain keeps out.
pub(crate) fn refused_at(tenant: &str) -> TenantConflict {
    metrics::counter!("leasehold_tenant_gate_refused_total").increment(1);
    TenantConflict {
        tenant: tenant.to_owned(),
        reason: TenantConflictReason::PurgeInProgress,
    }
}

pub(crate) fn key_of(tenant: &str) -> Result<i64, Invalid> {
    if tenant.is_empty() || tenant.len() > MAX_TENANT_BYTES {
        return Err(Invalid::new(
            "tenant",
            format!("must have 1 to {MAX_TENANT_BYTES} bytes"),
        ));
    }
    if tenant.contains('\0') {
        return Err(Invalid::new("tenant", "must not contain NUL"));
    }
    match compat::tenant_write(tenant) {
        AdvisoryKey::Big(key) => Ok(key),
        AdvisoryKey::Pair(..) => Err(Invalid::new("tenant", "has no key")),
    }
}
