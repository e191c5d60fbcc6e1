//! Requests: how many, how they ended, how long they took.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

/// Goes around everything, so that what it measures is what the client waits for.
pub(crate) async fn count(request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let mut counted = Counted {
        // Whatever else somebody asks for counts together.
        route: path.map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned()),
        method: label(request.method()),
        status: None,
        start: Instant::now(),
    };
    let response = next.run(request).await;
    counted.status = Some(response.status().as_u16());
    response
}

/// Counts when it is dropped: also when nobody waits for the answer any more.
struct Counted {
    route: String,
    method: &'static str,
    status: Option<u16>,
    start: Instant,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let (route, method) = (std::mem::take(&mut self.route), self.method);
        let status = self
            .status
            .map_or_else(|| "hung_up".to_owned(), |status| status.to_string());
        metrics::histogram!("leasehold_http_request_seconds", "route" => route.clone(), "method" => method)
            .record(self.start.elapsed());
        metrics::counter!("leasehold_http_requests_total", "route" => route, "method" => method, "status" => status)
            .increment(1);
    }
}

/// A client may make up methods of its own.
fn label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
