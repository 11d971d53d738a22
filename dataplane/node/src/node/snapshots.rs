//! Snapshots of volumes: taken, removed and shown. Not here: what they are (the engine's), and which there are to be (control's).

use std::rc::Rc;

use penstock_api::rpc::{Empty, Origin, SnapshotCreateParams, SnapshotDeleteParams, SnapshotInfo};
use penstock_api::{ByteSize, SegmentId, SnapshotId, VolumeId};
use penstock_engine::{Order, SnapshotView};
use penstock_wire::layer::SnapshotShape;
use penstock_wire::{BLOCK, EXTENT};

use super::{Answer, Node};

/// `None` where its id or name are not ones that this project makes.
pub(super) fn info(view: &SnapshotView) -> Option<SnapshotInfo> {
    Some(SnapshotInfo {
        snapshot_id: SnapshotId::from_bytes(view.snapshot.id.0).ok()?,
        name: view.snapshot.name.parse().ok()?,
        index: view.at.0,
        size_bytes: ByteSize(view.blocks * BLOCK as u64),
        allocated_bytes: ByteSize(view.allocated_extents * EXTENT as u64),
    })
}

/// What a clone stands on, as above.
pub(super) fn origin(
    &(volume, segment, snapshot): &(penstock_wire::VolumeId, penstock_wire::SegmentId, penstock_wire::SnapshotId),
) -> Option<Origin> {
    Some(Origin {
        volume_id: VolumeId::from_bytes(volume.0).ok()?,
        segment_id: SegmentId::from_bytes(segment.0).ok()?,
        snapshot_id: SnapshotId::from_bytes(snapshot.0).ok()?,
    })
}

pub(super) fn wire_id(id: SnapshotId) -> penstock_wire::SnapshotId {
    penstock_wire::SnapshotId(id.to_bytes())
}

impl Node {
    pub(super) fn snapshot_create(self: &Rc<Self>, params: SnapshotCreateParams, answer: Answer<Empty>) {
        let snapshot = Box::new(SnapshotShape { id: wire_id(params.snapshot_id), name: params.name.as_str().to_owned() });
        self.segment_order(params.volume_id, "taking a snapshot", |segment| Order::Snapshot { segment, snapshot }, answer);
    }

    pub(super) fn snapshot_delete(self: &Rc<Self>, params: SnapshotDeleteParams, answer: Answer<Empty>) {
        let snapshot = wire_id(params.snapshot_id);
        self.segment_order(params.volume_id, "removing a snapshot", |segment| Order::Unsnapshot { segment, snapshot }, answer);
    }
}
