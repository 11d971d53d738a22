//! A device in memory with a clock of its own, to drive loads in tests.

use std::collections::VecDeque;

use crate::load::Load;
use crate::session::{Outcome, Submission};
use crate::units::Nanos;
use crate::workload::OpKind;

/// Completes operations in order, each `latency` after its start, one turn of the loop per `turn` nanoseconds.
pub struct FakeDevice {
    pub bytes: Vec<u8>,
    pub now: Nanos,
    pub latency: Nanos,
    pub turn: Nanos,
    /// Nothing completes in this span of time.
    pub stall: Option<(Nanos, Nanos)>,
    /// Reads that cover this 512-byte block fail.
    pub fail_reads_of: Option<u64>,
    /// The n-th write (from 0) is acknowledged and dropped.
    pub drop_write: Option<u64>,
    /// The n-th write (from 0) fails half done.
    pub fail_write: Option<u64>,
    /// More than this many at once are refused.
    pub queue: usize,
    /// After this many completions the device falls silent.
    pub dies_after: Option<u64>,
    pub completed: u64,
    pub writes: u64,
    pub pending: VecDeque<(Nanos, Submission, Vec<u8>)>,
}

impl FakeDevice {
    pub fn new(bytes: usize) -> Self {
        Self {
            bytes: vec![0; bytes],
            now: Nanos(0),
            latency: Nanos(10_000),
            turn: Nanos(1_000),
            stall: None,
            fail_reads_of: None,
            drop_write: None,
            fail_write: None,
            queue: usize::MAX,
            dies_after: None,
            completed: 0,
            writes: 0,
            pending: VecDeque::new(),
        }
    }

    /// Drives a load to its end, or for 10 s of its own clock.
    pub fn drive(&mut self, load: &mut impl Load) {
        let deadline = self.now.plus(Nanos(10_000_000_000));
        load.begin(self.now);
        while !load.is_finished() && self.now < deadline {
            load.turn(self.now);
            while let Some(submission) = load.next(self.now) {
                if self.pending.len() >= self.queue {
                    load.refused(submission.tag, self.now);
                    break;
                }
                let mut buffer = vec![0; submission.op.length.0 as usize];
                load.prepare(submission.tag, &mut buffer);
                self.pending.push_back((self.now.plus(self.latency), submission, buffer));
            }
            self.now = self.now.plus(self.turn);
            self.complete(load);
        }
    }

    fn complete(&mut self, load: &mut impl Load) {
        if self.stall.is_some_and(|(from, until)| (from..until).contains(&self.now)) {
            return;
        }
        while self.pending.front().is_some_and(|(due, ..)| *due <= self.now) {
            if self.dies_after.is_some_and(|limit| self.completed >= limit) {
                return;
            }
            self.completed += 1;
            let (_, submission, mut buffer) = self.pending.pop_front().expect("looked at");
            let outcome = self.carry_out(&submission, &mut buffer);
            load.done(submission.tag, &outcome, self.now, &buffer);
        }
    }

    fn carry_out(&mut self, submission: &Submission, buffer: &mut [u8]) -> Outcome {
        let op = submission.op;
        let at = op.offset.0 as usize..op.end() as usize;
        match op.kind {
            OpKind::Read => {
                let covers = |block: u64| op.offset.0 / 512 <= block && block < op.end().div_ceil(512);
                if self.fail_reads_of.is_some_and(covers) {
                    return Outcome::Failed("unrecovered read error".to_owned());
                }
                buffer.copy_from_slice(&self.bytes[at]);
            }
            OpKind::Write => {
                let number = self.writes;
                self.writes += 1;
                if self.drop_write == Some(number) {
                    return Outcome::Ok;
                }
                if self.fail_write == Some(number) {
                    let half = buffer.len() / 2;
                    self.bytes[at.start..at.start + half].copy_from_slice(&buffer[..half]);
                    return Outcome::Failed("write fault".to_owned());
                }
                self.bytes[at].copy_from_slice(buffer);
            }
            OpKind::Trim => self.bytes[at].fill(0),
        }
        Outcome::Ok
    }
}
