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

/// How long work that gives locks back may take after everything else has ended.
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
    /// Set when the thread shall end.
    stop: watch::Sender<bool>,
    /// One receiver lives in each task that must be finished before the thread ends.
    finishing: watch::Sender<()>,
    /// Closed when the thread has ended.
    ended: watch::Receiver<()>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl Keeper {
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, mut stopped) = watch::channel(false);
        let (finishing, _) = watch::channel(());
        let (alive, ended) = watch::channel(());
        let finished = finishing.clone();
        std::thread::Builder::new()
            .name("leasehold-keeper".into())
            .spawn(move || {
                runtime.block_on(async {
                    while !*stopped.borrow_and_update() && stopped.changed().await.is_ok() {}
                    _ = tokio::time::timeout(DRAIN, finished.closed()).await;
                });
                drop(runtime);
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

    /// Runs a task that gives something back: the thread does not end before it, within [`DRAIN`].
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

    /// Ends the thread and waits for it.
    pub(crate) async fn stop(&self) {
        self.life.stop.send_replace(true);
        let mut ended = self.life.ended.clone();
        while ended.changed().await.is_ok() {}
    }
}
