//! A proxy that can slip a statement of its own into a lock session, as somebody who shares its connection would.

use std::io;

use leasehold_storage::ConnectOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_postgres::config::Host;

use crate::support::TestDatabase;
use crate::support::pooler::{message, read};

/// Ends with its value.
#[derive(Debug)]
pub(crate) struct Injector {
    url: String,
    statements: broadcast::Sender<&'static str>,
    done: mpsc::UnboundedReceiver<()>,
    accepting: JoinHandle<()>,
}

impl Drop for Injector {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Injector {
    pub(crate) async fn start(database: &TestDatabase) -> Self {
        let config = database.config();
        let [Host::Unix(folder)] = config.get_hosts() else {
            panic!("the cluster of the tests has a Unix socket")
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let socket = folder.join(format!(".s.PGSQL.{port}"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (statements, _) = broadcast::channel(8);
        let (told, done) = mpsc::unbounded_channel();
        let from = statements.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(&socket).await.unwrap();
                // A client that hangs up ends its task with an error.
                tokio::spawn(serve(client, server, from.subscribe(), told.clone()));
            }
        });
        let user = config.get_user().unwrap();
        Self {
            url: format!("postgres://{user}@127.0.0.1:{port}/{}", database.name()),
            statements,
            done,
            accepting,
        }
    }

    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::parse(&self.url, None).unwrap()
    }

    /// Runs a statement in one open lock session; there must be just one.
    pub(crate) async fn run(&mut self, statement: &'static str) {
        self.statements.send(statement).unwrap();
        self.done.recv().await.unwrap();
    }
}

type Message = (u8, Vec<u8>);

async fn serve(
    mut client: TcpStream,
    mut server: UnixStream,
    mut statements: broadcast::Receiver<&'static str>,
    done: mpsc::UnboundedSender<()>,
) -> io::Result<()> {
    let length = client.read_u32().await?;
    let mut startup = vec![0; length as usize - 4];
    client.read_exact(&mut startup).await?;
    server.write_all(&length.to_be_bytes()).await?;
    server.write_all(&startup).await?;

    let (client, mut to_client) = client.into_split();
    let (server, mut to_server) = server.into_split();
    let (mut from_client, mut from_server) = (messages(client), messages(server));
    let mut is_lock_session = false;
    let mut unanswered = 1_u32;
    loop {
        tokio::select! {
            asked = from_client.recv() => {
                let (kind, body) = asked.ok_or(io::ErrorKind::UnexpectedEof)?;
                is_lock_session |= kind == b'Q' && body.windows(20).any(|text| text == b"idle_session_timeout");
                unanswered += u32::from(matches!(kind, b'Q' | b'S'));
                to_server.write_all(&message(kind, &body)).await?;
            }
            answered = from_server.recv() => {
                let (kind, body) = answered.ok_or(io::ErrorKind::UnexpectedEof)?;
                unanswered -= u32::from(kind == b'Z');
                to_client.write_all(&message(kind, &body)).await?;
            }
            Ok(statement) = statements.recv(), if is_lock_session && unanswered == 0 => {
                let text = format!("{statement}\0");
                to_server.write_all(&message(b'Q', text.as_bytes())).await?;
                while from_server.recv().await.ok_or(io::ErrorKind::UnexpectedEof)?.0 != b'Z' {}
                done.send(()).ok();
            }
        }
    }
}

/// Whole messages, read by a task so that nothing is lost when nobody waits for them.
fn messages(mut stream: impl AsyncReadExt + Unpin + Send + 'static) -> mpsc::UnboundedReceiver<Message> {
    let (heard, messages) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok(Some(message)) = read(&mut stream).await {
            if heard.send(message).is_err() {
                return;
            }
        }
    });
    messages
}
