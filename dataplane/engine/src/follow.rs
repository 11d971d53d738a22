//! What peers say: entries come in with their payload, are checked against it, get their space promised, and are held until the group has
//! taken them or has not. What does not fit is dropped like a message that was lost: the sender sends again.
//!
//! Also here: entries that are replaced. Not here: what recovery asks of the others (`doubt`).

use crate::config::{Canary, Stage};
use crate::index::GroupKey;
use crate::map::{Known, LayerKey, PageKey};
use crate::member::{Logged, Payload, Promise, Staged};
use crate::port::*;
use crate::store::Store;
use penstock_wire::batch::Op;
use penstock_wire::page::EXTENTS_PER_PAGE;
use penstock_wire::peer::{Entry, MessageBody, Verified};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Index, NodeId, Term};

/// Blocks of peers' payloads that a store holds until they are in the log: 32 MiB. More is not taken in, and sent again: whoever holds all the
/// memory there is has none left for the header of the batch by which it would be given back.
const HELD_MAX: u64 = 8192;

impl Store {
    pub(crate) fn on_peer<M: Memory>(&mut self, from: NodeId, word: PeerWord, payload: Option<BufId>, mem: &mut M, fx: &mut Effects) {
        if let Some(buf) = payload {
            self.groups.take_in(buf, word.payload_blocks());
        }
        if self.stage == Stage::Serving {
            match word {
                PeerWord::Group(message) => {
                    self.on_message(from, message, payload, mem);
                }
                PeerWord::EntriesAsk(ask) => self.on_entries_ask(from, &ask, fx),
                PeerWord::EntriesAnswer(answer) => self.on_entries_answer(from, &answer),
                PeerWord::AdmitAsk(ask) => self.on_admit_ask(from, &ask, fx),
                PeerWord::AdmitAnswer(answer) => self.on_admit_answer(from, &answer, mem, fx),
                PeerWord::CopyAsk(ask) => self.on_copy_ask(from, ask, fx),
                PeerWord::CopyAnswer(answer) => _ = self.on_copy_answer(from, answer, payload, mem),
                PeerWord::FetchAsk(ask) => self.on_fetch_ask(from, ask, fx),
                PeerWord::FetchAnswer(answer) => _ = self.on_fetch_answer(from, &answer, payload, mem, fx),
                PeerWord::DigestAsk(ask) => self.on_digest_ask(from, ask),
                PeerWord::DigestAnswer(answer) => _ = self.on_digest_answer(from, answer),
                PeerWord::Forward(_) | PeerWord::Forwarded(_) => {}
            }
        }
        if let Some(buf) = payload {
            self.groups.release(buf);
        }
    }

    fn on_message<M: Memory>(
        &mut self,
        from: NodeId,
        message: penstock_wire::peer::Message,
        payload: Option<BufId>,
        mem: &M,
    ) -> Option<()> {
        let no = self.map.by_segment(message.segment)?;
        let member = self.member_mut(no).filter(|member| member.speaks())?;
        if member.members.get(message.from).is_some_and(|known| known.node != from) {
            return None;
        }
        // Joined since: its node is where it speaks from.
        member.meet(message.from, from);
        let len = message.payload_blocks() as usize * BLOCK;
        let bytes = match payload {
            Some(buf) => mem.bytes(buf).get(..len)?,
            None => &[],
        };
        let mut verified = Verified::all(vec![message], bytes).ok()?.pop()?;
        let staged_before = self.member(no)?.staged.len();
        if let MessageBody::Append(append) = &verified.message().body
            && !append.entries.is_empty()
        {
            // What there is no room for is left out and sent again; what the append says besides still counts, and may make room.
            let (count, whole) = (self.stage_entries(no, verified.message().term, &append.entries, payload), append.entries.len());
            if count < whole {
                verified = first_entries(verified, count, bytes)?;
            }
        }
        self.hear_room(no, verified.message().from, &verified.message().body);
        let group = self.member_mut(no)?.group_mut()?;
        if group.step(verified).is_err() {
            self.unstage_from(no, staged_before);
        }
        // A panic in there is seen when the group is settled.
        self.touch(no);
        Some(())
    }

    /// Takes hold of an append's payload, as far as there is room for it. Says for how many entries.
    fn stage_entries(&mut self, no: ReplicaNo, term: Term, entries: &[Entry], payload: Option<BufId>) -> usize {
        let applied = self.map.get(no).map_or(Index(0), |replica| replica.applied);
        let counts = self.member(no).and_then(|member| member.group()?.view()).is_some_and(|view| term >= view.term);
        let mut first = 0;
        for (at, entry) in entries.iter().enumerate() {
            let blocks = entry.payload_blocks;
            let known = self.member(no).is_some_and(|member| member.holds(entry.index, entry.term).is_some());
            if counts && !known && entry.index > applied {
                let from = &mut self.member_mut(no).expect("an append has its member").replaced_from;
                *from = Some(from.map_or(entry.index, |from| from.min(entry.index)));
            }
            let layered = self.map.get(no).is_some_and(|replica| replica.since.0 > 0) || self.awaits_marker(no);
            if (blocks > 0 || layered) && !known && !self.stage_entry(no, entry, first, payload) {
                return at;
            }
            // Those behind a marker change another layer. It counts once, however often it comes in a turn.
            let staged = &mut self.member_mut(no).expect("an append has its member").staged_markers;
            if !known {
                staged.retain(|marker| *marker != entry.index);
                staged.extend(entry.is_marker().then_some(entry.index));
            }
            first += blocks;
        }
        entries.len()
    }

    fn awaits_marker(&self, no: ReplicaNo) -> bool {
        self.member(no).is_some_and(|member| !member.markers.is_empty() || !member.staged_markers.is_empty())
    }

    /// `first`: block of the payload at which the entry's begins. False: there is no room for it.
    fn stage_entry(&mut self, no: ReplicaNo, entry: &Entry, first: u32, payload: Option<BufId>) -> bool {
        let blocks = entry.payload_blocks;
        if blocks > 0 && (payload.is_none() || self.groups.held_blocks > HELD_MAX || !self.ring_takes(no, u64::from(first + blocks))) {
            return false;
        }
        let Some(promised) = self.promise_entry(no, entry, false) else {
            self.groups.wants_space = true;
            return false;
        };
        let first = if self.canary(Canary::StageFirstPayload) { 0 } else { first };
        let payload = payload.filter(|_| blocks > 0).map(|buf| (buf, first));
        if payload.is_none() && promised.is_empty() {
            return true;
        }
        payload.into_iter().for_each(|(buf, _)| self.groups.hold(buf));
        let staged = Staged { index: entry.index, term: entry.term, payload, promised };
        self.member_mut(no).expect("an append has its member").staged.push(staged);
        true
    }

    /// Whether the log has room for so many blocks of a group's entries more, beside all that waits for it. An eighth is for the group whose unapplied entry
    /// keeps the rest from being trimmed: filled by others, it would never hear what commits that entry.
    fn ring_takes(&self, no: ReplicaNo, blocks: u64) -> bool {
        self.ring_takes_beside(blocks)
            || self.ring_used() + blocks < self.stream.host_limit() && self.unapplied_first().is_none_or(|(_, first)| first == no)
    }

    /// The same for what is no entry.
    pub(crate) fn ring_takes_beside(&self, blocks: u64) -> bool {
        let limit = self.stream.host_limit();
        self.ring_used() + blocks < limit - limit / 8
    }

    /// What is in the log, and what of groups waits for it.
    pub(crate) fn ring_used(&self) -> u64 {
        self.stream.used() + self.groups.queued_blocks()
    }

    /// Promises an extent for each that the entry's writes touch, that is not known to have one, and that no other entry of the log counts on; and
    /// the pages that zeros may begin over frozen layers. `again`: it had its promise before a crash, and gets it whatever is left.
    pub(crate) fn promise_entry(&mut self, no: ReplicaNo, entry: &Entry, again: bool) -> Option<Vec<Promise>> {
        let mut promised = Vec::new();
        if self.canary(Canary::ApplyWithoutSpace) || !self.member(no)?.has_content() {
            return Some(promised);
        }
        let layer = self.layer_to_be(no, entry.index);
        for op in entry.ops().unwrap_or_default() {
            let wants: Vec<Promise> = match op {
                Op::Write { block, crcs } => {
                    let extents = extents_of(block, &crcs).filter(|extent| !self.has_place(GroupKey { layer, extent: *extent }));
                    extents.map(|extent| Promise::Extent(layer.layer, extent)).collect()
                }
                Op::Zero { block, count } => self.pages_to_promise(layer, entry.index, block, block + u64::from(count)),
                Op::Resize { blocks } => self.pages_to_promise(layer, entry.index, blocks, u64::MAX),
                _ => continue,
            };
            for want in wants {
                if promised.contains(&want) {
                    continue;
                }
                let counted = self.member_mut(no)?.promised.get_mut(&want).map(|count| *count += 1).is_some();
                if !counted {
                    if again {
                        self.space.promise_again();
                    } else if !self.space.promise(0) {
                        self.give_up_entry(no, &promised);
                        self.look_for_places(no, entry);
                        return None;
                    }
                    self.member_mut(no)?.promised.insert(want, 1);
                }
                promised.push(want);
            }
        }
        Some(promised)
    }

    /// Pages that zeros of an entry may begin: of what is there, and of what entries before it will write first.
    fn pages_to_promise(&self, layer: LayerKey, index: Index, block: u64, end: u64) -> Vec<Promise> {
        let live = self.map.live_layer(layer.replica);
        let mut pages = self.pages_to_begin(layer.min(live), layer > live, block, end);
        if let Some((replica, member)) = self.map.get(layer.replica).and_then(|replica| Some((replica, replica.member.as_deref()?)))
            && (layer > live || self.map.beneath(layer).is_some())
        {
            let first = replica.applied.0.saturating_sub(member.start.0) as usize;
            let before = member.log.iter().skip(first).map(|logged| &logged.entry).take_while(|entry| entry.index < index);
            for op in before.flat_map(|entry| entry.ops().unwrap_or_default()) {
                if let Op::Write { block: at, crcs } = op {
                    let (from, to) = (at.max(block), (at + crcs.len() as u64).min(end));
                    pages.extend((from..to).map(|block| block / EXTENT_BLOCKS / EXTENTS_PER_PAGE as u64));
                }
            }
            pages.retain(|page_no| self.map.page(PageKey { layer, page_no: *page_no as u32 }).is_none());
            pages.dedup();
        }
        pages.into_iter().map(|page| Promise::Page(layer.layer, page as u32)).collect()
    }

    /// An entry counts on these no more.
    pub(crate) fn give_up_entry(&mut self, no: ReplicaNo, promised: &[Promise]) {
        for promise in promised {
            let Some(member) = self.member_mut(no) else { return };
            let Some(count) = member.promised.get_mut(promise) else { continue };
            *count -= 1;
            if *count == 0 {
                member.promised.remove(promise);
                self.space.unpromise();
            }
        }
    }

    /// An entry is applied: what it counted on, extents and pages, is its own. Entries after it that count on the same find it in the index, or its
    /// place.
    pub(crate) fn take_promised(&mut self, no: ReplicaNo, promised: &[Promise]) -> (u32, u32) {
        let Some(member) = self.member_mut(no) else { return (0, 0) };
        let taken = promised.iter().filter(|promise| member.promised.remove(*promise).is_some());
        let (pages, extents): (Vec<&Promise>, Vec<&Promise>) = taken.partition(|promise| matches!(promise, Promise::Page(..)));
        (extents.len() as u32, pages.len() as u32)
    }

    /// An extent holds nothing any more, and space is promised to it: entries that are not applied may count on that, and have it from here on.
    pub(crate) fn leave_promise(&mut self, key: GroupKey) -> bool {
        let Some(member) = self.member_mut(key.layer.replica) else { return false };
        let logged = member.log.iter().map(|logged| &logged.promised);
        let staged = member.staged.iter().map(|staged| &staged.promised);
        let proposed = member.proposals.iter().map(|proposal| &proposal.promised);
        let promise = Promise::Extent(key.layer.layer, key.extent);
        let count = logged.chain(staged).chain(proposed).filter(|promised| promised.contains(&promise)).count();
        if count == 0 || member.promised.contains_key(&promise) {
            return false;
        }
        member.promised.insert(promise, count as u32);
        true
    }

    /// There is no space for an entry: some of what was promised, here and before, may be for extents whose place only a page would tell.
    fn look_for_places(&mut self, no: ReplicaNo, entry: &Entry) {
        let Some(member) = self.member(no) else { return };
        let layer = self.map.live_layer(no);
        let in_layer =
            |promise: &Promise| if let Promise::Extent(of, extent) = promise { (*of == layer.layer).then_some(*extent) } else { None };
        let mut extents: Vec<u32> = member.promised.keys().filter_map(in_layer).collect();
        for op in entry.ops().unwrap_or_default() {
            if let Op::Write { block, crcs } = op {
                extents.extend(extents_of(block, &crcs));
            }
        }
        let unloaded = extents.into_iter().filter(|extent| self.map.known(layer, *extent) == Known::NotLoaded);
        let mut pages: Vec<PageKey> = unloaded.map(|extent| PageKey::of(layer, extent).0).collect();
        pages.sort_unstable();
        pages.dedup();
        self.groups.pages.extend(pages);
    }

    /// A page was loaded: what has its place there needs no promise.
    pub(crate) fn unpromise_placed(&mut self, key: PageKey) {
        let (no, layer) = (key.layer.replica, key.layer);
        let Some(member) = self.member(no) else { return };
        let placed = |promise: &Promise| match *promise {
            Promise::Extent(of, extent) => {
                of == layer.layer && PageKey::of(layer, extent).0 == key && self.has_place(GroupKey { layer, extent })
            }
            Promise::Page(..) => false,
        };
        let placed: Vec<Promise> = member.promised.keys().copied().filter(placed).collect();
        for promise in placed {
            self.member_mut(no).expect("seen above").promised.remove(&promise);
            self.space.unpromise();
        }
    }

    /// What recovery found and what is not applied gets its space promised.
    pub(crate) fn promise_log(&mut self, no: ReplicaNo) {
        let Some(applied) = self.map.get(no).map(|replica| replica.applied) else { return };
        let Some(member) = self.member(no) else { return };
        let entries: Vec<Entry> = member.log.iter().map(|logged| &logged.entry).filter(|entry| entry.index > applied).cloned().collect();
        for entry in entries {
            let promised = self.promise_entry(no, &entry, true).unwrap_or_default();
            if let Some(logged) = self.member_mut(no).and_then(|member| member.get_mut(entry.index)) {
                logged.promised = promised;
            }
        }
    }

    fn unstage_from(&mut self, no: ReplicaNo, from: usize) {
        let Some(member) = self.member_mut(no) else { return };
        for staged in member.staged.split_off(from) {
            self.give_up_entry(no, &staged.promised);
            staged.payload.into_iter().for_each(|(buf, _)| self.groups.release(buf));
        }
    }

    /// What the group has not taken, it will not take any more.
    pub(crate) fn drop_staged(&mut self, no: ReplicaNo) {
        self.unstage_from(no, 0);
        if let Some(member) = self.member_mut(no) {
            member.staged_markers.clear();
            member.replaced_from = None;
        }
    }

    /// An entry gets its place in the log; what stood there is gone.
    pub(crate) fn log_entry<M: Memory>(&mut self, no: ReplicaNo, entry: Entry, mem: &mut M, fx: &mut Effects) {
        let (index, term) = (entry.index, entry.term);
        if self.member(no).is_some_and(|member| member.last() >= index) {
            self.void_items(no, index);
            self.truncate(no, index, mem, fx);
        }
        let member = self.member_mut(no).expect("a group that persists has its member");
        let mut logged = Logged { entry, seq: None, payload: Payload::None, promised: Vec::new() };
        let own = member.proposals.binary_search_by_key(&index, |proposal| proposal.index).ok();
        if let Some(at) = own.filter(|at| member.proposals[*at].term == term) {
            logged.promised = std::mem::take(&mut member.proposals[at].promised);
            if logged.entry.payload_blocks > 0 {
                logged.payload = Payload::Host;
            }
        } else if let Some(at) = member.staged.iter().rposition(|staged| (staged.index, staged.term) == (index, term)) {
            // What came twice in a turn is the last one's: that knew of the markers that it is behind.
            let staged = member.staged.remove(at);
            if let Some((buf, first)) = staged.payload {
                logged.payload = Payload::Staged { buf, first };
            }
            logged.promised = staged.promised;
        }
        let whole = logged.entry.payload_blocks == 0 || logged.payload != Payload::None;
        assert!(whole, "the payload of what the group took was staged");
        member.put(logged);
    }

    /// Entries from `from` on are gone: what was promised to them is given back, and who waits for them is told to try elsewhere, as soon as
    /// the device has nothing of theirs.
    pub(crate) fn truncate<M: Memory>(&mut self, no: ReplicaNo, from: Index, mem: &mut M, fx: &mut Effects) {
        let persisted = self.stream.persisted();
        self.uncover(no, from);
        if let Some(member) = self.member_mut(no) {
            member.recovered = member.recovered.min(Index(from.0 - 1));
            member.markers.retain(|marker| *marker < from);
        }
        self.count_merges();
        loop {
            let Some(member) = self.member_mut(no) else { return };
            if member.last() < from {
                break;
            }
            let Some(gone) = member.log.pop_back() else { break };
            let own = member.proposals.back().is_some_and(|proposal| proposal.index == gone.entry.index);
            let proposal = if own { member.proposals.pop_back() } else { None };
            self.give_up_entry(no, &gone.promised);
            if let Payload::Staged { buf, .. } = gone.payload {
                self.groups.release(buf);
            }
            if let Some(proposal) = proposal {
                match gone.seq {
                    Some(seq) if seq > persisted => self.groups.orphans.push((seq, proposal.ops)),
                    _ => self.fail_ops(proposal.ops, Status::NotReady, mem, fx),
                }
            }
        }
        // Proposed, and not even in the log yet.
        while let Some(member) = self.member_mut(no)
            && member.proposals.back().is_some_and(|proposal| proposal.index >= from)
        {
            let proposal = member.proposals.pop_back().expect("just seen");
            self.give_up_entry(no, &proposal.promised);
            self.fail_ops(proposal.ops, Status::NotReady, mem, fx);
        }
    }
}

fn extents_of(block: u64, crcs: &[u32]) -> impl Iterator<Item = u32> + use<> {
    (block / EXTENT_BLOCKS..=(block + crcs.len() as u64 - 1) / EXTENT_BLOCKS).map(|extent| extent as u32)
}

/// An append with the first `count` of its entries.
fn first_entries(verified: Verified, count: usize, payload: &[u8]) -> Option<Verified> {
    let mut message = verified.into_message();
    let MessageBody::Append(append) = &mut message.body else { return None };
    append.entries.truncate(count);
    let len = message.payload_blocks() as usize * BLOCK;
    Verified::all(vec![message], payload.get(..len)?).ok()?.pop()
}
