//! The JSON-RPC methods `penstock_*`: params checked, the node asked, answers sent when they come.
//!
//! Registered before SPDK starts, so that no client comes too early; until the node is there they answer NotReady.

use std::rc::Rc;

use penstock_api::rpc::{
    self as api, DriveAdd, DriveClearFence, DriveList, DriveProbe, DriveRemove, Empty, ErrorCode, ExportAdd, ExportRemove, GroupChange,
    GroupRecover, GroupTransfer, MemberCreate, Method, MetricsGet, NodeClaim, NodeGet, PeersSet, Scrub, SnapshotCreate, SnapshotDelete,
    VolumeCreate, VolumeDelete, VolumeList, VolumeResize,
};
use spdk_rs::rpc::Reply;

use super::{Answer, Node, current, fail};

fn to_spdk(error: api::RpcError) -> spdk_rs::rpc::RpcError {
    let plain = spdk_rs::rpc::RpcError::new(error.code, error.message);
    match error.data.map(serde_json::to_value) {
        Some(Ok(data)) => plain.with_data(data),
        Some(Err(_)) | None => plain,
    }
}

fn method<M: Method + 'static>(call: impl Fn(&Rc<Node>, M::Params, Answer<M::Result>) + 'static) -> Result<(), spdk_rs::Errno>
where
    M::Result: 'static,
{
    spdk_rs::rpc::register(M::NAME, move |params: Option<serde_json::Value>, reply: Reply<M::Result>| {
        let answer: Answer<M::Result> = Box::new(move |result| reply.send(result.map_err(to_spdk)));
        let Some(node) = current().filter(|node| node.ready.get()) else {
            return answer(Err(fail(ErrorCode::NotReady, "penstockd is starting", "try again in a moment")));
        };
        match api::decode_params::<M>(params) {
            Ok(params) => call(&node, params, answer),
            Err(error) => answer(Err(error)),
        }
    })
}

/// Registers all methods. Before SPDK starts, on the thread that will run it.
///
/// # Errors
/// When SPDK refuses one, which would be a bug.
pub fn register() -> Result<(), spdk_rs::Errno> {
    method::<NodeGet>(|node, Empty {}, answer| node.node_get(answer))?;
    method::<NodeClaim>(|node, params, answer| match node.claim(params.cluster_id, params.node_id) {
        Ok(()) => node.node_get(answer),
        Err(error) => answer(Err(error)),
    })?;
    method::<DriveProbe>(|node, params, answer| node.drive_probe(params.spec, answer))?;
    method::<DriveAdd>(|node, params, answer| node.drive_add(params, answer))?;
    method::<DriveRemove>(|node, params, answer| node.drive_remove(params, answer))?;
    method::<DriveList>(|node, Empty {}, answer| node.drive_list(answer))?;
    method::<DriveClearFence>(|node, params, answer| node.drive_clear_fence(params.drive_id, answer))?;
    method::<VolumeCreate>(|node, params, answer| node.volume_create(params, answer))?;
    method::<MemberCreate>(|node, params, answer| node.member_create(params, answer))?;
    method::<GroupChange>(|node, params, answer| node.group_change(params, answer))?;
    method::<GroupTransfer>(|node, params, answer| node.group_transfer(params, answer))?;
    method::<GroupRecover>(|node, params, answer| node.group_recover(params, answer))?;
    method::<PeersSet>(|node, params, answer| node.peers_set(params, answer))?;
    method::<VolumeDelete>(|node, params, answer| node.volume_delete(params, answer))?;
    method::<VolumeResize>(|node, params, answer| node.volume_resize(params, answer))?;
    method::<SnapshotCreate>(|node, params, answer| node.snapshot_create(params, answer))?;
    method::<SnapshotDelete>(|node, params, answer| node.snapshot_delete(params, answer))?;
    method::<VolumeList>(|node, Empty {}, answer| node.volume_list(answer))?;
    method::<ExportAdd>(|node, params, answer| node.export_add(params, answer))?;
    method::<ExportRemove>(|node, params, answer| node.export_remove(params, answer))?;
    method::<Scrub>(|node, params, answer| node.scrub(params.drive_id, params.action, answer))?;
    method::<api::Drain>(|node, params, answer| node.drain(params, answer))?;
    method::<MetricsGet>(|node, Empty {}, answer| node.metrics_get(answer))
}
