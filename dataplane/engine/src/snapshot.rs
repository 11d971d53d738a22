//! Snapshots of a volume: a marker in its log, from which on what is written goes to a layer of its own.
//!
//! Not here: which layer an entry belongs to (`map`), how a stack of layers is read (`read`), and where a removed one goes (`merge`).

use crate::config::SnapshotView;
use crate::map::{LayerKey, Replica};
use crate::port::*;
use crate::store::Store;
use penstock_wire::layer::{LAYER_NO_LIMIT, SNAPSHOTS_MAX, SnapshotShape};
use penstock_wire::{Index as RaftIndex, SegmentId, Seq, SnapshotId, VolumeId};

impl Store {
    /// The replica that a snapshot may be taken of. Otherwise the order's answer.
    pub(crate) fn may_snapshot(&self, segment: SegmentId, snapshot: &SnapshotShape) -> Result<ReplicaNo, Result<(), OrderError>> {
        let no = self.map.by_segment(segment).ok_or(Err(OrderError::NoSuchSegment))?;
        let replica = self.map.get(no).expect("a segment's replica stands");
        if !self.serves(no) {
            return Err(Err(OrderError::NotLeader(self.leader_of(no))));
        }
        if snapshot.check().is_err() {
            return Err(Err(OrderError::Invalid("a snapshot's name has 64 bytes at most")));
        }
        if let Some(stands) = replica.snapshot(snapshot.id) {
            let same = stands.snapshot == *snapshot;
            return Err(if same { Ok(()) } else { Err(OrderError::OtherSnapshot(stands.snapshot.name.clone())) });
        }
        let full = replica.frozen.len() + replica.freezing as usize >= SNAPSHOTS_MAX || replica.live.no.0 + 1 >= LAYER_NO_LIMIT;
        if full { Err(Err(OrderError::NoSpace)) } else { Ok(no) }
    }

    /// The layer that an entry of a member's log will change: as many above the live one as markers stand before it and are not applied.
    pub(crate) fn layer_to_be(&self, no: ReplicaNo, index: RaftIndex) -> LayerKey {
        let layer = self.map.layer_at(no, index.0);
        let Some((replica, member)) = self.map.get(no).and_then(|replica| Some((replica, replica.member.as_deref()?))) else {
            return layer;
        };
        // Those of the log that is about to be replaced go with it.
        let stand = |marker: &&RaftIndex| member.replaced_from.is_none_or(|from| **marker < from);
        let staged = member.staged_markers.iter().filter(|marker| !member.markers.iter().filter(stand).any(|other| other == *marker));
        let before = |marker: &&RaftIndex| (replica.since.0 + 1..index.0).contains(&marker.0);
        let ahead = member.markers.iter().filter(stand).chain(staged).filter(before).count() as u32;
        LayerKey { layer: LayerNo(layer.layer.0 + ahead), ..layer }
    }

    /// `seq`: nothing that belongs to its layer is in a later batch. It goes as the drain gets to it.
    pub(crate) fn apply_unsnapshot(&mut self, no: ReplicaNo, snapshot: SnapshotId, seq: Seq) {
        self.map.unsnapshot(no, snapshot, seq);
        self.count_merges();
    }

    /// What a clone stands on: the volume, its segment, and the snapshot of it.
    pub fn origin(&self, no: ReplicaNo) -> Option<(VolumeId, SegmentId, SnapshotId)> {
        let of = self.map.live(no)?.origin?;
        let origin = self.map.get(of.replica)?;
        Some((origin.shape.volume, origin.shape.segment, origin.frozen(of.layer)?.snapshot.id))
    }

    /// A replica's snapshots, oldest first.
    pub fn snapshots(&self, no: ReplicaNo) -> Vec<SnapshotView> {
        self.map.live(no).map(Replica::snapshots).unwrap_or_default()
    }
}
