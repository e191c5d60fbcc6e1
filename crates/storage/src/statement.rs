//! [`Prepared`]: a statement that diesel-async prepares once a connection instead of each time.

use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};

/// Wraps a query whose SQL text is the same on every call.
///
/// Diesel does not keep the prepared form of UPDATE, ON CONFLICT DO UPDATE and `sql_query`, which costs them a
/// second round trip each time. Inside this wrapper they are kept under their text and the types of their binds.
/// The cache has no limit, so a text that varies from call to call does not belong here.
#[derive(Debug, Clone, Copy)]
pub struct Prepared<Q>(pub Q);

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
