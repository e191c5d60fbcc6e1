//! [`Signals`]: "I wait for this name" and "this name is free", between processes by NOTIFY.
//!
//! Notifications are hints. A commit that notifies takes a lock that all such commits of the server share, so
//! nothing is sent unless somebody waits, and it is sent by a transaction of its own after the release has
//! committed. Listeners die silently, so every waiter also polls.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use leasehold_domain::{LockId, LockName};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_postgres::{AsyncMessage, Client};
use uuid::Uuid;

use crate::advisory::AdvisoryKey;
use crate::connect::ConnectOptions;
use crate::error::StorageError;
use crate::keeper::Keeper;

const WAIT_CHANNEL: &str = "leasehold_wait";
const FREE_CHANNEL: &str = "leasehold_free";
/// A job may be due sooner than its schedule says. Sent by the statements that make it so.
const JOBS_CHANNEL: &str = "leasehold_jobs";
/// Somebody wants the owner of a session lock to give it up. Sent by the statement that records it.
const RELEASE_CHANNEL: &str = "leasehold_release";

/// A wait that was announced is answered when the name is released within this time after, or was within this
/// time before.
const RECENT: Duration = Duration::from_secs(5);
/// After this time without another announcement a waiter is believed to be gone.
const WAITERS_FORGOTTEN: Duration = Duration::from_secs(30);
/// How many names may be remembered before old ones are swept out for the first time.
const SWEEP_ABOVE: usize = 1024;
/// How long an announcement may take; the first poll of a waiter comes no sooner.
const ANNOUNCE: Duration = Duration::from_millis(250);
const RECONNECT: Duration = Duration::from_millis(250);
/// How many locks may be asked for at once. Who asks in vain asks again.
const ASKED: usize = 256;
/// How many signals go into one transaction.
const BATCH: usize = 1000;

/// The signals of one process.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    state: Arc<State>,
    outbox: mpsc::UnboundedSender<Message>,
}

#[derive(Debug)]
struct State {
    names: Mutex<Names>,
    jobs: watch::Sender<()>,
    asked: broadcast::Sender<LockId>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            names: Mutex::default(),
            jobs: watch::Sender::default(),
            asked: broadcast::Sender::new(ASKED),
        }
    }
}

#[derive(Debug)]
struct Names {
    /// Names that other processes wait for.
    wanted: Recent,
    /// Names that this process released.
    released: Recent,
    /// Names under which this process has added something, and nobody was told.
    added: Recent,
    /// Waiters of this process.
    waiting: HashMap<i64, Arc<Notify>>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            wanted: Recent::within(WAITERS_FORGOTTEN),
            released: Recent::within(RECENT),
            added: Recent::within(RECENT),
            waiting: HashMap::new(),
        }
    }
}

/// Names that something has happened to not long ago.
#[derive(Debug)]
struct Recent {
    last: HashMap<i64, Instant>,
    within: Duration,
    sweep_above: usize,
}

impl Recent {
    fn within(within: Duration) -> Self {
        Self {
            last: HashMap::new(),
            within,
            sweep_above: SWEEP_ABOVE,
        }
    }

    fn note(&mut self, key: i64) {
        let now = Instant::now();
        // At twice what was left the last time: however many names there are, a note costs the same on average.
        if self.last.len() > self.sweep_above {
            self.last.retain(|_, at| now - *at < self.within);
            self.sweep_above = SWEEP_ABOVE.max(2 * self.last.len());
        }
        self.last.insert(key, now);
    }

    fn has(&self, key: i64) -> bool {
        self.last.get(&key).is_some_and(|at| at.elapsed() < self.within)
    }

    fn take(&mut self, key: i64) -> bool {
        self.last
            .remove(&key)
            .is_some_and(|at| at.elapsed() < self.within)
    }
}

#[derive(Debug)]
enum Message {
    Wait(i64, oneshot::Sender<()>),
    Free(i64),
}

impl State {
    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key under which a name is signalled.
pub(crate) fn key(name: &LockName) -> i64 {
    AdvisoryKey::of(name).as_lock_table_columns().0
}

impl Signals {
    /// Starts the listener on the keeper's thread. With `listen` false (a transaction pooler is in between)
    /// nothing is sent and nothing is heard.
    pub(crate) fn start(keeper: &Keeper, options: ConnectOptions, listen: bool) -> Self {
        let state = Arc::new(State::default());
        let (outbox, inbox) = mpsc::unbounded_channel();
        if listen {
            keeper.spawn(run(options, Arc::clone(&state), inbox));
        }
        Self { state, outbox }
    }

    /// Says that this process has released a name. Never blocks.
    pub(crate) fn freed(&self, key: i64) {
        let wanted = {
            let mut names = self.state.names();
            names.released.note(key);
            names.wanted.take(key)
        };
        if wanted {
            // Without a listener nobody hears; the waiters poll.
            drop(self.outbox.send(Message::Free(key)));
        }
    }

    /// Says that there is something to be had under a name, to those who wait for it here and elsewhere. Never blocks.
    pub(crate) fn added(&self, key: i64) {
        let wanted = {
            let mut names = self.state.names();
            if let Some(waiter) = names.waiting.get(&key) {
                waiter.notify_one();
            }
            let wanted = names.wanted.take(key);
            if !wanted {
                names.added.note(key);
            }
            wanted
        };
        if wanted {
            // Without a listener nobody hears; the waiters poll.
            drop(self.outbox.send(Message::Free(key)));
        }
    }

    /// Whether another process is known to wait for the name.
    pub(crate) fn is_wanted(&self, key: i64) -> bool {
        self.state.names().wanted.has(key)
    }

    /// Changes when a job may be due sooner than its schedule says.
    pub(crate) fn jobs(&self) -> watch::Receiver<()> {
        self.state.jobs.subscribe()
    }

    /// The session locks that somebody wants given up, whichever process has them.
    pub(crate) fn asked_to_release(&self) -> broadcast::Receiver<LockId> {
        self.state.asked.subscribe()
    }

    /// Tells other processes that this one waits for a name, and hears when one of them frees it. Try again
    /// after this returns: a release before it was not heard.
    pub(crate) async fn wait_for(&self, key: i64) -> Subscription {
        let freed = Arc::clone(self.state.names().waiting.entry(key).or_default());
        let subscription = Subscription {
            signals: self.clone(),
            key,
            freed,
        };
        subscription.announce().await;
        subscription
    }
}

/// A waiter's ear on one name.
#[derive(Debug)]
pub(crate) struct Subscription {
    signals: Signals,
    key: i64,
    freed: Arc<Notify>,
}

impl Subscription {
    /// Says again that this process waits: others forget it after a while.
    pub(crate) async fn announce(&self) {
        let (sent, heard) = oneshot::channel();
        if self.signals.outbox.send(Message::Wait(self.key, sent)).is_ok() {
            // No answer means that there is no listener now: poll.
            _ = tokio::time::timeout(ANNOUNCE, heard).await;
        }
    }

    /// Waits for another process to free the name.
    pub(crate) async fn freed(&self) {
        self.freed.notified().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut names = self.signals.state.names();
        // The map's own and ours.
        if Arc::strong_count(&self.freed) <= 2 {
            names.waiting.remove(&self.key);
        }
    }
}

/// Listens for as long as the process lives, on a connection of its own that is replaced when it breaks.
async fn run(options: ConnectOptions, state: Arc<State>, mut inbox: mpsc::UnboundedReceiver<Message>) {
    loop {
        match listen(&options, &state).await {
            Ok((client, mut closed)) => {
                tracing::debug!("listening for lock signals");
                if !serve(&client, &mut inbox, &mut closed).await {
                    return;
                }
                tracing::warn!("the listener for lock signals was lost; waiters poll until it is back");
            }
            Err(error) => tracing::warn!(
                error = crate::error::chain(&error),
                "cannot listen for lock signals"
            ),
        }
        // Waiters who announced themselves meanwhile poll: drop their announcements rather than keep them waiting.
        let again = tokio::time::sleep(RECONNECT);
        tokio::pin!(again);
        loop {
            tokio::select! {
                () = &mut again => break,
                message = inbox.recv() => if message.is_none() { return },
            }
        }
    }
}

/// Opens the connection; its driver hands on what it hears until `closed` changes.
async fn listen(
    options: &ConnectOptions,
    state: &Arc<State>,
) -> Result<(Arc<Client>, watch::Receiver<()>), StorageError> {
    let (client, mut driver) = options.open().await?;
    let client = Arc::new(client);
    let (ended, closed) = watch::channel(());
    let (heard, mut notifications) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |context| driver.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(notification) = message {
                drop(heard.send(notification));
            }
        }
        drop(ended);
    });
    client
        .batch_execute(&format!(
            "LISTEN {WAIT_CHANNEL}; LISTEN {FREE_CHANNEL}; LISTEN {JOBS_CHANNEL}; LISTEN {RELEASE_CHANNEL}"
        ))
        .await?;
    // Whatever was sent before was not heard.
    state.jobs.send_replace(());
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
    let (state, replies) = (Arc::clone(state), Arc::downgrade(&client));
    tokio::spawn(async move {
        while let Some(notification) = notifications.recv().await {
            if notification.channel() == JOBS_CHANNEL {
                state.jobs.send_replace(());
                continue;
            }
            if notification.channel() == RELEASE_CHANNEL {
                if let Ok(lock_id) = notification.payload().parse::<Uuid>() {
                    // Nobody listens when the process is about to end.
                    _ = state.asked.send(lock_id.into());
                }
                continue;
            }
            let Ok(key) = notification.payload().parse() else {
                continue;
            };
            if notification.process_id() == pid {
                continue;
            }
            match notification.channel() {
                WAIT_CHANNEL => {
                    let just_released = {
                        let mut names = state.names();
                        names.wanted.note(key);
                        // What was added is told once: who waits for more of it would be told the same again.
                        names.released.has(key) || names.added.take(key)
                    };
                    if just_released && let Some(client) = replies.upgrade() {
                        notify(&client, &signal(FREE_CHANNEL, key)).await;
                    }
                }
                FREE_CHANNEL => {
                    if let Some(waiter) = state.names().waiting.get(&key) {
                        waiter.notify_one();
                    }
                }
                _ => {}
            }
        }
    });
    Ok((client, closed))
}

/// Sends what is to be sent, in batches. Answers whether the process still wants signals.
async fn serve(
    client: &Client,
    inbox: &mut mpsc::UnboundedReceiver<Message>,
    closed: &mut watch::Receiver<()>,
) -> bool {
    let mut messages = Vec::new();
    loop {
        tokio::select! {
            received = inbox.recv_many(&mut messages, BATCH) => if received == 0 { return false },
            _ = closed.changed() => return true,
        }
        let send = messages.iter().map(|message| match message {
            Message::Wait(key, _) => signal(WAIT_CHANNEL, *key),
            Message::Free(key) => signal(FREE_CHANNEL, *key),
        });
        notify(client, &send.collect::<String>()).await;
        for message in messages.drain(..) {
            if let Message::Wait(_, sent) = message {
                // The waiter may be gone by now.
                _ = sent.send(());
            }
        }
    }
}

fn signal(channel: &str, key: i64) -> String {
    format!("NOTIFY {channel}, '{key}';")
}

/// One transaction that did nothing else. A failure shows as the end of the connection.
async fn notify(client: &Client, notifications: &str) {
    if let Err(error) = client.batch_execute(notifications).await {
        tracing::debug!(error = crate::error::chain(&error), "a lock signal was not sent");
    }
}
