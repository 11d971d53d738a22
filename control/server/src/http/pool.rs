//! The pool: drives added, listed, removed, imported; scrub, drain, fences.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use penstock_api::http::{ApiError, DrainBody, DriveAddBody, DriveView, ForceQuery, ImportBody, ImportReport, Progress, ScrubBody, path};
use penstock_api::rpc::{
    self, Barrier, DrainInfo, DrainParams, DriveClearFenceParams, DriveContent, DriveProbeInfo, DriveProbeParams, ErrorCode, ScrubInfo,
    ScrubParams,
};
use penstock_api::{ByteSize, DriveId, NodeId, NodeName};
use penstock_model::{Identity, Subject, change, import as model};

use super::Shared;
use super::problem::{Body, Part, Problem, Query};
use super::view;
use crate::control::Control;

/// Opening drives reads their logs; an import waits for all of them.
const IMPORT_WAIT: std::time::Duration = std::time::Duration::from_secs(120);

/// The pool's drives
#[utoipa::path(get, path = path::DRIVES, responses((status = 200, body = Vec<DriveView>)))]
pub async fn list(State(control): Shared) -> Json<Vec<DriveView>> {
    let state = control.state();
    Json(state.desired.drives.keys().filter_map(|id| view::drive(&state, *id)).collect())
}

/// Who asks: the cluster, and the node that the drive is at, as far as they have ids.
#[derive(Clone, Copy)]
struct Asker {
    identity: Option<Identity>,
    node_id: Option<NodeId>,
}

impl Asker {
    fn is_label_ours(&self, label: &rpc::DriveLabel) -> bool {
        self.identity.is_some_and(|identity| identity.cluster_id() == label.cluster_id) && self.node_id == Some(label.node_id)
    }
}

/// Whether a drive that was probed may join the pool; says what to do otherwise.
fn check_probe(body: &DriveAddBody, probe: &DriveProbeInfo, asker: Asker) -> Result<(), ApiError> {
    let spec = &body.spec;
    let error = |code, message: String, hint: String| Err(ApiError::new(code, message).with_hint(hint));
    match &probe.content {
        DriveContent::Blank => {}
        DriveContent::Ours { label } if asker.is_label_ours(label) => {
            let message = format!("{spec} is drive {} of this node already, with what it holds", label.drive_id);
            return error(ErrorCode::AlreadyExists, message, format!("take it up as it is: penstock pool import '{spec}'"));
        }
        DriveContent::Ours { .. } | DriveContent::Foreign { .. } if body.force => {}
        DriveContent::Ours { label } => {
            let mut message = format!("{spec} belongs to node {} of cluster {}", label.node_id, label.cluster_id);
            if let (Some(ours), Some(node_id)) = (asker.identity, asker.node_id) {
                message.push_str(&format!("; this is node {node_id} of cluster {}", ours.cluster_id()));
            }
            let hint =
                format!("`penstock pool import '{spec}'` takes it up into a control that has nothing else; --force destroys what it holds");
            return error(ErrorCode::ForeignData, message, hint);
        }
        DriveContent::Foreign { what, at } => {
            let message = format!("{spec} holds {what} at byte {}", at.bytes());
            return error(ErrorCode::ForeignData, message, "choose another drive, or use --force, which destroys it".to_owned());
        }
    }
    if probe.volatile && !body.volatile {
        let message = format!("{spec} is volatile: everything on it is gone when penstockd stops");
        return error(ErrorCode::Invalid, message, "use --volatile if that is meant".to_owned());
    }
    if probe.barrier == Barrier::Missing && !spec.power_safe {
        let message = format!("{spec} has a write cache and no flush that reaches it: a power loss would take acknowledged writes");
        return error(ErrorCode::Invalid, message, "if it is safe all the same, say so with ?power_safe=true".to_owned());
    }
    Ok(())
}

/// Add a drive: formats it if it is blank, refuses it if it holds anything
#[utoipa::path(post, path = path::DRIVES, request_body = DriveAddBody, responses(
    (status = 201, description = "It serves", body = DriveView),
    (status = 202, description = "Taken in; the node is not done yet", body = DriveView),
    (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub async fn add(State(control): Shared, Body(body): Body<DriveAddBody>) -> Result<(StatusCode, Json<DriveView>), Problem> {
    let node = control.handle(body.node.as_deref())?;
    let asker = {
        let state = control.state();
        Asker { identity: state.desired.identity, node_id: state.node_id(node.name()) }
    };
    let place = body.spec.place();
    let known = asker.node_id.and_then(|node_id| change::drive_at(&control.state().desired, node_id, &place));
    if let Some(known) = known {
        let error = ApiError::new(ErrorCode::AlreadyExists, format!("{place} is in the pool as drive {known}"));
        return Err(error.with_hint("see `penstock pool ls`").into());
    }
    // Asked before anything is recorded: a person is waiting, and a wrong drive should leave no trace.
    let probe = node.client.call::<rpc::DriveProbe>(&DriveProbeParams { spec: body.spec.clone() }).await?;
    check_probe(&body, &probe, asker)?;
    let id = DriveId(control.id().await?);
    let shown = node.client.call::<rpc::NodeGet>(&rpc::Empty {}).await?.node_id;
    let node_id = control.enroll(node, shown).await?;
    let subject = Subject::Drive(id);
    control.change(std::slice::from_ref(&subject), |state| change::add_drive(&state.desired, id, node_id, &body, probe.volatile)).await?;
    let progress = settle(&control, id).await;
    if let Progress::Refused { code, message, hint } = progress {
        control.change(&[subject], |state| Ok(change::withdraw_drive(&state.desired, id))).await?;
        return Err(ApiError { code, message, hint }.into());
    }
    let status = if progress.is_settled() { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    let view = view::drive(&control.state(), id);
    Ok((status, Json(view.ok_or_else(|| ApiError::new(ErrorCode::Conflict, "the drive was removed meanwhile"))?)))
}

async fn settle(control: &Control, id: DriveId) -> Progress {
    let done = |state: &crate::control::State| Some(state.look().drive(id)).filter(|progress| !view::is_under_way(progress));
    let settled = control.wait_for(control.wait, done).await;
    settled.unwrap_or_else(|| control.state().look().drive(id))
}

/// Remove a drive: it is detached, never erased
#[utoipa::path(delete, path = "/v1/pool/drives/{drive}", params(("drive" = String, Path), ("force" = Option<bool>, Query)), responses(
    (status = 204, description = "It is gone"),
    (status = 202, description = "Taken in; the node is not done yet", body = DriveView),
    (status = "4XX", body = ApiError)))]
pub async fn remove(
    State(control): Shared,
    Part(id): Part<DriveId>,
    Query(query): Query<ForceQuery>,
) -> Result<(StatusCode, Json<Option<DriveView>>), Problem> {
    let subject = [Subject::Drive(id)];
    control.change(&subject, |state| change::remove_drive(&state.desired, id, query.force)).await?;
    let ended = control
        .wait_for(control.wait, |state| match state.desired.drives.get(&id) {
            None => Some(None),
            Some(_) => Some(Some(state.look().drive(id))).filter(|progress| !progress.as_ref().is_some_and(view::is_under_way)),
        })
        .await;
    match ended {
        Some(None) => Ok((StatusCode::NO_CONTENT, Json(None))),
        Some(Some(Progress::Refused { code, message, hint })) => Err(ApiError { code, message, hint }.into()),
        Some(Some(_)) | None => Ok((StatusCode::ACCEPTED, Json(view::drive(&control.state(), id)))),
    }
}

/// Take up drives and volumes from what the drives say of themselves
#[utoipa::path(post, path = path::IMPORT, request_body = ImportBody, responses(
    (status = 200, body = ImportReport), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub async fn import(State(control): Shared, Body(body): Body<ImportBody>) -> Result<Json<ImportReport>, Problem> {
    let mut named = Vec::new();
    if !body.specs.is_empty() {
        let node = control.handle(body.node.as_deref())?;
        for spec in &body.specs {
            let probe = node.client.call::<rpc::DriveProbe>(&DriveProbeParams { spec: spec.clone() }).await?;
            let DriveContent::Ours { label } = probe.content else {
                let error = ApiError::new(ErrorCode::Invalid, format!("{spec} carries no label of ours: there is nothing to import"));
                return Err(error.with_hint(format!("`penstock pool add '{spec}'` makes it a drive of this pool")).into());
            };
            control.adopt(|desired| model::adopt(desired, label.cluster_id, label.node_id)).await?;
            control.enroll(node, Some(label.node_id)).await?;
            named.push((spec, label, probe.volatile));
        }
    }
    // Nodes that have drives open say who they are, also those that no drive was named of.
    let mut adopted = None;
    let mut there = Vec::new();
    let mut away = None;
    for node in &control.nodes {
        match node.client.call::<rpc::NodeGet>(&rpc::Empty {}).await {
            Ok(info) => {
                there.push(node.name());
                if let rpc::NodeInfo { cluster_id: Some(cluster), node_id: Some(node_id), .. } = info {
                    adopted = Some(control.adopt(|desired| model::adopt(desired, cluster, node_id)).await?);
                    control.enroll(node, Some(node_id)).await?;
                }
            }
            Err(error) => away = Some(error),
        }
    }
    if let (Some(error), 1) = (away, control.nodes.len()) {
        return Err(error.into());
    }
    let identity = match adopted {
        Some(identity) => identity,
        None => control.state().desired.identity.filter(|_| !named.is_empty()).ok_or_else(|| {
            let error = ApiError::new(ErrorCode::NotFound, "no node has a drive of ours open, and none was named");
            error.with_hint("name the drives, for example: penstock pool import file:/var/lib/penstock/d0.img")
        })?,
    };
    let mut ids = Vec::new();
    let mut fresh = Vec::new();
    for (spec, label, volatile) in &named {
        let subject = [Subject::Drive(label.drive_id)];
        let unknown = !control.state().desired.drives.contains_key(&label.drive_id);
        control.change(&subject, |state| Ok(model::import_drive(&state.desired, spec, label, *volatile))).await?;
        ids.push(label.drive_id);
        fresh.extend(unknown.then_some(label.drive_id));
    }
    await_drives(&control, &ids, &there).await?;
    let mut report = model::empty_report(&identity);
    control
        .change(&[], |state| {
            let there = state.observed();
            if there.is_empty() {
                return Err(ApiError::new(ErrorCode::NotReady, "the node went away").with_hint("import again when it is back"));
            }
            // A volume's replicas join it one after the other, so each look is judged by what the one before it brought.
            let mut desired = state.desired.clone();
            let mut all = Vec::new();
            for (node_id, observed) in there {
                let records = model::import_observed(&desired, node_id, observed, body.exports, &mut report);
                desired.apply(&records);
                all.extend(records);
            }
            Ok(all)
        })
        .await?;
    report.known = report.known.saturating_sub(fresh.len() as u32);
    report.drives.extend(fresh);
    Ok(Json(report))
}

/// Waits until these drives are open, and then for a look at each of these nodes that began after that: it shows all their volumes.
async fn await_drives(control: &Control, ids: &[DriveId], nodes: &[&NodeName]) -> Result<(), Problem> {
    let rounds = |state: &crate::control::State| -> Vec<u64> {
        nodes.iter().map(|name| state.nodes.get(*name).map_or(0, |node| node.rounds)).collect()
    };
    let mut open = None;
    let done = |state: &crate::control::State| {
        let first = ids.iter().map(|id| state.look().drive(*id)).find(|progress| !progress.is_settled());
        if first.as_ref().is_some_and(view::is_under_way) {
            return None;
        }
        // A round that is under way now began before: the one after it has not.
        let from = open.get_or_insert_with(|| rounds(state));
        if rounds(state).iter().zip(from.iter()).any(|(now, from)| *now < from + 2) {
            control.wake();
            return None;
        }
        Some(first)
    };
    match control.wait_for(IMPORT_WAIT, done).await {
        Some(None) => Ok(()),
        Some(Some(Progress::Refused { code, message, hint })) => Err(ApiError { code, message, hint }.into()),
        Some(Some(_)) | None => {
            let error = ApiError::new(ErrorCode::NotReady, format!("the drives are not all open after {} s", IMPORT_WAIT.as_secs()));
            Err(error.with_hint("they are in the pool; see `penstock pool ls`, and import again when they serve").into())
        }
    }
}

/// How to reach the node of a drive of the pool.
fn node_of(control: &Control, id: DriveId) -> Result<&crate::node::NodeClient, ApiError> {
    let node_id = control.state().desired.drives.get(&id).map(|drive| drive.node_id);
    match node_id {
        Some(node_id) => control.client(node_id),
        None => Err(ApiError::new(ErrorCode::NotFound, format!("drive {id} is not in the pool")).with_hint("see `penstock pool ls`")),
    }
}

/// Start, stop or look at a scrub
#[utoipa::path(post, path = "/v1/pool/drives/{drive}/scrub", params(("drive" = String, Path)), request_body = ScrubBody, responses(
    (status = 200, body = ScrubInfo), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub async fn scrub(State(control): Shared, Part(id): Part<DriveId>, Body(body): Body<ScrubBody>) -> Result<Json<ScrubInfo>, Problem> {
    let node = node_of(&control, id)?;
    Ok(Json(node.call::<rpc::Scrub>(&ScrubParams { drive_id: id, action: body.action }).await?))
}

/// Let a fenced drive take writes again
#[utoipa::path(post, path = "/v1/pool/drives/{drive}/clear-fence", params(("drive" = String, Path)), responses(
    (status = 204), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub async fn clear_fence(State(control): Shared, Part(id): Part<DriveId>) -> Result<StatusCode, Problem> {
    node_of(&control, id)?.call::<rpc::DriveClearFence>(&DriveClearFenceParams { drive_id: id }).await?;
    control.wake();
    Ok(StatusCode::NO_CONTENT)
}

/// Wait until what was written is in its permanent place, on a drive or on all nodes
#[utoipa::path(post, path = path::DRAIN, request_body = DrainBody, responses(
    (status = 200, body = DrainInfo), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub async fn drain(State(control): Shared, Body(body): Body<DrainBody>) -> Result<Json<DrainInfo>, Problem> {
    let params = DrainParams { drive_id: body.drive_id };
    if let Some(id) = body.drive_id {
        return Ok(Json(node_of(&control, id)?.call::<rpc::Drain>(&params).await?));
    }
    // One after the other: what one node drains takes the others' time where they share a machine.
    let mut all = DrainInfo::default();
    for node in &control.nodes {
        let info = node.client.call::<rpc::Drain>(&params).await?;
        all.drained_bytes = ByteSize(all.drained_bytes.0.saturating_add(info.drained_bytes.0));
        all.ms += info.ms;
    }
    Ok(Json(all))
}
