//! `leasehold keys`: the first key of a deployment comes from here.

use std::fmt::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use diesel::result::{DatabaseErrorKind, Error};
use leasehold_domain::Holder;
use leasehold_storage::{Database, TransactionError, WorkError};
use uuid::Uuid;

use crate::auth::{self, NewCredential, Role};
use crate::cli::postgres::Postgres;
use crate::cli::{Failed, print};
use crate::config::{DatabaseConfig, LogConfig};
use crate::names::Slug;
use crate::telemetry;

#[derive(Args, Debug)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key and print it, alone, on standard output: it is never shown again
    Create {
        /// The name under which locks are held and versions are made
        #[arg(long, value_parser = subject)]
        subject: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: Role,
        /// The only tenant it may see; without, all of them
        #[arg(long, value_parser = tenant)]
        tenant: Option<Slug>,
        /// How long it is good for, such as `90days` or `12h`; without, for ever
        #[arg(long, value_parser = expiry)]
        expires: Option<Duration>,
        #[command(flatten)]
        common: Common,
    },
    /// List the keys, without what is secret about them
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// End a key at once
    Revoke {
        /// Its id, from the list
        id: Uuid,
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

fn subject(text: &str) -> Result<String, String> {
    let allowed = (1..=Holder::MAX_FIELD_BYTES).contains(&text.len()) && !text.contains(char::is_control);
    allowed
        .then(|| text.to_owned())
        .ok_or_else(|| "must have 1 to 256 bytes and no control characters".to_owned())
}

fn tenant(text: &str) -> Result<Slug, String> {
    Slug::new(text).map_err(str::to_owned)
}

fn expiry(text: &str) -> Result<Duration, String> {
    let longest = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    let read = humantime::parse_duration(text)
        .ok()
        .filter(|expires| !expires.is_zero() && *expires <= longest);
    read.ok_or_else(|| "must be a duration of at most 100 years, such as 90days or 12h".to_owned())
}

pub(crate) fn run(args: &KeysArgs) -> Result<(), Failed> {
    let (Action::Create { common, .. } | Action::List { common, .. } | Action::Revoke { common, .. }) =
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
    match action {
        Action::Create {
            subject,
            role,
            tenant,
            expires,
            ..
        } => {
            let new = NewCredential {
                subject: subject.clone(),
                role: *role,
                tenant: tenant.as_ref().map(|tenant| tenant.as_str().to_owned()),
                expires_in_seconds: expires.map(|expires| expires.as_secs_f64()),
                only_on_loopback: false,
            };
            let key = auth::new_key();
            match db
                .transaction(async |conn| auth::store(conn, &key, &new).await)
                .await
            {
                Ok(()) => Ok(format!("{key}\n")),
                Err(TransactionError::Work(Error::DatabaseError(
                    DatabaseErrorKind::ForeignKeyViolation,
                    _,
                ))) => Err(format!("there is no tenant {}", new.tenant.unwrap_or_default()).into()),
                Err(error) => Err(error.into()),
            }
        }
        Action::List { json, .. } => {
            let keys = db.read(async |conn| auth::list(conn).await).await?;
            if *json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&keys)?));
            }
            let mut text = String::new();
            for key in keys {
                let tenant = key.tenant_id.as_deref().unwrap_or("(all tenants)");
                let ends = match (key.expires_at, key.expired) {
                    (None, _) => "never ends".to_owned(),
                    (Some(at), false) => format!("ends {}", leasehold_http::Timestamp(at)),
                    (Some(at), true) => format!("ended {}", leasehold_http::Timestamp(at)),
                };
                writeln!(
                    text,
                    "{}  {}  {}  {tenant}  {ends}",
                    key.id, key.role, key.subject
                )?;
            }
            Ok(text)
        }
        Action::Revoke { id, .. } => match db.read(async |conn| auth::revoke(conn, *id).await).await {
            Ok(true) => Ok(String::new()),
            Ok(false) => Err(format!("there is no key with the id {id}").into()),
            Err(WorkError::Work(error)) => Err(error.into()),
            Err(error @ WorkError::Unavailable(_)) => Err(error.into()),
        },
    }
}
