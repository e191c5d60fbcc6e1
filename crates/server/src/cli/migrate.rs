//! `leasehold migrate`.

use clap::Args;
use leasehold_storage::ConnectOptions;

use crate::cli::postgres::{Postgres, connect_briefly};
use crate::cli::{Failed, print};
use crate::config::{DatabaseConfig, LogConfig, WorkspaceLockMode};
use crate::state::instance;
use crate::{mode, schema, telemetry};

#[derive(Args, Debug)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    database: DatabaseConfig,

    /// Print the SQL that would be run, and run nothing.
    #[arg(long, conflicts_with = "workspace_lock_mode")]
    print: bool,

    /// Change what a workspace lock is. Only while no instance of the service lives.
    #[arg(long, value_enum)]
    workspace_lock_mode: Option<WorkspaceLockMode>,

    #[command(flatten)]
    log: LogConfig,
}

pub(crate) fn run(args: &MigrateArgs) -> Result<(), Failed> {
    telemetry::start(&args.log);
    let postgres = Postgres::find(&args.database)?;
    postgres.runtime.block_on(async {
        if args.print {
            return print(&schema::migrations().pending_sql(&postgres.options).await?);
        }
        schema::migrations().run(&postgres.options).await?;
        match args.workspace_lock_mode {
            Some(mode) => change_mode(&postgres.options, mode).await,
            None => Ok(()),
        }
    })
}

async fn change_mode(options: &ConnectOptions, mode: WorkspaceLockMode) -> Result<(), Failed> {
    let db = connect_briefly(options).await?;
    let changed = mode::change(&db, mode, &instance()).await;
    db.shutdown(std::time::Duration::from_secs(5)).await;
    changed?;
    tracing::info!(mode = mode.as_str(), "the workspace lock mode is set");
    Ok(())
}
