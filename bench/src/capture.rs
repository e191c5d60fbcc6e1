//! The statements that the library really sends, so that the lanes beside it send the same.
//!
//! On a pool of one connection every statement that the library prepared stands in `pg_prepared_statements` of
//! that very session. So nothing has to be copied here, and nothing can drift.

use diesel::QueryableByName;
use diesel::sql_types::Text;
use diesel_async::RunQueryDsl;
use leasehold_storage::Database;

use crate::Result;
use crate::database::BenchDatabase;

#[derive(QueryableByName)]
struct PreparedRow {
    #[diesel(sql_type = Text)]
    statement: String,
}

/// The texts that a piece of work sent.
pub(crate) struct Captured(Vec<String>);

impl Captured {
    /// Runs `work` on a pool of one connection.
    pub(crate) async fn of(
        database: &BenchDatabase,
        work: impl AsyncFnOnce(&Database) -> Result,
    ) -> Result<Self> {
        let db = database.open(1).await?;
        work(&db).await?;
        let rows: Vec<PreparedRow> = db
            .read(async |conn| {
                diesel::sql_query("SELECT statement FROM pg_prepared_statements ORDER BY prepare_time")
                    .load(conn)
                    .await
            })
            .await?;
        Ok(Self(rows.into_iter().map(|row| row.statement).collect()))
    }

    /// The only one with this in it.
    pub(crate) fn find(&self, part: &str) -> Result<String> {
        let mut found = self.0.iter().filter(|text| text.contains(part));
        match (found.next(), found.next()) {
            (Some(text), None) => Ok(text.clone()),
            (None, _) => Err(format!("the library sent no statement with {part:?}").into()),
            (Some(_), Some(_)) => Err(format!("the library sent several statements with {part:?}").into()),
        }
    }
}
