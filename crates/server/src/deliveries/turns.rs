//! Turns: how many events of one tenant are sent at the same time.
//!
//! A receiver that says nothing holds its place for as long as a send may take, and there are only so many places for
//! all tenants. So each begins with a few, has one more for each event that was taken quickly, and is back at the
//! beginning when one was not. Whoever finds no place comes again after about as long as the oldest of the tenant has
//! been under way: soon, as long as its receivers answer, and seldom when they do not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many a tenant may send at once that nothing is known of.
const AT_FIRST: usize = 4;
/// An answer that came sooner is quick.
const QUICK: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// The places of all tenants that something is being sent for.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<String, Tenant>>>);

#[derive(Debug)]
struct Tenant {
    allowed: usize,
    /// Since when each of them is under way, the oldest first.
    since: Vec<Instant>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Turns,
    tenant: String,
    since: Instant,
    was_taken: bool,
}

impl Turns {
    /// A place for an event of this tenant; without one, how long to wait before asking again.
    pub(super) fn take(&self, tenant: &str) -> Result<Turn, Duration> {
        let now = Instant::now();
        let mut tenants = self.lock();
        let here = tenants.entry(tenant.to_owned()).or_insert(Tenant {
            allowed: AT_FIRST,
            since: Vec::new(),
        });
        if here.since.len() >= here.allowed {
            let oldest = here.since.first().map_or(Duration::ZERO, |since| now - *since);
            return Err(oldest.clamp(SHORTEST_PAUSE, LONGEST_PAUSE));
        }
        here.since.push(now);
        Ok(Turn {
            turns: self.clone(),
            tenant: tenant.to_owned(),
            since: now,
            was_taken: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Tenant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// The event has arrived.
    pub(super) fn taken(mut self) {
        self.was_taken = true;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut tenants = self.turns.lock();
        let Some(here) = tenants.get_mut(&self.tenant) else {
            return;
        };
        here.allowed = if self.was_taken && self.since.elapsed() < QUICK {
            here.allowed + 1
        } else {
            AT_FIRST
        };
        if let Some(mine) = here.since.iter().position(|since| *since == self.since) {
            here.since.remove(mine);
        }
        if here.since.is_empty() {
            tenants.remove(&self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_quick_has_more_turns_and_who_is_not_a_few() {
        let turns = Turns::default();
        let mut held: Vec<_> = (0..AT_FIRST).map(|_| turns.take("a").unwrap()).collect();
        assert_eq!(turns.take("a").unwrap_err(), SHORTEST_PAUSE);
        let others = turns.take("b").unwrap();
        for _ in 0..3 {
            held.pop().unwrap().taken();
            held.extend((0..2).map(|_| turns.take("a").unwrap()));
        }
        assert_eq!(held.len(), AT_FIRST + 3);
        // One that was not taken, and all are too many again until enough have ended.
        held.pop();
        assert!(turns.take("a").is_err());
        held.truncate(AT_FIRST - 1);
        held.push(turns.take("a").unwrap());
        assert!(turns.take("a").is_err());
        drop((held, others));
        assert!(turns.lock().is_empty(), "nothing is kept of who sends nothing");
    }
}
