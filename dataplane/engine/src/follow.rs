//! What peers say: entries come in with their payload, are checked against it, get their space promised, and are held until the group has
//! taken them or has not. What does not fit is dropped like a message that was lost: the sender sends again.
//!
//! Also here: entries that are replaced. Not here: what recovery asks of the others (`doubt`).

use crate::config::{Canary, Stage};
use crate::index::GroupKey;
use crate::map::{Known, PageKey};
use crate::member::{Logged, Payload, Staged};
use crate::port::*;
use crate::store::Store;
use penstock_wire::batch::Op;
use penstock_wire::peer::{Entry, MessageBody, Verified};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Index, NodeId};

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
            let (count, whole) = (self.stage_entries(no, &append.entries, payload), append.entries.len());
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
    fn stage_entries(&mut self, no: ReplicaNo, entries: &[Entry], payload: Option<BufId>) -> usize {
        let mut first = 0;
        for (at, entry) in entries.iter().enumerate() {
            let blocks = entry.payload_blocks;
            let known = self.member(no).is_some_and(|member| member.holds(entry.index, entry.term).is_some());
            if blocks > 0 && !known {
                let Some(buf) = payload else { return at };
                if self.groups.held_blocks > HELD_MAX || !self.ring_takes(u64::from(first + blocks)) {
                    return at;
                }
                let Some(promised) = self.promise_entry(no, entry, false) else {
                    self.groups.wants_space = true;
                    return at;
                };
                self.groups.hold(buf);
                let first = if self.canary(Canary::StageFirstPayload) { 0 } else { first };
                let staged = Staged { index: entry.index, term: entry.term, buf, first, promised };
                self.member_mut(no).expect("seen above").staged.push(staged);
            }
            first += blocks;
        }
        entries.len()
    }

    /// Whether the log has room for so many blocks more, beside all that waits for it.
    pub(crate) fn ring_takes(&self, blocks: u64) -> bool {
        self.stream.used() + self.groups.queued_blocks() + blocks < self.stream.host_limit()
    }

    /// Promises an extent for each that the entry's writes touch, that is not known to have one, and that no other entry of the log counts on.
    /// `again`: it had its promise before a crash, and gets it whatever is left.
    pub(crate) fn promise_entry(&mut self, no: ReplicaNo, entry: &Entry, again: bool) -> Option<Vec<u32>> {
        let mut promised = Vec::new();
        if self.canary(Canary::ApplyWithoutSpace) {
            return Some(promised);
        }
        for op in entry.ops().unwrap_or_default() {
            let Op::Write { block, crcs } = op else { continue };
            for extent in block / EXTENT_BLOCKS..=(block + crcs.len() as u64 - 1) / EXTENT_BLOCKS {
                let extent = extent as u32;
                if promised.contains(&extent) || self.has_place(GroupKey { layer: self.map.live_layer(no), extent }) {
                    continue;
                }
                let counted = self.member_mut(no)?.promised.get_mut(&extent).map(|count| *count += 1).is_some();
                if !counted {
                    if again {
                        self.space.promise_again();
                    } else if !self.space.promise(0) {
                        self.give_up_extents(no, &promised);
                        self.look_for_places(no, entry);
                        return None;
                    }
                    self.member_mut(no)?.promised.insert(extent, 1);
                }
                promised.push(extent);
            }
        }
        Some(promised)
    }

    /// An entry counts on these no more.
    pub(crate) fn give_up_extents(&mut self, no: ReplicaNo, extents: &[u32]) {
        for extent in extents {
            let Some(member) = self.member_mut(no) else { return };
            let Some(count) = member.promised.get_mut(extent) else { continue };
            *count -= 1;
            if *count == 0 {
                member.promised.remove(extent);
                self.space.unpromise();
            }
        }
    }

    /// An entry is applied: what it counted on is its own. Entries after it that count on the same find the extent in the index, or its place.
    pub(crate) fn take_extents(&mut self, no: ReplicaNo, extents: &[u32]) -> u32 {
        let Some(member) = self.member_mut(no) else { return 0 };
        extents.iter().filter(|extent| member.promised.remove(extent).is_some()).count() as u32
    }

    /// An extent holds nothing any more, and space is promised to it: entries that are not applied may count on that, and have it from here on.
    pub(crate) fn leave_promise(&mut self, key: GroupKey) -> bool {
        let Some(member) = self.member_mut(key.layer.replica) else { return false };
        let logged = member.log.iter().map(|logged| &logged.promised);
        let staged = member.staged.iter().map(|staged| &staged.promised);
        let proposed = member.proposals.iter().map(|proposal| &proposal.promised);
        let count = logged.chain(staged).chain(proposed).filter(|promised| promised.contains(&key.extent)).count();
        if count == 0 || member.promised.contains_key(&key.extent) {
            return false;
        }
        member.promised.insert(key.extent, count as u32);
        true
    }

    /// There is no space for an entry: some of what was promised, here and before, may be for extents whose place only a page would tell.
    fn look_for_places(&mut self, no: ReplicaNo, entry: &Entry) {
        let Some(member) = self.member(no) else { return };
        let mut extents: Vec<u32> = member.promised.keys().copied().collect();
        for op in entry.ops().unwrap_or_default() {
            if let Op::Write { block, crcs } = op {
                extents.extend((block / EXTENT_BLOCKS..=(block + crcs.len() as u64 - 1) / EXTENT_BLOCKS).map(|extent| extent as u32));
            }
        }
        let layer = self.map.live_layer(no);
        let unloaded = extents.into_iter().filter(|extent| self.map.known(layer, *extent) == Known::NotLoaded);
        let mut pages: Vec<PageKey> = unloaded.map(|extent| PageKey::of(layer, extent).0).collect();
        pages.sort_unstable();
        pages.dedup();
        self.groups.pages.extend(pages);
    }

    /// A page was loaded: what has its place there needs no promise.
    pub(crate) fn unpromise_placed(&mut self, key: PageKey) {
        let (no, layer) = (key.layer.replica, key.layer);
        let Some(member) = self.member(no).filter(|_| layer == self.map.live_layer(no)) else { return };
        let of_page = member.promised.keys().copied().filter(|extent| PageKey::of(layer, *extent).0 == key);
        let placed: Vec<u32> = of_page.filter(|extent| self.has_place(GroupKey { layer, extent: *extent })).collect();
        for extent in placed {
            self.member_mut(no).expect("seen above").promised.remove(&extent);
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
            self.give_up_extents(no, &staged.promised);
            self.groups.release(staged.buf);
        }
    }

    /// What the group has not taken, it will not take any more.
    pub(crate) fn drop_staged(&mut self, no: ReplicaNo) {
        self.unstage_from(no, 0);
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
        } else if logged.entry.payload_blocks > 0 {
            let at = member.staged.iter().position(|staged| (staged.index, staged.term) == (index, term));
            let staged = member.staged.swap_remove(at.expect("the payload of what the group took was staged"));
            logged.payload = Payload::Staged { buf: staged.buf, first: staged.first };
            logged.promised = staged.promised;
        }
        member.put(logged);
    }

    /// Entries from `from` on are gone: what was promised to them is given back, and who waits for them is told to try elsewhere, as soon as
    /// the device has nothing of theirs.
    pub(crate) fn truncate<M: Memory>(&mut self, no: ReplicaNo, from: Index, mem: &mut M, fx: &mut Effects) {
        let persisted = self.stream.persisted();
        self.uncover(no, from);
        if let Some(member) = self.member_mut(no) {
            member.recovered = member.recovered.min(Index(from.0 - 1));
        }
        loop {
            let Some(member) = self.member_mut(no) else { return };
            if member.last() < from {
                break;
            }
            let Some(gone) = member.log.pop_back() else { break };
            let own = member.proposals.back().is_some_and(|proposal| proposal.index == gone.entry.index);
            let proposal = if own { member.proposals.pop_back() } else { None };
            self.give_up_extents(no, &gone.promised);
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
            self.give_up_extents(no, &proposal.promised);
            self.fail_ops(proposal.ops, Status::NotReady, mem, fx);
        }
    }
}

/// An append with the first `count` of its entries.
fn first_entries(verified: Verified, count: usize, payload: &[u8]) -> Option<Verified> {
    let mut message = verified.into_message();
    let MessageBody::Append(append) = &mut message.body else { return None };
    append.entries.truncate(count);
    let len = message.payload_blocks() as usize * BLOCK;
    Verified::all(vec![message], payload.get(..len)?).ok()?.pop()
}
