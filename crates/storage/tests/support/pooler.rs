//! A pooler that gives each transaction any free session of the server, as pgbouncer does in transaction mode.
//!
//! It knows what the checks at the start need of the protocol: start-up without a password, and statements in
//! the simple protocol. <https://www.postgresql.org/docs/current/protocol-message-formats.html>

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use leasehold_storage::ConnectOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use super::TestDatabase;

/// Ends with its value.
#[derive(Debug)]
pub(crate) struct Pooler {
    port: u16,
    accepting: JoinHandle<()>,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Which of the free sessions the next transaction gets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Next {
    /// The one that was used last, as pgbouncer chooses by default.
    LastUsed,
    /// The one that has rested longest (`server_round_robin`).
    RoundRobin,
}

struct Sessions {
    free: Mutex<VecDeque<UnixStream>>,
    available: Semaphore,
    next: Next,
}

impl Pooler {
    /// One with `sessions` sessions in this database.
    pub(crate) async fn start(database: &TestDatabase, sessions: usize, next: Next) -> Self {
        let mut free = VecDeque::new();
        for _ in 0..sessions {
            free.push_back(session(&database.config()).await.unwrap());
        }
        let sessions = Sessions {
            free: Mutex::new(free),
            available: Semaphore::new(sessions),
            next,
        };
        let sessions = Arc::new(sessions);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A client that hangs up ends its task with an error.
                tokio::spawn(serve(client, Arc::clone(&sessions)));
            }
        });
        Self { port, accepting }
    }

    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::parse(&format!("postgres://any@127.0.0.1:{}/any", self.port), None).unwrap()
    }
}

/// Serves one client to its end.
async fn serve(mut client: TcpStream, sessions: Arc<Sessions>) -> io::Result<()> {
    read_startup(&mut client).await?;
    client.write_all(&message(b'R', &0_u32.to_be_bytes())).await?; // trust
    client
        .write_all(&message(b'S', b"server_version\0whatever\0"))
        .await?;
    client.write_all(&message(b'Z', b"I")).await?;
    while let Some(first) = read(&mut client).await? {
        let permit = sessions.available.acquire().await.unwrap();
        let taken = {
            let mut free = sessions.free.lock().unwrap();
            match sessions.next {
                Next::LastUsed => free.pop_back(),
                Next::RoundRobin => free.pop_front(),
            }
        };
        let mut server = taken.unwrap();
        transaction(&mut client, &mut server, first).await?;
        sessions.free.lock().unwrap().push_back(server);
        drop(permit);
    }
    Ok(())
}

/// From a client's first message to the server's word that no transaction is open.
async fn transaction(client: &mut TcpStream, server: &mut UnixStream, first: Message) -> io::Result<()> {
    let mut request = first;
    loop {
        server.write_all(&message(request.0, &request.1)).await?;
        loop {
            let (kind, body) = read(server).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            client.write_all(&message(kind, &body)).await?;
            match (kind, body.as_slice()) {
                (b'Z', b"I") => return Ok(()),
                (b'Z', _) => break,
                _ => {}
            }
        }
        request = read(client).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    }
}

/// A session of the server, past its start-up.
async fn session(config: &Config) -> io::Result<UnixStream> {
    let [Host::Unix(folder)] = config.get_hosts() else {
        panic!("the cluster of the tests has a Unix socket")
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let mut server = UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?;
    let parameters = format!(
        "user\0{}\0database\0{}\0\0",
        config.get_user().unwrap(),
        config.get_dbname().unwrap()
    );
    let mut startup = 196_608_u32.to_be_bytes().to_vec(); // protocol 3.0
    startup.extend(parameters.as_bytes());
    server
        .write_all(&u32::try_from(startup.len() + 4).unwrap().to_be_bytes())
        .await?;
    server.write_all(&startup).await?;
    while let Some((kind, body)) = read(&mut server).await? {
        assert_ne!(kind, b'E', "{}", String::from_utf8_lossy(&body));
        if kind == b'Z' {
            return Ok(server);
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// The kind and what follows the length.
type Message = (u8, Vec<u8>);

pub(crate) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[kind], length.to_be_bytes().as_slice(), body].concat()
}

/// `None` when the peer has hung up.
pub(crate) async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Option<Message>> {
    let Ok(kind) = stream.read_u8().await else {
        return Ok(None);
    };
    let mut body = vec![0; stream.read_u32().await? as usize - 4];
    stream.read_exact(&mut body).await?;
    Ok(if kind == b'X' { None } else { Some((kind, body)) })
}

/// The one message that has no kind.
pub(crate) async fn read_startup(stream: &mut TcpStream) -> io::Result<()> {
    let mut body = vec![0; stream.read_u32().await? as usize - 4];
    stream.read_exact(&mut body).await.map(drop)
}
