//! [`Keeper`]: a thread with a runtime of its own, where holds are kept alive and given back.
//!
//! Renewals must go on while the caller's runtime is blocked, and a guard must be able to release when it is
//! dropped in any thread, in a panic, or after the caller's runtime has ended. So none of that runs there.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long work that gives locks back may take when nobody said how long it may.
const DRAIN: Duration = Duration::from_secs(2);

/// The thread. It ends some moments after the last clone is dropped, when what it still has to give back is
/// given back.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    handle: Handle,
    life: Arc<Life>,
}

#[derive(Debug)]
struct Life {
    /// Set when the thread shall end: to how long it may still give back.
    stop: watch::Sender<Option<Duration>>,
    /// One receiver lives in each task that must be finished before the thread ends.
    finishing: watch::Sender<()>,
    /// Closed when the thread has ended.
    ended: watch::Receiver<()>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.stop(DRAIN);
    }
}

impl Life {
    /// The first who says how long giving back may take is heard.
    fn stop(&self, grace: Duration) {
        self.stop.send_if_modified(|stop| {
            let first = stop.is_none();
            stop.get_or_insert(grace);
            first
        });
    }
}

impl Keeper {
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, mut stopped) = watch::channel(None);
        let (finishing, _) = watch::channel(());
        let (alive, ended) = watch::channel(());
        let finished = finishing.clone();
        std::thread::Builder::new()
            .name("leasehold-keeper".into())
            .spawn(move || {
                runtime.block_on(async {
                    let grace = stopped.wait_for(Option::is_some).await;
                    let grace = grace.map_or(DRAIN, |grace| grace.unwrap_or(DRAIN));
                    _ = tokio::time::timeout(grace, finished.closed()).await;
                });
                // Looking up a host may take longer than anybody would wait.
                runtime.shutdown_background();
                drop(alive);
            })?;
        Ok(Self {
            handle,
            life: Arc::new(Life {
                stop,
                finishing,
                ended,
            }),
        })
    }

    /// Runs a task for as long as the thread lives. Works in any thread and never blocks.
    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.handle.spawn(task)
    }

    /// Runs a task that gives something back: the thread does not end before it, within the time that it then has.
    pub(crate) fn finish<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let unfinished = self.life.finishing.subscribe();
        self.handle.spawn(async move {
            task.await;
            drop(unfinished);
        });
    }

    /// Comes to its end when the thread shall end.
    pub(crate) fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stop = self.life.stop.subscribe();
        async move {
            // The thread ends as well when nobody is left to say so.
            drop(stop.wait_for(Option::is_some).await);
        }
    }

    /// Ends the thread once everything is given back, after `grace` in any case, and waits for it.
    pub(crate) async fn stop(&self, grace: Duration) {
        self.life.stop(grace);
        let mut ended = self.life.ended.clone();
        while ended.changed().await.is_ok() {}
    }
}
