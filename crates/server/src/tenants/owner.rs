//! Whose rows a request is about, where its path does not say so.

use diesel_async::AsyncPgConnection;
use leasehold_http::{Code, FieldError, Problem};

use crate::auth::Identity;
use crate::failure::Failure;
use crate::names::Slug;
use crate::tenants::routes::no_tenant;
use crate::tenants::store;

/// The tenant that a request names, or else the only one that its caller may see; `None` is all of them. 404 when the
/// caller may not see it.
pub(crate) fn seen<'a>(caller: &'a Identity, named: Option<&'a Slug>) -> Result<Option<&'a str>, Problem> {
    match (caller.tenant.as_deref(), named.map(Slug::as_str)) {
        (Some(own), Some(named)) if own != named => Err(no_tenant()),
        (own, named) => Ok(named.or(own)),
    }
}

/// The tenant of a row that is to be made. 422 when nothing says which.
pub(crate) fn of_new<'a>(caller: &'a Identity, named: Option<&'a Slug>) -> Result<&'a str, Problem> {
    let missing = || {
        Problem::invalid([FieldError::new(
            "tenant_id",
            "is missing: the key is for all tenants",
        )])
    };
    seen(caller, named)?.ok_or_else(missing)
}

/// Tells a tenant that has no rows from none at all, which is 404.
pub(crate) async fn must_exist(conn: &mut AsyncPgConnection, tenant: Option<&str>) -> Result<(), Failure> {
    if let Some(tenant) = tenant {
        store::get(conn, tenant).await?.ok_or_else(no_tenant)?;
    }
    Ok(())
}

/// 409 for a row that was there when its tenant was looked up and now is another one's, or has just come back: whoever
/// asks again meets it where it is.
pub(crate) fn moved() -> Problem {
    Problem::new(
        Code::ModifiedConcurrently,
        "the row went to another tenant meanwhile; nothing was changed",
    )
}
