//! TLS against a server that speaks it: what each mode takes, and what it refuses.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use leasehold_embedded::Cluster;
use leasehold_storage::{ConnectOptions, Database, StartupError, TlsMode};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::{client, eventually};

/// A server with a certificate for `localhost`, and the file with the authority that signed it.
struct Server {
    cluster: Cluster,
    port: u16,
    admin: Client,
}

impl Server {
    async fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let cluster = Cluster::temporary()
            .set("listen_addresses", "127.0.0.1")
            .set("port", port.to_string())
            .start()
            .unwrap();
        // The port is part of the socket's name as well.
        let url = cluster
            .url("postgres")
            .replace("port=5432", &format!("port={port}"));
        Self {
            admin: client(&url).await,
            cluster,
            port,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.cluster.home().join(name)
    }

    /// Writes a file that the server's account owns and nobody else reads.
    fn write(&self, name: &str, content: &str) {
        let (path, owner) = (self.file(name), fs::metadata(self.cluster.home()).unwrap());
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    /// Gives the server its certificate.
    async fn enable(&self) {
        let (authority, other) = (authority(), authority());
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned()];
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &authority.issuer)
            .unwrap();
        self.write("server.pem", &certificate.pem());
        self.write("server.key", &key.serialize_pem());
        self.write("authority.pem", &authority.pem);
        self.write("other.pem", &other.pem);
        for (name, file) in [("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key")] {
            let path = self.file(file);
            let set = format!("ALTER SYSTEM SET {name} = '{}'", path.display());
            self.admin.batch_execute(&set).await.unwrap();
        }
        self.admin
            .batch_execute("ALTER SYSTEM SET ssl = on")
            .await
            .unwrap();
        self.admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        eventually("the server speaks TLS", async || {
            let ssl: String = self.admin.query_one("SHOW ssl", &[]).await.unwrap().get(0);
            ssl == "on"
        })
        .await;
    }

    /// Whether the connections of a process that starts with these settings are encrypted.
    async fn connect(&self, host: &str, settings: &str, mode: Option<TlsMode>) -> Result<bool, StartupError> {
        let url = format!("postgres://postgres@{host}:{}/postgres?{settings}", self.port);
        let name = format!("tls {}", Uuid::new_v4());
        let options = ConnectOptions::parse(&url, mode)
            .unwrap()
            .with_application_name(&name);
        let database = Database::connect(options, 2).await?;
        database
            .read(async |_| Ok::<_, diesel::result::Error>(()))
            .await
            .unwrap();
        let sql = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
            WHERE application_name = $1 AND datname IS NOT NULL";
        let encrypted: Option<bool> = self.admin.query_one(sql, &[&name]).await.unwrap().get(0);
        Ok(encrypted.expect("the pool has a connection"))
    }
}

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority {
        pem,
        issuer: Issuer::new(params, key),
    }
}

fn verified_by(file: &Path) -> String {
    format!("sslmode=verify-full&sslrootcert={}", file.display())
}

#[tokio::test]
async fn each_mode_takes_what_it_promises_and_nothing_less() {
    let server = Server::start().await;
    let without = server.connect("localhost", "sslmode=require", None).await;
    assert!(
        matches!(without, Err(StartupError::Connect(_))),
        "no TLS, no connection: {without:?}"
    );

    let library: String = server
        .admin
        .query_one("SHOW ssl_library", &[])
        .await
        .unwrap()
        .get(0);
    if library.is_empty() {
        return; // this server was built without TLS
    }
    server.enable().await;
    let (authority, other) = (server.file("authority.pem"), server.file("other.pem"));

    let trusted = server.connect("localhost", &verified_by(&authority), None).await;
    assert!(trusted.unwrap(), "signed by the authority, for this name");
    let implied = format!("sslrootcert={}", authority.display());
    assert!(
        server.connect("localhost", &implied, None).await.unwrap(),
        "who names roots wants them used"
    );

    let by_other = server.connect("localhost", &verified_by(&other), None).await;
    assert!(
        matches!(by_other, Err(StartupError::Connect(_))),
        "signed by somebody else: {by_other:?}"
    );
    let other_name = server.connect("127.0.0.1", &verified_by(&authority), None).await;
    assert!(
        matches!(other_name, Err(StartupError::Connect(_))),
        "for another name: {other_name:?}"
    );

    assert!(
        server
            .connect("127.0.0.1", "sslmode=require", None)
            .await
            .unwrap(),
        "any certificate"
    );
    assert!(
        !server
            .connect("localhost", "sslmode=disable", None)
            .await
            .unwrap()
    );
    assert!(
        !server.connect("localhost", "", None).await.unwrap(),
        "loopback: none by default"
    );

    let overruled = server
        .connect("localhost", "sslmode=disable", Some(TlsMode::Require))
        .await;
    assert!(overruled.unwrap(), "the caller's mode wins");
}
