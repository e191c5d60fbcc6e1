//! [`WorkspaceWrite`]: what every write of a workspace has in common.
//!
//! A handler takes [`Locked`]`<WorkspaceWrite<Path>, Body>`, which authenticates, reads and checks, looks whether it was
//! done before, and only then locks; then it runs its statements by [`change`] (which makes the version) or
//! [`WorkspaceWrite::touch`] (which makes none). Both enter the tenant's gate first, commit only while the lock is still
//! ours, and release it with the commit.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use diesel_async::AsyncPgConnection;
use leasehold_domain::{DistributedLock, Durability, Holder, LockGuard, LockRequest};
use leasehold_http::{Code, Early, LockTarget, Locked, Problem};
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use crate::answer::Answer;
use crate::auth::{Access, Identity, Write};
use crate::config::WorkspaceLockMode;
use crate::failure::Failure;
use crate::idempotency::Once;
use crate::state::{AppState, workspace_lock_name};
use crate::versions;
use crate::workspaces::model::InWorkspace;
use crate::workspaces::store;

/// A write somewhere in a workspace.
#[derive(Debug)]
pub(crate) struct WorkspaceWrite<P> {
    /// Where.
    pub(crate) path: P,
    /// What is known of its idempotency key.
    pub(crate) once: Once,
    caller: Identity,
    if_match: Option<IfMatch>,
    operation: String,
}

impl<P, B> LockTarget<AppState, B> for WorkspaceWrite<P>
where
    P: InWorkspace + DeserializeOwned,
    B: Send + Sync,
{
    const CONFLICT: Code = Code::WorkspaceLocked;

    async fn authorize(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let Access { caller, path, .. } = Access::<P, Write>::from_request_parts(parts, state).await?;
        let if_match = IfMatch::of(&parts.headers)?;
        Ok(Self {
            path,
            once: Once::of(parts, &caller)?,
            caller,
            if_match,
            operation: operation(parts),
        })
    }

    async fn admit(&self, _: &B, state: &AppState) -> Result<(), Early> {
        self.once.look(state).await
    }

    fn lock(&self, state: &AppState) -> Arc<dyn DistributedLock> {
        state.locks()
    }

    fn request(&self, _: &B, state: &AppState) -> Result<LockRequest, Problem> {
        let workspace = self.path.workspace();
        let settings = state.settings();
        let holder = Holder::new(&self.caller.subject, &self.operation).with_instance(&settings.instance);
        let max_hold = if P::BATCH {
            settings.batch_hold
        } else {
            settings.write_hold
        };
        let request = LockRequest::new(workspace_lock_name(workspace.tenant, workspace.name)?, holder)
            .with_ttl(settings.lease)
            .with_max_hold(max_hold)
            // Its only effect is the fenced transaction in the same database.
            .with_durability(Durability::WithWrite);
        Ok(request)
    }

    fn max_wait(&self, state: &AppState) -> Duration {
        state.settings().max_wait
    }
}

/// `"<METHOD> <path>"`, as sent, cut to what a holder may say.
fn operation(parts: &Parts) -> String {
    let mut text = format!("{} {}", parts.method, parts.uri.path());
    if text.len() > Holder::MAX_FIELD_BYTES {
        text.truncate(text.floor_char_boundary(Holder::MAX_FIELD_BYTES - '…'.len_utf8()));
        text.push('…');
    }
    text
}

/// Runs the statements of a write and makes the version that it results in, which `answer` tells of. Whatever fails,
/// nothing was written.
pub(crate) async fn change<P, B, W>(
    state: &AppState,
    locked: &Locked<WorkspaceWrite<P>, B>,
    work: W,
    answer: impl FnOnce(i64) -> Result<Answer, Failure>,
) -> Result<Answer, Problem>
where
    P: InWorkspace,
    W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<(), Failure>,
{
    let write = &locked.target;
    let id = write.path.workspace();
    let entry = versions::store::Entry {
        operation: &write.operation,
        author: &write.caller.subject,
        raises_token: state.settings().lock_mode == WorkspaceLockMode::Advisory,
    };
    write
        .touch(state, &locked.guard, async |conn| {
            work(conn).await?;
            let version = versions::store::record(conn, id, &entry).await?;
            answer(version.ok_or_else(store::no_workspace)?)
        })
        .await
}

impl<P: InWorkspace> WorkspaceWrite<P> {
    /// Runs the statements of a write that makes no version.
    pub(crate) async fn touch<W>(
        &self,
        state: &AppState,
        guard: &LockGuard,
        work: W,
    ) -> Result<Answer, Problem>
    where
        W: AsyncFnOnce(&mut AsyncPgConnection) -> Result<Answer, Failure>,
    {
        let tenant = self.path.workspace().tenant;
        state
            .write_under(guard, &self.once, tenant, async |conn| {
                self.check_version(conn).await?;
                work(conn).await
            })
            .await
    }

    /// Under the lock, so that what is compared cannot change before the commit.
    pub(crate) async fn check_version(&self, conn: &mut AsyncPgConnection) -> Result<(), Failure> {
        if self.if_match.is_none() {
            return Ok(());
        }
        let current = store::version(conn, self.path.workspace())
            .await?
            .ok_or_else(store::no_workspace)?;
        Ok(self.admits(current)?)
    }

    /// 412 when the write is meant for another version.
    pub(crate) fn admits(&self, current: i64) -> Result<(), Problem> {
        match &self.if_match {
            Some(if_match) if !if_match.admits(current) => Err(Problem::new(
                Code::VersionMismatch,
                format!("the current version is {current}"),
            )),
            _ => Ok(()),
        }
    }
}

/// The header that makes a write conditional.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it is documentation")]
pub(crate) struct Condition {
    /// The version that the write is meant for, as an entity tag. When the workspace is at another one the answer
    /// is 412 and nothing is written.
    #[param(rename = "If-Match", value_type = String, required = false, example = "\"7\"")]
    if_match: Option<String>,
}

/// The entity tags of `If-Match` (RFC 9110, 13.1.1), compared strongly.
#[derive(Clone, Debug, PartialEq, Eq)]
enum IfMatch {
    Any,
    OneOf(Vec<String>),
}

impl IfMatch {
    fn of(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let mut tags = Vec::new();
        let mut lines = headers.get_all(header::IF_MATCH).iter().peekable();
        if lines.peek().is_none() {
            return Ok(None);
        }
        for line in lines {
            let line = line.to_str().map_err(|_| malformed())?;
            if line.trim() == "*" {
                return Ok(Some(Self::Any));
            }
            tags.extend(entity_tags(line).ok_or_else(malformed)?);
        }
        Ok(Some(Self::OneOf(tags)))
    }

    fn admits(&self, version: i64) -> bool {
        match self {
            Self::Any => true,
            Self::OneOf(tags) => tags.contains(&entity_tag(version)),
        }
    }
}

fn malformed() -> Problem {
    Problem::malformed("If-Match", "must be `*` or entity tags such as \"7\"")
}

/// The entity tag of a version.
pub(crate) fn entity_tag(version: i64) -> String {
    format!("\"{version}\"")
}

/// The tags of a list, each as it is written; `None` when it is no such list.
pub(crate) fn entity_tags(list: &str) -> Option<Vec<String>> {
    let mut tags = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix(',') {
            rest = after.trim_start();
            continue;
        }
        let opaque = rest.strip_prefix("W/").unwrap_or(rest).strip_prefix('"')?;
        let end = rest.len() - opaque.len() + opaque.find('"')? + 1;
        tags.push(rest[..end].to_owned());
        rest = rest[end..].trim_start();
        if !(rest.is_empty() || rest.starts_with(',')) {
            return None;
        }
    }
    (!tags.is_empty()).then_some(tags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderValue, Request};

    fn of(lines: &[&str]) -> Result<Option<IfMatch>, u16> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(
                header::IF_MATCH,
                HeaderValue::from_bytes(line.as_bytes()).unwrap(),
            );
        }
        IfMatch::of(&headers).map_err(|problem| problem.body().status)
    }

    #[test]
    fn if_match_compares_strongly() {
        let admits = |line: &str, version| of(&[line]).unwrap().unwrap().admits(version);
        assert!(admits("\"7\"", 7));
        assert!(admits("*", 7));
        assert!(admits("\"6\", \"7\"", 7));
        assert!(admits("\"a,b\",\"7\"", 7));
        assert!(!admits("\"8\"", 7));
        assert!(!admits("W/\"7\"", 7), "a weak tag never matches");
        assert!(
            of(&["\"6\"", "\"7\""]).unwrap().unwrap().admits(7),
            "two lines are one list"
        );
        assert_eq!(of(&[]), Ok(None));
    }

    #[test]
    fn what_is_no_list_of_tags_is_400() {
        for bad in ["", "7", "\"7", "7\"", "\"7\" \"8\"", "\"7\"x", ",", "é"] {
            assert_eq!(of(&[bad]), Err(400), "{bad:?}");
        }
    }

    #[test]
    fn an_operation_fits_into_a_holder() {
        let path = format!("/v1/{}", "k".repeat(600));
        let (parts, ()) = Request::put(path).body(()).unwrap().into_parts();
        let operation = operation(&parts);
        assert!(operation.starts_with("PUT /v1/kkk") && operation.ends_with('…'));
        assert_eq!(operation.len(), Holder::MAX_FIELD_BYTES);
    }
}
