//! `leasehold queue`: how much there is to be done, and what was given up.

use std::fmt::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use leasehold_domain::{Page, WorkQueue};
use leasehold_storage::Database;
use serde::Serialize;

use crate::cli::postgres::Postgres;
use crate::cli::{Failed, on_one_line, print};
use crate::config::{DatabaseConfig, LogConfig};
use crate::deliveries;
use crate::names::Slug;
use crate::telemetry;
use crate::work_items::model::{DeadLetter, KindOfWork, QueueStats};

#[derive(Args, Debug)]
pub(crate) struct QueueArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say how much there is of each kind of work
    Stats {
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// List what was given up, oldest first
    DeadLetters {
        /// Only those of this tenant
        #[arg(long, value_parser = tenant)]
        tenant: Option<Slug>,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Try what was given up again, as if it were new. Prints how many dead letters there were
    Redrive {
        /// Whose they are
        #[arg(long, value_parser = tenant)]
        tenant: Slug,
        /// Their ids, from the list
        #[arg(required = true)]
        ids: Vec<i64>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args, Debug)]
struct Common {
    #[command(flatten)]
    database: DatabaseConfig,
    #[command(flatten)]
    log: LogConfig,
}

/// A dead letter of any tenant.
#[derive(Serialize)]
struct Listed {
    tenant_id: String,
    #[serde(flatten)]
    letter: DeadLetter,
}

fn tenant(text: &str) -> Result<Slug, String> {
    Slug::new(text).map_err(str::to_owned)
}

pub(crate) fn run(args: &QueueArgs) -> Result<(), Failed> {
    let (Action::Stats { common, .. } | Action::DeadLetters { common, .. } | Action::Redrive { common, .. }) =
        &args.action;
    telemetry::start(&common.log);
    let postgres = Postgres::find(&common.database)?;
    postgres.runtime.block_on(async {
        let db = postgres.connect().await?;
        let done = act(&db, &args.action).await;
        db.shutdown(Duration::from_secs(5)).await;
        print(&done?)
    })
}

async fn act(db: &Database, action: &Action) -> Result<String, Failed> {
    let queue = db.work_queue();
    match action {
        Action::Stats { json, .. } => {
            let kinds = queue.stats().await?.into_iter().map(KindOfWork::from).collect();
            let stats = QueueStats { kinds };
            if *json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&stats)?));
            }
            let mut text = String::new();
            for kind in stats.kinds {
                let oldest = kind.oldest_ready_seconds.unwrap_or_default();
                writeln!(
                    text,
                    "{}  ready {} (oldest {oldest:.0} s)  delayed {}  claimed {}  dead {}",
                    on_one_line(&kind.kind),
                    kind.ready,
                    kind.delayed,
                    kind.claimed,
                    kind.dead
                )?;
            }
            Ok(text)
        }
        Action::DeadLetters { tenant, json, .. } => {
            let letters = all_dead(&queue, tenant.as_ref()).await?;
            if *json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&letters)?));
            }
            let mut text = String::new();
            for Listed { tenant_id, letter } in letters {
                let item = &letter.item;
                let (kind, scope) = (on_one_line(&item.kind), on_one_line(&item.scope_id));
                let why = on_one_line(item.last_error.as_deref().unwrap_or_default());
                writeln!(
                    text,
                    "{}  {tenant_id}  {kind}  {scope}  {}  after {} attempts: {why}",
                    item.id, letter.failed_at, item.attempt_count
                )?;
            }
            Ok(text)
        }
        Action::Redrive { tenant, ids, .. } => {
            let (gate, tenant) = (db.tenant_gate(), tenant.as_str());
            let redriven = gate
                .write(&[tenant], async |conn| {
                    queue.redrive_in_tx(conn, tenant, ids).await
                })
                .await?;
            if redriven == 0 {
                return Err(format!("the tenant {tenant} has no such dead letters").into());
            }
            queue.wake([deliveries::KIND]);
            Ok(format!("{redriven}\n"))
        }
    }
}

/// They are bounded by number, and few where all is well.
async fn all_dead(queue: &impl WorkQueue, tenant: Option<&Slug>) -> Result<Vec<Listed>, Failed> {
    let mut page = Page {
        tenant: tenant.map(|tenant| tenant.as_str().to_owned()),
        limit: 1000,
        ..Page::default()
    };
    let mut all = Vec::new();
    loop {
        let letters = queue.dead_letters(&page).await?;
        let Some(last) = letters.last() else {
            return Ok(all);
        };
        page.after = last.id;
        all.extend(letters.into_iter().map(|letter| Listed {
            tenant_id: letter.scope.tenant.clone(),
            letter: letter.into(),
        }));
    }
}
