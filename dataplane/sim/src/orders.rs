//! Orders of the control side: volumes made, resized and deleted, given again after every death until they are done.
//!
//! Not here: commands of hosts (`hosts`).

use penstock_engine::{Notice, Order, OrderError, OrderId, ReplicaNo};
use penstock_wire::{ReplicaId, ReplicaShape, SegmentId, VolumeId};

use crate::hosts::Volume;
use crate::world::{Coming, Standing, World};

/// Volumes of a store at a time.
const VOLUMES_MAX: usize = 6;

/// An order on a volume that has not been done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pending {
    Create { order: Option<u64> },
    Resize { order: Option<u64>, blocks: u64 },
    Delete { order: Option<u64> },
    Snapshot { order: Option<u64>, no: u32 },
    Unsnapshot { order: Option<u64>, no: u32 },
}

impl Pending {
    fn order(self) -> Option<u64> {
        match self {
            Pending::Create { order }
            | Pending::Resize { order, .. }
            | Pending::Delete { order }
            | Pending::Snapshot { order, .. }
            | Pending::Unsnapshot { order, .. } => order,
        }
    }
}

pub fn segment_of(volume: u32) -> SegmentId {
    let mut id = [0x5e; 16];
    id[..4].copy_from_slice(&volume.to_le_bytes());
    SegmentId(id)
}

pub fn volume_of(segment: &SegmentId) -> u32 {
    u32::from_le_bytes(segment.0[..4].try_into().expect("4 bytes"))
}

impl World {
    pub fn add_volumes(&mut self) {
        for shard in 0..self.shards.len() {
            for _ in 0..self.plan.host.volumes_per_store {
                self.add_volume(shard);
            }
        }
    }

    fn add_volume(&mut self, shard: usize) {
        let (lo, hi) = self.plan.host.volume_blocks;
        let blocks = self.rng.within(lo, hi);
        let logical_block = self.rng.pick(&[512, 512, 4096]);
        self.begin_volume(shard, blocks, logical_block, None);
    }

    /// One of a volume's snapshots becomes another volume.
    fn add_clone(&mut self, of: u32) {
        let taken = self.taken(of);
        if !taken.is_empty() {
            let (snapshot, _, size) = self.rng.pick(&taken);
            let more = self.rng.below(40);
            let (shard, logical_block) = (self.volumes[&of].shard, self.volumes[&of].shape.logical_block);
            self.begin_volume(shard, size + more, logical_block, Some(snapshot));
        }
    }

    fn begin_volume(&mut self, shard: usize, blocks: u64, logical_block: u32, origin: Option<u32>) {
        let no = self.next_volume;
        self.next_volume += 1;
        let mut volume = [0xa0; 16];
        volume[..4].copy_from_slice(&no.to_le_bytes());
        let shape = ReplicaShape {
            volume: VolumeId(volume),
            segment: segment_of(no),
            replica: ReplicaId(volume),
            segment_no: 0,
            blocks,
            logical_block,
            name: format!("v{no}"),
        };
        // Hot blocks lie in a few clusters, so that extents hold several.
        let count = self.plan.host.hot_blocks.min(blocks);
        let mut hot = Vec::new();
        while (hot.len() as u64) < count {
            let at = self.rng.below(blocks);
            let run = self.rng.within(1, 20);
            hot.extend((at..(at + run).min(blocks)).take(count as usize - hot.len()));
        }
        let mut v = Volume::new(no, shard, shape, hot);
        v.pending = Some(Pending::Create { order: None });
        v.origin = origin;
        match origin {
            None => self.oracle.add_volume(no, blocks),
            Some(snapshot) => {
                self.oracle.add_clone(snapshot, no, blocks).unwrap_or_else(|wrong| panic!("{wrong}"));
                self.tally.did("clones", 1);
            }
        }
        if self.shards[shard].clouded {
            self.oracle.cloud(no);
        }
        self.volumes.insert(no, v);
        self.after(1, Coming::Think { volume: no });
    }

    /// Now and then: another size, an end, a new beginning, or an order that must be refused.
    pub fn order_something(&mut self, volume: u32) {
        let snapshots = self.rng.one_in(self.plan.host.snapshot_one_in);
        let orders = snapshots || self.plan.host.orders && self.rng.one_in(self.plan.host.order_one_in);
        if !orders {
            return;
        }
        let v = &self.volumes[&volume];
        let shard = v.shard;
        if v.pending.is_some()
            || !v.created
            || v.doomed
            || self.shards[shard].standing != Standing::Serving
            || self.shards[shard].fence.is_some()
        {
            return;
        }
        if snapshots {
            let count = self.volumes.values().filter(|v| v.shard == shard && !v.doomed).count();
            if count < VOLUMES_MAX && self.rng.one_in(4) {
                self.add_clone(volume);
            } else {
                self.take_snapshot(volume);
            }
            return;
        }
        match self.rng.below(8) {
            // A shrink and its ghosts are judged at rest.
            0..=2 if v.out == 0 => {
                let (lo, hi) = self.plan.host.volume_blocks;
                let blocks = self.rng.within(lo, hi);
                self.volumes.get_mut(&volume).expect("there").pending = Some(Pending::Resize { order: None, blocks });
            }
            3 if self.is_origin(volume) => {
                // Refused only while a clone stands for certain: one whose own end is ordered may be gone when its turn comes.
                let is_of = |snapshot| self.snapshots.get(&snapshot).is_some_and(|s| s.of == volume);
                if self.volumes.values().any(|v| v.created && !v.doomed && v.origin.is_some_and(is_of)) {
                    self.order(shard, Order::Delete { segment: segment_of(volume) });
                }
            }
            3 if self.volumes.values().filter(|v| v.shard == shard && !v.doomed).count() > 1 || self.rng.one_in(2) => {
                self.doom(volume);
                self.add_volume(shard);
            }
            4 if self.volumes.values().filter(|v| v.shard == shard && !v.doomed).count() < VOLUMES_MAX => self.add_volume(shard),
            5 => {
                let shape = Box::new(v.shape.clone());
                self.order(shard, Order::Create(shape));
            }
            6 => {
                // Its size and name may have changed since, so those are no conflict.
                let mut shape = Box::new(v.shape.clone());
                shape.logical_block = 512 + 4096 - shape.logical_block;
                self.order(shard, Order::Create(shape));
            }
            7 => {
                self.order(shard, Order::Delete { segment: segment_of(9_999_999) });
            }
            _ if self.plan.host.scrub => {
                self.order(shard, Order::ScrubStart);
            }
            _ => {}
        }
    }

    /// A volume is to go, its commands with it: nothing of it may ever be seen again.
    pub fn doom(&mut self, volume: u32) {
        let v = self.volumes.get_mut(&volume).expect("there");
        v.doomed = true;
        v.pending = Some(Pending::Delete { order: None });
        self.oracle.drop_volume(volume);
        self.forget_snapshots(|s| s.of == volume);
        self.tally.did("volumes deleted", 1);
    }

    /// Gives a volume's pending order, if it is not with the store already.
    pub fn retry_orders(&mut self, volume: u32) {
        let Some(v) = self.volumes.get(&volume) else { return };
        let shard = v.shard;
        let s = &self.shards[shard];
        let Some(pending) = v.pending else { return };
        if !self.alive || s.standing != Standing::Serving || pending.order().is_some_and(|id| s.orders.contains_key(&id)) {
            return;
        }
        if s.fence.is_some() && !self.rng.one_in(20) {
            return;
        }
        let (segment, shape) = (v.shape.segment, Box::new(v.shape.clone()));
        let order = match pending {
            Pending::Create { .. } => match v.origin {
                None => Order::Create(shape),
                Some(no) => {
                    let (origin, snapshot) = (segment_of(self.snapshots[&no].of), crate::snapshots::id_of(no));
                    Order::Clone { shape, members: None, origin, snapshot }
                }
            },
            Pending::Resize { blocks, .. } => Order::Resize { segment, blocks },
            Pending::Delete { .. } => Order::Delete { segment },
            Pending::Snapshot { no, .. } => self.snapshot_order(no),
            Pending::Unsnapshot { no, .. } => self.removal_order(no),
        };
        let id = self.order(shard, order);
        let v = self.volumes.get_mut(&volume).expect("there");
        match v.pending.as_mut().expect("pending") {
            Pending::Create { order }
            | Pending::Resize { order, .. }
            | Pending::Delete { order }
            | Pending::Snapshot { order, .. }
            | Pending::Unsnapshot { order, .. } => *order = Some(id),
        }
    }

    /// The store says that an order is done or refused.
    pub fn ordered(&mut self, shard: usize, id: OrderId, result: &Result<(), OrderError>) {
        let order = self.shards[shard].orders.remove(&id.0).unwrap_or_else(|| panic!("order {id:?} was answered twice or never given"));
        self.shards[shard].done.insert(id.0, result.clone());
        self.tally.check("orders answered");
        let mine = self.volumes.values().find(|v| v.pending.and_then(Pending::order) == Some(id.0)).map(|v| v.no);
        let Some(no) = mine else {
            if let (Order::Create(shape), Ok(())) = (&order, result) {
                let known = self.volumes.get(&volume_of(&shape.segment));
                let same = known.is_none_or(|v| v.doomed || v.shape.logical_block == shape.logical_block || v.pending.is_some());
                assert!(same, "a volume was created again with another shape: {shape:?}");
            }
            if let Order::Delete { segment } = &order
                && self.is_origin(volume_of(segment))
                && !self.shards[shard].clouded
            {
                let refused =
                    matches!(result, Err(OrderError::CloneStands(..) | OrderError::Fenced | OrderError::Stopping | OrderError::NotServing));
                assert!(refused, "{order:?} of a volume that a clone stands on is answered {result:?}");
                self.tally.check("what a clone stands on is not deleted");
            }
            return;
        };
        let v = self.volumes.get_mut(&no).expect("found");
        match (result, v.pending.expect("found by it")) {
            (Ok(()), Pending::Create { .. }) => {
                v.pending = None;
                v.created = true;
                assert!(v.replica.is_some() || v.doomed, "volume {no} was created and not announced");
            }
            (Ok(()), Pending::Resize { blocks, .. }) => {
                v.pending = None;
                v.shape.blocks = blocks;
                self.oracle.resize(no, blocks);
                self.tally.did("volumes resized", 1);
            }
            (Ok(()), Pending::Delete { .. }) => {
                v.pending = None;
                v.created = false;
                v.replica = None;
            }
            (Ok(()), Pending::Snapshot { no, .. }) => {
                v.pending = None;
                self.snapshot_taken(shard, no);
            }
            (Ok(()), Pending::Unsnapshot { no, .. }) => {
                v.pending = None;
                self.snapshot_removed(shard, no);
            }
            // What a shrink over a snapshot cuts off takes pages of the map.
            (Err(OrderError::NoSpace), Pending::Resize { .. }) => v.pending = None,
            (Err(OrderError::NoSpace), Pending::Create { .. }) => {
                // A full store takes no more volumes; this one is forgotten.
                v.doomed = true;
                v.pending = None;
                self.oracle.drop_volume(no);
            }
            // Its clones go first, where all of a store's volumes go.
            (Err(OrderError::CloneStands(..)), Pending::Delete { .. }) => {}
            (Err(OrderError::NotServing | OrderError::Fenced | OrderError::Stopping | OrderError::NoSpace), _) => {}
            (Err(error), pending) => panic!("{pending:?} of volume {no} was refused: {error:?}"),
        }
    }

    /// The store tells of a replica.
    pub fn replica_told(&mut self, shard: usize, replica: ReplicaNo, shape: &ReplicaShape, gone: bool) {
        let no = volume_of(&shape.segment);
        let told = Notice::Replica { replica, shape: Box::new(shape.clone()), gone };
        let Some(v) = self.volumes.get_mut(&no) else { panic!("shard {shard} tells of a volume that was never made: {told:?}") };
        assert_eq!(v.shard, shard, "volume {no} is of another store: {told:?}");
        if gone {
            assert!(v.doomed, "volume {no} is gone, and nobody ordered it: {told:?}");
            v.replica = None;
            self.shards[shard].replicas.remove(&replica);
            return;
        }
        if let Some(other) = self.shards[shard].replicas.insert(replica, no) {
            assert_eq!(other, no, "replica {replica:?} is two volumes");
        }
        v.replica = Some(replica);
        assert!(
            v.number.is_none_or(|no| no == replica) || v.doomed || !v.created,
            "volume {no} was replica {:?} and is {replica:?}",
            v.number
        );
        v.number = Some(replica);
        if v.doomed {
            // It came back because its deletion was cut off: it is deleted again.
            if v.pending.is_none() {
                assert!(!v.created || self.shards[shard].clouded, "volume {no} is back after its deletion was acknowledged");
            }
            return;
        }
        if v.shape.blocks != shape.blocks {
            match v.pending {
                Some(Pending::Resize { blocks, .. }) if blocks == shape.blocks => {
                    v.shape.blocks = blocks;
                    self.oracle.resize(no, blocks);
                }
                pending => panic!("volume {no} has {} blocks, {} were acknowledged, {pending:?} is pending", shape.blocks, v.shape.blocks),
            }
        }
        assert_eq!(v.shape, *shape, "volume {no} comes back as another");
    }
}
