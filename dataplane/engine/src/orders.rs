//! Orders that change replicas: proposed one at a time, applied like any op; and zeroing, which they share with hosts.

use crate::config::Stage;
use crate::index::{GroupKey, Version};
use crate::map::{Known, PageKey, Replica};
use crate::port::*;
use crate::store::Store;
use crate::write::{Proposed, What};
use penstock_wire::directory::{REPLICA_NO_LIMIT, REPLICAS_MAX};
use penstock_wire::page::EXTENTS_PER_PAGE;
use penstock_wire::{EXTENT_BLOCKS, Index as RaftIndex, ReplicaShape, Seq, Term, VOLUME_BLOCKS_MAX};
use rustc_hash::FxHashMap;

const PAGE_BLOCKS: u64 = EXTENTS_PER_PAGE as u64 * EXTENT_BLOCKS;

impl Store {
    /// Proposes the next order, when none is out.
    pub(crate) fn settle_orders(&mut self, fx: &mut Effects) {
        while self.order_out.is_none() && self.stage == Stage::Serving {
            let Some(pending) = self.orders.pop_front() else { return };
            let id = pending.id;
            if let Some(result) = self.begin_order(id, pending.order) {
                fx.list.push(Effect::OrderDone { id, result });
            }
        }
    }

    /// Proposes an order, or answers it at once.
    fn begin_order(&mut self, id: OrderId, order: Order) -> Option<Result<(), OrderError>> {
        let (replica, block, what) = match order {
            Order::Create(shape) => {
                if shape.check().is_err() {
                    return Some(Err(OrderError::Invalid("size, logical block or name of the volume is out of its limits")));
                }
                if let Some(no) = self.map.by_segment(shape.segment) {
                    let stands = &self.map.get(no).expect("a segment's replica stands").shape;
                    // A resize since then is not a conflict: the same order may come again long after.
                    let same = ReplicaShape { blocks: stands.blocks, name: stands.name.clone(), ..(*shape).clone() } == *stands;
                    return Some(if same { Ok(()) } else { Err(OrderError::Conflict(Box::new(stands.clone()))) });
                }
                if self.map.iter().count() >= REPLICAS_MAX || self.map.next_no() >= REPLICA_NO_LIMIT {
                    return Some(Err(OrderError::NoSpace));
                }
                (ReplicaNo(self.map.next_no()), 0, What::Create(shape))
            }
            Order::Delete { segment } => match self.map.by_segment(segment) {
                None => return Some(Ok(())),
                Some(no) => (no, 0, What::Delete),
            },
            Order::Resize { segment, blocks } => {
                let Some(no) = self.map.by_segment(segment) else { return Some(Err(OrderError::NoSuchSegment)) };
                if blocks == 0 || blocks > VOLUME_BLOCKS_MAX {
                    return Some(Err(OrderError::Invalid("a volume has 1 block to 256 TiB")));
                }
                let replica = self.map.get_mut(no).expect("a segment's replica stands");
                // Hosts lose the tail now, so that no write to it is proposed behind the resize.
                replica.limit_blocks = replica.limit_blocks.min(blocks);
                (no, blocks, What::Resize)
            }
            Order::CreateMember { .. } => return Some(Err(OrderError::Invalid("groups of several replicas are not served yet"))),
            Order::Change { .. } | Order::Transfer { .. } => return Some(Err(OrderError::NotLeader(None))),
            Order::Drain | Order::ScrubStart | Order::ScrubStop | Order::Stop => unreachable!("not an order for the log"),
        };
        self.order_out = Some(id);
        self.host.ready.push_back(Proposed { job: None, io: None, order: Some(id), replica, block, blocks: 0, what, index: RaftIndex(0) });
        None
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
            pages: FxHashMap::default(),
            allocated: 0,
            undrained: 0,
            member: None,
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
        }
    }

    pub(crate) fn apply_resize(&mut self, no: ReplicaNo, blocks: u64, seq: Seq, index: u64, fx: &mut Effects) {
        self.resize_replica(no, blocks, seq, index);
        if let Some(replica) = self.map.live(no) {
            fx.list.push(Effect::Notice(Notice::Replica { replica: no, shape: Box::new(replica.shape.clone()), gone: false }));
        }
    }

    /// What lies beyond the new size reads as zeros for good. Whatever the size was: recovery may redo a resize over a
    /// checkpoint that knows it already.
    pub(crate) fn resize_replica(&mut self, no: ReplicaNo, blocks: u64, seq: Seq, index: u64) {
        let Some(replica) = self.map.get_mut(no).filter(|replica| !replica.deleting) else { return };
        replica.shape.blocks = blocks;
        replica.limit_blocks = blocks;
        self.zero_what_is_there(no, blocks, u64::MAX, seq, index);
    }

    /// Zeroes `block..end` by what the map and the index hold of it, however long it is.
    fn zero_what_is_there(&mut self, no: ReplicaNo, block: u64, end: u64, seq: Seq, index: u64) {
        let Some(replica) = self.map.live(no) else { return };
        let mut pages: Vec<u64> = replica.pages.keys().map(|page_no| u64::from(*page_no)).collect();
        pages.extend(
            self.index
                .iter()
                .filter(|group| group.key.replica == no)
                .map(|group| u64::from(group.key.extent) * EXTENT_BLOCKS / PAGE_BLOCKS),
        );
        pages.retain(|page_no| (page_no + 1) * PAGE_BLOCKS > block && page_no * PAGE_BLOCKS < end);
        pages.sort_unstable();
        pages.dedup();
        for page_no in pages {
            let first = (page_no * PAGE_BLOCKS).max(block);
            self.zero_in_page(no, first, ((page_no + 1) * PAGE_BLOCKS).min(end), seq, index);
        }
    }

    /// Zeroes what exists of a range, in the index; the drain gives the extents back. Costs by what is there, not by length.
    pub(crate) fn apply_zero(&mut self, no: ReplicaNo, block: u64, blocks: u64, seq: Seq, index: u64) {
        let Some(replica) = self.map.live(no).filter(|_| blocks > 0) else { return };
        let end = block + blocks;
        if blocks / PAGE_BLOCKS > (replica.pages.len() + self.index.len()) as u64 {
            self.zero_what_is_there(no, block, end, seq, index);
            return;
        }
        let mut at = block;
        while at < end {
            let page_end = ((at / PAGE_BLOCKS + 1) * PAGE_BLOCKS).min(end);
            let key = PageKey { replica: no, page_no: (at / PAGE_BLOCKS) as u32 };
            if self.map.page(key).is_some() || self.index.len() > 0 {
                self.zero_in_page(no, at, page_end, seq, index);
            }
            at = page_end;
        }
    }

    fn zero_in_page(&mut self, no: ReplicaNo, block: u64, end: u64, seq: Seq, index: u64) {
        let mut at = block;
        while at < end {
            let extent = (at / EXTENT_BLOCKS) as u32;
            let extent_end = (u64::from(extent) + 1) * EXTENT_BLOCKS;
            let stop = extent_end.min(end);
            let there = self.index.find(GroupKey { replica: no, extent }).is_some()
                || match self.map.known(no, extent) {
                    Known::Nothing => false,
                    Known::NotLoaded => true,
                    Known::Entry(entry) => !entry.is_empty(),
                };
            if there {
                for block in at..stop {
                    self.put_version(no, block, Version::Zero, seq, index);
                }
            }
            at = stop;
        }
    }
}
