//! The first minute: the program alone in an empty folder, the lines that it prints, and the second start.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use leasehold_system_tests::http::{Api, get};
use leasehold_system_tests::patience::eventually;
use leasehold_system_tests::service::Service;
use serde_json::Value;
use uuid::Uuid;

/// An empty folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Self {
        let path = std::env::temp_dir().join(format!("leasehold-first-minute-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&path).unwrap();
        // The account that the database runs as must be able to pass.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The commands among the printed lines, each whole, with what was said above it.
fn curl_commands(output: &[String]) -> Vec<(String, String)> {
    let (mut commands, mut said) = (Vec::new(), String::new());
    let mut lines = output.iter();
    while let Some(line) = lines.next() {
        if !line.trim_start().starts_with("curl ") {
            if !line.trim().is_empty() {
                said.clone_from(line);
            }
            continue;
        }
        let mut command = line.clone();
        while command.ends_with('\\') {
            command.push('\n');
            command.push_str(lines.next().unwrap());
        }
        commands.push((said.clone(), command));
    }
    commands
}

/// Pastes a printed line into a shell. Answers the status and the body.
async fn paste(command: &str) -> (u16, Value) {
    let script = format!("{} -s -w '\\n%{{http_code}}'", command.trim());
    let output = tokio::task::spawn_blocking(move || {
        Command::new("sh")
            .args(["-c", &script])
            .env("no_proxy", "*")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    })
    .await
    .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text
        .rsplit_once('\n')
        .unwrap_or_else(|| panic!("{text:?} {:?}", output.stderr));
    (status.parse().unwrap(), serde_json::from_str(body).unwrap())
}

fn key(output: &[String]) -> String {
    let mut words = output.iter().flat_map(|line| line.split_whitespace());
    words.find(|word| word.starts_with("lh_")).unwrap().to_owned()
}

fn api(service: &Service) -> Api {
    service.api(&key(&service.output()))
}

async fn version(service: &Service) -> i64 {
    let workspace = api(service)
        .send(get("/v1/tenants/demo/workspaces/main"))
        .await
        .expect(200)
        .json();
    workspace["version"].as_i64().unwrap()
}

/// Pastes all that is printed, and checks that it does what is said.
async fn follow_the_printed_lines(service: &Service) {
    eventually("all is printed", async || {
        curl_commands(&service.output()).len() >= 3
    })
    .await;
    // The service itself takes the workspace that is held, some moments after it listens.
    eventually("the demo holds its workspace", async || {
        api(service)
            .send(get("/v1/tenants/demo/workspaces/held/lock"))
            .await
            .status
            == 200
    })
    .await;
    let before = version(service).await;
    let commands = curl_commands(&service.output());
    let (mut written, mut refused, mut purged) = (0, 0, 0);
    for (said, command) in &commands {
        let (status, body) = paste(command).await;
        match status {
            200 if body["deleted"].is_object() => {
                purged += 1;
                assert_eq!(body["tenant_id"], "demo-old", "{said}");
                assert_eq!(
                    body["deleted"]["workspaces"], 1,
                    "each start fills it again: {body}"
                );
                assert_eq!(body["deleted"]["feedback_records"], 3, "{body}");
            }
            200 => {
                written += 1;
                assert_eq!(body["version"], before + written, "{said}");
            }
            409 => {
                refused += 1;
                assert_eq!(body["code"], "workspace_locked", "{said}");
                assert_eq!(body["lock"]["locked_by"], "demo", "{body}");
                assert_eq!(body["lock"]["operation"], "demo: a long edit", "{body}");
            }
            _ => panic!("{said}: {status} {body}"),
        }
    }
    assert_eq!((written, refused, purged), (1, 1, 1), "{commands:?}");
}

async fn start(folder: &Path) -> Service {
    Service::private_in(folder).start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn heavy_the_first_minute() {
    let folder = Folder::create();
    // Nothing is there: it brings everything.
    let mut service = start(&folder.0).await;
    follow_the_printed_lines(&service).await;
    assert_eq!(version(&service).await, 1);
    let status = service.stop().await;
    assert!(status.success(), "{status}");

    // The second start finds its data.
    let mut service = start(&folder.0).await;
    assert_eq!(version(&service).await, 1);
    follow_the_printed_lines(&service).await;

    // Killed, it leaves nothing that the next start does not clean up: not its server, not the demo's lock.
    service.kill();
    let mut service = start(&folder.0).await;
    assert_eq!(version(&service).await, 2);
    follow_the_printed_lines(&service).await;
    assert_eq!(version(&service).await, 3);
    let status = service.stop().await;
    assert!(status.success(), "{status}");
}
