//! Keys that this crate computes are the keys that SQL computes.

use leasehold_domain::LockName;
use leasehold_storage::advisory::{AdvisoryKey, compat};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::support::TestDatabase;

/// Random texts, with all lengths up to 100 bytes and more.
fn texts() -> Vec<String> {
    let mut runner = TestRunner::default();
    let any = prop_oneof!["[ -~]{0,100}", "[^\0]{0,40}"];
    let random = (0..300).map(|_| any.new_tree(&mut runner).unwrap().current());
    random.chain((0..=100).map(|length| "x".repeat(length))).collect()
}

#[tokio::test]
async fn tenant_gates_have_the_key_that_the_server_computes() {
    let texts = texts();
    let sql = "SELECT hashtextextended('tenant_write|' || octet_length(t) || ':' || t, 0)
        FROM unnest($1::text[]) WITH ORDINALITY AS given (t, n) ORDER BY n";
    let rows = TestDatabase::create()
        .await
        .client()
        .await
        .query(sql, &[&texts])
        .await
        .unwrap();
    assert_eq!(rows.len(), texts.len());
    for (text, row) in texts.iter().zip(rows) {
        assert_eq!(
            compat::tenant_write(text),
            AdvisoryKey::Big(row.get(0)),
            "{text:?}"
        );
    }
}

#[tokio::test]
async fn the_documented_sql_computes_the_key_of_a_name() {
    let source = include_str!("../src/advisory/key.rs");
    let (_, after) = source.split_once("```sql").unwrap();
    let (block, _) = after.split_once("```").unwrap();
    let documented = block.replace("///", "");
    let expression = documented.replace("'|1:a'", "$1::text");
    assert_ne!(expression, documented, "the example has lost its name");
    let client = TestDatabase::create().await.client().await;
    let statement = client.prepare(&format!("SELECT {expression}")).await.unwrap();
    for text in texts().iter().filter(|text| !text.is_empty()) {
        let name = LockName::new(["tenant", text]).unwrap();
        let row = client.query_one(&statement, &[&name.encoded()]).await.unwrap();
        assert_eq!(AdvisoryKey::of(&name), AdvisoryKey::Big(row.get(0)), "{text:?}");
    }
}
