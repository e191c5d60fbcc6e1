//! What the operations of a batch come to: pure, so that one statement can do what a thousand operations say.

use std::collections::{BTreeMap, BTreeSet};

use leasehold_http::FieldError;
use serde_json::Value;

use crate::default_config::model::Operation;

/// What there is of the keys that a batch deletes.
#[derive(Clone, Debug, Default)]
pub struct Present {
    /// The keys that exist.
    pub keys: BTreeSet<String>,
    /// The keys that a context overrides: they must stay.
    pub overridden: BTreeSet<String>,
}

/// What is to be done in the end.
#[derive(Debug, Default, PartialEq)]
pub struct Plan<'a> {
    /// The last value of each key that is there in the end.
    pub puts: Vec<Put<'a>>,
    /// The keys that were there and are not in the end.
    pub deletes: Vec<&'a str>,
}

/// A key and its value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Put<'a> {
    /// The key.
    pub key: &'a str,
    /// Its value.
    pub value: &'a Value,
    /// What it is for.
    pub description: Option<&'a str>,
}

/// The keys that a batch deletes somewhere, whose presence must be known to plan it.
pub fn deleted_keys(operations: &[Operation]) -> Vec<&str> {
    let mut keys = BTreeSet::new();
    for operation in operations {
        if let Operation::Delete { key } = operation {
            keys.insert(key.as_str());
        }
    }
    keys.into_iter().collect()
}

/// Goes through the operations in their order.
///
/// # Errors
/// Every operation that cannot be: one that deletes a key that is not there at that point, and the last one that
/// deletes a key which a context overrides, unless the key is put again.
pub fn plan<'a>(operations: &'a [Operation], present: &Present) -> Result<Plan<'a>, Vec<FieldError>> {
    #[derive(Clone, Copy)]
    enum End<'a> {
        Put(Put<'a>),
        Deleted { at: usize },
    }
    let mut ends: BTreeMap<&str, End<'a>> = BTreeMap::new();
    // The order in which keys were first named is the order in which new ones are made.
    let mut order = Vec::new();
    let mut errors = BTreeMap::new();
    for (at, operation) in operations.iter().enumerate() {
        let (key, end) = match operation {
            Operation::Put {
                key,
                value,
                description,
            } => {
                let put = Put {
                    key: key.as_str(),
                    value,
                    description: description.as_deref(),
                };
                (key.as_str(), End::Put(put))
            }
            Operation::Delete { key } => (key.as_str(), End::Deleted { at }),
        };
        let there = match ends.get(key) {
            Some(End::Put(_)) => true,
            Some(End::Deleted { .. }) => false,
            None => present.keys.contains(key),
        };
        if matches!(end, End::Deleted { .. }) && !there {
            errors.insert(at, format!("there is no key `{key}` to delete"));
        }
        if ends.insert(key, end).is_none() {
            order.push(key);
        }
    }
    let mut plan = Plan::default();
    for key in order {
        match ends.get(key) {
            Some(End::Put(put)) => plan.puts.push(*put),
            Some(End::Deleted { at }) if present.overridden.contains(key) => {
                errors
                    .entry(*at)
                    .or_insert_with(|| format!("the key `{key}` is overridden by a context"));
            }
            Some(End::Deleted { .. }) if present.keys.contains(key) => plan.deletes.push(key),
            Some(End::Deleted { .. }) | None => {}
        }
    }
    if errors.is_empty() {
        return Ok(plan);
    }
    let at_operation = |(at, message)| FieldError::new(format!("operations[{at}]"), message);
    Err(errors.into_iter().map(at_operation).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn operations(list: Value) -> Vec<Operation> {
        serde_json::from_value(list).unwrap()
    }

    fn present(keys: &[&str], overridden: &[&str]) -> Present {
        let set = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        Present {
            keys: set(keys),
            overridden: set(overridden),
        }
    }

    #[test]
    fn the_last_word_on_a_key_counts() {
        let list = operations(json!([
            {"op": "put", "key": "b", "value": 1},
            {"op": "put", "key": "a", "value": 1},
            {"op": "delete", "key": "b"},
            {"op": "put", "key": "a", "value": 2},
            {"op": "delete", "key": "old"},
            {"op": "put", "key": "old", "value": 3},
            {"op": "delete", "key": "gone"},
        ]));
        let plan = plan(&list, &present(&["old", "gone"], &["old"])).unwrap();
        let puts: Vec<_> = plan.puts.iter().map(|put| (put.key, put.value.clone())).collect();
        assert_eq!(puts, [("a", json!(2)), ("old", json!(3))]);
        assert_eq!(plan.deletes, ["gone"]);
        assert_eq!(deleted_keys(&list), ["b", "gone", "old"]);
    }

    #[test]
    fn every_bad_operation_is_named() {
        let list = operations(json!([
            {"op": "delete", "key": "missing"},
            {"op": "delete", "key": "used"},
            {"op": "put", "key": "a", "value": null},
            {"op": "delete", "key": "a"},
            {"op": "delete", "key": "a"},
        ]));
        let errors = plan(&list, &present(&["used"], &["used"])).unwrap_err();
        let fields: Vec<_> = errors.iter().map(|error| error.field.as_str()).collect();
        assert_eq!(fields, ["operations[0]", "operations[1]", "operations[4]"]);
    }
}
