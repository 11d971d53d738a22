//! Orders that change replicas: proposed one at a time, applied like any op.

use crate::config::{Canary, Stage};
use crate::host::{Birth, Cloned, Proposed, What};
use crate::map::{Layer, LayerKey, Replica};
use crate::member::Member;
use crate::port::*;
use crate::replica::{Ballot, Recovered, Stop};
use crate::store::Store;
use penstock_wire::directory::{REPLICA_NO_LIMIT, REPLICAS_MAX};
use penstock_wire::peer::{MemberNo, Members};
use penstock_wire::{Index as RaftIndex, ReplicaShape, SegmentId, Seq, SnapshotId, Term, VOLUME_BLOCKS_MAX};

/// The entry after which a member's log begins, and its term.
pub(crate) const NOTHING: (RaftIndex, Term) = (RaftIndex(0), Term(0));
/// Of a clone's members: the entry that stands for what the snapshot holds. No log has it, so who was not made with that content is installed and rebuilt.
pub(crate) const SNAPSHOT_ITSELF: (RaftIndex, Term) = (RaftIndex(1), Term(1));

impl Store {
    /// Proposes the next order, when none is out.
    pub(crate) fn settle_orders<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        while self.order_out.is_none() && self.stage == Stage::Serving {
            let Some(pending) = self.orders.pop_front() else { return };
            let id = pending.id;
            if let Some(result) = self.begin_order(id, pending.order, mem, fx) {
                fx.list.push(Effect::OrderDone { id, result });
            }
        }
    }

    /// Proposes an order, or answers it at once.
    fn begin_order<M: Memory>(&mut self, id: OrderId, order: Order, mem: &mut M, fx: &mut Effects) -> Option<Result<(), OrderError>> {
        let mut promises = 0;
        let (replica, block, what) = match order {
            Order::Create(shape) => match self.may_create(&shape, None) {
                Some(result) => return Some(result),
                None => (ReplicaNo(self.map.next_no()), 0, What::Create(shape)),
            },
            Order::CreateMember { shape, members } => match self.may_create(&shape, Some(&members)) {
                Some(result) => return Some(result),
                None => (ReplicaNo(self.map.next_no()), 0, What::CreateMember(Box::new(Birth { shape: *shape, members: *members }))),
            },
            Order::Clone { shape, members, origin, snapshot } => match self.may_clone(&shape, members.as_deref(), origin, snapshot) {
                Err(result) => return Some(result),
                Ok(on) => {
                    self.map.held = on;
                    let members = members.map(|members| *members);
                    let clone = Cloned { shape: *shape, members, origin, snapshot, on };
                    (ReplicaNo(self.map.next_no()), 0, What::Clone(Box::new(clone)))
                }
            },
            Order::Delete { segment } => match self.map.by_segment(segment) {
                None => return Some(Ok(())),
                Some(no) if self.map.clone_on(no, None).is_some() => return Some(Err(self.clone_stands(no, None))),
                Some(no) => {
                    // Its log stays until the delete is durable: a crash before that brings the member back.
                    self.stop_group(no, Stop::Quarantined("its replica is being deleted".into()), mem, fx);
                    (no, 0, What::Delete)
                }
            },
            Order::Resize { segment, blocks } => {
                let Some(no) = self.map.by_segment(segment) else { return Some(Err(OrderError::NoSuchSegment)) };
                if blocks == 0 || blocks > VOLUME_BLOCKS_MAX {
                    return Some(Err(OrderError::Invalid("a volume has 1 block to 256 TiB")));
                }
                if !self.serves(no) {
                    return Some(Err(OrderError::NotLeader(self.leader_of(no))));
                }
                match self.promise_zeros(no, blocks, u64::MAX) {
                    Some(promised) => promises = promised,
                    None => return Some(Err(OrderError::NoSpace)),
                }
                let replica = self.map.get_mut(no).expect("a segment's replica stands");
                // Hosts lose the tail now, so that no write to it is proposed behind the resize.
                replica.limit_blocks = replica.limit_blocks.min(blocks);
                (no, blocks, What::Resize)
            }
            Order::Snapshot { segment, snapshot } => match self.may_snapshot(segment, &snapshot) {
                Ok(no) => {
                    let replica = self.map.get_mut(no).expect("a segment's replica stands");
                    replica.freezing += 1;
                    (no, replica.shape.blocks, What::Snapshot(snapshot))
                }
                Err(result) => return Some(result),
            },
            Order::Unsnapshot { segment, snapshot } => {
                let Some(no) = self.map.by_segment(segment) else { return Some(Err(OrderError::NoSuchSegment)) };
                if !self.serves(no) {
                    return Some(Err(OrderError::NotLeader(self.leader_of(no))));
                }
                // Of a group the others decide whether it is gone: this member may not know yet who leads now, and what was taken there.
                if self.map.get(no).is_none_or(|replica| replica.member.is_none() && replica.snapshot(snapshot).is_none()) {
                    return Some(Ok(()));
                }
                let layer = self.map.get(no).and_then(|replica| replica.snapshot(snapshot)).map(|frozen| frozen.layer.no);
                let stands = layer.is_some_and(|layer| self.map.clone_on(no, Some(layer)).is_some());
                if stands && !self.canary(Canary::RemoveUnderClone) {
                    return Some(Err(self.clone_stands(no, layer)));
                }
                (no, 0, What::Unsnapshot(snapshot))
            }
            Order::Change { segment, members } => return self.begin_change(id, segment, &members),
            Order::Recover { segment, regardless } => return self.begin_force(id, segment, regardless, fx),
            Order::Transfer { segment, to } => return Some(self.begin_transfer(segment, to)),
            Order::Drain | Order::ScrubStart | Order::ScrubStop | Order::Stop => unreachable!("not an order for the log"),
        };
        self.order_out = Some(id);
        self.make_ready(Proposed { job: None, io: None, order: Some(id), replica, block, blocks: 0, what, promises, index: RaftIndex(0) });
        None
    }

    /// `None`: it may, and does not stand yet. Otherwise the order's answer.
    fn may_create(&self, shape: &ReplicaShape, members: Option<&Members>) -> Option<Result<(), OrderError>> {
        if shape.check().is_err() {
            return Some(Err(OrderError::Invalid("size, logical block or name of the volume is out of its limits")));
        }
        if members.is_some_and(|members| members.check().is_err() || self.own_number(shape, members).is_none()) {
            return Some(Err(OrderError::Invalid("the members are no group, or none of them is this replica on this node")));
        }
        if let Some(no) = self.map.by_segment(shape.segment) {
            let replica = self.map.get(no).expect("a segment's replica stands");
            let stands = &replica.shape;
            // A resize since then is not a conflict: the same order may come again long after.
            let same = ReplicaShape { blocks: stands.blocks, name: stands.name.clone(), ..shape.clone() } == *stands;
            let same = same && replica.member.is_some() == members.is_some();
            return Some(if same { Ok(()) } else { Err(OrderError::Conflict(Box::new(stands.clone()))) });
        }
        let full = self.map.iter().count() >= REPLICAS_MAX || self.map.next_no() >= REPLICA_NO_LIMIT;
        full.then_some(Err(OrderError::NoSpace))
    }

    /// The same of a clone: what it will stand on.
    fn may_clone(
        &mut self,
        shape: &ReplicaShape,
        members: Option<&Members>,
        origin: SegmentId,
        snapshot: SnapshotId,
    ) -> Result<Option<LayerKey>, Result<(), OrderError>> {
        let me = members.and_then(|members| Some((members, self.own_number(shape, members)?)));
        let has_content = me.is_none_or(|(members, me)| members.has_content(me));
        if let Some(answer) = self.may_create(shape, members) {
            let stands = self.map.by_segment(shape.segment).and_then(|no| self.map.get(no));
            let other = stands.filter(|stands| has_content && answer.is_ok() && !self.map.stands_on(stands, origin, snapshot));
            return Err(other.map_or(answer, |stands| Err(OrderError::Conflict(Box::new(stands.shape.clone())))));
        }
        if !has_content {
            return Ok(None);
        }
        let no = self.map.by_segment(origin).ok_or(Err(OrderError::NoSuchSegment))?;
        let of = self.map.get(no).expect("a segment's replica stands");
        let member = of.member.as_deref();
        if member.is_some_and(|member| !member.has_content()) {
            return Err(Err(OrderError::Invalid("what is here of the origin is a member that keeps the log alone")));
        }
        if member.is_some() && !self.may_feed(no) {
            return Err(Err(OrderError::NotYet("the member of the origin that is here is not whole, or is not sure of it yet")));
        }
        let frozen = of.snapshot(snapshot).ok_or(Err(OrderError::NoSuchSnapshot))?;
        if shape.blocks < frozen.blocks || shape.logical_block != of.shape.logical_block {
            return Err(Err(OrderError::Invalid("a clone has the logical block of its origin, and is at least as large as the snapshot")));
        }
        // After a restart the group says how much of its log is applied: a clone must not have to wait for that, or read less until then.
        if member.is_some_and(|member| member.saved < frozen.at) && !self.canary(Canary::CloneUnsaved) {
            (self.drain.unsaved, self.drain.for_clone) = (true, true);
            return Err(Err(OrderError::NotYet("what the snapshot holds is in the log alone, and is being drained")));
        }
        Ok(Some(LayerKey { replica: no, layer: frozen.layer.no }))
    }

    /// Why a replica, or the snapshot that froze a layer of it, cannot go.
    fn clone_stands(&self, no: ReplicaNo, layer: Option<LayerNo>) -> OrderError {
        let clone = self.map.clone_on(no, layer).expect("just found");
        OrderError::CloneStands(clone.shape.name.clone(), clone.shape.volume)
    }

    /// The number of the member that is this replica.
    pub(crate) fn own_number(&self, shape: &ReplicaShape, members: &Members) -> Option<MemberNo> {
        let node = self.config.replication.node;
        members.list.iter().find(|member| member.replica == shape.replica && member.node == node).map(|member| member.no)
    }

    /// A member begins, with nothing in its log, which begins after an entry.
    pub(crate) fn apply_birth(
        &mut self,
        no: ReplicaNo,
        shape: &ReplicaShape,
        members: &Members,
        (start, start_term): (RaftIndex, Term),
        fx: &mut Effects,
    ) {
        self.apply_create(no, shape.clone(), fx);
        let me = self.own_number(shape, members).expect("checked when it was ordered");
        let ballot = Ballot { term: start_term, ..Ballot::default() };
        let (applied, applied_term, entries, floor) = (start, start_term, Vec::new(), None);
        let (members, committed) = (members.clone(), applied);
        let recovered = Recovered { ballot, applied, applied_term, start, start_term, members: members.clone(), entries, committed, floor };
        let stage = self.raise_group(no, me, recovered);
        let mut member = Member::new(me, stage, members);
        (member.applied_term, member.ballot, member.start, member.start_term) = (start_term, ballot, start, start_term);
        let replica = self.map.get_mut(no).expect("just made");
        (replica.term, replica.proposed, replica.applied) = (start_term, start, start);
        replica.member = Some(Box::new(member));
        self.enlist(no);
    }

    /// A clone begins, over what was held for it.
    pub(crate) fn apply_clone(&mut self, no: ReplicaNo, clone: &Cloned, fx: &mut Effects) {
        match &clone.members {
            None => self.apply_create(no, clone.shape.clone(), fx),
            Some(members) => self.apply_birth(no, &clone.shape, members, SNAPSHOT_ITSELF, fx),
        }
        self.map.get_mut(no).expect("just made").origin = clone.on;
        self.map.held = None;
    }

    pub(crate) fn apply_create(&mut self, no: ReplicaNo, shape: ReplicaShape, fx: &mut Effects) {
        fx.list.push(Effect::Notice(Notice::Replica { replica: no, shape: Box::new(shape.clone()), gone: false }));
        self.add_replica(no, shape);
    }

    pub(crate) fn add_replica(&mut self, no: ReplicaNo, shape: ReplicaShape) {
        self.map.add(Box::new(Replica {
            no,
            limit_blocks: shape.blocks,
            shape,
            deleting: false,
            term: Term(1),
            proposed: RaftIndex(1),
            applied: RaftIndex(1),
            live: Layer::empty(LayerNo(0)),
            frozen: Vec::new(),
            since: RaftIndex(0),
            origin: None,
            freezing: 0,
            undrained: 0,
            member: None,
            guard: None,
        }));
    }

    pub(crate) fn apply_delete(&mut self, no: ReplicaNo, fx: &mut Effects) {
        if let Some(replica) = self.map.live(no) {
            fx.list.push(Effect::Notice(Notice::Replica { replica: no, shape: Box::new(replica.shape.clone()), gone: true }));
        }
        self.delete_replica(no);
    }

    /// Its blocks leave the index and its extents come back as the drain gets to them.
    pub(crate) fn delete_replica(&mut self, no: ReplicaNo) {
        if self.map.live(no).is_some() {
            self.map.mark_deleting(no);
            self.drain.deletions += 1;
            self.count_merges();
        }
    }

    pub(crate) fn apply_resize(&mut self, no: ReplicaNo, blocks: u64, seq: Seq, index: u64, promises: &mut u32, fx: &mut Effects) {
        self.resize_replica(no, blocks, seq, index, promises);
        if let Some(replica) = self.map.live(no) {
            fx.list.push(Effect::Notice(Notice::Replica { replica: no, shape: Box::new(replica.shape.clone()), gone: false }));
        }
    }

    /// What lies beyond the new size reads as zeros for good. Whatever the size was: recovery may redo a resize over a
    /// checkpoint that knows it already.
    pub(crate) fn resize_replica(&mut self, no: ReplicaNo, blocks: u64, seq: Seq, index: u64, promises: &mut u32) {
        let Some(replica) = self.map.get_mut(no).filter(|replica| !replica.deleting) else { return };
        replica.shape.blocks = blocks;
        replica.limit_blocks = blocks;
        self.zero_what_is_there(no, blocks, u64::MAX, seq, index, promises);
    }
}
