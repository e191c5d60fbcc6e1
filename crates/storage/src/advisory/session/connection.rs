//! The task of one lock session: the connection that has the server's locks.
//!
//! It alone sends statements, in the order in which it is told, without waiting for one before the next, and it
//! hears every answer, whether or not the caller is still there. It never sends a statement that waits for a lock:
//! all others would wait behind it.

use std::collections::VecDeque;
use std::future::{poll_fn, ready};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use leasehold_domain::{LockMode, Unavailable};
use rand::Rng;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::error::Severity;
use tokio_postgres::{Client, Error, Row, Statement};

use super::table::{Command, Failure, Session, Unlocked};
use super::{LockSession, chaser};
use crate::advisory::AdvisoryKey;
use crate::connect::{ConnectOptions, Driver};
use crate::error::{StorageError, chain};

/// A session on which nothing was sent for so long is asked whether it is there.
const PING: Duration = Duration::from_secs(3);
/// A session that does not answer for so long is given up, and all that it holds with it.
const ANSWER: Duration = Duration::from_secs(5);
/// How long no connection is tried after one could not be made: the first time, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The server ends the session of a process that was stopped, and finds out when the two are cut off from each
/// other. A Unix socket ignores what is about TCP.
/// <https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-IDLE-SESSION-TIMEOUT>
const SET_UP: &str = "\
SET idle_session_timeout = '10s';
SET tcp_keepalives_idle = 5;
SET tcp_keepalives_interval = 2;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = '8s'";

/// Runs for as long as the process lives. It connects when there is something to lock.
pub(super) async fn run(
    session: Arc<LockSession>,
    options: ConnectOptions,
    mut inbox: mpsc::UnboundedReceiver<Command>,
) {
    let ends = EndsWithTask(session);
    let session = &ends.0;
    let mut opener = Opener::default();
    while let Some(command) = inbox.recv().await {
        let key = match command {
            Command::Lock { key, .. } => key,
            Command::Ping { .. } => continue,
            Command::Unlock { key, told, .. } => {
                finish(session, key, told, Unlocked::Unanswered(ended()));
                continue;
            }
        };
        match opener.open(&options).await {
            Ok((opened, driver)) => {
                let mut connection = Connection {
                    session,
                    opened,
                    in_flight: VecDeque::new(),
                    last_sent: Instant::now(),
                };
                connection.send(command).await;
                let cause = connection.serve(driver, &mut inbox).await;
                connection.end(&cause);
            }
            Err(cause) => session.table().failed(key, &Failure { cause, sent: false }),
        }
    }
}

/// When the task ends, nobody waits for it any more.
struct EndsWithTask(Arc<LockSession>);

impl Drop for EndsWithTask {
    fn drop(&mut self) {
        self.0
            .close(&Unavailable::new("the locks of this process are shut down"));
    }
}

fn ended() -> Unavailable {
    Unavailable::new("the lock session has ended")
}

/// Makes connections, and does not insist where none can be made.
#[derive(Default)]
struct Opener {
    number: u64,
    failed: Option<(Instant, Duration, Unavailable)>,
}

impl Opener {
    async fn open(&mut self, options: &ConnectOptions) -> Result<(Opened, Driver), Unavailable> {
        if let Some((until, _, cause)) = &self.failed
            && Instant::now() < *until
        {
            return Err(cause.clone());
        }
        self.number += 1;
        let cause = match timeout(ANSWER, Opened::open(options, self.number)).await {
            Ok(Ok(opened)) => {
                self.failed = None;
                return Ok(opened);
            }
            Ok(Err(error)) => Unavailable::because("cannot open a lock session", error),
            Err(_) => Unavailable::new("a lock session could not be opened in time"),
        };
        tracing::warn!(error = chain(&cause), "cannot open a lock session");
        let (first, longest) = BACKOFF;
        let delay = self
            .failed
            .take()
            .map_or(first, |(_, delay, _)| (delay * 2).min(longest));
        let until = Instant::now() + delay.mul_f64(rand::rng().random_range(0.5..1.0));
        self.failed = Some((until, delay, cause.clone()));
        Err(cause)
    }
}

/// A session that is set up.
struct Opened {
    session: Session,
    client: Arc<Client>,
    statements: Statements,
}

/// Each is prepared once.
struct Statements {
    ping: Statement,
    big: Kind,
    pair: Kind,
}

/// The statements for one space of keys.
struct Kind {
    lock: Statement,
    lock_shared: Statement,
    unlock: Statement,
    unlock_shared: Statement,
}

impl Kind {
    async fn prepare(client: &Client, key: &str) -> Result<Self, Error> {
        let prepare = async |function: &str, more: &str| {
            client.prepare(&format!("SELECT {function}({key}){more}")).await
        };
        let (lock, lock_shared, unlock, unlock_shared) = tokio::try_join!(
            prepare("pg_try_advisory_lock", ", clock_timestamp()"),
            prepare("pg_try_advisory_lock_shared", ", clock_timestamp()"),
            prepare("pg_advisory_unlock", ""),
            prepare("pg_advisory_unlock_shared", ""),
        )?;
        Ok(Self {
            lock,
            lock_shared,
            unlock,
            unlock_shared,
        })
    }
}

impl Opened {
    async fn open(options: &ConnectOptions, number: u64) -> Result<(Self, Driver), StorageError> {
        let (client, mut driver) = options.open().await?;
        let prepared = {
            let mut preparing = pin!(Self::prepare(client, number));
            tokio::select! {
                biased;
                prepared = &mut preparing => prepared?,
                ended = &mut driver => {
                    ended?;
                    // The server hung up; the statements know why.
                    preparing.await?
                }
            }
        };
        Ok((prepared, driver))
    }

    async fn prepare(client: Client, number: u64) -> Result<Self, Error> {
        client.batch_execute(SET_UP).await?;
        let (ping, big, pair) = tokio::try_join!(
            client.prepare("SELECT pg_backend_pid()"),
            Kind::prepare(&client, "$1"),
            Kind::prepare(&client, "$1, $2"),
        )?;
        let backend_pid = client.query_one(&ping, &[]).await?.try_get(0)?;
        Ok(Self {
            session: Session { number, backend_pid },
            client: Arc::new(client),
            statements: Statements { ping, big, pair },
        })
    }

    fn kind(&self, key: AdvisoryKey) -> &Kind {
        match key {
            AdvisoryKey::Big(_) => &self.statements.big,
            AdvisoryKey::Pair(..) => &self.statements.pair,
        }
    }

    fn query(&self, statement: &Statement, key: Option<AdvisoryKey>) -> Answer {
        let (client, statement) = (Arc::clone(&self.client), statement.clone());
        async move {
            match key {
                None => client.query_one(&statement, &[]).await,
                Some(AdvisoryKey::Big(key)) => client.query_one(&statement, &[&key]).await,
                Some(AdvisoryKey::Pair(high, low)) => client.query_one(&statement, &[&high, &low]).await,
            }
        }
        .boxed()
    }
}

type Answer = BoxFuture<'static, Result<Row, Error>>;

/// A session at work.
struct Connection<'a> {
    session: &'a Arc<LockSession>,
    opened: Opened,
    /// What was sent and is not answered, in the order of sending, which is that of the answers.
    in_flight: VecDeque<(Asked, Instant, Answer)>,
    last_sent: Instant,
}

/// What an answer will be about.
enum Asked {
    Lock(AdvisoryKey),
    Unlock(AdvisoryKey, Option<oneshot::Sender<Unlocked>>),
    Ping(Option<oneshot::Sender<()>>),
}

impl Connection<'_> {
    /// Works until the session breaks, and answers why.
    async fn serve(
        &mut self,
        mut driver: Driver,
        inbox: &mut mpsc::UnboundedReceiver<Command>,
    ) -> Unavailable {
        let mut timer = pin!(sleep_until(Instant::now() + PING));
        loop {
            // First everything that is to be sent, so that it travels together.
            tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    Some(command) => self.send(command).await,
                    None => return ended(),
                },
                (asked, row) = answer(&mut self.in_flight) => if let Err(cause) = self.settle(asked, row) {
                    return cause;
                },
                end = &mut driver => return match end {
                    Ok(()) => ended(),
                    Err(error) => Unavailable::because("the lock session was lost", error),
                },
                () = &mut timer => match self.look_after().await {
                    Some(next) => timer.as_mut().reset(next),
                    None => return Unavailable::new("the lock session did not answer in time"),
                },
            }
        }
    }

    async fn send(&mut self, command: Command) {
        match command {
            Command::Lock { key, mode } => {
                let kind = self.opened.kind(key);
                let statement = match mode {
                    LockMode::Exclusive => &kind.lock,
                    LockMode::Shared => &kind.lock_shared,
                };
                let answer = self.opened.query(statement, Some(key));
                self.push(Asked::Lock(key), answer).await;
            }
            Command::Unlock {
                key, session, told, ..
            } if session != self.opened.session => {
                finish(self.session, key, told, Unlocked::Unanswered(ended()));
            }
            Command::Unlock { key, mode, told, .. } => {
                let kind = self.opened.kind(key);
                let statement = match mode {
                    LockMode::Exclusive => &kind.unlock,
                    LockMode::Shared => &kind.unlock_shared,
                };
                let answer = self.opened.query(statement, Some(key));
                self.push(Asked::Unlock(key, told), answer).await;
            }
            Command::Ping { session, told } => {
                if session == self.opened.session {
                    self.ping(Some(told)).await;
                }
            }
        }
    }

    async fn ping(&mut self, told: Option<oneshot::Sender<()>>) {
        let answer = self.opened.query(&self.opened.statements.ping, None);
        self.push(Asked::Ping(told), answer).await;
    }

    /// A statement is sent by the first poll of its answer: here, so that the order is that of the calls.
    async fn push(&mut self, asked: Asked, mut answer: Answer) {
        let polled = poll_fn(|context| Poll::Ready(answer.poll_unpin(context))).await;
        if let Poll::Ready(done) = polled {
            answer = ready(done).boxed();
        }
        let now = Instant::now();
        self.last_sent = now;
        self.in_flight.push_back((asked, now, answer));
    }

    /// Pings when nothing else is said. Answers when to look again, or nothing when an answer is overdue.
    async fn look_after(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if let Some((_, sent, _)) = self.in_flight.front() {
            return (*sent + ANSWER > now).then_some(*sent + ANSWER);
        }
        if self.last_sent + PING <= now {
            self.ping(None).await;
        }
        Some(self.last_sent + PING)
    }

    /// Passes an answer on. An error says that the session cannot be relied on any more.
    fn settle(&mut self, asked: Asked, row: Result<Row, Error>) -> Result<(), Unavailable> {
        let row = match row {
            Ok(row) => row,
            Err(error) => return self.settle_error(asked, error),
        };
        match asked {
            Asked::Ping(told) => {
                if let Some(told) = told {
                    // Nobody may be left to hear it.
                    _ = told.send(());
                }
            }
            Asked::Lock(key) => {
                if row.get(0) {
                    self.session.table().granted(key, self.opened.session, row.get(1));
                } else {
                    let chaser = self.session.table().refused(key);
                    chaser::start(self.session, key, chaser);
                }
            }
            Asked::Unlock(key, told) => {
                if row.get(0) {
                    finish(self.session, key, told, Unlocked::Held);
                } else {
                    // Somebody has unlocked behind our back, and who knows what else.
                    metrics::counter!("leasehold_unlock_false_total").increment(1);
                    metrics::counter!("leasehold_lock_lost_total", "backend" => "session").increment(1);
                    finish(self.session, key, told, Unlocked::AlreadyGone);
                    return Err(Unavailable::new(
                        "the server did not know of a lock that was held",
                    ));
                }
            }
        }
        Ok(())
    }

    fn settle_error(&mut self, asked: Asked, error: Error) -> Result<(), Unavailable> {
        let is_statements_own = error.as_db_error().is_some_and(|refusal| {
            !matches!(refusal.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
        });
        let cause = Unavailable::because("a statement of the lock session failed", error);
        match asked {
            // Its lock table may be full.
            Asked::Lock(key) if is_statements_own => {
                self.session.table().failed(key, &Failure { cause, sent: false });
                return Ok(());
            }
            // Somebody has changed the session, and nobody can tell since when.
            Asked::Unlock(key, told) if is_statements_own => {
                metrics::counter!("leasehold_lock_lost_total", "backend" => "session").increment(1);
                finish(self.session, key, told, Unlocked::AlreadyGone);
            }
            // It is told together with the others.
            asked => {
                let never = std::future::pending().boxed();
                self.in_flight.push_front((asked, self.last_sent, never));
            }
        }
        Err(cause)
    }

    /// Tells everybody who relies on the session that it has ended. The socket is closed by now.
    fn end(self, cause: &Unavailable) {
        self.session.lose(self.opened.session, cause);
        for (asked, ..) in self.in_flight {
            let cause = cause.clone();
            match asked {
                Asked::Lock(key) => self.session.table().failed(key, &Failure { cause, sent: true }),
                Asked::Unlock(key, told) => finish(self.session, key, told, Unlocked::Unanswered(cause)),
                Asked::Ping(_) => {}
            }
        }
    }
}

/// The next answer, of what was sent first.
async fn answer(in_flight: &mut VecDeque<(Asked, Instant, Answer)>) -> (Asked, Result<Row, Error>) {
    let row = poll_fn(|context| match in_flight.front_mut() {
        Some((_, _, answer)) => answer.poll_unpin(context),
        None => Poll::Pending,
    })
    .await;
    match in_flight.pop_front() {
        Some((asked, ..)) => (asked, row),
        None => (Asked::Ping(None), row),
    }
}

/// An unlock is over, in whatever way: who waits for it is told, and so is everybody who wants the key.
fn finish(
    session: &Arc<LockSession>,
    key: AdvisoryKey,
    told: Option<oneshot::Sender<Unlocked>>,
    unlocked: Unlocked,
) {
    session.signals.freed(super::signal(key));
    let chaser = session.table().unlocked(key);
    chaser::start(session, key, chaser);
    if let Some(told) = told {
        // Nobody may be left to hear it.
        drop(told.send(unlocked));
    }
}
