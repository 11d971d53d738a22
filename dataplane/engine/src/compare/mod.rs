//! Comparing: what a member reads is held against what the others do, so that a state which is wrong and has its own checksums right is found.
//!
//! ```text
//! the scrub is through with a page → the others are asked for their digests of it → judged extent by extent → a minority's is copied anew (`mend`)
//! who is asked sees what the asker has, and where it has something else compares the page itself
//! ```
//! So each member decides about itself alone, and one member's scrub is enough for all. A digest is of what an extent of a layer reads as, with all that
//! the layer lies over: how members came to it, and what they have merged of it, makes no difference. It is told with the entries between which it
//! stands, from the last that changed the extent to the last that is applied (that one alone where the map has forgotten the extent); two that have an
//! entry in common must be equal. So nobody waits for the drain, or for an entry. A member that is being rebuilt, or has not applied again what its log
//! had, tells nothing.
//!
//! Where no majority has one thing, nothing is guessed: it is told ([`Notice::Differs`]) and left. Not here: bytes that are not what their checksum says
//! (`scrub`, `repair`).

mod mend;
mod verdict;

use crate::config::{Canary, Stage};
use crate::map::{LayerKey, PageKey};
use crate::port::*;
use crate::read::Place;
use crate::store::Store;
use mend::Mend;
use penstock_wire::page::EXTENTS_PER_PAGE;
use penstock_wire::peer::{DigestAnswer, DigestAsk, Digests, ExtentDigest, MemberNo};
use penstock_wire::{EXTENT_BLOCKS, Index, NodeId};
use verdict::{Said, Verdict, judge};

/// Pages that are compared at a time: the scrub waits for them.
const PAGES_MAX: usize = 16;
/// Asks that are kept at most; who asked goes on without this member's answer.
const ANSWERING_MAX: usize = 64;
/// Who has not answered then is left out.
const ANSWER_MS: u64 = 200;
/// Where those that told something do not decide it, and others may yet, they are asked again, so often.
const AGAIN_MS: u64 = 1000;
const ROUNDS: u32 = 3;
/// Members that differ and cannot settle it do not make each other compare without end.
const SETTLED_MS: u64 = 60_000;

/// A page that is compared.
#[derive(Debug)]
struct Comparing {
    id: u64,
    key: PageKey,
    round: u32,
    /// The round is not to begin before then; and when it began, and with whom.
    begins: Millis,
    asked: Option<(Millis, Vec<MemberNo>)>,
    answers: Vec<(MemberNo, Digests)>,
}

/// What a page is, as another member asks for it.
#[derive(Debug)]
struct Answering {
    no: ReplicaNo,
    ask: DigestAsk,
}

#[derive(Default, Debug)]
pub(crate) struct Compare {
    comparing: Vec<Comparing>,
    answering: Vec<Answering>,
    /// Pages on which something differed, and when that was found.
    settled: Vec<(PageKey, Millis)>,
    mends: Vec<Mend>,
}

impl Compare {
    pub fn is_idle(&self) -> bool {
        self.comparing.is_empty() && self.answering.is_empty() && self.mends.is_empty()
    }

    pub fn is_comparing(&self) -> bool {
        !self.comparing.is_empty()
    }
}

/// What is here of an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Own {
    Told(Said),
    /// Blocks of it are known to be lost.
    Lost,
    Untold,
}

fn said(digests: &Digests, at: usize) -> Option<Said> {
    digests.extents[at].map(|extent| Said { since: extent.since, as_of: digests.as_of, digest: extent.digest })
}

impl Store {
    /// A page is to be compared with the others' of its group, if there is one. False: too many are.
    pub(crate) fn begin_compare(&mut self, key: PageKey) -> bool {
        let compares = self.stage == Stage::Serving && self.may_feed(key.layer.replica) && !self.canary(Canary::CompareNothing);
        let compare = &self.groups.compare;
        if !compares || compare.comparing.iter().any(|comparing| comparing.key == key) {
            return true;
        }
        if compare.comparing.len() >= PAGES_MAX {
            return false;
        }
        let (id, begins) = (self.number_word(), self.now);
        self.groups.compare.comparing.push(Comparing { id, key, round: 0, begins, asked: None, answers: Vec::new() });
        true
    }

    /// Asks, judges what was answered, answers what was asked here, and copies anew.
    pub(crate) fn settle_compares<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.groups.compare.is_idle() {
            return;
        }
        for answering in std::mem::take(&mut self.groups.compare.answering) {
            self.answer_digests(answering, mem, fx);
        }
        let serves = self.stage == Stage::Serving;
        for comparing in std::mem::take(&mut self.groups.compare.comparing) {
            if serves && self.may_feed(comparing.key.layer.replica) {
                self.compare_on(comparing, mem, fx);
            }
        }
        self.settle_mends(fx);
    }

    fn compare_on<M: Memory>(&mut self, mut comparing: Comparing, mem: &mut M, fx: &mut Effects) {
        let (key, now) = (comparing.key, self.now);
        let due = match &comparing.asked {
            None => now >= comparing.begins,
            Some((at, whom)) => comparing.answers.len() == whom.len() || now.0 >= at.0 + ANSWER_MS,
        };
        let Some(own) = due.then(|| self.extents_of(key, mem, fx)).flatten() else {
            self.groups.compare.comparing.push(comparing);
            return;
        };
        if comparing.asked.is_some() {
            return self.judge_page(comparing, &own, fx);
        }
        let no = key.layer.replica;
        let mut whom = self.holders(no);
        whom.retain(|other| self.member(no).is_some_and(|member| member.members.has_content(*other)));
        let (segment, from) = match (self.map.get(no), self.member(no)) {
            (Some(replica), Some(member)) if !whom.is_empty() => (replica.shape.segment, member.me),
            _ => return,
        };
        let (layer, page_no) = (key.layer.layer.0, key.page_no);
        for to in &whom {
            let ask = DigestAsk { id: comparing.id, segment, from, to: *to, layer, page_no, digests: digests_of(&own) };
            self.send_word(no, *to, PeerWord::DigestAsk(ask), fx);
        }
        comparing.asked = Some((now, whom));
        self.groups.compare.comparing.push(comparing);
    }

    fn judge_page(&mut self, mut comparing: Comparing, own: &(Index, [Own; EXTENTS_PER_PAGE]), fx: &mut Effects) {
        let key = comparing.key;
        let asked = comparing.asked.take().map_or(0, |(_, whom)| whom.len());
        let (mut differs, mut open) = (false, Vec::new());
        for (at, own) in own.1.iter().enumerate() {
            let extent = key.page_no * EXTENTS_PER_PAGE as u32 + at as u32;
            let others: Vec<(MemberNo, Said)> =
                comparing.answers.iter().filter_map(|(from, digests)| Some((*from, said(digests, at)?))).collect();
            let own = match own {
                Own::Untold => continue,
                Own::Lost => None,
                Own::Told(own) => Some(*own),
            };
            let verdict = judge(own, &others);
            self.counters.compared_extents += u64::from(comparing.round == 0 && verdict != Verdict::Alone);
            match verdict {
                Verdict::Alone | Verdict::Same => {}
                Verdict::Others => differs = true,
                Verdict::Ours(from) => {
                    differs = true;
                    // That a page was lost was told when it was.
                    if self.begin_mend(key.layer, extent, from) && own.is_some() {
                        self.differs(key.layer, extent, true, fx);
                    }
                }
                // Who answered late may be as of newer entries than who answered at once: they are heard together when they are asked again.
                Verdict::Open(heard) => open.push((extent, heard < asked)),
            }
        }
        if open.iter().any(|(_, may_settle)| *may_settle) && comparing.round + 1 < ROUNDS {
            (comparing.round, comparing.begins) = (comparing.round + 1, Millis(self.now.0 + AGAIN_MS));
            comparing.id = self.number_word();
            comparing.answers.clear();
            self.groups.compare.comparing.push(comparing);
            return;
        }
        for (extent, _) in &open {
            self.differs(key.layer, *extent, false, fx);
        }
        if differs || !open.is_empty() {
            let now = self.now;
            let settled = &mut self.groups.compare.settled;
            settled.retain(|(other, at)| *other != key && now.0 < at.0 + SETTLED_MS);
            settled.push((key, now));
        }
    }

    fn differs(&mut self, layer: LayerKey, extent: u32, mends: bool, fx: &mut Effects) {
        self.counters.differing_extents += 1;
        let (replica, layer, block) = (layer.replica, layer.layer, u64::from(extent) * EXTENT_BLOCKS);
        fx.list.push(Effect::Notice(Notice::Differs { replica, layer, block, mends }));
    }

    pub(crate) fn on_digest_ask(&mut self, from: NodeId, ask: DigestAsk) {
        let Some(no) = self.map.by_segment(ask.segment) else { return };
        let may_ask = |member: &&crate::member::Member| member.me == ask.to && member.node_of(ask.from) == Some(from);
        let answering = &self.groups.compare.answering;
        if self.member(no).filter(may_ask).is_some_and(|member| member.speaks()) && answering.len() < ANSWERING_MAX {
            self.groups.compare.answering.push(Answering { no, ask });
        }
    }

    /// Answers with what is here, once its pages are loaded; what the asker has otherwise is compared here too.
    fn answer_digests<M: Memory>(&mut self, answering: Answering, mem: &mut M, fx: &mut Effects) {
        let Answering { no, ask } = &answering;
        if self.stage != Stage::Serving || self.member(*no).is_none_or(|member| !member.speaks()) {
            return;
        }
        let key = PageKey { layer: LayerKey { replica: *no, layer: LayerNo(ask.layer) }, page_no: ask.page_no };
        let own = if self.may_feed(*no) { self.extents_of(key, mem, fx) } else { Some((Index(0), [Own::Untold; EXTENTS_PER_PAGE])) };
        let Some(own) = own else {
            self.groups.compare.answering.push(answering);
            return;
        };
        let differs = |at: usize| match own.1[at] {
            Own::Untold => false,
            Own::Lost => ask.digests.extents[at].is_some(),
            Own::Told(own) => said(&ask.digests, at).is_some_and(|other| own.contradicts(other)),
        };
        let settled = self.groups.compare.settled.iter().any(|(other, at)| *other == key && self.now.0 < at.0 + SETTLED_MS);
        if !settled && (0..EXTENTS_PER_PAGE).any(differs) {
            self.begin_compare(key);
        }
        let answer = DigestAnswer { id: ask.id, segment: ask.segment, from: ask.to, to: ask.from, digests: digests_of(&own) };
        self.emit(*no, ask.from, Box::new(PeerWord::DigestAnswer(answer)), &[], fx);
    }

    pub(crate) fn on_digest_answer(&mut self, from: NodeId, answer: DigestAnswer) -> Option<()> {
        let no = self.map.by_segment(answer.segment)?;
        self.member(no).filter(|member| member.me == answer.to && member.node_of(answer.from) == Some(from))?;
        let mut all = self.groups.compare.comparing.iter_mut();
        let comparing = all.find(|comparing| (comparing.id, comparing.key.layer.replica) == (answer.id, no))?;
        let (_, whom) = comparing.asked.as_ref()?;
        if whom.contains(&answer.from) && comparing.answers.iter().all(|(other, _)| *other != answer.from) {
            comparing.answers.push((answer.from, answer.digests));
        }
        Some(())
    }

    /// What the extents of a page read as, and up to which entry; `None` until the pages of all layers are loaded.
    fn extents_of<M: Memory>(&mut self, key: PageKey, mem: &mut M, fx: &mut Effects) -> Option<(Index, [Own; EXTENTS_PER_PAGE])> {
        let mut all = [Own::Untold; EXTENTS_PER_PAGE];
        let Some(as_of) = self.told_to(key.layer) else { return Some((Index(0), all)) };
        let stack: Vec<LayerKey> = self.map.stack(key.layer).collect();
        let missing = |layer: &&LayerKey| self.map.page(PageKey { layer: **layer, ..key }).is_some_and(|page| page.cached.is_none());
        let missing: Vec<LayerKey> = stack.iter().filter(missing).copied().collect();
        if !missing.is_empty() {
            missing.into_iter().for_each(|layer| self.load_page(PageKey { layer, ..key }, mem, fx));
            return None;
        }
        for (at, own) in all.iter_mut().enumerate() {
            let extent = u64::from(key.page_no) * EXTENTS_PER_PAGE as u64 + at as u64;
            let mut since = Index(0);
            // What a clone stands on was so before its first entry.
            for layer in stack.iter().filter(|layer| layer.replica == key.layer.replica) {
                since = since.max(Index(self.changed_in(*layer, extent, mem, fx)?.0));
            }
            // Nothing is there, and since when nobody knows: a page that says nothing any more goes, with what it knew of changes.
            if since.0 == 0 {
                since = as_of;
            }
            let mut crcs = [None; EXTENT_BLOCKS as usize];
            let mut lost = false;
            for (block, crc) in crcs.iter_mut().enumerate() {
                match self.place_of(key.layer, extent * EXTENT_BLOCKS + block as u64).ok()? {
                    Place::At(_, of) => *crc = Some(of),
                    Place::Lost => lost = true,
                    Place::Zero | Place::Unread | Place::Beneath => {}
                }
            }
            *own = match (lost, since <= as_of) {
                (true, _) => Own::Lost,
                (false, true) => Own::Told(Said { since, as_of, digest: ExtentDigest::sum(&crcs) }),
                (false, false) => Own::Untold,
            };
        }
        Some((as_of, all))
    }

    /// The last entry up to which a layer that entries change, or a snapshot holds, is what it is here.
    fn told_to(&self, layer: LayerKey) -> Option<Index> {
        let replica = self.map.live(layer.replica)?;
        let frozen = replica.kept(layer.layer).map(|frozen| frozen.at.min(replica.applied));
        frozen.or((layer.layer == replica.live.no).then_some(replica.applied))
    }
}

fn digests_of((as_of, own): &(Index, [Own; EXTENTS_PER_PAGE])) -> Digests {
    let mut digests = Digests { as_of: *as_of, ..Digests::untold() };
    for (extent, own) in digests.extents.iter_mut().zip(own) {
        if let Own::Told(Said { since, digest, .. }) = own {
            *extent = Some(ExtentDigest { since: *since, digest: *digest });
        }
    }
    digests
}
