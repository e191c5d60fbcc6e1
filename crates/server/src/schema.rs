//! The tables that the service needs: the library's and its own.

use leasehold_storage::embed_migrations;
use leasehold_storage::migrate::{MigrationSet, Migrations};

/// The tables of the reference API, in the schema `public`.
const SERVER: MigrationSet = embed_migrations!(
    "server",
    schema: "public",
    works_since: "2026-11-21-000101",
    "../../../migrations/server",
    [
        "2026-11-21-000101_reference_api",
        "2026-11-21-000102_writes",
        "2026-11-21-000103_tenant_rows",
        "2026-11-21-000104_webhook_health"
    ]
);

/// All of them, in their order.
pub fn migrations() -> Migrations {
    Migrations::storage().and(SERVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_is_embedded_in_order() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations/server");
        let mut folders: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        folders.sort();
        let embedded: Vec<_> = SERVER.steps.iter().map(|step| step.name.to_owned()).collect();
        assert_eq!(embedded, folders);
    }
}
