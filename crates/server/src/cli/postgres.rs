//! Which database a command works on: the configured one, or the private one of the project.

use std::path::{Path, PathBuf};

use diesel::QueryableByName;
use diesel::sql_types::{Bool, Text};
use diesel_async::AsyncPgConnection;
use leasehold_embedded::Cluster;
use leasehold_storage::migrate::Status;
use leasehold_storage::{ConnectOptions, Database, Prepared};
use tokio::runtime::{Builder, Runtime};

use crate::cli::Failed;
use crate::config::DatabaseConfig;
use crate::schema;
use crate::state::instance;

/// Holds the private data of a project, beside its `.git`.
const FOLDER: &str = ".leasehold";

/// A database to work on. A private server runs as long as this lives.
#[derive(Debug)]
pub(crate) struct Postgres {
    // Dropped after the runtime, so that nothing that uses the server outlives it.
    pub(crate) runtime: Runtime,
    pub(crate) options: ConnectOptions,
    private: Option<Cluster>,
}

impl Postgres {
    /// Finds the configured database, or starts the private one. Blocks until it is there.
    pub(crate) fn find(config: &DatabaseConfig) -> Result<Self, Failed> {
        let private = match &config.database_url {
            Some(_) => None,
            None => {
                let folder = project_folder(&std::env::current_dir()?).join(FOLDER);
                let cluster = Cluster::persistent(folder).start()?;
                tracing::info!(
                    folder = %cluster.home().display(), attached = cluster.is_attached(), "a private Postgres runs"
                );
                Some(cluster)
            }
        };
        let url = match (&config.database_url, &private) {
            (Some(url), _) => url.clone(),
            (None, Some(cluster)) => cluster.url("postgres"),
            (None, None) => String::new(),
        };
        // Postgres keeps 63 bytes of it.
        let mut name = format!("leasehold {}", instance());
        name.truncate(name.floor_char_boundary(63));
        let options = config.options(&url)?.with_application_name(&name);
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        Ok(Self {
            runtime,
            options,
            private,
        })
    }

    /// Whether it is the project's own.
    pub(crate) fn is_private(&self) -> bool {
        self.private.is_some()
    }

    /// Connects for a command that does little and ends, to a schema that this program can use. That of the private
    /// server is brought up to date.
    pub(crate) async fn connect(&self) -> Result<Database, Failed> {
        let migrations = schema::migrations();
        if self.is_private() {
            migrations.run(&self.options).await?;
            return connect_briefly(&self.options).await;
        }
        let (db, status) = tokio::join!(connect_briefly(&self.options), migrations.status(&self.options));
        // Who may not read what was migrated is told so by what he asks for.
        match status.ok().as_ref().and_then(not_current) {
            Some(why) => Err(why.into()),
            None => db,
        }
    }
}

/// Connects for a command that does little and ends.
pub(crate) async fn connect_briefly(options: &ConnectOptions) -> Result<Database, Failed> {
    connect(options, 2).await
}

/// Connects to a database in which the names of our tables lead to our tables.
pub(crate) async fn connect(options: &ConnectOptions, pool_size: u32) -> Result<Database, Failed> {
    let db = Database::connect(options.clone(), pool_size).await?;
    let find = async |conn: &mut AsyncPgConnection| Prepared(diesel::sql_query(FIND)).one(conn).await;
    let Found { is_ours, search_path } = db.read(find).await?;
    if is_ours {
        return Ok(db);
    }
    Err(format!(
        "names without a schema do not lead to the tables of the service, which are in the schema public: the search_path \
         is {search_path:?}; ALTER ROLE … IN DATABASE … SET search_path = public changes it"
    )
    .into())
}

/// Statements name the tables without their schema.
const FIND: &str = "\
SELECT to_regclass('workspaces') IS NOT DISTINCT FROM to_regclass('public.workspaces') AS is_ours,
       current_setting('search_path') AS search_path";

#[derive(QueryableByName)]
struct Found {
    #[diesel(sql_type = Bool)]
    is_ours: bool,
    #[diesel(sql_type = Text)]
    search_path: String,
}

/// What to say of a schema that lacks something.
pub(crate) fn not_current(status: &Status) -> Option<String> {
    let missing = status.pending.join(", ");
    (!missing.is_empty()).then(|| {
        format!("the schema of the database is not current (missing: {missing}): run `leasehold migrate`")
    })
}

/// The folder with `.git` that the current one is in, or the current one where there is none.
fn project_folder(current: &Path) -> PathBuf {
    let project = current.ancestors().find(|folder| folder.join(".git").exists());
    project.unwrap_or(current).to_path_buf()
}
