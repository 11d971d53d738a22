//! The nodes, ids, metrics, health.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use penstock_api::ReplicaId;
use penstock_api::http::{ApiError, ForceQuery, IDS_MAX, IdsBody, IdsView, NodeRemovedView, NodeView, path};
use penstock_api::rpc::{self, ErrorCode};

use penstock_model::change;

use super::Shared;
use super::problem::{Body, Part, Problem, Query};
use crate::control::{Control, NodeHandle};
use crate::metrics::{self, Gauges};

fn view(control: &Control, handle: &NodeHandle) -> NodeView {
    let state = control.state();
    let node_id = state.node_id(handle.name());
    let node = &state.nodes[handle.name()];
    let unsettled = node_id.map(|id| state.look().unsettled_on(id)).unwrap_or_default();
    NodeView {
        name: handle.name().clone(),
        cluster_id: state.desired.identity.map(|identity| identity.cluster_id()),
        node_id,
        peer_address: handle.named.peer,
        nvmf_address: handle.named.nvmf,
        control_version: env!("CARGO_PKG_VERSION").to_owned(),
        control_pid: std::process::id(),
        control_uptime_s: control.uptime().as_secs(),
        reachable: node.present().is_some(),
        unreachable_reason: node.away.clone().or_else(|| node.seen.is_none().then(|| "not looked at yet".to_owned())),
        node: node.seen.as_ref().map(|seen| seen.node.clone()),
        settled: unsettled.is_empty() && node.present().is_some(),
        unsettled,
    }
}

/// The only node, and whether desired and observed agree; refused where there are several
#[utoipa::path(get, path = path::NODE, responses((status = 200, body = NodeView), (status = 400, body = ApiError)))]
pub async fn show_only(State(control): Shared) -> Result<Json<NodeView>, Problem> {
    Ok(Json(view(&control, control.handle(None)?)))
}

/// All nodes
#[utoipa::path(get, path = path::NODES, responses((status = 200, body = Vec<NodeView>)))]
pub async fn list(State(control): Shared) -> Json<Vec<NodeView>> {
    Json(control.nodes.iter().map(|node| view(&control, node)).collect())
}

/// A node, by name or id, and whether desired and observed agree there
#[utoipa::path(get, path = "/v1/nodes/{node}", params(("node" = String, Path)), responses(
    (status = 200, body = NodeView), (status = 404, body = ApiError)))]
pub async fn show(State(control): Shared, Part(node): Part<String>) -> Result<Json<NodeView>, Problem> {
    Ok(Json(view(&control, control.handle(Some(&node))?)))
}

/// Remove a node that is away; with drives or replicas only if forced, for one that is lost for good: its replicas are replaced on other nodes
#[utoipa::path(delete, path = "/v1/nodes/{node}", params(("node" = String, Path), ("force" = Option<bool>, Query)), responses(
    (status = 200, body = NodeRemovedView),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError), (status = 507, body = ApiError)))]
pub async fn remove(
    State(control): Shared,
    Part(node): Part<String>,
    Query(query): Query<ForceQuery>,
) -> Result<Json<NodeRemovedView>, Problem> {
    let count = change::replicas_on(&control.state().desired, &node) as u32;
    let ids: Vec<ReplicaId> = if count == 0 { vec![] } else { control.ids(count).await?.into_iter().map(ReplicaId).collect() };
    let mut found = None;
    control
        .change(&[], |state| {
            let farewell = change::remove_node(&state.desired, &state.observed(), &ids, &node, query.force)?;
            let name = state.desired.nodes[&farewell.node_id].name.clone();
            found = Some(NodeRemovedView { node_id: farewell.node_id, name, replaced: farewell.replaced });
            Ok(farewell.records)
        })
        .await?;
    Ok(Json(found.expect("judged, so found")))
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
    let (gauges, present) = {
        let state = control.state();
        let gauges = Gauges {
            nodes: state.nodes.iter().map(|(name, node)| (name.to_string(), node.present().is_some())).collect(),
            unsettled: state.look().unsettled().len(),
            drives: state.desired.drives.len(),
            volumes: state.desired.volumes.len(),
        };
        let present: Vec<bool> = control.nodes.iter().map(|node| state.nodes[node.name()].present().is_some()).collect();
        (gauges, present)
    };
    let mut nodes = Vec::new();
    for (node, _) in control.nodes.iter().zip(present).filter(|(_, present)| *present) {
        if let Ok(info) = node.client.call::<rpc::MetricsGet>(&rpc::Empty {}).await {
            nodes.push((node.name().to_string(), info));
        }
    }
    let text = metrics::render(&control.counters, &gauges, nodes)
        .map_err(|error| ApiError::new(ErrorCode::Internal, format!("metrics cannot be rendered: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

/// 200 while this process answers; says nothing of the nodes
#[utoipa::path(get, path = path::HEALTH, responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn health() -> &'static str {
    "ok\n"
}
