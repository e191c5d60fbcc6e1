//! `leasehold locks`: who holds what, and taking it away.

use std::fmt::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use leasehold_domain::HeldLock;
use leasehold_storage::Database;

use crate::cli::postgres::{Postgres, connect_briefly};
use crate::cli::{Failed, owner, print};
use crate::config::{DatabaseConfig, LogConfig};
use crate::locks::model::{FIRST_PART, LockItem};
use crate::locks::store;
use crate::names::Slug;
use crate::state::workspaces_table;
use crate::telemetry;

/// How many leases are read at once.
const PAGE: i64 = 1000;

#[derive(Args, Debug)]
pub(crate) struct LocksArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the locks that are held now, oldest first
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show one lock
    Show {
        /// Its name, as `run` takes it or as the list has it
        name: String,
        #[command(flatten)]
        which: Which,
    },
    /// Take a lock away from its holder
    Release {
        /// Its name, as `run` takes it or as the list has it
        name: String,
        /// Why, for the record: 1 to 256 characters
        #[arg(long, value_parser = reason)]
        reason: String,
        #[command(flatten)]
        which: Which,
    },
}

#[derive(Args, Debug)]
struct Which {
    /// Only the locks of this tenant
    #[arg(long, value_parser = slug)]
    tenant: Option<Slug>,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    database: DatabaseConfig,
    #[command(flatten)]
    log: LogConfig,
}

fn slug(text: &str) -> Result<Slug, String> {
    Slug::new(text).map_err(str::to_owned)
}

fn reason(text: &str) -> Result<String, String> {
    let allowed = (1..=256).contains(&text.chars().count());
    allowed
        .then(|| text.to_owned())
        .ok_or_else(|| "must have 1 to 256 characters".to_owned())
}

pub(crate) fn run(args: &LocksArgs) -> Result<(), Failed> {
    let (Action::List { which } | Action::Show { which, .. } | Action::Release { which, .. }) = &args.action;
    telemetry::start(&which.log);
    let postgres = Postgres::find(&which.database)?;
    postgres.runtime.block_on(async {
        if postgres.is_private() {
            crate::schema::migrations().run(&postgres.options).await?;
        }
        let db = connect_briefly(&postgres.options).await?;
        let done = act(&db, &args.action).await;
        db.shutdown(Duration::from_secs(5)).await;
        print(&done?)
    })
}

async fn act(db: &Database, action: &Action) -> Result<String, Failed> {
    match action {
        Action::List { which } => {
            let held = held(db, which.tenant.as_ref()).await?;
            let items: Vec<LockItem> = held.iter().map(item).collect();
            if which.json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&items)?));
            }
            items.iter().map(line).collect()
        }
        Action::Show { name, which } => {
            let held = held(db, which.tenant.as_ref()).await?;
            shown(&item(only(&held, name)?), which.json)
        }
        Action::Release { name, reason, which } => {
            let held = held(db, which.tenant.as_ref()).await?;
            let name = &only(&held, name)?.name;
            let locks = match name.parts().next() {
                Some("workspace") => db.row_leases(workspaces_table()?),
                _ => db.leases(),
            };
            let ended = locks.force_release(name, &owner(), reason).await?;
            let ended = ended.ok_or_else(|| format!("nobody holds {name} any more"))?;
            shown(&item(&ended), which.json)
        }
    }
}

/// Every lock that is held, of one tenant or of all.
async fn held(db: &Database, tenant: Option<&Slug>) -> Result<Vec<HeldLock>, Failed> {
    let mut held = db.read(async |conn| store::held_workspaces(conn).await).await?;
    let mut leases: Vec<HeldLock> = Vec::new();
    loop {
        let last = leases.last();
        let after = last.and_then(|last| Some((last.acquired_at?, &last.name)));
        let page = db.held_leases(&[], after, PAGE).await?;
        if page.is_empty() {
            break;
        }
        leases.extend(page);
    }
    held.extend(leases);
    if let Some(tenant) = tenant {
        held.retain(|lock| lock.name.parts().nth(1) == Some(tenant.as_str()));
    }
    held.sort_by_key(|lock| lock.acquired_at);
    Ok(held)
}

/// The lock that is meant by a name: by the whole of it, or by what its tenant calls it.
fn only<'a>(held: &'a [HeldLock], name: &str) -> Result<&'a HeldLock, Failed> {
    let meant = |lock: &&HeldLock| {
        let mut parts = lock.name.parts();
        let of_a_tenant =
            parts.next() == Some(FIRST_PART) && parts.nth(1) == Some(name) && parts.next().is_none();
        of_a_tenant || lock.name.to_string() == name
    };
    let found: Vec<&HeldLock> = held.iter().filter(meant).collect();
    match found.as_slice() {
        [lock] => Ok(lock),
        [] => Err(format!("nobody holds {name}").into()),
        several => {
            let names: Vec<String> = several.iter().map(|lock| lock.name.to_string()).collect();
            Err(format!(
                "{name} is the name of several: {}; give the whole name, or --tenant",
                names.join(", ")
            )
            .into())
        }
    }
}

fn item(held: &HeldLock) -> LockItem {
    LockItem::of(held.name.to_string(), held, None)
}

fn shown(item: &LockItem, json: bool) -> Result<String, Failed> {
    if json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(item)?));
    }
    line(item)
}

fn line(item: &LockItem) -> Result<String, Failed> {
    let holder = item.holder.as_ref();
    let unknown = || "(not known)".to_owned();
    let at = |time: Option<leasehold_http::Timestamp>| time.map_or_else(unknown, |time| time.to_string());
    let mut text = String::new();
    writeln!(
        text,
        "{}  {}  {}  {}  since {}  until {}",
        item.name,
        item.mode,
        holder.map_or_else(unknown, |holder| holder.owner.clone()),
        holder.map_or_else(unknown, |holder| holder.operation.clone()),
        at(item.acquired_at),
        at(item.expires_at),
    )?;
    Ok(text)
}
