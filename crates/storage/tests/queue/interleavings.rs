//! Two statements on one item, one in a transaction that stays open while the other comes: every pair, in both orders,
//! committed and rolled back. Whether the second waits is asked of the server, never of the clock.

use std::sync::Arc;

use leasehold_domain::{Claim, WorkQueue};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{Bench, request, work};
use crate::support::eventually;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Statement {
    Complete,
    Retry,
    Fail,
    Requeue,
    Extend,
    Beat,
    /// A claim of whatever is free.
    Claim,
    Enqueue,
    Redrive,
    /// The removal of the tenant.
    Purge,
}

use Statement::{Beat, Claim as Reclaim, Complete, Enqueue, Extend, Fail, Purge, Redrive, Requeue, Retry};

const SETTLEMENTS: [Statement; 4] = [Complete, Retry, Fail, Requeue];

/// What a statement says of the claim that it was given, or what it has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Done,
    Changed,
    NotOwned,
    /// A beat that passed over the row.
    Busy,
    Claimed(i32),
    Nothing,
    Rows(u64),
}

use Answer::{Busy, Changed, Claimed, Done, NotOwned, Nothing, Rows};

async fn run(client: &Client, statement: Statement, claim: &Claim, letter: i64) -> Answer {
    let (ids, tokens) = (vec![claim.key.id.get()], vec![claim.key.token.as_uuid()]);
    let (delays, errors) = (vec![0_i64], vec!["error"]);
    let lease = 3_600_000_000_i64;
    let settled = match statement {
        Complete => {
            let sql = "SELECT done, changed FROM leasehold.complete_work($1, $2)";
            client.query_one(sql, &[&ids, &tokens]).await
        }
        Retry => {
            let sql = "SELECT done, changed FROM leasehold.put_work_back($1, $2, $3, $4, false)";
            client.query_one(sql, &[&ids, &tokens, &delays, &errors]).await
        }
        Requeue => {
            let sql = "SELECT done, changed FROM leasehold.put_work_back($1, $2, $3, '{NULL}', true)";
            client.query_one(sql, &[&ids, &tokens, &delays]).await
        }
        Fail => {
            let sql = "SELECT done, changed FROM leasehold.fail_work($1, $2, $3)";
            client.query_one(sql, &[&ids, &tokens, &errors]).await
        }
        Extend => {
            let sql = "SELECT extended, busy FROM leasehold.extend_work($1, $2, $3, true)";
            client.query_one(sql, &[&ids, &tokens, &lease]).await
        }
        Beat => {
            let sql = "SELECT extended, busy FROM leasehold.extend_work($1, $2, $3, false)";
            client.query_one(sql, &[&ids, &tokens, &lease]).await
        }
        Reclaim => {
            let sql = "SELECT attempt_count FROM leasehold.claim_work('{reindex}', 10, 'other', $1)";
            let rows = client.query(sql, &[&lease]).await.unwrap();
            return rows.first().map_or(Nothing, |row| Claimed(row.get(0)));
        }
        Enqueue => {
            // As the library does it, with one row.
            let sql = "INSERT INTO leasehold.work_items AS w
                           (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts)
                       VALUES ('acme', 'reindex', 'plan', '1', '\"new\"', 100, clock_timestamp(), 10)
                       ON CONFLICT ON CONSTRAINT work_items_one_a_scope DO UPDATE
                       SET generation = w.generation + 1, payload = excluded.payload";
            return Rows(client.execute(sql, &[]).await.unwrap());
        }
        Redrive => {
            let sql = "WITH letters AS (DELETE FROM leasehold.dead_letters WHERE id = $1 RETURNING *)
                       INSERT INTO leasehold.work_items AS w
                           (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts)
                       SELECT tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts
                       FROM letters
                       ON CONFLICT ON CONSTRAINT work_items_one_a_scope DO UPDATE SET generation = w.generation + 1";
            return Rows(client.execute(sql, &[&letter]).await.unwrap());
        }
        Purge => {
            let drain = "SELECT leasehold.drain_tenant('acme', 30000)";
            let drained = client.query_one(drain, &[]).await.unwrap();
            assert_eq!(drained.get::<_, &str>(0), "drained");
            let items = "DELETE FROM leasehold.work_items WHERE tenant_id = 'acme'";
            let items = client.execute(items, &[]).await.unwrap();
            let letters = "DELETE FROM leasehold.dead_letters WHERE tenant_id = 'acme'";
            client.execute(letters, &[]).await.unwrap();
            return Rows(items);
        }
    };
    let row = settled.unwrap();
    let (done, other): (Vec<Uuid>, Vec<Uuid>) = (row.get(0), row.get(1));
    match (done.len(), other.len(), statement) {
        (1, 0, _) => Done,
        (0, 1, Beat) => Busy,
        (0, 1, _) => Changed,
        (0, 0, _) => NotOwned,
        other => panic!("{other:?}"),
    }
}

/// What is left of the item.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Left {
    /// Its payload; `None` when it is no more.
    item: Option<String>,
    /// Whether the claim is still the first one, is that of the other, or is none.
    claim: &'static str,
    dead: i64,
}

struct Race {
    bench: Bench,
    clients: [Client; 2],
}

impl Race {
    async fn start() -> Arc<Self> {
        let bench = Bench::start().await;
        let clients = [bench.database.client().await, bench.database.client().await];
        Arc::new(Self { bench, clients })
    }

    /// One item, claimed; whether the lease is over is for the caller to say.
    async fn begin(&self, expired: bool) -> (Claim, i64) {
        let clear = "TRUNCATE leasehold.work_items, leasehold.work_claims, leasehold.dead_letters";
        self.bench.client.batch_execute(clear).await.unwrap();
        let queue = &self.bench.queue;
        // A letter of the same scope, to redrive.
        queue.enqueue(&work("1")).await.unwrap();
        let first = self.bench.take().await;
        let failure = leasehold_domain::Failure {
            claim: first.key,
            error: "error".to_owned(),
        };
        queue.fail(&[failure]).await.unwrap();
        let letter = self.bench.number("SELECT id FROM leasehold.dead_letters").await;
        queue
            .enqueue(&work("1").with_payload("old".into()))
            .await
            .unwrap();
        let claim = self.bench.take().await;
        if expired {
            let expire = "UPDATE leasehold.work_claims SET expires_at = clock_timestamp()";
            self.bench.client.batch_execute(expire).await.unwrap();
        }
        (claim, letter)
    }

    /// The first runs and stays open; the second comes; the first ends. Answers both, whether the second waited, and
    /// what is left.
    async fn run(
        self: &Arc<Self>,
        (first, second): (Statement, Statement),
        expired: bool,
        commits: bool,
    ) -> (Answer, Answer, bool, Left) {
        let (claim, letter) = self.begin(expired).await;
        let [one, two] = &self.clients;
        let mut pids = Vec::new();
        for client in [one, two] {
            let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap();
            pids.push(pid.get::<_, i32>(0));
        }
        one.batch_execute("BEGIN").await.unwrap();
        let answer = run(one, first, &claim, letter).await;
        let (this, of_second) = (Arc::clone(self), claim.clone());
        let running = tokio::spawn(async move { run(&this.clients[1], second, &of_second, letter).await });
        let mut waits = false;
        eventually("the second ends or waits", async || {
            let blocking = "SELECT $1 = ANY (pg_blocking_pids($2))";
            let row = self.bench.client.query_one(blocking, &[&pids[0], &pids[1]]).await;
            waits = row.unwrap().get(0);
            waits || running.is_finished()
        })
        .await;
        let end = if commits { "COMMIT" } else { "ROLLBACK" };
        one.batch_execute(end).await.unwrap();
        let second_answer = running.await.unwrap();
        (answer, second_answer, waits, self.left(&claim).await)
    }

    async fn left(&self, claim: &Claim) -> Left {
        let items = self
            .bench
            .client
            .query("SELECT payload::text FROM leasehold.work_items", &[])
            .await
            .unwrap();
        assert!(items.len() <= 1);
        let claims = self
            .bench
            .client
            .query(
                "SELECT token, expires_at > clock_timestamp() FROM leasehold.work_claims",
                &[],
            )
            .await
            .unwrap();
        assert!(claims.len() <= 1);
        let token = claims.first().and_then(|row| row.get::<_, Option<Uuid>>(0));
        let live = claims.first().is_some_and(|row| row.get(1));
        Left {
            item: items
                .first()
                .map(|row| row.get::<_, Option<String>>(0).unwrap_or_default()),
            claim: match token {
                None => "none",
                Some(token) if token == claim.key.token.as_uuid() && live => "first",
                Some(token) if token == claim.key.token.as_uuid() => "first, expired",
                Some(_) => "other",
            },
            dead: self
                .bench
                .number("SELECT count(*) FROM leasehold.dead_letters")
                .await,
        }
    }

    /// Whatever happened, an item that is there and that nobody has can be claimed.
    async fn can_be_claimed(&self) -> bool {
        let claimed = self.bench.queue.claim(&request().with_batch(10)).await.unwrap();
        claimed.claims.len() == 1
    }
}

fn left(item: &str, claim: &'static str, dead: i64) -> Left {
    Left {
        item: (item != "gone").then(|| {
            if item.is_empty() {
                String::new()
            } else {
                format!("\"{item}\"")
            }
        }),
        claim,
        dead,
    }
}

/// Somebody claims the item again while the former claim is being settled or extended, or the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn settlements_and_extensions_race_with_the_next_claim() {
    let race = Race::start().await;
    for statement in SETTLEMENTS.into_iter().chain([Extend]) {
        // The next claim is under way: the former waits for it, and finds itself replaced.
        let taken = race.run((Reclaim, statement), true, true).await;
        let expected = (Claimed(2), NotOwned, true, left("old", "other", 1));
        assert_eq!(taken, expected, "{statement:?} after a claim");
    }
    for statement in SETTLEMENTS {
        // The next claim did not come about: the former ends as it should, but looks at the item once more.
        let dead = 1 + i64::from(statement == Fail);
        let kept = race.run((Reclaim, statement), true, false).await;
        let expected = (Claimed(2), Changed, true, left("old", "none", dead));
        assert_eq!(kept, expected, "{statement:?} after no claim");
        assert!(race.can_be_claimed().await, "{statement:?}");

        // The former claim is being ended: nobody takes the item, or waits for it.
        let item = match statement {
            Complete | Fail => "gone",
            _ => "old",
        };
        let ended = race.run((statement, Reclaim), true, true).await;
        let expected = (Done, Nothing, false, left(item, "none", dead));
        assert_eq!(ended, expected, "{statement:?} before a claim");
        assert_eq!(race.can_be_claimed().await, item != "gone", "{statement:?}");

        let kept = race.run((statement, Reclaim), true, false).await;
        let expected = (Done, Nothing, false, left("old", "first, expired", 1));
        assert_eq!(kept, expected, "{statement:?} undone before a claim");
        assert!(race.can_be_claimed().await, "{statement:?}");
    }
    let kept = race.run((Reclaim, Extend), true, false).await;
    assert_eq!(kept, (Claimed(2), Done, true, left("old", "first", 1)));
    let extended = race.run((Extend, Reclaim), true, true).await;
    assert_eq!(extended, (Done, Nothing, false, left("old", "first", 1)));
    let undone = race.run((Extend, Reclaim), true, false).await;
    assert_eq!(undone, (Done, Nothing, false, left("old", "first, expired", 1)));
    assert!(race.can_be_claimed().await);
}

/// A heartbeat waits for nobody, and passes over what somebody else has locked.
#[tokio::test(flavor = "multi_thread")]
async fn beats_wait_for_nobody() {
    let race = Race::start().await;
    for commits in [true, false] {
        for first in SETTLEMENTS.into_iter().chain([Extend]) {
            let beaten = race.run((first, Beat), false, commits).await;
            assert_eq!((beaten.0, beaten.1, beaten.2), (Done, Busy, false), "{first:?}");
        }
        for first in [Enqueue, Redrive, Purge] {
            let beaten = race.run((first, Beat), false, commits).await;
            assert_eq!((beaten.1, beaten.2), (Done, false), "{first:?}");
        }
        let beaten = race.run((Reclaim, Beat), true, commits).await;
        assert_eq!((beaten.0, beaten.1, beaten.2), (Claimed(2), Busy, false));
    }
}

/// An enqueue or a redrive comes while a claim is being ended, or the other way round: it is never lost.
#[tokio::test(flavor = "multi_thread")]
async fn settlements_race_with_enqueues() {
    let race = Race::start().await;
    for (enqueue, letters) in [(Enqueue, 1), (Redrive, 0)] {
        for statement in SETTLEMENTS {
            let payload = |enqueued: bool| {
                if enqueue == Enqueue && enqueued {
                    "new"
                } else {
                    "old"
                }
            };
            let dead = i64::from(statement == Fail);

            // An open transaction that has enqueued holds up no settlement; the item is looked at again.
            let changed = race.run((enqueue, statement), false, true).await;
            let expected = (
                Rows(1),
                Changed,
                false,
                left(payload(true), "none", letters + dead),
            );
            assert_eq!(changed, expected, "{statement:?} during {enqueue:?}");
            assert!(race.can_be_claimed().await, "{statement:?} during {enqueue:?}");
            let undone = race.run((enqueue, statement), false, false).await;
            let expected = (Rows(1), Changed, false, left("old", "none", 1 + dead));
            assert_eq!(undone, expected, "{statement:?} during {enqueue:?}, undone");
            assert!(race.can_be_claimed().await, "{statement:?} during {enqueue:?}");

            // A settlement that is not committed is waited for, and what comes after it is a new item or a new event.
            let after = race.run((statement, enqueue), false, true).await;
            let gone = matches!(statement, Complete | Fail);
            let item = if gone && enqueue == Redrive {
                ""
            } else {
                payload(true)
            };
            let expected = (Done, Rows(1), true, left(item, "none", letters + dead));
            assert_eq!(after, expected, "{enqueue:?} during {statement:?}");
            assert!(race.can_be_claimed().await, "{enqueue:?} during {statement:?}");
            let undone = race.run((statement, enqueue), false, false).await;
            let expected = (Done, Rows(1), true, left(payload(true), "first", letters));
            assert_eq!(undone, expected, "{enqueue:?} during {statement:?}, undone");
        }
    }
}

/// Two claims of one item, and a claim while somebody enqueues: none waits, and one of them has it in the end.
#[tokio::test(flavor = "multi_thread")]
async fn claims_wait_for_nobody() {
    let race = Race::start().await;
    for commits in [true, false] {
        let twice = race.run((Reclaim, Reclaim), true, commits).await;
        assert_eq!((twice.0, twice.1, twice.2), (Claimed(2), Nothing, false));
        assert_eq!(race.can_be_claimed().await, !commits);
        for first in [Enqueue, Redrive, Purge] {
            let passed = race.run((first, Reclaim), true, commits).await;
            assert_eq!((passed.1, passed.2), (Nothing, false), "{first:?}");
            let gone = first == Purge && commits;
            assert_eq!(race.can_be_claimed().await, !gone, "{first:?}");
        }
    }
    for second in [Enqueue, Redrive] {
        let merged = race.run((Reclaim, second), true, true).await;
        assert_eq!((merged.0, merged.1, merged.2), (Claimed(2), Rows(1), true));
        assert_eq!(merged.3.claim, "other");
    }
}

/// The same claim is ended twice at the same time: it ends once.
#[tokio::test(flavor = "multi_thread")]
async fn settlements_race_with_each_other() {
    let race = Race::start().await;
    for first in SETTLEMENTS {
        for second in SETTLEMENTS {
            let both = race.run((first, second), false, true).await;
            assert_eq!(
                (both.0, both.1, both.2),
                (Done, NotOwned, true),
                "{first:?}, {second:?}"
            );
            let last = race.run((first, second), false, false).await;
            assert_eq!(
                (last.0, last.1, last.2),
                (Done, Changed, true),
                "{first:?}, {second:?}"
            );
            assert!(race.can_be_claimed().await);
        }
    }
}

/// A tenant is removed while a claim is being ended, or the other way round: nothing of it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn settlements_race_with_a_purge() {
    let race = Race::start().await;
    for statement in SETTLEMENTS {
        let purged = race.run((Purge, statement), false, true).await;
        assert_eq!(
            (purged.0, purged.1, purged.2),
            (Rows(1), Changed, false),
            "{statement:?}"
        );
        assert_eq!((purged.3.item, purged.3.dead), (None, 0), "{statement:?}");
        let after = race.run((statement, Purge), false, true).await;
        let gone = matches!(statement, Complete | Fail);
        assert_eq!((after.0, after.1, after.2), (Done, Rows(u64::from(!gone)), true));
        assert_eq!((after.3.item, after.3.dead), (None, 0), "{statement:?}");
        assert!(!race.can_be_claimed().await);
    }
}
