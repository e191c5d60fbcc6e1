//! What must be true of the server.

use crate::connect::ConnectOptions;

/// What was found at the start.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Findings {
    /// A transaction pooler is in between.
    pub pooled: bool,
    /// What is unwise.
    pub warnings: Vec<String>,
    /// How many session locks this process may hold.
    pub lock_budget: u32,
}

/// The server is not one that locks can rely on.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// The background thread could not be started.
    #[error("cannot start the background thread")]
    Thread(#[source] std::io::Error),
}

pub(crate) async fn check(_options: &ConnectOptions) -> Result<Findings, StartupError> {
    Ok(Findings::default())
}
