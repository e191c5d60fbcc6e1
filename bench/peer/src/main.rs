//! `graphile_worker` on jobs that need nothing done: fills its queue, works for so many seconds and prints how many jobs
//! a second were completed.
//!
//! `leasehold-bench-peer URL JOBS BATCH PROCESSORS SECONDS`. With a batch of 1 it fetches and completes job by job, else
//! by its local queue and its batches of completions.

use std::time::{Duration, Instant};

use graphile_worker::{IntoTaskHandlerResult, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions};
use serde::{Deserialize, Serialize};
use tokio_postgres::NoTls;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const FILL: &str = "\
INSERT INTO graphile_worker._private_jobs (task_id, payload)
SELECT t.id, '{}' FROM graphile_worker._private_tasks t, generate_series(1, $1::bigint) WHERE t.identifier = 'no_op'";
const LEFT: &str = "SELECT count(*) FROM graphile_worker._private_jobs";

/// As its documentation recommends.
const COMPLETE_TOGETHER: Duration = Duration::from_millis(1);

/// Job by job it does as many as it has processors each time that it looks, however many there are.
const ASK_AGAIN: Duration = Duration::from_millis(1);

#[derive(Deserialize, Serialize)]
struct NoOp {}

impl TaskHandler for NoOp {
    const IDENTIFIER: &'static str = "no_op";

    async fn run(self, _: WorkerContext) -> impl IntoTaskHandlerResult {
        Ok::<(), String>(())
    }
}

#[tokio::main]
async fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, jobs, batch, processors, seconds] = arguments.as_slice() else {
        return Err("URL JOBS BATCH PROCESSORS SECONDS".into());
    };
    let (jobs, batch, processors): (i64, usize, usize) = (jobs.parse()?, batch.parse()?, processors.parse()?);
    let window = Duration::from_secs(seconds.parse()?);

    let options = WorkerOptions::default()
        .database_url(url)
        .schema("graphile_worker")
        .concurrency(processors)
        .listen_os_shutdown_signals(false)
        .shutdown_grace_period(Duration::from_secs(1))
        .define_job::<NoOp>();
    let options = if batch > 1 {
        options
            .local_queue(LocalQueueConfig::default().with_size(batch))
            .complete_job_batch_delay(COMPLETE_TOGETHER)
    } else {
        options.poll_interval(ASK_AGAIN)
    };
    let worker = options.init().await?;

    let (client, driver) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(driver);
    client
        .batch_execute("TRUNCATE graphile_worker._private_jobs CASCADE")
        .await?;
    client.execute(FILL, &[&jobs]).await?;
    client
        .batch_execute("ANALYZE graphile_worker._private_jobs; CHECKPOINT")
        .await?;

    let start = Instant::now();
    let work = async {
        worker.run().await?;
        Err("the worker has ended".into())
    };
    let left = async {
        tokio::time::sleep(window).await;
        let took = start.elapsed();
        let left: i64 = client.query_one(LEFT, &[]).await?.get(0);
        println!("{:.1}", (jobs - left) as f64 / took.as_secs_f64());
        Result::<i64>::Ok(left)
    };
    tokio::select! {
        done = work => done,
        left = left => match left? {
            0 => Err("nothing was left to do before the time was over".into()),
            _ => Ok(()),
        },
    }
}
