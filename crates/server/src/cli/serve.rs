//! `leasehold serve`: from nothing to a service, and back without losing anything.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use leasehold_domain::LockGuard;
use leasehold_storage::Database;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cli::postgres::{Postgres, connect, not_current};
use crate::cli::{Failed, in_one_line, print};
use crate::config::{ServeConfig, WorkspaceLockMode};
use crate::deliveries::Deliveries;
use crate::state::{AppState, Settings};
use crate::{app, demo, idempotency, metrics, mode, schema, telemetry};

/// How often unused rows of lock names are looked for.
const RETENTION_PERIOD: Duration = Duration::from_secs(60 * 60);
/// How long the lock ids that clients have chosen are known after the end of their locks, so that none is granted twice.
const LOCK_IDS_KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the background work of the locks may take to end, after the requests have.
const SHUTDOWN: Duration = Duration::from_secs(5);

pub(crate) fn run(config: &ServeConfig) -> Result<(), Failed> {
    telemetry::start(&config.log);
    metrics::start();
    allow_open_files();
    // The private server starts before the runtime and ends after it.
    let postgres = Postgres::find(&config.database)?;
    postgres.runtime.block_on(serve(config, &postgres))
}

/// Each client is one, also who waits for a lock. Many a system lets a program have 1024 unless it asks for more.
fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, ?limit.current, "no more files can be open at once");
    }
}

async fn serve(config: &ServeConfig, postgres: &Postgres) -> Result<(), Failed> {
    let stop = Stop::on_signals()?;
    let listener = TcpListener::bind(config.listen_addr).await.map_err(|error| {
        format!(
            "LISTEN_ADDR is {}, which cannot be listened on: {error}",
            config.listen_addr
        )
    })?;
    let address = listener.local_addr()?;

    prepare_schema(config, postgres).await?;
    let db = connect(&postgres.options, u32::try_from(config.database_pool_size)?).await?;
    let served = serve_on(config, postgres, &db, listener, address, &stop).await;
    db.shutdown(SHUTDOWN).await;
    served
}

async fn prepare_schema(config: &ServeConfig, postgres: &Postgres) -> Result<(), Failed> {
    let migrations = schema::migrations();
    if config.migrate || postgres.is_private() {
        migrations.run(&postgres.options).await?;
        return Ok(());
    }
    let status = migrations.status(&postgres.options).await?;
    if let Some(why) = not_current(&status) {
        return Err(format!("{why}, or pass --migrate").into());
    }
    if !status.newer.is_empty() {
        tracing::info!(newer = ?status.newer, "the schema is newer than this program, which works with it");
    }
    Ok(())
}

async fn serve_on(
    config: &ServeConfig,
    postgres: &Postgres,
    db: &Database,
    listener: TcpListener,
    address: SocketAddr,
    stop: &Arc<Stop>,
) -> Result<(), Failed> {
    let settings = Settings::new(config, address);
    let alive = mode::enter(db, &settings.instance).await?;
    mode::agree(db, settings.lock_mode).await?;
    let state = AppState::new(db.clone(), settings)?;

    let mut tasks = vec![
        tokio::spawn(remove_unused_leases(db.clone(), config.lease_retention())),
        tokio::spawn(idempotency::prune(db.clone())),
        tokio::spawn(metrics::keep_up()),
    ];
    if let Some(alive) = alive {
        let mode = state.settings().lock_mode;
        tasks.push(tokio::spawn(stay_alive(
            db.clone(),
            state.settings().instance.clone(),
            mode,
            alive,
            stop.clone(),
        )));
    }
    if postgres.is_private() {
        db.read(async |conn| demo::set_up(conn).await).await?;
        tasks.push(tokio::spawn(demo::hold(state.clone(), stop.watch())));
        print(&demo::welcome(
            &format!("http://{address}"),
            state.settings().on_loopback,
        ))?;
    } else {
        print(&format!("Leasehold listens on http://{address}\n"))?;
    }
    tracing::info!(%address, lock_mode = state.settings().lock_mode.as_str(), "serving");

    let deliveries = Deliveries::start(&state, config.webhook_allow_private).await?;
    let requests = async {
        let served = until_stopped(config, listener, state, stop).await;
        stop.reach(Stage::Draining);
        served
    };
    let (served, ()) = tokio::join!(
        requests,
        end_deliveries(deliveries, config.shutdown_grace(), stop)
    );
    end(tasks).await;
    served
}

/// Serves until it is time to stop, and then until what was begun has ended or the grace is over.
async fn until_stopped(
    config: &ServeConfig,
    listener: TcpListener,
    state: AppState,
    stop: &Arc<Stop>,
) -> Result<(), Failed> {
    let grace = config.shutdown_grace();
    let draining = {
        let (state, stop) = (state.clone(), stop.clone());
        async move {
            stop.reached(Stage::Draining).await;
            state.drain();
            tracing::info!(
                ?grace,
                "stopping: no new requests are taken, running ones may end"
            );
        }
    };
    let listener = listener.tap_io(|connection| {
        // A small answer must not wait for the client's acknowledgement of the one before.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps small packets back");
        }
    });
    let server = axum::serve(listener, app::router(state))
        .with_graceful_shutdown(draining)
        .into_future();
    let too_late = async {
        stop.reached(Stage::Draining).await;
        tokio::select! {
            () = tokio::time::sleep(grace) => {}
            () = stop.reached(Stage::Leaving) => {}
        }
    };
    tokio::select! {
        ended = server => ended?,
        () = too_late => tracing::warn!("requests that did not end in time are cut off"),
    }
    Ok(())
}

/// Lets deliveries end when it is time to stop, beside the requests and for as long as them.
async fn end_deliveries(deliveries: Deliveries, grace: Duration, stop: &Stop) {
    stop.reached(Stage::Draining).await;
    tokio::select! {
        () = deliveries.stop(grace) => {}
        () = stop.reached(Stage::Leaving) => {}
    }
}

/// Ends background tasks: those that listen for the stop by themselves, the others at once.
async fn end(tasks: Vec<JoinHandle<()>>) {
    for mut task in tasks {
        if tokio::time::timeout(Duration::from_millis(500), &mut task)
            .await
            .is_err()
        {
            task.abort();
        }
    }
}

/// Keeps telling the others that this instance lives. When the connection that told it has broken, the others may
/// have agreed on something else meanwhile: then this instance stops.
async fn stay_alive(
    db: Database,
    instance: String,
    mode: WorkspaceLockMode,
    mut alive: LockGuard,
    stop: Arc<Stop>,
) {
    let mut stopped = stop.watch();
    loop {
        tokio::select! {
            () = alive.lost() => {}
            _ = stopped.wait_for(|stage| *stage >= Stage::Draining) => return,
        }
        alive = loop {
            match mode::enter(&db, &instance).await {
                Ok(Some(guard)) => break guard,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(
                        error = in_one_line(&error),
                        "the others cannot be told that this instance lives; trying again"
                    );
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        if let Err(error @ mode::ModeError::Disagree { .. }) = mode::agree(&db, mode).await {
            tracing::error!(%error, "stopping");
            stop.reach(Stage::Draining);
            return;
        }
    }
}

async fn remove_unused_leases(db: Database, retention: Duration) {
    let mut period = tokio::time::interval(RETENTION_PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        match db.leases().remove_unused(retention).await {
            Ok(removed) => tracing::debug!(removed, "rows of unused lock names were removed"),
            Err(error) => tracing::warn!(
                error = in_one_line(&error),
                "rows of unused lock names could not be removed"
            ),
        }
        match db.client_leases().forget(LOCK_IDS_KEPT).await {
            Ok(forgotten) => tracing::debug!(forgotten, "lock ids of clients were forgotten"),
            Err(error) => tracing::warn!(
                error = in_one_line(&error),
                "lock ids of clients could not be forgotten"
            ),
        }
    }
}

/// How far the service has come on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// It serves.
    Serving,
    /// It takes no new requests.
    Draining,
    /// It waits for nothing any more.
    Leaving,
}

/// Whether it is time to stop.
#[derive(Debug)]
struct Stop(watch::Sender<Stage>);

impl Stop {
    /// Listens for SIGINT and SIGTERM from now on. The first asks to stop, the second not to wait.
    fn on_signals() -> std::io::Result<Arc<Self>> {
        let stop = Arc::new(Self(watch::Sender::new(Stage::Serving)));
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let signalled = stop.clone();
        tokio::spawn(async move {
            for stage in [Stage::Draining, Stage::Leaving] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                signalled.reach(stage);
            }
        });
        Ok(stop)
    }

    /// There is no way back.
    fn reach(&self, stage: Stage) {
        self.0.send_if_modified(|current| {
            let further = stage > *current;
            *current = stage.max(*current);
            further
        });
    }

    fn watch(&self) -> watch::Receiver<Stage> {
        self.0.subscribe()
    }

    async fn reached(&self, stage: Stage) {
        // The sender is `self`.
        drop(self.watch().wait_for(|current| *current >= stage).await);
    }
}
