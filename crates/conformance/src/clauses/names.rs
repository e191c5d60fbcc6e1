//! Which names are one name, and which are two.

use leasehold_domain::LockName;

use super::{give_back, refused, request, take};
use crate::Provider;

/// What no backend can hold is refused before anything is sent, naming the field.
pub async fn bad_name_table<P: Provider>(provider: &P) {
    let long = "x".repeat(LockName::MAX_BYTES + 1);
    let table: [&[&str]; 6] = [&[], &[""], &["tenant", ""], &["", "item"], &["nul\0"], &[&long]];
    for parts in table {
        let invalid = LockName::new(parts).expect_err("it is no name");
        assert_eq!(invalid.field(), "name", "{parts:?}");
    }
    assert_eq!(provider.residue().await, None);
}

/// Both can be held at once, so they are two names.
async fn are_two<P: Provider>(provider: &P, one: (&str, &str), other: (&str, &str)) {
    let lock = provider.process().await;
    let one = request(&provider.name(one.0, one.1).await);
    let other = request(&provider.name(other.0, other.1).await);
    assert_ne!(one.name(), other.name());
    let guards = (take(&*lock, &one).await, take(&*lock, &other).await);
    refused(&*lock, &one).await;
    refused(&*lock, &other).await;
    give_back(&*lock, guards.0).await;
    refused(&*lock, &other).await;
    give_back(&*lock, guards.1).await;
}

/// Upper and lower case are two names.
pub async fn case_sensitive<P: Provider>(provider: &P) {
    are_two(provider, ("names", "Plan"), ("names", "plan")).await;
}

/// Two Unicode normal forms of one word are two names.
pub async fn unicode_normal_form<P: Provider>(provider: &P) {
    are_two(provider, ("names", "caf\u{e9}"), ("names", "cafe\u{301}")).await;
}

/// White space counts, also at the end.
pub async fn white_space_counts<P: Provider>(provider: &P) {
    are_two(provider, ("names", "plan"), ("names", "plan ")).await;
    are_two(provider, ("names", "plan"), ("names", " plan")).await;
}

/// The same item of two tenants is two names.
pub async fn tenant_isolation<P: Provider>(provider: &P) {
    are_two(provider, ("tenant-a", "main"), ("tenant-b", "main")).await;
}

/// Where one part ends and the next begins counts.
pub async fn part_borders_count<P: Provider>(provider: &P) {
    are_two(provider, ("ab", "c"), ("a", "bc")).await;
    are_two(provider, ("a/b", "c"), ("a", "b/c")).await;
}

/// Long names differ by their last byte; nothing is cut off.
pub async fn long_names_count_to_the_end<P: Provider>(provider: &P) {
    let item = "n".repeat(400);
    let (one, other) = (format!("{item}1"), format!("{item}2"));
    are_two(provider, ("names", &one), ("names", &other)).await;
}

/// Text that means something to a database, a shell or a path is a name like any other.
pub async fn odd_names_are_names<P: Provider>(provider: &P) {
    let lock = provider.process().await;
    for item in [
        "'; DROP TABLE leases; --",
        "\"quoted\"",
        "back\\slash",
        "100%_",
        "$1",
        "../..",
        "line\nbreak\ttab",
        "\u{1f512}",
        "\u{202e}right to left",
        "|4:plan",
        "NULL",
    ] {
        let request = request(&provider.name("odd names", item).await);
        let guard = take(&*lock, &request).await;
        let held = refused(&*lock, &request).await.held.expect("somebody has it");
        assert_eq!(held.name, *request.name());
        give_back(&*lock, guard).await;
    }
}
