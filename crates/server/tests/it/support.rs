//! A service in this process, on a database of its own.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, header};
use http_body_util::BodyExt;
use leasehold_domain::{Holder, LockGuard, LockRequest};
use leasehold_embedded::Cluster;
use leasehold_server::auth::{self, NewCredential, Role};
use leasehold_server::config::WorkspaceLockMode;
use leasehold_server::waiters::Limits;
use leasehold_server::{AppState, Settings, app, schema, workspace_lock_name};
use leasehold_storage::{ConnectOptions, Database};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use tower::ServiceExt;
use uuid::Uuid;

use crate::{log, secrets};

/// How long a state may take to come. Only a fault takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

/// The workspace that every service has.
pub(crate) const MAIN: &str = "/v1/tenants/acme/workspaces/main";

/// A service with the tenants `acme` and `other`, each with a workspace `main`.
pub(crate) struct Api {
    pub(crate) state: AppState,
    pub(crate) db: Database,
    pub(crate) url: String,
    router: Router,
    key: String,
}

impl Api {
    pub(crate) async fn start(mode: WorkspaceLockMode) -> Self {
        Self::start_with(settings(mode)).await
    }

    pub(crate) async fn start_with(settings: Settings) -> Self {
        let url = database().await;
        Self::start_on(&url, settings).await
    }

    /// Another instance on the same database.
    pub(crate) async fn start_on(url: &str, settings: Settings) -> Self {
        log::keep();
        let options = ConnectOptions::parse(url, None).unwrap();
        let db = Database::connect(options, 4).await.unwrap();
        let state = AppState::new(db.clone(), settings).unwrap();
        let router = app::router(state.clone());
        let mut api = Self {
            state,
            db,
            url: url.to_owned(),
            router,
            key: String::new(),
        };
        api.key = api.new_key("root", Role::Admin, None).await;
        for tenant in ["acme", "globex"] {
            api.post("/v1/tenants", json!({"id": tenant})).await;
            api.post(
                &format!("/v1/tenants/{tenant}/workspaces"),
                json!({"name": "main"}),
            )
            .await;
        }
        api
    }

    /// The same service as seen by somebody else.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        let Self {
            state,
            db,
            url,
            router,
            ..
        } = self;
        let (state, db, url, router) = (state.clone(), db.clone(), url.clone(), router.clone());
        Self {
            state,
            db,
            url,
            router,
            key: key.to_owned(),
        }
    }

    pub(crate) async fn new_key(&self, subject: &str, role: Role, tenant: Option<&str>) -> String {
        self.store_key(&NewCredential {
            subject: subject.to_owned(),
            role,
            tenant: tenant.map(str::to_owned),
            expires_in_seconds: None,
            only_on_loopback: false,
        })
        .await
    }

    pub(crate) async fn store_key(&self, new: &NewCredential) -> String {
        let key = auth::new_key();
        self.db
            .read(async |conn| auth::store(conn, &key, new).await)
            .await
            .unwrap();
        key
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], None).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PUT, path, &[], Some(body.to_string())).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, &[], Some(body.to_string())).await
    }

    pub(crate) async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PATCH, path, &[], Some(body.to_string())).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], None).await
    }

    /// Sends anything, also what is no JSON.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<String>,
    ) -> Answer {
        let place = format!("the answer to {method} {path}");
        let mut request = Request::builder().method(method).uri(path);
        if !self.key.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.key));
        }
        if body.is_some() && !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.map_or_else(Body::empty, Body::from)).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        if secrets::may_have_none(&place) {
            secrets::assert_none(&place, &format!("{:?} {text}", parts.headers));
        }
        let body = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
        Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            text,
            body,
        }
    }

    /// Takes the lock of a workspace, as a request of another instance would.
    pub(crate) async fn hold(&self, tenant: &str, workspace: &str) -> LockGuard {
        let name = workspace_lock_name(tenant, workspace).unwrap();
        let request = LockRequest::new(name, Holder::new("mallory", "PUT /elsewhere"))
            .with_ttl(self.state.settings().lease);
        self.state.locks().try_acquire(&request).await.unwrap()
    }

    pub(crate) async fn release(&self, guard: LockGuard) {
        self.state.locks().release(guard).await.unwrap();
    }

    pub(crate) fn mode(&self) -> WorkspaceLockMode {
        self.state.settings().lock_mode
    }

    /// A connection that knows nothing of the service.
    pub(crate) async fn client(&self) -> Client {
        client(&self.url).await
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            log::look();
        }
    }
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// The body as it came.
    pub(crate) text: String,
    pub(crate) body: Value,
}

impl Answer {
    /// Goes on with the body of an answer that has this status.
    #[track_caller]
    pub(crate) fn is(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{:#}", self.body);
        self.body
    }

    /// Goes on with a problem that has this status and code.
    #[track_caller]
    pub(crate) fn problem(self, status: u16, code: &str) -> Value {
        assert_eq!(
            (self.status, self.body["code"].as_str()),
            (status, Some(code)),
            "{:#}",
            self.body
        );
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(self.body["status"], status);
        assert_eq!(self.body["type"], format!("/problems/{code}"));
        assert_eq!(self.body["request_id"].as_str(), self.header("x-request-id"));
        let retryable = self.body["retryable"].as_bool().unwrap();
        assert_eq!(self.header("retry-after").is_some(), retryable, "{:#}", self.body);
        self.body
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

pub(crate) fn settings(mode: WorkspaceLockMode) -> Settings {
    Settings {
        lock_mode: mode,
        lease: Duration::from_secs(10),
        write_hold: Duration::from_secs(60),
        batch_hold: Duration::from_secs(1200),
        max_wait: Duration::from_secs(30),
        purge_wait: Duration::from_secs(5),
        waiters: Limits {
            total: 10_000,
            per_tenant: 1_000,
        },
        on_loopback: true,
        instance: "test".to_owned(),
    }
}

/// One write of each kind in the workspace `main` of `acme`. They need not succeed: what they name may not exist.
pub(crate) fn workspace_writes() -> Vec<(Method, String, Option<Value>)> {
    let id = "00000000-0000-0000-0000-000000000000";
    let batch = json!({"operations": [{"op": "put", "key": "a", "value": 1}]});
    let context = json!({"condition": {}, "overrides": {}});
    let key = format!("{MAIN}/default-config/a");
    vec![
        (Method::PATCH, MAIN.to_owned(), Some(json!({"description": "x"}))),
        (Method::DELETE, MAIN.to_owned(), None),
        (Method::PUT, key.clone(), Some(json!({"value": 1}))),
        (Method::DELETE, key, None),
        (Method::POST, format!("{MAIN}/default-config/batch"), Some(batch)),
        (Method::POST, format!("{MAIN}/contexts"), Some(context.clone())),
        (Method::PUT, format!("{MAIN}/contexts/{id}"), Some(context)),
        (Method::DELETE, format!("{MAIN}/contexts/{id}"), None),
        (Method::POST, format!("{MAIN}/versions/1/restore"), None),
    ]
}

/// Looks until it is so.
pub(crate) async fn eventually(what: &str, so: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !so().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) async fn client(url: &str) -> Client {
    let (client, driver) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(async move { driver.await.ok() });
    client
}

/// A new database with all tables: a copy of a template, which takes some 20 ms.
pub(crate) async fn database() -> String {
    let mut hasher = DefaultHasher::new();
    schema::migrations().hash(&mut hasher);
    let template = format!("leasehold_server_{:016x}", hasher.finish());
    let server = client(maintenance_url()).await;
    let name = new_name();
    let create = format!("CREATE DATABASE {name} TEMPLATE {template}");
    match server.batch_execute(&create).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_DATABASE) => {
            make_template(&server, &template).await;
            server.batch_execute(&create).await.unwrap();
        }
        other => other.unwrap(),
    }
    with_database(&name)
}

/// A new database without any tables.
pub(crate) async fn empty_database() -> String {
    let name = new_name();
    client(maintenance_url())
        .await
        .batch_execute(&format!("CREATE DATABASE {name}"))
        .await
        .unwrap();
    with_database(&name)
}

fn new_name() -> String {
    format!("test_{}", Uuid::new_v4().simple())
}

/// It gets its name last, when it is whole. Of several processes that make it at once, one wins.
async fn make_template(server: &Client, template: &str) {
    let url = empty_database().await;
    schema::migrations()
        .run(&ConnectOptions::parse(&url, None).unwrap())
        .await
        .unwrap();
    let (path, _) = url.split_once('?').unwrap();
    let (_, name) = path.rsplit_once('/').unwrap();
    // A template with a connection cannot be copied.
    server
        .batch_execute(&format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false"))
        .await
        .unwrap();
    eventually("nobody is in the template", async || {
        let count = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1";
        server.query_one(count, &[&name]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    if let Err(error) = server
        .batch_execute(&format!("ALTER DATABASE {name} RENAME TO {template}"))
        .await
    {
        let somebody_was_faster = [SqlState::DUPLICATE_DATABASE, SqlState::UNIQUE_VIOLATION];
        assert!(
            error
                .code()
                .is_some_and(|code| somebody_was_faster.contains(code)),
            "{error}"
        );
    }
}

fn with_database(name: &str) -> String {
    let url = maintenance_url();
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let (server, _) = path.rsplit_once('/').unwrap();
    format!("{server}/{name}?{query}")
}

/// The cluster that `cargo xtask test` started for all, or one for this process.
fn maintenance_url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    URL.get_or_init(|| {
        std::env::var("LEASEHOLD_TEST_DATABASE_URL").unwrap_or_else(|_| {
            let start = || {
                Cluster::temporary()
                    .set("max_connections", "400")
                    .set("autovacuum", "off")
                    .start()
            };
            CLUSTER.get_or_init(|| start().unwrap()).url("postgres")
        })
    })
}
