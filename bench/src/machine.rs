//! What the numbers were taken on.

use std::time::{Duration, Instant};

use crate::database::Server;
use crate::options::Options;
use crate::{Result, group};

/// How long single durable commits are timed: they tell what the disk is like.
const LOOK_AT_DISK: Duration = Duration::from_millis(500);

/// Prints the line of the machine.
pub(crate) async fn describe(server: &Server, options: &Options) -> Result {
    let client = server.client().await?;
    let row = client
        .query_one(
            "SELECT current_setting('server_version'), current_setting('fsync'),
                    current_setting('synchronous_commit'), current_setting('full_page_writes'),
                    current_setting('wal_sync_method'), current_setting('shared_buffers'),
                    current_setting('max_connections'), inet_server_addr() IS NULL",
            &[],
        )
        .await?;
    let text = |index| row.get::<_, String>(index);
    let cores = std::thread::available_parallelism()?;
    println!(
        "{cores} cores, shared by clients and server; PostgreSQL {}; fsync={} synchronous_commit={} \
         full_page_writes={} wal_sync_method={} shared_buffers={} max_connections={}; {}",
        text(0),
        text(1),
        text(2),
        text(3),
        text(4),
        text(5),
        text(6),
        if row.get(7) { "Unix socket" } else { "TCP" },
    );

    client
        .batch_execute("CREATE TABLE IF NOT EXISTS disk (at TIMESTAMPTZ)")
        .await?;
    let insert = client.prepare("INSERT INTO disk VALUES (now())").await?;
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < LOOK_AT_DISK {
        let begun = Instant::now();
        client.execute(&insert, &[]).await?;
        times.push(begun.elapsed().as_secs_f64());
    }
    client.batch_execute("DROP TABLE disk").await?;
    let alone = group::median(times.into_iter());
    println!(
        "one durable commit alone: {}; {} rounds of {} s a lane, medians; `of x`: the rate as a part of x's in \
         the same round",
        group::readable(alone),
        options.rounds,
        options.seconds,
    );
    Ok(())
}
