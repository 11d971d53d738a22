//! Plain reads and writes of a drive, one after another: for probing and formatting, before there is a store.

use std::collections::VecDeque;

use penstock_engine::{BufId, Memory, Part};
use penstock_wire::{BLOCK, BlockAddr};

use crate::disk::{Command, CoreDisks, DiskIndex};
use crate::memory::NodeMemory;

/// One step. Blocks are 4 KiB, from the drive's start; at most 256 at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Read {
        at: BlockAddr,
        blocks: u32,
    },
    /// Whole blocks.
    Write {
        at: BlockAddr,
        bytes: Vec<u8>,
    },
    Flush,
}

/// What the reads brought, in order; or which step failed.
pub type Outcome = Result<Vec<Vec<u8>>, String>;

pub struct Job {
    disk: DiskIndex,
    steps: VecDeque<Step>,
    out: Option<(Step, Option<BufId>)>,
    results: Vec<Vec<u8>>,
    done: Option<Box<dyn FnOnce(Outcome) + Send>>,
}

impl Job {
    /// `done` is called on the core, from inside the loop's turn: it may send messages and nothing more.
    pub fn new(disk: DiskIndex, steps: Vec<Step>, done: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self { disk, steps: steps.into(), out: None, results: Vec::new(), done: Some(Box::new(done)) }
    }

    /// Sends the next step; true when the job is over.
    pub fn advance(&mut self, token: u64, memory: &mut NodeMemory, disks: &mut CoreDisks) -> bool {
        let Some(step) = self.steps.pop_front() else {
            let results = std::mem::take(&mut self.results);
            self.finish(Ok(results));
            return true;
        };
        let blocks = match &step {
            Step::Read { blocks, .. } => *blocks,
            Step::Write { bytes, .. } => (bytes.len() / BLOCK) as u32,
            Step::Flush => 0,
        };
        let mut buf = None;
        if blocks > 0 {
            match memory.alloc(blocks) {
                Some(id) => buf = Some(id),
                None => {
                    self.finish(Err("memory is short; try again later".to_owned()));
                    return true;
                }
            }
        }
        let part = |buf| Part::Buf { buf, first: 0, blocks };
        match (&step, buf) {
            (Step::Read { at, .. }, Some(id)) => {
                let mut targets = disks.targets();
                targets.push(memory.lend_target(part(id)));
                disks.submit(self.disk, token, *at, u64::from(blocks), Command::Read(targets));
            }
            (Step::Write { at, bytes }, Some(id)) => {
                memory.bytes_mut(id).copy_from_slice(bytes);
                let mut sources = disks.sources();
                sources.push(memory.lend_source(part(id)));
                disks.submit(self.disk, token, *at, u64::from(blocks), Command::Write(sources));
            }
            (_, _) => disks.submit(self.disk, token, BlockAddr(0), 0, Command::Flush),
        }
        self.out = Some((step, buf));
        false
    }

    /// The step that was out has completed. True when the job is over.
    pub fn on_done(&mut self, ok: bool, token: u64, memory: &mut NodeMemory, disks: &mut CoreDisks) -> bool {
        let (step, buf) = self.out.take().expect("a step was out");
        if let Some(id) = buf {
            if ok && matches!(step, Step::Read { .. }) {
                self.results.push(memory.bytes(id).to_vec());
            }
            memory.free(id);
        }
        if !ok {
            let what = match step {
                Step::Read { at, blocks } => format!("the drive failed a read of {blocks} blocks at block {}", at.0),
                Step::Write { at, bytes } => format!("the drive failed a write of {} blocks at block {}", bytes.len() / BLOCK, at.0),
                Step::Flush => "the drive failed a flush".to_owned(),
            };
            self.finish(Err(what));
            return true;
        }
        self.advance(token, memory, disks)
    }

    fn finish(&mut self, outcome: Outcome) {
        if let Some(done) = self.done.take() {
            done(outcome);
        }
    }
}
