//! The routes of webhooks. All of them need an admin's key: what is sent there leaves the service.

use axum::Json;
use axum::extract::State;
use diesel_async::AsyncPgConnection;
use leasehold_http::openapi::{IdempotencyKey, ReadProblems, WriteProblems};
use leasehold_http::{ApiJson, ApiQuery, FieldError, NoBody, Problem};
use uuid::Uuid;

use crate::answer::Answer;
use crate::auth::{Access, Manage, NoTenant};
use crate::failure::Failure;
use crate::idempotency::Sent;
use crate::names::Slug;
use crate::paging::{Page, PageQuery};
use crate::state::AppState;
use crate::tenants::owner;
use crate::tenants::routes::no_tenant;
use crate::webhooks::model::{
    CreatedWebhook, NewWebhook, Secret, Webhook, WebhookFilter, WebhookPatch, WebhookPath,
};
use crate::webhooks::store::{self, MOST_OF_A_TENANT, Made, Patched};

fn no_webhook() -> Problem {
    Problem::not_found("there is no such webhook")
}

/// Make a webhook
///
/// Needs an admin's key; one for all tenants must say which one it is for. The secret is in this answer and nowhere
/// else, also not when the answer is repeated.
#[utoipa::path(
    post, path = "/v1/webhooks", tag = "webhooks", operation_id = "create_webhook",
    params(IdempotencyKey), request_body = NewWebhook,
    responses((status = 201, description = "The new webhook", body = CreatedWebhook), WriteProblems),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    access: Access<NoTenant, Manage>,
    Sent { body, once }: Sent<ApiJson<NewWebhook>>,
) -> Result<Answer, Problem> {
    let ApiJson(new) = body;
    let tenant = owner::of_new(&access.caller, new.tenant_id.as_ref())?;
    let secret = Secret::new();
    let make = async |conn: &mut AsyncPgConnection| {
        let webhook = match store::create(conn, tenant, &new, &secret).await? {
            Made::Done(webhook) => *webhook,
            Made::NoSuchTenant => return Err(no_tenant().into()),
            Made::TooMany => {
                let detail = format!("has {MOST_OF_A_TENANT} webhooks already: delete one first");
                return Err(Problem::invalid([FieldError::new("tenant_id", detail)]).into());
            }
        };
        let created = CreatedWebhook {
            webhook: webhook.clone(),
            secret: secret.clone(),
        };
        Answer::created(&created)?.replayed_as(&webhook)
    };
    state.gated(&once, &[tenant], make).await
}

/// List webhooks
///
/// Oldest first, of all tenants that the key may see. Needs an admin's key.
#[utoipa::path(
    get, path = "/v1/webhooks", tag = "webhooks", operation_id = "list_webhooks",
    params(WebhookFilter, PageQuery),
    responses((status = 200, description = "A page of webhooks", body = Page<Webhook>), ReadProblems),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    access: Access<NoTenant, Manage>,
    ApiQuery(filter): ApiQuery<WebhookFilter>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<Page<Webhook>>, Problem> {
    let tenant = owner::seen(&access.caller, filter.tenant_id.as_ref())?;
    let rows = state.read(async |conn| {
        let rows = store::list(conn, tenant, query.after(), query.rows()).await?;
        if rows.is_empty() {
            owner::must_exist(conn, tenant).await?;
        }
        Ok(rows)
    });
    let rows = rows.await?;
    Ok(Json(query.page(rows, |row| row.seq, Webhook::from)))
}

/// Get a webhook
///
/// Needs an admin's key.
#[utoipa::path(
    get, path = "/v1/webhooks/{id}", tag = "webhooks", operation_id = "get_webhook",
    params(WebhookPath),
    responses((status = 200, description = "The webhook", body = Webhook), ReadProblems),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    access: Access<WebhookPath, Manage>,
) -> Result<Json<Webhook>, Problem> {
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    let found = state
        .read(async |conn| Ok(store::get(conn, id, only).await?))
        .await;
    found?.map(Json).ok_or_else(no_webhook)
}

/// Change a webhook, or move it
///
/// What is left out stays; when all is left out, nothing is written. Another `tenant_id` moves it, which both tenants
/// must allow. Needs an admin's key.
#[utoipa::path(
    patch, path = "/v1/webhooks/{id}", tag = "webhooks", operation_id = "update_webhook",
    params(WebhookPath, IdempotencyKey), request_body = WebhookPatch,
    responses((status = 200, description = "The webhook as it is now", body = Webhook), WriteProblems),
)]
pub(crate) async fn patch(
    State(state): State<AppState>,
    access: Access<WebhookPath, Manage>,
    Sent { body, once }: Sent<ApiJson<WebhookPatch>>,
) -> Result<Answer, Problem> {
    let ApiJson(patch) = body;
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    if patch.is_empty() {
        let read = async |conn: &mut AsyncPgConnection| {
            let webhook = store::get(conn, id, only).await?;
            Answer::ok(&webhook.ok_or_else(no_webhook)?)
        };
        return state.read(read).await;
    }
    let to = patch.tenant_id.as_ref().map(Slug::as_str);
    owner::seen(&access.caller, patch.tenant_id.as_ref())?;
    let tenants = async |conn: &mut AsyncPgConnection| {
        let from = must_find(conn, id, only).await?;
        owner::must_exist(conn, to).await?;
        // What is answered is the new owner's.
        Ok(to.map(str::to_owned).into_iter().chain([from]).collect())
    };
    let write = async |conn: &mut AsyncPgConnection, tenants: &[String]| match store::patch(
        conn, id, tenants, &patch,
    )
    .await?
    {
        Patched::Done(webhook) => Answer::ok(&webhook),
        Patched::NoSuchTenant => Err(no_tenant().into()),
        Patched::Gone => {
            must_find(conn, id, only).await?;
            Err(owner::moved().into())
        }
    };
    state.gated_row(&once, tenants, write).await
}

/// Delete a webhook
///
/// Needs an admin's key.
#[utoipa::path(
    delete, path = "/v1/webhooks/{id}", tag = "webhooks", operation_id = "delete_webhook",
    params(WebhookPath, IdempotencyKey),
    responses((status = 204, description = "It is gone"), WriteProblems),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    access: Access<WebhookPath, Manage>,
    Sent { once, .. }: Sent<NoBody>,
) -> Result<Answer, Problem> {
    let (id, only) = (access.path.id, access.caller.tenant.as_deref());
    let tenants = async |conn: &mut AsyncPgConnection| Ok(vec![must_find(conn, id, only).await?]);
    let write = async |conn: &mut AsyncPgConnection, tenants: &[String]| {
        if store::delete(conn, id, tenants).await? {
            return Ok(Answer::no_content());
        }
        must_find(conn, id, only).await?;
        Err(owner::moved().into())
    };
    state.gated_row(&once, tenants, write).await
}

/// The tenant of a webhook, if the caller may see it.
async fn must_find(conn: &mut AsyncPgConnection, id: Uuid, only: Option<&str>) -> Result<String, Failure> {
    let tenant = store::tenant(conn, id, only).await?;
    Ok(tenant.ok_or_else(no_webhook)?)
}
