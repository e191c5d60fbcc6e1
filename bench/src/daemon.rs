//! Other servers, each in a folder of its own for as long as a group runs.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::Result;

/// Only a fault takes so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server that listens. Dropping it kills the process and removes its folder.
pub(crate) struct Daemon {
    pub(crate) address: SocketAddr,
    process: Child,
    folder: PathBuf,
}

impl Daemon {
    /// Starts the program with the arguments for this address, in an empty folder. `None` when there is no such program.
    pub(crate) async fn start(
        program: &str,
        arguments: impl FnOnce(SocketAddr) -> Result<Vec<String>>,
    ) -> Result<Option<Self>> {
        let address = free_address()?;
        let arguments = arguments(address)?;
        let folder = std::env::temp_dir().join(format!("leasehold-bench-{}", Uuid::new_v4()));
        std::fs::create_dir(&folder)?;
        let spawned = Command::new(program)
            .args(arguments)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let process = match spawned {
            Ok(process) => process,
            Err(error) => {
                std::fs::remove_dir(&folder)?;
                return match error.kind() {
                    std::io::ErrorKind::NotFound => Ok(None),
                    _ => Err(format!("{program}: {error}").into()),
                };
            }
        };
        let mut daemon = Self {
            address,
            process,
            folder,
        };
        daemon.listens(program).await?;
        Ok(Some(daemon))
    }

    async fn listens(&mut self, program: &str) -> Result {
        let start = Instant::now();
        while TcpStream::connect(self.address).await.is_err() {
            if let Some(status) = self.process.try_wait()? {
                return Err(format!("{program} ended: {status}").into());
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("{program} does not listen after {PATIENCE:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Killed first, so that it writes nothing any more. It may have ended.
        drop(self.process.start_kill());
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

/// On which nobody listens now.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
