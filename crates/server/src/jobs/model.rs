//! Jobs on the wire.

use leasehold_http::Timestamp;
use leasehold_storage::{JobInfo, JobRunInfo};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::names::Slug;

/// A job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Job {
    /// Its name.
    #[schema(example = "webhook-health")]
    pub name: String,
    /// When it runs: an interval, or a cron expression.
    #[schema(example = "every 30m")]
    pub schedule: String,
    /// By whose clock, as the IANA database names it.
    #[schema(example = "UTC")]
    pub time_zone: String,
    /// Whether no run is begun until it is resumed.
    pub paused: bool,
    /// When it runs next; `null` while it is paused.
    #[schema(required)]
    pub next_slot: Option<Timestamp>,
    /// The run that was begun last.
    #[schema(required)]
    pub last_run: Option<JobRun>,
}

/// One run of a job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobRun {
    /// Its id.
    pub run_id: Uuid,
    /// The slot that it was for, or when it was asked for.
    pub slot: Timestamp,
    /// Which instance ran it.
    pub holder: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended; `null` while it runs.
    #[schema(required)]
    pub finished_at: Option<Timestamp>,
    /// How it ended: `succeeded`, `failed`, `timed_out` or `interrupted`; `null` while it runs.
    #[schema(required, example = "succeeded")]
    pub outcome: Option<String>,
    /// Why it failed.
    #[schema(required)]
    pub error: Option<String>,
}

impl From<JobInfo> for Job {
    fn from(job: JobInfo) -> Self {
        Self {
            name: job.name,
            schedule: job.schedule,
            time_zone: job.time_zone,
            paused: job.paused,
            next_slot: job.next_slot.map(Timestamp),
            last_run: job.last_run.map(JobRun::from),
        }
    }
}

impl From<JobRunInfo> for JobRun {
    fn from(run: JobRunInfo) -> Self {
        Self {
            run_id: run.id,
            slot: Timestamp(run.slot),
            holder: run.holder,
            started_at: Timestamp(run.started_at),
            finished_at: run.finished_at.map(Timestamp),
            outcome: run.outcome.map(|outcome| outcome.to_string()),
            error: run.error,
        }
    }
}

/// The path of a job.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct JobPath {
    /// The job.
    pub job: Slug,
}

/// A run that was asked for.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct Asked {
    /// Its id.
    pub run_id: Uuid,
}
