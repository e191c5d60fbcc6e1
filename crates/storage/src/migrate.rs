//! [`Migrations`]: brings the tables of a database to what this version needs, and tells what is missing.
//!
//! Each step is one transaction that takes one lock, looks what is already there, and records what it did. So any
//! number of processes may start at once, each step happens once, and a step that fails leaves nothing behind.
//! The lock is of transaction scope: it ends with the transaction also behind a pooler, where a session's lock
//! may be left on a connection that somebody else gets next.
//!
//! What was done stands in `leasehold.migrations`, for each component by itself: neither a service's own
//! migrations nor those of Diesel's command know anything of ours.

use std::collections::BTreeMap;
use std::fmt::Write;

use tokio_postgres::Client;

use crate::connect::{ConnectOptions, simple_rows};

/// Where `embed_migrations!` in other crates finds its types.
#[doc(inline)]
pub use crate::embed_migrations;

/// The first 8 bytes of SHA-256 over `leasehold/v1|9:leasehold|7:migrate`, as for every name.
const LOCK: i64 = -3_636_003_321_033_159_746;

/// Waits for the others as long as it takes, whatever the role's own limits are. The lock stands in a statement
/// of its own: at READ COMMITTED only a later statement sees what its former holder did.
const BEGIN: &str =
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0";

const RECORDS: &str = "\
CREATE SCHEMA IF NOT EXISTS leasehold;
CREATE TABLE leasehold.migrations (
    component  TEXT NOT NULL,
    version    TEXT NOT NULL,
    name       TEXT NOT NULL,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (component, version)
);
";

/// The tables of this crate, in the schema `leasehold`.
pub(crate) const STORAGE: MigrationSet = embed_migrations!(
    "storage",
    schema: "leasehold",
    works_since: "2026-11-21-000001",
    "../../../migrations/storage",
    [
        "2026-11-21-000001_leases",
        "2026-11-21-000002_tenants",
        "2026-11-21-000003_queue",
        "2026-11-21-000004_jobs",
        "2026-11-21-000005_queue_functions",
        "2026-11-21-000006_client_leases",
        "2026-11-21-000007_waits",
        "2026-11-21-000008_repairs",
        "2026-11-21-000009_leases_prefix"
    ]
);

/// One step: a folder with an `up.sql`, as Diesel's command makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Migration {
    /// The name of the folder: `<version>_<what it does>`.
    pub name: &'static str,
    /// What `up.sql` holds. It runs inside a transaction.
    pub sql: &'static str,
}

impl Migration {
    fn version(&self) -> &'static str {
        self.name
            .split_once('_')
            .map_or(self.name, |(version, _)| version)
    }
}

/// The steps of one component, in their order; made by [`embed_migrations!`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationSet {
    /// Whose they are; each component has its own records.
    pub component: &'static str,
    /// Where names without a schema lead to, whatever the `search_path` of the role is: to a schema that is named like
    /// the role, else.
    pub schema: &'static str,
    /// The oldest version of the schema that a program may have been built for and still work after all these
    /// steps. It is what lets an old and a new version of a service run side by side during a deployment: raise
    /// it to the version of a step that takes something away.
    pub works_since: &'static str,
    /// The steps, oldest first.
    pub steps: &'static [Migration],
}

/// Makes a [`MigrationSet`] of folders that hold an `up.sql`.
///
/// The folder of the folders is given relative to the source file.
///
/// ```ignore
/// const SERVER: MigrationSet = leasehold_storage::embed_migrations!(
///     "server",
///     schema: "public",
///     works_since: "2026-11-21-000001",
///     "../../../migrations/server",
///     ["2026-11-21-000001_workspaces", "2026-12-02-000001_contexts"]
/// );
/// ```
#[macro_export]
macro_rules! embed_migrations {
    (
        $component:literal, schema: $schema:literal, works_since: $since:literal, $folder:literal,
        [$($name:literal),+ $(,)?]
    ) => {
        $crate::migrate::MigrationSet {
            component: $component,
            schema: $schema,
            works_since: $since,
            steps: &[$($crate::migrate::Migration {
                name: $name,
                sql: include_str!(concat!($folder, "/", $name, "/up.sql")),
            }),+],
        }
    };
}

/// What a migration could not do, or must not.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The database does not answer. Trying again later may help.
    #[error("cannot connect to the database to look at its schema")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A statement about the schema failed, most likely for want of privileges.
    #[error("cannot read the records of the schema in leasehold.migrations")]
    Records(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A step failed and was undone; those before it stay.
    #[error("the migration {name} failed and was undone")]
    Step {
        /// `<component>/<name>`.
        name: String,
        /// What the server said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A newer version of the program has changed the schema in a way that this one cannot work with.
    #[error(transparent)]
    TooNew(#[from] TooNew),
}

/// The schema is newer than this program, and programs as old as this one no longer work with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {component} schema is at {found} and needs a program built for {needed} or later, but this one is built \
     for {built_for}: run a newer version"
)]
pub struct TooNew {
    /// Whose schema.
    pub component: String,
    /// The newest version that the database has.
    pub found: String,
    /// The oldest that a program may be built for.
    pub needed: String,
    /// The newest that this program knows.
    pub built_for: String,
}

/// How a database compares to what this program needs. All names are `<component>/<name>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// What is there.
    pub applied: Vec<String>,
    /// What is missing, in the order in which it would be made.
    pub pending: Vec<String>,
    /// What a newer program made; this one works with it.
    pub newer: Vec<String>,
}

/// What a program needs of its database: the tables of this crate, and those of others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Migrations {
    sets: Vec<MigrationSet>,
}

impl Migrations {
    /// The tables of this crate.
    #[must_use]
    pub fn storage() -> Self {
        Self { sets: vec![STORAGE] }
    }

    /// Then those of another component, whose name none before has.
    #[must_use]
    pub fn and(mut self, set: MigrationSet) -> Self {
        self.sets.push(set);
        self
    }

    /// Makes what is missing and answers the names of what this call made.
    ///
    /// # Errors
    /// Each [`MigrateError`].
    ///
    /// # Cancel safety
    /// The step under way is made whole or not at all; call it again for the rest.
    pub async fn run(&self, options: &ConnectOptions) -> Result<Vec<String>, MigrateError> {
        let client = connect(options).await?;
        let lock = format!("SELECT pg_advisory_xact_lock({LOCK})");
        let mut made = Vec::new();
        loop {
            client.batch_execute(BEGIN).await.map_err(records)?;
            client.batch_execute(&lock).await.map_err(records)?;
            let state = State::read(&client).await?;
            state.accept(&self.sets)?;
            let Some((set, step)) = self.pending(&state).next() else {
                client.batch_execute("COMMIT").await.map_err(records)?;
                return Ok(made);
            };
            let name = full_name(set.component, step.name);
            let failed = |source: tokio_postgres::Error| MigrateError::Step {
                name: name.clone(),
                source: source.into(),
            };
            let done = client.batch_execute(&script(set, step, !state.has_records)).await;
            done.map_err(failed)?;
            client.batch_execute("COMMIT").await.map_err(failed)?;
            tracing::info!(migration = name, "migrated");
            made.push(name);
        }
    }

    /// Compares the database to what is needed. Waits for no lock.
    ///
    /// # Errors
    /// Each [`MigrateError`] but `Step`.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn status(&self, options: &ConnectOptions) -> Result<Status, MigrateError> {
        let state = State::read(&connect(options).await?).await?;
        state.accept(&self.sets)?;
        let mut status = Status::default();
        for set in &self.sets {
            let known = |version: &str| set.steps.iter().any(|step| step.version() == version);
            for (version, name) in state.versions(set.component) {
                let names = if known(version) {
                    &mut status.applied
                } else {
                    &mut status.newer
                };
                names.push(full_name(set.component, name));
            }
        }
        status.pending = self
            .pending(&state)
            .map(|(set, step)| full_name(set.component, step.name))
            .collect();
        Ok(status)
    }

    /// The SQL that [`Migrations::run`] would run now, each step in a transaction of its own, to be read or to be
    /// run by somebody with more rights. Empty when nothing is missing.
    ///
    /// # Errors
    /// As [`Migrations::status`].
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn pending_sql(&self, options: &ConnectOptions) -> Result<String, MigrateError> {
        let state = State::read(&connect(options).await?).await?;
        state.accept(&self.sets)?;
        let mut sql = String::new();
        for (index, (set, step)) in self.pending(&state).enumerate() {
            let script = script(set, step, index == 0 && !state.has_records);
            let name = full_name(set.component, step.name);
            // Writing to a String does not fail.
            _ = write!(
                sql,
                "-- {name}\nBEGIN;\nSELECT pg_advisory_xact_lock({LOCK});\n{script}COMMIT;\n\n"
            );
        }
        Ok(sql)
    }

    fn pending<'a>(&'a self, state: &'a State) -> impl Iterator<Item = (&'a MigrationSet, &'a Migration)> {
        self.sets
            .iter()
            .flat_map(|set| set.steps.iter().map(move |step| (set, step)))
            .filter(|(set, step)| !state.has(set.component, step.version()))
    }
}

fn full_name(component: &str, name: &str) -> String {
    format!("{component}/{name}")
}

/// A step with its records, without the transaction around it.
fn script(set: &MigrationSet, step: &Migration, first: bool) -> String {
    let records = if first { RECORDS } else { "" };
    let sql = step.sql.trim_end();
    let end = if sql.ends_with(';') { "" } else { "\n;" };
    let [component, version, name] = [set.component, step.version(), step.name].map(literal);
    let [setting, since] = [&works_since(set.component), set.works_since].map(literal);
    let schema = literal(set.schema);
    format!(
        "SET LOCAL search_path = {schema};\n\
         {records}{sql}{end}\n\
         INSERT INTO leasehold.migrations (component, version, name) VALUES ({component}, {version}, {name});\n\
         INSERT INTO leasehold.settings AS s (name, value) VALUES ({setting}, {since})\n    \
         ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE s.value < excluded.value COLLATE \"C\";\n"
    )
}

/// The name of the row of `leasehold.settings`.
fn works_since(component: &str) -> String {
    format!("schema.{component}.works_since")
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

async fn connect(options: &ConnectOptions) -> Result<Client, MigrateError> {
    options
        .open_spawned()
        .await
        .map_err(|error| MigrateError::Connect(error.into()))
}

fn records(error: tokio_postgres::Error) -> MigrateError {
    MigrateError::Records(error.into())
}

/// What the database says of itself.
#[derive(Debug, Default)]
pub(crate) struct State {
    has_records: bool,
    /// The name by component and version.
    applied: BTreeMap<(String, String), String>,
    settings: BTreeMap<String, String>,
}

impl State {
    /// In the simple protocol throughout, which every pooler passes on.
    pub(crate) async fn read(client: &Client) -> Result<Self, MigrateError> {
        let mut state = Self::default();
        // Not `to_regclass`, which fails for want of a right on the schema.
        let tables = "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = 'leasehold' AND c.relname IN ('migrations', 'settings')";
        let tables = simple_rows(client, tables).await.map_err(records)?;
        let has = |name: &str| {
            tables
                .iter()
                .any(|row| row.first().is_some_and(|table| table == name))
        };
        if has("migrations") {
            state.has_records = true;
            let applied = "SELECT component, version, name FROM leasehold.migrations";
            for row in simple_rows(client, applied).await.map_err(records)? {
                if let Ok([component, version, name]) = <[String; 3]>::try_from(row) {
                    state.applied.insert((component, version), name);
                }
            }
        }
        if has("settings") {
            let settings = "SELECT name, value FROM leasehold.settings WHERE name LIKE 'schema.%'";
            for row in simple_rows(client, settings).await.map_err(records)? {
                if let Ok([name, value]) = <[String; 2]>::try_from(row) {
                    state.settings.insert(name, value);
                }
            }
        }
        Ok(state)
    }

    fn has(&self, component: &str, version: &str) -> bool {
        self.versions(component).any(|(applied, _)| applied == version)
    }

    /// Version and name, oldest first.
    fn versions<'a>(&'a self, component: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.applied
            .iter()
            .filter(move |((of, _), _)| of == component)
            .map(|((_, version), name)| (version.as_str(), name.as_str()))
    }

    /// Whether a program that knows these steps works with this database, once what is missing is made.
    pub(crate) fn accept(&self, sets: &[MigrationSet]) -> Result<(), TooNew> {
        for set in sets {
            let built_for = set.steps.last().map_or("", Migration::version);
            let Some((found, _)) = self
                .versions(set.component)
                .last()
                .filter(|(found, _)| *found > built_for)
            else {
                continue;
            };
            // Every step writes it; without, somebody else made the tables.
            let needed = self
                .settings
                .get(&works_since(set.component))
                .map_or(found, String::as_str);
            if needed > built_for {
                return Err(TooNew {
                    component: set.component.to_owned(),
                    found: found.to_owned(),
                    needed: needed.to_owned(),
                    built_for: built_for.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The names of the steps of a set that are missing.
    pub(crate) fn missing(&self, set: &MigrationSet) -> Vec<&'static str> {
        let missing = set
            .steps
            .iter()
            .filter(|step| !self.has(set.component, step.version()));
        missing.map(|step| step.name).collect()
    }
}

#[cfg(test)]
mod tests {
    use leasehold_domain::LockName;

    use super::*;
    use crate::advisory::AdvisoryKey;

    #[test]
    fn the_lock_has_a_key_of_its_name() {
        let name = LockName::new(["leasehold", "migrate"]).unwrap();
        assert_eq!(AdvisoryKey::of(&name), AdvisoryKey::Big(LOCK));
    }

    #[test]
    fn every_folder_is_embedded_in_order() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations/storage");
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let folders = entries.filter(|entry| entry.path().is_dir());
        let mut names: Vec<_> = folders
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        let embedded: Vec<_> = STORAGE.steps.iter().map(|step| step.name).collect();
        assert_eq!(embedded, names);
        assert!(
            STORAGE
                .steps
                .iter()
                .any(|step| step.version() == STORAGE.works_since)
        );
    }

    #[test]
    fn steps_keep_to_the_transaction_they_are_given() {
        for step in STORAGE.steps {
            for word in ["BEGIN;", "COMMIT;", "ROLLBACK;", "CONCURRENTLY"] {
                assert!(!step.sql.to_uppercase().contains(word), "{word} in {}", step.name);
            }
        }
    }
}
