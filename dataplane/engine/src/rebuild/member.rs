//! The asking side of a rebuild: range after range to whoever leads, or to another where that one does not give, one ask at a time, again when it is
//! not answered, and whole when there is nothing left to ask for.

use super::{Copy, Own, Why};
use crate::config::{Canary, RebuildView};
use crate::map::{LayerKey, PageKey, Replica};
use crate::port::*;
use crate::store::Store;
use penstock_wire::batch::CopyOp;
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE};
use penstock_wire::peer::{Copied, CopyAnswer, CopyAsk, EXTENTS_END, MemberNo, Role};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Index, NodeId, Term};
use std::collections::BTreeSet;

const PAGE: u64 = EXTENTS_PER_PAGE as u64;
/// Pages whose extents one ask lists at most.
const PAGES_LISTED: u64 = 8;
/// Extents that one ask may be answered with: half a second's worth of nothing is lost when an answer is.
const ROOM_MAX: u64 = 32;
/// Without an answer for this long it is asked again, or somebody else is.
const AGAIN_MS: u64 = 500;
/// After an answer that could not be taken: for want of space, or since it is older than the log.
const REST_MS: u64 = 100;

/// An ask that is out.
#[derive(Debug)]
struct Out {
    id: u64,
    to: MemberNo,
    first: u64,
    until: u64,
    /// An extent that is asked for by itself.
    single: Option<u32>,
    sent: Millis,
    /// Extents that came, each once: the network may hand a word over twice and lose the next.
    answered: Vec<u64>,
}

/// Why a copy cannot be taken now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Short {
    Log,
    Space,
}

/// Whether an answer's payload is what it says: what is not is as good as lost.
pub(crate) fn is_sound<M: Memory>(answer: &CopyAnswer, payload: Option<BufId>, mem: &M) -> bool {
    let bytes = payload.map_or(Some(&[][..]), |buf| mem.bytes(buf).get(..answer.payload_blocks() as usize * BLOCK));
    bytes.is_some_and(|bytes| answer.check(bytes).is_ok())
}

/// A member that is being rebuilt.
#[derive(Debug)]
pub(crate) struct Rebuild {
    /// All content is whole as of this entry; of what changed since nothing is known.
    pub as_of: Index,
    /// The log begins after this entry, or it was applied when all layers beneath were whole, or it removed a snapshot: no copy is older.
    from: Index,
    /// The layer that is being copied, and how many were before.
    layer: Option<LayerNo>,
    walked: u64,
    /// Its pages with something on them when it began: what came since came from entries that every source has applied or this member's log has.
    pages: Option<Vec<u64>>,
    /// Extents before this one are answered.
    next: u64,
    ask: Option<Out>,
    /// Sources that did not give in this term.
    tried: (Term, usize),
    /// What sources had applied, at most; and what one of them said of the volume's size, as of which entry.
    highest: Index,
    /// A whole member said that it had applied this. What comes after may be in no whole member's log, and none can be given an install from here: the log
    /// keeps it for them.
    pub reached: Index,
    blocks: (Index, u64),
    /// Last entry that changed the size here.
    resized: Index,
    /// To be asked for once more.
    pub again: BTreeSet<u32>,
    /// Those that there was no space for: asked for when all others were, since what the others no longer have gives space back here.
    short: BTreeSet<u32>,
    /// Extents of which blocks were left to an entry that is not applied.
    pub covered: Vec<(u32, Index)>,
    /// Nothing is asked before then: the last answer could not be taken.
    rest: Millis,
    /// Copies on their way through the log.
    pub out: u32,
    /// Nothing is missing; that is on its way through the log.
    pub whole: bool,
}

impl Rebuild {
    /// A log-only member asks for no content, but for the end alone, which says how large the volume is.
    pub fn new(as_of: Index, from: Index, reached: Index, content: bool) -> Self {
        Self {
            as_of,
            from,
            layer: None,
            walked: 0,
            pages: None,
            next: if content { 0 } else { EXTENTS_END - 1 },
            ask: None,
            tried: (Term(0), 0),
            highest: from,
            reached,
            blocks: (Index(0), 0),
            resized: Index(0),
            again: BTreeSet::new(),
            short: BTreeSet::new(),
            covered: Vec::new(),
            rest: Millis(0),
            out: 0,
            whole: false,
        }
    }

    pub fn view(&self, replica: &Replica) -> RebuildView {
        let extents = replica.shape.blocks.div_ceil(EXTENT_BLOCKS);
        let layers =
            std::iter::successors(self.next_layer(replica, self.layer), |layer| self.next_layer(replica, Some(*layer))).count() as u64;
        let (walked, left) = (self.walked, layers + u64::from(self.layer.is_some()));
        RebuildView { done: walked * extents + self.next.min(extents), total: (walked + left.max(1)) * extents }
    }

    /// The layer to be copied after `before`. What was frozen by the entry that all content is whole as of is whole.
    fn next_layer(&self, replica: &Replica, before: Option<LayerNo>) -> Option<LayerNo> {
        let wants = |layer: &LayerNo| replica.end_of(*layer).is_none_or(|at| at > self.as_of);
        std::iter::successors(replica.kept_above(before), |layer| replica.kept_above(Some(*layer))).find(wants)
    }
}

impl Store {
    /// Asks on for every member that is being rebuilt.
    pub(crate) fn settle_rebuilds<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        for at in 0..self.groups.rebuilding.len() {
            let no = self.groups.rebuilding[at];
            self.ask_on(no, mem, fx);
        }
    }

    fn ask_on<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) -> Option<()> {
        let now = self.now;
        let replica = self.map.live(no)?;
        let (applied, resized_to) = (replica.applied, replica.shape.blocks);
        let rebuild = replica.member.as_deref()?.rebuild.as_ref()?;
        let all = !self.canary(Canary::CopyLiveAlone);
        let above = if all { rebuild.next_layer(replica, rebuild.layer) } else { Some(replica.live.no) };
        let member = self.member_mut(no)?;
        let content = member.has_content();
        let (me, view, members) = (member.me, member.group()?.view()?, &member.members);
        let rebuild = member.rebuild.as_mut()?;
        rebuild.layer = rebuild.layer.or(above);
        rebuild.covered.retain(|(_, last)| *last > applied);
        if rebuild.whole {
            return None;
        }
        if let Some(out) = &rebuild.ask {
            if now.0 < out.sent.0 + AGAIN_MS {
                return None;
            }
            rebuild.tried.1 += 1;
            rebuild.again.extend(out.single);
            rebuild.ask = None;
        }
        if rebuild.again.is_empty() && rebuild.next >= EXTENTS_END {
            std::mem::swap(&mut rebuild.again, &mut rebuild.short);
        }
        let single = rebuild.again.first().copied();
        if single.is_none() && rebuild.next >= EXTENTS_END {
            let (as_of, blocks) = rebuild.blocks;
            let left = rebuild.out > 0 || !rebuild.covered.is_empty() || view.applied < rebuild.highest || applied < rebuild.highest;
            if left {
                return None;
            }
            if let Some(layer) = above.filter(|layer| content && rebuild.layer != Some(*layer)) {
                (rebuild.layer, rebuild.walked, rebuild.next, rebuild.pages) = (Some(layer), rebuild.walked + 1, 0, None);
                rebuild.from = applied;
                return None;
            }
            let resized = rebuild.resized > as_of;
            rebuild.whole = true;
            let blocks = if resized { resized_to } else { blocks };
            self.queue_own(no, Own::Whole { blocks });
            return None;
        }
        if now < rebuild.rest {
            return None;
        }
        if rebuild.tried.0 < view.term {
            rebuild.tried = (view.term, 0);
        }
        // Who leads first: there it is known who is not whole.
        let mut sources: Vec<MemberNo> = members.list.iter().filter(|it| it.no != me && it.role == Role::Voter).map(|it| it.no).collect();
        sources.sort_by_key(|source| *source != view.leader);
        let to = *sources.get(rebuild.tried.1 % sources.len().max(1))?;
        let room = self.room_for_copies().min(ROOM_MAX);
        if room == 0 {
            return None;
        }
        let (first, until, changed) = match single {
            Some(extent) => (u64::from(extent), u64::from(extent) + 1, vec![CopyAsk::ANY]),
            None => self.next_range(no, mem, fx)?,
        };
        let replica = self.map.get(no)?;
        let (segment, stands) = (replica.shape.segment, replica.origin.is_some());
        let layer = self.member(no)?.rebuild.as_ref()?.layer?.0;
        let id = self.number_word();
        let rebuild = self.member_mut(no)?.rebuild.as_mut()?;
        if let Some(extent) = single {
            rebuild.again.remove(&extent);
        }
        rebuild.ask = Some(Out { id, to, first, until, single, sent: now, answered: Vec::new() });
        let ask = CopyAsk { id, segment, from: me, to, layer, stands, first, until, room: room as u32, changed };
        self.send_word(no, to, PeerWord::CopyAsk(ask), fx);
        Some(())
    }

    /// Copies that the log takes: they leave room for entries, and are drained as they come.
    pub(crate) fn room_for_copies(&self) -> u64 {
        let (used, limit) = (self.ring_used(), self.stream.host_limit());
        (limit * 3 / 4).saturating_sub(used) / (EXTENT_BLOCKS + 1)
    }

    /// The extents to ask for next, and what is here of them; `None` until their pages are loaded.
    fn next_range<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) -> Option<(u64, u64, Vec<u64>)> {
        let layer = LayerKey { replica: no, layer: self.member(no)?.rebuild.as_ref()?.layer? };
        if self.member(no)?.rebuild.as_ref()?.pages.is_none() {
            let pages = self.pages_with_something(layer);
            self.member_mut(no)?.rebuild.as_mut()?.pages = Some(pages);
        }
        let rebuild = self.member(no)?.rebuild.as_ref()?;
        let (first, as_of) = (rebuild.next, rebuild.as_of);
        let pages = rebuild.pages.as_ref()?;
        let at = pages.partition_point(|page| (page + 1) * PAGE <= first);
        let page = first / PAGE;
        let run = pages[at..].iter().zip(page..page + PAGES_LISTED).take_while(|(there, wanted)| **there == *wanted).count() as u64;
        let listed_end = if run > 0 { (page + run) * PAGE } else { first };
        let until = pages.get(at + run as usize).map_or(EXTENTS_END, |next| next * PAGE);
        let mut changed = Vec::with_capacity((listed_end - first) as usize);
        let mut loaded = true;
        for extent in first..listed_end {
            match self.changed_of(layer, extent, mem, fx) {
                Some((of, damaged)) => changed.push(if damaged || of > as_of.0 { CopyAsk::ANY } else { of }),
                None => loaded = false,
            }
        }
        loaded.then_some((first, until, changed))
    }

    pub(crate) fn on_copy_answer<M: Memory>(
        &mut self,
        from: NodeId,
        answer: CopyAnswer,
        payload: Option<BufId>,
        mem: &mut M,
    ) -> Option<()> {
        let now = self.now;
        let no = self.map.by_segment(answer.segment)?;
        let member = self.member_mut(no).filter(|member| member.me == answer.to && member.node_of(answer.from) == Some(from))?;
        if member.rebuild.is_none() {
            return self.on_mend_answer(no, answer, payload, mem);
        }
        let start = member.start;
        let rebuild = member.rebuild.as_mut()?;
        // Of what a copy from before the log would lie over nothing is known.
        let oldest = rebuild.from.max(start);
        let out = rebuild.ask.as_mut().filter(|out| out.id == answer.id && out.to == answer.from)?;
        // The count at the end tells of it.
        is_sound(&answer, payload, mem).then_some(())?;
        let applied = answer.applied;
        rebuild.reached = rebuild.reached.max(applied);
        match answer.copied {
            Copied::Extent { extent, changed, states, crcs } => {
                if !(out.first..out.until).contains(&extent) || out.answered.contains(&extent) {
                    return None;
                }
                out.sent = now;
                out.answered.push(extent);
                rebuild.highest = rebuild.highest.max(applied);
                if applied < oldest {
                    // From one that lags.
                    rebuild.tried.1 += 1;
                    rebuild.again.insert(extent as u32);
                    rebuild.rest = Millis(now.0 + REST_MS);
                    return None;
                }
                let layer = rebuild.layer?.0;
                if !self.member(no)?.has_content() {
                    return None;
                }
                let op = CopyOp { layer, extent: extent as u32, changed, states, mask: u16::MAX, crcs };
                self.take_copy(no, op, applied, payload);
            }
            Copied::Done { until, answers, blocks } => {
                if answers as usize == out.answered.len() && until > out.first && applied >= oldest {
                    rebuild.highest = rebuild.highest.max(applied);
                    if applied >= rebuild.blocks.0 {
                        rebuild.blocks = (applied, blocks);
                    }
                    if out.single.is_none() {
                        rebuild.next = until.min(out.until);
                    }
                } else {
                    rebuild.tried.1 += usize::from(applied < oldest);
                    rebuild.again.extend(out.single);
                    rebuild.rest = Millis(now.0 + REST_MS);
                }
                rebuild.ask = None;
            }
        }
        Some(())
    }

    /// A copy of the rebuild goes into the log, or is asked for again.
    fn take_copy(&mut self, no: ReplicaNo, op: CopyOp, applied: Index, payload: Option<BufId>) {
        let (now, extent) = (self.now, op.extent);
        let taken = self.queue_copy(no, op, applied, payload, Why::Rebuild);
        let Some(rebuild) = self.member_mut(no).and_then(|member| member.rebuild.as_mut()) else { return };
        match taken {
            Ok(()) => rebuild.out += 1,
            Err(short) => {
                let list = if short == Short::Space { &mut rebuild.short } else { &mut rebuild.again };
                list.insert(extent);
                rebuild.rest = Millis(now.0 + REST_MS);
            }
        }
    }

    /// A copy goes into the log, if there is room and space for it.
    pub(crate) fn queue_copy(
        &mut self,
        no: ReplicaNo,
        mut op: CopyOp,
        applied: Index,
        payload: Option<BufId>,
        why: Why,
    ) -> Result<(), Short> {
        let blocks = op.crcs.len() as u64;
        let extent = op.extent;
        let layer = LayerKey { replica: no, layer: LayerNo(op.layer) };
        // Of what is as the layer beneath says here too it says nothing: that may be merged by the time that the copy takes effect, now or when the log is redone.
        let leaves = |(_, state, _): &(u64, BlockState, usize)| *state == BlockState::Inherit;
        let says_nothing = |block: u64| self.place_in_layer(layer, block) == Ok(None);
        let left = op.blocks().filter(leaves).map(|(block, ..)| block).filter(|block| says_nothing(*block));
        op.mask &= !left.fold(0, |mask, block| mask | 1 << (block % EXTENT_BLOCKS));
        if !self.ring_takes_beside(blocks + 1) {
            return Err(Short::Log);
        }
        // Zeros over frozen layers take a page, as they do when they are written.
        let takes = blocks > 0 || self.map.beneath(layer).is_some() && self.map.page(PageKey::of(layer, extent).0).is_none();
        let promised = if takes { self.promise_extents(layer, false, u64::from(extent)..=u64::from(extent), 0) } else { Ok(0) };
        let Ok(promises) = promised else {
            self.groups.wants_space = true;
            return Err(Short::Space);
        };
        let buf = payload.filter(|_| blocks > 0);
        if let Some(buf) = buf {
            self.groups.hold(buf);
        }
        self.queue_own(no, Own::Copy(Copy { op, applied, buf, promises, why }));
        Ok(())
    }

    /// A resize is applied.
    pub(crate) fn note_resized(&mut self, no: ReplicaNo, index: Index) {
        if let Some(rebuild) = self.member_mut(no).and_then(|member| member.rebuild.as_mut()) {
            rebuild.resized = index;
        }
    }

    /// A removal is applied. Who has not applied it leaves to the layer beneath what may be merged here from now on. Who has may have forgotten what was zeroed
    /// over the snapshot, since nothing lies beneath any more: what is to be merged here counts as here from now on, and where something was compared
    /// without it before, it is once more.
    pub(crate) fn note_removed(&mut self, no: ReplicaNo, index: Index) {
        let Some(member) = self.member_mut(no) else { return };
        let content = member.has_content();
        let Some(rebuild) = member.rebuild.as_mut() else { return };
        (rebuild.from, rebuild.pages) = (index, None);
        if let Some(out) = rebuild.ask.take() {
            rebuild.again.extend(out.single);
        }
        if content && rebuild.highest >= index {
            rebuild.next = 0;
        }
    }
}
