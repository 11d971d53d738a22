//! Coming back: newest superblock, its directory, then the log from there on, batch by batch.
//!
//! How a batch is judged (`expected` is the sequence that must come next here):
//!
//! | header here | payload | a later header says `durable_to ≥ expected` | verdict |
//! |---|---|---|---|
//! | whole, expected | whole | – | redo |
//! | whole, expected | bad blocks | yes | corruption: redo the good blocks, the bad ones are lost |
//! | whole, expected | bad blocks | no | tear: it and all after it were never promised, drop |
//! | none | – | yes, and the next header repeats it | corruption of the header alone: redo from the copy |
//! | none | – | yes, and no copy | corruption: which blocks are lost is unknown, fence until the operator accepts |
//! | none | – | no | the log ends here (a tear, or just the end) |
//!
//! Then what is believed and not proven durable is written again (`rewrite`), and the stream goes on under a new generation,
//! whose first batch (Open) lies over the cut: so what was dropped stays dropped. Nothing but the same bytes is written before
//! that, and a crash anywhere in recovery starts it again from the same bytes.

use crate::alloc::{ExtentNo, SlotNo};
use crate::config::{BATCHES_OUT_MAX, Canary, FenceReason, OpenError, RecoveryReport, Stage};
use crate::index::{Slot, Version};
use crate::map::{Frozen, Layer, LayerKey, Replica};
use crate::port::*;
use crate::rejoin::Walked;
use crate::reserve::Guard;
use crate::rewrite::{Rewrite, doubled};
use crate::store::{Owner, Store};
use crate::stream::BATCH_BLOCKS_MAX;
use penstock_wire::batch::{Batch, EVERY_MEMBER, Entry, Header, Op, Prev, decode_section};
use penstock_wire::directory::{Directory, Part as DirectoryPart, REPLICA_NO_LIMIT, ReplicaRow};
use penstock_wire::label::Geometry;
use penstock_wire::superblock::Superblock;
use penstock_wire::{BLOCK, DecodeError, EXTENT_BLOCKS, Generation, Index as RaftIndex, RingPos, Seq, Term};
use std::collections::{BTreeMap, VecDeque};

/// Blocks of one read of the log.
const CHUNK: u64 = 256;
/// Reads that a block of the log gets after its first one failed.
const READ_TRIES: u32 = 3;
/// How far past a bad record a header is looked for that knows it durable.
const LOOK_AHEAD: u64 = (BATCHES_OUT_MAX as u64 + 2) * BATCH_BLOCKS_MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    #[default]
    Superblocks,
    Directory,
    Walk,
    Scan,
    Rewriting,
    Opening,
}

/// A later header, found by looking ahead.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub header: Header,
    pub section: Vec<u8>,
    prev_section: Vec<u8>,
}

impl Found {
    /// Whether this is the batch after `seq`, and has the second copy of its descriptors.
    pub fn follows(&self, seq: Seq) -> bool {
        self.header.seq == seq.next() && self.header.prev.is_some_and(|prev| prev.seq == seq)
    }

    pub fn entries_before(&self) -> Option<Vec<Entry>> {
        decode_section(&self.prev_section, self.header.prev?.payload_blocks).ok()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Recovery {
    step: Step,
    pub buf: Option<BufId>,
    pub out: bool,
    pub rewrite: Rewrite,
    // Superblocks.
    slot: u64,
    supers: Vec<Superblock>,
    super_error: Option<DecodeError>,
    superblock: Option<Superblock>,
    // Directory.
    chain: usize,
    part: u32,
    extent: u32,
    bytes: Vec<u8>,
    /// Of the chain's parts, which are all of one.
    version: u32,
    chains: [Vec<u32>; 2],
    /// The checkpoint has what is applied of batches up to here: the log is kept from before for others.
    pub covered: Seq,
    /// Replicas that are members of groups, by number.
    pub walked: BTreeMap<u32, Walked>,
    /// For the Open batch to name.
    pub doubts: Vec<(u32, Option<(RaftIndex, Term)>)>,
    /// Whether the node vouches for this opening; `None` where there are no members of groups.
    pub vouched: Option<bool>,
    // Log.
    pos: RingPos,
    pub seq: Seq,
    generation: Generation,
    durable_to: Seq,
    places: VecDeque<RingPos>,
    before: Option<(Prev, Vec<u8>)>,
    /// Ring blocks `window_at ..` in memory.
    window: Vec<u8>,
    window_at: u64,
    /// Below this block of the ring, reads go block by block: one that was larger failed.
    fine_below: u64,
    read_len: u64,
    /// Times that the block at hand could not be read.
    tries: u32,
    // Looking ahead from `pos`: how far, what was found, and whether the header at `pos` is whole.
    scanned: u64,
    pub found: Vec<Found>,
    whole_header: bool,
    /// The descriptors under a whole header whose payload is bad.
    pub bad_entries: Option<Vec<Entry>>,
    /// Something at the place of the next batch looks like what is left of it.
    pub trace: bool,
    /// Blocks of the ring that could not be read.
    unreadable: Vec<u64>,
    /// No batch that fits was found at `pos` itself: it may have wrapped. Kept, since the two places share one window.
    not_here: bool,
    log_lost: bool,
    pub report: RecoveryReport,
}

/// The bytes are not in memory: read from this block of the ring.
struct Missing(u64);

impl Recovery {
    pub fn superblock(&self) -> Superblock {
        self.superblock.expect("the superblock is read first")
    }

    /// The newest that the drive knows of.
    pub fn newest_generation(&self) -> Generation {
        self.generation.max(self.superblock().generation)
    }

    pub fn superblock_is_doubled(&self) -> bool {
        doubled(&self.superblock(), &self.supers)
    }

    fn ring_end(&self) -> u64 {
        self.window_at + (self.window.len() / BLOCK) as u64
    }

    /// Ring blocks `at .. at + blocks` if they are in memory.
    fn peek(&mut self, at: u64, blocks: u64) -> Result<&[u8], Missing> {
        if at >= self.window_at && at + blocks <= self.ring_end() {
            let from = (at - self.window_at) as usize * BLOCK;
            return Ok(&self.window[from..from + blocks as usize * BLOCK]);
        }
        if at >= self.window_at && at < self.ring_end() {
            // Keep what is wanted, read on behind it.
            self.window.drain(..(at - self.window_at) as usize * BLOCK);
        } else {
            self.window.clear();
        }
        self.window_at = at;
        Err(Missing(self.ring_end()))
    }
}

impl Store {
    pub(crate) fn settle_recovery<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let Some(mut rec) = self.recovery.take() else { return };
        if !rec.out && self.stop_order.is_some() && rec.step != Step::Opening {
            self.stage = Stage::Stopped;
            let id = self.stop_order.take().expect("just seen");
            fx.list.push(Effect::OrderDone { id, result: Ok(()) });
            fx.list.push(Effect::Notice(Notice::Stopped));
            return;
        }
        if !rec.out {
            self.step_recovery(&mut rec, mem, fx);
        }
        if self.stage == Stage::Opening {
            self.recovery = Some(rec);
        }
    }

    pub(crate) fn open_failed(&mut self, error: OpenError, fx: &mut Effects) {
        self.stage = Stage::Failed;
        fx.list.push(Effect::Notice(Notice::OpenFailed(error)));
    }

    pub(crate) fn read_for_recovery<M: Memory>(
        &mut self,
        rec: &mut Recovery,
        at: penstock_wire::BlockAddr,
        blocks: u64,
        mem: &mut M,
        fx: &mut Effects,
    ) {
        let Some(buf) = mem.alloc(blocks as u32) else { return };
        rec.buf = Some(buf);
        rec.read_len = blocks;
        rec.out = true;
        self.submit(fx, DiskKind::Read, at, &[Part::Buf { buf, first: 0, blocks: blocks as u32 }], Owner::Recovery);
    }

    /// Asks for what the current step needs; the walk goes on in `on_recovery_done`.
    fn step_recovery<M: Memory>(&mut self, rec: &mut Recovery, mem: &mut M, fx: &mut Effects) {
        match rec.step {
            Step::Superblocks => self.read_for_recovery(rec, penstock_wire::BlockAddr(rec.slot), 1, mem, fx),
            Step::Directory => self.read_for_recovery(rec, self.extent_block(rec.extent, 0), EXTENT_BLOCKS, mem, fx),
            Step::Walk | Step::Scan => {
                let missing = loop {
                    let result = if rec.step == Step::Walk { self.walk(rec) } else { self.scan(rec) };
                    match result {
                        Err(missing) => break missing,
                        Ok(()) if rec.step == Step::Rewriting => {
                            self.finish_walk(rec, mem, fx);
                            return;
                        }
                        Ok(()) => {}
                    }
                };
                let ring = self.stream.ring_blocks();
                let len = if missing.0 < rec.fine_below { 1 } else { CHUNK.min(ring - missing.0) };
                self.read_for_recovery(rec, self.config.geometry.ring_start.plus(missing.0), len, mem, fx);
            }
            Step::Rewriting | Step::Opening => self.begin_stream(rec, mem, fx),
        }
    }

    pub(crate) fn on_recovery_done<M: Memory>(&mut self, ok: bool, mem: &mut M, fx: &mut Effects) {
        let mut rec = self.recovery.take().expect("recovery is under way");
        rec.out = false;
        if rec.step == Step::Rewriting {
            self.on_rewrite_done(&mut rec, ok, mem, fx);
            if self.stage == Stage::Opening {
                self.recovery = Some(rec);
            }
            return;
        }
        let buf = rec.buf.take().expect("recovery reads into its buffer");
        match rec.step {
            Step::Superblocks => self.on_superblock(&mut rec, ok.then(|| &mem.bytes(buf)[..BLOCK]), fx),
            Step::Directory => self.on_directory(&mut rec, ok.then(|| &mem.bytes(buf)[..penstock_wire::EXTENT]), fx),
            Step::Walk | Step::Scan => {
                let len = rec.read_len as usize * BLOCK;
                if ok {
                    rec.tries = 0;
                    rec.report.bytes += len as u64;
                    rec.window.extend_from_slice(&mem.bytes(buf)[..len]);
                } else if rec.read_len > 1 {
                    rec.fine_below = rec.ring_end() + rec.read_len;
                } else if rec.tries < READ_TRIES {
                    // In the newest batch a bad block passes for a tear, which drops what was acknowledged: ask again.
                    rec.tries += 1;
                } else {
                    // An unreadable block is one whose bytes are wrong; what that means is judged like any rot.
                    rec.tries = 0;
                    rec.unreadable.push(rec.ring_end());
                    let filled = rec.window.len() + BLOCK;
                    rec.window.resize(filled, 0);
                }
            }
            Step::Rewriting | Step::Opening => {}
        }
        mem.free(buf);
        if self.stage == Stage::Opening {
            self.recovery = Some(rec);
        }
    }

    fn on_superblock(&mut self, rec: &mut Recovery, bytes: Option<&[u8]>, fx: &mut Effects) {
        match bytes.map(Superblock::decode) {
            Some(Ok(superblock)) => rec.supers.push(superblock),
            Some(Err(error)) => rec.super_error = Some(error),
            None => {}
        }
        rec.slot += 1;
        if rec.slot < u64::from(Geometry::SUPERBLOCK_BLOCKS) {
            return;
        }
        let newest = rec
            .supers
            .iter()
            .filter(|sb| sb.incarnation == self.config.incarnation && sb.store == self.config.store)
            .max_by_key(|sb| sb.write_count);
        let Some(superblock) = newest.copied() else {
            let error = match rec.supers.first() {
                Some(other) => OpenError::OtherLife { found: other.incarnation, expected: self.config.incarnation },
                None => rec.super_error.clone().map_or(OpenError::ReadFailed(0), OpenError::NoSuperblock),
            };
            self.open_failed(error, fx);
            return;
        };
        rec.superblock = Some(superblock);
        self.checkpoint.count = superblock.checkpoint;
        self.checkpoint.write_count = superblock.write_count;
        rec.seq = superblock.log_seq;
        rec.covered = Seq(superblock.log_seq.0 - 1);
        self.index.any_order();
        rec.pos = superblock.log_at;
        rec.generation = superblock.log_generation;
        rec.extent = superblock.directory[0];
        rec.step = if superblock.checkpoint == 0 { Step::Walk } else { Step::Directory };
        if rec.step == Step::Directory {
            self.check_chain(rec, &superblock, fx);
        }
    }

    /// Where a chain begins is known to the superblock alone.
    fn check_chain(&mut self, rec: &mut Recovery, superblock: &Superblock, fx: &mut Effects) {
        let (found, limit) = (u64::from(rec.extent), self.space.extents());
        if found >= limit {
            self.other_chain(rec, superblock, DecodeError::Limit { what: "first extent of the directory", found, limit }, fx);
        }
    }

    fn on_directory(&mut self, rec: &mut Recovery, bytes: Option<&[u8]>, fx: &mut Effects) {
        let superblock = rec.superblock();
        match self.take_part(rec, &superblock, bytes) {
            Ok(false) => {}
            Ok(true) => match self.load_directory(rec, &superblock) {
                Ok(()) => rec.step = Step::Walk,
                Err(error) => self.other_chain(rec, &superblock, error, fx),
            },
            Err(error) => self.other_chain(rec, &superblock, error, fx),
        }
    }

    fn other_chain(&mut self, rec: &mut Recovery, superblock: &Superblock, error: DecodeError, fx: &mut Effects) {
        if rec.chain == 1 {
            self.open_failed(OpenError::DirectoryLost { checkpoint: superblock.checkpoint, error }, fx);
            return;
        }
        rec.chain = 1;
        rec.part = 0;
        rec.extent = superblock.directory[1];
        rec.bytes.clear();
        self.check_chain(rec, superblock, fx);
    }

    /// Takes one part of a chain; true when it was the last.
    fn take_part(&self, rec: &mut Recovery, superblock: &Superblock, bytes: Option<&[u8]>) -> Result<bool, DecodeError> {
        let bytes = bytes.ok_or(DecodeError::Value { what: "read of a directory part", found: u64::from(rec.extent) })?;
        let (part, payload) = DirectoryPart::decode(bytes)?;
        let expected = (self.config.incarnation, self.config.store, superblock.checkpoint, rec.part);
        let found = (part.incarnation, part.store, part.checkpoint, part.part);
        if found != expected {
            return Err(DecodeError::Mismatch { what: "directory part", found: format!("{found:?}"), expected: format!("{expected:?}") });
        }
        rec.bytes.extend_from_slice(payload);
        if rec.part == 0 {
            rec.chains = Default::default();
            rec.version = part.version;
        } else if rec.version != part.version {
            return Err(DecodeError::Version { what: "directory part", found: part.version, known: rec.version });
        }
        rec.chains[rec.chain].push(rec.extent);
        rec.chains[1 - rec.chain].push(part.twin);
        rec.part += 1;
        if rec.part < superblock.directory_parts {
            if u64::from(part.next) >= self.space.extents() {
                return Err(DecodeError::Limit { what: "next directory part", found: u64::from(part.next), limit: self.space.extents() });
            }
            rec.extent = part.next;
            return Ok(false);
        }
        Ok(true)
    }

    fn load_directory(&mut self, rec: &mut Recovery, superblock: &Superblock) -> Result<(), DecodeError> {
        let crc = penstock_wire::crc32c(&rec.bytes);
        if crc != superblock.directory_crc || rec.bytes.len() as u64 != superblock.directory_len {
            return Err(DecodeError::Checksum { what: "directory", found: superblock.directory_crc, computed: crc });
        }
        let directory = Directory::decode(&rec.bytes, rec.version, self.space.extents())?;
        for chain in 0..2 {
            self.checkpoint.chains[chain] = rec.chains[chain].iter().map(|extent| ExtentNo(*extent)).collect();
        }
        let chains: Vec<ExtentNo> = self.checkpoint.chain_extents().collect();
        let pages = |row: &ReplicaRow| {
            row.frozen.iter().map(|frozen| &frozen.pages).chain([&row.pages]).flatten().map(|page| SlotNo(page.slot)).collect::<Vec<_>>()
        };
        let slots = directory.replicas.iter().flat_map(pages);
        self.space.load(&directory.taken, &chains, slots).map_err(|extent| DecodeError::Value {
            what: "extent of the checkpoint (used twice or not taken)",
            found: u64::from(extent.0),
        })?;
        for row in directory.replicas {
            if let Some(walked) = Walked::of_row(&row).filter(|_| !row.deleting) {
                rec.walked.insert(row.no, walked);
            }
            self.drain.deletions += u32::from(row.deleting);
            self.map.add(Box::new(Replica {
                no: ReplicaNo(row.no),
                live: Layer::of_rows(row.layer, &row.pages),
                frozen: row.frozen.into_iter().map(Frozen::of_row).collect(),
                since: row.since,
                origin: row.origin.map(|(no, layer)| LayerKey { replica: ReplicaNo(no), layer: LayerNo(layer) }),
                freezing: 0,
                limit_blocks: row.shape.blocks,
                shape: row.shape,
                deleting: row.deleting,
                term: row.term,
                proposed: row.applied,
                applied: row.applied,
                undrained: 0,
                member: None,
                guard: Guard::of(row.reservations),
            }));
        }
        self.map.reserve_numbers(directory.next_replica);
        rec.covered = directory.covered.max(rec.covered);
        Ok(())
    }

    fn is_ours(&self, rec: &Recovery, header: &Header) -> bool {
        header.incarnation == self.config.incarnation && header.store == self.config.store && header.generation >= rec.generation
    }

    /// One batch forward. `Ok` leaves the step changed when the walk cannot simply go on.
    fn walk(&mut self, rec: &mut Recovery) -> Result<(), Missing> {
        let ring = self.stream.ring_blocks();
        let superblock = rec.superblock();
        for wrapped in [false, true] {
            if !wrapped && rec.not_here {
                continue;
            }
            rec.not_here = wrapped;
            let at = rec.pos.0 % ring;
            let pos = match wrapped {
                false => rec.pos,
                true if at == 0 => break,
                true => RingPos(rec.pos.0 + ring - at),
            };
            let phys = pos.0 % ring;
            let (seq, tail) = (rec.seq, superblock.log_at.0);
            if pos.0 >= tail + ring {
                break;
            }
            let room = (ring - phys).min(tail + ring - pos.0);
            let incarnation = self.config.incarnation;
            let head = rec.peek(phys, room.min(2))?;
            let Ok(batch) = Batch::decode(head) else {
                let trace = Batch::is_hinted(head, incarnation, seq, pos);
                rec.trace |= trace || rec.unreadable.contains(&phys);
                continue;
            };
            let (header, head_blocks, blocks) = (batch.header, batch.header_blocks, batch.blocks());
            let section = batch.own.to_vec();
            if header.seq != seq || header.at != pos || blocks > room || !self.is_ours(rec, &header) {
                continue;
            }
            let Some(entries) = self.believable(rec, &section, header.payload_blocks) else {
                rec.trace = true;
                continue;
            };
            let payload_at = phys + u64::from(head_blocks);
            let payload = rec.peek(phys, blocks)?;
            let bad = bad_payload(&payload[head_blocks as usize * BLOCK..], &entries);
            // What is known durable needs no look ahead: each is as long as the log, and many may have rotted.
            let is_proven = rec.durable_to >= seq && !self.canary(Canary::RotIsTear);
            if !bad.is_empty() && !rec.whole_header && !is_proven {
                // Judged by what comes after it.
                rec.pos = pos;
                rec.whole_header = true;
                rec.bad_entries = Some(entries);
                rec.not_here = false;
                rec.scanned = 0;
                rec.found.clear();
                rec.step = Step::Scan;
                return Ok(());
            }
            (rec.whole_header, rec.not_here, rec.bad_entries) = (false, false, None);
            let prev = Prev { seq, at: pos, header_blocks: head_blocks, payload_blocks: header.payload_blocks };
            self.redo(rec, prev, header.generation, entries, payload_at as u32, &bad);
            rec.durable_to = rec.durable_to.max(header.durable_to);
            rec.rewrite.walked(seq, pos, blocks as u32);
            rec.rewrite.proven(rec.durable_to);
            rec.before = Some((prev, section));
            return Ok(());
        }
        (rec.whole_header, rec.not_here) = (false, false);
        rec.scanned = 0;
        rec.found.clear();
        rec.step = Step::Scan;
        Ok(())
    }

    /// Looks past a bad record for headers that know it durable, then judges it.
    fn scan(&mut self, rec: &mut Recovery) -> Result<(), Missing> {
        let ring = self.stream.ring_blocks();
        let tail = rec.superblock().log_at.0;
        let far = LOOK_AHEAD.min((tail + ring).saturating_sub(rec.pos.0));
        while rec.scanned < far {
            let pos = rec.pos.0 + rec.scanned;
            let phys = pos % ring;
            let (seq, from) = (rec.seq, rec.pos);
            let bytes = rec.peek(phys, (ring - phys).min(2))?;
            if Batch::looks_like(bytes)
                && let Ok(batch) = Batch::decode(bytes)
            {
                let header = batch.header;
                let (section, prev_section) = (batch.own.to_vec(), batch.prev.to_vec());
                // A batch takes a block or more, so no more of them fit before it than blocks.
                let fits = header.seq > seq && header.at > from && header.seq.0 - seq.0 <= pos - from.0;
                if fits && header.at.0 == pos && self.is_ours(rec, &header) {
                    rec.found.push(Found { header, section, prev_section });
                }
            }
            rec.scanned += 1;
        }
        self.judge(rec)
    }

    fn judge(&mut self, rec: &mut Recovery) -> Result<(), Missing> {
        let ring = self.stream.ring_blocks();
        // Several generations ahead: the newest one is the log, what is older was cut away by it.
        let newest = rec.found.iter().map(|found| found.header.generation).max();
        let known_durable = rec.found.iter().map(|found| found.header.durable_to).max().unwrap_or_default().max(rec.durable_to);
        // Proven it is even when the walk never gets as far as the record that says so.
        rec.durable_to = known_durable;
        let durable = if self.canary(Canary::TornIsCorruption) {
            !rec.found.is_empty()
        } else if self.canary(Canary::RotIsTear) {
            false
        } else {
            known_durable >= rec.seq
        };
        if !durable {
            // What is dropped here may have been opened before: the next generation is above that one too.
            rec.generation = rec.generation.max(newest.unwrap_or_default());
            rec.doubt_what_is_cut();
            rec.report.dropped_batches += u64::from(rec.whole_header || !rec.found.is_empty()) + rec.found.len() as u64;
            rec.step = Step::Rewriting;
            return Ok(());
        }
        if rec.whole_header {
            // `walk` redoes it, its bad blocks as lost.
            rec.step = Step::Walk;
            return Ok(());
        }
        let next =
            rec.found.iter().find(|found| found.header.seq == rec.seq.next() && found.header.prev.is_some_and(|prev| prev.seq == rec.seq));
        if let Some(found) = next {
            let prev = found.header.prev.expect("just seen");
            let generation = found.header.generation;
            let section = found.prev_section.clone();
            let phys = prev.at.0 % ring;
            let payload_at = phys + u64::from(prev.header_blocks);
            let end = prev.at.0 + u64::from(prev.header_blocks + prev.payload_blocks);
            let sane = prev.at >= rec.pos && end <= found.header.at.0 && payload_at + u64::from(prev.payload_blocks) <= ring;
            if let (true, Some(entries)) = (sane, self.believable(rec, &section, prev.payload_blocks)) {
                let bad = if prev.payload_blocks == 0 {
                    Vec::new()
                } else {
                    bad_payload(rec.peek(payload_at, u64::from(prev.payload_blocks))?, &entries)
                };
                rec.report.repaired_headers += 1;
                // Its own generation is not known: that of the one before it is the most that is safe to ask of those after.
                self.redo(rec, prev, generation.min(rec.generation.max(Generation(1))), entries, payload_at as u32, &bad);
                rec.before = Some((prev, section));
                rec.step = Step::Walk;
                return Ok(());
            }
        }
        // Neither copy: skip to the first batch after it that can be read.
        let first = rec.found.iter().filter(|found| Some(found.header.generation) == newest).min_by_key(|found| found.header.seq);
        let first = first.map(|found| found.header).expect("something said that it was durable");
        // What the checkpoint covers is lost to those who lag alone.
        let lost = first.seq.0 - first.seq.0.min(rec.seq.0.max(rec.covered.0 + 1));
        rec.report.lost_batches += lost;
        rec.log_lost |= lost > 0;
        rec.walked.values_mut().for_each(|walked| walked.lost_batches(lost == 0));
        rec.trace = false;
        for _ in rec.seq.0..first.seq.0 {
            rec.places.push_back(rec.pos);
        }
        rec.seq = first.seq;
        rec.pos = first.at;
        rec.step = Step::Walk;
        Ok(())
    }

    /// A batch's entries, if they are such as a store writes: the numbers of replicas are given one after the
    /// other, at most one in a batch that is lost.
    fn believable(&self, rec: &Recovery, section: &[u8], payload_blocks: u32) -> Option<Vec<Entry>> {
        let entries = decode_section(section, payload_blocks).ok()?;
        let mut next = u64::from(self.map.next_no()) + rec.report.lost_batches;
        for entry in entries.iter().filter(|entry| entry.replica != EVERY_MEMBER) {
            if u64::from(entry.replica) > next || entry.replica >= REPLICA_NO_LIMIT {
                return None;
            }
            next += u64::from(entry.ops.iter().any(|op| matches!(op, Op::Create(_))));
        }
        Some(entries)
    }

    /// Makes a batch take effect once more. `bad` are the payload blocks that are lost.
    fn redo(&mut self, rec: &mut Recovery, place: Prev, generation: Generation, entries: Vec<Entry>, payload_at: u32, bad: &[u32]) {
        rec.report.batches += 1;
        let seq = place.seq;
        if seq <= rec.covered && rec.superblock.as_ref().is_some_and(|superblock| generation > superblock.generation) {
            // The log was cut below what the checkpoint covers, and goes on since: its numbers stand for other batches from here on.
            rec.covered = Seq(seq.0 - 1);
        }
        self.drain.unsaved |= !entries.is_empty() && seq > rec.covered;
        let mut at = 0;
        for entry in entries {
            rec.report.entries += 1;
            let blocks: u32 = entry.ops.iter().map(Op::payload_blocks).sum();
            let bad: Vec<u32> = bad.iter().filter(|block| (at..at + blocks).contains(*block)).map(|block| block - at).collect();
            if !rec.walk_entry(&entry, seq, payload_at + at, bad.clone()) && seq > rec.covered {
                rec.report.lost_blocks += bad.len() as u64;
                if entry.ops.iter().any(|op| matches!(op, Op::Delete)) {
                    rec.walked.remove(&entry.replica);
                }
                self.redo_entry(seq, entry, payload_at + at, &bad);
            }
            at += blocks;
        }
        rec.trace = false;
        while rec.places.len() as u64 <= seq.0 - rec.superblock().log_seq.0 {
            rec.places.push_back(place.at);
        }
        rec.generation = rec.generation.max(generation);
        rec.seq = seq.next();
        rec.pos = RingPos(place.at.0 + u64::from(place.header_blocks + place.payload_blocks));
    }

    /// An entry of a volume with one replica, or a birth or end. `bad`: blocks of its payload that are lost.
    fn redo_entry(&mut self, seq: Seq, entry: Entry, payload_at: u32, bad: &[u32]) {
        let mut block_at = 0u32;
        let no = ReplicaNo(entry.replica);
        if let Some(replica) = self.map.get_mut(no) {
            replica.applied = replica.applied.max(entry.index);
            replica.proposed = replica.proposed.max(entry.index);
            replica.term = replica.term.max(entry.term);
        }
        for op in entry.ops {
            match op {
                Op::Write { block, crcs } => {
                    for (i, crc) in crcs.iter().enumerate() {
                        let at = block_at + i as u32;
                        let version = if bad.contains(&at) { Version::Lost } else { Version::Log { at: payload_at + at, crc: *crc } };
                        self.redo_block(no, block + i as u64, Slot { seq, version }, entry.index);
                    }
                    block_at += crcs.len() as u32;
                }
                Op::Zero { block, count } => self.redo_zero(no, block, u64::from(count), seq, entry.index),
                Op::Create(shape) => {
                    // Numbers are never given again: what the checkpoint knew of and does not list had come and gone.
                    if no.0 >= self.map.next_no() {
                        self.add_replica(no, *shape);
                    }
                }
                Op::Delete => self.delete_replica(no),
                Op::Resize { blocks } => self.redo_resize(no, blocks, seq, entry.index),
                Op::Reserve(state) => self.apply_reserve(no, *state),
                Op::Snapshot { blocks, shape } => self.map.freeze(no, *shape, blocks, entry.index),
                Op::Unsnapshot(id) => self.apply_unsnapshot(no, id, seq),
                // Where what it stood on is gone, so is the clone, by a later entry.
                Op::Origin { segment, snapshot } => self.map.stand_on(no, segment, snapshot),
                // Of members of groups: `rejoin` has taken them.
                Op::Members(_) => {}
                own => debug_assert!(own.is_own(), "{own:?} is never redone"),
            }
        }
    }

    pub(crate) fn redo_block(&mut self, no: ReplicaNo, block: u64, slot: Slot, index: RaftIndex) {
        let Some(replica) = self.map.live(no) else { return };
        if block >= replica.shape.blocks && block >= penstock_wire::VOLUME_BLOCKS_MAX {
            return;
        }
        self.fall_if_told(block, 1);
        let id = self.put_slot(self.map.layer_at(no, index.0), block, slot, index.0);
        let group = self.index.group_mut(id);
        if !group.promised {
            group.promised = true;
            self.space.promise_again();
        }
    }

    pub(crate) fn redo_zero(&mut self, no: ReplicaNo, block: u64, blocks: u64, seq: Seq, index: RaftIndex) {
        let mut promises = self.promise_zeros_again(no, block, block + blocks, index.0);
        self.apply_zero(no, block, blocks, seq, index.0, &mut promises);
        self.give_up_promises(promises);
    }

    pub(crate) fn redo_resize(&mut self, no: ReplicaNo, blocks: u64, seq: Seq, index: RaftIndex) {
        let mut promises = self.promise_zeros_again(no, blocks, u64::MAX, index.0);
        self.resize_replica(no, blocks, seq, index.0, &mut promises);
        self.give_up_promises(promises);
    }

    fn finish_walk<M: Memory>(&mut self, rec: &mut Recovery, mem: &mut M, fx: &mut Effects) {
        let superblock = rec.superblock();
        let generation = Generation(rec.newest_generation().0 + 1);
        self.rejoin(rec);
        self.map.redone(Seq(rec.seq.0 - 1));
        self.count_merges();
        self.report = RecoveryReport { generation: generation.0, ..rec.report };
        self.index.put_in_order();
        self.stream.resume(superblock.log_seq, std::mem::take(&mut rec.places), rec.seq, rec.pos, superblock.log_at, generation);
        self.stream.proven = rec.durable_to.max(Seq(superblock.log_seq.0 - 1));
        self.stream.found_generation = superblock.log_generation;
        rec.rewrite.proven(self.stream.proven);
        rec.window = Vec::new();
        let lost = (rec.log_lost && !self.config.accept_lost_log).then_some(FenceReason::LogLost);
        if let Some(reason) = self.config.fenced.or(lost) {
            if lost.is_some() {
                fx.list.push(Effect::Notice(Notice::Fenced(reason)));
            }
            self.serve_fenced(reason, fx);
            return;
        }
        self.begin_stream(rec, mem, fx);
    }

    /// A fenced drive gets no barrier, so what no record knows durable may be gone tomorrow: nobody may see it today.
    fn serve_fenced(&mut self, reason: FenceReason, fx: &mut Effects) {
        // No record of this opening stays for sure: a node that wrote it down would not know its own drive again.
        self.report.generation = self.stream.generation.0 - 1;
        for (no, hidden) in self.index.hide_after(self.stream.proven) {
            self.map.undrained(no, -hidden);
        }
        self.serve(Stage::Fenced(reason), fx);
    }

    /// Rewrites what is not proven, then writes the Open batch; goes on each turn while memory is short.
    fn begin_stream<M: Memory>(&mut self, rec: &mut Recovery, mem: &mut M, fx: &mut Effects) {
        if let Some(reason) = self.config.fenced {
            // The drive was fenced meanwhile.
            self.serve_fenced(reason, fx);
            return;
        }
        if rec.step == Step::Rewriting && !self.step_rewrite(rec, mem, fx) {
            return;
        }
        rec.step = Step::Opening;
        let before = rec.before.as_ref().map(|(prev, section)| (*prev, &section[..]));
        rec.out = self.write_open(before, &rec.doubts, rec.vouched, mem, fx);
    }

    /// The Open batch is durable.
    pub(crate) fn opened(&mut self, fx: &mut Effects) {
        self.recovery = None;
        match self.config.fenced {
            // Another store's barrier failed meanwhile: what ours says it saved may be forgotten.
            Some(reason) => self.serve_fenced(reason, fx),
            None => self.serve(Stage::Serving, fx),
        }
    }

    fn serve(&mut self, stage: Stage, fx: &mut Effects) {
        // A stop that was ordered meanwhile takes hold now.
        self.stage = if self.stop_order.is_some() && stage == Stage::Serving { Stage::Stopping } else { stage };
        for replica in self.map.iter().filter(|replica| !replica.deleting) {
            fx.list.push(Effect::Notice(Notice::Replica { replica: replica.no, shape: Box::new(replica.shape.clone()), gone: false }));
        }
        self.enlist_members(stage, fx);
        fx.list.push(Effect::Notice(Notice::Serving(self.report)));
    }
}

/// Payload blocks that do not match their checksums, counted over the batch.
pub(crate) fn bad_payload(payload: &[u8], entries: &[Entry]) -> Vec<u32> {
    let crcs = entries.iter().flat_map(|entry| &entry.ops).map(Op::crcs);
    let mut bad = Vec::new();
    for (i, (crc, block)) in crcs.flatten().zip(payload.chunks_exact(BLOCK)).enumerate() {
        if penstock_wire::crc32c(block) != *crc {
            bad.push(i as u32);
        }
    }
    bad
}
