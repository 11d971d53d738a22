//! Snapshots of a volume: a marker in its log, from which on what is written goes to a layer of its own.
//!
//! Not here: which layer an entry belongs to (`map`), how a stack of layers is read (`read`), and where a removed one goes (`merge`).

use crate::config::SnapshotView;
use crate::map::Replica;
use crate::port::*;
use crate::store::Store;
use penstock_wire::layer::{FROZEN_MAX, LAYER_NO_LIMIT, SnapshotShape};
use penstock_wire::{Index as RaftIndex, SegmentId, Seq, SnapshotId};

impl Store {
    /// The replica that a snapshot may be taken of. Otherwise the order's answer.
    pub(crate) fn may_snapshot(&self, segment: SegmentId, snapshot: &SnapshotShape) -> Result<ReplicaNo, Result<(), OrderError>> {
        let no = self.map.by_segment(segment).ok_or(Err(OrderError::NoSuchSegment))?;
        let replica = self.map.get(no).expect("a segment's replica stands");
        if replica.member.is_some() {
            return Err(Err(OrderError::Invalid("a volume with several replicas has no snapshots yet")));
        }
        if snapshot.check().is_err() {
            return Err(Err(OrderError::Invalid("a snapshot's name has 64 bytes at most")));
        }
        if let Some(stands) = replica.snapshot(snapshot.id) {
            let same = stands.snapshot == *snapshot;
            return Err(if same { Ok(()) } else { Err(OrderError::OtherSnapshot(stands.snapshot.name.clone())) });
        }
        let full = replica.frozen.len() + replica.freezing as usize >= FROZEN_MAX || replica.live.no.0 + 1 >= LAYER_NO_LIMIT;
        if full { Err(Err(OrderError::NoSpace)) } else { Ok(no) }
    }

    pub(crate) fn apply_snapshot(&mut self, no: ReplicaNo, snapshot: &SnapshotShape, index: RaftIndex) {
        self.map.freeze(no, snapshot.clone(), index);
    }

    /// Its layer goes as the drain gets to it.
    pub(crate) fn apply_unsnapshot(&mut self, no: ReplicaNo, snapshot: SnapshotId, seq: Seq) {
        self.map.unsnapshot(no, snapshot, seq);
        self.count_merges();
    }

    /// A replica's snapshots, oldest first.
    pub fn snapshots(&self, no: ReplicaNo) -> Vec<SnapshotView> {
        self.map.live(no).map(Replica::snapshots).unwrap_or_default()
    }
}
