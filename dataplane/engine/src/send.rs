//! Words to peers. Payload goes from where it lies in memory; what is in the ring alone is read first, and what is to the same member after it
//! waits, so that nothing overtakes.
//!
//! Emitted while the store settles only, since what a word names must live until the effects of the turn are carried out.

use crate::carry::parts_of_entry;
use crate::epoch::Epoch;
use crate::member::{Member, Payload};
use crate::port::*;
use crate::repair::Waiter;
use crate::store::{Owner, Store};
use penstock_wire::batch::Op;
use penstock_wire::peer::{Entry, EntryState, MemberNo, MessageBody};
use penstock_wire::{BLOCK, Index};

/// Words that wait for the ring at most, and how many of them are read for at a time.
const WAITING_MAX: usize = 256;
const READING_MAX: usize = 8;

/// A word that has to wait.
#[derive(Debug)]
pub(crate) struct Waiting {
    id: u32,
    replica: ReplicaNo,
    to: MemberNo,
    /// `None`: nobody wants it any more; it goes when its reads are back.
    word: Option<Box<PeerWord>>,
    /// What was read, by the entry's place in the word.
    bufs: Vec<(usize, BufId)>,
    out: u32,
    failed: bool,
    /// A read failed; and what is bad is known block by block.
    misread: bool,
    single: bool,
    epoch: Option<Epoch>,
}

/// Entries of a word, in the order of their payload.
fn entries_of(word: &PeerWord) -> Vec<&Entry> {
    match word {
        PeerWord::Group(message) => match &message.body {
            MessageBody::Append(append) => append.entries.iter().collect(),
            _ => Vec::new(),
        },
        PeerWord::EntriesAsk(_) | PeerWord::CopyAsk(_) | PeerWord::CopyAnswer(_) | PeerWord::FetchAsk(_) | PeerWord::FetchAnswer(_) => {
            Vec::new()
        }
        PeerWord::AdmitAsk(_) | PeerWord::AdmitAnswer(_) | PeerWord::DigestAsk(_) | PeerWord::DigestAnswer(_) => Vec::new(),
        PeerWord::Forward(_) | PeerWord::Forwarded(_) => Vec::new(),
        PeerWord::EntriesAnswer(answer) => {
            let whole = answer.entries.iter().map(|state| if let EntryState::Whole(entry) = state { Some(entry) } else { None });
            whole.flatten().collect()
        }
    }
}

/// Blocks of an entry's payload: the volume's block, its checksum, and which block of the payload.
pub(crate) fn payload_of(entry: &Entry) -> impl Iterator<Item = (u64, u32, u32)> {
    let ops = entry.ops().unwrap_or_default().into_iter();
    let writes = ops.filter_map(|op| if let Op::Write { block, crcs } = op { Some((block, crcs)) } else { None });
    let blocks = writes.flat_map(|(first, crcs)| crcs.into_iter().enumerate().map(move |(i, crc)| (first + i as u64, crc)));
    blocks.zip(0..).map(|((block, crc), at)| (block, crc, at))
}

/// Those of them that are not what their checksums say.
fn bad_blocks(entry: &Entry, payload: &[u8]) -> Vec<(u64, u32, u32)> {
    let bad = |(_, crc, at): &(u64, u32, u32)| penstock_wire::crc32c(&payload[*at as usize * BLOCK..][..BLOCK]) != *crc;
    payload_of(entry).filter(bad).collect()
}

/// What can be done with a word now.
enum Found {
    /// Its payload is in `parts`.
    Here,
    /// Some is in the ring.
    InRing,
    /// An entry of it is gone.
    Gone,
}

impl Store {
    /// Sends a word to a member, or lets it wait for its payload.
    pub(crate) fn send_word(&mut self, no: ReplicaNo, to: MemberNo, word: PeerWord, fx: &mut Effects) {
        if word.payload_blocks() == 0 && !matches!(&word, PeerWord::Group(message) if matches!(message.body, MessageBody::Append(_))) {
            self.emit(no, to, Box::new(word), &[], fx);
            return;
        }
        let behind = self.groups.sends.iter().any(|waiting| waiting.replica == no && waiting.to == to && waiting.word.is_some());
        if !behind {
            let mut parts = Vec::new();
            match self.find_payload(no, &word, &[], &mut parts) {
                Found::Here => {
                    self.emit(no, to, Box::new(word), &parts, fx);
                    return;
                }
                Found::InRing => {}
                Found::Gone => {
                    self.unreachable(no, to);
                    return;
                }
            }
        }
        if self.groups.sends.len() >= WAITING_MAX {
            self.unreachable(no, to);
            return;
        }
        let id = self.groups.next_send;
        self.groups.next_send = id.wrapping_add(1);
        let word = Some(Box::new(word));
        self.groups.sends.push_back(Waiting {
            id,
            replica: no,
            to,
            word,
            bufs: Vec::new(),
            out: 0,
            failed: false,
            misread: false,
            single: false,
            epoch: None,
        });
    }

    /// A number for a word that is answered, higher than any before it in this life and the lives before.
    pub(crate) fn number_word(&mut self) -> u64 {
        self.groups.next_word += 1;
        self.stream.generation.0 << 32 | u64::from(self.groups.next_word)
    }

    fn unreachable(&mut self, no: ReplicaNo, to: MemberNo) {
        if let Some(group) = self.member_mut(no).and_then(Member::group_mut) {
            group.on_unreachable(to);
            self.touch(no);
        }
    }

    pub(crate) fn emit(&mut self, no: ReplicaNo, to: MemberNo, mut word: Box<PeerWord>, parts: &[Part], fx: &mut Effects) {
        if let PeerWord::Group(message) = &mut *word
            && let MessageBody::Appended { room, .. } | MessageBody::HeartbeatDone { room, .. } = &mut message.body
        {
            *room = Some(self.room_to_tell());
            if let MessageBody::Appended { index, .. } = message.body
                && let Some(member) = self.member_mut(no)
            {
                member.admission.shown = member.admission.shown.max(index);
            }
        }
        let Some(node) = self.member(no).and_then(|member| member.node_of(to)) else { return };
        let first_part = fx.parts.len() as u32;
        fx.parts.extend_from_slice(parts);
        fx.list.push(Effect::Send { node, word, first_part, part_count: parts.len() as u32 });
    }

    /// Where each block of the word's payload lies. `read`: what was read for it.
    fn find_payload(&self, no: ReplicaNo, word: &PeerWord, read: &[(usize, BufId)], parts: &mut Vec<Part>) -> Found {
        let Some(member) = self.member(no) else { return Found::Gone };
        let mut found = Found::Here;
        for (at, entry) in entries_of(word).into_iter().enumerate() {
            if entry.payload_blocks == 0 {
                continue;
            }
            if let Some((_, buf)) = read.iter().find(|(of, _)| *of == at) {
                parts.push(Part::Buf { buf: *buf, first: 0, blocks: entry.payload_blocks });
            } else if member.holds(entry.index, entry.term).is_none() {
                return Found::Gone;
            } else if !parts_of_entry(member, entry.index, entry.term, parts) {
                found = Found::InRing;
            }
        }
        found
    }

    /// Sends what has its payload, and reads for what has not.
    pub(crate) fn settle_sends<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.groups.sends.is_empty() {
            return;
        }
        let mut reading = self.groups.sends.iter().filter(|waiting| waiting.out > 0).count();
        let mut kept = std::collections::VecDeque::new();
        for mut waiting in std::mem::take(&mut self.groups.sends) {
            if waiting.out > 0 {
                kept.push_back(waiting);
                continue;
            }
            let (no, to) = (waiting.replica, waiting.to);
            let behind = kept.iter().any(|other: &Waiting| (other.replica, other.to) == (no, to) && other.word.is_some());
            let Some(word) = waiting.word.take() else {
                self.end_waiting(waiting, mem);
                continue;
            };
            let mut parts = Vec::new();
            let found = if waiting.failed { Found::Gone } else { self.find_payload(no, &word, &waiting.bufs, &mut parts) };
            match found {
                Found::Gone => {
                    self.end_waiting(waiting, mem);
                    self.unreachable(no, to);
                }
                Found::Here if !behind => {
                    self.emit(no, to, word, &parts, fx);
                    for (_, buf) in waiting.bufs.drain(..) {
                        self.groups.free_later(buf);
                    }
                    self.end_waiting(waiting, mem);
                }
                Found::InRing if reading < READING_MAX => {
                    // Words get memory in their order: who has it goes before who waits for it.
                    reading = if self.read_payload(&mut waiting, &word, mem, fx) { reading + 1 } else { READING_MAX };
                    waiting.word = Some(word);
                    kept.push_back(waiting);
                }
                Found::Here | Found::InRing => {
                    waiting.word = Some(word);
                    kept.push_back(waiting);
                }
            }
        }
        self.groups.sends = kept;
    }

    fn end_waiting<M: Memory>(&mut self, waiting: Waiting, mem: &mut M) {
        for (_, buf) in waiting.bufs {
            mem.free(buf);
        }
        if let Some(epoch) = waiting.epoch {
            self.epochs.leave(epoch);
        }
    }

    /// Reads what of the word is in the ring alone. Without memory for all of it the word holds none: words that each hold a part wait for each other.
    fn read_payload<M: Memory>(&mut self, waiting: &mut Waiting, word: &PeerWord, mem: &mut M, fx: &mut Effects) -> bool {
        let mut reads = Vec::new();
        for (at, entry) in entries_of(word).into_iter().enumerate() {
            if waiting.bufs.iter().any(|(of, _)| *of == at) {
                continue;
            }
            let logged = self.member(waiting.replica).and_then(|member| member.holds(entry.index, entry.term));
            let Some(Payload::Ring { at: from }) = logged.map(|logged| logged.payload) else { continue };
            let Some(buf) = mem.alloc(entry.payload_blocks) else {
                waiting.bufs.drain(..).for_each(|(_, buf)| mem.free(buf));
                return false;
            };
            waiting.bufs.push((at, buf));
            reads.push((from, Part::Buf { buf, first: 0, blocks: entry.payload_blocks }));
        }
        waiting.out = reads.len() as u32;
        for (from, part) in reads {
            self.submit(fx, DiskKind::Read, self.ring_block(from), &[part], Owner::Send(waiting.id));
        }
        if waiting.out > 0 && waiting.epoch.is_none() {
            waiting.epoch = Some(self.epochs.enter());
        }
        waiting.out > 0
    }

    pub(crate) fn on_send_read<M: Memory>(&mut self, id: u32, ok: bool, mem: &M, fx: &mut Effects) {
        let waiting = self.waiting(id);
        waiting.out -= 1;
        waiting.misread |= !ok;
        if waiting.out > 0 {
            return;
        }
        if waiting.misread && !std::mem::replace(&mut waiting.single, true) {
            self.read_singly(id, fx);
            return;
        }
        // The receiver would refuse what does not match, for ever; here it is known whose fault it is. A block that cannot be read
        // leaves what does not match.
        let waiting = &*waiting;
        let (no, word, bufs) = (waiting.replica, waiting.word.as_deref(), &waiting.bufs);
        let entries = word.map(entries_of).unwrap_or_default();
        let mut bad = Vec::new();
        for (of, entry, buf) in bufs.iter().filter_map(|(of, buf)| entries.get(*of).map(|entry| (*of, *entry, *buf))) {
            bad.extend(bad_blocks(entry, mem.bytes(buf)).into_iter().map(|found| (of, entry.index, found)));
        }
        for (entry, index, (block, crc, i)) in bad {
            let Some(Payload::Ring { at }) = self.member(no).and_then(|member| member.get(index)).map(|logged| logged.payload) else {
                self.cannot_send(id, index);
                continue;
            };
            let place = self.ring_block(at + i);
            self.found_bad(no, block, place, fx);
            if self.begin_fetch(no, block, place, crc, Waiter::Send { id, entry, at: i }) {
                self.waiting(id).out += 1;
            } else {
                self.cannot_send(id, index);
            }
        }
    }

    /// Once more, block by block: one that cannot be read must not take its neighbours with it.
    fn read_singly(&mut self, id: u32, fx: &mut Effects) {
        let waiting = &*self.waiting(id);
        let (no, entries) = (waiting.replica, waiting.word.as_deref().map(entries_of).unwrap_or_default());
        let known = waiting.bufs.iter().filter_map(|(of, buf)| entries.get(*of).map(|entry| (entry.index, entry.term, *buf)));
        let mut reads = Vec::new();
        for (index, term, buf) in known.collect::<Vec<_>>() {
            let Some(logged) = self.member(no).and_then(|member| member.holds(index, term)) else { continue };
            let Payload::Ring { at } = logged.payload else { continue };
            reads.extend((0..logged.entry.payload_blocks).map(|first| (self.ring_block(at + first), Part::Buf { buf, first, blocks: 1 })));
        }
        let waiting = self.waiting(id);
        waiting.out = reads.len() as u32;
        // What none of it can be read again of was never verified.
        waiting.failed |= reads.is_empty();
        for (at, part) in reads {
            self.submit(fx, DiskKind::Read, at, &[part], Owner::Send(id));
        }
    }

    fn waiting(&mut self, id: u32) -> &mut Waiting {
        self.groups.sends.iter_mut().find(|waiting| waiting.id == id).expect("a word waits for what is read for it")
    }

    /// A block of an entry's payload that is bad here came from another member, or nobody has it.
    pub(crate) fn send_fetched<M: Memory>(&mut self, id: u32, (entry, at): (usize, u32), block: Option<BufId>, mem: &mut M) {
        let waiting = self.waiting(id);
        waiting.out -= 1;
        let target = waiting.bufs.iter().find(|(of, _)| *of == entry).map(|(_, buf)| *buf);
        let index = waiting.word.as_deref().and_then(|word| entries_of(word).get(entry).map(|entry| entry.index));
        match (block, target, index) {
            (Some(block), Some(target), _) => mem.copy_block(block, target, at as usize),
            (_, _, Some(index)) => self.cannot_send(id, index),
            (_, _, None) => {}
        }
    }

    /// An entry's payload is nowhere to be had: whoever needs it is given what came of it instead, once it is applied.
    fn cannot_send(&mut self, id: u32, index: Index) {
        let no = self.waiting(id).replica;
        let has = |word: &PeerWord| entries_of(word).iter().any(|entry| entry.index == index);
        for waiting in self.groups.sends.iter_mut().filter(|waiting| waiting.replica == no) {
            waiting.failed |= waiting.id == id || waiting.word.as_deref().is_some_and(has);
        }
        if let Some(group) = self.member_mut(no).and_then(Member::group_mut) {
            group.cannot_send(index);
            self.touch(no);
        }
    }

    /// Words of a group that says nothing more are not sent.
    pub(crate) fn cancel_sends(&mut self, no: ReplicaNo) {
        for waiting in self.groups.sends.iter_mut().filter(|waiting| waiting.replica == no) {
            waiting.word = None;
        }
    }
}
