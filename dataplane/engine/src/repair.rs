//! Repair: a block whose bytes are not what its checksum says is asked for at the other members of its group, by that checksum, and put back.
//!
//! ```text
//! a read, a copy's or a word's payload, the drain or the scrub finds it bad, twice → begin_fetch → all other members are asked at once, again
//! until one has it, all say that theirs is bad too, or time is up → whoever waits gets the block, or is told that it is lost → it is put back
//! ```
//! A member that is asked looks up its newest version of the block, verifies it, and sends it if it is the one with that checksum; a peer's older
//! version is of no use to anybody. One without content looks into its log: nobody else may have what the other data member lacks. What comes is verified against what was asked for. It is put back as a copy of one block through the store's
//! own log ([`crate::rebuild`]: nothing newer in the log is overwritten, and the drain alone writes extents), and only while index or map name the
//! place that was bad; into the layer that it is of, which may be the origin's beneath a clone. Not here: finding it (`read`, `scrub`, `drain`, `send`, `rebuild/source`), and blocks of which not even the checksum is left.

use crate::config::{Canary, Stage};
use crate::epoch::Epoch;
use crate::host::JobId;
use crate::index::GroupKey;
use crate::map::{LayerKey, PageKey};
use crate::member::{Logged, Payload};
use crate::port::*;
use crate::read::Place;
use crate::rebuild::{Copy, Own, Why};
use crate::send::payload_of;
use crate::store::{Owner, Store};
use penstock_wire::batch::CopyOp;
use penstock_wire::page::BlockState;
use penstock_wire::peer::{FetchAnswer, FetchAsk, FetchResult, MemberNo, States};
use penstock_wire::{BLOCK, BlockAddr, EXTENT_BLOCKS, NodeId};

/// Blocks that are asked for at a time while nobody waits for them.
const BACKGROUND_MAX: usize = 64;
/// Asks that are kept at most; more are told to ask again.
const ANSWERING_MAX: usize = 64;
/// Who has not answered is asked again, and given up on: hosts wait for it.
const AGAIN_MS: u64 = 100;
const GIVE_UP_MS: u64 = 2000;
/// Same place bad this often is corruption.
const STRIKES: u32 = 2;

/// What a block is asked for for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Waiter {
    /// Block of a host command's chunk.
    Job { job: JobId, at: usize },
    /// Block of an extent that a member is rebuilt from.
    Copy { id: u32, at: usize },
    /// Block of the payload of an entry, by its place in a word.
    Send { id: u32, entry: usize, at: u32 },
    /// It is to be whole again.
    Nobody,
}

/// A block that is asked for.
#[derive(Debug)]
struct Fetch {
    id: u64,
    no: ReplicaNo,
    block: u64,
    crc: u32,
    /// Where it is bad.
    place: BlockAddr,
    waiters: Vec<Waiter>,
    /// Members whose own is bad too, and who have another version.
    unreadable: Vec<MemberNo>,
    differ: Vec<MemberNo>,
    begun: Millis,
    asked: Option<Millis>,
}

/// How asking ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fetched {
    Here(BufId),
    /// Nobody has it: all said so.
    Nowhere,
    /// Who did not say may have it.
    Unknown,
}

impl Fetched {
    fn not(nowhere: bool) -> Self {
        if nowhere { Self::Nowhere } else { Self::Unknown }
    }
}

/// A layer, and where it has a block itself, with its checksum.
type Versioned = (LayerKey, (BlockAddr, u32));

/// A block that another member asks for.
#[derive(Debug)]
struct Answering {
    id: u32,
    no: ReplicaNo,
    ask: FetchAsk,
    place: Option<(BlockAddr, u32)>,
    buf: Option<BufId>,
    strikes: u32,
    epoch: Option<Epoch>,
    result: Option<FetchResult>,
}

#[derive(Default, Debug)]
pub(crate) struct Repair {
    fetches: Vec<Fetch>,
    answering: Vec<Answering>,
    next: u32,
}

impl Repair {
    pub fn is_idle(&self) -> bool {
        self.fetches.is_empty() && self.answering.is_empty()
    }
}

impl Store {
    /// A block of a volume is not what its checksum says, twice.
    pub(crate) fn found_bad(&mut self, replica: ReplicaNo, block: u64, place: BlockAddr, fx: &mut Effects) {
        self.counters.corrupt_blocks += 1;
        fx.list.push(Effect::Notice(Notice::Corrupt { replica, block, place }));
    }

    /// Asks the others for a block that is bad at `place`. False when there is nobody to ask.
    pub(crate) fn begin_fetch(&mut self, no: ReplicaNo, block: u64, place: BlockAddr, crc: u32, waiter: Waiter) -> bool {
        if self.stage != Stage::Serving || self.holders(no).is_empty() {
            return false;
        }
        let (id, now) = (self.number_word(), self.now);
        let fetches = &mut self.groups.repair.fetches;
        if let Some(fetch) = fetches.iter_mut().find(|fetch| (fetch.no, fetch.block, fetch.crc) == (no, block, crc)) {
            fetch.waiters.push(waiter);
            return true;
        }
        if waiter == Waiter::Nobody && fetches.len() >= BACKGROUND_MAX {
            return false;
        }
        let (waiters, unreadable, differ) = (vec![waiter], Vec::new(), Vec::new());
        fetches.push(Fetch { id, no, block, crc, place, waiters, unreadable, differ, begun: now, asked: None });
        true
    }

    /// Whose members may have what a layer holds: where its snapshot is removed or its replica has none to ask, those of a clone that stands on it.
    pub(crate) fn asked_for(&self, layer: LayerKey) -> ReplicaNo {
        let removed = self.map.get(layer.replica).is_some_and(|replica| replica.is_removed(layer.layer));
        let clone = self.map.clone_on(layer.replica, Some(layer.layer)).filter(|_| removed || self.holders(layer.replica).is_empty());
        clone.map_or(layer.replica, |clone| clone.no)
    }

    /// The other members, of a member that may speak.
    pub(crate) fn holders(&self, no: ReplicaNo) -> Vec<MemberNo> {
        let Some(member) = self.member(no).filter(|member| member.group().is_some()) else { return Vec::new() };
        member.members.list.iter().filter(|other| other.no != member.me).map(|other| other.no).collect()
    }

    /// Asks, gives up, and answers what was asked here.
    pub(crate) fn settle_repair<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.groups.repair.is_idle() {
            return;
        }
        let now = self.now;
        for at in (0..self.groups.repair.fetches.len()).rev() {
            let fetch = &self.groups.repair.fetches[at];
            let (no, due) = (fetch.no, fetch.asked.is_none_or(|asked| now.0 >= asked.0 + AGAIN_MS));
            let mut others = self.holders(no);
            others.retain(|other| !fetch.unreadable.contains(other));
            let speaks = self.stage == Stage::Serving && self.member(no).is_some_and(|member| member.group().is_some());
            let nowhere = others.iter().all(|other| fetch.differ.contains(other));
            // Those that differ may be ahead, and then what is bad here is about to be replaced: a host is not told that it is lost.
            let host = !others.is_empty() && fetch.waiters.iter().any(|waiter| matches!(waiter, Waiter::Job { .. }));
            if !speaks || nowhere && !host || now.0 >= fetch.begun.0 + GIVE_UP_MS {
                self.fetched(at, Fetched::not(speaks && nowhere), mem, fx);
            } else if due {
                let (id, block, crc) = (fetch.id, fetch.block, fetch.crc);
                self.groups.repair.fetches[at].asked = Some(now);
                let replica = self.map.get(no).expect("it has holders");
                let (segment, applied) = (replica.shape.segment, replica.applied);
                let from = self.member(no).expect("the same").me;
                for to in others {
                    self.send_word(no, to, PeerWord::FetchAsk(FetchAsk { id, segment, from, to, block, applied, crc }), fx);
                }
            }
        }
        let (mut kept, mut walked) = (Vec::new(), false);
        for mut answering in std::mem::take(&mut self.groups.repair.answering) {
            // One walk through a log a turn: it is long.
            let waits = self.keeps_log_alone(answering.no) && walked;
            if answering.epoch.is_none() && answering.result.is_none() && !waits {
                walked |= self.keeps_log_alone(answering.no);
                self.look_for(&mut answering, mem, fx);
            }
            match answering.result {
                None => kept.push(answering),
                Some(result) => {
                    self.answer_fetch(answering.no, &answering.ask, result, answering.buf, fx);
                    answering.buf.into_iter().for_each(|buf| self.groups.free_later(buf));
                }
            }
        }
        self.groups.repair.answering = kept;
    }

    /// What became of a block that was asked for: its buffer is the caller's.
    fn fetched<M: Memory>(&mut self, at: usize, what: Fetched, mem: &mut M, fx: &mut Effects) {
        let fetch = self.groups.repair.fetches.swap_remove(at);
        let buf = if let Fetched::Here(buf) = what { Some(buf) } else { None };
        match buf {
            Some(buf) => {
                self.counters.fetched_blocks += 1;
                self.put_back(&fetch, buf);
            }
            None => self.counters.unrepaired_blocks += 1,
        }
        for waiter in fetch.waiters {
            match waiter {
                Waiter::Job { job, at } => self.job_fetched(job, at, what, mem, fx),
                Waiter::Copy { id, at } => self.copy_fetched(id, at, what, mem),
                Waiter::Send { id, entry, at } => self.send_fetched(id, (entry, at), buf, mem),
                Waiter::Nobody => {}
            }
        }
    }

    /// Where the layers of a replica have data of a block themselves, the newest first.
    fn versions_of(&self, no: ReplicaNo, block: u64) -> Result<Vec<Versioned>, PageKey> {
        let mut all = Vec::new();
        for layer in self.map.stack(self.map.live_layer(no)) {
            if let Some(Place::At(place, crc)) = self.place_in_layer(layer, block)? {
                all.push((layer, (place, crc)));
            }
        }
        Ok(all)
    }

    fn keeps_log_alone(&self, no: ReplicaNo) -> bool {
        self.member(no).is_some_and(|member| !member.has_content())
    }

    /// Where this member has a block with that checksum: in some layer, or, without content, in its log.
    fn version_of(&self, no: ReplicaNo, block: u64, crc: u32) -> Result<Option<BlockAddr>, PageKey> {
        if self.keeps_log_alone(no) {
            let is_it = |(of, found, _): &(u64, u32, u32)| (*of, *found) == (block, crc);
            let place = |logged: &Logged| match logged.payload {
                Payload::Ring { at } => payload_of(&logged.entry).find(is_it).map(|(.., i)| self.ring_block(at + i)),
                _ => None,
            };
            return Ok(self.member(no).and_then(|member| member.log.iter().rev().find_map(place)));
        }
        Ok(self.versions_of(no, block)?.into_iter().find(|(_, (_, of))| *of == crc).map(|(_, (place, _))| place))
    }

    /// Puts a block back to where it was bad, by way of the log, if that is still where it belongs and the log has room.
    fn put_back(&mut self, fetch: &Fetch, buf: BufId) {
        let (extent, at) = ((fetch.block / EXTENT_BLOCKS) as u32, (fetch.block % EXTENT_BLOCKS) as usize);
        let layer =
            self.versions_of(fetch.no, fetch.block).ok().and_then(|all| all.into_iter().find(|(_, at)| *at == (fetch.place, fetch.crc)));
        let Some((layer, _)) = layer.filter(|_| self.ring_takes_beside(2)) else { return };
        // It may be the origin's, which a clone reads through. A copy of newer content may be on its way to a member that is rebuilt.
        let no = layer.replica;
        if self.member(no).is_none_or(|member| member.rebuild.is_some() || member.group().is_none()) {
            return;
        }
        let key = GroupKey { layer, extent };
        let of_map = if let crate::map::Known::Entry(entry) = self.map.known(key.layer, extent) { entry.changed } else { 0 };
        let changed = self.index.find(key).map_or(0, |id| self.index.group(id).changed).max(of_map);
        let Ok(promises) = self.promise_extents(layer, false, u64::from(extent)..=u64::from(extent), 0) else { return };
        let mut states = States::default();
        states.set(at, BlockState::Data);
        let op = CopyOp { layer: layer.layer.0, extent, changed, states, mask: 1 << at, crcs: vec![fetch.crc] };
        let applied = self.map.get(no).expect("it stands").applied;
        self.groups.hold(buf);
        self.queue_own(no, Own::Copy(Copy { op, applied, buf: Some(buf), promises, why: Why::Repair }));
    }

    pub(crate) fn on_fetch_answer<M: Memory>(
        &mut self,
        from: NodeId,
        answer: &FetchAnswer,
        payload: Option<BufId>,
        mem: &mut M,
        fx: &mut Effects,
    ) -> Option<()> {
        let no = self.map.by_segment(answer.segment)?;
        self.member(no).filter(|member| member.me == answer.to && member.node_of(answer.from) == Some(from))?;
        let older = self.canary(Canary::RepairOlder);
        let at = self.groups.repair.fetches.iter().position(|fetch| (fetch.id, fetch.no) == (answer.id, no))?;
        match answer.result {
            FetchResult::Found { crc } => {
                let fetch = &mut self.groups.repair.fetches[at];
                if older {
                    fetch.crc = crc;
                }
                let buf = payload?;
                answer.check(fetch.crc, mem.bytes(buf).get(..BLOCK)?).ok()?;
                self.fetched(at, Fetched::Here(buf), mem, fx);
            }
            FetchResult::Unreadable | FetchResult::Differs => {
                let fetch = &mut self.groups.repair.fetches[at];
                let said = if answer.result == FetchResult::Differs { &mut fetch.differ } else { &mut fetch.unreadable };
                if !said.contains(&answer.from) {
                    said.push(answer.from);
                }
            }
            FetchResult::Busy => {}
        }
        Some(())
    }

    pub(crate) fn on_fetch_ask(&mut self, from: NodeId, ask: FetchAsk, fx: &mut Effects) {
        let Some(no) = self.map.by_segment(ask.segment) else { return };
        let may_ask = |member: &&crate::member::Member| member.me == ask.to && member.node_of(ask.from) == Some(from);
        if self.member(no).filter(may_ask).is_none_or(|member| member.group().is_none()) {
            return;
        }
        let repair = &mut self.groups.repair;
        if repair.answering.iter().any(|other| (other.ask.id, other.ask.from, other.no) == (ask.id, ask.from, no)) {
            return;
        }
        if repair.answering.len() >= ANSWERING_MAX {
            self.answer_fetch(no, &ask, FetchResult::Busy, None, fx);
            return;
        }
        repair.next = repair.next.wrapping_add(1);
        let id = repair.next;
        repair.answering.push(Answering { id, no, ask, place: None, buf: None, strikes: 0, epoch: None, result: None });
    }

    fn answer_fetch(&mut self, no: ReplicaNo, ask: &FetchAsk, result: FetchResult, buf: Option<BufId>, fx: &mut Effects) {
        let answer = FetchAnswer { id: ask.id, segment: ask.segment, from: ask.to, to: ask.from, result };
        let found = matches!(result, FetchResult::Found { .. });
        let part = buf.filter(|_| found).map(|buf| Part::Buf { buf, first: 0, blocks: 1 });
        self.counters.fetches_answered += u64::from(found);
        self.emit(no, ask.from, Box::new(PeerWord::FetchAnswer(answer)), part.as_slice(), fx);
    }

    /// Looks a block up that another member asks for, and reads it. Goes on in the next turn where its page or memory is missing.
    fn look_for<M: Memory>(&mut self, answering: &mut Answering, mem: &mut M, fx: &mut Effects) {
        let (no, ask) = (answering.no, &answering.ask);
        let older = self.canary(Canary::RepairOlder);
        let behind = self.map.get(no).is_some_and(|replica| replica.applied < ask.applied);
        let newest = self.place_of(self.map.live_layer(no), ask.block);
        let found = newest.and_then(|newest| {
            let wanted = self.version_of(no, ask.block, ask.crc)?.map(|place| (place, ask.crc));
            Ok((wanted.or(if let (Place::At(place, crc), true) = (newest, older) { Some((place, crc)) } else { None }), newest))
        });
        answering.result = match found {
            _ if !matches!(self.stage, Stage::Serving) => Some(FetchResult::Busy),
            Ok((Some((place, crc)), _)) => {
                let Some(buf) = answering.buf.or_else(|| mem.alloc(1)) else { return };
                (answering.buf, answering.place) = (Some(buf), Some((place, crc)));
                answering.epoch = Some(self.epochs.enter());
                let part = Part::Buf { buf, first: 0, blocks: 1 };
                self.submit(fx, DiskKind::Read, place, &[part], Owner::Fetch(answering.id));
                None
            }
            Ok((None, Place::Lost)) => Some(FetchResult::Unreadable),
            // The entry that brings it may be on its way. What a rebuild may bring, who asks can ask its source for.
            Ok(_) if behind => Some(FetchResult::Busy),
            Ok(_) => Some(FetchResult::Differs),
            Err(page) => {
                self.load_page(page, mem, fx);
                None
            }
        };
    }

    pub(crate) fn on_fetch_read<M: Memory>(&mut self, id: u32, ok: bool, mem: &M, fx: &mut Effects) {
        let at = self.groups.repair.answering.iter().position(|answering| answering.id == id).expect("an answer waits for its read");
        let answering = &mut self.groups.repair.answering[at];
        let epoch = answering.epoch.take().expect("it was entered for the read");
        let (no, block) = (answering.no, answering.ask.block);
        let (place, crc) = answering.place.expect("it was read from there");
        let good = penstock_wire::crc32c(&mem.bytes(answering.buf.expect("it was read into"))[..BLOCK]) == crc;
        if good {
            answering.result = Some(FetchResult::Found { crc });
        }
        self.epochs.leave(epoch);
        // The drain may have overwritten it in place meanwhile: look again.
        let layer = self.map.live_layer(no);
        let moving = ok && self.is_moving(layer, block / EXTENT_BLOCKS);
        let stands = self.version_of(no, block, crc) == Ok(Some(place));
        if good || moving || !stands {
            return;
        }
        let answering = &mut self.groups.repair.answering[at];
        answering.strikes += 1;
        if answering.strikes >= STRIKES {
            // It is left to the scrub: members with the same rot would ask each other without end.
            let knows = self.has_caught_up(no);
            let answering = &mut self.groups.repair.answering[at];
            answering.result = Some(if knows { FetchResult::Unreadable } else { FetchResult::Busy });
            if knows {
                self.found_bad(no, block, place, fx);
            }
        }
    }
}
