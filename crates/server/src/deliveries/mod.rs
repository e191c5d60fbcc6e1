//! Deliveries: what was written to the outbox reaches the webhooks of its tenant.
//!
//! A write puts its events into the outbox, in its own transaction, and is answered. From there on each instance does
//! its share: `fan_out` makes a work item of each event and webhook, `delivery` sends it, again and again until it
//! arrives or is given up, and `health` looks now and then who can be reached at all.

mod client;
mod delivery;
mod event;
mod fan_out;
mod health;
mod signature;
mod store;
mod target;
mod turns;

use std::time::Duration;

use leasehold_storage::{RunningJobs, Worker};
use tokio::task::JoinSet;

use crate::state::AppState;
use client::HttpClient;
pub(crate) use event::KIND;

/// Why deliveries could not be started.
pub type StartError = Box<dyn std::error::Error + Send + Sync>;

/// What an instance does for deliveries. Dropped, it does nothing more, and what it was about to send is sent by
/// others when its claims have expired.
#[derive(Debug)]
pub struct Deliveries {
    fan_out: JoinSet<()>,
    worker: Worker,
    jobs: RunningJobs,
}

impl Deliveries {
    /// Starts them, on the runtime of the caller. `allow_private` lets events go to addresses that are not of the open
    /// Internet.
    ///
    /// # Errors
    /// When the database does not answer, or TLS cannot be set up.
    pub async fn start(state: &AppState, allow_private: bool) -> Result<Self, StartError> {
        let db = state.db().clone();
        let client = HttpClient::new(allow_private)?;
        let mut jobs = db.job_scheduler(&state.settings().instance);
        let check = health::HealthCheck {
            db: db.clone(),
            client: client.clone(),
        };
        jobs.register(health::job()?, check)?;
        let jobs = jobs.start().await?;
        let worker = delivery::start(db.clone(), client, &state.settings().instance)?;
        let mut fan_out = JoinSet::new();
        fan_out.spawn(fan_out::run(db, state.written()));
        Ok(Self {
            fan_out,
            worker,
            jobs,
        })
    }

    /// Begins nothing more, and waits for what was begun, up to `grace`; what has not ended by then is given back.
    ///
    /// # Cancel safety
    /// As if it was dropped.
    pub async fn stop(self, grace: Duration) {
        // What it had taken and not handed on yet stays where it was.
        drop(self.fan_out);
        tokio::join!(self.worker.stop(grace), self.jobs.stop(grace));
    }
}
