//! Reads back what a run left and compares every touched block with what was promised for it.
//!
//! Blocks next to each other are read together. Deliberately not here: how the promises were gathered
//! (see [`crate::expect`] and [`crate::journal`]).

use std::sync::Arc;

use serde::Serialize;

use crate::content::{self, Found};
use crate::expect::{Expectations, Fault, Verdict};
use crate::load::Load;
use crate::sample::Sample;
use crate::session::{BadBlocks, Outcome, Submission, Tag, blocks};
use crate::units::{BlockIndex, ByteCount, ByteOffset, Generation, Nanos};
use crate::workload::{Op, OpKind};

/// Reads that fail are tried this often in all.
pub const READ_ATTEMPTS_MAX: u32 = 3;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Blocks compared.
    pub blocks: u64,
    /// Blocks that hold just what was acknowledged last.
    pub acknowledged: u64,
    /// Blocks in doubt that hold the older version, and the newest one.
    pub in_doubt_old: u64,
    pub in_doubt_new: u64,
    /// Blocks newer than the end of a journal whose writer was killed.
    pub after_journal: u64,
    pub untouched: u64,
    /// Blocks that could not be read, with the first status.
    pub unreadable: u64,
    pub first_read_error: Option<String>,
    pub bad: BadBlocks,
}

impl VerifyReport {
    /// True when every acknowledged block was read and holds what was acknowledged.
    pub fn is_good(&self) -> bool {
        self.bad.count == 0 && self.unreadable == 0
    }
}

/// What to compare with.
#[derive(Clone)]
pub struct Promises {
    pub seed: u64,
    pub unit: u32,
    pub expectations: Arc<Expectations>,
    /// The newest generation on record, where later ones may exist: the journal's writer was killed.
    pub open_end: Option<Generation>,
}

/// One pass over all touched blocks.
pub struct VerifyPass {
    promises: Promises,
    todo: Vec<Op>,
    free: Vec<Tag>,
    flights: Vec<Option<(Op, u32, Nanos)>>,
    again: Vec<(Op, u32)>,
    outstanding: u32,
    last_done: Nanos,
    is_stopped: bool,
    report: VerifyReport,
    sample: Sample,
}

/// Neighbouring blocks gathered into reads of at most `read_bytes`.
fn gather(touched: &[BlockIndex], unit: u32, read_bytes: ByteCount) -> Vec<Op> {
    let unit = u64::from(unit);
    let mut ops: Vec<Op> = Vec::new();
    for block in touched {
        match ops.last_mut() {
            Some(op) if op.end() == block.0 * unit && op.length.0 + unit <= read_bytes.0 => op.length.0 += unit,
            _ => ops.push(Op { kind: OpKind::Read, offset: ByteOffset(block.0 * unit), length: ByteCount(unit) }),
        }
    }
    ops
}

impl VerifyPass {
    /// Reads of at most `read_bytes` (at least one unit), `depth` at a time.
    pub fn new(promises: Promises, read_bytes: ByteCount, depth: u32) -> Self {
        let mut todo = gather(&promises.expectations.touched(), promises.unit, read_bytes);
        todo.reverse(); // taken from the back, so ascending
        Self {
            promises,
            todo,
            free: (0..depth).rev().map(Tag).collect(),
            flights: (0..depth).map(|_| None).collect(),
            again: Vec::new(),
            outstanding: 0,
            last_done: Nanos(0),
            is_stopped: false,
            report: VerifyReport::default(),
            sample: Sample::default(),
        }
    }

    pub fn report(self) -> VerifyReport {
        self.report
    }

    fn compare(&mut self, op: &Op, data: &[u8]) {
        let Promises { seed, unit, expectations, open_end } = &self.promises.clone();
        let units = data[..op.length.0 as usize].chunks_exact(*unit as usize);
        for (bytes, block) in units.zip(blocks(op, *unit)) {
            let found = content::examine(bytes, *seed, block);
            let report = &mut self.report;
            report.blocks += 1;
            match expectations.judge(block, found) {
                Verdict::Acknowledged => report.acknowledged += 1,
                Verdict::EitherWay { is_new: true } => report.in_doubt_new += 1,
                Verdict::EitherWay { is_new: false } => report.in_doubt_old += 1,
                Verdict::Untouched => report.untouched += 1,
                Verdict::Bad(fault) => match (fault, found, *open_end) {
                    (Fault::Unexpected { .. }, Found::Written(generation), Some(newest)) if generation > newest => {
                        report.after_journal += 1;
                    }
                    _ => report.bad.add(block, fault),
                },
            }
        }
    }
}

impl Load for VerifyPass {
    fn begin(&mut self, now: Nanos) {
        self.last_done = now;
        self.sample.from = now;
    }

    fn turn(&mut self, _now: Nanos) {}

    fn next(&mut self, now: Nanos) -> Option<Submission> {
        if self.is_stopped {
            return None;
        }
        let tag = *self.free.last()?;
        let (op, attempts) = self.again.pop().or_else(|| self.todo.pop().map(|op| (op, 0)))?;
        self.free.pop();
        self.flights[tag.0 as usize] = Some((op, attempts + 1, now));
        if self.outstanding == 0 {
            self.last_done = now;
        }
        self.outstanding += 1;
        Some(Submission { tag, op })
    }

    fn prepare(&self, _tag: Tag, _buffer: &mut [u8]) {}

    fn refused(&mut self, tag: Tag, _now: Nanos) {
        let (op, attempts, _) = self.flights[tag.0 as usize].take().expect("the tag is outstanding");
        self.free.push(tag);
        self.outstanding -= 1;
        self.again.push((op, attempts - 1));
    }

    fn done(&mut self, tag: Tag, outcome: &Outcome, now: Nanos, data: &[u8]) {
        let (op, attempts, started) = self.flights[tag.0 as usize].take().expect("the tag is outstanding");
        self.free.push(tag);
        self.outstanding -= 1;
        self.last_done = now;
        match outcome {
            Outcome::Ok => {
                self.sample.kind_mut(OpKind::Read).done(op.length.0, now.since(started));
                self.compare(&op, data);
            }
            Outcome::Failed(_) if attempts < READ_ATTEMPTS_MAX => self.again.push((op, attempts)),
            // A read over many blocks that keeps failing is split, so that one bad block does not hide its neighbours.
            Outcome::Failed(_) if op.length.0 > u64::from(self.promises.unit) => {
                let unit = u64::from(self.promises.unit);
                self.again.extend(blocks(&op, self.promises.unit).map(|block| {
                    let offset = ByteOffset(block.0 * unit);
                    (Op { kind: OpKind::Read, offset, length: ByteCount(unit) }, READ_ATTEMPTS_MAX - 1)
                }));
            }
            Outcome::Failed(text) => {
                self.report.unreadable += 1;
                self.report.first_read_error.get_or_insert_with(|| text.clone());
            }
        }
    }

    fn stop(&mut self, now: Nanos) {
        if !self.is_stopped {
            self.is_stopped = true;
            self.sample.until = now;
            let unit = u64::from(self.promises.unit);
            let left = self.todo.drain(..).chain(self.again.drain(..).map(|(op, _)| op));
            let left: u64 = left.map(|op| op.length.0 / unit).sum();
            self.report.unreadable += left;
            if left > 0 {
                self.report.first_read_error.get_or_insert_with(|| "stopped before it was read".to_owned());
            }
        }
    }

    fn abandon(&mut self, now: Nanos) {
        self.stop(now);
        for (op, _, _) in self.flights.iter_mut().filter_map(Option::take) {
            self.report.unreadable += op.length.0 / u64::from(self.promises.unit);
            self.report.first_read_error.get_or_insert_with(|| "no answer".to_owned());
        }
        self.outstanding = 0;
    }

    fn is_finished(&self) -> bool {
        self.outstanding == 0 && self.todo.is_empty() && self.again.is_empty()
    }

    fn is_draining(&self) -> bool {
        self.is_stopped && self.outstanding > 0
    }

    fn silence(&self, now: Nanos) -> Nanos {
        if self.outstanding == 0 { Nanos(0) } else { now.since(self.last_done) }
    }

    fn take_window(&mut self, mut empty: Sample, now: Nanos) -> Sample {
        empty.clear();
        empty.from = now;
        self.sample.until = now;
        std::mem::replace(&mut self.sample, empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expect::{Initial, TrimReads, Version};
    use crate::fake::FakeDevice;

    const UNIT: u32 = 512;
    const SEED: u64 = 11;

    /// Blocks 0..4 and 8 acknowledged as generations 1..=5, block 20 in doubt (generation 6).
    fn promised() -> Expectations {
        let mut table = Expectations::new(Initial::Zero, TrimReads::Zero);
        for (number, block) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 8)] {
            table.issued(BlockIndex(block), Version::Written(Generation(number)));
            table.acknowledged(BlockIndex(block));
        }
        table.issued(BlockIndex(20), Version::Written(Generation(6)));
        table.all_in_doubt();
        table
    }

    fn device() -> FakeDevice {
        let mut device = FakeDevice::new(64 * 512);
        for (number, block) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 8)] {
            put(&mut device, block, number);
        }
        device
    }

    fn put(device: &mut FakeDevice, block: u64, number: u64) {
        let at = block as usize * 512;
        content::fill(&mut device.bytes[at..at + 512], SEED, BlockIndex(block), Generation(number));
    }

    fn verify(table: Expectations, device: &mut FakeDevice, open_end: Option<Generation>) -> VerifyReport {
        let promises = Promises { seed: SEED, unit: UNIT, expectations: Arc::new(table), open_end };
        let mut pass = VerifyPass::new(promises, ByteCount(1024), 2);
        device.drive(&mut pass);
        pass.report()
    }

    #[test]
    fn pass_over_a_sound_device_counts_every_block() {
        let report = verify(promised(), &mut device(), None);
        assert_eq!((report.blocks, report.acknowledged, report.in_doubt_old), (6, 5, 1));
        assert!(report.is_good());
    }

    #[test]
    fn pass_gathers_neighbours_up_to_the_read_size() {
        let ops = gather(&promised().touched(), UNIT, ByteCount(1024));
        let spans: Vec<(u64, u64)> = ops.iter().map(|op| (op.offset.0 / 512, op.length.0 / 512)).collect();
        assert_eq!(spans, [(0, 2), (2, 2), (8, 1), (20, 1)]);
    }

    #[test]
    fn pass_over_a_lost_write_says_which_block_lost_what() {
        let mut device = device();
        device.bytes[8 * 512..9 * 512].fill(0);
        let report = verify(promised(), &mut device, None);
        assert!(!report.is_good());
        assert_eq!(report.bad.listed[0].block, BlockIndex(8));
        assert_eq!(report.bad.listed[0].fault, Fault::Lost { expected: Generation(5), found: None });
    }

    #[test]
    fn block_newer_than_a_killed_writers_journal_is_counted_apart() {
        let mut device = device();
        put(&mut device, 8, 9);
        assert_eq!(verify(promised(), &mut device, Some(Generation(6))).after_journal, 1);
        assert_eq!(verify(promised(), &mut device, None).bad.count, 1);
    }

    #[test]
    fn unreadable_block_does_not_hide_its_neighbour() {
        let mut device = device();
        device.fail_reads_of = Some(1);
        let report = verify(promised(), &mut device, None);
        assert_eq!((report.unreadable, report.acknowledged), (1, 4));
        assert!(!report.is_good());
    }

    #[test]
    fn pass_abandoned_counts_the_rest_as_unreadable() {
        let promises = Promises { seed: SEED, unit: UNIT, expectations: Arc::new(promised()), open_end: None };
        let mut pass = VerifyPass::new(promises, ByteCount(1024), 2);
        pass.begin(Nanos(0));
        assert!(pass.next(Nanos(0)).is_some());
        pass.abandon(Nanos(1));
        assert!(pass.is_finished());
        assert_eq!(pass.report().unreadable, 6);
    }
}
