//! A lock that counts, a service that locks, and a client that can leave at any moment.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{post, put};
use axum::{Json, Router};
use http_body_util::BodyExt;
use leasehold_domain::{
    AcquireError, Contention, DistributedLock, ExtendError, FencingToken, GuardParts, HeldLock, Holder,
    LockGuard, LockId, LockName, LockRequest, MemoryClock, ReleaseError, Released, ResumeError, Unavailable,
};
use leasehold_http::{
    ApiJson, ApiPath, ApiQuery, Authenticate, BearerToken, Caller, Code, Early, FieldError, LockScopeLayer,
    LockTarget, Locked, NoBody, Problem, RequestIdLayer, Validate, on_panic, operation,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

/// No state of these tests takes longer to come about.
const CAP: Duration = Duration::from_secs(20);

/// Waits for a state.
pub(crate) async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let wait = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(CAP, wait).await.is_ok(), "never: {what}");
}

// ---------------------------------------------------------------------------------------------------------------

/// An in-process lock. Freeing it takes [`FREEING`], as a round trip would, so that whoever does not wait for a
/// release is overtaken by the next request.
#[derive(Clone)]
pub(crate) struct CountingLock(Arc<Inner>);

struct Inner {
    held: Mutex<HashMap<LockName, HeldLock>>,
    freed: Notify,
    clock: Arc<MemoryClock>,
    runtime: Handle,
    attempts: AtomicUsize,
    waiting: AtomicUsize,
    releases_hang: AtomicBool,
    releases_fail: AtomicBool,
}

const FREEING: Duration = Duration::from_millis(2);

/// What an operator's message may contain and a client must never see. None of it is short enough to turn up in a
/// random id.
pub(crate) const SECRETS: [&str; 5] = [
    "db-7.internal",
    "hunter2",
    "pg_try_advisory",
    "1481516234",
    "psql-console",
];

pub(crate) fn unavailable() -> Unavailable {
    let source = std::io::Error::other("SELECT pg_try_advisory_lock(1) as hunter2");
    Unavailable::because("db-7.internal refused the connection, pid 1481516234", source)
}

impl CountingLock {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            held: Mutex::default(),
            freed: Notify::new(),
            clock: Arc::new(MemoryClock::new()),
            runtime: Handle::current(),
            attempts: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            releases_hang: AtomicBool::new(false),
            releases_fail: AtomicBool::new(false),
        }))
    }

    /// How often anybody asked for a lock.
    pub(crate) fn attempts(&self) -> usize {
        self.0.attempts.load(Ordering::SeqCst)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn held(&self) -> usize {
        self.0.held.lock().unwrap().len()
    }

    pub(crate) fn let_releases_hang(&self) {
        self.0.releases_hang.store(true, Ordering::SeqCst);
    }

    pub(crate) fn let_releases_fail(&self) {
        self.0.releases_fail.store(true, Ordering::SeqCst);
    }

    /// Holds a plan in somebody else's name until the guard is dropped.
    pub(crate) async fn hold(&self, plan: &str) -> LockGuard {
        let holder = Holder::new("bob@example.com", "PUT /plans/held");
        let request = LockRequest::new(LockName::new(["plan", plan]).unwrap(), holder);
        let guard = self.try_acquire(&request).await.unwrap();
        self.0.attempts.store(0, Ordering::SeqCst);
        guard
    }
}

impl Inner {
    fn free(&self, name: &LockName, id: LockId) -> Released {
        let mut held = self.held.lock().unwrap();
        if held.get(name).is_some_and(|held| held.lock_id == Some(id)) {
            held.remove(name);
            self.freed.notify_waiters();
            Released::Held
        } else {
            Released::AlreadyGone
        }
    }

    fn attempt(self: &Arc<Self>, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        let name = request.name().clone();
        match request.name().parts().nth(1) {
            Some("gone") => return Err(AcquireError::NotFound { name }),
            Some("away") => return Err(AcquireError::Unavailable(unavailable())),
            _ => {}
        }
        request.validate()?;
        let mut table = self.held.lock().unwrap();
        if let Some(held) = table.get(&name) {
            return Err(AcquireError::Contended(Contention::with(held.clone())));
        }
        let (id, token) = (LockId::new(), FencingToken::new(7));
        let held = HeldLock {
            lock_id: Some(id),
            holder: Some(request.holder().clone()),
            acquired_at: Some(self.clock.wall()),
            fencing_token: Some(token),
            ..HeldLock::unknown(name.clone(), request.mode())
        };
        table.insert(name.clone(), held);
        let parts = GuardParts {
            name: name.clone(),
            mode: request.mode(),
            lock_id: id,
            fencing_token: Some(token),
            holder: request.holder().clone(),
            acquired_at: self.clock.wall(),
            expires_at: None,
            trusted_until: None,
            clock: self.clock.clone(),
        };
        let lock = Arc::clone(self);
        Ok(LockGuard::new(parts, move || {
            let task = lock.clone();
            lock.runtime.spawn(async move {
                tokio::time::sleep(FREEING).await;
                task.free(&name, id)
            });
        }))
    }
}

#[async_trait]
impl DistributedLock for CountingLock {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        self.0.attempts.fetch_add(1, Ordering::SeqCst);
        self.0.attempt(request)
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }

        self.0.attempts.fetch_add(1, Ordering::SeqCst);
        let end = tokio::time::Instant::now() + wait;
        loop {
            let freed = self.0.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let contention = match self.0.attempt(request) {
                Err(AcquireError::Contended(contention)) => contention,
                other => return other,
            };
            self.0.waiting.fetch_add(1, Ordering::SeqCst);
            let waiting = Waiting(&self.0.waiting);
            let out = tokio::time::timeout_at(end, freed).await;
            drop(waiting);
            if out.is_err() {
                let waited = wait;
                return Err(AcquireError::TimedOut { waited, contention });
            }
        }
    }

    async fn resume(&self, _: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        Err(ResumeError::NotHeld { lock_id })
    }

    async fn extend(&self, _: &LockGuard, _: Duration) -> Result<(), ExtendError> {
        Ok(())
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        if self.0.releases_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(FREEING).await;
        if self.0.releases_fail.load(Ordering::SeqCst) {
            return Err(ReleaseError::Unavailable(unavailable()));
        }
        let released = self.0.free(guard.name(), guard.lock_id());
        guard.defuse();
        Ok(released)
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        Ok(self.0.held.lock().unwrap().get(name).cloned())
    }
}

// ---------------------------------------------------------------------------------------------------------------

/// The state of the service: plans that can be renamed by one caller at a time.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) lock: CountingLock,
    /// Requests that were found allowed.
    pub(crate) authorized: Arc<AtomicUsize>,
    /// Handlers that were entered.
    pub(crate) entered: Arc<AtomicUsize>,
    /// Lets the work of `/detached` end.
    pub(crate) finish: Arc<Notify>,
}

impl App {
    pub(crate) fn new() -> Self {
        Self {
            lock: CountingLock::new(),
            authorized: Arc::default(),
            entered: Arc::default(),
            finish: Arc::default(),
        }
    }

    pub(crate) fn authorized(&self) -> usize {
        self.authorized.load(Ordering::SeqCst)
    }

    pub(crate) fn entered(&self) -> usize {
        self.entered.load(Ordering::SeqCst)
    }

    fn enter(&self) {
        self.entered.fetch_add(1, Ordering::SeqCst);
    }
}

impl Authenticate for App {
    type Identity = String;

    async fn authenticate(&self, token: BearerToken) -> Result<String, Problem> {
        let known = ["alice", "reader"].contains(&token.secret());
        known
            .then(|| token.secret().to_owned())
            .ok_or_else(Problem::unauthenticated)
    }
}

/// The plan of the path.
#[derive(Debug)]
pub(crate) struct Plan {
    name: String,
    owner: String,
    operation: String,
}

#[derive(Deserialize)]
struct PlanPath {
    plan: String,
}

#[derive(Deserialize)]
struct Limit {
    #[serde(default = "one")]
    limit: u32,
}

fn one() -> u32 {
    1
}

impl Validate for Limit {
    fn validate(&self) -> Vec<FieldError> {
        match self.limit {
            1..=200 => Vec::new(),
            _ => vec![FieldError::new("limit", "1 to 200")],
        }
    }
}

impl<B: Sync> LockTarget<App, B> for Plan {
    const CONFLICT: Code = Code::WorkspaceLocked;

    async fn authorize(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let Caller(owner) = Caller::from_request_parts(parts, app).await?;
        if owner == "reader" {
            return Err(Problem::forbidden("readers do not write"));
        }
        let ApiPath(PlanPath { plan: name }) = ApiPath::from_request_parts(parts, app).await?;
        if name == "unknown" {
            return Err(Problem::not_found("there is no such plan"));
        }
        let ApiQuery(Limit { .. }) = ApiQuery::from_request_parts(parts, app).await?;
        app.authorized.fetch_add(1, Ordering::SeqCst);
        let operation = operation(parts);
        Ok(Self {
            name,
            owner,
            operation,
        })
    }

    async fn admit(&self, _: &B, _: &App) -> Result<(), Early> {
        match self.name.as_str() {
            "archived" => Err(Problem::not_found("the plan was archived").into()),
            "renamed" => {
                let answer = (StatusCode::OK, "it has that name already").into_response();
                Err(Early::Answer(Box::new(answer)))
            }
            _ => Ok(()),
        }
    }

    fn lock(&self, app: &App) -> Arc<dyn DistributedLock> {
        Arc::new(app.lock.clone())
    }

    fn request(&self, _: &B, _: &App) -> Result<LockRequest, Problem> {
        let name = LockName::new(["plan", &self.name])?;
        Ok(LockRequest::new(name, Holder::new(&self.owner, &self.operation)))
    }

    fn max_wait(&self, _: &App) -> Duration {
        match self.name.as_str() {
            "impatient" => Duration::ZERO,
            _ => Duration::from_secs(60),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rename {
    title: String,
}

impl Validate for Rename {
    fn validate(&self) -> Vec<FieldError> {
        match self.title.len() {
            1..=80 => Vec::new(),
            _ => vec![FieldError::new("title", "1 to 80 bytes")],
        }
    }
}

type Write = Locked<Plan, ApiJson<Rename>>;
type State = axum::extract::State<App>;

/// The routes, with the layers in the order of the README.
pub(crate) fn router(app: App) -> Router {
    layered(routes(), app)
}

pub(crate) fn layered(routes: Router<App>, app: App) -> Router {
    routes
        .with_state(app)
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(LockScopeLayer)
        .layer(RequestIdLayer)
}

pub(crate) fn routes() -> Router<App> {
    let renamed =
        |write: &Write| Json(json!({ "title": write.body.0.title, "lock_id": write.guard.lock_id() }));
    Router::new()
        .route(
            "/plans/{plan}",
            put(async move |app: State, write: Write| {
                app.enter();
                renamed(&write)
            })
            .delete(async |app: State, locked: Locked<Plan>| {
                app.enter();
                assert_eq!(locked.body, NoBody);
                StatusCode::NO_CONTENT
            }),
        )
        .route(
            "/plans/{plan}/search",
            post(async |ApiJson(rename): ApiJson<Rename>| Json(json!({ "found": rename.title }))),
        )
        .route(
            "/plans/{plan}/panic",
            put(async |_: Write| -> StatusCode { panic!("hunter2") }),
        )
        .route(
            "/plans/{plan}/refuse",
            put(async |_: Write| Err::<(), _>(Problem::new(Code::AlreadyExists, "the title is taken"))),
        )
        .route(
            "/plans/{plan}/hang",
            put(async |app: State, _write: Write| {
                app.enter();
                std::future::pending::<StatusCode>().await
            }),
        )
        .route(
            "/plans/{plan}/stream",
            put(async |app: State, _write: Write| {
                app.enter();
                let first = futures_util::stream::iter([Ok::<_, std::io::Error>("begun")]);
                let never = futures_util::stream::pending();
                Body::from_stream(futures_util::StreamExt::chain(first, never))
            }),
        )
        .route(
            "/plans/{plan}/detached",
            put(async |app: State, write: Write| {
                let finish = app.finish.clone();
                let entered = app.entered.clone();
                let work = tokio::spawn(async move {
                    entered.fetch_add(1, Ordering::SeqCst);
                    finish.notified().await;
                    drop(write.guard);
                });
                work.await.unwrap();
            }),
        )
        .route(
            "/plans/{plan}/taken-out",
            put(async |_: State, write: Write| drop(write.guard.into_inner())),
        )
        .route(
            "/numbers/{n}",
            post(async |ApiPath(n): ApiPath<u32>| n.to_string()),
        )
        .route(
            "/list",
            axum::routing::get(async |ApiQuery(limit): ApiQuery<Limit>| limit.limit.to_string()),
        )
}

// ---------------------------------------------------------------------------------------------------------------

/// What a client sees.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) async fn of(response: Response) -> Self {
        let (parts, body) = response.into_parts();
        Self {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: body.collect().await.unwrap().to_bytes().to_vec(),
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The problem, after checking what is true of every problem.
    #[track_caller]
    pub(crate) fn problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        assert_eq!(problem["type"], format!("/problems/{code}"), "{problem}");
        for member in ["title", "detail", "instance"] {
            assert!(
                problem[member].as_str().is_some_and(|text| !text.is_empty()),
                "{member}: {problem}"
            );
        }
        assert_eq!(
            problem["request_id"].as_str(),
            self.header("x-request-id"),
            "{problem}"
        );
        let seconds = problem["retry_after_ms"].as_u64().map(|ms| ms.div_ceil(1000));
        assert_eq!(
            self.header("retry-after"),
            seconds.map(|s| s.to_string()).as_deref(),
            "{self:?}"
        );
        assert!(
            seconds.is_none_or(|seconds| (1..=5).contains(&seconds)),
            "{problem}"
        );
        assert_eq!(problem["retryable"], seconds.is_some(), "{problem}");
        let text = String::from_utf8_lossy(&self.body);
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{text}");
        problem
    }
}

/// Asks a router without a socket.
pub(crate) async fn ask(router: &Router, request: Request) -> Answer {
    Answer::of(router.clone().oneshot(request).await.unwrap()).await
}

/// A request of Alice's.
pub(crate) fn alice(method: &str, uri: &str) -> axum::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(uri)
        .header("authorization", "Bearer alice")
        .header("content-type", "application/json")
}

pub(crate) fn rename(uri: &str) -> Request {
    alice("PUT", uri).body(Body::from(RENAME)).unwrap()
}

pub(crate) const RENAME: &str = r#"{"title":"spring"}"#;

/// Serves a router on a port of its own until the test's runtime ends.
pub(crate) async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// One HTTP/1.1 connection.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let buffer = Vec::new();
        Self { stream, buffer }
    }

    pub(crate) async fn send(&mut self, raw: impl AsRef<[u8]>) {
        self.stream.write_all(raw.as_ref()).await.unwrap();
    }

    /// Sends a rename by Alice; does not wait for the answer.
    pub(crate) async fn put(&mut self, path: &str, extra: &str) {
        let length = RENAME.len();
        self.send(format!(
            "PUT {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alice\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{extra}\r\n{RENAME}"
        ))
        .await;
    }

    /// Reads the head of an answer, and its body when its length is told.
    pub(crate) async fn answer(&mut self) -> Answer {
        tokio::time::timeout(CAP, self.read())
            .await
            .expect("no answer came")
    }

    /// Reads the head of an answer that has no body, whatever length it tells.
    pub(crate) async fn head(&mut self) -> Answer {
        let head = async {
            let (status, headers) = self.read_head().await;
            let body = Vec::new();
            Answer {
                status,
                headers,
                body,
            }
        };
        tokio::time::timeout(CAP, head).await.expect("no answer came")
    }

    async fn read(&mut self) -> Answer {
        let (status, headers) = self.read_head().await;
        let length = headers
            .get("content-length")
            .map_or(0, |value| value.to_str().unwrap().parse().unwrap());
        while self.buffer.len() < length {
            self.more().await;
        }
        let body = self.buffer.drain(..length).collect();
        Answer {
            status,
            headers,
            body,
        }
    }

    async fn read_head(&mut self) -> (u16, HeaderMap) {
        let end = loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            self.more().await;
        };
        let head = String::from_utf8(self.buffer.drain(..end).collect()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
            let name: axum::http::HeaderName = name.parse().unwrap();
            headers.append(name, value.parse().unwrap());
        }
        (status, headers)
    }

    async fn more(&mut self) {
        let read = self.stream.read_buf(&mut self.buffer).await.unwrap();
        assert_ne!(
            read,
            0,
            "the connection ended: {:?}",
            String::from_utf8_lossy(&self.buffer)
        );
    }
}
