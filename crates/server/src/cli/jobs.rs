//! `leasehold jobs`: what runs once a slot, and when it ran last.

use std::fmt::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use leasehold_http::Timestamp;
use leasehold_storage::{Database, RunNow};

use crate::cli::postgres::Postgres;
use crate::cli::{Failed, print};
use crate::config::{DatabaseConfig, LogConfig};
use crate::jobs::model::Job;
use crate::telemetry;

#[derive(Args, Debug)]
pub(crate) struct JobsArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the jobs
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Run a job now: whichever instance is first does it. Prints the id of the run
    Run(One),
    /// Begin no more runs of a job until it is resumed
    Pause(One),
    /// End a pause
    Resume(One),
}

#[derive(Args, Debug)]
struct One {
    /// Its name, from the list
    job: String,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct Common {
    #[command(flatten)]
    database: DatabaseConfig,
    #[command(flatten)]
    log: LogConfig,
}

pub(crate) fn run(args: &JobsArgs) -> Result<(), Failed> {
    let (Action::List { common, .. }
    | Action::Run(One { common, .. })
    | Action::Pause(One { common, .. })
    | Action::Resume(One { common, .. })) = &args.action;
    telemetry::start(&common.log);
    let postgres = Postgres::find(&common.database)?;
    postgres.runtime.block_on(async {
        let db = postgres.connect().await?;
        let done = act(&db, &args.action).await;
        db.shutdown(Duration::from_secs(5)).await;
        print(&done?)
    })
}

async fn act(db: &Database, action: &Action) -> Result<String, Failed> {
    let jobs = db.jobs();
    let known = |there: bool, job: &str| {
        there
            .then(String::new)
            .ok_or_else(|| format!("there is no job {job}").into())
    };
    match action {
        Action::List { json, .. } => {
            let jobs: Vec<Job> = jobs.list().await?.into_iter().map(Job::from).collect();
            if *json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&jobs)?));
            }
            let mut text = String::new();
            for job in jobs {
                writeln!(text, "{}", line(&job))?;
            }
            Ok(text)
        }
        Action::Run(One { job, .. }) => match jobs.run_now(job).await? {
            RunNow::Asked(id) => Ok(format!("{id}\n")),
            RunNow::Running => Err(format!("{job} runs already, or is about to").into()),
            RunNow::Paused => Err(format!("{job} is paused: resume it first").into()),
            RunNow::NotFound => known(false, job),
        },
        Action::Pause(One { job, .. }) => known(jobs.pause(job).await?, job),
        Action::Resume(One { job, .. }) => known(jobs.resume(job).await?, job),
    }
}

fn line(job: &Job) -> String {
    let next = match (job.paused, job.next_slot) {
        (true, _) => "paused".to_owned(),
        (false, Some(at)) => format!("next {at}"),
        (false, None) => "no more slots".to_owned(),
    };
    let last = job.last_run.as_ref().map_or_else(
        || "has not run".to_owned(),
        |run| {
            let outcome = run.outcome.as_deref().unwrap_or("running");
            let at: Timestamp = run.finished_at.unwrap_or(run.started_at);
            format!("{outcome} {at} by {}", run.holder)
        },
    );
    format!("{}  {} {}  {next}  {last}", job.name, job.schedule, job.time_zone)
}
