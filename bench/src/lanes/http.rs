//! The reference service: a PUT under the workspace's lock beside the same PUT without one.
//!
//! Service and clients share this process and its cores, for all lanes alike. The route without a lock lives here
//! only: it authenticates, reads and checks as the real one does, stands in the same layers, and runs the same
//! statements in a transaction.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::extract::State;
use axum::routing::put;
use axum::{Json, Router};
use diesel::sql_types::{BigInt, Bool, Jsonb, Nullable, Text};
use diesel::{QueryResult, QueryableByName};
use diesel_async::RunQueryDsl;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use leasehold_http::{ApiJson, LockScopeLayer, Problem, RequestIdLayer, on_panic};
use leasehold_server::auth::{self, Access, NewCredential, Role, Write};
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::default_config::model::{Entry, NewValue};
use leasehold_server::waiters::Limits;
use leasehold_server::workspaces::model::KeyPath;
use leasehold_server::{AppState, Settings, app, schema};
use leasehold_storage::{Database, Prepared, TenantGate};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_postgres::types::{Json as SqlJson, Type};
use tokio_postgres::{Client as Connection, Statement};
use tower_http::catch_panic::CatchPanicLayer;
use uuid::Uuid;

use crate::capture::Captured;
use crate::database::BenchDatabase;
use crate::group::Group;
use crate::lanes::pairs::BEGIN;
use crate::measure::{Client, Clients, Lane, Sample};
use crate::{Bench, Error, Result, pgbench};

pub(super) const KEY: &str = "lh_0000000000000000000000000000000000000000000000000000000000000000";
pub(super) const TENANT: &str = "bench";
/// As a service has it that nobody tuned.
pub(super) const POOL: u32 = 8;

const ROWS: &str = "
    INSERT INTO tenants (id) VALUES ('bench');
    INSERT INTO workspaces (tenant_id, name)
    SELECT 'bench', kind || '-' || number
    FROM unnest('{lease,advisory,plain,raw,raw-plain,pgbench,captured}'::text[]) AS kind, generate_series(0, 63) AS number;";

/// Of the statement that makes a version: Postgres cannot tell them all from its text.
const RECORD_TYPES: [Type; 5] = [Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::BOOL];

/// A service that listens, until it is dropped.
pub(super) struct Service {
    pub(super) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Service {
    pub(super) async fn start(router: Router) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the service ended: {error}");
            }
        });
        Ok(Self { address, task })
    }
}

pub(super) fn state(db: Database, lock_mode: WorkspaceLockMode) -> Result<AppState> {
    let seconds = Duration::from_secs;
    let settings = Settings {
        lock_mode,
        lease: seconds(10),
        write_hold: seconds(60),
        batch_hold: seconds(1200),
        max_wait: seconds(30),
        purge_wait: seconds(5),
        waiters: Limits {
            total: 10_000,
            per_tenant: 1_000,
        },
        on_loopback: true,
        instance: "bench".into(),
    };
    Ok(AppState::new(db, settings)?)
}

/// What a PUT sends.
struct Sent {
    find: String,
    acquire: String,
    enter: String,
    put: String,
    record: String,
    fence: String,
}

impl Sent {
    async fn capture(database: &BenchDatabase) -> Result<Self> {
        let sent = Captured::of(database, async |db| {
            let service = Service::start(app::router(state(db.clone(), WorkspaceLockMode::Lease)?)).await?;
            Caller::put(service.address, "default-config", "captured-0")
                .await?
                .once()
                .await
        })
        .await?;
        Ok(Self {
            find: sent.find("FROM credentials c")?,
            acquire: sent.find("WITH seen")?,
            enter: sent.find("WITH ORDINALITY AS gates")?,
            put: sent.find("INSERT INTO default_config")?,
            record: sent.find("INSERT INTO versions")?,
            fence: sent.find("WITH mine")?,
        })
    }
}

#[derive(QueryableByName)]
struct Recorded {
    #[diesel(sql_type = BigInt)]
    version: i64,
}

/// The route without a lock, in the layers of the service.
fn unguarded(state: AppState, sent: Arc<Sent>) -> Router {
    let handler = move |State(state): State<AppState>,
                        access: Access<KeyPath, Write>,
                        ApiJson(new): ApiJson<NewValue>| {
        let sent = Arc::clone(&sent);
        async move {
            let path = &access.path;
            let (tenant, workspace) = (path.tenant.as_str(), path.workspace.as_str());
            let operation = format!("PUT {}", path.key.as_str());
            let done = state.db().transaction(async |conn| -> QueryResult<i64> {
                let put = diesel::sql_query(&sent.put)
                    .bind::<Text, _>(tenant)
                    .bind::<Text, _>(workspace)
                    .bind::<Text, _>(path.key.as_str())
                    .bind::<Jsonb, _>(&new.value)
                    .bind::<Nullable<Text>, _>(new.description.as_deref());
                Prepared(put).execute(conn).await?;
                let record = diesel::sql_query(&sent.record)
                    .bind::<Text, _>(tenant)
                    .bind::<Text, _>(workspace)
                    .bind::<Text, _>(&operation)
                    .bind::<Text, _>(&access.caller.subject)
                    .bind::<Bool, _>(false);
                let Recorded { version } = Prepared(record).one(conn).await?;
                Ok(version)
            });
            let version = done.await.map_err(Problem::internal)?;
            Ok::<_, Problem>(Json(Entry {
                key: path.key.as_str().to_owned(),
                value: new.value,
                description: new.description,
                version,
            }))
        }
    };
    Router::new()
        .route(
            "/v1/tenants/{tenant}/workspaces/{workspace}/unguarded/{key}",
            put(handler),
        )
        .with_state(state)
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(LockScopeLayer)
        .layer(RequestIdLayer)
}

/// Sends the same write again and again, on one connection.
struct Caller {
    sender: SendRequest<Full<Bytes>>,
    method: Method,
    path: String,
    body: Bytes,
}

impl Caller {
    /// Puts the same key of a workspace of its own.
    async fn put(address: SocketAddr, collection: &str, workspace: &str) -> Result<Self> {
        let path = format!("/v1/tenants/{TENANT}/workspaces/{workspace}/{collection}/color");
        Self::new(address, Method::PUT, path, &json!({ "value": value() })).await
    }

    async fn new(address: SocketAddr, method: Method, path: String, body: &Value) -> Result<Self> {
        Ok(Self {
            sender: connect(address).await?,
            method,
            path,
            body: body.to_string().into(),
        })
    }
}

/// Sends a request with the key that all use, and reads the whole answer.
pub(super) async fn ask(
    sender: &mut SendRequest<Full<Bytes>>,
    method: &Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes)> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    Ok((status, response.into_body().collect().await?.to_bytes()))
}

/// A connection of one client.
pub(super) async fn connect(address: SocketAddr) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("a client's connection ended: {}", Error::from(error));
        }
    });
    Ok(sender)
}

fn value() -> Value {
    json!({ "shade": "blue", "strength": 7 })
}

impl Client for Caller {
    async fn once(&mut self) -> Result {
        let (status, body) = ask(&mut self.sender, &self.method, &self.path, self.body.clone()).await?;
        if status.is_success() {
            Ok(())
        } else {
            Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into())
        }
    }
}

async fn callers(
    name: &'static str,
    service: &Service,
    collection: &str,
    workspaces: &str,
    clients: u32,
) -> Result<Box<dyn Lane>> {
    let mut callers = Vec::new();
    for index in 0..clients {
        callers.push(Caller::put(service.address, collection, &format!("{workspaces}-{index}")).await?);
    }
    Ok(Clients::lane(name, callers))
}

/// A database of the service, and what it knows of the key that all use.
pub(super) async fn set_up(bench: &Bench) -> Result<(BenchDatabase, Vec<u8>)> {
    let database = bench
        .server
        .create_with("leasehold_bench_http", &schema::migrations())
        .await?;
    let server = database.client().await?;
    server.batch_execute(ROWS).await?;
    let first = database.open(1).await?;
    let credential = NewCredential {
        subject: "bench".into(),
        role: Role::Writer,
        tenant: None,
        expires_in_seconds: None,
        only_on_loopback: false,
    };
    first
        .read(async |conn| auth::store(conn, KEY, &credential).await)
        .await?;
    let hash: Vec<u8> = server
        .query_one("SELECT key_sha256 FROM credentials", &[])
        .await?
        .get(0);
    Ok((database, hash))
}

pub(crate) async fn guarded_put(bench: &Bench, clients: u32) -> Result {
    let people = if clients == 1 { "client" } else { "clients" };
    let mut group = Group::new(
        format!("PUT over HTTP, {clients} {people}, distinct workspaces, {POOL} connections"),
        "PUTs/s",
        &["unguarded", "raw", "raw, unguarded", "pgbench"],
    );
    if !bench.wants(group.title()) {
        return Ok(());
    }
    let (database, hash) = set_up(bench).await?;
    let sent = Arc::new(Sent::capture(&database).await?);

    let mut services = Vec::new();
    for (name, mode) in [
        ("lease", WorkspaceLockMode::Lease),
        ("advisory", WorkspaceLockMode::Advisory),
    ] {
        let db = database.open(POOL).await?;
        let service = Service::start(app::router(state(db, mode)?)).await?;
        group.add(callers(name, &service, "default-config", name, clients).await?);
        services.push(service);
    }
    let plain = state(database.open(POOL).await?, WorkspaceLockMode::Lease)?;
    let service = Service::start(unguarded(plain, Arc::clone(&sent))).await?;
    group.add(callers("unguarded", &service, "unguarded", "plain", clients).await?);

    for (name, workspaces, guarded) in [("raw", "raw", true), ("raw, unguarded", "raw-plain", false)] {
        let raw = database.clients(clients, async |client, index| {
            Ok(RawPut {
                find: client.prepare(&sent.find).await?,
                acquire: client.prepare(&sent.acquire).await?,
                enter: client.prepare(&sent.enter).await?,
                put: client.prepare(&sent.put).await?,
                record: client.prepare_typed(&sent.record, &RECORD_TYPES).await?,
                fence: client.prepare(&sent.fence).await?,
                client,
                hash: hash.clone(),
                workspace: format!("{workspaces}-{index}"),
                gates: vec![TenantGate::key(TENANT)?],
                guarded,
            })
        });
        group.add(Clients::lane(name, raw.await?));
    }
    if let Some(pgbench) = &bench.pgbench {
        group.add(pgbench.lane(
            "pgbench",
            &database,
            clients,
            &script(&sent, &hash, TenantGate::key(TENANT)?),
        )?);
    }
    let measured = bench.measure(group).await;
    drop((service, services));
    measured
}

fn script(sent: &Sent, hash: &[u8], gate: i64) -> String {
    let gates = format!("ARRAY[{gate}]::bigint[]");
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    let hash = format!("decode('{hash}', 'hex')");
    let workspace = "('pgbench-' || :client_id::text)";
    let (lock_id, who, operation) = (pgbench::LOCK_ID, "'bench'", "'PUT color'");
    // A colon inside would be taken for a variable.
    let value = "jsonb_build_object('shade', 'blue', 'strength', 7)";
    let find = pgbench::statement(&sent.find, &[&hash, who, "true"]);
    let acquire = [lock_id, operation, who, "10.0::float8", who, workspace];
    let acquire = pgbench::statement(&sent.acquire, &acquire);
    let enter = pgbench::statement(&sent.enter, &[&gates]);
    let put = pgbench::statement(&sent.put, &[who, workspace, "'color'", value, "NULL::text"]);
    let record = pgbench::statement(&sent.record, &[who, workspace, operation, who, "false"]);
    let fence = pgbench::statement(&sent.fence, &[lock_id, who, workspace]);
    format!("{find}{acquire}{BEGIN};\n{enter}{put}{record}{fence}COMMIT;\n")
}

/// What it costs a write of the service that its tables take the gate themselves, although it has entered already.
pub(crate) async fn net(bench: &Bench, clients: u32) -> Result {
    let people = if clients == 1 { "client" } else { "clients" };
    for (what, method) in [
        ("PUT of a key, a workspace each", Method::PUT),
        ("POST of a feedback record", Method::POST),
    ] {
        let mut group = Group::new(
            format!("gated tables, {what}, {clients} {people}"),
            "writes/s",
            &["without triggers"],
        );
        if !bench.wants(group.title()) {
            continue;
        }
        let (database, _) = set_up(bench).await?;
        let db = database.open(POOL).await?;
        let service = Service::start(app::router(state(db, WorkspaceLockMode::Lease)?)).await?;
        for (name, does) in [("without triggers", "DISABLE"), ("with triggers", "ENABLE")] {
            let mut callers = Vec::new();
            for index in 0..clients {
                let caller = if method == Method::PUT {
                    Caller::put(service.address, "default-config", &format!("lease-{index}")).await?
                } else {
                    let record = json!({ "tenant_id": TENANT, "user_id": "somebody", "value": "a thought" });
                    Caller::new(
                        service.address,
                        Method::POST,
                        "/v1/feedback-records".into(),
                        &record,
                    )
                    .await?
                };
                callers.push(caller);
            }
            group.add(Box::new(Triggers {
                inner: Clients::lane(name, callers),
                client: database.client().await?,
                does,
            }));
        }
        bench.measure(group).await?;
    }
    Ok(())
}

/// A lane before whose turns the triggers of the gate are switched.
struct Triggers {
    inner: Box<dyn Lane>,
    client: Connection,
    does: &'static str,
}

#[async_trait]
impl Lane for Triggers {
    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn run(&mut self, window: Duration) -> Result<Sample> {
        let switch = format!(
            "DO $$ DECLARE gated REGCLASS; BEGIN
                 FOR gated IN SELECT tgrelid::regclass FROM pg_trigger WHERE tgname = 'leasehold_gate' LOOP
                     EXECUTE format('ALTER TABLE %s {} TRIGGER leasehold_gate', gated);
                 END LOOP;
             END $$",
            self.does
        );
        self.client.batch_execute(&switch).await?;
        self.inner.run(window).await
    }
}

/// The statements of a PUT without HTTP.
struct RawPut {
    client: Connection,
    find: Statement,
    acquire: Statement,
    enter: Statement,
    put: Statement,
    record: Statement,
    fence: Statement,
    hash: Vec<u8>,
    workspace: String,
    /// The tables take it as well: it must be the tenant's.
    gates: Vec<i64>,
    guarded: bool,
}

impl Client for RawPut {
    async fn once(&mut self) -> Result {
        let (client, workspace) = (&self.client, &self.workspace);
        let operation = "PUT color";
        client
            .query_one(&self.find, &[&self.hash, &TENANT, &true])
            .await?;
        let lock_id = Uuid::new_v4();
        if self.guarded {
            let given = client
                .query_one(
                    &self.acquire,
                    &[&lock_id, &operation, &"bench", &10.0_f64, &TENANT, workspace],
                )
                .await?;
            if given.get::<_, Option<i64>>("given_token").is_none() {
                return Err("a lease was not given".into());
            }
        }
        client.batch_execute(BEGIN).await?;
        if self.guarded {
            client.query_one(&self.enter, &[&self.gates]).await?;
        }
        let value = SqlJson(value());
        client
            .query(&self.put, &[&TENANT, workspace, &"color", &value, &None::<&str>])
            .await?;
        client
            .query_one(&self.record, &[&TENANT, workspace, &operation, &"bench", &false])
            .await?;
        if self.guarded {
            client
                .query_one(&self.fence, &[&lock_id, &TENANT, workspace])
                .await?;
        }
        client.batch_execute("COMMIT").await?;
        Ok(())
    }
}
