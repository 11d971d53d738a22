//! The store: all its state in one struct, and the dispatch of events to the files that know what to do.
//!
//! Adding an event: an arm in [`Store::apply`], a method in the file whose state it changes, a counter in `config`.

use crate::alloc::{ExtentNo, Space};
use crate::checkpoint::Checkpoint;
use crate::config::{Barrier, Canary, Counters, FenceReason, RecoveryReport, ReplicaUsage, ReplicaView, Stage, StoreConfig, StoreView};
use crate::drain::Drain;
use crate::epoch::Epochs;
use crate::groups::Groups;
use crate::host::{HostSide, JobId};
use crate::index::Index;
use crate::map::{Map, PageKey, Replica};
use crate::port::*;
use crate::recover::Recovery;
use crate::scrub::Scrub;
use crate::stream::Stream;
use penstock_wire::page::{PageName, UNALLOCATED};
use penstock_wire::{BlockAddr, EXTENT_BLOCKS, Seq};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Between two slices of scrub.
const SCRUB_MS: u64 = 10;

/// Who waits for a device command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    Batch(Seq),
    LogFlush,
    /// One run of a host command's chunk.
    Job(JobId),
    Page {
        key: PageKey,
        buf: BufId,
    },
    DrainRead {
        item: u32,
    },
    DrainWrite {
        item: u32,
    },
    Merge {
        join: u32,
    },
    Checkpoint,
    Recovery,
    Scrub {
        item: u32,
    },
    /// Payload of a word that waits for it.
    Send(u32),
    /// An extent for a member that is rebuilt.
    Copy(u32),
    /// A block that another member asked for.
    Fetch(u32),
}

/// Who waits for a map page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PageWaiter {
    Job(JobId),
    Drain,
}

/// An order that is under way.
#[derive(Debug)]
pub(crate) struct PendingOrder {
    pub id: OrderId,
    pub order: Order,
}

/// One core's share of one drive. See the crate's documentation.
#[derive(Debug)]
pub struct Store {
    pub(crate) config: StoreConfig,
    pub(crate) stage: Stage,
    pub(crate) now: Millis,
    pub(crate) counters: Counters,
    pub(crate) epochs: Epochs,
    pub(crate) space: Space,
    pub(crate) map: Map,
    pub(crate) index: Index,
    pub(crate) stream: Stream,
    pub(crate) host: HostSide,
    pub(crate) groups: Groups,
    pub(crate) drain: Drain,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) scrub: Scrub,
    pub(crate) recovery: Option<Box<Recovery>>,
    pub(crate) report: RecoveryReport,
    /// Orders that change replicas go through the log one at a time.
    pub(crate) orders: VecDeque<PendingOrder>,
    pub(crate) order_out: Option<OrderId>,
    /// Orders that wait until everything up to a batch is drained and checkpointed.
    pub(crate) drain_orders: Vec<(OrderId, Seq)>,
    pub(crate) stop_order: Option<OrderId>,
    pub(crate) page_waiters: FxHashMap<PageKey, Vec<PageWaiter>>,
    /// Page loads that found no memory.
    pub(crate) pages_starved: VecDeque<PageKey>,
    owners: Vec<Option<Owner>>,
    free_ids: Vec<u32>,
    disk_out: u64,
}

impl Store {
    /// A store that opens with its first `settle`.
    pub fn new(config: StoreConfig) -> Self {
        let geometry = config.geometry;
        let forget = cfg!(feature = "canary") && config.canary == Some(Canary::ForgetFence);
        let mut store = Self {
            stage: Stage::Opening,
            now: Millis(0),
            counters: Counters::default(),
            epochs: Epochs::default(),
            space: Space::new(geometry.extents),
            map: Map::default(),
            index: Index::default(),
            stream: Stream::new(&geometry),
            host: HostSide::default(),
            groups: Groups::default(),
            drain: Drain::default(),
            checkpoint: Checkpoint::default(),
            scrub: Scrub::default(),
            recovery: Some(Box::default()),
            report: RecoveryReport::default(),
            orders: VecDeque::new(),
            order_out: None,
            drain_orders: Vec::new(),
            stop_order: None,
            page_waiters: FxHashMap::default(),
            pages_starved: VecDeque::new(),
            owners: vec![None],
            free_ids: Vec::new(),
            disk_out: 0,
            config,
        };
        if forget {
            store.config.fenced = None;
        }
        store
    }

    #[inline]
    pub(crate) fn canary(&self, canary: Canary) -> bool {
        cfg!(feature = "canary") && self.config.canary == Some(canary)
    }

    pub(crate) fn barrier(&self) -> Barrier {
        self.config.barrier
    }

    /// Takes in one fact. Any number of them make a turn; [`Self::settle`] ends it.
    pub fn apply<M: Memory>(&mut self, event: Event, mem: &mut M, fx: &mut Effects) {
        match event {
            Event::Host { io, replica, host, op } => self.on_host(io, replica, host, op, mem, fx),
            Event::DiskDone { id, ok } => self.on_disk_done(id, ok, mem, fx),
            Event::Order { id, order } => self.on_order(id, order, mem, fx),
            // Recovery goes on, to serve what can be read.
            Event::Fence(reason) if self.stage == Stage::Opening => {
                self.config.fenced.get_or_insert(reason);
            }
            Event::Fence(reason) => self.fence(reason, mem, fx),
            Event::Tick { now } => self.on_tick(now, mem, fx),
            Event::Peer { from, word, payload } => self.on_peer(from, *word, payload, mem, fx),
            Event::PeerUp { node, incarnation } => self.on_peer_up(node, incarnation),
            Event::PeerDown { node } => self.on_peer_down(node),
            Event::PeerLost { node } => self.on_peer_lost(node),
        }
    }

    /// Ends a turn: what gathered goes out, background work gets its slice.
    pub fn settle<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        self.free_sent(mem);
        match self.stage {
            Stage::Opening => self.settle_recovery(mem, fx),
            Stage::Serving | Stage::Stopping | Stage::Fenced(_) => {
                self.stream.settle_tail(&self.epochs);
                self.space.settle(&self.epochs);
                self.settle_pages(mem, fx);
                self.settle_orders(mem, fx);
                // Before the hosts, since what is applied makes room for their next chunks; and after them, for what they have ready.
                self.settle_groups(mem, fx);
                self.settle_host(mem, fx);
                self.settle_groups(mem, fx);
                self.settle_stream(mem, fx);
                self.settle_drain(mem, fx);
                self.settle_stop(fx);
            }
            Stage::Failed | Stage::Stopped => {}
        }
    }

    fn on_disk_done<M: Memory>(&mut self, id: DiskId, ok: bool, mem: &mut M, fx: &mut Effects) {
        let owner = self.owners[id.0 as usize].take().expect("a device command completes once");
        self.free_ids.push(id.0);
        self.disk_out -= 1;
        match owner {
            Owner::Batch(seq) => self.on_batch_written(seq, ok, mem, fx),
            Owner::LogFlush => self.on_log_flushed(ok, mem, fx),
            Owner::Job(job) => self.on_job_read(job, ok, mem, fx),
            Owner::Page { key, buf } => self.on_page_read(key, buf, ok, mem, fx),
            Owner::DrainRead { item } => self.on_drain_read(item, ok, mem, fx),
            Owner::DrainWrite { item } => self.on_drain_written(item, ok, mem, fx),
            Owner::Merge { join } => self.on_merge_done(join, ok, mem, fx),
            Owner::Checkpoint => self.on_checkpoint_done(ok, mem, fx),
            Owner::Recovery => self.on_recovery_done(ok, mem, fx),
            Owner::Scrub { item } => self.on_scrub_read(item, ok, mem, fx),
            Owner::Send(id) => self.on_send_read(id, ok, mem, fx),
            Owner::Copy(id) => self.on_copy_read(id, ok, mem, fx),
            Owner::Fetch(id) => self.on_fetch_read(id, ok, mem, fx),
        }
    }

    /// Sends one device command out.
    pub(crate) fn submit(&mut self, fx: &mut Effects, kind: DiskKind, at: BlockAddr, parts: &[Part], owner: Owner) -> DiskId {
        let id = match self.free_ids.pop() {
            Some(id) => id,
            None => {
                self.owners.push(None);
                self.owners.len() as u32 - 1
            }
        };
        self.owners[id as usize] = Some(owner);
        self.disk_out += 1;
        let first_part = fx.parts.len() as u32;
        fx.parts.extend_from_slice(parts);
        let blocks = parts.iter().map(|part| part.blocks()).sum();
        match kind {
            DiskKind::Read => self.counters.disk_reads += 1,
            DiskKind::Write => self.counters.disk_writes += 1,
            DiskKind::Flush => self.counters.disk_flushes += 1,
        }
        fx.list.push(Effect::Disk(DiskOp { id: DiskId(id), kind, at, blocks, first_part, part_count: parts.len() as u32 }));
        DiskId(id)
    }

    pub(crate) fn flush(&mut self, fx: &mut Effects, owner: Owner) {
        self.submit(fx, DiskKind::Flush, BlockAddr(0), &[], owner);
    }

    /// Where a block of the ring lies in the store.
    pub(crate) fn ring_block(&self, at: u32) -> BlockAddr {
        self.config.geometry.ring_start.plus(u64::from(at))
    }

    /// Where a block of an extent lies in the store.
    pub(crate) fn extent_block(&self, extent: u32, block: u64) -> BlockAddr {
        self.config.geometry.extents_start.plus(u64::from(extent) * EXTENT_BLOCKS + block)
    }

    /// Takes no more writes: a write or barrier failed and what the drive holds is unknown.
    pub(crate) fn fence<M: Memory>(&mut self, reason: FenceReason, mem: &mut M, fx: &mut Effects) {
        if matches!(self.stage, Stage::Fenced(_) | Stage::Stopped | Stage::Failed) {
            return;
        }
        self.stage = Stage::Fenced(reason);
        fx.list.push(Effect::Notice(Notice::Fenced(reason)));
        self.stop_groups(mem, fx);
        self.fail_writes(Status::Fenced, mem, fx);
        for pending in std::mem::take(&mut self.orders) {
            fx.list.push(Effect::OrderDone { id: pending.id, result: Err(OrderError::Fenced) });
        }
        // The order that is in the log is answered when the device gives its batch back, if it was not just now.
        for (id, _) in std::mem::take(&mut self.drain_orders) {
            fx.list.push(Effect::OrderDone { id, result: Err(OrderError::Fenced) });
        }
    }

    pub(crate) fn fenced(&self) -> bool {
        matches!(self.stage, Stage::Fenced(_))
    }

    fn on_order<M: Memory>(&mut self, id: OrderId, order: Order, mem: &mut M, fx: &mut Effects) {
        let mut done = |result| fx.list.push(Effect::OrderDone { id, result });
        match (self.stage, &order) {
            (Stage::Serving, Order::Drain) => self.drain_orders.push((id, self.stream.last_sent())),
            (Stage::Serving | Stage::Fenced(_), Order::ScrubStart) => {
                self.scrub.start();
                done(Ok(()));
            }
            (Stage::Serving | Stage::Fenced(_), Order::ScrubStop) => {
                self.scrub.stop();
                done(Ok(()));
            }
            (Stage::Serving | Stage::Fenced(_), Order::Stop) => self.begin_stop(id, mem, fx),
            (Stage::Opening | Stage::Failed, Order::Stop) => {
                self.stop_order = Some(id);
                if self.stage == Stage::Failed || self.recovery.is_none() {
                    self.stage = Stage::Stopped;
                    self.stop_order = None;
                    done(Ok(()));
                    fx.list.push(Effect::Notice(Notice::Stopped));
                }
            }
            (Stage::Serving, _) => self.orders.push_back(PendingOrder { id, order }),
            (Stage::Fenced(_), _) => done(Err(OrderError::Fenced)),
            (Stage::Stopping | Stage::Stopped, Order::Stop) => done(Ok(())),
            (Stage::Stopping | Stage::Stopped, _) => done(Err(OrderError::Stopping)),
            (Stage::Opening | Stage::Failed, _) => done(Err(OrderError::NotServing)),
        }
    }

    pub(crate) fn begin_stop<M: Memory>(&mut self, id: OrderId, mem: &mut M, fx: &mut Effects) {
        self.stop_order = Some(id);
        self.scrub.stop();
        if self.stage == Stage::Serving {
            self.stage = Stage::Stopping;
            self.freeze_groups(mem, fx);
            self.refuse_held(Status::NotReady, mem, fx);
        }
    }

    /// Stopped once nothing is out and everything is drained and checkpointed; a fenced store just waits for the device.
    fn settle_stop(&mut self, fx: &mut Effects) {
        let Some(id) = self.stop_order else { return };
        let done = match self.stage {
            Stage::Stopping => {
                let rests = self.host.is_idle() && self.stream.is_idle() && self.groups.is_flushed();
                rests && self.drain_is_done() && self.disk_out == 0
            }
            Stage::Fenced(_) => self.disk_out == 0,
            _ => false,
        };
        if done {
            self.stop_order = None;
            self.stage = Stage::Stopped;
            for pending in std::mem::take(&mut self.orders) {
                fx.list.push(Effect::OrderDone { id: pending.id, result: Err(OrderError::Stopping) });
            }
            fx.list.push(Effect::OrderDone { id, result: Ok(()) });
            fx.list.push(Effect::Notice(Notice::Stopped));
        }
    }

    fn on_tick<M: Memory>(&mut self, now: Millis, mem: &mut M, fx: &mut Effects) {
        let before = self.now;
        self.now = self.now.max(now);
        // The clock comes with every turn in which it has moved; scrub's budget is for 10 ms.
        let is_slice = self.now.0 / SCRUB_MS != before.0 / SCRUB_MS;
        if is_slice && matches!(self.stage, Stage::Serving | Stage::Fenced(_)) {
            self.scrub_slice(mem, fx);
        }
        if self.stage == Stage::Serving {
            self.seal_if_idle(mem, fx);
            self.tick_groups();
            self.drain.look_at_log = !self.groups.list.is_empty();
            self.ask_in_doubt(fx);
            self.tell_openings(fx);
        }
    }

    pub(crate) fn page_name(&self, key: PageKey) -> PageName {
        PageName { incarnation: self.config.incarnation, replica: key.layer.replica.0, layer: key.layer.layer.0, page_no: key.page_no }
    }

    /// Asks for a page that is not loaded; the waiter is called when it is.
    pub(crate) fn want_page<M: Memory>(&mut self, key: PageKey, waiter: PageWaiter, mem: &mut M, fx: &mut Effects) {
        self.page_waiters.entry(key).or_default().push(waiter);
        self.load_page(key, mem, fx);
    }

    pub(crate) fn load_page<M: Memory>(&mut self, key: PageKey, mem: &mut M, fx: &mut Effects) {
        let Some(state) = self.map.page_mut(key) else { return };
        if state.loading {
            return;
        }
        let (slot, _) = state.on_disk.expect("a page that is not cached is on the drive");
        state.loading = true;
        let Some(buf) = mem.alloc(1) else {
            self.pages_starved.push_back(key);
            return;
        };
        self.counters.page_loads += 1;
        let at = self.config.geometry.extents_start.plus(u64::from(slot.0));
        self.submit(fx, DiskKind::Read, at, &[Part::Buf { buf, first: 0, blocks: 1 }], Owner::Page { key, buf });
    }

    fn settle_pages<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        for _ in 0..self.pages_starved.len() {
            let key = self.pages_starved.pop_front().expect("counted");
            match self.map.page_mut(key) {
                Some(state) => state.loading = false,
                None => continue,
            }
            self.load_page(key, mem, fx);
        }
    }

    fn on_page_read<M: Memory>(&mut self, key: PageKey, buf: BufId, ok: bool, mem: &mut M, fx: &mut Effects) {
        let name = self.page_name(key);
        let expected = self.map.page(key).and_then(|state| state.on_disk).map(|(_, crc)| crc);
        let bytes = mem.bytes(buf);
        let page = (ok && Some(penstock_wire::crc32c(bytes)) == expected)
            .then(|| penstock_wire::page::decode(bytes, &name, self.config.geometry.extents).ok())
            .flatten()
            // A page that names what another uses is no page: believed, it would have one volume written over another.
            .filter(|page| {
                let places = page.extents.iter().map(|entry| entry.place).filter(|place| *place != UNALLOCATED);
                self.map.page(key).is_none_or(|state| state.cached.is_some()) || self.space.claim_all(places.map(ExtentNo))
            });
        mem.free(buf);
        if let Some(state) = self.map.page_mut(key)
            && page.is_none()
            && !std::mem::replace(&mut state.misread, true)
        {
            state.loading = false;
            self.load_page(key, mem, fx);
            return;
        }
        if page.is_none() && self.map.page(key).is_some() {
            let at = self
                .map
                .page(key)
                .and_then(|state| state.on_disk)
                .map_or(BlockAddr(0), |(slot, _)| self.extent_block(0, u64::from(slot.0)));
            let block = u64::from(key.page_no) * penstock_wire::page::EXTENTS_PER_PAGE as u64 * EXTENT_BLOCKS;
            self.found_bad(key.layer.replica, block, at, fx);
        }
        self.map.loaded(key, page);
        self.unpromise_placed(key);
        self.wake_page_waiters(key, mem, fx);
    }

    pub(crate) fn wake_page_waiters<M: Memory>(&mut self, key: PageKey, mem: &mut M, fx: &mut Effects) {
        for waiter in self.page_waiters.remove(&key).unwrap_or_default() {
            match waiter {
                PageWaiter::Job(job) => self.resume_job(job, mem, fx),
                PageWaiter::Drain => self.on_drain_page(mem, fx),
            }
        }
    }

    /// Number and shape of every replica.
    pub fn replicas(&self) -> Vec<ReplicaView> {
        let view = |replica: &Replica| ReplicaView {
            no: replica.no,
            shape: replica.shape.clone(),
            deleting: replica.deleting,
            usage: replica.usage(),
        };
        self.map.iter().map(view).collect()
    }

    /// What a replica takes of the store, from counters; nothing for one that does not stand.
    pub fn usage(&self, no: ReplicaNo) -> ReplicaUsage {
        self.map.get(no).map(Replica::usage).unwrap_or_default()
    }

    /// A live replica's number by its segment.
    pub fn replica_of(&self, segment: penstock_wire::SegmentId) -> Option<ReplicaNo> {
        self.map.by_segment(segment)
    }

    /// What the store shows of itself. Cheap: no walk of any structure.
    pub fn view(&self) -> StoreView {
        let held = self.host.held();
        StoreView {
            stage: self.stage,
            ring_blocks: self.stream.ring_blocks(),
            ring_used: self.stream.used(),
            undrained_extents: self.index.len() as u64,
            extents: self.space.extents(),
            extents_free: self.space.free(),
            pages_cached: self.map.cached(),
            recovery: self.report,
            counters: self.counters,
            scrub_permille: self.scrub.permille(&self.map),
            held,
            disk_out: self.disk_out,
            quiescent: self.is_quiescent(),
        }
    }

    /// Nothing is out, held, waiting or worth doing in the background: no tick is needed until the next event.
    pub fn is_quiescent(&self) -> bool {
        self.disk_out == 0
            && self.host.held() == 0
            && self.host.ready.is_empty()
            && self.stage != Stage::Opening
            && self.stage != Stage::Stopping
            && (self.stage != Stage::Serving || (self.drain_is_done() && self.stream.is_sealed() && self.stream.is_idle()))
            && !self.scrub.is_on()
            && self.groups.are_idle()
            && self.orders.is_empty()
            && self.drain_orders.is_empty()
    }

    /// Why the store is fenced, if it is.
    pub fn fenced_reason(&self) -> Option<FenceReason> {
        match self.stage {
            Stage::Fenced(reason) => Some(reason),
            _ => None,
        }
    }
}
