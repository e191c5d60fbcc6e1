//! The groups, in the order in which they are printed.

mod gate;
mod growth;
mod handoff;
mod http;
mod http_lock;
mod pairs;
mod queue;
mod waiting;
mod write;

use leasehold_domain::{Holder, LockName, LockRequest};

use crate::{Bench, Result};

pub(crate) async fn run(bench: &Bench) -> Result {
    let database = bench.server.create("leasehold_bench").await?;
    for clients in bench.options.clients.clone() {
        pairs::session(bench, &database, clients).await?;
    }
    for clients in bench.options.clients.clone() {
        pairs::lease(bench, &database, clients).await?;
    }
    for clients in bench.options.clients.clone() {
        pairs::transaction(bench, &database, clients).await?;
    }
    write::create_tables(&database).await?;
    for clients in bench.options.clients.clone() {
        write::guarded(bench, &database, clients).await?;
    }
    gate::create_tables(&database).await?;
    for clients in bench.options.clients.clone() {
        gate::gated_insert(bench, &database, clients).await?;
    }
    for clients in bench.options.clients.clone() {
        gate::gated_write(bench, &database, clients).await?;
    }
    for clients in bench.options.clients.clone() {
        gate::net(bench, &database, clients).await?;
        http::net(bench, clients).await?;
    }
    for clients in bench.options.clients.clone() {
        http::guarded_put(bench, clients).await?;
    }
    handoff::one_name(bench, &database).await?;
    for clients in [2, 8, 32] {
        http_lock::one_name(bench, clients).await?;
    }
    waiting::writes(bench).await?;
    queue::no_op(bench, &database).await?;
    queue::growth(bench).await?;
    growth::rows(bench).await?;
    growth::renewal(bench).await
}

/// What all of our lanes ask for.
fn request(parts: &[&str]) -> Result<LockRequest> {
    Ok(LockRequest::new(
        LockName::new(parts)?,
        Holder::new("bench", "measure"),
    ))
}
