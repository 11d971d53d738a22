//! One load as a state machine: it is asked what to submit and told what completed; it never touches a device or clock.
//!
//! ```text
//! while let Some(op) = session.next(now):     adapter submits, or gives it back with `refused`
//! session.done(tag, outcome, now, data)       for each completion
//! session.turn(now)                           once per turn of the loop
//! until session.phase() == Finished
//! ```
//!
//! The same machine is driven by SPDK, and by a fake device in the tests below. Deliberately not here: buffers (the
//! adapter owns one per [`Tag`]) and printing.

use crate::content;
use crate::expect::{Expectations, Fault, Verdict, Version};
use crate::journal::{JournalError, JournalWriter, Record};
use crate::load::Load;
use crate::pace::{Pace, Pacer};
use crate::sample::Sample;
use crate::units::{BlockIndex, ByteCount, Generation, Nanos};
use crate::workload::{Generator, Op, OpKind, Workload, WorkloadError};

/// A place in the queue, 0 to depth − 1; the adapter keeps one buffer for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// The status as text, for counting.
    Failed(String),
}

/// Where a load stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Warmup,
    Measure,
    /// No more starts; waiting for what is outstanding.
    Drain,
    Finished,
}

/// When a load ends and what it does about errors.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// Not counted.
    pub warmup: Nanos,
    pub duration: Option<Nanos>,
    pub operations: Option<u64>,
    pub stop_on_error: bool,
}

/// Checks every read of the run, and keeps the table for later.
pub struct Verifier {
    pub seed: u64,
    /// Bytes of one verify unit.
    pub unit: u32,
    pub expectations: Expectations,
    pub newest: Generation,
    pub journal: Option<JournalWriter>,
}

/// A block that was not as promised.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BadBlock {
    pub block: BlockIndex,
    #[serde(flatten)]
    pub fault: Fault,
}

/// Bad blocks listed one by one; more are only counted.
pub const BAD_LISTED_MAX: usize = 32;

/// Bad blocks found: the first few, and how many.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct BadBlocks {
    pub count: u64,
    pub listed: Vec<BadBlock>,
}

impl BadBlocks {
    pub fn add(&mut self, block: BlockIndex, fault: Fault) {
        self.count += 1;
        if self.listed.len() < BAD_LISTED_MAX {
            self.listed.push(BadBlock { block, fault });
        }
    }
}

struct Flight {
    op: Op,
    intended: Nanos,
    generation: Generation,
    is_counted: bool,
}

/// Next to submit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Submission {
    pub tag: Tag,
    pub op: Op,
}

/// One load.
pub struct Session {
    generator: Generator,
    pacer: Option<Pacer>,
    pace: Pace,
    seed: u64,
    ending: Ending,
    verifier: Option<Verifier>,
    phase: Phase,
    measure_from: Nanos,
    free: Vec<Tag>,
    flights: Vec<Option<Flight>>,
    /// Drawn but not started: it overlaps one in flight, or the target refused it.
    held: Option<(Op, Nanos)>,
    outstanding: u32,
    counted: u64,
    last_done: Nanos,
    next_hand_over: Nanos,
    sample: Sample,
    bad: BadBlocks,
    failure: Option<JournalError>,
}

const HAND_OVER_EVERY: Nanos = Nanos(1_000_000);

impl Session {
    /// For a device of `device` bytes in logical blocks of `unit` bytes.
    pub fn new(
        workload: &Workload,
        pace: Pace,
        ending: Ending,
        verifier: Option<Verifier>,
        device: ByteCount,
        unit: u32,
    ) -> Result<Self, WorkloadError> {
        Ok(Self {
            generator: Generator::new(workload, device, unit)?,
            pacer: None,
            pace,
            seed: workload.seed,
            ending,
            verifier,
            phase: Phase::Warmup,
            measure_from: Nanos(0),
            free: (0..workload.depth).rev().map(Tag).collect(),
            flights: (0..workload.depth).map(|_| None).collect(),
            held: None,
            outstanding: 0,
            counted: 0,
            last_done: Nanos(0),
            next_hand_over: Nanos(0),
            sample: Sample::default(),
            bad: BadBlocks::default(),
            failure: None,
        })
    }

    /// Starts the clock; call once before [`Self::next`].
    pub fn begin(&mut self, now: Nanos) {
        assert!(self.pacer.is_none(), "begun twice");
        self.pacer = Some(Pacer::new(self.pace, self.seed, now));
        self.last_done = now;
        self.measure_from = now.plus(self.ending.warmup);
        self.turn(now);
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// True when the place in the queue holds an operation.
    pub fn is_outstanding(&self, tag: Tag) -> bool {
        self.flights[tag.0 as usize].is_some()
    }

    /// Once per turn of the loop, and before the first operation: phases change here.
    pub fn turn(&mut self, now: Nanos) {
        if self.phase == Phase::Warmup && now >= self.measure_from {
            self.phase = Phase::Measure;
            self.measure_from = now;
            self.sample.from = now;
            self.last_done = now;
        }
        if self.phase == Phase::Measure {
            let over_time = self.ending.duration.is_some_and(|span| now.since(self.measure_from) >= span);
            let over_count = self.ending.operations.is_some_and(|limit| self.counted >= limit);
            if over_time || over_count {
                self.stop(now);
            }
        }
        if self.phase == Phase::Drain && self.outstanding == 0 {
            self.phase = Phase::Finished;
        }
        if now >= self.next_hand_over {
            self.next_hand_over = now.plus(HAND_OVER_EVERY);
            if let Some(journal) = self.verifier.as_mut().and_then(|verifier| verifier.journal.as_mut())
                && let Err(error) = journal.hand_over()
            {
                self.fail(error, now);
            }
        }
    }

    /// No more starts; what is outstanding is still waited for. The window ends here.
    pub fn stop(&mut self, now: Nanos) {
        if matches!(self.phase, Phase::Warmup | Phase::Measure) {
            if self.phase == Phase::Warmup {
                self.sample.from = now;
            }
            self.phase = Phase::Drain;
            self.sample.until = now;
            self.sample.overdue = self.pacer.as_ref().map_or(0, |pacer| pacer.overdue(now));
            if self.outstanding > 0 {
                self.sample.gap(now.since(self.last_done), now);
            }
            self.held = None;
        }
    }

    fn fail(&mut self, error: JournalError, now: Nanos) {
        self.failure.get_or_insert(error);
        self.stop(now);
    }

    fn overlaps_flight(&self, op: &Op) -> bool {
        self.flights.iter().flatten().any(|flight| (op.kind.mutates() || flight.op.kind.mutates()) && op.overlaps(&flight.op))
    }

    /// The next operation to submit now, or `None` when there is none until a completion or a later time.
    pub fn next(&mut self, now: Nanos) -> Option<Submission> {
        if !matches!(self.phase, Phase::Warmup | Phase::Measure) {
            return None;
        }
        if self.ending.operations.is_some_and(|limit| self.counted >= limit) {
            return None;
        }
        let tag = *self.free.last()?;
        let (op, intended) = match self.held.take() {
            Some(held) => held,
            None => {
                let intended = self.pacer.as_mut().expect("begun").take_due(now)?;
                (self.generator.next_op(), intended)
            }
        };
        if self.verifier.is_some() && self.overlaps_flight(&op) {
            // Two overlapping mutations in flight would leave no single right answer.
            self.sample.held_back += 1;
            self.held = Some((op, intended));
            return None;
        }
        self.free.pop();
        let generation = self.issue(&op, now);
        if self.outstanding == 0 {
            // An idle queue is no gap in acknowledgements.
            self.last_done = self.last_done.max(now);
        }
        self.outstanding += 1;
        let is_counted = self.phase == Phase::Measure;
        self.counted += u64::from(is_counted);
        self.flights[tag.0 as usize] = Some(Flight { op, intended, generation, is_counted });
        Some(Submission { tag, op })
    }

    fn issue(&mut self, op: &Op, now: Nanos) -> Generation {
        let Some(verifier) = self.verifier.as_mut().filter(|_| op.kind.mutates()) else {
            return Generation(0);
        };
        verifier.newest = Generation(verifier.newest.0 + 1);
        let generation = verifier.newest;
        let is_trim = op.kind == OpKind::Trim;
        let version = if is_trim { Version::Trimmed(generation) } else { Version::Written(generation) };
        for block in blocks(op, verifier.unit) {
            verifier.expectations.issued(block, version);
        }
        let first = BlockIndex(op.offset.0 / u64::from(verifier.unit));
        let count = (op.length.0 / u64::from(verifier.unit)) as u32;
        self.note(Record::Issued { generation, first, count, is_trim }, now);
        generation
    }

    fn note(&mut self, record: Record, now: Nanos) {
        let journal = self.verifier.as_mut().and_then(|verifier| verifier.journal.as_mut());
        if let Some(Err(error)) = journal.map(|journal| journal.push(record)) {
            self.fail(error, now);
        }
    }

    /// Puts into `buffer` what the write at `tag` is to carry. A load without verification writes whatever the buffer
    /// held, so the adapter fills its buffers with non-zero bytes once.
    pub fn prepare(&self, tag: Tag, buffer: &mut [u8]) {
        let flight = self.flights[tag.0 as usize].as_ref().expect("the tag is outstanding");
        let Some(verifier) = self.verifier.as_ref().filter(|_| flight.op.kind == OpKind::Write) else { return };
        let units = buffer[..flight.op.length.0 as usize].chunks_exact_mut(verifier.unit as usize);
        for (unit, block) in units.zip(blocks(&flight.op, verifier.unit)) {
            content::fill(unit, verifier.seed, block, flight.generation);
        }
    }

    /// The target's queue was full: the operation will be given out again with its first intended start.
    pub fn refused(&mut self, tag: Tag, now: Nanos) {
        let flight = self.take_flight(tag);
        if flight.op.kind.mutates() {
            self.failed_mutation(&flight, now);
        }
        self.counted -= u64::from(flight.is_counted);
        self.sample.resubmitted += 1;
        self.held = Some((flight.op, flight.intended));
    }

    fn take_flight(&mut self, tag: Tag) -> Flight {
        let flight = self.flights[tag.0 as usize].take().expect("the tag is outstanding");
        self.free.push(tag);
        self.outstanding -= 1;
        flight
    }

    fn failed_mutation(&mut self, flight: &Flight, now: Nanos) {
        if let Some(verifier) = &mut self.verifier {
            for block in blocks(&flight.op, verifier.unit) {
                verifier.expectations.in_doubt(block);
            }
            self.note(Record::Failed { generation: flight.generation }, now);
        }
    }

    /// An operation ended; `data` is what a read brought.
    pub fn done(&mut self, tag: Tag, outcome: &Outcome, now: Nanos, data: &[u8]) {
        let flight = self.take_flight(tag);
        let kind = flight.op.kind;
        match outcome {
            Outcome::Ok => {
                if self.verifier.is_some() {
                    self.acknowledged(&flight, now, data);
                }
                let gap = now.since(self.last_done);
                self.last_done = now;
                // While draining too: a target that comes back after the window closed ends its gap here.
                if matches!(self.phase, Phase::Measure | Phase::Drain) {
                    self.sample.gap(gap, now);
                }
                // What was started in the window counts, whenever it ends: leaving out the late ones would hide a
                // stall, and those of the warm-up that end in it are left out in turn.
                if flight.is_counted {
                    self.sample.kind_mut(kind).done(flight.op.length.0, now.since(flight.intended));
                }
            }
            Outcome::Failed(text) => {
                self.sample.kind_mut(kind).errors += 1;
                *self.sample.error_texts.entry(format!("{}: {text}", kind.name())).or_insert(0) += 1;
                if kind.mutates() {
                    self.failed_mutation(&flight, now);
                }
                if self.ending.stop_on_error {
                    self.stop(now);
                }
            }
        }
    }

    fn acknowledged(&mut self, flight: &Flight, now: Nanos, data: &[u8]) {
        let verifier = self.verifier.as_mut().expect("called for verified loads");
        if flight.op.kind.mutates() {
            for block in blocks(&flight.op, verifier.unit) {
                verifier.expectations.acknowledged(block);
            }
            self.note(Record::Acknowledged { generation: flight.generation }, now);
            return;
        }
        let units = data[..flight.op.length.0 as usize].chunks_exact(verifier.unit as usize);
        for (unit, block) in units.zip(blocks(&flight.op, verifier.unit)) {
            let found = content::examine(unit, verifier.seed, block);
            self.sample.verified_blocks += 1;
            if let Verdict::Bad(fault) = verifier.expectations.judge(block, found) {
                self.bad.add(block, fault);
            }
        }
        if self.bad.count > 0 && self.ending.stop_on_error {
            self.stop(now);
        }
    }

    /// Ends without waiting: the target is dead. What is outstanding is in doubt from now on.
    pub fn abandon(&mut self, now: Nanos) {
        self.stop(now);
        self.phase = Phase::Finished;
        if let Some(verifier) = &mut self.verifier {
            verifier.expectations.all_in_doubt();
        }
    }

    /// Swaps the current window for an empty one.
    pub fn take_window(&mut self, mut empty: Sample, now: Nanos) -> Sample {
        empty.clear();
        if self.phase == Phase::Measure {
            empty.from = now;
            self.sample.until = now;
            self.sample.overdue = self.pacer.as_ref().map_or(0, |pacer| pacer.overdue(now));
        }
        std::mem::replace(&mut self.sample, empty)
    }

    /// Time since the last completion while something is outstanding.
    pub fn silence(&self, now: Nanos) -> Nanos {
        if self.outstanding == 0 { Nanos(0) } else { now.since(self.last_done) }
    }

    /// What is left when the load has finished.
    pub fn finish(self) -> Finished {
        assert_eq!(self.phase, Phase::Finished, "the load still runs");
        Finished { last_window: self.sample, verifier: self.verifier, bad: self.bad, failure: self.failure }
    }
}

/// What a finished load leaves behind.
pub struct Finished {
    pub last_window: Sample,
    pub verifier: Option<Verifier>,
    pub bad: BadBlocks,
    /// The journal could not be written.
    pub failure: Option<JournalError>,
}

impl Load for Session {
    fn begin(&mut self, now: Nanos) {
        Self::begin(self, now);
    }
    fn turn(&mut self, now: Nanos) {
        Self::turn(self, now);
    }
    fn next(&mut self, now: Nanos) -> Option<Submission> {
        Self::next(self, now)
    }
    fn prepare(&self, tag: Tag, buffer: &mut [u8]) {
        Self::prepare(self, tag, buffer);
    }
    fn refused(&mut self, tag: Tag, now: Nanos) {
        Self::refused(self, tag, now);
    }
    fn done(&mut self, tag: Tag, outcome: &Outcome, now: Nanos, data: &[u8]) {
        Self::done(self, tag, outcome, now, data);
    }
    fn stop(&mut self, now: Nanos) {
        Self::stop(self, now);
    }
    fn abandon(&mut self, now: Nanos) {
        Self::abandon(self, now);
    }
    fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }
    fn is_draining(&self) -> bool {
        self.phase == Phase::Drain
    }
    fn silence(&self, now: Nanos) -> Nanos {
        Self::silence(self, now)
    }
    fn take_window(&mut self, empty: Sample, now: Nanos) -> Sample {
        Self::take_window(self, empty, now)
    }
}

/// The verify units that an operation covers.
pub fn blocks(op: &Op, unit: u32) -> impl Iterator<Item = BlockIndex> + use<> {
    let unit = u64::from(unit);
    (op.offset.0 / unit..op.end() / unit).map(BlockIndex)
}

#[cfg(test)]
mod tests;
