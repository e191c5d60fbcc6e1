//! A lane: something that is done over and over by some clients at once, for a while.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::time::{ClockId, clock_gettime};

use crate::Result;

const WARM_UP: Duration = Duration::from_millis(200);

/// What a lane did in one turn.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Operations a second.
    pub(crate) rate: f64,
    /// Half of the operations, and 99 of 100, took at most so long. Not known of other programs.
    pub(crate) latency: Option<(Duration, Duration)>,
    /// Processor time that this process spent on one operation. Not known of other programs.
    pub(crate) cpu: Option<Duration>,
}

/// One line of a table.
#[async_trait]
pub(crate) trait Lane: Send {
    fn name(&self) -> &str;

    /// Makes connections, caches and prepared statements be there before the first round.
    async fn warm_up(&mut self) -> Result {
        self.run(WARM_UP).await.map(drop)
    }

    /// Runs for about `window`, all clients at once.
    async fn run(&mut self, window: Duration) -> Result<Sample>;
}

/// One of the clients of a lane.
pub(crate) trait Client: Send + 'static {
    /// Does it once.
    fn once(&mut self) -> impl Future<Output = Result> + Send;
}

/// The lane of clients in this process, each a task.
pub(crate) struct Clients<C> {
    name: &'static str,
    clients: Vec<C>,
}

impl<C: Client> Clients<C> {
    pub(crate) fn lane(name: &'static str, clients: Vec<C>) -> Box<dyn Lane> {
        Box::new(Self { name, clients })
    }
}

#[async_trait]
impl<C: Client> Lane for Clients<C> {
    fn name(&self) -> &str {
        self.name
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let deadline = Instant::now() + window;
        let spent = cpu_time();
        let tasks: Vec<_> = std::mem::take(&mut self.clients)
            .into_iter()
            .map(|client| tokio::spawn(work(client, deadline)))
            .collect();
        let mut took = Vec::new();
        for task in tasks {
            let (client, times) = task.await??;
            self.clients.push(client);
            took.extend(times);
        }
        let spent = cpu_time().saturating_sub(spent);
        took.sort_unstable();
        Ok(Sample {
            rate: took.len() as f64 / window.as_secs_f64(),
            latency: percentile(&took, 0.5).zip(percentile(&took, 0.99)),
            cpu: u32::try_from(took.len())
                .ok()
                .and_then(|operations| spent.checked_div(operations)),
        })
    }
}

/// What is not done by the deadline does not count.
async fn work<C: Client>(mut client: C, deadline: Instant) -> Result<(C, Vec<Duration>)> {
    let mut times = Vec::with_capacity(1 << 14);
    let mut begun = Instant::now();
    while begun < deadline {
        client.once().await?;
        let done = Instant::now();
        if done < deadline {
            times.push(done - begun);
        }
        begun = done;
    }
    Ok((client, times))
}

/// Of all threads of this process, since its start.
pub(crate) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

pub(crate) fn percentile(sorted: &[Duration], fraction: f64) -> Option<Duration> {
    let index = (sorted.len() as f64 * fraction) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied()
}
