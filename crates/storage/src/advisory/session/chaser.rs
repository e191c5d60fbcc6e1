//! The chaser: waits for other processes on behalf of everybody of this process who wants a key.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::table::Chase;
use super::{LockSession, signal};
use crate::advisory::AdvisoryKey;
use crate::signals::Subscription;
use crate::waiting::{ANNOUNCE, jittered_poll};

/// How long it may take to tell others that this process waits. Without that, it polls.
const TELL: Duration = Duration::from_secs(1);

/// Starts one where the table says so.
pub(super) fn start(session: &Arc<LockSession>, key: AdvisoryKey, chaser: Option<Arc<Notify>>) {
    if let Some(me) = chaser {
        tokio::spawn(chase(Arc::clone(session), key, me));
    }
}

/// Asks again when another process frees the key, and every now and then, until this process has it or nobody of
/// it wants it any more.
async fn chase(session: Arc<LockSession>, key: AdvisoryKey, me: Arc<Notify>) {
    let mut ear: Option<Subscription> = None;
    let mut announced = Instant::now();
    let mut forgotten = false;
    loop {
        let next = session.table().chase(key, &me);
        let until = match next {
            Chase::End => return,
            Chase::Asked => {
                me.notified().await;
                continue;
            }
            Chase::Yielding {
                until,
                awaited: false,
            } => {
                // Others have their turn, and nobody here waits for the end of it.
                tokio::select! {
                    () = me.notified() => {}
                    () = sleep_until(until) => session.table().ask_again(key),
                }
                continue;
            }
            Chase::Yielding { until, awaited: true } => until,
            Chase::Refused => Instant::now() + jittered_poll(),
        };
        let Some(heard) = &ear else {
            ear = timeout(TELL, session.signals.wait_for(signal(key))).await.ok();
            announced = Instant::now();
            // What was freed before the ear was open is found by asking again at once.
            if next == Chase::Refused {
                session.table().ask_again(key);
            }
            continue;
        };
        if forgotten || announced.elapsed() > ANNOUNCE {
            forgotten = false;
            announced = Instant::now();
            _ = timeout(TELL, heard.announce()).await;
        }
        tokio::select! {
            () = me.notified() => {}
            () = heard.freed() => {
                session.table().ask_again(key);
                // Who frees a key forgets who wanted it.
                forgotten = true;
            }
            () = sleep_until(until) => session.table().ask_again(key),
        }
    }
}
