//! The routes of locks.
//!
//! A request that waits holds no connection of the database. When its client hangs up it is dropped, and with it the
//! wait, or the lock that it was granted in that moment. These calls are no writes of the tenant: they enter no gate,
//! and a lock id does for them what an idempotency key does for writes.

use std::ops::RangeInclusive;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use leasehold_domain::{
    AcquireError, DistributedLock, Durability, ExtendError, HeldLock, Holder, LockId, LockName, LockRequest,
    Released,
};
use leasehold_http::openapi::{ReadProblems, WaitPreference, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, LockScope, Problem, operation, preferred_wait};
use leasehold_storage::{Chosen, ClientLease, ClientLeases, HandedOver};

use crate::auth::{Access, Manage, Write};
use crate::locks::model::{
    AcquireLock, ExtendLock, FIRST_PART, GrantedLock, LockCursor, LockItem, LockPage, LockPageQuery,
    LockPath, ReleaseLock, ReleasedLock, lock_name,
};
use crate::state::AppState;
use crate::tenants::model::TenantPath;
use crate::workspaces::model::ForceQuery;

fn not_held() -> Problem {
    Problem::not_found("nobody holds the lock")
}

/// How many wait for each of some locks, in this process and in others.
async fn waiters<'a>(
    state: &AppState,
    names: impl IntoIterator<Item = &'a LockName>,
) -> Result<impl Fn(&LockName) -> usize, Problem> {
    let elsewhere = state.db().waiting_elsewhere(names).await?;
    Ok(move |name: &LockName| {
        let here = state.leases().waiting_for(name);
        here + elsewhere.get(name).copied().unwrap_or_default()
    })
}

/// List the locks of a tenant
///
/// Those that are held now, oldest first.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/locks", tag = "locks", operation_id = "list_locks",
    params(TenantPath, LockPageQuery),
    responses((status = 200, description = "A page of locks", body = LockPage), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<TenantPath>,
    ApiQuery(query): ApiQuery<LockPageQuery>,
) -> Result<Json<LockPage>, Problem> {
    let (tenant, limit) = (access.path.tenant.as_str(), query.limit());
    let after = query.cursor.as_ref();
    let after = after.map(|cursor| (cursor.acquired_at, &cursor.name));
    let rows = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    let held = state.db().held_leases(&[FIRST_PART, tenant], after, rows).await?;
    let page = held.get(..limit).unwrap_or(&held);
    let next_cursor = page.last().filter(|_| held.len() > limit).and_then(|last| {
        Some(LockCursor {
            acquired_at: last.acquired_at?,
            name: last.name.clone(),
        })
    });
    let waiters = waiters(&state, page.iter().map(|lock| &lock.name)).await?;
    let item = |lock: &HeldLock| {
        let mut parts = lock.name.parts().skip(2);
        // A program may have locks with more parts under the same first ones: they are none of these.
        let (Some(name), None) = (parts.next(), parts.next()) else {
            return None;
        };
        Some(LockItem::of(name.to_owned(), lock, waiters(&lock.name)))
    };
    let items = page.iter().filter_map(item).collect();
    Ok(Json(LockPage { items, next_cursor }))
}

/// Get a lock
///
/// 404 when nobody holds it.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/locks/{name}", tag = "locks", operation_id = "get_lock",
    params(LockPath),
    responses((status = 200, description = "The lock and who holds it", body = LockItem), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<LockPath>,
) -> Result<Json<LockItem>, Problem> {
    let LockPath { tenant, name } = &access.path;
    let full = lock_name(tenant.as_str(), name.as_str())?;
    let held = state.leases().inspect(&full).await?.ok_or_else(not_held)?;
    let waiters = waiters(&state, [&full]).await?(&full);
    Ok(Json(LockItem::of(name.as_str().to_owned(), &held, waiters)))
}

/// Acquire a lock
///
/// It is held for `ttl_ms`, and longer when it is extended: the service does not do that by itself. 409 `lock_held` tells
/// who has it. With `wait_ms`, or `Prefer: wait=<seconds>`, the request waits in line first.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/locks/{name}/acquire", tag = "locks", operation_id = "acquire_lock",
    params(LockPath, WaitPreference), request_body = AcquireLock,
    responses((status = 200, description = "The lock is the client's", body = GrantedLock), WriteProblems),
)]
pub(crate) async fn acquire(
    State(state): State<AppState>,
    access: Access<LockPath, Write>,
    scope: LockScope,
    parts: Parts,
    ApiJson(body): ApiJson<AcquireLock>,
) -> Result<Json<GrantedLock>, Problem> {
    let LockPath { tenant, name } = &access.path;
    let chosen = body.lock_id.map(LockId::from);
    let (ttl, max_hold) = (body.ttl(), body.max_hold());
    let wait = wait(&body, &parts.headers, &scope, state.settings().max_wait);
    let operation = body.operation.unwrap_or_else(|| operation(&parts));
    let holder =
        Holder::new(access.caller.subject, operation).with_metadata(body.metadata.unwrap_or_default());
    let request = LockRequest::new(lock_name(tenant.as_str(), name.as_str())?, holder)
        .with_ttl(ttl)
        .with_max_hold(max_hold)
        // Handing it over brings it to the disk.
        .with_durability(Durability::WithWrite);
    let lease = grant(&state, &request, chosen, wait).await?;
    Ok(Json(GrantedLock::of(name, &lease)))
}

/// How long the request may wait.
fn wait(body: &AcquireLock, headers: &HeaderMap, scope: &LockScope, longest: Duration) -> Duration {
    match (body.wait_ms, preferred_wait(headers)) {
        (Some(wait_ms), _) => Duration::from_millis(wait_ms).min(longest),
        (None, Some(preferred)) => {
            let wait = preferred.min(longest);
            scope.waits(wait);
            wait
        }
        (None, None) => Duration::ZERO,
    }
}

/// How often a request with a lock id of its own that waits looks whether another one like it was granted: it must be
/// told within the ttl.
const LOOK_AGAIN: RangeInclusive<Duration> = Duration::from_millis(250)..=Duration::from_secs(5);

async fn grant(
    state: &AppState,
    request: &LockRequest,
    chosen: Option<LockId>,
    wait: Duration,
) -> Result<ClientLease, Problem> {
    let leases = state.db().client_leases();
    if let Some(chosen) = chosen
        && let Some(known) = known(leases.find(request.name(), chosen).await?)
    {
        return known;
    }
    let acquire = async {
        if wait.is_zero() {
            state.leases().try_acquire(request).await
        } else {
            state.leases().acquire(request, wait).await
        }
    };
    let acquired = tokio::select! {
        biased;
        acquired = acquire => acquired,
        known = granted_elsewhere(&leases, request, chosen) => return known,
    };
    match acquired {
        Ok(guard) => match leases.hand_over(guard, chosen).await? {
            HandedOver::Done(lease) => Ok(lease),
            HandedOver::AlreadyUsed => Err(ExtendError::Lost.into()),
        },
        Err(error @ (AcquireError::Contended(_) | AcquireError::TimedOut { .. })) => {
            // The same request may have been sent twice at once, and the other one was faster: whoever is told of the
            // holder before the lease is handed over does not know it by its id.
            let known = match chosen {
                Some(chosen) => leases.find(request.name(), chosen).await.ok().and_then(known),
                None => None,
            };
            known.unwrap_or_else(|| Err(error.into()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Waits until another request with the same lock id was granted, for that need not wait for itself. It never resolves
/// without an id.
async fn granted_elsewhere(
    leases: &ClientLeases,
    request: &LockRequest,
    chosen: Option<LockId>,
) -> Result<ClientLease, Problem> {
    let Some(chosen) = chosen else {
        return std::future::pending().await;
    };
    let pause = (request.ttl() / 4).clamp(*LOOK_AGAIN.start(), *LOOK_AGAIN.end());
    loop {
        tokio::time::sleep(pause).await;
        // The wait goes on while the database is away.
        let found = leases.find(request.name(), chosen).await;
        if let Some(known) = found.ok().and_then(known) {
            return known;
        }
    }
}

/// What a request with this id is answered, unless nobody has used the id yet.
fn known(found: Chosen) -> Option<Result<ClientLease, Problem>> {
    match found {
        Chosen::Unused => None,
        Chosen::Held(lease) => Some(Ok(lease)),
        Chosen::Over => Some(Err(ExtendError::Lost.into())),
    }
}

/// Extend a lock
///
/// 409 `lock_lost` when it is over, or can be held no longer: then it is too late, and what it protects may belong to
/// somebody else.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/locks/{name}/extend", tag = "locks", operation_id = "extend_lock",
    params(LockPath), request_body = ExtendLock,
    responses((status = 200, description = "The lock with its new end", body = GrantedLock), WriteProblems),
)]
pub(crate) async fn extend(
    State(state): State<AppState>,
    access: Access<LockPath, Write>,
    ApiJson(body): ApiJson<ExtendLock>,
) -> Result<Json<GrantedLock>, Problem> {
    let LockPath { tenant, name } = &access.path;
    let full = lock_name(tenant.as_str(), name.as_str())?;
    let ttl = body.ttl_ms.map(Duration::from_millis);
    let leases = state.db().client_leases();
    let lease = leases.extend(&full, body.lock_id.into(), ttl).await?;
    Ok(Json(GrantedLock::of(name, &lease)))
}

/// Release a lock
///
/// It can be sent again: only what this acquisition holds is ever released.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/locks/{name}/release", tag = "locks", operation_id = "release_lock",
    params(LockPath), request_body = ReleaseLock,
    responses((status = 200, description = "It is not held any more", body = ReleasedLock), WriteProblems),
)]
pub(crate) async fn release(
    State(state): State<AppState>,
    access: Access<LockPath, Write>,
    ApiJson(body): ApiJson<ReleaseLock>,
) -> Result<Json<ReleasedLock>, Problem> {
    let LockPath { tenant, name } = &access.path;
    let full = lock_name(tenant.as_str(), name.as_str())?;
    let leases = state.db().client_leases();
    let released = leases.release(&full, body.lock_id.into()).await?;
    let released = released == Released::Held;
    Ok(Json(ReleasedLock { released }))
}

/// Take a lock away
///
/// Whoever holds it cannot extend it any more, and its fencing token is lower than every later one. Who did it and why is
/// kept on record. Needs an admin's key.
#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/locks/{name}", tag = "locks", operation_id = "force_release_lock",
    params(LockPath, ForceQuery),
    responses((status = 200, description = "The lock that was ended", body = LockItem), WriteProblems),
)]
pub(crate) async fn force_release(
    State(state): State<AppState>,
    access: Access<LockPath, Manage>,
    ApiQuery(force): ApiQuery<ForceQuery>,
) -> Result<Json<LockItem>, Problem> {
    let LockPath { tenant, name } = &access.path;
    let full = lock_name(tenant.as_str(), name.as_str())?;
    let (by, reason) = (&access.caller.subject, &force.reason);
    let ended = state.db().leases().force_release(&full, by, reason).await?;
    let ended = ended.ok_or_else(not_held)?;
    tracing::warn!(lock = full.to_string(), by, reason, lock_id = ?ended.lock_id, "a lock was taken away");
    // It is done, whether or not others can be asked.
    let waiters = match waiters(&state, [&full]).await {
        Ok(waiters) => waiters(&full),
        Err(_) => state.leases().waiting_for(&full),
    };
    Ok(Json(LockItem::of(name.as_str().to_owned(), &ended, waiters)))
}
