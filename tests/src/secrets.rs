//! What no answer and no line of a log may contain, whatever is tested: every answer and every line is looked at.

/// The password that services are given for their database. The test servers ask for none.
pub const DATABASE_PASSWORD: &str = "the-password-of-the-database";

/// Whether this answer is looked at: pages for people may show what a key looks like, and a new webhook's secret is told
/// once.
pub fn may_have_none(place: &str) -> bool {
    let tells_a_secret = place.contains("POST /v1/webhooks");
    place.contains(" /v1/") && !tells_a_secret
}

/// Fails if there is a secret, the address of the database or the text of a statement.
pub fn assert_none(place: &str, text: &str) {
    if let Some(what) = found(text) {
        panic!("{what} in {place}: {text}");
    }
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
