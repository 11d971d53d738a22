//! Snapshots of volumes: taken while hosts go on, read beside them, and held against what the volume was at the marker.
//!
//! A snapshot is another volume to the oracle, whose blocks are what the volume's may have been between the order and its answer. Not here:
//! what is read of a volume itself (`hosts`).

use penstock_engine::{HostOp, LayerNo, Order, ReplicaNo, Span, Store};
use penstock_wire::SnapshotId;
use penstock_wire::layer::SnapshotShape;

use crate::orders::Pending;
use crate::stamp::BLOCK;
use crate::world::World;

/// Snapshots of a volume at a time.
const SNAPSHOTS_MAX: usize = 4;
/// Commands that hosts send while a snapshot is on its way: each doubles what its blocks may be.
const MEANWHILE_MAX: u32 = 8;

pub struct Snapshot {
    /// The oracle's volume.
    pub no: u32,
    /// The volume that it is of.
    pub of: u32,
    /// Once it was acknowledged.
    pub layer: Option<LayerNo>,
    pub size_blocks: u64,
    /// It was ordered away: nobody reads it any more.
    pub removed: bool,
    /// Commands that hosts may yet send before it is acknowledged.
    pub meanwhile: u32,
}

impl Snapshot {
    fn shape(&self) -> SnapshotShape {
        shape_of(self.no)
    }
}

pub fn shape_of(no: u32) -> SnapshotShape {
    SnapshotShape { id: id_of(no), name: format!("s{no}") }
}

pub fn id_of(no: u32) -> SnapshotId {
    let mut id = [0x54; 16];
    id[..4].copy_from_slice(&no.to_le_bytes());
    SnapshotId(id)
}

/// The layer that a store has of a snapshot.
pub fn layer_in(store: &Store, replica: ReplicaNo, no: u32) -> Option<LayerNo> {
    store.snapshots(replica).into_iter().find(|view| view.snapshot.id == id_of(no)).map(|view| view.layer)
}

impl World {
    /// A volume is to be kept as it is about now, or one of its snapshots to go.
    pub fn take_snapshot(&mut self, volume: u32) {
        let taken = self.taken(volume);
        if taken.len() >= SNAPSHOTS_MAX || !taken.is_empty() && self.rng.percent(40) {
            let (no, ..) = self.rng.pick(&taken);
            if self.has_clone(no) {
                return;
            }
            self.snapshots.get_mut(&no).expect("taken").removed = true;
            self.volumes.get_mut(&volume).expect("there").pending = Some(Pending::Unsnapshot { order: None, no });
            return;
        }
        let no = self.next_volume;
        self.next_volume += 1;
        let size_blocks = self.volumes[&volume].shape.blocks;
        self.oracle.begin_snapshot(volume, no);
        self.snapshots.insert(no, Snapshot { no, of: volume, layer: None, size_blocks, removed: false, meanwhile: MEANWHILE_MAX });
        self.volumes.get_mut(&volume).expect("there").pending = Some(Pending::Snapshot { order: None, no });
    }

    pub fn snapshot_order(&self, no: u32) -> Order {
        let s = &self.snapshots[&no];
        Order::Snapshot { segment: self.volumes[&s.of].shape.segment, snapshot: Box::new(s.shape()) }
    }

    pub fn removal_order(&self, no: u32) -> Order {
        Order::Unsnapshot { segment: self.volumes[&self.snapshots[&no].of].shape.segment, snapshot: id_of(no) }
    }

    pub fn snapshot_removed(&mut self, shard: usize, no: u32) {
        let replica = self.volumes[&self.snapshots[&no].of].number.expect("a volume that was created was told");
        let store = self.shards[shard].store.as_ref().expect("it answers");
        assert_eq!(layer_in(store, replica, no), None, "snapshot {no} was removed and stands");
        self.tally.did("snapshots removed", 1);
    }

    /// The store says that it stands.
    pub fn snapshot_taken(&mut self, shard: usize, no: u32) {
        let s = self.snapshots.get_mut(&no).expect("it was ordered");
        let replica = self.volumes[&s.of].number.expect("a volume that was created was told");
        let store = self.shards[shard].store.as_ref().expect("it answers");
        s.layer = Some(layer_in(store, replica, no).expect("a snapshot that was acknowledged stands"));
        self.oracle.end_snapshot(no).unwrap_or_else(|wrong| panic!("{wrong}"));
        self.tally.did("snapshots", 1);
    }

    /// It never was, or is gone with its volume.
    pub fn forget_snapshots(&mut self, gone: impl Fn(&Snapshot) -> bool) {
        let gone: Vec<u32> = self.snapshots.values().filter(|s| gone(s)).map(|s| s.no).collect();
        for no in gone {
            self.snapshots.remove(&no);
            self.oracle.drop_volume(no);
        }
    }

    /// Whether a host may send to a volume that an order is on its way for.
    pub fn may_go_on(&mut self, pending: Option<Pending>) -> bool {
        match pending {
            None => true,
            Some(Pending::Snapshot { no, .. }) => {
                let s = self.snapshots.get_mut(&no).expect("it is ordered");
                s.meanwhile = s.meanwhile.saturating_sub(1);
                s.meanwhile > 0
            }
            Some(Pending::Unsnapshot { .. }) => true,
            Some(_) => false,
        }
    }

    /// A volume and its snapshots: what its store says of a block may be of any of them.
    pub fn in_any_layer(&self, volume: u32) -> impl Iterator<Item = u32> {
        self.snapshots.values().filter(move |s| s.of == volume).map(|s| s.no).chain([volume])
    }

    /// Whether a clone stands on a snapshot, or may.
    pub fn has_clone(&self, snapshot: u32) -> bool {
        self.volumes.values().any(|v| v.origin == Some(snapshot) && (!v.doomed || v.pending.is_some()))
    }

    /// Whether a clone stands on any of a volume's snapshots, or may.
    pub fn is_origin(&self, volume: u32) -> bool {
        self.snapshots.values().any(|s| s.of == volume && self.has_clone(s.no))
    }

    /// Snapshots of a volume that were acknowledged and are to stay.
    pub fn taken(&self, volume: u32) -> Vec<(u32, LayerNo, u64)> {
        let taken = self.snapshots.values().filter(|s| s.of == volume && !s.removed);
        taken.filter_map(|s| Some((s.no, s.layer?, s.size_blocks))).collect()
    }

    /// A read of one of a volume's snapshots, if it has any: mostly of blocks that it holds.
    pub fn read_of_snapshot(&mut self, volume: u32) -> Option<(u32, HostOp)> {
        let taken = self.taken(volume);
        if taken.is_empty() {
            return None;
        }
        let (no, layer, size) = self.rng.pick(&taken);
        let touched = self.oracle.touched(no);
        let first = if touched.is_empty() || self.rng.one_in(8) { self.rng.below(size) } else { self.rng.pick(&touched) };
        let blocks = self.rng.within(1, 20).min(size.checked_sub(first).filter(|left| *left > 0)?);
        let span = Span { offset: first * BLOCK as u64, len: blocks * BLOCK as u64 };
        self.oracle.has_room(no, span).then_some((no, HostOp::ReadSnapshot(layer, span)))
    }
}
