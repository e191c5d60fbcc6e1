//! [`Proxy`]: stands between a process and Postgres, counts what goes over the wire, and breaks it on purpose.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use crate::database::TestDatabase;
use crate::patience::in_time;
use crate::wire::{self, Message, Opening, Statements, Step};

/// A proxy on loopback, in a thread of its own: it goes on while the runtime of a test is blocked.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Dropped, it ends the thread.
    _alive: watch::Sender<()>,
}

/// What to do to the round trip in which a statement is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The server never sees it: the connection is cut instead.
    LoseStatement,
    /// The server sees it only after [`Hit::let_go`], also when the client has hung up meanwhile. As a packet that
    /// took a long way.
    HoldStatement,
    /// The server runs it to its end, and then the connection is cut in the place of the answer.
    LoseAnswer,
    /// As `LoseAnswer`, and from then on nobody gets a connection, until [`Proxy::come_back`].
    LoseAnswerAndGoAway,
    /// As `LoseAnswer`, but first the client is told of a fatal error: as by a pooler that has lost the server.
    LoseAnswerWithWord,
    /// It is passed on, and the connection is cut at once, whatever the server makes of it.
    CutBehind,
    /// The answer waits for [`Hit::let_go`].
    HoldAnswer,
}

/// A fault that was ordered and happens once.
#[derive(Debug)]
#[must_use = "a fault that never happened tests nothing: wait for it"]
pub struct Hit {
    happened: watch::Receiver<bool>,
    answered: watch::Receiver<bool>,
    gate: watch::Sender<bool>,
}

/// What went over the wire meanwhile.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// How often the client sent something and waited for the answer.
    pub round_trips: usize,
    /// The statements that were run, by their texts, in the order in which they came.
    pub statements: Vec<String>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    state: Mutex<State>,
    /// Raised to cut all connections.
    cuts: watch::Sender<u64>,
    silent: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    traffic: Traffic,
    rules: Vec<Rule>,
    away: bool,
    open: usize,
}

/// Statements that are sent together, and those of their transaction with them.
struct Round<'a> {
    texts: Vec<String>,
    transaction: &'a str,
}

#[derive(Debug)]
struct Rule {
    matches: fn(&Round<'_>, &str) -> bool,
    needle: String,
    armed: Armed,
}

/// A fault on its way to happen.
#[derive(Clone, Debug)]
struct Armed {
    fault: Fault,
    happened: watch::Sender<bool>,
    answered: watch::Sender<bool>,
    gate: watch::Receiver<bool>,
}

/// The rounds of one connection that the server has not answered yet.
type Pending = Mutex<VecDeque<Option<Armed>>>;

impl Proxy {
    /// In front of the server of this database.
    pub fn start(database: &TestDatabase) -> Self {
        let config = database.config();
        let shared = Arc::new(Shared {
            socket: socket_of(&config),
            state: Mutex::default(),
            cuts: watch::Sender::new(0),
            silent: watch::Sender::new(false),
        });
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (alive, mut ended) = watch::channel(());
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(&listener, &serving) => {}
                    // Only ever an error: nothing is sent.
                    _ = ended.changed() => {}
                }
            });
        });
        Self {
            address,
            shared,
            _alive: alive,
        }
    }

    /// How to connect to `database` through the proxy: a URL.
    pub fn url(&self, database: &TestDatabase) -> String {
        let config = database.config();
        let (user, name) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        format!("postgres://{user}@{}/{name}?sslmode=disable", self.address)
    }

    /// What went over the wire while `work` ran, on all connections together.
    pub async fn watch<T>(&self, work: impl Future<Output = T>) -> (T, Traffic) {
        let before = self.traffic();
        let value = work.await;
        let after = self.traffic();
        let since = Traffic {
            round_trips: after.round_trips - before.round_trips,
            statements: after.statements[before.statements.len()..].to_vec(),
        };
        (value, since)
    }

    /// What went over the wire until now.
    pub fn traffic(&self) -> Traffic {
        self.shared.state().traffic.clone()
    }

    /// Orders a fault for the next round trip that runs a statement whose text contains `needle`.
    pub fn on(&self, needle: &str, fault: Fault) -> Hit {
        self.order(|round, needle| round.runs(needle), needle, fault)
    }

    /// Orders a fault for the next round trip that ends a transaction with COMMIT.
    pub fn on_commit(&self, fault: Fault) -> Hit {
        self.on_commit_of("", fault)
    }

    /// Orders a fault for the next COMMIT of a transaction in which a statement was run whose text contains `needle`: of
    /// the service's own, in the background, it is not known when they come.
    pub fn on_commit_of(&self, needle: &str, fault: Fault) -> Hit {
        let matches = |round: &Round<'_>, needle: &str| round.commits() && round.transaction.contains(needle);
        self.order(matches, needle, fault)
    }

    fn order(&self, matches: fn(&Round<'_>, &str) -> bool, needle: &str, fault: Fault) -> Hit {
        let (happened, seen) = watch::channel(false);
        let (answered, told) = watch::channel(false);
        let (gate, open) = watch::channel(false);
        let armed = Armed {
            fault,
            happened,
            answered,
            gate: open,
        };
        self.shared.state().rules.push(Rule {
            matches,
            needle: needle.to_owned(),
            armed,
        });
        Hit {
            happened: seen,
            answered: told,
            gate,
        }
    }

    /// How many connections are open through the proxy.
    pub fn connections(&self) -> usize {
        self.shared.state().open
    }

    /// Cuts all connections. New ones are let through.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts all connections and lets nobody through, as a server that is down.
    pub fn go_away(&self) {
        self.shared.state().away = true;
        self.cut();
    }

    /// Lets nobody new through. Connections that are open stay so.
    pub fn hold_off(&self) {
        self.shared.state().away = true;
    }

    /// Ends what [`Proxy::go_away`] or [`Proxy::hold_off`] began.
    pub fn come_back(&self) {
        self.shared.state().away = false;
    }

    /// From now on no byte goes either way, on old connections and on new ones; none of them is closed. As a
    /// network that swallows packets.
    pub fn fall_silent(&self) {
        self.shared.silent.send_replace(true);
    }

    /// Ends what [`Proxy::fall_silent`] began. What was sent meanwhile is delivered.
    pub fn speak(&self) {
        self.shared.silent.send_replace(false);
    }
}

impl Round<'_> {
    fn runs(&self, needle: &str) -> bool {
        self.texts.iter().any(|text| text.contains(needle))
    }

    fn commits(&self) -> bool {
        self.texts.iter().any(|text| text.ends_with("COMMIT"))
    }
}

impl Hit {
    /// Waits until the fault has happened.
    pub async fn happened(&mut self) {
        let happened = self.happened.wait_for(|happened| *happened);
        drop(in_time("the ordered fault", happened).await.unwrap());
    }

    /// Lets a statement or an answer go that was held back, and waits until the server has answered, if the client
    /// of an answer is still there.
    pub async fn let_go(&mut self) {
        self.gate.send_replace(true);
        let answered = self.answered.wait_for(|answered| *answered);
        drop(in_time("the server's answer", answered).await);
    }
}

impl Traffic {
    /// How often a statement was run whose text contains `needle`.
    pub fn count(&self, needle: &str) -> usize {
        self.statements
            .iter()
            .filter(|text| text.contains(needle))
            .count()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while nothing may go over the wire.
    async fn spoken(&self) {
        // The sender is `self`.
        drop(self.silent.subscribe().wait_for(|silent| !*silent).await);
    }

    /// Counts a round that is about to be passed on, and answers what shall happen to it.
    fn count(&self, round: Round<'_>, alone: bool) -> Option<Armed> {
        let mut state = self.state();
        state.traffic.round_trips += usize::from(alone);
        let rule = state
            .rules
            .iter()
            .position(|rule| (rule.matches)(&round, &rule.needle));
        state.traffic.statements.extend(round.texts);
        rule.map(|index| state.rules.remove(index).armed)
    }
}

fn socket_of(config: &Config) -> PathBuf {
    let [Host::Unix(folder)] = config.get_hosts() else {
        panic!("the servers of tests listen on a Unix socket");
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    folder.join(format!(".s.PGSQL.{port}"))
}

async fn serve(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        if shared.state().away {
            continue;
        }
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let mut cuts = shared.cuts.subscribe();
            shared.state().open += 1;
            tokio::select! {
                // However it ends, both sockets are closed.
                _ = connection(client, &shared) => {}
                _ = cuts.changed() => {}
            }
            shared.state().open -= 1;
        });
    }
}

async fn connection(client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (from_client, mut to_client) = client.into_split();
    let mut from_client = BufReader::new(from_client);
    let opening = loop {
        match wire::read_opening(&mut from_client).await? {
            Opening::Encryption => to_client.write_all(b"N").await?,
            Opening::Cancel(packet) | Opening::Session(packet) => break packet,
        }
    };
    shared.spoken().await;
    let (from_server, mut to_server) = UnixStream::connect(&shared.socket).await?.into_split();
    to_server.write_all(&opening).await?;
    let pending = Pending::default();
    tokio::select! {
        done = forward(from_client, to_server, shared, &pending) => done,
        done = answer(BufReader::new(from_server), to_client, shared, &pending) => done,
    }
}

async fn forward(
    mut client: impl AsyncRead + Unpin,
    mut server: impl AsyncWrite + Unpin,
    shared: &Shared,
    pending: &Pending,
) -> io::Result<()> {
    let mut statements = Statements::default();
    let (mut bytes, mut texts) = (Vec::new(), Vec::new());
    // What ran since the transaction began.
    let mut transaction = String::new();
    while let Some(message) = Message::read(&mut client).await? {
        bytes.extend(message.bytes());
        let whole = match statements.follow(&message) {
            Step::More => continue,
            Step::Run(text) => {
                texts.push(text);
                continue;
            }
            Step::RunAndWait(text) => {
                texts.push(text);
                true
            }
            Step::Wait => true,
            Step::Flush | Step::Leave => false,
        };
        let (mut cut_behind, mut hold) = (None, None);
        if whole {
            let alone = pending_rounds(pending).is_empty();
            let texts = std::mem::take(&mut texts);
            if texts.first().is_some_and(|text| text.starts_with("BEGIN")) {
                transaction.clear();
            }
            transaction.push_str(&texts.join("; "));
            let round = Round {
                texts,
                transaction: &transaction,
            };
            let armed = shared.count(round, alone);
            match &armed {
                Some(Armed {
                    fault: Fault::LoseStatement,
                    happened,
                    ..
                }) => {
                    happened.send_replace(true);
                    return Ok(());
                }
                Some(Armed {
                    fault: Fault::CutBehind,
                    happened,
                    ..
                }) => cut_behind = Some(happened.clone()),
                Some(
                    held @ Armed {
                        fault: Fault::HoldStatement,
                        happened,
                        ..
                    },
                ) => {
                    happened.send_replace(true);
                    hold = Some(held.clone());
                }
                _ => {}
            }
            pending_rounds(pending).push_back(armed);
        }
        if let Some(Armed { gate, .. }) = &mut hold {
            // Whoever dropped the gate no longer holds it.
            drop(gate.wait_for(|open| *open).await);
        }
        shared.spoken().await;
        server.write_all(&bytes).await?;
        bytes.clear();
        if let Some(Armed { answered, .. }) = hold {
            // The client may have hung up long ago; what it sent counts all the same.
            drop(answered.subscribe().wait_for(|answered| *answered).await);
        }
        if let Some(happened) = cut_behind {
            happened.send_replace(true);
            return Ok(());
        }
    }
    Ok(())
}

async fn answer(
    mut server: impl AsyncRead + Unpin,
    mut client: impl AsyncWrite + Unpin,
    shared: &Shared,
    pending: &Pending,
) -> io::Result<()> {
    while let Some(message) = Message::read(&mut server).await? {
        let last = message.kind() == b'Z';
        let armed = pending_rounds(pending).front().cloned().flatten();
        if let Some(Armed {
            fault,
            happened,
            answered,
            mut gate,
        }) = armed
        {
            if last {
                answered.send_replace(true);
            }
            match fault {
                Fault::LoseAnswer | Fault::LoseAnswerAndGoAway | Fault::LoseAnswerWithWord if last => {
                    if fault == Fault::LoseAnswerAndGoAway {
                        shared.state().away = true;
                        shared.cuts.send_modify(|cuts| *cuts += 1);
                    }
                    if fault == Fault::LoseAnswerWithWord {
                        client.write_all(&server_lost()).await?;
                    }
                    happened.send_replace(true);
                    return Ok(());
                }
                Fault::LoseAnswer | Fault::LoseAnswerAndGoAway | Fault::LoseAnswerWithWord => continue,
                Fault::HoldAnswer => {
                    happened.send_replace(true);
                    // Whoever dropped the gate no longer holds it.
                    drop(gate.wait_for(|open| *open).await);
                }
                Fault::LoseStatement | Fault::HoldStatement | Fault::CutBehind => {}
            }
        }
        if last {
            // Before the client sees it: what it sends next is a round trip of its own.
            pending_rounds(pending).pop_front();
        }
        shared.spoken().await;
        client.write_all(message.bytes()).await?;
    }
    Ok(())
}

/// What pgbouncer says when a server has gone away.
fn server_lost() -> Vec<u8> {
    let fields = b"SFATAL\0VFATAL\0C08P01\0Mserver conn crashed?\0\0";
    let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
    [b"E".as_slice(), &length, fields].concat()
}

fn pending_rounds(pending: &Pending) -> MutexGuard<'_, VecDeque<Option<Armed>>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}
