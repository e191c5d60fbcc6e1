//! The checks at the start: each thing that is wrong is refused or warned about, and nothing else is.

use leasehold_domain::{AcquireError, DistributedLock, Holder, LockName, LockRequest};
use leasehold_embedded::{Cluster, Durability};
use leasehold_storage::migrate::Migrations;
use leasehold_storage::{ConnectOptions, Database, Findings, StartupError};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use crate::support::pooler::{self, Next, Pooler};
use crate::support::{PATIENCE, TestDatabase, eventually};

const POOL: u32 = 4;

async fn start(options: ConnectOptions) -> Result<Findings, StartupError> {
    Database::connect(options, POOL)
        .await
        .map(|database| database.findings().clone())
}

/// Without the settings that make servers for tests fast, which are none that a test here is about.
async fn warnings(database: &TestDatabase) -> Vec<String> {
    let mut warnings = start(database.options()).await.unwrap().warnings;
    warnings.retain(|warning| !warning.starts_with("fsync ") && !warning.starts_with("full_page_writes "));
    warnings
}

async fn set(database: &TestDatabase, setting: &str) {
    let alter = format!("ALTER DATABASE {} SET {setting}", database.name());
    database.client().await.batch_execute(&alter).await.unwrap();
}

#[tokio::test]
async fn a_good_server_is_taken_without_a_word() {
    let database = TestDatabase::create().await;
    assert_eq!(warnings(&database).await, [""; 0]);
    let findings = start(database.options()).await.unwrap();
    assert!(!findings.pooled);
    let sql = "SELECT current_setting('max_locks_per_transaction')::bigint
        * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint) / 2";
    let budget: i64 = database.client().await.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(i64::from(findings.lock_budget), budget);
}

#[tokio::test]
async fn settings_that_end_holders_or_lose_commits_are_warned_about() {
    let settings = [
        ("synchronous_commit", "off"),
        ("statement_timeout", "31s"),
        ("lock_timeout", "32s"),
        ("idle_in_transaction_session_timeout", "33s"),
        ("idle_session_timeout", "34s"),
        ("transaction_timeout", "35s"), // from 17 on
    ];
    let database = TestDatabase::create().await;
    let client = database.client().await;
    for (name, value) in settings {
        let known = client
            .query_opt("SELECT FROM pg_settings WHERE name = $1", &[&name])
            .await
            .unwrap();
        if known.is_none() {
            assert_eq!(name, "transaction_timeout");
            continue;
        }
        set(&database, &format!("{name} = '{value}'")).await;
        let warnings = warnings(&database).await;
        assert!(
            matches!(&warnings[..], [one] if one.starts_with(&format!("{name} is "))),
            "{warnings:?}"
        );
        let amount = value.replace('s', "000 ms");
        assert!(warnings[0].contains(&amount), "{warnings:?}");
        set(&database, &format!("{name} = DEFAULT")).await;
    }
    assert_eq!(self::warnings(&database).await, [""; 0]);
}

#[tokio::test]
async fn a_server_that_may_forget_is_warned_about() {
    let fast = Cluster::temporary()
        .set("fsync", "off")
        .set("full_page_writes", "off")
        .start()
        .unwrap();
    let options = ConnectOptions::parse(&fast.url("postgres"), None).unwrap();
    Migrations::storage().run(&options).await.unwrap();
    let warnings = start(options).await.unwrap().warnings;
    let [fsync, pages] = &warnings[..] else {
        panic!("{warnings:?}")
    };
    assert!(fsync.starts_with("fsync is off"), "{fsync}");
    assert!(pages.starts_with("full_page_writes is off"), "{pages}");
}

#[tokio::test]
async fn a_pool_that_the_server_has_no_room_for_is_warned_about() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let most: String = client
        .query_one("SHOW max_connections", &[])
        .await
        .unwrap()
        .get(0);
    let findings = Database::connect(database.options(), most.parse().unwrap())
        .await
        .unwrap()
        .findings()
        .clone();
    assert!(
        findings
            .warnings
            .iter()
            .any(|warning| warning.contains("max_connections")),
        "{findings:?}"
    );
}

#[tokio::test]
async fn a_pool_beyond_the_limit_of_its_role_is_warned_about() {
    let database = TestDatabase::create().await;
    let role = format!("role_{}", uuid::Uuid::new_v4().simple());
    let create = format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 5; GRANT pg_read_all_data TO {role}");
    database.client().await.batch_execute(&create).await.unwrap();
    let url = database.url().replace("user=postgres", &format!("user={role}"));
    let findings = start(ConnectOptions::parse(&url, None).unwrap()).await.unwrap();
    let warned = |text: &&String| text.contains("the CONNECTION LIMIT of the role lets in 5");
    assert_eq!(findings.warnings.iter().filter(warned).count(), 1, "{findings:?}");
}

#[tokio::test]
async fn a_schema_that_is_not_current_is_warned_about() {
    let database = TestDatabase::create_empty().await;
    let warnings = warnings(&database).await;
    assert!(
        matches!(&warnings[..], [one] if one.contains("leasehold migrate")),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn a_schema_that_this_version_cannot_work_with_is_refused() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    client
        .batch_execute(
            "INSERT INTO leasehold.migrations (component, version, name)
                 VALUES ('storage', '9999-01-01-000001', '9999-01-01-000001_from_the_future')",
        )
        .await
        .unwrap();
    assert_eq!(
        warnings(&database).await,
        [""; 0],
        "newer, but works with this version"
    );
    client
        .batch_execute(
            "UPDATE leasehold.settings SET value = '9999-01-01-000001' WHERE name = 'schema.storage.works_since'",
        )
        .await
        .unwrap();
    let error = start(database.options()).await.unwrap_err();
    assert!(matches!(error, StartupError::SchemaTooNew(_)), "{error:?}");
}

#[tokio::test]
async fn leases_that_a_crash_would_empty_are_refused() {
    let database = TestDatabase::create().await;
    database
        .client()
        .await
        .batch_execute("ALTER TABLE leasehold.leases SET UNLOGGED")
        .await
        .unwrap();
    let error = start(database.options()).await.unwrap_err();
    assert!(matches!(error, StartupError::UnloggedLeases), "{error:?}");
    assert!(error.to_string().contains("SET LOGGED"), "{error}");
}

#[tokio::test]
async fn an_encoding_other_than_utf8_is_refused() {
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let options = format!("TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        let database = TestDatabase::create_with(&options).await;
        let error = start(database.options()).await.unwrap_err();
        assert!(
            matches!(&error, StartupError::Encoding(found) if found == encoding),
            "{error:?}"
        );
    }
}

/// Sessions of our own ask for READ COMMITTED, whatever the database says; those of a pooler are not ours.
#[tokio::test]
async fn another_isolation_level_is_overridden_and_refused_behind_a_pooler() {
    let database = TestDatabase::create().await;
    set(&database, "default_transaction_isolation = 'repeatable read'").await;
    assert_eq!(warnings(&database).await, [""; 0]);
    let pooler = Pooler::start(&database, 3, Next::RoundRobin).await;
    let error = start(pooler.options()).await.unwrap_err();
    assert!(
        matches!(&error, StartupError::Isolation(level) if level == "repeatable read"),
        "{error:?}"
    );
    assert!(error.to_string().contains("ALTER DATABASE"), "{error}");
}

#[tokio::test]
async fn a_transaction_pooler_is_detected() {
    let database = TestDatabase::create().await;
    for (sessions, next) in [
        (1, Next::LastUsed),
        (2, Next::LastUsed),
        (2, Next::RoundRobin),
        (3, Next::RoundRobin),
        (4, Next::RoundRobin),
        (20, Next::RoundRobin),
        (20, Next::LastUsed),
    ] {
        let pooler = Pooler::start(&database, sessions, next).await;
        let findings = start(pooler.options()).await.unwrap();
        assert!(findings.pooled, "{sessions} sessions, {next:?}");
        let says = |text: &str| findings.warnings.iter().any(|warning| warning.contains(text));
        assert!(says("session locks are refused"), "{findings:?}");
        assert!(says("client_connection_check_interval is 0"), "{findings:?}");
    }
    let left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let left: i64 = database.client().await.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(left, 0, "the check leaves no lock in the pooler's sessions");
}

/// As providers set a database whose disk is full. A session keeps what was set when it began.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_read_only_for_a_while_is_used_again() {
    let database = TestDatabase::create().await;
    let client = database.client().await;
    let process = Database::connect(database.options(), POOL).await.unwrap();
    let name = LockName::new(["startup", "a"]).unwrap();
    let request = LockRequest::new(name, Holder::new("alice", "edit"));
    let (leases, sessions) = (process.leases(), process.session_locks());
    let end = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()";
    set(&database, "default_transaction_read_only = on").await;
    client.execute(end, &[]).await.unwrap();
    let refused = start(database.options()).await.unwrap_err();
    assert!(matches!(refused, StartupError::ReadOnly), "{refused:?}");
    let all = (0..POOL).map(|_| leases.try_acquire(&request));
    let (all, session) = tokio::join!(
        futures_util::future::join_all(all),
        sessions.try_acquire(&request)
    );
    assert!(
        all.iter().all(Result::is_err) && session.is_err(),
        "{all:?} {session:?}"
    );
    // Its own session may still write.
    let back = format!(
        "ALTER DATABASE {} RESET default_transaction_read_only",
        database.name()
    );
    client.batch_execute(&back).await.unwrap();
    eventually("there is a lease again", async || {
        leases.try_acquire(&request).await.is_ok()
    })
    .await;
    // On every connection that may have been made meanwhile.
    let all = (0..20).map(async |_| {
        let guard = leases.acquire(&request, PATIENCE).await?;
        leases.release(guard).await.ok();
        Ok::<_, AcquireError>(())
    });
    for done in futures_util::future::join_all(all).await {
        done.unwrap();
    }
    let session = sessions.acquire(&request, PATIENCE).await.unwrap();
    assert!(!session.is_lost());
}

#[tokio::test]
async fn a_standby_is_refused() {
    let folder = std::env::temp_dir().join(format!("leasehold-standby-{}", uuid::Uuid::new_v4().simple()));
    let cluster = || Cluster::persistent(&folder).durability(Durability::Fast);
    let primary = cluster().start().unwrap();
    let (home, url) = (primary.home().to_owned(), primary.url("postgres"));
    start(ConnectOptions::parse(&url, None).unwrap()).await.unwrap();
    drop(primary);
    // A server with this file in its data waits for a primary to follow, and lets readers in meanwhile.
    std::fs::write(home.join("data/standby.signal"), "").unwrap();
    let standby = cluster().start().unwrap();
    let error = start(ConnectOptions::parse(&standby.url("postgres"), None).unwrap())
        .await
        .unwrap_err();
    drop(standby);
    std::fs::remove_dir_all(&home).unwrap();
    std::fs::remove_dir_all(&folder).ok();
    assert!(matches!(error, StartupError::InRecovery), "{error:?}");
    assert!(error.to_string().contains("primary"), "{error}");
}

#[tokio::test]
async fn an_old_server_is_refused_by_its_version() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(version_13(client));
        }
    });
    let url = format!("postgres://any@127.0.0.1:{port}/any");
    let error = start(ConnectOptions::parse(&url, None).unwrap())
        .await
        .unwrap_err();
    server.abort();
    assert!(
        matches!(&error, StartupError::TooOld(version) if version == "13.23"),
        "{error:?}"
    );
    assert!(error.to_string().contains("14"), "{error}");
}

/// What a server of version 13 answers: it does not know the check of clients, and says its version.
async fn version_13(mut client: TcpStream) -> std::io::Result<()> {
    pooler::read_startup(&mut client).await?;
    let ready = pooler::message(b'Z', b"I");
    let greeting = [pooler::message(b'R', &0_u32.to_be_bytes()), ready.clone()].concat();
    client.write_all(&greeting).await?;
    while let Some((_, query)) = pooler::read(&mut client).await? {
        let shown = [
            (&b"SHOW server_version"[..], &b"\0\x01\0\0\0\x0513.23"[..]),
            (b"SHOW transaction_read_only", b"\0\x01\0\0\0\x03off"),
        ];
        let answer = if query.starts_with(b"SET client_connection_check_interval") {
            pooler::message(b'E', b"SERROR\0C42704\0Munrecognized configuration parameter\0\0")
        } else if let Some((_, row)) = shown.iter().find(|(show, _)| query.starts_with(show)) {
            [
                // One column of type text (25).
                pooler::message(
                    b'T',
                    b"\0\x01setting\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0",
                ),
                pooler::message(b'D', row),
                pooler::message(b'C', b"SHOW\0"),
            ]
            .concat()
        } else {
            pooler::message(b'C', b"SET\0")
        };
        client.write_all(&[answer, ready.clone()].concat()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told() {
    // Bound, but nobody listens any more.
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = format!("postgres://user:secret@127.0.0.1:{port}/any");
    let error = start(ConnectOptions::parse(&url, None).unwrap())
        .await
        .unwrap_err();
    assert!(matches!(error, StartupError::Connect(_)), "{error:?}");
    assert!(!format!("{error:?}").contains("secret"), "{error:?}");
}
