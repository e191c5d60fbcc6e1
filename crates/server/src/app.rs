//! Every route in one place, and the document that describes them.

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::get;
use leasehold_http::openapi::{ProblemComponents, ReplayedAnswers};
use leasehold_http::{LockScopeLayer, RequestIdLayer, on_panic};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi as Document;
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;

use crate::idempotency::answer_once;
use crate::state::AppState;
use crate::{
    contexts, default_config, feedback_records, jobs, locks, metrics, service, tenants, versions, webhooks,
    work_items, workspaces,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Leasehold",
        description = "A configuration service in which every write of a workspace is serialised by a lock, every \
                       refused client learns who holds it, and every write makes exactly one version.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    modifiers(&ProblemComponents),
    security(("bearer" = [])),
    tags(
        (name = "tenants", description = "They own everything else"),
        (name = "workspaces", description = "What is locked"),
        (name = "default-config", description = "Keys with values"),
        (name = "contexts", description = "What overrides the default values"),
        (name = "config", description = "What comes out: never locked"),
        (name = "versions", description = "What was written, and the way back"),
        (name = "feedback-records", description = "What users have said: owned by a tenant, erased by user"),
        (name = "webhooks", description = "Where events are sent"),
        (name = "locks", description = "Locks for programs in any language, by names of their own"),
        (name = "work", description = "What is still to be done, and what was given up"),
        (name = "jobs", description = "What runs once a slot, whichever instance does it"),
        (name = "service", description = "What the service says of itself: no credentials needed"),
    ),
)]
struct ApiDoc;

fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(ApiDoc::openapi())
        .routes(routes!(tenants::routes::list, tenants::routes::create))
        .routes(routes!(tenants::routes::get, tenants::routes::delete))
        .routes(routes!(tenants::purge::purge))
        .routes(routes!(workspaces::routes::list, workspaces::routes::create))
        .routes(routes!(
            workspaces::routes::get,
            workspaces::routes::patch,
            workspaces::routes::delete
        ))
        .routes(routes!(
            workspaces::routes::get_lock,
            workspaces::routes::force_release
        ))
        .routes(routes!(default_config::routes::list))
        .routes(routes!(default_config::routes::apply_batch))
        // A key may be called `batch` too; as a resource it is the one with the other methods.
        .route(
            "/v1/tenants/{tenant}/workspaces/{workspace}/default-config/batch",
            get(default_config::routes::get)
                .put(default_config::routes::put)
                .delete(default_config::routes::delete),
        )
        .routes(routes!(
            default_config::routes::get,
            default_config::routes::put,
            default_config::routes::delete
        ))
        .routes(routes!(contexts::routes::list, contexts::routes::create))
        .routes(routes!(contexts::routes::put, contexts::routes::delete))
        .routes(routes!(contexts::routes::config))
        .routes(routes!(contexts::routes::resolve_for))
        .routes(routes!(versions::routes::list))
        .routes(routes!(versions::routes::get))
        .routes(routes!(versions::routes::restore))
        .routes(routes!(
            feedback_records::routes::list,
            feedback_records::routes::create,
            feedback_records::routes::erase
        ))
        .routes(routes!(
            feedback_records::routes::get,
            feedback_records::routes::patch,
            feedback_records::routes::delete
        ))
        .routes(routes!(webhooks::routes::list, webhooks::routes::create))
        .routes(routes!(
            webhooks::routes::get,
            webhooks::routes::patch,
            webhooks::routes::delete
        ))
        .routes(routes!(locks::routes::list))
        .routes(routes!(locks::routes::get, locks::routes::force_release))
        .routes(routes!(locks::routes::acquire))
        .routes(routes!(locks::routes::extend))
        .routes(routes!(locks::routes::release))
        .routes(routes!(work_items::routes::list))
        .routes(routes!(work_items::routes::list_dead))
        .routes(routes!(work_items::routes::redrive))
        .routes(routes!(work_items::routes::stats))
        .routes(routes!(jobs::routes::list))
        .routes(routes!(jobs::routes::run))
        .routes(routes!(jobs::routes::pause))
        .routes(routes!(jobs::routes::resume))
        .routes(routes!(service::health))
        .routes(routes!(service::ready))
        .routes(routes!(service::metrics))
        .routes(routes!(service::problem))
}

/// The document that describes the API: what `/openapi.json` answers.
pub fn openapi() -> Document {
    let mut document = routes().into_openapi();
    ReplayedAnswers.modify(&mut document);
    document
}

/// The service, ready to be served.
///
/// The layers from the outside in: what counts requests, ids and problems, the release of locks before the response
/// leaves, panics, idempotency keys. So a panic's answer too is sent after the release, and is a problem with an id.
pub fn router(state: AppState) -> Router {
    let api = Router::from(routes());
    let ui = SwaggerUi::new("/docs")
        .url("/openapi.json", openapi())
        // It would ask a server elsewhere whether the document is valid.
        .config(utoipa_swagger_ui::Config::from("/openapi.json").validator_url("none"));
    api.layer(from_fn_with_state(state.clone(), tell_of_writes))
        .layer(from_fn_with_state(state.clone(), answer_once))
        .with_state(state)
        .merge(ui)
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(LockScopeLayer)
        .layer(RequestIdLayer)
        .layer(from_fn(metrics::count))
}

/// Wakes who hands on the events of writes. Whoever hangs up before is found without.
async fn tell_of_writes(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let reads = request.method().is_safe();
    let response = next.run(request).await;
    if !reads && response.status().is_success() {
        state.written().notify_one();
    }
    response
}
