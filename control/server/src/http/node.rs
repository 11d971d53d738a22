//! The node, ids, metrics, health.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use penstock_api::http::{ApiError, IDS_MAX, IdsBody, IdsView, NodeView, path};
use penstock_api::rpc::{self, ErrorCode};

use super::Shared;
use super::problem::{Body, Problem};
use crate::metrics::{self, Gauges};

/// The node, and whether desired and observed agree
#[utoipa::path(get, path = path::NODE, responses((status = 200, body = NodeView)))]
pub async fn show(State(control): Shared) -> Json<NodeView> {
    let state = control.state();
    let unsettled = state.look().unsettled();
    let identity = state.desired.identity;
    Json(NodeView {
        cluster_id: identity.map(|identity| identity.cluster_id()),
        node_id: identity.map(|identity| identity.node_id()),
        control_version: env!("CARGO_PKG_VERSION").to_owned(),
        control_pid: std::process::id(),
        control_uptime_s: control.uptime().as_secs(),
        reachable: state.present().is_some(),
        unreachable_reason: state.away.clone().or_else(|| state.seen.is_none().then(|| "not looked at yet".to_owned())),
        node: state.seen.as_ref().map(|seen| seen.node.clone()),
        settled: unsettled.is_empty() && state.present().is_some(),
        unsettled,
    })
}

/// Issue ids that nobody ever gets again
#[utoipa::path(post, path = path::IDS, request_body = IdsBody, responses((status = 200, body = IdsView), (status = "4XX", body = ApiError)))]
pub async fn issue_ids(State(control): Shared, Body(body): Body<IdsBody>) -> Result<Json<IdsView>, Problem> {
    if body.count == 0 || body.count > IDS_MAX {
        return Err(ApiError::new(ErrorCode::Invalid, format!("count is {}: use 1 to {IDS_MAX}", body.count)).into());
    }
    Ok(Json(IdsView { ids: control.ids(body.count).await? }))
}

/// Prometheus text
#[utoipa::path(get, path = path::METRICS, responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn metrics(State(control): Shared) -> Result<impl IntoResponse, Problem> {
    let gauges = {
        let state = control.state();
        Gauges {
            node_reachable: state.present().is_some(),
            unsettled: state.look().unsettled().len(),
            drives: state.desired.drives.len(),
            volumes: state.desired.volumes.len(),
        }
    };
    let node = if gauges.node_reachable { control.node.call::<rpc::MetricsGet>(&rpc::Empty {}).await.ok() } else { None };
    let text = metrics::render(&control.counters, gauges, node)
        .map_err(|error| ApiError::new(ErrorCode::Internal, format!("metrics cannot be rendered: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

/// 200 while this process answers; says nothing of the node
#[utoipa::path(get, path = path::HEALTH, responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn health() -> &'static str {
    "ok\n"
}
