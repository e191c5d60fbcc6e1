//! Claims whose lease is over: they count until somebody else has the item, and then never again.

use leasehold_domain::{Outcome, Page, WorkState};

use super::{ENDS, LONG, complete, end, enqueue, extend, item, items, nothing, take, work};
use crate::QueueProvider;

/// Whatever is done with a claim that was taken over changes nothing, and says so. It makes no difference whether
/// another worker took it or the same one.
pub async fn stale_claims_change_nothing<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    for taker in [&one, &other] {
        for how in ENDS {
            enqueue(&**taker, work("1")).await;
            let stale = take(&*one).await;
            provider.expire(stale.key).await;
            let current = take(&**taker).await;
            let before = item(&*one).await;
            assert_eq!(end(&*one, &stale, how).await, Outcome::NotOwned, "{how}");
            assert_eq!(extend(&*one, &stale, LONG).await, Outcome::NotOwned, "{how}");
            assert_eq!(item(&*one).await, before, "{how}");
            let letters = one.dead_letters(&Page::default()).await.expect("it answers");
            assert_eq!(letters, [], "{how}");
            nothing(&*one).await;
            assert_eq!(complete(&**taker, &current).await, Outcome::Done, "{how}");
            assert_eq!(items(&*one).await, []);
        }
    }
}

/// Nothing of a claim comes back that was taken over and given back.
pub async fn stale_claims_stay_stale<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for how in ENDS {
        enqueue(&*queue, work("1")).await;
        let stale = take(&*queue).await;
        provider.expire(stale.key).await;
        let current = take(&*queue).await;
        super::give_back(&*queue, &current).await;
        assert_eq!(end(&*queue, &stale, how).await, Outcome::NotOwned, "{how}");
        assert_eq!(item(&*queue).await.state, WorkState::Ready, "{how}");
        provider.purge_tenant("acme").await;
    }
}

/// A lease that is over and that nobody took since is still its worker's: the work counts.
pub async fn expired_and_not_taken_can_be_settled<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    for how in ENDS {
        enqueue(&*queue, work("1")).await;
        let claim = take(&*queue).await;
        provider.expire(claim.key).await;
        assert_eq!(end(&*queue, &claim, how).await, Outcome::Done, "{how}");
        provider.purge_tenant("acme").await;
    }
}

/// A late heartbeat takes the item up again, if nobody else has.
pub async fn expired_and_not_taken_can_be_extended<P: QueueProvider>(provider: &P) {
    let (one, other) = (provider.process().await, provider.process().await);
    enqueue(&*one, work("1")).await;
    let claim = take(&*one).await;
    provider.expire(claim.key).await;
    assert_eq!(extend(&*one, &claim, LONG).await, Outcome::Done);
    nothing(&*other).await;
    assert_eq!(complete(&*one, &claim).await, Outcome::Done);
}

/// An enqueue while the lease was over is not lost either.
pub async fn expired_and_changed_is_told<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let claim = take(&*queue).await;
    provider.expire(claim.key).await;
    enqueue(&*queue, work("1")).await;
    assert_eq!(complete(&*queue, &claim).await, Outcome::DoneButChanged);
    assert_eq!(take(&*queue).await.attempt, 1);
}

/// Who takes an item over has seen what was enqueued before: then it is done.
pub async fn taken_over_has_seen_the_change<P: QueueProvider>(provider: &P) {
    let queue = provider.process().await;
    enqueue(&*queue, work("1")).await;
    let stale = take(&*queue).await;
    enqueue(&*queue, work("1")).await;
    provider.expire(stale.key).await;
    let current = take(&*queue).await;
    assert_eq!(current.attempt, 2);
    assert_eq!(complete(&*queue, &current).await, Outcome::Done);
    assert_eq!(items(&*queue).await, []);
}
