//! The routes of jobs. All of them need an admin's key for all tenants: a job belongs to none.

use axum::Json;
use axum::extract::State;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WriteProblems};
use leasehold_http::{ApiQuery, Code, NoBody, Problem};
use leasehold_storage::{JobInfo, Jobs, RunNow};

use crate::answer::Answer;
use crate::auth::{Access, NoTenant, Operate};
use crate::failure::Failure;
use crate::idempotency::Sent;
use crate::jobs::model::{Asked, Job, JobPath};
use crate::paging::{Page, PageQuery};
use crate::state::AppState;

fn no_job() -> Problem {
    Problem::not_found("there is no such job")
}

/// List the jobs
///
/// By name. Needs an admin's key for all tenants.
#[utoipa::path(
    get, path = "/v1/jobs", tag = "jobs", operation_id = "list_jobs", params(PageQuery),
    responses((status = 200, description = "A page of jobs", body = Page<Job>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    _: Access<NoTenant, Operate>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Job>>, Problem> {
    let jobs = state.db().jobs().list().await?;
    // They are few: a page is cut out of all.
    let after = (1_i64..)
        .zip(jobs)
        .skip_while(|(position, _)| *position <= query.after());
    let rows = after
        .take(usize::try_from(query.rows()).unwrap_or_default())
        .collect();
    Ok(Json(query.page(
        rows,
        |(position, _)| *position,
        |(_, job)| Job::from(job),
    )))
}

/// Run a job now
///
/// Whichever instance is first does it, soon. Refused while it runs, while a run that was asked for has not begun, and
/// while the job is paused. Needs an admin's key for all tenants.
#[utoipa::path(
    post, path = "/v1/jobs/{job}/run", tag = "jobs", operation_id = "run_job", params(JobPath, IdempotencyKey),
    responses((status = 202, description = "It is about to run", body = Asked), WriteProblems),
)]
pub(crate) async fn run(
    State(state): State<AppState>,
    access: Access<JobPath, Operate>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let job = access.path.job.as_str();
    let refused = |why| Err(Problem::new(Code::JobRunning, why).into());
    let asked = state.ungated(&once, async |conn| match Jobs::run_now_in_tx(conn, job).await? {
        RunNow::Asked(run_id) => Answer::accepted(&Asked { run_id }),
        RunNow::Running => refused("the job runs already, or is about to"),
        RunNow::Paused => refused("the job is paused: resume it first"),
        RunNow::NotFound => Err(no_job().into()),
    });
    asked.await
}

/// Pause a job
///
/// A run that is under way goes on; no other is begun. Needs an admin's key for all tenants.
#[utoipa::path(
    post, path = "/v1/jobs/{job}/pause", tag = "jobs", operation_id = "pause_job", params(JobPath, IdempotencyKey),
    responses((status = 200, description = "The job, paused", body = Job), WriteProblems),
)]
pub(crate) async fn pause(
    State(state): State<AppState>,
    access: Access<JobPath, Operate>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let job = access.path.job.as_str();
    let paused = state.ungated(&once, async |conn| told(Jobs::pause_in_tx(conn, job).await?));
    paused.await
}

/// Resume a job
///
/// Slots that began while it was paused are passed over. Needs an admin's key for all tenants.
#[utoipa::path(
    post, path = "/v1/jobs/{job}/resume", tag = "jobs", operation_id = "resume_job",
    params(JobPath, IdempotencyKey),
    responses((status = 200, description = "The job, which goes on", body = Job), WriteProblems),
)]
pub(crate) async fn resume(
    State(state): State<AppState>,
    access: Access<JobPath, Operate>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let job = access.path.job.as_str();
    let resumed = state.ungated(&once, async |conn| told(Jobs::resume_in_tx(conn, job).await?));
    resumed.await
}

fn told(job: Option<JobInfo>) -> Result<Answer, Failure> {
    let job = job.ok_or_else(no_job)?;
    Answer::ok(&Job::from(job))
}
