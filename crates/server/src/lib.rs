//! The reference service: a configuration API whose every write of a workspace happens under a lock.
//!
//! `leasehold serve` runs it. As a library it gives the same service to tests and benchmarks, in process:
//! [`schema::migrations`], [`AppState::new`], [`app::router`].

mod answer;
pub mod app;
pub mod auth;
pub mod cli;
pub mod config;
pub mod contexts;
pub mod default_config;
pub mod deliveries;
mod demo;
mod failure;
pub mod feedback_records;
mod idempotency;
pub mod jobs;
pub mod locks;
mod metrics;
pub mod mode;
pub mod names;
pub mod paging;
pub mod schema;
mod service;
mod state;
mod telemetry;
pub mod tenants;
pub mod versions;
pub mod waiters;
pub mod webhooks;
mod work;
pub mod work_items;
pub mod workspaces;

pub use state::{AppState, Settings, instance, workspace_lock_name};

/// Compiles the examples of the project's README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeExamples;
