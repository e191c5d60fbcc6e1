//! Sending: an event to a webhook, as the webhook is now.
//!
//! Whatever answers 2xx has it. What answers otherwise, or not at all, is asked again, later and later; after the last
//! time, or when it says by 410 that it is gone for good, the event is given up and the webhook is disabled. What is to
//! go to a webhook that is not there or disabled ends without a word. Work that was given up because instances died
//! over it disables nothing: that was not the receiver's fault. An event whose tenant has enough under way comes again
//! soon, and that counts as no try.

use std::error::Error;

use async_trait::async_trait;
use axum::http::{Method, Request, StatusCode, header};
use diesel_async::AsyncPgConnection;
use leasehold_domain::{Claim, Invalid};
use leasehold_storage::tenant::GateError;
use leasehold_storage::{Database, NonRetryable, Processed, Processor, Worker, WorkerOptions};
use uuid::Uuid;

use crate::deliveries::client::{HttpClient, USER_AGENT};
use crate::deliveries::event::{Delivery, KIND};
use crate::deliveries::signature::{LEASEHOLD_SIGNATURE, sign};
use crate::deliveries::store::{self, Receiver};
use crate::deliveries::turns::Turns;

/// How many events one instance sends at the same time. Each is claimed by itself: those behind one that takes long
/// are for others.
const AT_ONCE: usize = 32;

/// Starts to send what is to be sent, under a name that tells who has it.
pub(super) fn start(db: Database, client: HttpClient, name: &str) -> Result<Worker, Invalid> {
    let options = WorkerOptions::new([KIND], name)
        .with_concurrency(AT_ONCE)
        .with_batch(1);
    let queue = db.work_queue();
    let sender = Sender {
        db,
        client,
        turns: Turns::default(),
    };
    Worker::start(&queue, options, sender, ())
}

/// Sends events.
#[derive(Debug)]
struct Sender {
    db: Database,
    client: HttpClient,
    turns: Turns,
}

#[async_trait]
impl Processor for Sender {
    async fn process(&self, claim: &Claim) -> Result<Processed, Box<dyn Error + Send + Sync>> {
        let turn = match self.turns.take(&claim.scope.tenant) {
            Ok(turn) => turn,
            Err(pause) => return Ok(Processed::After(pause)),
        };
        match self.deliver(claim).await {
            Ok(()) => {
                turn.taken();
                Ok(Processed::Done)
            }
            Err(Undelivered::ThisTime(why)) => Err(why.into()),
            Err(Undelivered::Ever(why)) => Err(NonRetryable::new(why).into()),
        }
    }
}

/// Why an event did not arrive. The text is kept with the work, for its tenant to read.
#[derive(Debug)]
enum Undelivered {
    /// It may arrive another time.
    ThisTime(String),
    /// Nobody will ever take it.
    Ever(String),
}

impl Sender {
    async fn deliver(&self, claim: &Claim) -> Result<(), Undelivered> {
        let payload = claim.payload.clone().unwrap_or_default();
        let delivery: Delivery = serde_json::from_value(payload)
            .map_err(|error| Undelivered::Ever(format!("the work cannot be read: {error}")))?;
        let (webhook, tenant) = (delivery.webhook, claim.scope.tenant.as_str());
        let receiver = self
            .db
            .read(async |conn| store::receiver(conn, webhook, tenant).await);
        let receiver = match receiver.await {
            Ok(Some(receiver)) => receiver,
            Ok(None) => {
                tracing::debug!(%webhook, tenant, "nobody is to be told of an event any more");
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn Error, "a webhook could not be looked up");
                return Err(Undelivered::ThisTime(
                    "the webhook could not be looked up".to_owned(),
                ));
            }
        };
        let undelivered = match self.send(&delivery, &receiver).await {
            Ok(()) => return Ok(()),
            Err(undelivered) => undelivered,
        };
        if matches!(undelivered, Undelivered::Ever(_)) || claim.is_last_attempt() {
            self.disable(webhook, tenant, &receiver.url).await;
        }
        Err(undelivered)
    }

    async fn send(&self, delivery: &Delivery, receiver: &Receiver) -> Result<(), Undelivered> {
        let unwritable = |error: &dyn Error| Undelivered::Ever(format!("it cannot be sent: {error}"));
        let body = serde_json::to_vec(&delivery.event).map_err(|error| unwritable(&error))?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(&receiver.url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, USER_AGENT)
            .header(LEASEHOLD_SIGNATURE, sign(&receiver.secret, receiver.now, &body))
            .body(body.into())
            .map_err(|error| unwritable(&error))?;
        match self.client.send(request).await {
            Ok(status) if status.is_success() => Ok(()),
            Ok(StatusCode::GONE) => Err(Undelivered::Ever(
                "answered 410: it is gone, and wants to be told nothing more".to_owned(),
            )),
            Ok(status) if status.is_redirection() => Err(Undelivered::ThisTime(format!(
                "answered {}: redirects are not followed",
                status.as_u16()
            ))),
            Ok(status) => Err(Undelivered::ThisTime(format!("answered {}", status.as_u16()))),
            Err(error) => Err(Undelivered::ThisTime(error.to_string())),
        }
    }

    /// Disables a webhook that could not be told of an event at this URL, and says so if it was enabled until now. One of
    /// a tenant that is being drained is left alone: it is about to go. So is one that has another URL by now.
    async fn disable(&self, webhook: Uuid, tenant: &str, url: &str) {
        let disable = async |conn: &mut AsyncPgConnection| store::disable(conn, webhook, tenant, url).await;
        match self.db.tenant_gate().write(&[tenant], disable).await {
            Ok(true) => {
                tracing::warn!(%webhook, tenant, "a webhook was disabled: an event could not be delivered");
            }
            Ok(false) | Err(GateError::Conflict(_)) => {}
            Err(error) => {
                tracing::warn!(%webhook, tenant, error = &error as &dyn Error, "a webhook could not be disabled");
            }
        }
    }
}
