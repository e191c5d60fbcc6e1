//! The erasure of a user: from all tenants at once or from none.
//!
//! Which tenants have something of the user is looked up before their gates are entered, so it may be outdated by then.
//! What has come up elsewhere meanwhile is found when the rest has been deleted, and everything begins anew.

use diesel_async::AsyncPgConnection;
use leasehold_http::{Code, Problem};

use crate::answer::Answer;
use crate::feedback_records::store;
use crate::idempotency::Once;
use crate::state::AppState;
use crate::tenants::owner;

/// How often it begins before the client is told to come again.
const ATTEMPTS: usize = 4;

/// Deletes what there is of a user in this tenant, or in all.
pub(crate) async fn erase(
    state: &AppState,
    once: &Once,
    user: &str,
    tenant: Option<&str>,
) -> Result<Answer, Problem> {
    let tenants = async |conn: &mut AsyncPgConnection| {
        let tenants = store::tenants_of_user(conn, user, tenant).await?;
        if tenants.is_empty() {
            owner::must_exist(conn, tenant).await?;
        }
        Ok(tenants)
    };
    let write = async |conn: &mut AsyncPgConnection, tenants: &[String]| {
        let erased = store::erase(conn, user, tenants).await?;
        if store::tenants_of_user(conn, user, tenant).await?.is_empty() {
            Answer::ok(&erased)
        } else {
            let detail = "there is more of the user than there was; nothing was erased";
            Err(Problem::new(Code::ModifiedConcurrently, detail).into())
        }
    };
    let mut attempt = 1;
    loop {
        match state.gated_row(once, tenants, write).await {
            Err(problem) if problem.body().code == Code::ModifiedConcurrently && attempt < ATTEMPTS => {
                attempt += 1;
            }
            answer => return answer,
        }
    }
}
