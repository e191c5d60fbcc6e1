//! The document that describes the API, and what the service says of itself.

use std::collections::BTreeSet;

use axum::http::Method;
use leasehold_server::app;
use leasehold_server::config::WorkspaceLockMode;
use serde_json::Value;

use crate::support::Api;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/leasehold-v1.json");

fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &Value)| {
        let methods = ["get", "put", "post", "patch", "delete"];
        let of_method = |method: &str| Some((method.to_owned(), path.clone(), item.get(method)?.clone()));
        methods.into_iter().filter_map(of_method).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_path).collect()
}

#[test]
fn the_committed_document_is_what_is_served() {
    let committed = std::fs::read_to_string(COMMITTED).unwrap();
    let served = app::openapi().to_pretty_json().unwrap();
    assert!(
        committed.trim_end() == served,
        "run `cargo xtask openapi` and commit what it writes"
    );
}

#[test]
fn every_operation_is_described() {
    let document = serde_json::to_value(app::openapi()).unwrap();
    let operations = operations(&document);
    assert!(operations.len() >= 27, "{}", operations.len());
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations {
        let what = format!("{method} {path}");
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{what}");
        assert_eq!(operation["tags"].as_array().unwrap().len(), 1, "{what}");
        assert!(
            ids.insert(operation["operationId"].as_str().unwrap().to_owned()),
            "{what}: the id is not its own"
        );
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{what}");
        for (status, response) in responses
            .iter()
            .filter(|(status, _)| status.starts_with(['4', '5']))
        {
            assert!(
                response["content"].get("application/problem+json").is_some(),
                "{what} {status}"
            );
        }
        if path.starts_with("/v1") {
            assert!(
                ["401", "403", "404", "500", "503"]
                    .iter()
                    .all(|status| responses.contains_key(*status)),
                "{what}"
            );
            let reads = method == "get" || path.ends_with("/resolve");
            assert_eq!(
                responses.contains_key("409"),
                !reads,
                "{what}: what changes something lists 409"
            );
        }
        if let Some(conflict) = responses.get("409") {
            let examples = &conflict["content"]["application/problem+json"]["examples"];
            let lock = &examples["workspace_locked"]["value"]["lock"];
            assert!(
                lock["locked_by"].is_string() && lock["expires_at"].is_string(),
                "{what}: {examples:#}"
            );
        }
    }
}

#[test]
fn every_write_but_those_of_locks_takes_an_idempotency_key() {
    let document = serde_json::to_value(app::openapi()).unwrap();
    let mut keyed = 0;
    for (method, path, operation) in operations(&document) {
        let of_locks = path.contains("/locks/") || path.ends_with("/lock");
        let takes_one = method != "get" && !path.ends_with("/resolve") && !of_locks;
        let parameters = operation["parameters"].as_array();
        let has_one = parameters
            .into_iter()
            .flatten()
            .any(|parameter| parameter["name"] == "Idempotency-Key" && parameter["in"] == "header");
        assert_eq!(has_one, takes_one, "{method} {path}");
        for (status, response) in operation["responses"].as_object().unwrap() {
            let replayed = response["headers"].get("Idempotency-Replayed").is_some();
            let success = status.starts_with('2');
            assert_eq!(replayed, takes_one && success, "{method} {path} {status}");
        }
        keyed += usize::from(has_one);
    }
    assert!(keyed >= 20, "{keyed}");
}

#[test]
fn every_reference_leads_somewhere() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members.values().for_each(|member| references(member, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    let document = serde_json::to_value(app::openapi()).unwrap();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(!found.is_empty());
    for reference in found {
        assert!(
            document.pointer(reference.trim_start_matches('#')).is_some(),
            "{reference} leads nowhere"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_to_everybody() {
    let api = Api::start(WorkspaceLockMode::Lease).await.with_key("");
    let document = api.get("/openapi.json").await.is(200);
    assert_eq!(document, serde_json::to_value(app::openapi()).unwrap());

    // The page shows the document and loads nothing from elsewhere.
    let page = api.get("/docs/").await.is(200);
    let page = page.as_str().unwrap();
    let initializer = api.get("/docs/swagger-initializer.js").await.is(200);
    let initializer = initializer.as_str().unwrap();
    assert!(
        initializer.contains("/openapi.json") && initializer.contains("\"validatorUrl\": \"none\""),
        "{initializer}"
    );
    for text in [page, initializer] {
        assert!(
            !text.contains("http://") && !text.contains("https://") && !text.contains("src=\"//"),
            "{text}"
        );
    }

    for code in leasehold_http::Code::ALL {
        let path = format!("/problems/{code}");
        let kind = api.get(&path).await.is(200);
        assert_eq!(
            (kind["code"].as_str(), kind["status"].as_u64()),
            (Some(code.as_str()), Some(code.status().as_u16().into()))
        );
        assert!(kind["advice"].as_str().unwrap().len() > 20);
        let markdown = api
            .send(Method::GET, &path, &[("accept", "text/markdown")], None)
            .await;
        assert_eq!(
            markdown.header("content-type"),
            Some("text/markdown; charset=utf-8")
        );
        assert!(markdown.body.as_str().unwrap().starts_with("# "));
    }
    api.get("/problems/none").await.problem(404, "not_found");

    assert_eq!(api.get("/healthz").await.is(200)["status"], "ok");
    assert_eq!(api.get("/readyz").await.is(200)["status"], "ok");
    api.state.drain();
    api.get("/readyz").await.problem(503, "unavailable");
    assert_eq!(api.get("/healthz").await.is(200)["status"], "ok");
}
