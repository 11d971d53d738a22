//! The giving side of a rebuild: what a member asks for is compared with what is here, and each extent that differs is read, verified and
//! sent as of what is applied here at that moment.
//!
//! What is applied is committed, so anyone whole may give, and no proof of leadership is asked for: a copy from one that lags is old, and not wrong.

use crate::config::Canary;
use crate::epoch::Epoch;
use crate::index::GroupKey;
use crate::map::{Known, LayerKey, PageKey};
use crate::member::Member;
use crate::orders::SNAPSHOT_ITSELF;
use crate::port::*;
use crate::read::Place;
use crate::repair::{Fetched, Waiter};
use crate::store::{Owner, Store};
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE};
use penstock_wire::peer::{Copied, CopyAnswer, CopyAsk, MemberNo, States};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Index, NodeId};
use std::collections::VecDeque;

const BLOCKS: usize = EXTENT_BLOCKS as usize;
const PAGE: u64 = EXTENTS_PER_PAGE as u64;
/// Asks that are kept at most; who is not answered asks again.
const ASKS_MAX: usize = 32;
/// Who has not asked for this long is not being rebuilt any more, as far as this member knows.
const FED_MS: u64 = 2000;
/// Same place bad this often is corruption, which is sent as such.
const STRIKES: u32 = 2;

/// An ask that is being answered.
#[derive(Debug)]
struct Asked {
    key: u32,
    no: ReplicaNo,
    ask: CopyAsk,
    /// What was applied when it came, and how large the volume was: what is applied since may be on extents that were found to be the same before.
    as_of: (Index, u64),
    /// Extents before this one are answered, or being read.
    at: u64,
    /// Pages with something on them, behind the listed extents: found when they are needed.
    beyond: Option<Vec<u64>>,
    started: u32,
    sent: u32,
}

/// An extent that is being read.
#[derive(Debug)]
struct Reading {
    id: u32,
    asked: u32,
    extent: u64,
    applied: Index,
    changed: u64,
    places: [Place; BLOCKS],
    states: States,
    buf: Option<BufId>,
    out: u32,
    failed: bool,
    strikes: u32,
    /// A block of it is bad here, and may be whole at a member that cannot be asked now: it is not sent, and asked for again.
    withheld: bool,
    epoch: Option<Epoch>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// To be looked up and read.
    Wanted,
    Out,
    /// Verified: to be sent.
    Whole,
}

impl Asked {
    fn layer(&self) -> LayerKey {
        LayerKey { replica: self.no, layer: LayerNo(self.ask.layer) }
    }
}

/// A member that is, or was, rebuilt from here: when it asked last, and under which number.
#[derive(Debug)]
struct Fed {
    no: ReplicaNo,
    to: MemberNo,
    last: Millis,
    id: u64,
}

#[derive(Default, Debug)]
pub(crate) struct Source {
    asks: VecDeque<Asked>,
    reading: Vec<Reading>,
    /// Who ever asked in this life of the store.
    fed: Vec<Fed>,
    next: u32,
}

impl Source {
    pub fn is_idle(&self) -> bool {
        self.asks.is_empty() && self.reading.is_empty()
    }

    fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

impl Store {
    pub(crate) fn on_copy_ask(&mut self, from: NodeId, ask: CopyAsk, fx: &mut Effects) {
        let Some(no) = self.map.by_segment(ask.segment) else { return };
        if self.member(no).is_none_or(|member| member.me != ask.to || member.node_of(ask.from) != Some(from)) {
            return;
        }
        let (now, gives) = (self.now, self.may_feed(no));
        let Some(replica) = self.map.get(no).filter(|_| gives) else { return };
        let as_of = (replica.applied, replica.shape.blocks);
        let fed = &mut self.groups.source.fed;
        match fed.iter_mut().find(|fed| (fed.no, fed.to) == (no, ask.from)) {
            // Each is answered once: the asker counts what came against what one answering says that it sent.
            Some(fed) if fed.id >= ask.id => return,
            Some(fed) => (fed.last, fed.id) = (now, ask.id),
            None => {
                // It may be one that an earlier life of this store has answered in part: to be asked again.
                fed.push(Fed { no, to: ask.from, last: now, id: ask.id });
                return self.send_done(no, &ask, as_of, ask.first, 0, fx);
            }
        }
        // A newer ask of the same member ends the one before.
        let source = &mut self.groups.source;
        source.asks.retain(|asked| asked.no != no || asked.ask.from != ask.from);
        if source.asks.len() < ASKS_MAX {
            let (key, at) = (source.number(), ask.first);
            source.asks.push_back(Asked { key, no, ask, as_of, at, beyond: None, started: 0, sent: 0 });
        }
    }

    /// Whether what is applied here is all here.
    pub(crate) fn may_feed(&self, no: ReplicaNo) -> bool {
        let Some(replica) = self.map.live(no) else { return false };
        let whole = |member: &&Member| member.speaks() && member.has_content() && member.rebuild.is_none();
        replica.member.as_deref().filter(whole).is_some() && self.has_caught_up(no)
    }

    /// The replica is gone, and its number is never given again.
    pub(super) fn feed_no_more(&mut self, no: ReplicaNo) {
        self.groups.source.fed.retain(|fed| fed.no != no);
    }

    /// Whether a member is being rebuilt from here.
    pub(crate) fn feeds(&self, no: ReplicaNo, to: MemberNo) -> bool {
        self.groups.source.fed.iter().any(|fed| (fed.no, fed.to) == (no, to) && self.now.0 < fed.last.0 + FED_MS)
    }

    /// Sends what was read, and reads what is asked for, some extents at a time.
    pub(crate) fn settle_source<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.groups.source.is_idle() {
            return;
        }
        let mut source = std::mem::take(&mut self.groups.source);
        let serves = self.stage == crate::config::Stage::Serving;
        source.asks.retain(|asked| serves && self.may_feed(asked.no));
        for _ in 0..source.asks.len() {
            let Some(mut asked) = source.asks.pop_front() else { break };
            self.walk_ask(&mut source, &mut asked, mem, fx);
            source.asks.push_back(asked);
        }
        let mut kept = Vec::new();
        for mut reading in std::mem::take(&mut source.reading) {
            let asked = source.asks.iter_mut().find(|asked| asked.key == reading.asked);
            if let (Stage::Wanted, Some(asked)) = (reading.stage, &asked) {
                self.read_extent(asked.layer(), !asked.ask.stands, &mut reading, mem, fx);
            }
            match (reading.stage, asked) {
                (Stage::Out, _) | (Stage::Wanted, Some(_)) => {
                    kept.push(reading);
                    continue;
                }
                (Stage::Whole, Some(asked)) => {
                    if !reading.withheld {
                        self.send_extent(asked, &reading, fx);
                    }
                    asked.sent += 1;
                }
                (Stage::Whole | Stage::Wanted, None) => {}
            }
            if let Some(buf) = reading.buf {
                self.groups.free_later(buf);
            }
        }
        source.reading = kept;
        source.asks.retain(|asked| {
            let over = asked.sent == asked.started && (asked.at >= asked.ask.until || asked.started >= asked.ask.room);
            if over {
                self.send_done(asked.no, &asked.ask, asked.as_of, asked.at, asked.sent, fx);
            }
            !over
        });
        self.groups.source = source;
    }

    /// Goes on through the extents of an ask until one must be waited for.
    fn walk_ask<M: Memory>(&mut self, source: &mut Source, asked: &mut Asked, mem: &mut M, fx: &mut Effects) {
        let out_max = self.config.limits.copies_out as usize;
        let layer = asked.layer();
        if self.is_gone(layer) {
            // Who asked will know of it when it has applied as much, and finds in the layer above what was here.
            asked.at = asked.ask.until;
            asked.as_of.0 = self.map.get(asked.no).expect("it is given from here").applied;
        }
        let listed = asked.ask.first + asked.ask.changed.len() as u64;
        while asked.at < asked.ask.until && asked.started < asked.ask.room && source.reading.len() < out_max {
            if asked.at >= listed {
                let pages = asked.beyond.take().unwrap_or_else(|| self.pages_with_something(layer));
                let page = pages[pages.partition_point(|page| (page + 1) * PAGE <= asked.at)..].first().copied();
                asked.beyond = Some(pages);
                match page {
                    None => {
                        asked.at = asked.ask.until;
                        return;
                    }
                    Some(page) if page * PAGE >= asked.ask.until => {
                        asked.at = asked.ask.until;
                        return;
                    }
                    Some(page) => asked.at = asked.at.max(page * PAGE),
                }
            }
            let extent = asked.at;
            let Some((changed, damaged)) = self.changed_of(layer, extent, mem, fx) else { return };
            asked.at += 1;
            // An extent of a page that was lost does not tell who changed it.
            if changed == asked.ask.has(extent) && !(damaged && changed == 0) {
                continue;
            }
            asked.started += 1;
            let id = source.number();
            source.reading.push(Reading {
                id,
                asked: asked.key,
                extent,
                applied: Index(0),
                changed: 0,
                places: [Place::Zero; BLOCKS],
                states: States::default(),
                buf: None,
                out: 0,
                failed: false,
                strikes: 0,
                withheld: false,
                epoch: None,
                stage: Stage::Wanted,
            });
        }
    }

    /// Whether no snapshot holds a layer any more, nor entries change it. One that is not known here begins behind what is applied: it is empty.
    fn is_gone(&self, layer: LayerKey) -> bool {
        let live = self.map.live_layer(layer.replica);
        layer > live || layer < live && self.map.get(layer.replica).is_none_or(|replica| replica.kept(layer.layer).is_none())
    }

    /// Pages of a layer that there is anything on, in order: with what is to be merged into it, and with what a clone's lowest stands on.
    pub(super) fn pages_with_something(&self, layer: LayerKey) -> Vec<u64> {
        let fold = self.fold_to_compare(layer);
        let grouped = self.index.iter().filter(|group| fold.contains(&group.key.layer)).map(|group| u64::from(group.key.extent) / PAGE);
        let on_pages = fold.iter().filter_map(|layer| self.map.layer(*layer)).flat_map(|layer| layer.pages.keys());
        let mut pages: Vec<u64> = on_pages.map(|page| u64::from(*page)).chain(grouped).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Whoever stands on the origin has what is there, and who does not and has zeros now may know nothing of the extent any more: so both count it.
    fn fold_to_compare(&self, layer: LayerKey) -> Vec<LayerKey> {
        let most = if self.canary(Canary::CopyUnmerged) { 1 } else { usize::MAX };
        let beneath = self.map.beneath_fold(layer).filter(|beneath| beneath.replica != layer.replica);
        let origin = beneath.into_iter().flat_map(|beneath| self.map.stack(beneath));
        self.map.fold(layer).take(most).chain(origin).collect()
    }

    /// Entry that changed an extent of a layer last, 0 where there is nothing, and whether blocks of it are lost; `None` until its pages are loaded.
    pub(super) fn changed_of<M: Memory>(&mut self, layer: LayerKey, extent: u64, mem: &mut M, fx: &mut Effects) -> Option<(u64, bool)> {
        let (mut changed, mut damaged) = (0, false);
        for of in self.fold_to_compare(layer) {
            let (by, bad) = self.changed_in(of, extent, mem, fx)?;
            // The origin's entries are of another log.
            let by = if of.replica == layer.replica { by } else { by.min(SNAPSHOT_ITSELF.0.0) };
            (changed, damaged) = (changed.max(by), damaged || bad);
        }
        Some((changed, damaged))
    }

    pub(crate) fn changed_in<M: Memory>(&mut self, layer: LayerKey, extent: u64, mem: &mut M, fx: &mut Effects) -> Option<(u64, bool)> {
        let key = GroupKey { layer, extent: extent as u32 };
        let (mut changed, mut damaged) = match self.map.known(layer, key.extent) {
            Known::Nothing => (0, false),
            Known::Entry(entry) => (entry.changed, (0..BLOCKS).any(|at| entry.state(at) == BlockState::Lost)),
            Known::NotLoaded => {
                self.load_page(PageKey::of(layer, key.extent).0, mem, fx);
                return None;
            }
        };
        if let Some(group) = self.index.find(key).map(|id| self.index.group(id)) {
            changed = changed.max(group.changed);
            damaged |= group.slots.iter().flatten().any(|slot| slot.version == crate::index::Version::Lost);
        }
        Some((changed, damaged))
    }

    /// Looks an extent up and reads it. Stays wanted while memory or its page is missing.
    fn read_extent<M: Memory>(&mut self, layer: LayerKey, deep: bool, reading: &mut Reading, mem: &mut M, fx: &mut Effects) {
        if self.is_gone(layer) {
            return;
        }
        let Some((changed, _)) = self.changed_of(layer, reading.extent, mem, fx) else { return };
        let first = reading.extent * EXTENT_BLOCKS;
        let mut places = [Place::Zero; BLOCKS];
        for (at, place) in places.iter_mut().enumerate() {
            match self.place_in_fold(layer, deep, first + at as u64) {
                Ok(found) => *place = found,
                Err(_) => return,
            }
        }
        let is_data = |place: &Place| matches!(place, Place::At(..));
        if places.iter().any(is_data) && reading.buf.is_none() {
            let Some(buf) = mem.alloc(BLOCKS as u32) else { return };
            reading.buf = Some(buf);
        }
        reading.applied = self.map.get(layer.replica).expect("it is given from here").applied;
        reading.changed = changed;
        (reading.out, reading.failed) = (0, false);
        let whole_runs = reading.strikes == 0;
        let mut i = 0;
        while i < BLOCKS {
            let Place::At(at, _) = places[i] else {
                i += 1;
                continue;
            };
            let mut run = 1;
            while whole_runs && i + run < BLOCKS && matches!(places[i + run], Place::At(next, _) if next == at.plus(run as u64)) {
                run += 1;
            }
            let part = Part::Buf { buf: reading.buf.expect("allocated above"), first: i as u32, blocks: run as u32 };
            self.submit(fx, DiskKind::Read, at, &[part], Owner::Copy(reading.id));
            reading.out += 1;
            i += run;
        }
        reading.places = places;
        if reading.out == 0 {
            settle_states(reading);
        } else {
            reading.stage = Stage::Out;
            reading.epoch = Some(self.epochs.enter());
        }
    }

    pub(crate) fn on_copy_read<M: Memory>(&mut self, id: u32, ok: bool, mem: &M, fx: &mut Effects) {
        let reading = self.reading(id);
        reading.out -= 1;
        reading.failed |= !ok;
        if reading.out > 0 {
            return;
        }
        let (failed, places, extent) = (reading.failed, reading.places, reading.extent);
        let buf = reading.buf.expect("it was read into");
        if let Some(epoch) = reading.epoch.take() {
            self.epochs.leave(epoch);
        }
        let bytes = mem.bytes(buf);
        let is_bad = |at: usize| matches!(places[at], Place::At(_, crc) if penstock_wire::crc32c(&bytes[at * BLOCK..][..BLOCK]) != crc);
        let bad: Vec<usize> = (0..BLOCKS).filter(|at| is_bad(*at)).collect();
        let asked = self.reading(id).asked;
        let of = self.groups.source.asks.iter().find(|other| other.key == asked).map(|asked| (asked.layer(), !asked.ask.stands));
        let reading = self.reading(id);
        if bad.is_empty() {
            settle_states(reading);
            return;
        }
        reading.stage = Stage::Wanted;
        let Some((layer, deep)) = of else { return };
        // The drain may have overwritten it in place meanwhile: look again.
        let moving = self.is_moving(layer, extent);
        let stands = |at: &usize| self.place_in_fold(layer, deep, extent * EXTENT_BLOCKS + *at as u64) == Ok(places[*at]);
        if moving && !failed || !bad.iter().all(stands) {
            return;
        }
        let reading = self.reading(id);
        reading.strikes += 1;
        if reading.strikes < STRIKES {
            return;
        }
        // Others may have what is bad here.
        let mut out = 0;
        for at in bad {
            let Place::At(place, crc) = places[at] else { continue };
            let block = extent * EXTENT_BLOCKS + at as u64;
            self.found_bad(layer.replica, block, place, fx);
            if self.begin_fetch(layer.replica, block, place, crc, Waiter::Copy { id, at }) {
                out += 1;
            } else {
                self.reading(id).places[at] = Place::Lost;
            }
        }
        let reading = self.reading(id);
        reading.out = out;
        if out > 0 {
            reading.stage = Stage::Out;
        } else {
            settle_states(reading);
        }
    }

    fn reading(&mut self, id: u32) -> &mut Reading {
        self.groups.source.reading.iter_mut().find(|reading| reading.id == id).expect("an extent waits for what is read of it")
    }

    /// A block that is bad here came from another member, or nobody has it.
    pub(crate) fn copy_fetched<M: Memory>(&mut self, id: u32, at: usize, what: Fetched, mem: &mut M) {
        let reading = self.reading(id);
        reading.out -= 1;
        match what {
            Fetched::Here(block) => {
                let target = reading.buf.expect("it was read into");
                mem.copy_block(block, target, at);
            }
            Fetched::Nowhere => reading.places[at] = Place::Lost,
            Fetched::Unknown => reading.withheld = true,
        }
        if reading.out == 0 {
            settle_states(reading);
        }
    }

    fn send_extent(&mut self, asked: &Asked, reading: &Reading, fx: &mut Effects) {
        let mut parts = Vec::new();
        let mut crcs = Vec::new();
        for (at, place) in reading.places.iter().enumerate() {
            let Place::At(_, crc) = place else { continue };
            crcs.push(*crc);
            let buf = reading.buf.expect("what has data was read");
            match parts.last_mut() {
                Some(Part::Buf { first, blocks, .. }) if *first + *blocks == at as u32 => *blocks += 1,
                _ => parts.push(Part::Buf { buf, first: at as u32, blocks: 1 }),
            }
        }
        let (extent, changed, states) = (reading.extent, reading.changed, reading.states);
        self.counters.copies_sent += 1;
        let logged = self.member(asked.no).filter(|_| self.canary(Canary::CopyAsOfNow));
        let applied = logged.map_or(reading.applied, Member::last);
        self.answer_copy(asked.no, &asked.ask, applied, Copied::Extent { extent, changed, states, crcs }, &parts, fx);
    }

    fn send_done(&mut self, no: ReplicaNo, ask: &CopyAsk, (applied, blocks): (Index, u64), until: u64, answers: u32, fx: &mut Effects) {
        self.answer_copy(no, ask, applied, Copied::Done { until, answers, blocks }, &[], fx);
    }

    fn answer_copy(&mut self, no: ReplicaNo, ask: &CopyAsk, applied: Index, copied: Copied, parts: &[Part], fx: &mut Effects) {
        let CopyAsk { id, segment, from, to, .. } = *ask;
        let answer = CopyAnswer { id, segment, from: to, to: from, applied, copied };
        self.emit(no, from, Box::new(PeerWord::CopyAnswer(answer)), parts, fx);
    }
}

/// All of it is verified: it can be sent.
fn settle_states(reading: &mut Reading) {
    let mut states = States::default();
    for (at, place) in reading.places.iter().enumerate() {
        states.set(
            at,
            match place {
                Place::At(..) => BlockState::Data,
                Place::Zero | Place::Unread => BlockState::Zero,
                Place::Beneath => BlockState::Inherit,
                Place::Lost => BlockState::Lost,
            },
        );
    }
    reading.states = states;
    reading.stage = Stage::Whole;
}
