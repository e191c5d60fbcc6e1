//! What no answer and no line of a log may contain, whatever is tested: every answer and every line is looked at.

use std::collections::BTreeSet;

/// The password that services are given for their database. The test servers ask for none.
pub const DATABASE_PASSWORD: &str = "the-password-of-the-database";

/// The names that the tests give their tenants: they stand for nothing else.
const TENANTS: [&str; 6] = ["acme", "globex", "hooli", "initech", "zeta", "demo"];

/// Whether this answer is looked at: pages for people may show what a key looks like, and a new webhook's secret is told
/// once.
pub fn may_have_none(place: &str) -> bool {
    let tells_a_secret = place.contains("POST /v1/webhooks");
    place.contains(" /v1/") && !tells_a_secret
}

/// Fails if there is a secret, the address of the database or the text of a statement, or, in what is about a tenant,
/// the name of another.
pub fn assert_none(place: &str, text: &str) {
    let about = tenants(place);
    let what = if about.is_empty() || tenants(text).is_subset(&about) {
        found(text)
    } else {
        Some("another tenant's name")
    };
    if let Some(what) = what {
        panic!("{what} in {place}: {text}");
    }
}

/// As [`assert_none`], for a line of a log: it is about one tenant at most.
pub fn assert_none_in_log(line: &str) {
    let names = tenants(line);
    assert!(
        names.len() <= 1,
        "the names {names:?} in one line of the log: {line}"
    );
    assert_none("the log", line);
}

fn tenants(text: &str) -> BTreeSet<&str> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric());
    words.filter(|word| TENANTS.contains(word)).collect()
}

fn found(text: &str) -> Option<&'static str> {
    let keywords = ["SELECT ", "INSERT INTO ", "DELETE FROM ", "UPDATE "];
    let rest = [" FROM ", " VALUES ", " SET ", " WHERE ", "leasehold.", "pg_"];
    let is_statement = |text: &str| {
        keywords.iter().any(|keyword| {
            text.split_once(keyword)
                .is_some_and(|(_, after)| rest.iter().any(|part| after.contains(part)))
        })
    };
    // What a refused one is told that it should look like.
    let address = |scheme: &str| {
        let mut addresses = text.match_indices(scheme).map(|(at, _)| &text[at..]);
        addresses.any(|address| !address.starts_with("postgres://user@host:5432/database"))
    };
    let followed_by_hex = |prefix: &str| {
        text.match_indices(prefix).any(|(at, _)| {
            let secret = text[at + prefix.len()..].bytes();
            secret.take_while(u8::is_ascii_alphanumeric).count() >= 24
        })
    };
    if text.contains(DATABASE_PASSWORD) {
        Some("the database's password")
    } else if address("postgres://") || address("postgresql://") {
        Some("the database's address")
    } else if followed_by_hex("lh_") {
        Some("a key")
    } else if followed_by_hex("whsec_") {
        Some("a webhook's secret")
    } else if is_statement(text) {
        Some("a statement")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_about_one_tenant_does_not_name_another() {
        let fails = |check: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err();
        let of_acme = "the answer to GET /v1/tenants/acme/locks";
        for (place, text, is_wrong) in [
            (of_acme, r#"{"name":"workspace/acme/main"}"#, false),
            (of_acme, r#"{"name":"workspace/globex/main"}"#, true),
            (
                "the answer to GET /v1/webhooks?tenant_id=acme",
                r#"{"tenant_id":"globex"}"#,
                true,
            ),
            ("the answer to GET /v1/tenants", r#"["acme","globex"]"#, false),
        ] {
            assert_eq!(fails(&|| assert_none(place, text)), is_wrong, "{place} {text}");
        }
        for (line, is_wrong) in [
            (r#"request{path="/v1/tenants/acme/purge"} tenant="acme""#, false),
            (r#"request{path="/v1/tenants/acme/purge"} tenant="globex""#, true),
            (r#"a lock was lost lock="workspace/zeta/main""#, false),
        ] {
            assert_eq!(fails(&|| assert_none_in_log(line)), is_wrong, "{line}");
        }
    }

    #[test]
    fn secrets_are_found_and_words_are_not() {
        for (text, what) in [
            (
                r#"{"detail":"SELECT id FROM leasehold.leases"}"#,
                Some("a statement"),
            ),
            ("failed: UPDATE workspaces SET version = $1", Some("a statement")),
            ("SELECT pg_try_advisory_lock($1)", Some("a statement")),
            ("to postgres://u@h/db", Some("the database's address")),
            ("such as postgres://user@host:5432/database", None),
            (DATABASE_PASSWORD, Some("the database's password")),
            ("Bearer lh_0123456789abcdef0123456789abcdef", Some("a key")),
            (
                r#""secret":"whsec_0123456789abcdef0123456789abcdef""#,
                Some("a webhook's secret"),
            ),
            ("a key begins with lh_, a secret with whsec_", None),
            ("SELECT what you like; UPDATE your client", None),
        ] {
            assert_eq!(found(text), what, "{text}");
        }
    }
}
