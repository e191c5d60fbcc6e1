//! The clauses that every [`DistributedLock`](leasehold_domain::DistributedLock) must pass, and those of every
//! [`WorkQueue`](leasehold_domain::WorkQueue).
//!
//! A backend says in a [`Provider`] how its locks are made and how they are broken, and one line turns every
//! clause into a `#[tokio::test]` of its own name:
//!
//! ```ignore
//! mod leases {
//!     leasehold_conformance::lock_conformance!(LeaseProvider::start().await);
//! }
//! ```
//!
//! The expression is evaluated anew for every test, inside its multi-threaded runtime; a backend in a database
//! makes a database of its own there. Who writes the line needs tokio with `macros` and `rt-multi-thread`.
//!
//! What a provider gives:
//!
//! * **locks**: [`Provider::process`] makes an instance that shares no memory with the others, as a second
//!   process would have it; [`Provider::name`] gives names that can be locked.
//! * **abilities**: [`Abilities`] says what the backend can do. A clause about something that it cannot do
//!   asserts the documented refusal instead, so no clause is ever skipped.
//! * **ways to break it**: [`Provider::lose`] (taken away from outside: a row changed, a session terminated),
//!   [`Provider::expire`] (the end of a lease moved into the past), [`Provider::stop_heartbeats`],
//!   [`Provider::unreachable`], and [`Provider::holder_process`], a real process that holds, exits or is killed.
//! * **a look from behind**: [`Provider::residue`] tells what the backend still keeps. It must be nothing after
//!   every clause.
//!
//! Queues have a [`QueueProvider`] and the line `queue_conformance!`, in the same way.
//!
//! Clauses wait for states with a generous cap and never for time to pass, but where the passing of time is what
//! they are about; then it is [`Provider::pass`], one second at most in real time.

#![allow(
    clippy::missing_panics_doc,
    async_fn_in_trait,
    reason = "a clause panics where the backend breaks it, and nobody needs its future to be Send"
)]

pub mod clauses;
mod holder_process;
mod patience;
mod provider;
pub mod queue_clauses;
mod queue_provider;

pub use holder_process::{hold_as_told, this_test_binary};
pub use patience::leaves_nothing;
pub use provider::{Abilities, Life, Provider};
pub use queue_provider::QueueProvider;

/// Makes every clause a test of its own name, against the provider that the expression makes.
#[macro_export]
macro_rules! lock_conformance {
    ($provider:expr) => {
        $crate::lock_conformance! { @tests $provider;
            try_acquire_free
            second_is_busy
            not_reentrant
            independent_keys
            reacquire_after_release
            release_idempotent
            drop_frees
            drop_in_a_plain_thread_frees
            drop_in_a_panic_frees
            drop_after_the_lock_is_gone_frees
            inspect_free_is_none
            contention_names_the_holder
            try_acquire_opt_is_none_when_contended
            absent_row_is_not_found
            unreachable_is_unavailable
            release_is_done_when_told
            bad_name_table
            case_sensitive
            unicode_normal_form
            white_space_counts
            tenant_isolation
            part_borders_count
            long_names_count_to_the_end
            odd_names_are_names
            bad_ttl
            bad_max_hold
            bad_holder
            bounds_are_granted
            extend_bad_ttl
            times_are_told
            trust_ends_before_the_lease
            token_increases
            shared_has_no_token
            with_write_has_no_token_yet
            heartbeat_keeps
            stopped_heartbeat_ends_after_ttl
            expired_goes_to_the_next
            release_after_expiry_tells
            drop_after_expiry_touches_nobody
            max_hold_ends_the_hold
            extend_ok
            extend_twice
            extend_shorter_moves_nothing_back
            extend_stops_at_max_hold
            extend_expired_refused
            extend_lost_refused
            extend_released_refused
            resume_takes_up_the_hold
            resume_not_held
            resume_expired_not_held
            lost_fires
            lost_already_when_lost
            lost_not_fired_on_release
            lost_can_be_dropped
            lost_goes_to_the_next
            acquire_free_does_not_wait
            acquire_deadline_zero_is_try
            acquire_deadline_passed
            acquire_waits_then_gets
            acquire_waits_for_a_drop
            acquire_waits_for_a_loss
            acquire_waits_for_an_expiry
            waiters_go_in_order
            waiter_that_gives_up_is_passed_over
            deadline_races_the_grant
            readers_writer
            upgrade_absent
            writer_waits_for_the_last_reader
            writer_not_starved
            writer_that_gives_up_lets_readers_in
            multi_sorted_deduped
            multi_partial_failure_releases
            multi_stops_at_a_loss
            multi_refuses_before_it_takes
            multi_of_nothing
            multi_drop_frees
            multi_no_deadlock
            with_lock_answers_after_release
            with_lock_contended_does_not_start
            with_lock_cancelled_on_loss
            with_lock_tells_a_late_end
            with_lock_panic_releases
            with_lock_dropped_releases
            with_lock_can_be_spawned
            cancelled_before_start
            try_acquire_dropped_anywhere
            acquire_dropped_anywhere
            extend_dropped_anywhere
            release_dropped_anywhere
            inspect_dropped_anywhere
            resume_dropped_anywhere
            acquire_all_dropped_anywhere
            with_lock_dropped_anywhere
            parallel_100_never_two
            readers_never_meet_a_writer
            cross_process
            cross_process_abandon
            cross_process_kill
            error_display_has_no_secrets
            errors_can_be_kept
        }
    };
    (@tests $provider:expr; $($clause:ident)*) => {
        $(
            #[::tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $clause() {
                let provider = $provider;
                $crate::clauses::$clause(&provider).await;
                $crate::leaves_nothing(&provider).await;
            }
        )*
    };
}

/// Makes every clause of queues a test of its own name, against the provider that the expression makes.
#[macro_export]
macro_rules! queue_conformance {
    ($provider:expr) => {
        $crate::queue_conformance! { @queue_tests $provider;
            enqueued_is_claimed
            defaults_are_those_documented
            one_item_a_scope
            scopes_are_kept_apart
            merge_keeps_the_newest_event
            merge_keeps_the_most_urgent_priority
            merge_takes_the_last_payload
            enqueue_many_of_any_number
            enqueue_while_claimed_is_not_lost
            enqueues_while_claimed_are_one
            done_scopes_can_come_again
            kinds_are_kept_apart
            claimed_is_not_claimed_again
            empty_gives_nothing
            order_is_priority_event_id
            batch_bounds_a_claim
            tokens_differ
            lease_is_exact
            short_leases_end
            expired_is_claimable_at_once
            extend_keeps_the_claim
            extend_never_shortens
            many_beats_do_not_change_the_item
            extend_needs_a_claim
            complete_leaves_nothing
            a_claim_ends_once
            changed_items_are_new
            beats_hide_no_change
            batch_outcomes_are_in_order
            batches_of_any_number_end
            purged_work_ends_quietly
            stale_claims_change_nothing
            stale_claims_stay_stale
            expired_and_not_taken_can_be_settled
            expired_and_not_taken_can_be_extended
            expired_and_changed_is_told
            taken_over_has_seen_the_change
            retry_rests_and_comes_again
            short_pauses_end
            retry_without_a_pause
            retries_are_kept_apart
            resting_work_is_passed_over
            rested_work_is_in_line_again
            events_do_not_end_a_pause
            requeue_does_not_count
            give_back_is_free_at_once
            poison_is_given_up
            spent_work_keeps_its_last_error
            spent_and_changed_is_new
            last_enqueue_says_the_attempts
            fail_makes_a_dead_letter
            dead_work_of_one_kind_hides_no_other
            redrive_enqueues_again
            redrive_merges_into_a_live_item
            redrive_does_not_end_a_pause
            redrive_of_one_scope_twice
            redrive_keeps_to_the_tenant
            letters_are_bounded_by_age
            letters_are_bounded_by_number
            stats_count_by_state
            stats_tell_the_oldest
            items_are_paged
            letters_are_paged
            empty_kinds_refused
            bad_work_table
            enqueue_many_refuses_before_it_begins
            bad_claim_table
            bad_settlement_table
            longest_bounds_are_granted
            long_errors_are_cut
            nothing_is_a_number
            unreachable_is_told
            no_item_is_claimed_twice
            enqueues_do_not_block_each_other
            last_payload_is_always_seen
            enqueue_dropped_anywhere
            claim_dropped_anywhere
            complete_dropped_anywhere
        }
    };
    (@queue_tests $provider:expr; $($clause:ident)*) => {
        $(
            #[::tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $clause() {
                $crate::queue_clauses::$clause(&$provider).await;
            }
        )*
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// A clause that its macro does not list would be run by nobody.
    fn assert_all_listed(folder: &str, marker: &str) {
        let listed = include_str!("lib.rs")
            .split_once(marker)
            .and_then(|(_, rest)| rest.split_once('}'))
            .map(|(list, _)| {
                list.split_whitespace()
                    .map(str::to_owned)
                    .collect::<BTreeSet<_>>()
            })
            .unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder);
        let mut written = BTreeSet::new();
        for file in fs::read_dir(folder).unwrap() {
            let source = fs::read_to_string(file.unwrap().path()).unwrap();
            for rest in source.split("\npub async fn ").skip(1) {
                written.insert(rest.split(['<', '(']).next().unwrap().to_owned());
            }
        }
        assert_eq!(listed, written);
    }

    #[test]
    fn every_clause_is_listed() {
        assert_all_listed("clauses", "@tests $provider;\n");
    }

    #[test]
    fn every_clause_of_queues_is_listed() {
        assert_all_listed("queue_clauses", "@queue_tests $provider;\n");
    }
}
