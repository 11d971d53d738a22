//! A node in this process, without doors: verified writes and reads through the engine on a malloc drive, and what they cost.

mod load;

use std::sync::mpsc;

use penstock_node::inproc::{self, Activity, HostOp, LendBuf, LocalDone, Span, Volume};

const BLOCK: u64 = 4096;
const DEPTH: usize = 16;
/// Enough to fill the oplog several times over, so that the drain works too.
const WRITES: u64 = 20_000;
const BLOCKS: u64 = 4096;

/// What the load found, for the test to judge.
#[derive(Debug, Default)]
struct Outcome {
    failed: u64,
    wrong: u64,
    miscompares: u64,
    checked: u64,
    out_of_range: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Write,
    Read,
    Edges,
}

struct Load {
    volume: Volume,
    step: Step,
    started: u64,
    finished: u64,
    free: Vec<LendBuf>,
    /// What each block was last written with, and by which write in flight.
    expected: Vec<u64>,
    done: Vec<LocalDone>,
    outcome: Outcome,
    report: mpsc::Sender<Outcome>,
}

/// The block that write `n` goes to: each in turn in a shuffled order, so that no two in flight meet.
fn place(n: u64) -> u64 {
    n * 1663 % BLOCKS
}

fn fill(buf: &mut LendBuf, block: u64, stamp: u64) {
    for (at, word) in buf.bytes_mut()[..BLOCK as usize].chunks_exact_mut(16).enumerate() {
        word[..8].copy_from_slice(&(block << 16 | at as u64).to_le_bytes());
        word[8..].copy_from_slice(&stamp.to_le_bytes());
    }
}

fn matches(buf: &LendBuf, block: u64, stamp: u64) -> bool {
    let mut words = buf.bytes()[..BLOCK as usize].chunks_exact(16).enumerate();
    words.all(|(at, word)| word[..8] == (block << 16 | at as u64).to_le_bytes() && word[8..] == stamp.to_le_bytes())
}

impl Load {
    fn turn(&mut self) -> Activity {
        self.volume.reap(&mut self.done);
        for done in std::mem::take(&mut self.done) {
            self.finished += 1;
            self.outcome.failed += u64::from(!done.status.is_success() && self.step != Step::Edges);
            if let Some(buf) = done.buf {
                if self.step == Step::Read {
                    let block = done.tag;
                    self.outcome.checked += 1;
                    self.outcome.wrong += u64::from(!matches(&buf, block, self.expected[block as usize]));
                }
                self.free.push(buf);
            }
            if self.step == Step::Edges {
                match done.tag {
                    0 => self.outcome.miscompares += u64::from(done.status == inproc::NvmeStatus::COMPARE_FAILURE),
                    _ => self.outcome.out_of_range = done.status == inproc::NvmeStatus::LBA_OUT_OF_RANGE,
                }
            }
        }
        match self.step {
            Step::Write => {
                while self.started < WRITES
                    && let Some(mut buf) = self.free.pop()
                {
                    let block = place(self.started);
                    self.started += 1;
                    self.expected[block as usize] = self.started;
                    fill(&mut buf, block, self.started);
                    self.volume.submit(HostOp::Write(Span { offset: block * BLOCK, len: BLOCK }), Some(buf), self.started);
                }
                self.next(WRITES, Step::Read);
            }
            Step::Read => {
                while self.started < BLOCKS
                    && let Some(buf) = self.free.pop()
                {
                    let block = self.started;
                    self.started += 1;
                    self.volume.submit(HostOp::Read(Span { offset: block * BLOCK, len: BLOCK }), Some(buf), block);
                }
                self.next(BLOCKS, Step::Edges);
            }
            Step::Edges => {
                if self.started == 0 {
                    self.started = 2;
                    // Compares with what is not there.
                    let wrong = inproc::buffers(1, 2 * BLOCK as usize).expect("memory").remove(0);
                    self.volume.submit(HostOp::CompareWrite(Span { offset: 0, len: BLOCK }), Some(wrong), 0);
                    let buf = self.free.pop();
                    self.volume.submit(HostOp::Read(Span { offset: self.volume.size, len: BLOCK }), buf, 1);
                }
                if self.finished == 2 {
                    self.finished = 0;
                    self.free.clear();
                    let _ = self.report.send(std::mem::take(&mut self.outcome));
                    inproc::stop();
                    // Dropped by the end of the core's thread.
                    return Activity::Idle;
                }
            }
        }
        Activity::Busy
    }

    fn next(&mut self, count: u64, step: Step) {
        if self.finished == count {
            (self.step, self.started, self.finished) = (step, 0, 0);
        }
    }
}

#[test]
fn volume_in_process_keeps_what_was_written() {
    let (report, outcome) = mpsc::channel();
    load::run("malloc:m0?size=128MiB", BLOCKS * BLOCK, 16 << 20, move |volume| {
        let free = inproc::buffers(DEPTH, BLOCK as usize).expect("memory");
        let mut load = Load {
            volume,
            step: Step::Write,
            started: 0,
            finished: 0,
            free,
            expected: vec![0; BLOCKS as usize],
            done: Vec::new(),
            outcome: Outcome::default(),
            report,
        };
        move || load.turn()
    });
    let outcome = outcome.try_recv().expect("the load ran to its end");
    assert_eq!((outcome.failed, outcome.wrong, outcome.checked), (0, 0, BLOCKS), "{outcome:?}");
    assert_eq!((outcome.miscompares, outcome.out_of_range), (1, true), "{outcome:?}");
}
