//! `leasehold locks`: who holds what, and taking it away.

use std::fmt::Write;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use clap::{Args, Subcommand};
use diesel::sql_types::Timestamptz;
use diesel::{QueryResult, QueryableByName};
use diesel_async::AsyncPgConnection;
use leasehold_domain::{FencingToken, HeldLock, HolderSession, LockId, LockMode, LockName};
use leasehold_http::Timestamp;
use leasehold_storage::advisory::AdvisoryKey;
use leasehold_storage::{Database, HeldView, LockBackend, Prepared};
use serde::Serialize;
use uuid::Uuid;

use crate::cli::postgres::Postgres;
use crate::cli::{Failed, on_one_line, owner, print, say};
use crate::config::{DatabaseConfig, LogConfig};
use crate::locks::model::{FIRST_PART, HolderView};
use crate::names::Slug;
use crate::state::workspaces_table;
use crate::telemetry;

/// How many holds are looked at, the oldest.
const MOST: u32 = 100_000;

#[derive(Args, Debug)]
pub(crate) struct LocksArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the locks of every kind that are held now, oldest first
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
        /// Do not ask the owner of a session lock: end its session of the server, with all other locks that it has
        #[arg(long)]
        terminate: bool,
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
        let db = postgres.connect().await?;
        let done = act(&db, &args.action).await;
        db.shutdown(Duration::from_secs(5)).await;
        print(&done?)
    })
}

async fn act(db: &Database, action: &Action) -> Result<String, Failed> {
    let (Action::List { which } | Action::Show { which, .. } | Action::Release { which, .. }) = action;
    let held = held(db, which.tenant.as_ref()).await?;
    match action {
        Action::List { .. } => {
            let items: Vec<Item> = held.into_iter().map(Item::from).collect();
            if which.json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&items)?));
            }
            table(db, &items).await
        }
        Action::Show { name, .. } => {
            let items: Vec<Item> = only(held, name)?.into_iter().map(Item::from).collect();
            shown(db, &items, which.json).await
        }
        Action::Release {
            name,
            reason,
            terminate,
            ..
        } => {
            let held = only(held, name)?;
            let Some(name) = held.iter().find_map(|lock| lock.name.as_ref()) else {
                return Err(ends_with_its_session(name, &held).into());
            };
            let ended = release(db, name, &held, reason, *terminate).await?;
            shown(db, &ended, which.json).await
        }
    }
}

/// Every lock that is held, of one tenant or of all.
async fn held(db: &Database, tenant: Option<&Slug>) -> Result<Vec<HeldView>, Failed> {
    let mut held = db.held_locks(&[&workspaces_table()?], MOST).await?;
    if u32::try_from(held.len()).is_ok_and(|found| found >= MOST) {
        say(&format!("these are the {MOST} oldest; there may be more"));
    }
    if let Some(tenant) = tenant {
        let of_tenant = |name: &LockName| name.parts().nth(1) == Some(tenant.as_str());
        held.retain(|lock| lock.name.as_ref().is_some_and(of_tenant));
    }
    Ok(held)
}

/// The holds of the lock that is meant, by what the list calls it or by what its tenant does: several may share it, and
/// locks of several kinds may have one name.
fn only(mut held: Vec<HeldView>, name: &str) -> Result<Vec<HeldView>, Failed> {
    held.retain(|lock| {
        called(lock) == name
            || lock
                .name
                .as_ref()
                .is_some_and(|found| is_of_a_tenant(found, name))
    });
    let mut names: Vec<String> = Vec::new();
    for found in held.iter().map(called) {
        if !names.contains(&found) {
            names.push(found);
        }
    }
    match names.as_slice() {
        [_] => Ok(held),
        [] => Err(format!("nobody holds {name}").into()),
        several => Err(format!(
            "{name} is the name of several: {}; give the whole name, or --tenant",
            several.join(", ")
        )
        .into()),
    }
}

/// What the list calls a lock. Of an advisory lock whose holder tells no name the server knows a number.
fn called(lock: &HeldView) -> String {
    match (&lock.name, lock.key) {
        (Some(name), _) => name.to_string(),
        (None, Some(key)) => format!("(key {})", number(key)),
        (None, None) => unknown(),
    }
}

fn number(key: AdvisoryKey) -> String {
    match key {
        AdvisoryKey::Big(key) => key.to_string(),
        AdvisoryKey::Pair(high, low) => format!("{high},{low}"),
    }
}

fn ends_with_its_session(called: &str, held: &[HeldView]) -> String {
    let sessions = held.iter().filter_map(|lock| lock.session.as_ref());
    let ends: Vec<String> = sessions
        .map(|session| format!("pg_terminate_backend({})", session.backend_pid))
        .collect();
    format!(
        "whoever holds {called} tells no name, and would not hear of it: end its session of the server, by {}",
        ends.join(" and ")
    )
}

/// What a tenant calls a lock of its own.
fn is_of_a_tenant(found: &LockName, name: &str) -> bool {
    let mut parts = found.parts();
    parts.next() == Some(FIRST_PART) && parts.nth(1) == Some(name) && parts.next().is_none()
}

/// Takes a name away from all who hold it, by whatever kind of lock. Answers what was ended.
async fn release(
    db: &Database,
    name: &LockName,
    held: &[HeldView],
    reason: &str,
    terminate: bool,
) -> Result<Vec<Item>, Failed> {
    let mut backends: Vec<LockBackend> = held.iter().map(|lock| lock.backend).collect();
    backends.sort_unstable();
    backends.dedup();
    let by = owner();
    let mut ended = Vec::new();
    for backend in backends {
        let locks: Vec<HeldLock> = match backend {
            LockBackend::Session if terminate => {
                let done = db.session_locks().terminate(name, &by, reason).await?;
                say(&format!(
                    "other locks of the same sessions that ended with it: {}",
                    done.other_locks
                ));
                done.ended
            }
            LockBackend::Session => db.session_locks().force_release(name, &by, reason).await?,
            LockBackend::Transaction => {
                let locks = db.transaction_locks();
                locks
                    .force_release(name, &by, reason)
                    .await?
                    .into_iter()
                    .collect()
            }
            LockBackend::Lease => {
                let locks = db.leases();
                locks
                    .force_release(name, &by, reason)
                    .await?
                    .into_iter()
                    .collect()
            }
            LockBackend::RowLease => {
                let locks = db.row_leases(workspaces_table()?);
                locks
                    .force_release(name, &by, reason)
                    .await?
                    .into_iter()
                    .collect()
            }
        };
        let waiters = held
            .iter()
            .find(|lock| lock.backend == backend)
            .map_or(0, |lock| lock.waiters);
        let items = locks.into_iter().map(|lock| Item::ended(lock, backend, waiters));
        ended.extend(items);
    }
    if ended.is_empty() {
        return Err(format!("nobody holds {name} any more").into());
    }
    Ok(ended)
}

/// A lock as the command prints it. What is not known is `null`.
#[derive(Serialize)]
struct Item {
    #[serde(skip)]
    called: String,
    name: Option<String>,
    /// The number that the server sees, or the pair of them, of an advisory lock.
    key: Option<String>,
    mode: LockMode,
    backend: &'static str,
    lock_id: Option<Uuid>,
    holder: Option<HolderView>,
    /// The session of the server that has it, of an advisory lock.
    session: Option<SessionView>,
    acquired_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    fencing_token: Option<i64>,
    waiters: usize,
}

#[derive(Serialize)]
struct SessionView {
    pid: i32,
    application_name: Option<String>,
    client_address: Option<String>,
}

impl From<HolderSession> for SessionView {
    fn from(session: HolderSession) -> Self {
        Self {
            pid: session.backend_pid,
            application_name: session.application_name,
            client_address: session.client_address,
        }
    }
}

impl From<HeldView> for Item {
    fn from(held: HeldView) -> Self {
        Self {
            called: called(&held),
            name: held.name.map(|name| name.to_string()),
            key: held.key.map(number),
            mode: held.mode,
            backend: held.backend.as_str(),
            lock_id: held.lock_id.map(LockId::as_uuid),
            holder: held.holder.as_ref().map(HolderView::from),
            session: held.session.map(SessionView::from),
            acquired_at: held.since.map(Timestamp::from),
            expires_at: held.expires_at.map(Timestamp::from),
            fencing_token: held.fencing_token.map(FencingToken::get),
            waiters: held.waiters,
        }
    }
}

impl Item {
    /// A hold that was taken away, and how many waited for it.
    fn ended(lock: HeldLock, backend: LockBackend, waiters: usize) -> Self {
        Self::from(HeldView {
            backend,
            name: Some(lock.name),
            key: None,
            mode: lock.mode,
            lock_id: lock.lock_id,
            holder: lock.holder,
            since: lock.acquired_at,
            expires_at: lock.expires_at,
            fencing_token: lock.fencing_token,
            session: lock.session,
            waiters,
        })
    }

    fn columns(&self, now: DateTime<Utc>) -> [String; COLUMNS.len()] {
        let holder = match (&self.holder, &self.session) {
            (Some(holder), _) => format!("{} ({})", holder.owner, holder.operation),
            (None, Some(session)) => {
                let program = session.application_name.as_deref().unwrap_or_default();
                format!("(session {} {program})", session.pid)
            }
            (None, None) => unknown(),
        };
        let age = self.acquired_at.map(|since| length(now - since.0));
        let expiry = self.expires_at.map(|at| format!("in {}", length(at.0 - now)));
        [
            on_one_line(&self.called),
            self.mode.to_string(),
            self.backend.to_owned(),
            on_one_line(&holder),
            age.unwrap_or_else(unknown),
            expiry.unwrap_or_else(|| "with its session".to_owned()),
            self.waiters.to_string(),
        ]
    }
}

fn unknown() -> String {
    "(not known)".to_owned()
}

/// A length of time in its two largest units.
fn length(time: TimeDelta) -> String {
    let seconds = time.num_seconds().max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

async fn shown(db: &Database, items: &[Item], json: bool) -> Result<String, Failed> {
    match items {
        [item] if json => Ok(format!("{}\n", serde_json::to_string_pretty(item)?)),
        several if json => Ok(format!("{}\n", serde_json::to_string_pretty(several)?)),
        items => table(db, items).await,
    }
}

const COLUMNS: [&str; 7] = ["name", "mode", "backend", "holder", "age", "expiry", "waiters"];

#[derive(QueryableByName)]
struct Clock {
    #[diesel(sql_type = Timestamptz)]
    now: DateTime<Utc>,
}

/// A line for each, under a line of headings. The clock of ages is the database's.
async fn table(db: &Database, items: &[Item]) -> Result<String, Failed> {
    let clock = async |conn: &mut AsyncPgConnection| -> QueryResult<Clock> {
        let ask = diesel::sql_query("SELECT clock_timestamp() AS now");
        Prepared(ask).one(conn).await
    };
    let Clock { now } = db.read(clock).await?;
    let mut lines = vec![COLUMNS.map(str::to_owned)];
    lines.extend(items.iter().map(|item| item.columns(now)));
    let mut widths = [0; COLUMNS.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        writeln!(text, "{}", cells.join("  ").trim_end())?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (seconds, text) in [
            (-5, "0s"),
            (59, "59s"),
            (60, "1m 0s"),
            (3_599, "59m 59s"),
            (3_600, "1h 0m"),
            (86_399, "23h 59m"),
            (90_000, "1d 1h"),
        ] {
            assert_eq!(length(TimeDelta::seconds(seconds)), text);
        }
    }

    #[test]
    fn what_a_tenant_calls_a_lock() {
        let lock = LockName::new(["lock", "acme", "deploy"]).unwrap();
        let longer = LockName::new(["lock", "acme", "deploy", "more"]).unwrap();
        assert!(is_of_a_tenant(&lock, "deploy"));
        assert!(!is_of_a_tenant(&lock, "acme") && !is_of_a_tenant(&longer, "deploy"));
    }
}
