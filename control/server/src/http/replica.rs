//! Replicas that move or are replaced: the wish is taken in and answered at once, since it may take as long as the data take to copy. And majorities that
//! are lost for good, where the answer is what became of it.

use axum::Json;
use axum::extract::State as AxumState;
use axum::http::StatusCode;
use penstock_api::ReplicaId;
use penstock_api::http::{ApiError, RecoveryView, ReplicaMoveBody, ReplicaRecoverBody, ReplicaReplaceBody, VolumeView};
use penstock_api::rpc::{self, GroupRecoverParams};
use penstock_model::Subject;
use penstock_model::change::{self, Judged};
use penstock_model::recovery::{Recovery, is_recovered, recover as judge_recovery};

use super::Shared;
use super::problem::{Body, Part, Problem};
use super::view;
use super::volume::{find, vanished};
use crate::control::{Control, State};

type Answer = Result<(StatusCode, Json<VolumeView>), Problem>;

async fn begin(control: &Control, volume: &str, judge: impl FnOnce(&State) -> Judged) -> Answer {
    let id = find(&control.state(), volume)?;
    control.elected(id).await;
    control.change(&[Subject::Members(id), Subject::Volume(id)], judge).await?;
    let view = view::volume(&control.state(), id).ok_or_else(vanished)?;
    Ok((if view.change.is_some() { StatusCode::ACCEPTED } else { StatusCode::OK }, Json(view)))
}

/// Move a volume's replica from one node to another; the old one counts until the new one has everything
#[utoipa::path(post, path = "/v1/volumes/{volume}/replicas/move", params(("volume" = String, Path)), request_body = ReplicaMoveBody, responses(
    (status = 202, description = "Taken in; `change` in the answer and in later looks says how far it is", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError), (status = 507, body = ApiError)))]
pub async fn shift(AxumState(control): Shared, Part(volume): Part<String>, Body(body): Body<ReplicaMoveBody>) -> Answer {
    let id = ReplicaId(control.id().await?);
    let judge = |state: &State| change::move_replica(&state.desired, &state.observed(), id, &volume, (&body.from, &body.to), body.drive_id);
    begin(&control, &volume, judge).await
}

/// Give a volume's replica up for a new one, on its node or on another
#[utoipa::path(post, path = "/v1/volumes/{volume}/replicas/replace", params(("volume" = String, Path)), request_body = ReplicaReplaceBody,
    responses(
    (status = 202, description = "Taken in; `change` in the answer and in later looks says how far it is", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError), (status = 507, body = ApiError)))]
pub async fn replace(AxumState(control): Shared, Part(volume): Part<String>, Body(body): Body<ReplicaReplaceBody>) -> Answer {
    let id = ReplicaId(control.id().await?);
    let judge = |state: &State| {
        change::replace_replica(&state.desired, &state.observed(), id, &volume, (&body.node, body.on.as_deref()), body.drive_id)
    };
    begin(&control, &volume, judge).await
}

/// Take back a move or a replacement that is under way, while the old replica is still of the group
#[utoipa::path(post, path = "/v1/volumes/{volume}/replicas/give-up", params(("volume" = String, Path)), responses(
    (status = 200, description = "Nothing was begun yet", body = VolumeView),
    (status = 202, description = "Taken in; the new replica leaves again", body = VolumeView),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError)))]
pub async fn give_up(AxumState(control): Shared, Part(volume): Part<String>) -> Answer {
    begin(&control, &volume, |state| change::give_up_change(&state.desired, &state.observed(), &volume)).await
}

/// Go on with one replica alone, where a majority of them is lost for good; without `force`, say what would be lost
#[utoipa::path(post, path = "/v1/volumes/{volume}/replicas/recover", params(("volume" = String, Path)), request_body = ReplicaRecoverBody,
    responses(
    (status = 200, description = "With a receipt: it is done. Without: it may be done, and nothing was", body = RecoveryView),
    (status = 409, description = "A quorum is there, or what that replica has is in question", body = ApiError),
    (status = "4XX", body = ApiError), (status = 503, body = ApiError)))]
pub async fn recover(
    AxumState(control): Shared,
    Part(volume): Part<String>,
    Body(body): Body<ReplicaRecoverBody>,
) -> Result<Json<RecoveryView>, Problem> {
    let (mut view, survivor) = {
        let state = control.state();
        let judged = judge_recovery(&state.desired, &state.observed(), &volume, body.node.as_deref(), body.regardless)?;
        let Recovery { volume_id, survivor, replicas, is_done: done } = judged;
        let name = state.desired.volumes[&volume_id].name.clone();
        let node = state.desired.node_name(survivor);
        (RecoveryView { volume_id, name, node_id: survivor, node, done, replicas, receipt: None }, survivor)
    };
    if body.force {
        let params = GroupRecoverParams { volume_id: view.volume_id, regardless: body.regardless };
        view.receipt = Some(control.client(survivor)?.call::<rpc::GroupRecover>(&params).await?);
        view.done = true;
        control.forget(&[Subject::Volume(view.volume_id), Subject::Members(view.volume_id)]);
        // Whoever asks next is answered from the last look, which may be from before: the group stood still then, and nobody served.
        let serves = |state: &State| is_recovered(&state.desired, &state.observed(), view.volume_id).then_some(());
        control.wait_for(control.wait, serves).await;
    }
    Ok(Json(view))
}
