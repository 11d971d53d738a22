//! The HTTP API: `/v1/…` as JSON, `/openapi.json`, `/metrics`, `/healthz`.
//!
//! A handler judges and commits a wish through [`Control`], then waits for its progress: settled answers 200 or 201,
//! refused takes the wish back and answers the node's own words, pending when the wait ends answers 202. Every error
//! is an [`ApiError`]. Not here: access control; who reaches the socket or loopback is trusted.
//!
//! To add a call: body and answer in control/api, a handler with `#[utoipa::path]`, its line in `router`.

mod node;
mod pool;
mod problem;
mod replica;
mod snapshot;
mod view;
mod volume;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use penstock_api::http::{ApiError, BODY_BYTES_MAX, path};
use penstock_api::rpc::ErrorCode;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::control::Control;
use problem::Problem;

type Shared = axum::extract::State<Arc<Control>>;

#[derive(OpenApi)]
#[openapi(info(
    title = "Penstock control",
    description = "Pools, volumes and their exports on one node or several. Sizes are bytes; requests may also say 10GiB. Every answer that is not 2xx is an ApiError."
))]
struct Document;

fn documented() -> OpenApiRouter<Arc<Control>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(node::show_only))
        .routes(routes!(node::list))
        .routes(routes!(node::show, node::remove))
        .routes(routes!(node::issue_ids))
        .routes(routes!(node::metrics))
        .routes(routes!(node::health))
        .routes(routes!(pool::list, pool::add))
        .routes(routes!(pool::remove))
        .routes(routes!(pool::import))
        .routes(routes!(pool::scrub))
        .routes(routes!(pool::clear_fence))
        .routes(routes!(pool::drain))
        .routes(routes!(volume::list, volume::create))
        .routes(routes!(volume::show, volume::resize, volume::remove))
        .routes(routes!(snapshot::list, snapshot::create))
        .routes(routes!(snapshot::remove))
        .routes(routes!(volume::export))
        .routes(routes!(volume::unexport))
        .routes(routes!(volume::transfer))
        .routes(routes!(replica::shift))
        .routes(routes!(replica::replace))
        .routes(routes!(replica::give_up))
        .routes(routes!(replica::recover))
}

pub fn router(control: Arc<Control>) -> Router {
    let (router, document) = documented().split_for_parts();
    let document = Arc::new(document);
    router
        .route(path::OPENAPI, axum::routing::get(move || async move { Json((*document).clone()) }))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(only_local_hosts))
        .with_state(control)
}

async fn no_such_path(request: Request) -> Problem {
    let error = ApiError::new(ErrorCode::NotFound, format!("there is no {}", request.uri().path()));
    Problem(error.with_hint(format!("{} lists what there is", path::OPENAPI)))
}

async fn no_such_method(request: Request) -> Response {
    let error = ApiError::new(ErrorCode::Invalid, format!("{} takes no {}", request.uri().path(), request.method()));
    (StatusCode::METHOD_NOT_ALLOWED, Json(error)).into_response()
}

/// A web page that a browser on this machine shows may not talk to loopback under a name of its own (DNS rebinding).
async fn only_local_hosts(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    // Clients over the Unix socket say localhost, or nothing.
    if matches!(name, "" | "localhost" | "127.0.0.1" | "[::1]") {
        return next.run(request).await;
    }
    let error = ApiError::new(ErrorCode::Invalid, format!("host \"{name}\" is not this machine: use localhost, 127.0.0.1 or [::1]"));
    Problem(error).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openapi_document_names_every_path_of_the_interface() {
        let document = serde_json::to_value(documented().to_openapi()).unwrap();
        let paths = document["paths"].as_object().unwrap();
        for known in
            [path::NODE, path::NODES, path::DRIVES, path::IMPORT, path::VOLUMES, path::IDS, path::DRAIN, path::METRICS, path::HEALTH]
        {
            assert!(paths.contains_key(known), "{known}");
        }
        for what in [
            "export",
            "transfer",
            "snapshots",
            "snapshots/{snapshot}",
            "replicas/move",
            "replicas/replace",
            "replicas/give-up",
            "replicas/recover",
        ] {
            assert!(paths.contains_key(&format!("/v1/volumes/{{volume}}/{what}")), "{what}");
        }
        assert!(document["components"]["schemas"]["VolumeView"].is_object());
        assert_eq!(document["components"]["schemas"]["DriveSpec"]["type"], "string");
    }
}
