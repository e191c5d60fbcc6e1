//! The job that looks whether webhooks can be reached: once a slot, whoever of the cluster does it.

use std::time::Duration;

use async_trait::async_trait;
use axum::http::{Method, Request};
use diesel::result::Error;
use futures_util::{StreamExt, stream};
use leasehold_domain::Invalid;
use leasehold_storage::tenant::GateError;
use leasehold_storage::{Database, Job, JobFailure, JobRun, JobWork, Schedule};

use crate::deliveries::client::{HttpClient, USER_AGENT};
use crate::deliveries::store::{self, Enabled};

/// The name of the job.
pub(super) const NAME: &str = "webhook-health";
const EVERY: Duration = Duration::from_secs(30 * 60);
/// How many webhooks are looked at at once.
const AT_ONCE: usize = 16;
const PAGE: i64 = 200;

/// Asks each enabled webhook with HEAD, which is not an event and not signed, and records the status of whatever
/// answer there is. It disables nothing: what cannot be reached now may be by the time there is something to send.
#[derive(Debug)]
pub(super) struct HealthCheck {
    pub(super) db: Database,
    pub(super) client: HttpClient,
}

pub(super) fn job() -> Result<Job, Invalid> {
    Ok(Job::new(NAME, Schedule::every(EVERY)?).max_hold(EVERY))
}

#[async_trait]
impl JobWork for HealthCheck {
    async fn run(&self, _: &JobRun) -> Result<(), JobFailure> {
        let (mut after, mut reached, mut silent) = (i64::MIN, 0_u64, 0_u64);
        loop {
            let page = self
                .db
                .read(async |conn| store::enabled(conn, after, PAGE).await)
                .await?;
            let Some(last) = page.last() else { break };
            after = last.seq;
            let looks = page.into_iter().map(|webhook| self.look(webhook));
            let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
            while let Some((webhook, status)) = looks.next().await {
                *(if status.is_some() {
                    &mut reached
                } else {
                    &mut silent
                }) += 1;
                if let Err(error) = self.record(&webhook, status).await {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(webhook = %webhook.id, error, "what a webhook answered could not be recorded");
                }
            }
        }
        tracing::info!(reached, silent, "webhooks were looked at");
        Ok(())
    }
}

impl HealthCheck {
    async fn look(&self, webhook: Enabled) -> (Enabled, Option<i16>) {
        let request = Request::builder()
            .method(Method::HEAD)
            .uri(&webhook.url)
            .header(axum::http::header::USER_AGENT, USER_AGENT)
            .body(Default::default());
        let status = match request {
            Ok(request) => self.client.send(request).await.ok(),
            Err(_) => None,
        };
        let status = status.and_then(|status| i16::try_from(status.as_u16()).ok());
        (webhook, status)
    }

    /// A tenant whose data is being removed has nothing to be recorded.
    async fn record(&self, webhook: &Enabled, status: Option<i16>) -> Result<(), GateError<Error>> {
        let (gate, tenant) = (self.db.tenant_gate(), [&webhook.tenant_id]);
        let record = gate.write(&tenant, async |conn| store::record(conn, webhook, status).await);
        match record.await {
            Err(GateError::Conflict(_)) => Ok(()),
            other => other,
        }
    }
}
