//! [`World`]: a running service with a tenant and a workspace, and ways to hold that workspace for as long as a test
//! wants.

use std::time::Duration;

use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{Answer, Api, get, post, put};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::proxy::Proxy;
use leasehold_system_tests::service::{Service, ServiceBuilder, make_key};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

/// Runs each test once with each kind of workspace lock: `in_both_modes!(one, two)` for
/// `async fn one(mode: &'static str)`.
macro_rules! in_both_modes {
    ($($test:ident),* $(,)?) => {
        mod lease {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test("lease").await; })*
        }
        mod advisory {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test("advisory").await; })*
        }
    };
}
pub(crate) use in_both_modes;

pub(crate) const WORKSPACE: &str = "/v1/tenants/acme/workspaces/main";
/// A key that [`World::hold`] needs, and that nobody else writes.
const GATE: &str = "gate";

pub(crate) struct World {
    pub(crate) service: Service,
    /// As somebody who may do anything.
    pub(crate) api: Api,
    /// Past the service.
    pub(crate) client: Client,
    pub(crate) database: TestDatabase,
    pub(crate) mode: &'static str,
}

/// A write that has the workspace and does not go on.
pub(crate) struct Holding {
    /// Its request. Aborting it hangs up.
    pub(crate) write: JoinHandle<Option<Answer>>,
    stranger: Client,
}

impl World {
    pub(crate) async fn start(mode: &'static str) -> Self {
        Self::start_with(mode, |service| service).await
    }

    pub(crate) async fn start_with(
        mode: &'static str,
        settings: impl FnOnce(ServiceBuilder) -> ServiceBuilder,
    ) -> Self {
        let database = TestDatabase::create_empty().await;
        let service = Service::on(&database).set("WORKSPACE_LOCK_MODE", mode);
        Self::of(settings(service), database, mode).await
    }

    /// A service whose database is behind a proxy, with two connections on which everything that a PUT needs is
    /// prepared.
    pub(crate) async fn behind_a_proxy(mode: &'static str) -> (Self, Proxy) {
        let database = TestDatabase::create_empty().await;
        let proxy = Proxy::start(&database);
        let service = Service::on_url(&proxy.url(&database)).set("WORKSPACE_LOCK_MODE", mode);
        let world = Self::of(service.set("DATABASE_POOL_SIZE", "2"), database, mode).await;
        world.tell_nobody().await;
        for value in 0..20 {
            world.api.send(put_key("key", value)).await.expect(200);
        }
        (world, proxy)
    }

    pub(crate) async fn of(service: ServiceBuilder, database: TestDatabase, mode: &'static str) -> Self {
        let service = service.start().await;
        let key = {
            let database = database.clone();
            let make = move || make_key(&database, "tester", "admin", None);
            tokio::task::spawn_blocking(make).await.unwrap()
        };
        let api = service.api(&key);
        make_workspace(&api).await;
        let client = database.client().await;
        Self {
            service,
            api,
            client,
            database,
            mode,
        }
    }

    /// Ends every session of the server but our own, and waits until they have ended.
    pub(crate) async fn end_sessions(&self) {
        let end = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        let ended: i64 = self.client.query_one(end, &[]).await.unwrap().get(0);
        assert!(ended > 0);
    }

    /// From here on writes make no events. What becomes of these goes over the same wire, whenever it is its turn.
    async fn tell_nobody(&self) {
        let hush = "CREATE FUNCTION hush() RETURNS TRIGGER LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
                    CREATE TRIGGER hush BEFORE INSERT ON leasehold.outbox FOR EACH ROW EXECUTE FUNCTION hush()";
        self.client.batch_execute(hush).await.unwrap();
        eventually("what happened before is handed on", async || {
            let left = "SELECT count(*) FROM leasehold.outbox";
            self.client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }

    /// A further service on the same database, started the same way.
    pub(crate) async fn another(
        &self,
        settings: impl FnOnce(ServiceBuilder) -> ServiceBuilder,
    ) -> (Service, Api) {
        let service = Service::on(&self.database).set("WORKSPACE_LOCK_MODE", self.mode);
        let service = settings(service).start().await;
        let api = service.api(self.api.key.as_deref().unwrap());
        (service, api)
    }

    /// Another key to the same service.
    pub(crate) async fn key(&self, subject: &str, role: &str, tenant: Option<&str>) -> Api {
        let (database, subject, role) = (self.database.clone(), subject.to_owned(), role.to_owned());
        let tenant = tenant.map(str::to_owned);
        let make = move || make_key(&database, &subject, &role, tenant.as_deref());
        self.api
            .with_key(&tokio::task::spawn_blocking(make).await.unwrap())
    }

    pub(crate) async fn version(&self) -> i64 {
        let workspace = self.api.send(get(WORKSPACE)).await.expect(200).json();
        workspace["version"].as_i64().unwrap()
    }

    /// Lets a write take the workspace and stop in the middle, at a row that a stranger has locked.
    pub(crate) async fn hold(&self) -> Holding {
        self.hold_by(&self.api, put(key_path(GATE), &json!({"value": "held"})))
            .await
    }

    /// The same with a write of the caller's choice, which must put the key `gate`.
    pub(crate) async fn hold_by(&self, api: &Api, write: leasehold_system_tests::http::Call) -> Holding {
        // A stranger makes the row: a service would make a version with it.
        let make = "INSERT INTO default_config (tenant_id, workspace, key, value, version)
                    VALUES ('acme', 'main', 'gate', '\"open\"', 0) ON CONFLICT DO NOTHING";
        self.client.batch_execute(make).await.unwrap();
        let stranger = self.database.client().await;
        let lock = "BEGIN; SELECT FROM default_config WHERE key = 'gate' FOR UPDATE";
        stranger.batch_execute(lock).await.unwrap();
        let asking = api.clone();
        let write = tokio::spawn(async move { asking.try_send(write).await });
        eventually("the write has the workspace and waits for the row", async || {
            if write.is_finished() {
                panic!("the write did not wait");
            }
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                       AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO default_config%'";
            self.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) >= 1
        })
        .await;
        Holding { write, stranger }
    }

    /// Moves the end of the workspace's lease into the past, as if its holder had been asleep.
    pub(crate) async fn expire(&self) {
        let sql = "UPDATE workspaces SET workspace_lock_acquired_at = clock_timestamp() - interval '2 hours',
                                         workspace_lock_expires_at = clock_timestamp() - interval '1 hour'
                   WHERE workspace_lock_id IS NOT NULL";
        assert_eq!(self.client.execute(sql, &[]).await.unwrap(), 1);
    }

    /// Waits until no workspace is locked, in whichever way, and no transaction is open.
    pub(crate) async fn nothing_is_held(&self) {
        eventually("no lock row is held", async || {
            let sql = "SELECT count(*) FROM workspaces WHERE workspace_lock_expires_at > clock_timestamp()";
            self.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        eventually(
            "no advisory lock but the shared ones of the living instances",
            async || {
                let sql =
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
                self.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
            },
        )
        .await;
        eventually("no transaction is open", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                       AND application_name LIKE 'leasehold%' AND xact_start IS NOT NULL";
            self.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }
}

impl Holding {
    /// Lets the write go on, and answers what it was told.
    pub(crate) async fn go_on(self) -> Answer {
        self.stranger.batch_execute("ROLLBACK").await.unwrap();
        in_time("the write that was held up", self.write)
            .await
            .unwrap()
            .expect("an answer")
    }

    /// What the write was told, if anything, when its service has gone.
    pub(crate) async fn told(self) -> Option<Answer> {
        in_time("the end of the connection", self.write).await.unwrap()
    }

    /// The client of the write hangs up. The row stays locked until the stranger that is answered is dropped.
    pub(crate) async fn hang_up(self) -> Client {
        self.write.abort();
        assert!(self.write.await.unwrap_err().is_cancelled());
        self.stranger
    }
}

pub(crate) async fn make_workspace(api: &Api) {
    api.send(post("/v1/tenants", &json!({"id": "acme"})))
        .await
        .expect(201);
    let workspaces = "/v1/tenants/acme/workspaces";
    api.send(post(workspaces, &json!({"name": "main"})))
        .await
        .expect(201);
}

pub(crate) fn key_path(key: &str) -> String {
    format!("{WORKSPACE}/default-config/{key}")
}

/// A write that makes one version.
pub(crate) fn put_key(key: &str, value: impl Into<Value>) -> leasehold_system_tests::http::Call {
    put(key_path(key), &json!({"value": value.into()}))
}

/// As long as a lock may stay after whoever had it was killed: nothing, a slice of it, and a poll, with time for two
/// busy processors.
pub(crate) fn grace(lease: Duration) -> Duration {
    lease + Duration::from_secs(1) + Duration::from_secs(2)
}
