//! [`Prepared`]: a statement that diesel-async prepares once a connection instead of each time, and whose one row is
//! believed when the statement has ended.

use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel_async::methods::LoadQuery;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

/// Wraps a query whose SQL text is the same on every call.
///
/// Diesel does not keep the prepared form of UPDATE, ON CONFLICT DO UPDATE and `sql_query`, which costs them a
/// second round trip each time. Inside this wrapper they are kept under their text and the types of their binds.
/// The cache has no limit, so a text that varies from call to call does not belong here.
#[derive(Debug, Clone, Copy)]
pub struct Prepared<Q>(pub Q);

impl<Q> Prepared<Q> {
    /// The first row, once the server has said that the statement is done.
    ///
    /// `RunQueryDsl::get_result` answers as soon as a row is there. Outside of a transaction the row of a statement that
    /// writes is sent before its commit, and comes first also when the commit then fails or the server crashes:
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY>.
    ///
    /// # Errors
    /// `NotFound` without a row, and what the server, or the way to it, refused.
    ///
    /// # Cancel safety
    /// The statement may or may not have had its effect.
    pub fn one<'query, 'conn, U>(self, conn: &'conn mut AsyncPgConnection) -> BoxFuture<'conn, QueryResult<U>>
    where
        U: Send + 'conn,
        Self: LoadQuery<'query, AsyncPgConnection, U> + 'query,
        'query: 'conn,
    {
        let rows = self.load(conn);
        rows.map(|rows: QueryResult<Vec<U>>| rows?.into_iter().next().ok_or(diesel::NotFound))
            .boxed()
    }
}

impl<Q: QueryFragment<Pg>> QueryFragment<Pg> for Prepared<Q> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk_ast(out)
    }

    fn is_safe_to_cache_prepared(&self, _backend: &Pg) -> QueryResult<bool> {
        Ok(true)
    }
}

impl<Q> QueryId for Prepared<Q> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<Q: Query> Query for Prepared<Q> {
    type SqlType = Q::SqlType;
}
