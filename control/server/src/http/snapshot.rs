//! Snapshots of volumes.

use axum::Json;
use axum::extract::State as AxumState;
use axum::http::StatusCode;
use penstock_api::http::{ApiError, Progress, SnapshotCreateBody, SnapshotView};
use penstock_api::{SnapshotId, VolumeId};
use penstock_model::{Subject, snapshots};

use super::Shared;
use super::problem::{Body, Part, Problem};
use super::view;
use super::volume::{find, vanished};
use crate::control::{Control, State};

/// Waits until the snapshot is settled, refused or gone, which is `None`.
async fn settle(control: &Control, volume: VolumeId, id: SnapshotId) -> Option<SnapshotView> {
    let look = |state: &State| view::snapshot(state, volume, id);
    let done = |state: &State| Some(look(state)).filter(|view| !view.as_ref().is_some_and(|view| view::is_under_way(&view.progress)));
    control.wait_for(control.wait, done).await.unwrap_or_else(|| look(&control.state()))
}

/// A volume's snapshots, oldest first
#[utoipa::path(get, path = "/v1/volumes/{volume}/snapshots", params(("volume" = String, Path)), responses(
    (status = 200, body = Vec<SnapshotView>), (status = 404, body = ApiError)))]
pub async fn list(AxumState(control): Shared, Part(volume): Part<String>) -> Result<Json<Vec<SnapshotView>>, Problem> {
    let state = control.state();
    let id = find(&state, &volume)?;
    Ok(Json(view::volume(&state, id).ok_or_else(vanished)?.snapshots))
}

/// Take a snapshot of a volume: every write that was answered before is in it
#[utoipa::path(post, path = "/v1/volumes/{volume}/snapshots", params(("volume" = String, Path)), request_body = SnapshotCreateBody, responses(
    (status = 201, description = "It is taken", body = SnapshotView),
    (status = 202, description = "Taken in; it is taken, as of then, when the volume is served", body = SnapshotView),
    (status = "4XX", body = ApiError), (status = 507, body = ApiError)))]
pub async fn create(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<SnapshotCreateBody>,
) -> Result<(StatusCode, Json<SnapshotView>), Problem> {
    let volume_id = find(&control.state(), &volume)?;
    let id = SnapshotId(control.id().await?);
    control.change(&[], |state| snapshots::take(&state.desired, id, &volume, &body.name)).await?;
    let view = settle(&control, volume_id, id).await.ok_or_else(vanished)?;
    if let Progress::Refused { code, message, hint } = view.progress {
        let subject = [Subject::Snapshot(volume_id, id)];
        control.change(&subject, |state| Ok(snapshots::withdraw(&state.desired, volume_id, id))).await?;
        return Err(ApiError { code, message, hint }.into());
    }
    Ok((if view.progress.is_settled() { StatusCode::CREATED } else { StatusCode::ACCEPTED }, Json(view)))
}

/// Remove a snapshot; its space comes back in the background
#[utoipa::path(delete, path = "/v1/volumes/{volume}/snapshots/{snapshot}", params(("volume" = String, Path), ("snapshot" = String, Path)),
    responses(
    (status = 204, description = "It is gone"),
    (status = 202, description = "Taken in; the volume is not served now", body = SnapshotView),
    (status = "4XX", body = ApiError)))]
pub async fn remove(
    AxumState(control): Shared,
    Part((volume, snapshot)): Part<(String, String)>,
) -> Result<(StatusCode, Json<Option<SnapshotView>>), Problem> {
    let volume_id = find(&control.state(), &volume)?;
    let volume = volume_id.to_string();
    let mut id = None;
    control
        .change(&[], |state| {
            id = state.desired.volumes.get(&volume_id).and_then(|known| known.find_snapshot(&snapshot)).map(|found| found.snapshot_id);
            snapshots::remove(&state.desired, &volume, &snapshot)
        })
        .await?;
    let id = id.expect("judged, so found");
    control.forget(&[Subject::Snapshot(volume_id, id)]);
    match settle(&control, volume_id, id).await {
        None => Ok((StatusCode::NO_CONTENT, Json(None))),
        Some(SnapshotView { progress: Progress::Refused { code, message, hint }, .. }) => Err(ApiError { code, message, hint }.into()),
        Some(view) => Ok((StatusCode::ACCEPTED, Json(Some(view)))),
    }
}
