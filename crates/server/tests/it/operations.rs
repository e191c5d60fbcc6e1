//! Every operation of the API's document, as a request about the things of one tenant. A new operation that cannot be
//! asked for here fails the tests that go over all of them.

use axum::http::Method;
use leasehold_server::app;
use serde_json::{Value, json};

use crate::support::{Answer, Api};

/// A tenant with one of everything, each in `main`, the workspace that every tenant of the tests has.
#[derive(Clone, Debug)]
pub(crate) struct Things {
    pub(crate) tenant: String,
    pub(crate) context: String,
    pub(crate) record: String,
    pub(crate) webhook: String,
    pub(crate) dead_letter: i64,
}

/// The user that has said something in every tenant.
pub(crate) const USER: &str = "user-1";

/// The id that whoever locks something chooses.
const LOCK: &str = "018f4e2a-7c3d-7a51-9d0e-3b8f6a2c4d10";

impl Things {
    /// Makes them, as somebody who may.
    pub(crate) async fn make(api: &Api, tenant: &str) -> Self {
        let id = |made: &Value| made["id"].as_str().unwrap().to_owned();
        let main = format!("/v1/tenants/{tenant}/workspaces/main");
        api.put(&format!("{main}/default-config/color"), json!({"value": "blue"}))
            .await
            .is(200);
        let context = json!({"condition": {}, "overrides": {}});
        let context = api.post(&format!("{main}/contexts"), context).await.is(201);
        let record = json!({"tenant_id": tenant, "user_id": USER, "value": 1});
        let record = api.post("/v1/feedback-records", record).await.is(201);
        let webhook = json!({"tenant_id": tenant, "url": "https://example.com/"});
        let webhook = api.post("/v1/webhooks", webhook).await.is(201);
        // Nothing that is asked for over HTTP makes one at once.
        let dead_letter = "
            INSERT INTO leasehold.dead_letters (tenant_id, kind, scope_type, scope_id, priority, event_at,
                                                max_attempts, attempt_count, last_error)
            VALUES ($1, 'test', 'test', 'test', 100, clock_timestamp(), 10, 10, 'test') RETURNING id";
        let dead_letter = api
            .client()
            .await
            .query_one(dead_letter, &[&tenant])
            .await
            .unwrap();
        let dead_letter = dead_letter.get(0);
        Self {
            tenant: tenant.to_owned(),
            context: id(&context),
            record: id(&record),
            webhook: id(&webhook),
            dead_letter,
        }
    }
}

/// What the document says of an operation.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) id: String,
    pub(crate) method: Method,
    pub(crate) template: String,
    described: Value,
}

/// Every operation that needs a key.
pub(crate) fn operations() -> Vec<Operation> {
    let document = serde_json::to_value(app::openapi()).unwrap();
    let mut operations = Vec::new();
    for (template, item) in document["paths"].as_object().unwrap() {
        for (method, described) in item.as_object().unwrap() {
            if described["security"] == json!([{}]) {
                continue;
            }
            operations.push(Operation {
                id: described["operationId"].as_str().unwrap().to_owned(),
                method: method.to_uppercase().parse().unwrap(),
                template: template.clone(),
                described: described.clone(),
            });
        }
    }
    assert!(operations.len() >= 35, "{}", operations.len());
    operations
}

impl Operation {
    /// Whether it only reads.
    pub(crate) fn reads(&self) -> bool {
        self.method == Method::GET || self.template.ends_with("/resolve")
    }

    /// Whether the query can say which tenant is meant.
    pub(crate) fn may_name_tenant(&self) -> bool {
        self.parameters("query")
            .any(|parameter| parameter["name"] == "tenant_id")
    }

    fn parameters(&self, place: &str) -> impl Iterator<Item = &Value> {
        let all = self.described["parameters"].as_array();
        all.into_iter()
            .flatten()
            .filter(move |parameter| parameter["in"] == place)
    }

    /// The path to these things, with what the query must have.
    pub(crate) fn path(&self, things: &Things) -> String {
        let segment = |segment: &str| match segment {
            "{tenant}" => things.tenant.clone(),
            "{workspace}" => "main".to_owned(),
            "{key}" => "color".to_owned(),
            "{name}" => "deploy".to_owned(),
            "{job}" => "webhook-health".to_owned(),
            // The one with all things in it.
            "{n}" => "2".to_owned(),
            "{id}" if self.template.contains("/contexts/") => things.context.clone(),
            "{id}" if self.template.contains("/dead-letters/") => things.dead_letter.to_string(),
            "{id}" if self.template.contains("/feedback-records/") => things.record.clone(),
            "{id}" if self.template.contains("/webhooks/") => things.webhook.clone(),
            other => {
                assert!(!other.contains('{'), "what is {other} in {}?", self.template);
                other.to_owned()
            }
        };
        let path: Vec<_> = self.template.split('/').map(segment).collect();
        let must = self
            .parameters("query")
            .filter(|parameter| parameter["required"] == true);
        let query: Vec<_> = must
            .map(|parameter| match parameter["name"].as_str().unwrap() {
                "reason" => "reason=test".to_owned(),
                "user_id" => format!("user_id={USER}"),
                other => panic!("what is {other} in the query of {}?", self.template),
            })
            .collect();
        match query.join("&") {
            query if query.is_empty() => path.join("/"),
            query => format!("{}?{query}", path.join("/")),
        }
    }

    /// The same, where the query says which tenant is meant.
    pub(crate) fn path_naming_tenant(&self, things: &Things) -> String {
        let path = self.path(things);
        let and = if path.contains('?') { '&' } else { '?' };
        format!("{path}{and}tenant_id={}", things.tenant)
    }

    /// A body that changes something.
    pub(crate) fn body(&self, things: &Things) -> Option<Value> {
        self.described.get("requestBody")?;
        let tenant = &things.tenant;
        Some(match self.id.as_str() {
            "create_tenant" => json!({"id": "hooli"}),
            "create_workspace" => json!({"name": "made"}),
            "update_workspace" => json!({"description": "changed"}),
            "put_default_config" => json!({"value": "changed"}),
            "batch_default_config" => json!({"operations": [{"op": "put", "key": "made", "value": 1}]}),
            "create_context" | "put_context" => json!({"condition": {}, "overrides": {}, "priority": 7}),
            "resolve_config" => json!({"context": {}}),
            "create_feedback_record" => json!({"tenant_id": tenant, "user_id": USER, "value": "made"}),
            "update_feedback_record" => json!({"value": "changed"}),
            "create_webhook" => json!({"tenant_id": tenant, "url": "https://example.com/made"}),
            "update_webhook" => json!({"enabled": false}),
            "acquire_lock" | "extend_lock" => json!({"lock_id": LOCK, "ttl_ms": 60_000}),
            "release_lock" => json!({"lock_id": LOCK}),
            other => panic!("what is the body of {other}?"),
        })
    }

    /// Sends it.
    pub(crate) async fn send(&self, api: &Api, things: &Things, headers: &[(&str, &str)]) -> Answer {
        self.send_to(api, &self.path(things), things, headers).await
    }

    pub(crate) async fn send_to(
        &self,
        api: &Api,
        path: &str,
        things: &Things,
        headers: &[(&str, &str)],
    ) -> Answer {
        let body = self.body(things).map(|body| body.to_string());
        api.send(self.method.clone(), path, headers, body).await
    }
}

/// Every write of what a tenant owns: those that a purge keeps out.
pub(crate) fn gated_writes() -> Vec<Operation> {
    let gated = |operation: &Operation| {
        let id = operation.id.as_str();
        // Tenants themselves have no gate, and the purge is the one that has it.
        let of_tenants = ["create_tenant", "delete_tenant", "purge_tenant"].contains(&id);
        // Locks and jobs are no data of a tenant.
        let of_locks = operation.template.contains("/locks/") || operation.template.ends_with("/lock");
        let of_jobs = operation.template.starts_with("/v1/jobs");
        !(operation.reads() || of_tenants || of_locks || of_jobs)
    };
    operations().into_iter().filter(gated).collect()
}
