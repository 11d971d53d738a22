//! Device commands as the drive model carries them out: which memory goes to which block, and what holds while one is out.
//!
//! Not here: when a command completes and whether it fails (`world`), and what a drive keeps (`drive`).

use std::rc::Rc;

use penstock_engine::{DiskKind, DiskOp, Part};
use penstock_wire::label::Geometry;

use crate::drive::{Drive, Moment, Page, WHOLE};
use crate::memory::{Hold, SimMemory};
use crate::rng::Rng;
use crate::stamp::BLOCK;

/// A device command that is out.
#[derive(Debug)]
pub struct Out {
    pub op: DiskOp,
    pub parts: Vec<Part>,
    /// The drive's moment at submission: what a flush covers.
    pub upto: Moment,
    /// For reads: what the blocks held at submission.
    then: Vec<Option<Rc<Page>>>,
    /// It has been carried out; only the news is under way.
    pub carried_out: bool,
}

fn how(kind: DiskKind) -> Hold {
    if kind == DiskKind::Write { Hold::Source } else { Hold::Target }
}

fn range(op: &DiskOp) -> std::ops::Range<u64> {
    op.at.0..op.at.0 + u64::from(op.blocks)
}

fn overlap(a: &std::ops::Range<u64>, b: &std::ops::Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Whether any of the range lies in the ring.
pub fn in_ring(g: &Geometry, blocks: &std::ops::Range<u64>) -> bool {
    overlap(blocks, &(g.ring_start.0..g.ring_start.0 + g.ring_blocks))
}

impl Out {
    /// Takes a command, with its memory. Panics on any that breaks the port's rules.
    pub fn take<'a>(
        op: DiskOp,
        parts: &[Part],
        share: &penstock_wire::label::Share,
        geometry: &Geometry,
        others: impl Iterator<Item = &'a Out>,
        mem: &mut SimMemory,
        drive: &Drive,
    ) -> Out {
        let mine = range(&op);
        if op.kind == DiskKind::Flush {
            assert!(op.blocks == 0 && parts.is_empty(), "a flush with blocks or memory: {op:?}");
        } else {
            assert!(op.blocks > 0, "an empty command: {op:?}");
            assert!(mine.end <= share.blocks, "{op:?} leaves its store of {} blocks", share.blocks);
            let named: u32 = parts.iter().map(|p| p.blocks()).sum();
            assert_eq!(named, op.blocks, "{op:?} names memory for {named} blocks");
        }
        for other in others {
            assert_ne!(other.op.id, op.id, "the id of a command that is out");
            let theirs = range(&other.op);
            if op.kind == DiskKind::Flush || other.op.kind == DiskKind::Flush || !overlap(&mine, &theirs) {
                continue;
            }
            match (op.kind, other.op.kind) {
                (DiskKind::Write, DiskKind::Write) => panic!("two writes to the same blocks are out: {op:?} and {:?}", other.op),
                (DiskKind::Write, DiskKind::Read) | (DiskKind::Read, DiskKind::Write) => {
                    assert!(
                        !in_ring(geometry, &mine),
                        "a read and a write of the same blocks of the log are out: {op:?} and {:?}",
                        other.op
                    );
                }
                _ => {}
            }
        }
        for part in parts {
            mem.hold(*part, how(op.kind));
        }
        let then = match op.kind {
            DiskKind::Read => mine.map(|b| drive.look(share.start.0 + b).cloned()).collect(),
            _ => Vec::new(),
        };
        Out { op, parts: parts.to_vec(), upto: drive.now(), then, carried_out: false }
    }

    pub fn blocks(&self) -> std::ops::Range<u64> {
        range(&self.op)
    }

    /// The device lets go of the memory.
    pub fn release(&self, mem: &mut SimMemory) {
        for part in &self.parts {
            mem.release(*part, how(self.op.kind));
        }
    }

    fn each_block(&self) -> impl Iterator<Item = (u64, Part, u32)> {
        let places = self.parts.iter().flat_map(|p| (0..p.blocks()).map(move |i| (*p, i)));
        self.blocks().zip(places).map(|(at, (p, i))| (at, p, i))
    }

    /// What a write writes first, so many blocks at most.
    pub fn first_bytes(&self, blocks: usize, mem: &SimMemory) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (_, part, i) in self.each_block().take(blocks) {
            let mut page: Page = [0; BLOCK];
            mem.device_read(part, i, &mut page);
            bytes.extend(page);
        }
        bytes
    }

    /// A write takes effect; `mask` says for each of its blocks which sectors do.
    pub fn land(&self, start: u64, drive: &mut Drive, mem: &SimMemory, mut mask: impl FnMut(usize) -> u8) {
        for (n, (at, part, i)) in self.each_block().enumerate() {
            let mask = mask(n);
            if mask == 0 {
                continue;
            }
            let mut page: Page = [0; BLOCK];
            mem.device_read(part, i, &mut page);
            drive.write(start + at, Rc::new(page), mask);
        }
    }

    pub fn land_whole(&self, start: u64, drive: &mut Drive, mem: &SimMemory) {
        self.land(start, drive, mem, |_| WHOLE);
    }

    /// A write that was out when the process or the power died: none, all, some blocks or some sectors of it.
    pub fn land_partly(&self, start: u64, drive: &mut Drive, mem: &SimMemory, rng: &mut Rng) -> Landing {
        match rng.below(5) {
            0 => Landing::None,
            1 => {
                self.land_whole(start, drive, mem);
                Landing::Whole
            }
            2 => {
                let cut = rng.below(u64::from(self.op.blocks)) as usize;
                let sectors = (1u16 << rng.below(9)) as u8;
                self.land(start, drive, mem, |n| match n.cmp(&cut) {
                    std::cmp::Ordering::Less => WHOLE,
                    std::cmp::Ordering::Equal => sectors.wrapping_sub(1),
                    std::cmp::Ordering::Greater => 0,
                });
                Landing::Torn
            }
            3 => {
                self.land(start, drive, mem, |_| if rng.one_in(2) { WHOLE } else { 0 });
                Landing::Torn
            }
            _ => {
                self.land(start, drive, mem, |_| if rng.one_in(3) { WHOLE } else { rng.draw() as u8 });
                Landing::Torn
            }
        }
    }

    /// A read fills its memory: with what each block holds now, held at submission, or a mix where that changed.
    pub fn fill(&self, start: u64, drive: &Drive, mem: &mut SimMemory, rng: &mut Rng) {
        let zero = &[0; BLOCK];
        for (n, (at, part, i)) in self.each_block().enumerate() {
            let (then, now) = (self.then[n].as_ref(), drive.look(start + at));
            let same = match (then, now) {
                (Some(a), Some(b)) => Rc::ptr_eq(a, b),
                (a, b) => a.is_none() && b.is_none(),
            };
            let (then, now) = (then.map_or(zero, |p| p), now.map_or(zero, |p| p));
            if same || rng.one_in(3) {
                mem.device_fill(part, i, now);
            } else if rng.one_in(2) {
                mem.device_fill(part, i, then);
            } else {
                let mut mixed = *now;
                let cut = rng.below(BLOCK as u64 / 512) as usize * 512;
                mixed[..cut].copy_from_slice(&then[..cut]);
                mem.device_fill(part, i, &mixed);
            }
        }
    }

    /// A read that failed leaves rubbish.
    pub fn fill_with_rubbish(&self, mem: &mut SimMemory) {
        for (_, part, i) in self.each_block() {
            mem.device_fill(part, i, &[0xee; BLOCK]);
        }
    }
}

/// What was left of a write that was cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Landing {
    None,
    Whole,
    Torn,
}
