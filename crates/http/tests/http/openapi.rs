//! The shared parts of a document: complete, and equal to what is answered.

use leasehold_http::Code;
use leasehold_http::openapi::{ProblemComponents, ReadProblems, WaitPreference, WriteProblems};
use serde_json::Value;
use utoipa::OpenApi;

#[utoipa::path(put, path = "/plans", params(WaitPreference), responses((status = 204), WriteProblems))]
#[expect(dead_code, reason = "only its documentation is looked at")]
fn write() {}

#[utoipa::path(get, path = "/plans", responses((status = 204), ReadProblems))]
#[expect(dead_code, reason = "only its documentation is looked at")]
fn read() {}

#[derive(OpenApi)]
#[openapi(paths(write, read), modifiers(&ProblemComponents))]
struct Document;

fn document() -> Value {
    serde_json::to_value(Document::openapi()).unwrap()
}

fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(members) => {
            found.extend(members.get("$ref").and_then(Value::as_str));
            members.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn no_reference_dangles() {
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.contains(&"#/components/schemas/Problem"), "{found:?}");
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}

#[test]
fn statuses_are_those_of_the_codes() {
    let document = document();
    let listed = |method: &str| -> Vec<u16> {
        let responses = document["paths"]["/plans"][method]["responses"]
            .as_object()
            .unwrap();
        responses.keys().map(|status| status.parse().unwrap()).collect()
    };
    assert_eq!(listed("get"), [204, 400, 401, 403, 404, 408, 422, 500, 503]);
    assert_eq!(
        listed("put"),
        [204, 400, 401, 403, 404, 408, 409, 412, 413, 415, 422, 500, 503]
    );
    for code in Code::ALL {
        let status = code.status().as_str().to_owned();
        if code == Code::MethodNotAllowed {
            continue; // No operation is described for a method that there is not.
        }
        let text = document["paths"]["/plans"]["put"]["responses"][&status]["description"]
            .as_str()
            .unwrap();
        assert!(text.contains(&format!("`{code}`")), "{code}: {text}");
    }
}

#[test]
fn the_conflict_has_examples_with_the_members_of_the_schema() {
    let document = document();
    let conflict = &document["paths"]["/plans"]["put"]["responses"]["409"];
    assert!(conflict["headers"]["Retry-After"].is_object());
    let examples = conflict["content"]["application/problem+json"]["examples"]
        .as_object()
        .unwrap();
    let schema = &document["components"]["schemas"]["Problem"];
    for code in ["workspace_locked", "tenant_write_conflict", "lock_lost"] {
        let example = examples[code]["value"].as_object().unwrap();
        assert_eq!(example["code"], code);
        for member in example.keys() {
            assert!(schema["properties"][member].is_object(), "{member}");
        }
        for member in schema["required"].as_array().unwrap() {
            assert!(example.contains_key(member.as_str().unwrap()), "{code}: {member}");
        }
    }
    let lock = examples["workspace_locked"]["value"]["lock"].as_object().unwrap();
    let required = document["components"]["schemas"]["LockView"]["required"]
        .as_array()
        .unwrap();
    assert_eq!(lock.len(), required.len());
    assert_eq!(lock["acquired_at"], "2031-05-04T13:17:00.123456Z");
    assert_eq!(document, self::document(), "the document is the same every time");
}

#[test]
fn the_wait_is_a_header() {
    let document = document();
    let parameter = &document["paths"]["/plans"]["put"]["parameters"][0];
    assert_eq!(
        (parameter["name"].as_str(), parameter["in"].as_str()),
        (Some("Prefer"), Some("header"))
    );
    assert_eq!(parameter["required"], false);
    assert_eq!(
        document["components"]["securitySchemes"]["bearer"]["scheme"],
        "bearer"
    );
}
