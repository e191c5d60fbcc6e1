//! Real races: what is not protected otherwise must come out right.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::{JoinSet, yield_now};

use super::{give_back, request, shared, shared_is_refused};
use crate::Provider;

/// Longer than the cap of a single wait: everybody is queued behind everybody else.
const PATIENT: Duration = Duration::from_secs(120);

/// A hundred workers in two processes, each reading, yielding and writing back an unprotected number: the sum is
/// right and nobody ever meets another.
pub async fn parallel_100_never_two<P: Provider>(provider: &P) {
    const WORKERS: usize = 100;
    const INCREMENTS: usize = 2;
    let processes = [provider.process().await, provider.process().await];
    let request = request(&provider.name("races", "sum").await);
    let (sum, inside) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        let lock = Arc::clone(&processes[worker % processes.len()]);
        let (request, sum, inside) = (request.clone(), Arc::clone(&sum), Arc::clone(&inside));
        workers.spawn(async move {
            for _ in 0..INCREMENTS {
                let guard = lock.acquire(&request, PATIENT).await.expect("everybody gets it");
                assert_eq!(
                    inside.fetch_add(1, Ordering::SeqCst),
                    0,
                    "somebody is inside already"
                );
                let read = sum.load(Ordering::SeqCst);
                yield_now().await;
                sum.store(read + 1, Ordering::SeqCst);
                inside.fetch_sub(1, Ordering::SeqCst);
                give_back(&*lock, guard).await;
            }
        });
    }
    // A panic of one ends the clause; `join_all` hands it on.
    workers.join_all().await;
    assert_eq!(sum.load(Ordering::SeqCst), WORKERS * INCREMENTS);
}

/// Readers meet readers and never a writer; a writer never meets anybody.
pub async fn readers_never_meet_a_writer<P: Provider>(provider: &P) {
    let name = provider.name("races", "readers").await;
    if shared_is_refused(provider, &name).await {
        return;
    }
    let processes = [provider.process().await, provider.process().await];
    let (readers, writers) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut workers = JoinSet::new();
    for worker in 0..24 {
        let lock = Arc::clone(&processes[worker % processes.len()]);
        let (readers, writers) = (Arc::clone(&readers), Arc::clone(&writers));
        let writes = worker % 4 == 0;
        let request = if writes { request(&name) } else { shared(&name) };
        workers.spawn(async move {
            for _ in 0..4 {
                let guard = lock.acquire(&request, PATIENT).await.expect("everybody gets it");
                let mine = if writes { &writers } else { &readers };
                let before = mine.fetch_add(1, Ordering::SeqCst);
                yield_now().await;
                if writes {
                    assert_eq!(before, 0, "a writer met a writer");
                    assert_eq!(readers.load(Ordering::SeqCst), 0, "a writer met a reader");
                } else {
                    assert_eq!(writers.load(Ordering::SeqCst), 0, "a reader met a writer");
                }
                mine.fetch_sub(1, Ordering::SeqCst);
                give_back(&*lock, guard).await;
            }
        });
    }
    workers.join_all().await;
}
