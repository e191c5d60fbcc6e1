//! Fan-out: each event of the outbox becomes a work item for each webhook of its tenant that is enabled.
//!
//! The events go and the items come in one transaction, behind the tenant's gate: a process that dies in between has
//! done nothing, and what a purge removes does not come back. Processes take different events and wait for nobody; the
//! events of a tenant that is being drained stay where they are.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use diesel::result::Error;
use diesel_async::AsyncPgConnection;
use leasehold_domain::{NewWork, QueueError};
use leasehold_storage::tenant::GateError;
use leasehold_storage::{Database, WorkError};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::deliveries::event::{Delivery, Event, KIND, written};
use crate::deliveries::store::{self, Taken};

/// The most events that one transaction hands on.
const BATCH: i64 = 100;
/// How long writes that follow each other closely are waited for, to be handed on together.
const GATHER: Duration = Duration::from_millis(100);
/// The longest time between two looks. A process is woken by its own writes; those of others that were killed before
/// they had handed on theirs are found by looking.
const IDLE: Duration = Duration::from_secs(5);

/// Hands on events for ever.
pub(super) async fn run(db: Database, written: Arc<Notify>) {
    let mut pause = GATHER;
    loop {
        match look(&db).await {
            Ok(0) => {
                tokio::select! {
                    () = sleep(pause) => pause = (pause * 2).min(IDLE),
                    () = written.notified() => pause = GATHER,
                }
            }
            Ok(events) => tracing::debug!(events, "events were handed on"),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "events could not be handed on; trying again"
                );
                sleep(IDLE).await;
            }
        }
        sleep(GATHER).await;
    }
}

/// Hands on what there is, each tenant in its turn, and answers how many events that were. What goes wrong with one
/// tenant holds up no other.
async fn look(db: &Database) -> Result<usize, FanOutError> {
    let tenants = db.read(async |conn| store::tenants(conn).await).await?;
    let mut events = 0;
    for tenant in tenants {
        match hand_on(db, &tenant).await {
            Ok(handed_on) => events += handed_on,
            Err(error) => {
                tracing::warn!(
                    tenant,
                    error = &error as &dyn std::error::Error,
                    "events of a tenant could not be handed on; trying again"
                );
            }
        }
    }
    Ok(events)
}

/// Hands on a batch of a tenant's events. None while the tenant is drained.
async fn hand_on(db: &Database, tenant: &str) -> Result<usize, FanOutError> {
    let (gate, queue) = (db.tenant_gate(), db.work_queue());
    let hand_on = async |conn: &mut AsyncPgConnection| {
        let (events, deliveries) = deliveries(tenant, store::take(conn, tenant, BATCH).await?)?;
        queue.enqueue_in_tx(conn, &deliveries).await?;
        Ok::<_, FanOutError>(events)
    };
    match gate.write(&[tenant], hand_on).await {
        Ok(events) => {
            queue.wake([KIND]);
            Ok(events)
        }
        Err(GateError::Conflict(_)) => Ok(0),
        Err(error) => Err(FanOutError::Transaction(Box::new(error))),
    }
}

/// How many events these are, and the work of sending them.
fn deliveries(tenant: &str, taken: Vec<Taken>) -> Result<(usize, Vec<NewWork>), FanOutError> {
    let mut events = HashSet::new();
    let mut deliveries = Vec::new();
    for Taken {
        id,
        r#type,
        data,
        created_at,
        webhook,
    } in taken
    {
        events.insert(id);
        let Some(webhook) = webhook else { continue };
        let event = Event {
            id,
            r#type,
            tenant_id: tenant.to_owned(),
            created_at: written(created_at),
            data,
        };
        deliveries.push(Delivery { webhook, event }.work(created_at)?);
    }
    Ok((events.len(), deliveries))
}

/// Why events were not handed on.
#[derive(Debug, thiserror::Error)]
enum FanOutError {
    #[error("the events could not be looked up")]
    Look(#[from] WorkError<Error>),
    #[error("they could not be taken")]
    Take(#[from] Error),
    #[error("they could not be enqueued")]
    Enqueue(#[from] QueueError),
    #[error("they cannot be written")]
    Write(#[from] serde_json::Error),
    #[error("nothing was changed, or what was is unknown")]
    Transaction(#[source] Box<GateError<Self>>),
}
