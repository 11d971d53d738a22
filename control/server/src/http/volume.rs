//! Volumes and their exports.

use axum::Json;
use axum::extract::State as AxumState;
use axum::http::StatusCode;
use penstock_api::http::{
    ApiError, ExportBody, ExportView, ForceQuery, Progress, UnexportBody, VolumeCreateBody, VolumeResizeBody, VolumeView, path,
};
use penstock_api::rpc::{Door, ErrorCode};
use penstock_api::{ReplicaId, SegmentId, VolumeId};
use penstock_model::change::{self, VolumeIds};
use penstock_model::{Phase, Subject};

use super::Shared;
use super::problem::{Body, Part, Problem, Query};
use super::view;
use crate::control::{Control, State};

fn find(state: &State, name_or_id: &str) -> Result<VolumeId, ApiError> {
    let found = state.desired.find_volume(name_or_id).map(|(id, _)| id);
    found.ok_or_else(|| {
        let shown: String = name_or_id.chars().take(64).collect();
        ApiError::new(ErrorCode::NotFound, format!("volume {shown} does not exist")).with_hint("see `penstock volume ls`")
    })
}

fn vanished() -> Problem {
    ApiError::new(ErrorCode::Conflict, "it was removed meanwhile").into()
}

/// Waits until the volume is settled or refused. Does not wait for a node that is away.
async fn settle(control: &Control, id: VolumeId) -> Progress {
    let done = |state: &State| {
        let progress = state.look().volume(id);
        (!view::is_under_way(&progress) || state.away.is_some()).then_some(progress)
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
    change::check_name_free(&control.state().desired, &body.name)?;
    let ids = control.ids(3).await?;
    let ids = VolumeIds { volume: VolumeId(ids[0]), segment: SegmentId(ids[1]), replica: ReplicaId(ids[2]) };
    let subject = [Subject::Volume(ids.volume)];
    control
        .change(&subject, |state| {
            let observed = state.present().map(|seen| &seen.observed);
            let drive_id = change::place(&state.desired, observed, body.drive_id)?;
            change::create_volume(&state.desired, ids, &body, drive_id)
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
                let seen = state.present().and_then(|seen| seen.observed.volumes.get(&id));
                Ok(seen.map_or_else(Vec::new, |seen| change::withdraw_resize(&state.desired, id, seen.size)))
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
    let judge = |state: &State| {
        let observed = state.present().map(|seen| &seen.observed);
        change::remove_volume(&state.desired, observed, &volume, query.force)
    };
    control.change(&subject, judge).await?;
    let ended = control
        .wait_for(control.wait, |state| match state.desired.volumes.get(&id) {
            None => Some(None),
            Some(_) => {
                let progress = state.look().volume(id);
                (!view::is_under_way(&progress) || state.away.is_some()).then_some(Some(progress))
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

fn door_progress(state: &State, id: VolumeId, door: &Door) -> Option<Progress> {
    let volume = state.desired.volumes.get(&id)?;
    Some(state.look().door(id, volume, volume.door(door)?))
}

/// Open a door to a volume
#[utoipa::path(post, path = "/v1/volumes/{volume}/export", params(("volume" = String, Path)), request_body = ExportBody, responses(
    (status = 200, body = ExportView),
    (status = 202, description = "Taken in; the node is away or not done yet", body = ExportView),
    (status = "4XX", body = ApiError)))]
pub async fn export(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(ExportBody { door }): Body<ExportBody>,
) -> Result<(StatusCode, Json<ExportView>), Problem> {
    let id = find(&control.state(), &volume)?;
    let subject = [Subject::Door(id, door.clone())];
    let mut before = None;
    control
        .change(&subject, |state| {
            before = state.desired.volumes.get(&id).and_then(|volume| volume.door(&door)).map(|desired| desired.phase);
            change::export(&state.desired, &volume, &door)
        })
        .await?;
    let done = |state: &State| match door_progress(state, id, &door) {
        Some(progress) if view::is_under_way(&progress) && state.away.is_none() => None,
        other => Some(other),
    };
    let progress = control.wait_for(control.wait, done).await.flatten();
    if let Some(Progress::Refused { code, message, hint }) = progress {
        control.change(&subject, |state| Ok(change::withdraw_door(&state.desired, id, &door, before))).await?;
        return Err(ApiError { code, message, hint }.into());
    }
    let status = if progress.is_some_and(|progress| progress.is_settled()) { StatusCode::OK } else { StatusCode::ACCEPTED };
    let state = control.state();
    let view = state.desired.volumes.get(&id).and_then(|volume| view::export(&state, id, volume, &door));
    Ok((status, Json(view.ok_or_else(vanished)?)))
}

/// Close a door; refused while hosts are connected unless forced
#[utoipa::path(post, path = "/v1/volumes/{volume}/unexport", params(("volume" = String, Path)), request_body = UnexportBody, responses(
    (status = 204, description = "It is closed"),
    (status = 202, description = "Taken in; the node is away or not done yet", body = ExportView),
    (status = "4XX", body = ApiError)))]
pub async fn unexport(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<UnexportBody>,
) -> Result<(StatusCode, Json<Option<ExportView>>), Problem> {
    let id = find(&control.state(), &volume)?;
    let door = &body.door;
    let subject = [Subject::Door(id, door.clone())];
    control.change(&subject, |state| change::unexport(&state.desired, &volume, door, body.force)).await?;
    let done = |state: &State| match door_progress(state, id, door) {
        Some(progress) if view::is_under_way(&progress) && state.away.is_none() => None,
        other => Some(other),
    };
    match control.wait_for(control.wait, done).await {
        Some(None) => Ok((StatusCode::NO_CONTENT, Json(None))),
        Some(Some(Progress::Refused { code, message, hint })) => {
            control.change(&subject, |state| Ok(change::withdraw_door(&state.desired, id, door, Some(Phase::Present)))).await?;
            Err(ApiError { code, message, hint }.into())
        }
        Some(Some(_)) | None => {
            let state = control.state();
            let view = state.desired.volumes.get(&id).and_then(|volume| view::export(&state, id, volume, door));
            Ok((StatusCode::ACCEPTED, Json(view)))
        }
    }
}
