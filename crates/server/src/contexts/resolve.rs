//! Resolving: from a snapshot and a situation to values. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Number, Value};

use crate::versions::model::{Snapshot, SnapshotContext};

/// The default values, overridden by every context whose whole condition is met. Where several override a key, the
/// higher priority wins, then the one with more conditions, then the one made later.
pub fn resolve(snapshot: Snapshot, situation: &Map<String, Value>) -> BTreeMap<String, Value> {
    let mut matching: Vec<SnapshotContext> = snapshot
        .contexts
        .into_iter()
        .filter(|context| is_met(&context.condition, situation))
        .collect();
    // Stable, and they come oldest first: the winner of each key is the last to write it.
    matching.sort_by_key(|context| (context.priority, context.condition.len()));
    let mut values = snapshot.default_config;
    values.extend(matching.into_iter().flat_map(|context| context.overrides));
    values
}

fn is_met(condition: &Map<String, Value>, situation: &Map<String, Value>) -> bool {
    condition
        .iter()
        .all(|(dimension, wanted)| situation.get(dimension).is_some_and(|given| equal(wanted, given)))
}

/// Equality of JSON: the order of members does not count, and neither does how a number is written.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => equal_numbers(a, b),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        _ => a == b,
    }
}

fn equal_numbers(a: &Number, b: &Number) -> bool {
    // Exactly where both are integers, else as the doubles that they are.
    let integer = |number: &Number| {
        number
            .as_i64()
            .map(i128::from)
            .or_else(|| number.as_u64().map(i128::from))
    };
    match (integer(a), integer(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a.as_f64() == b.as_f64(),
    }
}

#[cfg(test)]
#[expect(
    clippy::needless_pass_by_value,
    reason = "the values are literals at the call sites"
)]
mod tests {
    use super::*;
    use serde_json::json;
    use uuid::Uuid;

    fn context(condition: Value, overrides: Value, priority: i64) -> Value {
        json!({"id": Uuid::nil(), "condition": condition, "overrides": overrides, "priority": priority})
    }

    #[track_caller]
    fn resolves(contexts: &[Value], situation: Value, expected: Value) {
        let snapshot = json!({"default_config": {"color": "grey", "size": 1}, "contexts": contexts});
        let snapshot: Snapshot = serde_json::from_value(snapshot).unwrap();
        let Value::Object(situation) = situation else {
            panic!("a situation is an object")
        };
        assert_eq!(json!(resolve(snapshot, &situation)), expected);
    }

    #[test]
    fn without_a_matching_context_the_defaults_remain() {
        let contexts = [context(json!({"city": "Bonn"}), json!({"color": "red"}), 0)];
        resolves(&contexts, json!({}), json!({"color": "grey", "size": 1}));
        resolves(
            &contexts,
            json!({"city": "Ulm"}),
            json!({"color": "grey", "size": 1}),
        );
        resolves(
            &contexts,
            json!({"city": null}),
            json!({"color": "grey", "size": 1}),
        );
    }

    #[test]
    fn every_condition_must_be_met() {
        let contexts = [context(
            json!({"city": "Bonn", "app": "web"}),
            json!({"color": "red"}),
            0,
        )];
        resolves(
            &contexts,
            json!({"city": "Bonn"}),
            json!({"color": "grey", "size": 1}),
        );
        resolves(
            &contexts,
            json!({"city": "Bonn", "app": "web", "x": 1}),
            json!({"color": "red", "size": 1}),
        );
    }

    #[test]
    fn an_empty_condition_always_matches() {
        let contexts = [context(json!({}), json!({"size": 2}), 0)];
        resolves(&contexts, json!({}), json!({"color": "grey", "size": 2}));
    }

    #[test]
    fn priority_then_conditions_then_age() {
        let all = json!({"a": 1, "b": 1});
        let low = context(all.clone(), json!({"color": "low", "size": 5}), -1);
        let two = context(all.clone(), json!({"color": "two"}), 0);
        let one = context(json!({"a": 1}), json!({"color": "one"}), 0);
        let later = context(json!({"b": 1}), json!({"color": "later"}), 0);
        let high = context(json!({}), json!({"color": "high"}), 1);
        let color = |contexts: &[&Value], expected: &str, size: i64| {
            let contexts: Vec<Value> = contexts.iter().map(|context| (*context).clone()).collect();
            resolves(&contexts, all.clone(), json!({"color": expected, "size": size}));
        };
        color(&[&high, &two, &low], "high", 5);
        color(&[&two, &one, &later, &low], "two", 5);
        color(&[&one, &later], "later", 1);
        color(&[&later, &one], "one", 1);
    }

    #[test]
    fn values_compare_as_json() {
        let met = |wanted: Value, given: Value| equal(&wanted, &given);
        assert!(met(json!(1), json!(1.0)));
        assert!(met(
            json!({"a": [1, {"b": null}], "c": 2}),
            json!({"c": 2.0, "a": [1.0, {"b": null}]})
        ));
        assert!(!met(
            json!(9_007_199_254_740_993_i64),
            json!(9_007_199_254_740_992_i64)
        ));
        assert!(!met(json!("1"), json!(1)));
        assert!(!met(json!(true), json!(1)));
        assert!(!met(json!([1, 2]), json!([2, 1])));
        assert!(!met(json!({"a": 1}), json!({"a": 1, "b": 1})));
        assert!(!met(json!(null), json!(false)));
    }
}
