//! `leasehold queue` and `leasehold jobs` beside a running service: what they print, for people and for programs, what
//! they change, and how they refuse.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use leasehold_domain::{ClaimRequest, Failure, NewWork, Scope, WorkQueue};
use leasehold_storage::Database;
use leasehold_system_tests::database::TestDatabase;
use leasehold_system_tests::http::{get, post};
use leasehold_system_tests::patience::{eventually, in_time};
use leasehold_system_tests::secrets;
use leasehold_system_tests::service::command;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::world::World;

const HEALTH: &str = "webhook-health";
/// Nobody in the service does such work.
const KIND: &str = "reindex";

/// How a command ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ended {
    /// What it printed, where nothing went wrong.
    #[track_caller]
    fn printed(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self:?}");
        self.out
    }

    #[track_caller]
    fn json(self) -> Value {
        serde_json::from_str(&self.printed()).unwrap()
    }

    /// It printed nothing, and said why.
    #[track_caller]
    fn refused(self, code: i32, why: &str) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{self:?}");
        assert!(self.err.contains(why), "{why:?} {self:?}");
    }
}

async fn ended(mut command: Command) -> Ended {
    // Postgres has no disk to sync to, which the start warns about.
    command.env("RUST_LOG", "error");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = in_time("the end of a command", output).await.unwrap();
    let text = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        secrets::assert_none("what a command says", &text);
        text
    };
    Ended {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// Runs `leasehold` with these words, on the database of the service.
async fn leasehold(world: &World, words: &str) -> Ended {
    let mut command = command(Some(world.database.url()));
    command.args(words.split_whitespace());
    ended(command).await
}

/// Work of these tenants of which the first `dead` items are given up for this reason.
async fn work(world: &World, of: &[(&str, &str)], dead: usize, why: &str) {
    let process = Database::connect(world.database.options(), 2).await.unwrap();
    let queue = process.work_queue();
    let new: Vec<_> = of
        .iter()
        .map(|(tenant, id)| {
            NewWork::new(Scope::new(*tenant, KIND, "plan", *id)).with_payload(json!({"of": tenant}))
        })
        .collect();
    queue.enqueue_many(&new).await.unwrap();
    if dead > 0 {
        let request = ClaimRequest::new([KIND], "test").with_batch(dead);
        let claims = queue.claim(&request).await.unwrap().claims;
        assert_eq!(claims.len(), dead);
        let failures: Vec<_> = claims
            .iter()
            .map(|claim| Failure {
                claim: claim.key,
                error: why.to_owned(),
            })
            .collect();
        queue.fail(&failures).await.unwrap();
    }
    process.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_stats_says_how_much_there_is_of_each_kind() {
    let world = World::start("lease").await;
    // Nothing is to be done, once what made the world has been told.
    eventually("no events are left", async || {
        leasehold(&world, "queue stats --json").await.json() == json!({"kinds": []})
    })
    .await;
    assert_eq!(leasehold(&world, "queue stats").await.printed(), "");

    work(&world, &[("acme", "1"), ("acme", "2"), ("acme", "3")], 1, "no").await;
    let stats = leasehold(&world, "queue stats --json").await.json();
    let kind = &stats["kinds"][0];
    let oldest = kind["oldest_ready_seconds"].as_f64().unwrap();
    assert!((0.0..60.0).contains(&oldest), "{stats}");
    assert_eq!(
        stats,
        json!({"kinds": [{
            "kind": KIND, "ready": 2, "delayed": 0, "claimed": 0, "dead": 1,
            "oldest_ready_seconds": kind["oldest_ready_seconds"],
        }]})
    );
    let served = world.api.send(get("/v1/queue/stats")).await.expect(200).json();
    assert_eq!(members(&served["kinds"][0]), members(kind));

    let text = leasehold(&world, "queue stats").await.printed();
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in ["reindex  ready 2 (oldest ", "delayed 0", "claimed 0", "dead 1"] {
        assert!(text.contains(part), "{text}");
    }
}

fn members(object: &Value) -> Vec<&String> {
    object.as_object().unwrap().keys().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_oldest_first_one_on_a_line_and_driven_again() {
    let world = World::start("lease").await;
    let tenant = json!({"id": "globex"});
    world.api.send(post("/v1/tenants", &tenant)).await.expect(201);
    let why = "it cannot be done:\nsee\tthe \u{1b}[31mlog";
    work(
        &world,
        &[("acme", "1"), ("acme", "2\nnew"), ("globex", "3")],
        3,
        why,
    )
    .await;

    let letters = leasehold(&world, "queue dead-letters --json").await.json();
    let letters = letters.as_array().unwrap();
    let scopes: Vec<_> = letters.iter().map(|letter| &letter["scope_id"]).collect();
    assert_eq!(scopes, ["1", "2\nnew", "3"]);
    let (id, failed_at) = (&letters[0]["id"], &letters[0]["failed_at"]);
    assert_eq!(
        letters[0],
        json!({
            "tenant_id": "acme", "id": id, "kind": KIND, "scope_type": "plan", "scope_id": "1", "state": "dead",
            "priority": 100, "attempt_count": 1, "not_before": null, "last_error": why, "failed_at": failed_at,
            "payload": {"of": "acme"},
        })
    );
    let own = leasehold(&world, "queue dead-letters --json --tenant acme")
        .await
        .json();
    assert_eq!(own, json!([letters[0], letters[1]]));

    let text = leasehold(&world, "queue dead-letters").await.printed();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    let whole = "after 1 attempts: it cannot be done:\\nsee\\tthe \\u{1b}[31mlog";
    let failed_at = failed_at.as_str().unwrap();
    assert_eq!(lines[0], format!("{id}  acme  reindex  1  {failed_at}  {whole}"));
    assert!(lines[1].contains("  acme  reindex  2\\nnew  "), "{text}");
    let text = leasehold(&world, "queue dead-letters --tenant globex")
        .await
        .printed();
    assert_eq!(text.lines().collect::<Vec<_>>(), [lines[2]]);

    // Those of another tenant, and those that are not there, do not count.
    let (second, third) = (&letters[1]["id"], &letters[2]["id"]);
    let redrive = format!("queue redrive --tenant acme {id} {second} {third} {id} 999999");
    assert_eq!(leasehold(&world, &redrive).await.printed(), "2\n");
    let left = leasehold(&world, "queue dead-letters --json").await.json();
    assert_eq!(left, json!([letters[2]]));
    let items = world
        .api
        .send(get("/v1/tenants/acme/work-items"))
        .await
        .expect(200);
    let items = items.json();
    let again: Vec<_> = items["items"].as_array().unwrap().iter().collect();
    let seen: Vec<_> = again
        .iter()
        .map(|item| (item["scope_id"].as_str().unwrap(), item["attempt_count"].as_i64()))
        .collect();
    assert_eq!(seen, [("1", Some(0)), ("2\nnew", Some(0))], "{items}");
    leasehold(&world, &redrive)
        .await
        .refused(1, "the tenant acme has no such dead letters");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_of_a_tenant_that_is_drained_waits() {
    let world = World::start("lease").await;
    work(&world, &[("acme", "1")], 1, "no").await;
    let letters = leasehold(&world, "queue dead-letters --json").await.json();
    let redrive = format!("queue redrive --tenant acme {}", letters[0]["id"]);
    let gate = "BEGIN; SELECT pg_advisory_xact_lock(leasehold.tenant_write_key('acme'))";
    world.client.batch_execute(gate).await.unwrap();
    leasehold(&world, &redrive).await.refused(1, "acme");
    assert_eq!(
        leasehold(&world, "queue dead-letters --json").await.json(),
        letters
    );
    world.client.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(leasehold(&world, &redrive).await.printed(), "1\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_listed_run_paused_and_resumed() {
    let mut world = World::start("lease").await;
    let jobs = async || leasehold(&world, "jobs list --json").await.json();
    let served = world.api.send(get("/v1/jobs")).await.expect(200).json();
    assert_eq!(jobs().await, served["items"]);
    assert_eq!(served["items"][0]["name"], HEALTH);
    let text = leasehold(&world, "jobs list").await.printed();
    let next = served["items"][0]["next_slot"].as_str().unwrap();
    assert_eq!(
        text,
        format!("{HEALTH}  every 30m UTC  next {next}  has not run\n")
    );

    // An instance of the service does it.
    let asked = leasehold(&world, &format!("jobs run {HEALTH}")).await.printed();
    let id = asked.strip_suffix('\n').unwrap();
    assert!(Uuid::parse_str(id).is_ok(), "{id:?}");
    eventually("the run is over", async || {
        let last = &jobs().await[0]["last_run"];
        last["run_id"] == id && last["outcome"] == "succeeded"
    })
    .await;
    let text = leasehold(&world, "jobs list").await.printed();
    assert!(text.contains("  succeeded "), "{text}");

    assert_eq!(
        leasehold(&world, &format!("jobs pause {HEALTH}")).await.printed(),
        ""
    );
    assert_eq!(jobs().await[0]["paused"], true);
    let text = leasehold(&world, "jobs list").await.printed();
    assert!(text.contains("  paused  "), "{text}");
    leasehold(&world, &format!("jobs run {HEALTH}"))
        .await
        .refused(1, "is paused: resume it first");
    assert_eq!(
        leasehold(&world, &format!("jobs resume {HEALTH}"))
            .await
            .printed(),
        ""
    );
    assert_eq!(jobs().await[0]["paused"], false);

    // Nobody is there to begin it: it is about to run, for as long as that takes.
    assert!(world.service.stop().await.success());
    leasehold(&world, &format!("jobs run {HEALTH}")).await.printed();
    leasehold(&world, &format!("jobs run {HEALTH}"))
        .await
        .refused(1, "runs already, or is about to");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_usage_and_unknown_names_are_refused() {
    let world = World::start("lease").await;
    for (words, says) in [
        ("queue", "Usage: leasehold queue"),
        ("queue nothing", "nothing"),
        ("queue stats --tenant acme", "--tenant"),
        ("queue dead-letters --tenant ACME", "1 to 63"),
        ("queue redrive 1", "--tenant"),
        ("queue redrive --tenant acme", "<IDS>"),
        ("queue redrive --tenant acme first", "first"),
        ("jobs", "Usage: leasehold jobs"),
        ("jobs nothing", "nothing"),
        ("jobs run", "<JOB>"),
        ("jobs pause one two", "two"),
        ("jobs list --jsn", "--jsn"),
    ] {
        leasehold(&world, words).await.refused(64, says);
    }
    for words in ["run", "pause", "resume"] {
        leasehold(&world, &format!("jobs {words} nothing"))
            .await
            .refused(1, "there is no job nothing");
    }
    leasehold(&world, "queue redrive --tenant nobody 1")
        .await
        .refused(1, "the tenant nobody has no such dead letters");
    let empty = leasehold(&world, "queue dead-letters --tenant nobody").await;
    assert_eq!(empty.printed(), "");
}

/// Commands of a project that nobody has served yet, on its own Postgres.
#[tokio::test(flavor = "multi_thread")]
async fn commands_bring_a_new_private_server_up_to_date() {
    for words in [["queue", "stats"], ["jobs", "list"]] {
        let folder = std::env::temp_dir().join(format!("leasehold-commands-{}", Uuid::new_v4().simple()));
        fs::create_dir(&folder).unwrap();
        // The account that the database runs as must be able to pass.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = command(None);
        command.args(words).current_dir(&folder);
        let ended = ended(command).await;
        drop(fs::remove_dir_all(&folder));
        assert_eq!(ended.printed(), "", "{words:?}");
    }
}

/// Whoever meets a database that nobody has migrated is told what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_not_current_is_told() {
    let database = TestDatabase::create_empty().await;
    for (words, code) in [
        ("keys list", 1),
        ("locks list", 1),
        ("jobs list", 1),
        ("queue stats", 1),
        ("run --name a -- true", 69),
    ] {
        let mut command = command(Some(database.url()));
        command.args(words.split_whitespace());
        ended(command).await.refused(code, "run `leasehold migrate`");
    }
}
