//! [`MemoryQueue`]: a work queue in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::MemoryClock;
use crate::queue::{check_delay, check_lease, kept_error};
use crate::{
    Claim, ClaimKey, ClaimRequest, ClaimToken, Claimed, DeadLetter, Failure, KindStats, Monotonic,
    MonotonicClock, NewWork, Outcome, Page, QueueError, Requeue, Retention, Retry, Scope, WorkId, WorkItem,
    WorkQueue, WorkState,
};

/// A queue in memory, on a clock that moves only when told. Clones share it.
///
/// It keeps the promises of the queue on Postgres, so that code which enqueues or works can be tested without one.
#[derive(Clone, Debug, Default)]
pub struct MemoryQueue {
    clock: Arc<MemoryClock>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    last_id: i64,
    items: BTreeMap<WorkId, Item>,
    dead: BTreeMap<i64, DeadLetter>,
}

#[derive(Debug)]
struct Item {
    work: NewWork,
    event_at: DateTime<Utc>,
    /// Grows with each enqueue.
    generation: u64,
    /// Who has it, or since when it waits for its next try.
    hold: Option<Hold>,
}

#[derive(Clone, Debug)]
struct Hold {
    /// `None` when nobody works on it: it waits.
    claimed: Option<(ClaimToken, String)>,
    /// The item's when it was claimed.
    generation: u64,
    expires: Monotonic,
    attempts: u32,
    last_error: Option<String>,
}

impl Hold {
    /// What went wrong, for somebody who finds the hold expired.
    fn error_if_expired(&self) -> Option<String> {
        match &self.claimed {
            Some((_, worker)) => Some(format!("not finished by {worker}")),
            None => self.last_error.clone(),
        }
    }
}

impl Item {
    fn state(&self, now: Monotonic) -> WorkState {
        match &self.hold {
            Some(hold) if now < hold.expires && hold.claimed.is_some() => WorkState::Claimed,
            Some(hold) if now < hold.expires => WorkState::Delayed,
            _ => WorkState::Ready,
        }
    }

    fn order(&self, id: WorkId) -> (i32, DateTime<Utc>, WorkId) {
        (self.work.priority(), self.event_at, id)
    }

    fn letter(&self, id: i64, hold: &Hold, error: String, failed_at: DateTime<Utc>) -> DeadLetter {
        DeadLetter {
            id,
            scope: self.work.scope().clone(),
            payload: self.work.payload().cloned(),
            priority: self.work.priority(),
            event_at: self.event_at,
            attempt_count: hold.attempts,
            max_attempts: self.work.max_attempts(),
            last_error: error,
            failed_at,
        }
    }
}

impl State {
    fn next_id(&mut self) -> i64 {
        self.last_id += 1;
        self.last_id
    }

    /// Merges into the item of the scope, which keeps its payload when it is the newer one.
    fn merge(&mut self, work: &NewWork, now: DateTime<Utc>, payload_wins: bool) {
        let event_at = work.event_at().unwrap_or(now);
        let found = self
            .items
            .values_mut()
            .find(|item| item.work.scope() == work.scope());
        if let Some(item) = found {
            let last = if payload_wins {
                work.clone()
            } else {
                item.work.clone()
            };
            item.work = last.with_priority(work.priority().min(item.work.priority()));
            item.event_at = item.event_at.max(event_at);
            item.generation += 1;
        } else {
            let id = WorkId::new(self.next_id());
            let item = Item {
                work: work.clone(),
                event_at,
                generation: 1,
                hold: None,
            };
            self.items.insert(id, item);
        }
    }

    /// What became of the item and its hold, for whoever has this claim.
    fn settle(
        &mut self,
        claim: ClaimKey,
        ended: impl FnOnce(&mut Self, Item, Hold) -> Option<Item>,
    ) -> Outcome {
        let Some(mut item) = self.items.remove(&claim.id) else {
            return Outcome::NotOwned;
        };
        let ours = |hold: &Hold| {
            hold.claimed
                .as_ref()
                .is_some_and(|(token, _)| *token == claim.token)
        };
        let Some(hold) = item.hold.take_if(|hold| ours(hold)) else {
            self.items.insert(claim.id, item);
            return Outcome::NotOwned;
        };
        let changed = item.generation != hold.generation;
        let again = Item {
            work: item.work.clone(),
            hold: None,
            ..item
        };
        let left = ended(self, item, hold);
        if changed {
            self.items.insert(claim.id, again);
            return Outcome::DoneButChanged;
        }
        if let Some(item) = left {
            self.items.insert(claim.id, item);
        }
        Outcome::Done
    }
}

impl MemoryQueue {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// The clock, to look at.
    pub fn clock(&self) -> &MemoryClock {
        &self.clock
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// Ends the lease of a claim now, as if no heartbeat had come. Answers whether it had one.
    pub fn expire(&self, claim: ClaimKey) -> bool {
        let now = self.clock.now();
        let mut state = self.state();
        let hold = state.items.get_mut(&claim.id).and_then(|item| item.hold.as_mut());
        let Some(hold) = hold else { return false };
        hold.expires = hold.expires.min(now);
        hold.claimed.is_some()
    }

    /// Removes all items of a tenant, whoever has them, and its dead letters.
    pub fn purge_tenant(&self, tenant: &str) {
        let mut state = self.state();
        state.items.retain(|_, item| item.work.scope().tenant != tenant);
        state.dead.retain(|_, letter| letter.scope.tenant != tenant);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn on_page(page: &Page, scope: &Scope) -> bool {
    page.tenant.as_ref().is_none_or(|tenant| *tenant == scope.tenant)
        && page.kind.as_ref().is_none_or(|kind| *kind == scope.kind)
}

#[async_trait]
impl WorkQueue for MemoryQueue {
    async fn enqueue_many(&self, work: &[NewWork]) -> Result<(), QueueError> {
        for work in work {
            work.validate()?;
        }
        let now = self.clock.wall();
        let mut state = self.state();
        for work in work {
            state.merge(work, now, true);
        }
        Ok(())
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, QueueError> {
        request.validate()?;
        let now = self.clock.now();
        let expires = now.plus(request.lease());
        let mut state = self.state();
        let mut line: Vec<_> = state
            .items
            .iter()
            .filter(|(_, item)| request.kinds().contains(&item.work.scope().kind))
            .filter(|(_, item)| item.state(now) == WorkState::Ready)
            .map(|(id, item)| item.order(*id))
            .collect();
        line.sort_unstable();
        line.truncate(request.batch());
        let mut claimed = Claimed::default();
        for (_, _, id) in line {
            let letter = state.next_id();
            let Some(item) = state.items.get_mut(&id) else {
                continue;
            };
            let (attempts, last_error) = match &item.hold {
                Some(hold) => (hold.attempts, hold.error_if_expired()),
                None => (0, None),
            };
            if let Some(hold) = item
                .hold
                .take_if(|hold| hold.attempts >= item.work.max_attempts())
            {
                let error = last_error.unwrap_or_else(|| "never finished".to_owned());
                let unchanged = item.generation == hold.generation;
                let dead = item.letter(letter, &hold, error, self.clock.wall());
                claimed.dead.push(dead.clone());
                state.dead.insert(letter, dead);
                if unchanged {
                    state.items.remove(&id);
                }
                continue;
            }
            let token = ClaimToken::new();
            item.hold = Some(Hold {
                claimed: Some((token, request.worker().to_owned())),
                generation: item.generation,
                expires,
                attempts: attempts + 1,
                last_error: last_error.clone(),
            });
            claimed.claims.push(Claim {
                key: ClaimKey { id, token },
                scope: item.work.scope().clone(),
                payload: item.work.payload().cloned(),
                priority: item.work.priority(),
                event_at: item.event_at,
                attempt: attempts + 1,
                max_attempts: item.work.max_attempts(),
                last_error,
                claimed_at: self.clock.wall_at(now),
                expires_at: self.clock.wall_at(expires),
            });
        }
        Ok(claimed)
    }

    async fn extend(&self, claims: &[ClaimKey], lease: Duration) -> Result<Vec<Outcome>, QueueError> {
        check_lease(lease)?;
        let expires = self.clock.now().plus(lease);
        let mut state = self.state();
        let extend = |claim: &ClaimKey| {
            let hold = state.items.get_mut(&claim.id).and_then(|item| item.hold.as_mut());
            match hold {
                Some(hold)
                    if hold
                        .claimed
                        .as_ref()
                        .is_some_and(|(token, _)| *token == claim.token) =>
                {
                    hold.expires = hold.expires.max(expires);
                    Outcome::Done
                }
                _ => Outcome::NotOwned,
            }
        };
        Ok(claims.iter().map(extend).collect())
    }

    async fn complete(&self, claims: &[ClaimKey]) -> Result<Vec<Outcome>, QueueError> {
        let mut state = self.state();
        let complete = |claim: &ClaimKey| state.settle(*claim, |_, _, _| None);
        Ok(claims.iter().map(complete).collect())
    }

    async fn retry(&self, retries: &[Retry]) -> Result<Vec<Outcome>, QueueError> {
        for retry in retries {
            check_delay("backoff", retry.backoff)?;
        }
        let now = self.clock.now();
        let mut state = self.state();
        let put_back = |retry: &Retry| {
            state.settle(retry.claim, |_, item, hold| {
                let hold = Hold {
                    claimed: None,
                    expires: now.plus(retry.backoff),
                    last_error: Some(kept_error(&retry.error)),
                    ..hold
                };
                Some(Item {
                    hold: Some(hold),
                    ..item
                })
            })
        };
        Ok(retries.iter().map(put_back).collect())
    }

    async fn fail(&self, failures: &[Failure]) -> Result<Vec<Outcome>, QueueError> {
        let now = self.clock.wall();
        let mut state = self.state();
        let bury = |failure: &Failure| {
            state.settle(failure.claim, |state, item, hold| {
                let id = state.next_id();
                let letter = item.letter(id, &hold, kept_error(&failure.error), now);
                state.dead.insert(id, letter);
                None
            })
        };
        Ok(failures.iter().map(bury).collect())
    }

    async fn requeue_after(&self, requeues: &[Requeue]) -> Result<Vec<Outcome>, QueueError> {
        for requeue in requeues {
            check_delay("after", requeue.after)?;
        }
        let now = self.clock.now();
        let mut state = self.state();
        let put_back = |requeue: &Requeue| {
            state.settle(requeue.claim, |_, item, hold| {
                let hold = Hold {
                    claimed: None,
                    expires: now.plus(requeue.after),
                    attempts: hold.attempts - 1,
                    ..hold
                };
                Some(Item {
                    hold: Some(hold),
                    ..item
                })
            })
        };
        Ok(requeues.iter().map(put_back).collect())
    }

    async fn stats(&self) -> Result<Vec<KindStats>, QueueError> {
        let (now, wall) = (self.clock.now(), self.clock.wall());
        let state = self.state();
        let mut kinds = BTreeMap::<&str, KindStats>::new();
        let empty = |kind: &str| KindStats {
            kind: kind.to_owned(),
            ready: 0,
            delayed: 0,
            claimed: 0,
            dead: 0,
            oldest_ready: None,
        };
        for item in state.items.values() {
            let kind = &item.work.scope().kind;
            let stats = kinds.entry(kind).or_insert_with(|| empty(kind));
            match item.state(now) {
                WorkState::Ready => {
                    stats.ready += 1;
                    let age = (wall - item.event_at).to_std().unwrap_or_default();
                    stats.oldest_ready = stats.oldest_ready.max(Some(age));
                }
                WorkState::Delayed => stats.delayed += 1,
                WorkState::Claimed => stats.claimed += 1,
            }
        }
        for letter in state.dead.values() {
            let kind = &letter.scope.kind;
            kinds.entry(kind).or_insert_with(|| empty(kind)).dead += 1;
        }
        Ok(kinds.into_values().collect())
    }

    async fn items(&self, page: &Page) -> Result<Vec<WorkItem>, QueueError> {
        page.validate()?;
        let now = self.clock.now();
        let state = self.state();
        let seen = |(id, item): (&WorkId, &Item)| {
            let state = item.state(now);
            WorkItem {
                id: *id,
                scope: item.work.scope().clone(),
                state,
                payload: item.work.payload().cloned(),
                priority: item.work.priority(),
                event_at: item.event_at,
                attempt_count: item.hold.as_ref().map_or(0, |hold| hold.attempts),
                max_attempts: item.work.max_attempts(),
                not_before: item
                    .hold
                    .as_ref()
                    .filter(|_| state == WorkState::Delayed)
                    .map(|hold| self.clock.wall_at(hold.expires)),
                last_error: item.hold.as_ref().and_then(|hold| hold.last_error.clone()),
            }
        };
        let items = state.items.iter();
        Ok(items
            .filter(|(id, item)| id.get() > page.after && on_page(page, item.work.scope()))
            .take(page.limit)
            .map(seen)
            .collect())
    }

    async fn dead_letters(&self, page: &Page) -> Result<Vec<DeadLetter>, QueueError> {
        page.validate()?;
        let state = self.state();
        let letters = state.dead.values();
        Ok(letters
            .filter(|letter| letter.id > page.after && on_page(page, &letter.scope))
            .take(page.limit)
            .cloned()
            .collect())
    }

    async fn redrive(&self, tenant: &str, letters: &[i64]) -> Result<u64, QueueError> {
        let now = self.clock.wall();
        let mut state = self.state();
        let mut found: Vec<DeadLetter> = letters
            .iter()
            .filter_map(|id| match state.dead.get(id) {
                Some(letter) if letter.scope.tenant == tenant => state.dead.remove(id),
                _ => None,
            })
            .collect();
        // The newest first: what comes after it is merged into it.
        found.sort_by_key(|letter| std::cmp::Reverse(letter.id));
        let number = found.len() as u64;
        for letter in found {
            let mut work = NewWork::new(letter.scope)
                .with_priority(letter.priority)
                .with_event_at(letter.event_at)
                .with_max_attempts(letter.max_attempts);
            if let Some(payload) = letter.payload {
                work = work.with_payload(payload);
            }
            state.merge(&work, now, false);
        }
        Ok(number)
    }

    async fn purge_dead_letters(&self, retention: &Retention) -> Result<u64, QueueError> {
        let now = self.clock.wall();
        let mut state = self.state();
        let before = state.dead.len();
        let old = |letter: &DeadLetter| {
            (now - letter.failed_at)
                .to_std()
                .is_ok_and(|age| age > retention.age)
        };
        state.dead.retain(|_, letter| !old(letter));
        while state.dead.len() as u64 > retention.number {
            state.dead.pop_first();
        }
        Ok((before - state.dead.len()) as u64)
    }
}
