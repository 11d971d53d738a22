//! The drain: moves undrained blocks from the log to their extents, oldest first, and gives back what was deleted.
//!
//! What the log needs room for is its oldest part, so a round that pressure begins moves that part alone: what is younger stays where it may be
//! overwritten yet. One slice at a time: take groups from the queue, load their map pages, read their blocks from the log and verify them,
//! write the extents in place, then update map and index. A torn or lost extent write is redone from the log, which is kept
//! until a checkpoint covers it. Checkpoints run between slices, so the map stands still under them.

use crate::alloc::ExtentNo;
use crate::config::{Canary, FenceReason, Stage};
use crate::index::{GroupId, GroupKey, Slot, Version};
use crate::map::{Known, Layer, LayerKey, PageKey};
use crate::merge::DIRTIES;
use crate::port::*;
use crate::read::Place;
use crate::repair::Waiter;
use crate::store::{Owner, PageWaiter, Store};
use penstock_wire::page::{BlockState, UNALLOCATED};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Seq};

const BLOCKS: usize = EXTENT_BLOCKS as usize;
/// Groups that one slice looks at, at most: most may turn out to hold nothing old any more.
const LOOKS_MAX: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum DrainStage {
    #[default]
    Idle,
    /// Waits for map pages.
    Loading,
    /// Reads and writes are out.
    Moving,
}

/// One extent on its way.
#[derive(Debug)]
struct Item {
    group: GroupId,
    key: GroupKey,
    /// What of the group is moved, as it was when it was taken.
    slots: [Option<Slot>; BLOCKS],
    /// Entry up to which the extent then is, if nothing stays behind: else the log tells it still.
    changed: Option<u64>,
    buf: Option<BufId>,
    /// Its extent, once known.
    place: u32,
    out: u32,
    read_failed: bool,
    reread: bool,
    /// Blocks of a member's that are bad, and go to the extent as they are: their checksum is what other members are asked for.
    bad: u16,
    done: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Drain {
    pub stage: DrainStage,
    items: Vec<Item>,
    /// Items that are not done.
    left: u32,
    pages_out: u32,
    epoch: Option<crate::epoch::Epoch>,
    /// The drain goes on until all up to here is drained.
    round: Option<Seq>,
    /// Something was applied that no checkpoint covers.
    pub unsaved: bool,
    /// A clone waits until what it is to stand on is covered.
    pub for_clone: bool,
    /// A page of a deleted replica that is being loaded to give its extents back.
    reclaiming: Option<PageKey>,
    pub deletions: u32,
    /// A slice was begun since a chore had its turn.
    chore_is_due: bool,
    /// Layers of removed snapshots that are to be merged, and a page of one that is.
    pub merges: u32,
    pub merge: Option<crate::merge::Merge>,
    /// Extents that only the durable checkpoint refers to.
    pub freed: Vec<ExtentNo>,
    /// Time has passed since it was looked whether log can be given back.
    pub look_at_log: bool,
}

impl Drain {
    pub fn is_idle(&self) -> bool {
        self.stage == DrainStage::Idle
    }

    /// What is to be tidied up in the map.
    pub fn chores(&self) -> u32 {
        self.deletions + self.merges
    }
}

impl Store {
    /// Nothing is undrained, unsaved or being given back.
    pub(crate) fn drain_is_done(&self) -> bool {
        self.drain.is_idle() && self.index.len() == 0 && !self.drain.unsaved && self.drain.chores() == 0 && self.checkpoint.is_idle()
    }

    /// Newest batch that nothing in the index needs.
    pub(crate) fn drained_to(&self) -> Seq {
        match self.index.needed_from() {
            Some(seq) => Seq(seq.0 - 1),
            None => self.stream.persisted(),
        }
    }

    /// Somebody wants the log empty, whatever it costs.
    fn is_urged(&self) -> bool {
        self.stage == Stage::Stopping
            || !self.drain_orders.is_empty()
            || self.drain.for_clone
            || self.host.wants_space
            || self.groups.wants_space
    }

    pub(crate) fn settle_drain<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if !matches!(self.stage, Stage::Serving | Stage::Stopping) {
            return;
        }
        if !self.checkpoint.is_idle() {
            self.step_checkpoint(mem, fx);
            return;
        }
        if !self.drain.is_idle() {
            return;
        }
        let (used, limit) = (self.stream.used(), self.stream.host_limit());
        // Groups let go of log without anything being applied, when entries are replaced or a laggard has caught up.
        if (std::mem::take(&mut self.drain.look_at_log) || !self.drain_orders.is_empty()) && used * 4 >= limit {
            let (drained, covers) = (self.drained_to(), self.log_covers(self.drained_to()));
            if self.gain(covers) * 4 >= limit {
                self.begin_checkpoint(drained, covers.next(), mem, fx);
                return;
            }
        }
        self.look_short();
        self.answer_drain_orders(fx);
        self.groups.wants_space &= !self.drain_is_done();
        if self.drain.round.is_none() {
            let Some(round) = self.next_round(used, limit) else { return };
            self.drain.round = Some(round);
        }
        let drained = self.drained_to();
        let covers = self.log_covers(drained);
        let over = self.drain.round.is_some_and(|to| drained >= to);
        let gain = self.gain(covers);
        let nothing_left = self.index.queued() == 0 && self.drain.chores() == 0;
        let worth = self.dirty_room() < DIRTIES || over && (self.drain.chores() == 0 || self.index.queued() > 0) || nothing_left;
        if self.drain.unsaved && !self.is_installing() && (gain * 4 >= limit || worth) {
            self.begin_checkpoint(drained, covers.next(), mem, fx);
        } else {
            let queued = self.index.queued() > 0 && !over;
            // In turns with slices: where writes never rest there is always one more of those.
            if !queued || std::mem::take(&mut self.drain.chore_is_due) {
                self.begin_chore(mem, fx);
            }
            let room = self.dirty_room();
            if queued && self.drain.is_idle() && room > 0 {
                self.drain.chore_is_due = true;
                let to = self.drain.round.expect("it is not over");
                self.begin_slice(room, to, mem, fx);
                if self.drain.is_idle() && self.drained_to() >= to {
                    // Nothing of what was left is that old any more, and nothing is out that would bring the next turn.
                    return self.settle_drain(mem, fx);
                }
            }
        }
        if over && self.drain.is_idle() {
            self.drain.round = None;
        }
    }

    /// Pages that may become dirty before a checkpoint has to come.
    pub(crate) fn dirty_room(&self) -> usize {
        self.space.dirty_limit().saturating_sub(self.map.dirty())
    }

    fn begin_chore<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.drain.deletions > 0 {
            self.reclaim(mem, fx);
        } else if self.drain.merges > 0 {
            self.begin_merge(mem, fx);
        }
    }

    /// Up to where a drain that begins now goes, if one is to begin.
    fn next_round(&self, used: u64, limit: u64) -> Option<Seq> {
        let is_idle = self.now.0 >= self.stream.last_write.0 + self.config.limits.idle_ms && self.host.is_idle();
        let persisted = self.stream.persisted();
        if is_idle || self.is_urged() || self.index.len() as u64 * 2 > self.stream.ring_blocks() {
            return Some(persisted);
        }
        // Late, and no more than is needed: the longer blocks stay in the log, the more of them are overwritten there.
        if used * 8 <= limit * 5 {
            return None;
        }
        let to = persisted.min(Seq(self.stream.first_within(limit / 8 * 3).0 - 1));
        if self.gain(self.log_covers(to)) * 8 >= limit {
            // Where few are overwritten, waiting saves little, and an extent is better drained of all that it holds than visited again for the rest.
            let few = self.map.undrained_blocks() * 4 > used * 3;
            return Some(if few { persisted } else { to });
        }
        // Writers are held up, and get what is drained even where that gives no log back.
        (used * 4 > limit * 3).then_some(persisted)
    }

    /// Blocks of log that a checkpoint gives back.
    fn gain(&self, covers: Seq) -> u64 {
        self.stream.place_of(covers.next()).0.saturating_sub(self.stream.place_of(self.stream.first_kept()).0)
    }

    fn answer_drain_orders(&mut self, fx: &mut Effects) {
        if self.drain_orders.is_empty() {
            return;
        }
        let (first, done) = (self.stream.first_kept(), self.drain_is_done());
        self.drain_orders.retain(|(id, seq)| {
            let over = *seq < first || done;
            if over {
                fx.list.push(Effect::OrderDone { id: *id, result: Ok(()) });
            }
            !over
        });
    }

    fn begin_slice<M: Memory>(&mut self, room: usize, to: Seq, mem: &mut M, fx: &mut Effects) {
        self.counters.drain_slices += 1;
        let most = (self.config.limits.drain_slice as usize).min(room);
        // Never short while serving: places were promised. A log that is redone may want space that it gives back itself, by
        // deletes and discards which the checkpoint does not know: those come first, then what they make room for.
        let mut places = self.space.places();
        let mut short = false;
        for _ in 0..LOOKS_MAX {
            if self.drain.items.len() == most || self.index.needed_from().is_none_or(|oldest| oldest > to) {
                break;
            }
            let id = self.index.pop().expect("just seen");
            let group = self.index.group(id);
            let key = group.key;
            let slots = group.slots.map(|slot| slot.filter(|slot| slot.seq <= to));
            let changed = (slots == group.slots).then_some(group.changed);
            if slots.iter().all(Option::is_none) && changed.is_none() {
                self.index.unpop(id);
                continue;
            }
            if self.map.live(key.layer.replica).is_none() {
                self.drop_group(id);
                continue;
            }
            let wants_place = slots.iter().flatten().any(|slot| matches!(slot.version, Version::Log { .. })) && !self.has_place(key);
            if wants_place && places == 0 {
                self.index.unpop(id);
                short = true;
                break;
            }
            places -= u64::from(wants_place);
            let item = Item {
                group: id,
                key,
                slots,
                changed,
                buf: None,
                place: UNALLOCATED,
                out: 0,
                read_failed: false,
                reread: false,
                bad: 0,
                done: false,
            };
            self.drain.items.push(item);
        }
        if short && self.drain.items.is_empty() {
            if self.drain.deletions > 0 {
                self.reclaim(mem, fx);
            }
            return;
        }
        self.drain.items.sort_unstable_by_key(|item| item.key);
        self.drain.stage = DrainStage::Loading;
        self.drain.pages_out = 1;
        let mut last = None;
        for i in 0..self.drain.items.len() {
            let key = self.drain.items[i].key;
            let page = PageKey::of(key.layer, key.extent).0;
            if last != Some(page) && self.map.known(key.layer, key.extent) == Known::NotLoaded {
                self.drain.pages_out += 1;
                self.want_page(page, PageWaiter::Drain, mem, fx);
            }
            last = Some(page);
        }
        self.on_drain_page(mem, fx);
    }

    /// A group whose replica is gone.
    fn drop_group(&mut self, id: GroupId) {
        let group = self.index.group_mut(id);
        let (replica, gone) = (group.key.layer.replica, group.in_log());
        group.slots = [None; BLOCKS];
        if std::mem::take(&mut group.promised) {
            self.space.unpromise();
        }
        self.index.finish(id);
        self.map.undrained(replica, -gone);
    }

    pub(crate) fn on_drain_page<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.drain.reclaiming.is_some() {
            self.give_back_page();
            return;
        }
        if self.drain.merge.is_some() {
            self.load_merge(mem, fx);
            return;
        }
        self.drain.pages_out -= 1;
        if self.drain.pages_out > 0 {
            return;
        }
        self.drain.stage = DrainStage::Moving;
        self.drain.epoch = Some(self.epochs.enter());
        self.drain.left = self.drain.items.len() as u32 + 1;
        for i in 0..self.drain.items.len() {
            let item = &self.drain.items[i];
            if item.slots.iter().flatten().any(|slot| matches!(slot.version, Version::Log { .. })) {
                let Some(buf) = mem.alloc(BLOCKS as u32) else {
                    self.shorten_slice(i);
                    break;
                };
                self.drain.items[i].buf = Some(buf);
            }
        }
        for i in 0..self.drain.items.len() {
            self.read_item(i as u32, mem, fx);
        }
        self.item_over(mem, fx);
    }

    /// Memory is short: items from `from` on go back to the queue, in their order.
    fn shorten_slice(&mut self, from: usize) {
        let mut back: Vec<Item> = self.drain.items.drain(from..).collect();
        self.drain.left -= back.len() as u32;
        back.sort_by_key(|item| std::cmp::Reverse(self.index.group(item.group).first_seq));
        for item in back {
            self.index.unpop(item.group);
        }
    }

    fn read_item<M: Memory>(&mut self, at: u32, mem: &mut M, fx: &mut Effects) {
        let item = &self.drain.items[at as usize];
        let (slots, buf, reread) = (item.slots, item.buf, item.reread);
        let mut out = 0;
        let mut i = 0;
        while i < BLOCKS {
            let Some(Slot { version: Version::Log { at: from, .. }, .. }) = slots[i] else {
                i += 1;
                continue;
            };
            let mut run = 1;
            // The second time block by block: one that cannot be read must not take its neighbours with it.
            while !reread
                && i + run < BLOCKS
                && matches!(slots[i + run], Some(Slot { version: Version::Log { at, .. }, .. }) if at == from + run as u32)
            {
                run += 1;
            }
            let buf = buf.expect("an item with data has its buffer");
            let part = Part::Buf { buf, first: i as u32, blocks: run as u32 };
            self.submit(fx, DiskKind::Read, self.ring_block(from), &[part], Owner::DrainRead { item: at });
            out += 1;
            i += run;
        }
        let item = &mut self.drain.items[at as usize];
        item.out = out;
        item.read_failed = false;
        if out == 0 {
            self.write_item(at, mem, fx);
        }
    }

    pub(crate) fn on_drain_read<M: Memory>(&mut self, at: u32, ok: bool, mem: &mut M, fx: &mut Effects) {
        let item = &mut self.drain.items[at as usize];
        item.out -= 1;
        item.read_failed |= !ok;
        if item.out > 0 {
            return;
        }
        if self.fenced() {
            self.drain.items[at as usize].done = true;
            self.item_over(mem, fx);
            return;
        }
        let bad = self.bad_blocks(at, mem);
        if bad != 0 && !std::mem::replace(&mut self.drain.items[at as usize].reread, true) {
            self.read_item(at, mem, fx);
            return;
        }
        if bad != 0 {
            self.lose_blocks(at, bad, fx);
        }
        self.write_item(at, mem, fx);
    }

    /// Blocks of the item that are not what was written, one bit each.
    fn bad_blocks<M: Memory>(&mut self, at: u32, mem: &M) -> u16 {
        if self.canary(Canary::DrainUnverified) {
            self.believe(at, mem);
            return 0;
        }
        let item = &self.drain.items[at as usize];
        let bytes = mem.bytes(item.buf.expect("an item that was read has its buffer"));
        let mut bad = 0;
        for (i, slot) in item.slots.iter().enumerate() {
            if let Some(Slot { version: Version::Log { crc, .. }, .. }) = slot
                && (item.read_failed || penstock_wire::crc32c(&bytes[i * BLOCK..][..BLOCK]) != *crc)
            {
                bad |= 1 << i;
            }
        }
        // One failed command does not tell which of the item's it was: what verifies is good all the same.
        if item.read_failed && item.reread {
            bad = 0;
            for (i, slot) in item.slots.iter().enumerate() {
                if let Some(Slot { version: Version::Log { crc, .. }, .. }) = slot
                    && penstock_wire::crc32c(&bytes[i * BLOCK..][..BLOCK]) != *crc
                {
                    bad |= 1 << i;
                }
            }
        }
        bad
    }

    /// See [`Canary::DrainUnverified`]: whatever was read is what was written.
    fn believe<M: Memory>(&mut self, at: u32, mem: &M) {
        let item = &mut self.drain.items[at as usize];
        let (bytes, group) = (mem.bytes(item.buf.expect("an item that was read has its buffer")), self.index.group_mut(item.group));
        for (i, slot) in item.slots.iter_mut().enumerate() {
            let before = *slot;
            if let Some(Slot { version: Version::Log { crc, .. }, .. }) = slot {
                *crc = penstock_wire::crc32c(&bytes[i * BLOCK..][..BLOCK]);
            }
            if group.slots[i] == before {
                group.slots[i] = *slot;
            }
        }
    }

    /// The copy of these blocks here is bad, twice. If it is the only one they are lost, and say so until they are written again.
    fn lose_blocks(&mut self, at: u32, bad: u16, fx: &mut Effects) {
        let (key, group) = (self.drain.items[at as usize].key, self.drain.items[at as usize].group);
        let others = self.member(key.layer.replica).is_some();
        if others {
            self.drain.items[at as usize].bad = bad;
        }
        for i in 0..BLOCKS {
            if bad >> i & 1 == 0 {
                continue;
            }
            let Some(slot) = self.drain.items[at as usize].slots[i] else { continue };
            let lost = Some(Slot { seq: slot.seq, version: Version::Lost });
            if let Version::Log { at: ring, .. } = slot.version {
                let block = u64::from(key.extent) * EXTENT_BLOCKS + i as u64;
                self.found_bad(key.layer.replica, block, self.ring_block(ring), fx);
            }
            if others {
                continue;
            }
            if self.index.group(group).slots[i] == Some(slot) {
                self.index.group_mut(group).slots[i] = lost;
                self.map.undrained(key.layer.replica, -i64::from(Slot::in_log(&Some(slot))));
            }
            self.drain.items[at as usize].slots[i] = lost;
        }
    }

    fn write_item<M: Memory>(&mut self, at: u32, mem: &mut M, fx: &mut Effects) {
        let item = &self.drain.items[at as usize];
        let (key, slots, buf, group) = (item.key, item.slots, item.buf, item.group);
        let is_data = |slot: &Option<Slot>| matches!(slot, Some(Slot { version: Version::Log { .. }, .. }));
        if self.map.live(key.layer.replica).is_none() || !slots.iter().any(is_data) {
            self.drain.items[at as usize].done = true;
            self.item_over(mem, fx);
            return;
        }
        let mut place = match self.map.known(key.layer, key.extent) {
            Known::Entry(entry) => entry.place,
            Known::Nothing => UNALLOCATED,
            Known::NotLoaded => unreachable!("the drain loads the pages of its slice, and the map stands still"),
        };
        if place == UNALLOCATED {
            let group = self.index.group_mut(group);
            let taken = if std::mem::take(&mut group.promised) { self.space.take_promised() } else { self.space.take_reserved() };
            place = taken.expect("space was promised before the write was proposed").0;
            self.map.set_place(key.layer, key.extent, place);
        }
        self.drain.items[at as usize].place = place;
        let mut i = 0;
        let mut out = 0;
        while i < BLOCKS {
            let run = slots[i..].iter().take_while(|slot| is_data(slot)).count();
            if run == 0 {
                i += 1;
                continue;
            }
            let part = Part::Buf { buf: buf.expect("an item with data has its buffer"), first: i as u32, blocks: run as u32 };
            self.submit(fx, DiskKind::Write, self.extent_block(place, i as u64), &[part], Owner::DrainWrite { item: at });
            self.counters.drained_blocks += run as u64;
            out += 1;
            i += run;
        }
        self.drain.items[at as usize].out = out;
    }

    pub(crate) fn on_drain_written<M: Memory>(&mut self, at: u32, ok: bool, mem: &mut M, fx: &mut Effects) {
        self.drain.items[at as usize].out -= 1;
        if !ok {
            self.fence(FenceReason::DrainWriteFailed, mem, fx);
        }
        if self.drain.items[at as usize].out == 0 {
            self.drain.items[at as usize].done = true;
            self.item_over(mem, fx);
        }
    }

    fn item_over<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        self.drain.left -= 1;
        if self.drain.left > 0 {
            return;
        }
        let items = std::mem::take(&mut self.drain.items);
        if let Some(epoch) = self.drain.epoch.take() {
            self.epochs.leave(epoch);
        }
        self.counters.drained_extents += items.len() as u64;
        self.drain.unsaved |= !items.is_empty();
        let fenced = self.fenced();
        for item in &items {
            if let Some(buf) = item.buf {
                mem.free(buf);
            }
            if fenced {
                // The log still has it all; what the extents hold is unknown and nothing points there.
                self.index.unpop(item.group);
            } else {
                self.finish_item(item);
            }
        }
        self.drain.items = items;
        self.drain.items.clear();
        self.drain.stage = DrainStage::Idle;
        if self.canary(Canary::TrimPastCheckpoint) && !fenced {
            let to = self.drained_to().next();
            if to > self.stream.first_kept() {
                self.stream.trim(to, &mut self.epochs);
                self.trim_members();
            }
        }
        for job in std::mem::take(&mut self.host.after_drain) {
            self.resume_job(job, mem, fx);
        }
    }

    /// The extent holds what the item brought: tell the map, and forget what the log held of it.
    fn finish_item(&mut self, item: &Item) {
        let key = item.key;
        if self.map.live(key.layer.replica).is_none() {
            self.drop_group_after_drain(item);
            return;
        }
        // Where nothing lies beneath, zero and inherit read the same, and inherit takes no page.
        let covers = self.map.beneath(key.layer).is_some() && !self.canary(Canary::DiscardClears);
        let zero = if covers { BlockState::Zero } else { BlockState::Inherit };
        let entry = self.map.entry_mut(key.layer, key.extent);
        entry.changed = entry.changed.max(item.changed.unwrap_or(0));
        let mut moved = 0;
        for (i, slot) in item.slots.iter().enumerate() {
            match slot {
                None => continue,
                Some(Slot { version: Version::Zero, .. }) => entry.set(i, zero, 0),
                Some(Slot { version: Version::Inherit, .. }) => entry.set(i, BlockState::Inherit, 0),
                Some(Slot { version: Version::Lost, .. }) => entry.set(i, BlockState::Lost, 0),
                Some(Slot { version: Version::Log { crc, .. }, .. }) => entry.set(i, BlockState::Data, *crc),
            }
            moved += 1;
        }
        let (has_data, place) = (entry.has_data(), entry.place);
        let group = self.index.group_mut(item.group);
        let mut drained = 0;
        for (now, was) in group.slots.iter_mut().zip(&item.slots) {
            if now == was {
                drained += i64::from(Slot::in_log(now));
                *now = None;
            }
        }
        let empty = group.slots.iter().all(Option::is_none);
        self.map.undrained(key.layer.replica, -drained);
        if !has_data && place != UNALLOCATED && empty && !self.touches(key) {
            self.map.set_place(key.layer, key.extent, UNALLOCATED);
            self.space.give_back(ExtentNo(place), &mut self.epochs);
        }
        let group = self.index.group_mut(item.group);
        if group.promised && (empty || place != UNALLOCATED) {
            group.promised = false;
            if place != UNALLOCATED || !self.leave_promise(key) {
                self.space.unpromise();
            }
        }
        self.index.finish(item.group);
        for i in (0..BLOCKS).filter(|i| item.bad >> i & 1 != 0) {
            let block = u64::from(key.extent) * EXTENT_BLOCKS + i as u64;
            if let Ok(Place::At(place, crc)) = self.place_of(key.layer, block)
                && place == self.extent_block(item.place, i as u64)
            {
                self.begin_fetch(key.layer.replica, block, place, crc, Waiter::Nobody);
            }
        }
        // Writers under pressure get what the drain gives back, more of it the more room is left.
        let (used, limit) = (self.stream.used(), self.stream.host_limit());
        let gain = 1 + 8 * limit.saturating_sub(used) / limit;
        self.stream.credit = (self.stream.credit + moved * gain).min(limit / 8);
    }

    fn drop_group_after_drain(&mut self, item: &Item) {
        // Its extent, if it got one, goes with the replica's pages.
        let group = self.index.group_mut(item.group);
        if !group.queued {
            self.drop_group(item.group);
        } else {
            group.draining = false;
        }
    }

    /// Gives the extents of a deleted replica back, a page at a time.
    fn reclaim<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        for _ in 0..16 {
            let Some(replica) = self.map.iter().find(|replica| replica.deleting) else {
                self.drain.deletions = 0;
                return;
            };
            let no = replica.no;
            let first = |layer: &Layer| layer.pages.keys().min().map(|page_no| (layer.no, *page_no));
            let Some((layer, page_no)) = replica.layers().find_map(first) else {
                self.map.remove(no);
                self.drain.deletions -= 1;
                self.drain.unsaved = true;
                continue;
            };
            let key = PageKey { layer: LayerKey { replica: no, layer }, page_no };
            self.drain.reclaiming = Some(key);
            if self.map.page(key).is_some_and(|page| page.cached.is_none()) {
                self.drain.stage = DrainStage::Loading;
                self.want_page(key, PageWaiter::Drain, mem, fx);
                return;
            }
            self.give_back_page();
        }
    }

    fn give_back_page(&mut self) {
        let key = self.drain.reclaiming.take().expect("a page is being given back");
        self.drain.stage = DrainStage::Idle;
        self.drain.unsaved = true;
        let places: Vec<u32> = match self.map.page(key).and_then(|page| page.cached.as_ref()) {
            Some(page) => page.extents.iter().map(|entry| entry.place).filter(|place| *place != UNALLOCATED).collect(),
            None => return,
        };
        for place in places {
            self.space.give_back(ExtentNo(place), &mut self.epochs);
        }
        if let Some(slot) = self.map.drop_page(key) {
            self.checkpoint.dropped.push(slot);
        }
    }
}
