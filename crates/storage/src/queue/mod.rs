//! The work queue: items that processes claim, and a worker that does so for a processor.
//!
//! Two tables, so that neither side waits for the other. Who enqueues writes `leasehold.work_items`; who works writes
//! `leasehold.work_claims`: claims, heartbeats, attempts and pauses. Where both meet, at the end of a claim, the item's
//! row is locked only if that can be had at once; if not, somebody is about to change it, and the item is looked at
//! again. So an open transaction that has enqueued keeps no worker from going on.

mod statements;
mod store;
mod worker;

pub use store::PgWorkQueue;
pub use worker::{Dropped, GivenUp, NonRetryable, Processed, Processor, Worker, WorkerHooks, WorkerOptions};
