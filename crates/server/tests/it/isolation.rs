//! No tenant sees or touches another's: every operation of the document is tried with the key of another tenant.

use std::cmp::Reverse;

use axum::http::Method;
use leasehold_server::auth::Role;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::json;

use crate::operations::{Operation, Things, operations};
use crate::support::{Answer, Api};

/// The strongest key that a single tenant can have.
async fn admin_of(api: &Api, tenant: &str) -> Api {
    api.with_key(&api.new_key("admin", Role::Admin, Some(tenant)).await)
}

fn is_refused(answer: &Answer) -> bool {
    let code = answer.body["code"].as_str();
    matches!(
        (answer.status, code),
        (404, Some("not_found")) | (403, Some("forbidden"))
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_refuses_the_key_of_another_tenant() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let things = Things::make(&api, "acme").await;
    // It has the same things under the same names, so that what is not kept apart is mixed up.
    Things::make(&api, "globex").await;
    let stranger = admin_of(&api, "globex").await;
    let guard = api.hold("acme", "main").await;
    let before = api.rows("acme").await;

    for operation in operations() {
        let id = &operation.id;
        let names_it = operation.path(&things).contains("acme")
            || operation.template.contains("{id}")
            || operation
                .body(&things)
                .is_some_and(|body| body["tenant_id"] == "acme");
        let answer = operation.send(&stranger, &things, &[]).await;
        if names_it {
            assert!(is_refused(&answer), "{id}: {} {:#}", answer.status, answer.body);
        } else {
            // Lists, and what is about all that the key may see: nothing of the other one is in it.
            let told = answer.body.to_string();
            assert!(
                is_refused(&answer) || answer.status == 200 && !told.contains("acme"),
                "{id}: {} {told}",
                answer.status
            );
        }
        if operation.may_name_tenant() {
            let path = operation.path_naming_tenant(&things);
            let answer = operation.send_to(&stranger, &path, &things, &[]).await;
            answer.problem(404, "not_found");
        }
        assert_eq!(api.rows("acme").await, before, "{id} changed something");
    }
    api.release(guard).await;
}

/// The same requests by somebody who may: so none of the refusals above is for another reason.
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_lets_in_who_may() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    let things = Things::make(&api, "acme").await;
    let guard = api.hold("acme", "main").await;
    // Jobs are no tenant's; here nobody runs any.
    let mut operations = operations();
    operations.retain(|operation| !operation.template.starts_with("/v1/jobs"));
    operations.sort_by_key(order);
    for operation in operations {
        let answer = operation.send(&api, &things, &[]).await;
        let told = format!("{}: {} {:#}", operation.id, answer.status, answer.body);
        match answer.status {
            200..300 => {}
            409 => assert_eq!(answer.body["code"], "workspace_locked", "{told}"),
            _ => panic!("{told}"),
        }
    }
    drop(guard);
}

/// What reads comes first, what deletes last, and the more the later.
fn order(operation: &Operation) -> (u8, Reverse<usize>) {
    let of_lock = operation.template.contains("/locks/");
    let rank = match operation.id.as_str() {
        "acquire_lock" => 0,
        "purge_tenant" => 4,
        "release_lock" | "delete_tenant" => 5,
        _ if operation.method == Method::DELETE => 3,
        _ if operation.reads() || of_lock => 1,
        _ => 2,
    };
    (rank, Reverse(operation.template.matches('/').count()))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_names_in_two_tenants_are_two_things() {
    let api = Api::start(WorkspaceLockMode::Lease).await;
    for tenant in ["acme", "globex"] {
        let own = admin_of(&api, tenant).await;
        let path = format!("/v1/tenants/{tenant}/workspaces/main/default-config/color");
        own.put(&path, json!({"value": tenant})).await.is(200);
    }
    for tenant in ["acme", "globex"] {
        let path = format!("/v1/tenants/{tenant}/workspaces/main/config");
        let config = api.get(&path).await.is(200);
        assert_eq!(config["values"], json!({"color": tenant}));
        assert_eq!(config["version"], 1);
    }
    api.purge("acme").await.is(200);
    let kept = "/v1/tenants/globex/workspaces/main/versions/1";
    assert_eq!(
        api.get(kept).await.is(200)["snapshot"]["default_config"]["color"],
        "globex"
    );
}
