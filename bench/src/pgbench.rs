//! Lanes of pgbench, with prepared statements.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;
use uuid::Uuid;

use crate::Result;
use crate::database::BenchDatabase;
use crate::measure::{Lane, Sample};

/// Its program.
#[derive(Clone, Debug)]
pub(crate) struct Pgbench {
    program: PathBuf,
}

impl Pgbench {
    /// In the folder that `PG_BIN` names, else on `PATH`.
    pub(crate) async fn find() -> Option<Self> {
        let beside = std::env::var_os("PG_BIN").map(|folder| PathBuf::from(folder).join("pgbench"));
        for program in beside.into_iter().chain([PathBuf::from("pgbench")]) {
            let mut version = Command::new(&program);
            version
                .arg("--version")
                .stdin(Stdio::null())
                .stderr(Stdio::null());
            if version.output().await.is_ok_and(|output| output.status.success()) {
                return Some(Self { program });
            }
        }
        None
    }

    /// A lane that runs a script.
    pub(crate) fn lane(
        &self,
        name: &str,
        database: &BenchDatabase,
        clients: u32,
        script: &str,
    ) -> Result<Box<dyn Lane>> {
        let file = std::env::temp_dir().join(format!("leasehold-bench-{}.sql", Uuid::new_v4()));
        std::fs::write(&file, script)?;
        Ok(Box::new(Script {
            name: name.to_owned(),
            program: self.program.clone(),
            url: database.url.clone(),
            clients,
            file,
        }))
    }
}

struct Script {
    name: String,
    program: PathBuf,
    url: String,
    clients: u32,
    file: PathBuf,
}

impl Drop for Script {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.file));
    }
}

#[async_trait]
impl Lane for Script {
    fn name(&self) -> &str {
        &self.name
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let seconds = window.as_secs().max(1);
        let output = Command::new(&self.program)
            .args(["--no-vacuum", "--protocol=prepared", "--client"])
            .arg(self.clients.to_string())
            .arg(format!("--jobs={}", self.clients.min(2)))
            .arg(format!("--time={seconds}"))
            .arg("--file")
            .arg(&self.file)
            .arg(&self.url)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await?;
        let said = String::from_utf8_lossy(&output.stdout);
        let rate = said.lines().find_map(|line| {
            let (number, _) = line.strip_prefix("tps = ")?.split_once(' ')?;
            number.parse().ok()
        });
        match rate {
            Some(rate) if output.status.success() => Ok(Sample {
                rate,
                latency: None,
                cpu: None,
            }),
            _ => Err(format!("pgbench: {}", String::from_utf8_lossy(&output.stderr).trim()).into()),
        }
    }
}

/// Puts expressions in the place of `$1`, `$2` and so on, and ends the statement. A colon in them would be taken
/// for a variable.
pub(crate) fn statement(sql: &str, binds: &[&str]) -> String {
    let mut text = sql.to_owned();
    for (index, bind) in binds.iter().enumerate().rev() {
        text = text.replace(&format!("${}", index + 1), bind);
    }
    // A line break ends nothing in a script, a semicolon does.
    format!("{};\n", text.trim())
}

/// Another value for each client, which stays the same: a script cannot make a new id and keep it for the release.
pub(crate) const LOCK_ID: &str = "('00000000-0000-4000-8000-' || lpad(:client_id::text, 12, '0'))::uuid";
