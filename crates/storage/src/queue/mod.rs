//! The work queue: items that processes claim, and a worker that does so for a processor.
//!
//! Two tables, so that neither side waits for the other. Who enqueues writes `leasehold.work_items`; who works writes
//! `leasehold.work_claims`: claims, heartbeats, attempts and pauses. Where both meet, at the end of a claim, the item's
//! row is locked only if that can be had at once; if not, somebody is about to change it, and the item is looked at
//! again. So an open transaction that has enqueued keeps no worker from going on.
//!
//! Enqueues and ends of claims are durable. A claim is not, and costs no wait for the disk: when the database server crashes
//! the claims of the last moments may be forgotten. Then somebody else may begin such an item before the lease of the first
//! is over, and the attempt does not count; the first is told `NotOwned` and its work is cancelled.

mod statements;
mod store;
mod worker;

pub use store::PgWorkQueue;
pub use worker::{Dropped, GivenUp, NonRetryable, Processed, Processor, Worker, WorkerHooks, WorkerOptions};
