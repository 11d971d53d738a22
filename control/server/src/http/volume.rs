//! Volumes and their exports.

use axum::Json;
use axum::extract::State as AxumState;
use axum::http::StatusCode;
use penstock_api::http::{
    ApiError, ExportBody, ExportView, ForceQuery, Progress, TransferBody, UnexportBody, VolumeCreateBody, VolumeResizeBody, VolumeView,
    path,
};
use penstock_api::rpc::{self, Door, ErrorCode, GroupTransferParams};
use penstock_api::{NodeId, ReplicaId, SegmentId, VolumeId};
use penstock_model::change::{self, VolumeIds};
use penstock_model::{Phase, Subject, clones};

use super::Shared;
use super::problem::{Body, Part, Problem, Query};
use super::view;
use crate::control::{Control, State};

pub(super) fn find(state: &State, name_or_id: &str) -> Result<VolumeId, ApiError> {
    let found = state.desired.find_volume(name_or_id).map(|(id, _)| id);
    found.ok_or_else(|| {
        let shown: String = name_or_id.chars().take(64).collect();
        ApiError::new(ErrorCode::NotFound, format!("volume {shown} does not exist")).with_hint("see `penstock volume ls`")
    })
}

pub(super) fn vanished() -> Problem {
    ApiError::new(ErrorCode::Conflict, "it was removed meanwhile").into()
}

/// Waits until the volume is settled or refused. Does not wait for nodes that are away.
async fn settle(control: &Control, id: VolumeId) -> Progress {
    let done = |state: &State| {
        let look = state.look();
        (!look.volume_may_go_on(id)).then(|| look.volume(id))
    };
    let settled = control.wait_for(control.wait, done).await;
    settled.unwrap_or_else(|| control.state().look().volume(id))
}

/// All volumes
#[utoipa::path(get, path = path::VOLUMES, responses((status = 200, body = Vec<VolumeView>)))]
pub async fn list(AxumState(control): Shared) -> Json<Vec<VolumeView>> {
    let state = control.state();
    let mut views: Vec<VolumeView> = state.desired.volumes.keys().filter_map(|id| view::volume(&state, *id)).collect();
    views.sort_by(|a, b| a.name.cmp(&b.name));
    Json(views)
}

/// One volume, by name or id
#[utoipa::path(get, path = "/v1/volumes/{volume}", params(("volume" = String, Path)), responses(
    (status = 200, body = VolumeView), (status = 404, body = ApiError)))]
pub async fn show(AxumState(control): Shared, Part(volume): Part<String>) -> Result<Json<VolumeView>, Problem> {
    let state = control.state();
    let id = find(&state, &volume)?;
    view::volume(&state, id).map(Json).ok_or_else(vanished)
}

/// Create a volume
#[utoipa::path(post, path = path::VOLUMES, request_body = VolumeCreateBody, responses(
    (status = 201, description = "It serves", body = VolumeView),
    (status = 202, description = "Taken in; the node is away or not done yet", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 507, body = ApiError)))]
pub async fn create(AxumState(control): Shared, Body(body): Body<VolumeCreateBody>) -> Result<(StatusCode, Json<VolumeView>), Problem> {
    // Before ids are spent on it; judged again when it is committed.
    let judge = |state: &State| {
        change::check_name_free(&state.desired, &body.name)?;
        clones::shape(&state.desired, &state.observed(), &body)
    };
    let replicas = control.judged(judge).await?.replicas_in_all();
    let ids = control.ids(2 + replicas as u32).await?;
    let replicas = ids[2..].iter().map(|id| ReplicaId(*id)).collect();
    let ids = VolumeIds { volume: VolumeId(ids[0]), segment: SegmentId(ids[1]), replicas };
    let subject = [Subject::Volume(ids.volume)];
    control
        .change(&subject, |state| {
            let shape = clones::shape(&state.desired, &state.observed(), &body)?;
            let places = change::place(&state.desired, &state.observed(), &body.drive_ids, &shape)?;
            if places.len() != ids.replicas.len() {
                return Err(ApiError::new(ErrorCode::Busy, "the replicas of the volume that it is to be a clone of have just changed"));
            }
            change::create_volume(&state.desired, &ids, &body.name, &shape, &places)
        })
        .await?;
    let progress = settle(&control, ids.volume).await;
    if let Progress::Refused { code, message, hint } = progress {
        control.change(&subject, |state| Ok(change::withdraw_volume(&state.desired, ids.volume))).await?;
        return Err(ApiError { code, message, hint }.into());
    }
    let status = if progress.is_settled() { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    let view = view::volume(&control.state(), ids.volume);
    Ok((status, Json(view.ok_or_else(vanished)?)))
}

/// Resize a volume
#[utoipa::path(patch, path = "/v1/volumes/{volume}", params(("volume" = String, Path)), request_body = VolumeResizeBody, responses(
    (status = 200, body = VolumeView),
    (status = 202, description = "Taken in; the node is away or not done yet", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 507, body = ApiError)))]
pub async fn resize(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<VolumeResizeBody>,
) -> Result<(StatusCode, Json<VolumeView>), Problem> {
    let id = find(&control.state(), &volume)?;
    let subject = [Subject::Volume(id)];
    control.change(&subject, |state| change::resize_volume(&state.desired, &volume, body.size, body.allow_shrink)).await?;
    let progress = settle(&control, id).await;
    if let Progress::Refused { code, message, hint } = progress {
        control
            .change(&subject, |state| {
                let seen = state
                    .observed()
                    .into_values()
                    .filter_map(|seen| seen.volumes.get(&id))
                    .find(|seen| seen.is_served())
                    .map(|seen| seen.size);
                Ok(seen.map_or_else(Vec::new, |size| change::withdraw_resize(&state.desired, id, size)))
            })
            .await?;
        return Err(ApiError { code, message, hint }.into());
    }
    let status = if progress.is_settled() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let view = view::volume(&control.state(), id);
    Ok((status, Json(view.ok_or_else(vanished)?)))
}

/// Remove a volume and its data; refused while it is exported or in use unless forced
#[utoipa::path(delete, path = "/v1/volumes/{volume}", params(("volume" = String, Path), ("force" = Option<bool>, Query)), responses(
    (status = 204, description = "It is gone"),
    (status = 202, description = "Taken in; the node is away or not done yet", body = VolumeView),
    (status = "4XX", body = ApiError)))]
pub async fn remove(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Query(query): Query<ForceQuery>,
) -> Result<(StatusCode, Json<Option<VolumeView>>), Problem> {
    let id = find(&control.state(), &volume)?;
    let subject = [Subject::Volume(id)];
    let judge = |state: &State| change::remove_volume(&state.desired, &state.observed(), &volume, query.force);
    control.change(&subject, judge).await?;
    let ended = control
        .wait_for(control.wait, |state| match state.desired.volumes.get(&id) {
            None => Some(None),
            Some(_) => {
                let look = state.look();
                (!look.volume_may_go_on(id)).then(|| Some(look.volume(id)))
            }
        })
        .await;
    match ended {
        Some(None) => Ok((StatusCode::NO_CONTENT, Json(None))),
        Some(Some(Progress::Refused { code, message, hint })) => {
            control.change(&subject, |state| Ok(change::withdraw_removal(&state.desired, id))).await?;
            Err(ApiError { code, message, hint }.into())
        }
        Some(Some(_)) | None => Ok((StatusCode::ACCEPTED, Json(view::volume(&control.state(), id)))),
    }
}

/// A door's progress and whether waiting may change it; `None` once it is gone.
fn door_progress(state: &State, id: VolumeId, node_id: NodeId, door: &Door) -> Option<(Progress, bool)> {
    let volume = state.desired.volumes.get(&id)?;
    let progress = state.look().door(id, volume, volume.door(node_id, door)?);
    let is_there = state.node(node_id).is_some_and(|node| node.present().is_some());
    let may_go_on = is_there && view::is_under_way(&progress);
    Some((progress, may_go_on))
}

/// Waits for doors until none of them may change any more, or the wait is over. Those that are gone are left out.
async fn settle_doors(control: &Control, id: VolumeId, doors: &[(NodeId, Door)]) -> Vec<(NodeId, Door, Progress)> {
    let look = |state: &State| -> Vec<(NodeId, Door, Progress, bool)> {
        let each = doors.iter().filter_map(|(node_id, door)| {
            let (progress, may_go_on) = door_progress(state, id, *node_id, door)?;
            Some((*node_id, door.clone(), progress, may_go_on))
        });
        each.collect()
    };
    let done = |state: &State| Some(look(state)).filter(|doors| !doors.iter().any(|(.., may_go_on)| *may_go_on));
    let ended = control.wait_for(control.wait, done).await.unwrap_or_else(|| look(&control.state()));
    ended.into_iter().map(|(node_id, door, progress, _)| (node_id, door, progress)).collect()
}

fn views(control: &Control, id: VolumeId, doors: &[(NodeId, Door)]) -> Vec<ExportView> {
    let state = control.state();
    let Some(volume) = state.desired.volumes.get(&id) else { return vec![] };
    doors.iter().filter_map(|(node_id, door)| view::export(&state, id, volume, *node_id, door)).collect()
}

/// Open a door to a volume, on every node that has a replica of it
#[utoipa::path(post, path = "/v1/volumes/{volume}/export", params(("volume" = String, Path)), request_body = ExportBody, responses(
    (status = 200, body = Vec<ExportView>),
    (status = 202, description = "Taken in; a node is away or not done yet", body = Vec<ExportView>),
    (status = "4XX", body = ApiError)))]
pub async fn export(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<ExportBody>,
) -> Result<(StatusCode, Json<Vec<ExportView>>), Problem> {
    let id = find(&control.state(), &volume)?;
    let mut doors = Vec::new();
    let mut before = Vec::new();
    // The doors' subjects are known only once they are judged; their old refusals are forgotten below.
    control
        .change(&[], |state| {
            let gone = || ApiError::new(ErrorCode::Conflict, "it was removed meanwhile");
            let desired = state.desired.volumes.get(&id).ok_or_else(gone)?;
            doors = change::doors_meant(&state.desired, desired, &body.door, body.node.as_deref())?;
            before = doors.iter().map(|(node_id, door)| desired.door(*node_id, door).map(|desired| desired.phase)).collect();
            change::export(&state.desired, &volume, &doors)
        })
        .await?;
    control.forget(&doors.iter().map(|(_, door)| Subject::Door(id, door.clone())).collect::<Vec<_>>());
    let ended = settle_doors(&control, id, &doors).await;
    let refused = ended.iter().find_map(|(.., progress)| match progress {
        Progress::Refused { code, message, hint } => Some(ApiError { code: *code, message: message.clone(), hint: hint.clone() }),
        _ => None,
    });
    if let Some(error) = refused {
        let refused = ended.iter().filter(|(.., progress)| matches!(progress, Progress::Refused { .. }));
        for (node_id, door, _) in refused {
            let at = doors.iter().position(|(other, meant)| other == node_id && meant == door).expect("it is one of them");
            let phase = before[at];
            let subject = [Subject::Door(id, door.clone())];
            control.change(&subject, |state| Ok(change::withdraw_door(&state.desired, id, *node_id, door, phase))).await?;
        }
        return Err(error.into());
    }
    let are_settled = ended.len() == doors.len() && ended.iter().all(|(.., progress)| progress.is_settled());
    let views = views(&control, id, &doors);
    if views.is_empty() {
        return Err(vanished());
    }
    Ok((if are_settled { StatusCode::OK } else { StatusCode::ACCEPTED }, Json(views)))
}

/// Close a door, wherever it is open or on one node; refused while hosts are connected unless forced
#[utoipa::path(post, path = "/v1/volumes/{volume}/unexport", params(("volume" = String, Path)), request_body = UnexportBody, responses(
    (status = 204, description = "It is closed"),
    (status = 202, description = "Taken in; a node is away or not done yet", body = Vec<ExportView>),
    (status = "4XX", body = ApiError)))]
pub async fn unexport(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<UnexportBody>,
) -> Result<(StatusCode, Json<Vec<ExportView>>), Problem> {
    let id = find(&control.state(), &volume)?;
    let subject = [Subject::Door(id, body.door.clone())];
    let mut doors = Vec::new();
    control
        .change(&subject, |state| {
            let node = match body.node.as_deref() {
                None => None,
                Some(text) => Some(state.desired.find_node(text).map(|(id, _)| id).ok_or_else(|| {
                    ApiError::new(ErrorCode::NotFound, format!("node {text} does not exist")).with_hint("see `penstock node ls`")
                })?),
            };
            let (closed, records) = change::unexport(&state.desired, &volume, &body.door, node, body.force)?;
            doors = closed.into_iter().map(|node_id| (node_id, body.door.clone())).collect();
            Ok(records)
        })
        .await?;
    let ended = settle_doors(&control, id, &doors).await;
    let mut refused = None;
    for (node_id, door, progress) in &ended {
        if let Progress::Refused { code, message, hint } = progress {
            control.change(&subject, |state| Ok(change::withdraw_door(&state.desired, id, *node_id, door, Some(Phase::Present)))).await?;
            refused = Some(ApiError { code: *code, message: message.clone(), hint: hint.clone() });
        }
    }
    match refused {
        Some(error) => Err(error.into()),
        None if ended.is_empty() => Ok((StatusCode::NO_CONTENT, Json(vec![]))),
        None => Ok((StatusCode::ACCEPTED, Json(views(&control, id, &doors)))),
    }
}

/// How often a transfer looks whether it has come about.
const TRANSFER_LOOK: std::time::Duration = std::time::Duration::from_millis(25);

/// Let another node's replica lead
#[utoipa::path(post, path = "/v1/volumes/{volume}/transfer", params(("volume" = String, Path)), request_body = TransferBody, responses(
    (status = 200, description = "It leads", body = VolumeView),
    (status = 202, description = "Begun; it does not lead yet", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError)))]
pub async fn transfer(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<TransferBody>,
) -> Result<(StatusCode, Json<VolumeView>), Problem> {
    let asked = find(&control.state(), &volume)?;
    control.elected(asked).await;
    let (id, to, from) = {
        let state = control.state();
        let id = find(&state, &volume)?;
        let to = transfer_to(&state, id, &body.to)?;
        (id, to, view::leader(&state, id).map(|(node_id, _)| node_id))
    };
    let leads = |state: &State| view::leader(state, id).is_some_and(|(node_id, _)| node_id == to);
    if from != Some(to) {
        let from = from.ok_or_else(|| {
            ApiError::new(ErrorCode::NotReady, format!("no replica of volume {volume} leads now"))
                .with_hint("it elects a leader within a second where most of its nodes are there, see `penstock node ls`; ask again then")
        })?;
        control.client(from)?.call::<rpc::GroupTransfer>(&GroupTransferParams { volume_id: id, to }).await?;
        let deadline = tokio::time::Instant::now() + control.wait;
        while !leads(&control.state()) && tokio::time::Instant::now() < deadline {
            control.wake();
            tokio::time::sleep(TRANSFER_LOOK).await;
        }
    }
    let state = control.state();
    let status = if leads(&state) { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(view::volume(&state, id).ok_or_else(vanished)?)))
}

/// The node that is to lead, if it can.
fn transfer_to(state: &State, id: VolumeId, text: &str) -> Result<NodeId, ApiError> {
    let desired = &state.desired.volumes[&id];
    let nodes = || desired.replicas.iter().map(|replica| state.desired.node_name(replica.node_id)).collect::<Vec<_>>().join(", ");
    if desired.group.is_none() {
        let error = ApiError::new(ErrorCode::Invalid, format!("volume {} has one replica, which nobody can take over from", desired.name));
        return Err(error.with_hint("volumes made with --replicas 3 or 5 have others"));
    }
    let found = state.desired.find_node(text).map(|(node_id, _)| node_id).filter(|node_id| desired.replica_on(*node_id).is_some());
    let to = found.ok_or_else(|| {
        let shown: String = text.chars().take(64).collect();
        ApiError::new(ErrorCode::Invalid, format!("volume {} has no replica on a node {shown}", desired.name))
            .with_hint(format!("it has replicas on {}", nodes()))
    })?;
    if desired.replica_on(to).is_some_and(|replica| replica.log_only) {
        let message =
            format!("the replica of volume {} on node {} keeps the log alone: it cannot lead", desired.name, state.desired.node_name(to));
        return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("name the node of another: see `penstock replica ls`"));
    }
    if state.node(to).is_none_or(|node| node.present().is_none()) {
        let error = ApiError::new(ErrorCode::NotReady, format!("node {} is away", state.desired.node_name(to)));
        return Err(error.with_hint(format!("start its penstockd, or name another of {}", nodes())));
    }
    Ok(to)
}
