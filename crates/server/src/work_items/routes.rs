//! The routes of work items.

use axum::Json;
use axum::extract::State;
use diesel_async::AsyncPgConnection;
use leasehold_domain::WorkQueue;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WriteProblems};
use leasehold_http::{ApiQuery, NoBody, Problem};

use crate::answer::Answer;
use crate::auth::{Access, Manage, NoTenant, Operate};
use crate::deliveries;
use crate::idempotency::Sent;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::tenants::model::TenantPath;
use crate::work_items::model::{DeadLetter, DeadLetterPath, KindOfWork, QueueStats, Redriven, WorkItem};

/// A page of a queue, after the position and of the size that a client asks for.
fn page_of(access: &TenantPath, query: &PageQuery) -> leasehold_domain::Page {
    leasehold_domain::Page {
        tenant: Some(access.tenant.as_str().to_owned()),
        kind: None,
        after: query.after(),
        limit: usize::try_from(query.rows()).unwrap_or_default(),
    }
}

/// List what is to be done
///
/// Oldest first. What is done is gone; what was given up is among the dead letters.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/work-items", tag = "work", operation_id = "list_work_items",
    params(TenantPath, PageQuery),
    responses((status = 200, description = "A page of work items", body = Page<WorkItem>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<TenantPath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<WorkItem>>, Problem> {
    let rows = state
        .db()
        .work_queue()
        .items(&page_of(&access.path, &query))
        .await?;
    Ok(Json(query.page(rows, |item| item.id.get(), WorkItem::from)))
}

/// List what was given up
///
/// Oldest first.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/dead-letters", tag = "work", operation_id = "list_dead_letters",
    params(TenantPath, PageQuery),
    responses((status = 200, description = "A page of dead letters", body = Page<DeadLetter>), ReadProblems),
)]
pub(crate) async fn list_dead(
    State(state): State<AppState>,
    access: Access<TenantPath>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<DeadLetter>>, Problem> {
    let rows = state
        .db()
        .work_queue()
        .dead_letters(&page_of(&access.path, &query))
        .await?;
    Ok(Json(query.page(rows, |letter| letter.id, DeadLetter::from)))
}

/// Try a dead letter again
///
/// As if it were new, with no attempts made. Enable the webhook of a delivery first: what is to go to one that is
/// disabled is dropped. Needs an admin's key.
#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/dead-letters/{id}/redrive", tag = "work",
    operation_id = "redrive_dead_letter", params(DeadLetterPath, IdempotencyKey),
    responses((status = 200, description = "It is to be done again", body = Redriven), WriteProblems),
)]
pub(crate) async fn redrive(
    State(state): State<AppState>,
    access: Access<DeadLetterPath, Manage>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let (tenant, id) = (access.path.tenant.as_str(), access.path.id);
    let queue = state.db().work_queue();
    let redrive = async |conn: &mut AsyncPgConnection| match queue.redrive_in_tx(conn, tenant, &[id]).await? {
        0 => Err(Problem::not_found("there is no such dead letter").into()),
        redriven => Answer::ok(&Redriven { redriven }),
    };
    let answer = state.gated(&once, &[tenant], redrive).await?;
    queue.wake([deliveries::KIND]);
    Ok(answer)
}

/// Say how much there is to be done
///
/// Needs an admin's key for all tenants.
#[utoipa::path(
    get, path = "/v1/queue/stats", tag = "work", operation_id = "queue_stats",
    responses((status = 200, description = "How much of each kind", body = QueueStats), ReadProblems),
)]
pub(crate) async fn stats(
    State(state): State<AppState>,
    _: Access<NoTenant, Operate>,
) -> Result<Json<QueueStats>, Problem> {
    let kinds = state.db().work_queue().stats().await?;
    let kinds = kinds.into_iter().map(KindOfWork::from).collect();
    Ok(Json(QueueStats { kinds }))
}
