//! [`Jobs`]: looking at jobs, and intervening, from any process.

use std::sync::Arc;

use diesel::QueryResult;
use diesel_async::AsyncPgConnection;
use leasehold_domain::{Slots, Unavailable};
use uuid::Uuid;

use crate::error::StorageError;
use crate::jobs::table::{self, JobRow};
use crate::jobs::{JobInfo, JobRunInfo};
use crate::process::Process;

/// The jobs of a database, whichever process registered them.
#[derive(Clone, Debug)]
pub struct Jobs {
    process: Arc<Process>,
}

/// What became of a run that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunNow {
    /// A process that has the job's work starts it now, under this id.
    Asked(Uuid),
    /// The job runs already, or a run that was asked for has not begun yet.
    Running,
    /// The job is paused.
    Paused,
    /// There is no such job.
    NotFound,
}

impl Jobs {
    pub(crate) fn new(process: Arc<Process>) -> Self {
        Self { process }
    }

    /// All jobs, by name.
    ///
    /// # Errors
    /// [`Unavailable`] when the database cannot be asked.
    ///
    /// # Cancel safety
    /// It only reads.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "list"))]
    pub async fn list(&self) -> Result<Vec<JobInfo>, Unavailable> {
        let rows = table::look(&self.process.pool, None).await?;
        Ok(rows.iter().map(info).collect())
    }

    /// One job; `None` when there is none of this name.
    ///
    /// # Errors
    /// As [`Jobs::list`].
    ///
    /// # Cancel safety
    /// It only reads.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "get", job = name))]
    pub async fn get(&self, name: &str) -> Result<Option<JobInfo>, Unavailable> {
        let rows = table::look(&self.process.pool, Some(&[name.to_owned()])).await?;
        Ok(rows.first().map(info))
    }

    /// The last 100 runs of a job, the newest first.
    ///
    /// # Errors
    /// As [`Jobs::list`].
    ///
    /// # Cancel safety
    /// It only reads.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "history", job = name))]
    pub async fn history(&self, name: &str) -> Result<Vec<JobRunInfo>, Unavailable> {
        Ok(table::history(&self.process.pool, name).await?)
    }

    /// Asks for a run now. It settles no slot; slots that begin meanwhile are missed.
    ///
    /// # Errors
    /// [`Unavailable`] when the database did not answer; the run may have been asked for.
    ///
    /// # Cancel safety
    /// The run may have been asked for.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "run_now", job = name))]
    pub async fn run_now(&self, name: &str) -> Result<RunNow, Unavailable> {
        let ask = async |conn: &mut AsyncPgConnection| Ok(Self::run_now_in_tx(conn, name).await?);
        Ok(self.process.pool.ask::<_, StorageError, _>(ask).await?)
    }

    /// As [`Jobs::run_now`], in a transaction of the caller: nothing runs before it has committed.
    ///
    /// # Errors
    /// What the database says.
    ///
    /// # Cancel safety
    /// Roll back.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "run_now", job = name))]
    pub async fn run_now_in_tx(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<RunNow> {
        table::ask(conn, name, Uuid::new_v4()).await
    }

    /// Starts no more runs of a job; one that is under way goes on. Answers whether there is such a job.
    ///
    /// # Errors
    /// [`Unavailable`] when the database did not answer.
    ///
    /// # Cancel safety
    /// The job may have been paused: call it again.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "pause", job = name))]
    pub async fn pause(&self, name: &str) -> Result<bool, Unavailable> {
        let pause = async |conn: &mut AsyncPgConnection| Ok(table::pause(conn, name).await?);
        Ok(self.process.pool.ask::<_, StorageError, _>(pause).await?)
    }

    /// As [`Jobs::pause`], in a transaction of the caller. Answers the job, if there is one.
    ///
    /// # Errors
    /// What the database says.
    ///
    /// # Cancel safety
    /// Roll back.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "pause", job = name))]
    pub async fn pause_in_tx(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<Option<JobInfo>> {
        table::pause(conn, name).await?;
        Self::get_on(conn, name).await
    }

    /// Ends a pause. Slots that began meanwhile are passed over, whatever the job does about missed ones. Answers
    /// whether there is such a job.
    ///
    /// # Errors
    /// [`Unavailable`] when the database did not answer.
    ///
    /// # Cancel safety
    /// The job may have been resumed: call it again.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "resume", job = name))]
    pub async fn resume(&self, name: &str) -> Result<bool, Unavailable> {
        let resume = async |conn: &mut AsyncPgConnection| Ok(table::resume(conn, name).await?);
        Ok(self.process.pool.ask::<_, StorageError, _>(resume).await?)
    }

    /// As [`Jobs::resume`], in a transaction of the caller. Answers the job, if there is one.
    ///
    /// # Errors
    /// What the database says.
    ///
    /// # Cancel safety
    /// Roll back.
    #[tracing::instrument(level = "debug", name = "job", skip_all, fields(operation = "resume", job = name))]
    pub async fn resume_in_tx(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<Option<JobInfo>> {
        table::resume(conn, name).await?;
        Self::get_on(conn, name).await
    }

    async fn get_on(conn: &mut AsyncPgConnection, name: &str) -> QueryResult<Option<JobInfo>> {
        let rows = table::look_on(conn, Some(&[name.to_owned()])).await?;
        Ok(rows.first().map(info))
    }
}

fn info(row: &JobRow) -> JobInfo {
    let next = |slots: &dyn Slots| slots.next_after(row.now.max(row.handled_until));
    JobInfo {
        name: row.name.clone(),
        schedule: row.schedule.clone(),
        time_zone: row.time_zone.clone(),
        paused: row.paused,
        next_slot: row
            .slots()
            .ok()
            .filter(|_| !row.paused)
            .and_then(|slots| next(&slots)),
        last_run: row.last_run(),
    }
}
