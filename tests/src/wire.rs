//! As much of the Postgres protocol as it takes to see statements and round trips.
//!
//! <https://www.postgresql.org/docs/current/protocol-message-formats.html>

use std::collections::HashMap;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a client sends before anything else.
#[derive(Debug)]
pub enum Opening {
    /// It asks for TLS or for encryption by GSSAPI, and waits for one byte.
    Encryption,
    /// It wants a statement of another connection cancelled. The whole packet.
    Cancel(Vec<u8>),
    /// A session. The whole packet.
    Session(Vec<u8>),
}

/// Reads the packet that has no type.
///
/// # Errors
/// Those of the socket.
pub async fn read_opening(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Opening> {
    let length = client.read_u32().await?;
    let mut packet = length.to_be_bytes().to_vec();
    packet.resize(usize::try_from(length).map_err(io::Error::other)?, 0);
    let rest = packet.get_mut(4..).ok_or(io::ErrorKind::InvalidData)?;
    client.read_exact(rest).await?;
    let code = rest.first_chunk().map(|code| u32::from_be_bytes(*code));
    Ok(match code {
        Some(80877103 | 80877104) => Opening::Encryption,
        Some(80877102) => Opening::Cancel(packet),
        _ => Opening::Session(packet),
    })
}

/// A message: its type, its length and its body.
#[derive(Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// Reads one. `None` at the end of the stream.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let kind = match from.read_u8().await {
            Ok(kind) => kind,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = from.read_u32().await?;
        let mut bytes = vec![kind];
        bytes.extend(length.to_be_bytes());
        bytes.resize(1 + usize::try_from(length).map_err(io::Error::other)?, 0);
        from.read_exact(bytes.get_mut(5..).ok_or(io::ErrorKind::InvalidData)?)
            .await?;
        Ok(Some(Self(bytes)))
    }

    /// All of it, as it goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its type. What a type means depends on who sent it.
    pub fn kind(&self) -> u8 {
        self.0[0]
    }

    /// The zero-terminated texts that the body begins with.
    fn texts(&self) -> impl Iterator<Item = String> {
        self.0[5..]
            .split(|byte| *byte == 0)
            .map(|text| String::from_utf8_lossy(text).into_owned())
    }
}

/// Follows what one client prepares and runs.
#[derive(Debug, Default)]
pub struct Statements {
    prepared: HashMap<String, String>,
    portals: HashMap<String, String>,
}

/// What a message of a client means for the count.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Part of a round that is not whole yet.
    More,
    /// A statement is run, within a round that is not whole yet.
    Run(String),
    /// A statement is run, and the client waits for the answer.
    RunAndWait(String),
    /// The client waits for the answers.
    Wait,
    /// The client wants what there is, without the end of the round.
    Flush,
    /// The client leaves.
    Leave,
}

impl Statements {
    /// Takes the next message of the client.
    pub fn follow(&mut self, message: &Message) -> Step {
        let mut texts = message.texts();
        let mut text = || texts.next().unwrap_or_default();
        match message.kind() {
            b'Q' => Step::RunAndWait(text()),
            b'P' => {
                let name = text();
                self.prepared.insert(name, text());
                Step::More
            }
            b'B' => {
                let portal = text();
                let statement = self.prepared.get(&text()).cloned().unwrap_or_default();
                self.portals.insert(portal, statement);
                Step::More
            }
            b'E' => Step::Run(self.portals.get(&text()).cloned().unwrap_or_default()),
            b'S' => Step::Wait,
            b'H' => Step::Flush,
            b'X' => Step::Leave,
            _ => Step::More,
        }
    }
}
