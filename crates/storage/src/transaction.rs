//! Running the caller's own statements: the one place where diesel's types stand in a public signature.

use diesel::sql_types::{BigInt, Nullable, Text, Uuid as SqlUuid};
use diesel::{OptionalExtension, QueryableByName};
use diesel_async::{AnsiTransactionManager, AsyncPgConnection, SimpleAsyncConnection, TransactionManager};
use leasehold_domain::{ErrorClass, FencingToken, HoldControl, LockGuard, LockId, LockName, Unavailable};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

use crate::advisory::transaction::OpenTransaction;
use crate::database::Database;
use crate::error::StorageError;
use crate::holds::Scope;
use crate::incarnation::{self, Incarnation, IncarnationRow};
use crate::lease::LeaseHold;
use crate::pool::{ANSWER, Checkout, Pool};
use crate::process::Process;
use crate::statement::Prepared;

/// How long a COMMIT may take: it also checks deferred constraints, and waits for synchronous standbys.
const COMMIT_ANSWER: Duration = Duration::from_secs(10);
/// How long to look for the fate of a transaction whose COMMIT was not answered.
const RESOLVE: Duration = Duration::from_secs(2);
const RESOLVE_POLL: Duration = Duration::from_millis(50);

const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// Why statements outside of a transaction did not run to their end.
#[derive(Debug, thiserror::Error)]
pub enum WorkError<E> {
    /// The caller's own error.
    #[error(transparent)]
    Work(E),
    /// No connection could be had.
    #[error("the database is not available")]
    Unavailable(#[source] Unavailable),
}

impl<E> From<StorageError> for WorkError<E> {
    fn from(error: StorageError) -> Self {
        Self::Unavailable(error.into())
    }
}

/// Why a transaction is not known to have committed.
#[derive(Debug, thiserror::Error)]
pub enum TransactionError<E> {
    /// The caller's own error; everything was rolled back.
    #[error(transparent)]
    Work(E),
    /// The lock was no longer ours: everything was rolled back.
    #[error("the lock was lost before the transaction could commit")]
    Lost,
    /// Postgres rolled back although the work reported no error: it swallowed one, or a deferred constraint
    /// failed.
    #[error("the transaction was rolled back")]
    CommitRolledBack(#[source] Unavailable),
    /// The answer to COMMIT was lost and the transaction's fate could not be found out. It may have committed.
    #[error("the outcome of the commit is unknown")]
    OutcomeUnknown {
        /// The hold that it ran under, if any.
        lock_id: Option<LockId>,
        /// What went wrong.
        #[source]
        source: Unavailable,
    },
    /// The database could not be reached, or went away before the COMMIT had its effect; nothing was committed.
    #[error("the database is not available")]
    Unavailable(#[source] Unavailable),
}

impl<E> TransactionError<E> {
    /// The kind of failure; `None` for the caller's own error.
    pub fn class(&self) -> Option<ErrorClass> {
        match self {
            Self::Work(_) => None,
            Self::Lost => Some(ErrorClass::Conflict),
            Self::CommitRolledBack(_) | Self::OutcomeUnknown { .. } => Some(ErrorClass::Internal),
            Self::Unavailable(_) => Some(ErrorClass::Unavailable),
        }
    }
}

impl<E> From<StorageError> for TransactionError<E> {
    fn from(error: StorageError) -> Self {
        Self::Unavailable(error.into())
    }
}

/// What a fenced transaction has committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced<T> {
    /// What the work answered.
    pub value: T,
    /// The token that the transaction committed under: final, also for a lease whose grant became durable only with
    /// it. A transaction-scoped lock has none.
    pub fencing_token: Option<FencingToken>,
}

/// What the fence found: the token, and the transaction's id, to ask for its fate.
#[derive(QueryableByName)]
struct FenceRow {
    #[diesel(sql_type = BigInt)]
    fencing_token: i64,
    #[diesel(sql_type = Text)]
    transaction: String,
}

impl Database {
    /// Runs statements, each its own transaction, on one connection.
    ///
    /// `work` must not give up on a statement of its own (with a timeout, say) and go on.
    ///
    /// # Errors
    /// [`WorkError`].
    ///
    /// # Cancel safety
    /// Statements that were sent may have had their effect.
    pub async fn read<T, E, W>(&self, work: W) -> Result<T, WorkError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        self.process
            .pool
            .run(async |conn| work(conn).await.map_err(WorkError::Work))
            .await
    }

    /// Runs statements in one READ COMMITTED transaction that commits if `work` succeeds.
    ///
    /// What `work` sends may take as long as it likes; of what is sent around it an answer is waited for up to 5 s, and
    /// of COMMIT 10 s.
    ///
    /// # Errors
    /// [`TransactionError`]; never [`TransactionError::Lost`].
    ///
    /// # Cancel safety
    /// Rolled back, unless COMMIT was sent.
    pub async fn transaction<T, E, W>(&self, work: W) -> Result<T, TransactionError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        let checkout = begin(self.process.pool.checkout().await?).await?;
        complete(&self.process.pool, checkout, None, work).await
    }

    /// Runs statements in one transaction that commits only if the lock is still ours.
    ///
    /// For a lease, the last statement before COMMIT is the fence: it locks the lease's row if it still has our
    /// lock id and has not expired. An unchanged lock id proves that nobody else held the lock in between, and
    /// the row lock keeps everybody out until the commit. Until then the heartbeat goes on, so the work may take
    /// longer than the `ttl`, up to `max_hold`. It must not lock the lease's own row before its last statement,
    /// or the heartbeat cannot renew it.
    ///
    /// For a transaction-scoped lock, the statements run in the transaction that has the lock, and its end, commit or
    /// rollback, is the end of the hold. When the hold is lost meanwhile, at its `max_hold` at the latest, `work` is
    /// dropped where it waits and the connection closed, so that no statement that hangs keeps the lock.
    ///
    /// # Errors
    /// [`TransactionError`]; [`TransactionError::Lost`] when the hold is over, and then nothing was written.
    ///
    /// # Cancel safety
    /// Rolled back, unless COMMIT was sent. A lease goes on; the guard of a transaction-scoped lock is lost.
    pub async fn fenced_transaction<T, E, W>(
        &self,
        guard: &LockGuard,
        work: W,
    ) -> Result<Fenced<T>, TransactionError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        self.fenced(guard, Fence::Keep, work).await
    }

    /// As [`Database::fenced_transaction`], and the commit releases the lock as well. Releasing the guard
    /// afterwards sends nothing.
    ///
    /// # Errors
    /// As [`Database::fenced_transaction`]. A lease is still held then, unless it was lost or the outcome is unknown.
    ///
    /// # Cancel safety
    /// As [`Database::fenced_transaction`].
    pub async fn fenced_transaction_releasing<T, E, W>(
        &self,
        guard: &LockGuard,
        work: W,
    ) -> Result<Fenced<T>, TransactionError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        self.fenced(guard, Fence::Release, work).await
    }

    /// For a transaction of the caller's that removes the leased row itself. A row that is gone cannot be fenced
    /// afterwards: the statement that removes it must be the fence, and remove it only while its lock id is the guard's
    /// and it has not expired.
    ///
    /// What this answers lives until the transaction has ended, so that the heartbeat takes the end of the row for no
    /// loss. Guards of other locks than leases need none of this.
    pub fn removing(&self, guard: &LockGuard) -> Removing {
        let hold = self.process.holds.get(guard.lock_id());
        let fencing = hold.and_then(|hold| match &hold.scope {
            Scope::Lease(lease) => Some(Fencing::start(lease, &hold.control)),
            Scope::Transaction(_) | Scope::Session { .. } => None,
        });
        Removing {
            process: Arc::clone(&self.process),
            name: guard.name().clone(),
            fencing,
        }
    }

    #[tracing::instrument(level = "debug", name = "lock", skip_all, fields(operation = "fence", name = %guard.name()))]
    async fn fenced<T, E, W>(
        &self,
        guard: &LockGuard,
        fence: Fence,
        work: W,
    ) -> Result<Fenced<T>, TransactionError<E>>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
    {
        let lock_id = guard.lock_id();
        let hold = self.process.holds.get(lock_id).filter(|_| !guard.is_lost());
        let Some(hold) = hold else { return Err(lost()) };
        let pool = &self.process.pool;
        match hold.scope {
            Scope::Lease(lease) => {
                if lease.has_ended() {
                    return Err(lost());
                }
                let mut checkout = begin(pool.checkout().await?).await?;
                let value = match work(checkout.conn()).await {
                    Ok(value) => value,
                    Err(error) => {
                        rollback(checkout).await;
                        return Err(TransactionError::Work(error));
                    }
                };
                let fencing = Fencing::start(&lease, &hold.control);
                let sent = timeout(ANSWER, send_fence(checkout.conn(), &lease, lock_id, fence));
                let row = match sent.await.unwrap_or(Err(StorageError::NoAnswer(ANSWER))) {
                    Ok(Some(row)) => row,
                    Ok(None) => {
                        rollback(checkout).await;
                        drop(fencing);
                        self.process.holds.lose(lock_id);
                        return Err(lost());
                    }
                    // An error that the work swallowed shows here: an aborted transaction takes no statement.
                    Err(error @ StorageError::Refused(_)) => {
                        rollback(checkout).await;
                        return Err(TransactionError::CommitRolledBack(error.into()));
                    }
                    Err(error) => return Err(error.into()),
                };
                hold.control.pin(true);
                finish(
                    pool,
                    checkout,
                    Ending {
                        lock_id: Some(lock_id),
                        transaction: Some(row.transaction),
                        checked: true,
                    },
                )
                .await?;
                if fence == Fence::Release {
                    lease.set_ended();
                    self.process.freed(guard.name());
                }
                Ok(Fenced {
                    value,
                    fencing_token: Some(FencingToken::new(row.fencing_token)),
                })
            }
            Scope::Transaction(transaction) => {
                let Some((mut checkout, id)) = transaction.take().await else {
                    return Err(lost());
                };
                let mut lent = Lent {
                    process: &self.process,
                    transaction: &transaction,
                    guard,
                    answered: false,
                };
                // What hangs in a statement is not left to itself: only the end of its connection frees the lock.
                let worked = tokio::select! {
                    biased;
                    worked = work(checkout.conn()) => Some(worked),
                    () = guard.lost() => None,
                };
                let result = match worked {
                    None => {
                        drop(checkout);
                        Err(lost())
                    }
                    Some(Ok(_)) if guard.is_lost() => {
                        rollback(checkout).await;
                        Err(lost())
                    }
                    Some(Ok(value)) => {
                        let ending = Ending::unchecked(Some(lock_id), Some(id));
                        finish(pool, checkout, ending).await.map(|()| Fenced {
                            value,
                            fencing_token: None,
                        })
                    }
                    Some(Err(error)) => {
                        if rollback(checkout).await == RolledBack::Gone {
                            self.process.holds.lose(lock_id);
                        }
                        Err(TransactionError::Work(error))
                    }
                };
                lent.answered = true;
                result
            }
            // Nothing in a transaction can prove that another session still has its lock.
            Scope::Session { .. } => Err(TransactionError::Unavailable(Unavailable::new(
                "a session lock cannot fence a transaction: take a lease or a transaction lock",
            ))),
        }
    }
}

fn lost<E>() -> TransactionError<E> {
    metrics::counter!("leasehold_fence_refused_total").increment(1);
    TransactionError::Lost
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fence {
    Keep,
    Release,
}

/// While it lives the heartbeat takes a locked or released row for our own doing.
#[derive(Debug)]
struct Fencing {
    lease: Arc<LeaseHold>,
    control: HoldControl,
}

impl Fencing {
    fn start(lease: &Arc<LeaseHold>, control: &HoldControl) -> Self {
        lease.begin_fencing();
        Self {
            lease: Arc::clone(lease),
            control: control.clone(),
        }
    }
}

impl Drop for Fencing {
    fn drop(&mut self) {
        // What the commit has released is over as it was meant to be: the clock says nothing of it any more.
        if !self.lease.has_ended() {
            self.control.pin(false);
        }
        self.lease.end_fencing();
    }
}

/// While it lives, a leased row that is gone is this process's own doing; see [`Database::removing`].
#[must_use]
#[derive(Debug)]
pub struct Removing {
    process: Arc<Process>,
    name: LockName,
    fencing: Option<Fencing>,
}

impl Removing {
    /// Says that the transaction has committed, and that the hold went with the row: releasing the guard then sends
    /// nothing.
    pub fn committed(self) {
        if let Some(Fencing { lease, control }) = self.fencing.as_ref() {
            control.pin(true);
            lease.set_ended();
            self.process.freed(&self.name);
        }
    }
}

/// While it lives the caller's work has the transaction of a lock. However that ends, the hold is over.
struct Lent<'a> {
    process: &'a Process,
    transaction: &'a OpenTransaction,
    guard: &'a LockGuard,
    /// Whether the caller is told how it ended. If not, it went away in the middle, and the guard is told.
    answered: bool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.transaction.set_ended();
        if !self.answered {
            self.process.holds.lose(self.guard.lock_id());
        }
        self.process.freed(self.guard.name());
    }
}

async fn send_fence(
    conn: &mut AsyncPgConnection,
    lease: &LeaseHold,
    lock_id: LockId,
    fence: Fence,
) -> Result<Option<FenceRow>, StorageError> {
    let sql = match fence {
        Fence::Keep => &lease.table.fence,
        Fence::Release => &lease.table.fence_and_release,
    };
    let mut query = diesel::sql_query(sql)
        .into_boxed::<diesel::pg::Pg>()
        .bind::<SqlUuid, _>(lock_id.as_uuid());
    for key in &lease.keys {
        query = query.bind::<Text, _>(key);
    }
    Ok(Prepared(query).one(conn).await.optional()?)
}

/// Opens a transaction on a connection that closes unless the transaction is ended.
pub(crate) async fn begin(mut checkout: Checkout) -> Result<Checkout, StorageError> {
    let begun = timeout(
        ANSWER,
        AnsiTransactionManager::begin_transaction_sql(checkout.conn(), BEGIN),
    );
    begun.await.map_err(|_| StorageError::NoAnswer(ANSWER))??;
    Ok(checkout)
}

/// Runs the caller's work in an open transaction, and ends that. With the transaction's id its fate can be asked for.
pub(crate) async fn complete<T, E, W>(
    pool: &Pool,
    mut checkout: Checkout,
    transaction: Option<String>,
    work: W,
) -> Result<T, TransactionError<E>>
where
    W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<T, E>,
{
    match work(checkout.conn()).await {
        Ok(value) => {
            let ending = Ending::unchecked(None, transaction);
            finish(pool, checkout, ending).await.map(|()| value)
        }
        Err(error) => {
            rollback(checkout).await;
            Err(TransactionError::Work(error))
        }
    }
}

/// What a rollback came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RolledBack {
    /// The server said so.
    Done,
    /// The session had ended, and the transaction with it.
    Gone,
    /// No answer came. The connection is closed, and the server rolls back when it notices.
    Unanswered,
}

/// Rolls back, and closes a connection that does not answer, which rolls back as well.
pub(crate) async fn rollback(mut checkout: Checkout) -> RolledBack {
    let rolled_back = AnsiTransactionManager::rollback_transaction(checkout.conn());
    match timeout(ANSWER, rolled_back).await {
        Ok(Ok(())) => {
            checkout.settle();
            RolledBack::Done
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a rollback failed; the connection is closed");
            RolledBack::Gone
        }
        Err(_) => {
            tracing::debug!("a rollback was not answered; the connection is closed");
            RolledBack::Unanswered
        }
    }
}

/// What is known of a transaction at its end.
struct Ending {
    lock_id: Option<LockId>,
    /// Its id, if it has one: with it, its fate can be asked for.
    transaction: Option<String>,
    /// Whether the statement before this one proved that the transaction is not aborted.
    checked: bool,
}

impl Ending {
    fn unchecked(lock_id: Option<LockId>, transaction: Option<String>) -> Self {
        Self {
            lock_id,
            transaction,
            checked: false,
        }
    }
}

/// Commits, and tells the truth about it.
///
/// Postgres answers COMMIT of an aborted transaction with success and the tag ROLLBACK, which the driver does not
/// show. A statement before it, in the same message, fails instead.
async fn finish<E>(pool: &Pool, mut checkout: Checkout, ending: Ending) -> Result<(), TransactionError<E>> {
    let commit = if ending.checked {
        "COMMIT"
    } else {
        "SELECT 1; COMMIT"
    };
    let error = match timeout(COMMIT_ANSWER, checkout.conn().batch_execute(commit)).await {
        Ok(Ok(())) => {
            leave_transaction(checkout.conn());
            checkout.settle();
            return Ok(());
        }
        Ok(Err(error)) => StorageError::from(error),
        Err(_) => StorageError::NoAnswer(COMMIT_ANSWER),
    };
    let incarnation = checkout.incarnation();
    let refused = match &error {
        // After a refusal the session goes on. A pooler that has lost the server only makes it look like one.
        StorageError::Refused(_) => rollback(checkout).await == RolledBack::Done,
        _ => {
            drop(checkout);
            false
        }
    };
    let fate = match &ending.transaction {
        _ if refused => Some(Fate::RolledBack),
        Some(transaction) => {
            let fate = timeout(RESOLVE, fate(pool, transaction, incarnation));
            fate.await.unwrap_or(None)
        }
        None => None,
    };
    match fate {
        Some(Fate::Committed) => Ok(()),
        Some(Fate::RolledBack) if refused => Err(TransactionError::CommitRolledBack(error.into())),
        // The connection failed, not the work: as if it had failed before the COMMIT.
        Some(Fate::RolledBack) => Err(TransactionError::Unavailable(error.into())),
        None => {
            metrics::counter!("leasehold_outcome_unknown_total").increment(1);
            Err(TransactionError::OutcomeUnknown {
                lock_id: ending.lock_id,
                source: error.into(),
            })
        }
    }
}

/// Tells diesel that the transaction is over: COMMIT went around its transaction manager.
fn leave_transaction(conn: &mut AsyncPgConnection) {
    use diesel::connection::{TransactionDepthChange, TransactionManagerStatus};
    if let TransactionManagerStatus::Valid(status) =
        AnsiTransactionManager::transaction_manager_status_mut(conn)
    {
        // It fails only when no transaction is open, which is what is wanted.
        drop(status.change_transaction_depth(TransactionDepthChange::DecreaseDepth));
    }
}

enum Fate {
    Committed,
    RolledBack,
}

#[derive(QueryableByName)]
struct FateRow {
    #[diesel(sql_type = Nullable<Text>)]
    status: Option<String>,
    #[diesel(embed)]
    server: IncarnationRow,
}

/// Asks until the transaction has ended; the server may still be busy with it. `None` when the server has crashed
/// since: then it may be telling of another transaction that was given the same id. An abort is believed all the
/// same: had ours committed, its id would not have been given out again.
async fn fate(pool: &Pool, transaction: &str, began_in: Option<Incarnation>) -> Option<Fate> {
    let ask = format!(
        "SELECT pg_xact_status($1::xid8) AS status, {}",
        incarnation::COLUMN
    );
    loop {
        let asked = pool
            .run(async |conn| {
                let query = diesel::sql_query(&ask);
                Ok::<FateRow, StorageError>(Prepared(query.bind::<Text, _>(transaction)).one(conn).await?)
            })
            .await;
        match asked
            .as_ref()
            .map(|row| (row.status.as_deref(), row.server.get()))
        {
            Ok((Some("committed"), now)) => {
                return (now.is_some() && now == began_in).then_some(Fate::Committed);
            }
            Ok((Some("aborted"), _)) => return Some(Fate::RolledBack),
            Ok(_) | Err(_) => tokio::time::sleep(RESOLVE_POLL).await,
        }
    }
}
