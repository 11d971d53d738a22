//! Which blocks of a ring a later record vouches for.
//!
//! With one copy, damage to the newest record cannot be told from a tear: nothing on the drive says that it was whole.
//! As soon as a later record that says so (`durable_to`) is itself durable, it can. Only blocks that are vouched for may
//! be damaged on purpose, or the simulator would ask for the impossible. Counts the same way as a store does: a write is
//! known durable when it and all before it have completed and a flush submitted afterwards has. A store may know less (it hears
//! of things later, and one flush of its is not another), so no record is taken to vouch for more than it says.
//! Not here: what else a record says.

use std::collections::BTreeMap;

use penstock_engine::DiskId;
use penstock_wire::Seq;

use crate::drive::Moment;

/// A write to the ring, in the order of submission over the store's whole life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Nth(u64);

#[derive(Debug)]
struct RingWrite {
    nth: Nth,
    /// Everything before this was known durable when it was submitted.
    vouches_below: Nth,
    completed: Option<Moment>,
}

#[derive(Debug)]
pub struct Evidence {
    next: Nth,
    /// In order of submission, those not known durable yet.
    open: Vec<(DiskId, RingWrite)>,
    /// Those below are known durable to the store.
    known_below: Nth,
    /// `known_below` when this turn began.
    staged_below: Nth,
    /// `known_below` when the turn before this one began: what this turn's records say at least.
    told_below: Nth,
    /// Those below are vouched for by a durable record.
    vouched_below: Nth,
    /// Who wrote each block of the ring last (blocks of the store).
    writer: BTreeMap<u64, Nth>,
    /// The newest write of each sequence.
    by_seq: BTreeMap<Seq, Nth>,
}

impl Default for Evidence {
    fn default() -> Self {
        Evidence {
            next: Nth(1),
            open: Vec::new(),
            known_below: Nth(1),
            staged_below: Nth(1),
            told_below: Nth(1),
            vouched_below: Nth(1),
            writer: BTreeMap::new(),
            by_seq: BTreeMap::new(),
        }
    }
}

impl Evidence {
    pub fn turn_begins(&mut self) {
        self.told_below = self.staged_below;
        self.staged_below = self.known_below;
    }

    /// A record of sequence `seq` goes out that says that all up to `durable_to` are durable.
    pub fn submitted(&mut self, id: DiskId, blocks: std::ops::Range<u64>, seq: Seq, durable_to: Seq) {
        let nth = self.next;
        self.next.0 += 1;
        self.writer.extend(blocks.map(|b| (b, nth)));
        self.by_seq.insert(seq, nth);
        let said_below = self.by_seq.get(&durable_to).map_or(Nth(1), |nth| Nth(nth.0 + 1));
        self.open.push((id, RingWrite { nth, vouches_below: self.told_below.min(said_below), completed: None }));
    }

    /// A write to the ring completed well; `needs_flush` is false for drives whose completion is durable.
    pub fn completed(&mut self, id: DiskId, at: Moment, needs_flush: bool) {
        if let Some((_, w)) = self.open.iter_mut().find(|(d, w)| *d == id && w.completed.is_none()) {
            w.completed = Some(if needs_flush { at } else { Moment(0) });
        }
        if !needs_flush {
            self.flushed(Moment(0));
        }
    }

    /// A flush submitted at `upto` completed well.
    pub fn flushed(&mut self, upto: Moment) {
        while let Some((_, w)) = self.open.first() {
            match w.completed {
                Some(at) if at <= upto => {
                    self.known_below = Nth(w.nth.0 + 1);
                    self.vouched_below = self.vouched_below.max(w.vouches_below);
                    self.open.remove(0);
                }
                _ => break,
            }
        }
    }

    /// The store's process ended, or a barrier failed: what it had out is nobody's promise, and what it alone knew is forgotten.
    pub fn died(&mut self) {
        self.open.clear();
        self.known_below = self.vouched_below;
        self.staged_below = self.vouched_below;
        self.told_below = self.vouched_below;
    }

    /// The store has recovered: it has judged everything in the ring, and what it writes from now on says so.
    pub fn recovered(&mut self) {
        self.known_below = self.next;
    }

    pub fn is_vouched_for(&self, block: u64) -> bool {
        self.writer.get(&block).is_some_and(|nth| *nth < self.vouched_below)
    }

    /// Blocks of the newest record that the store knows durable, if no durable record vouches for it.
    pub fn newest_known(&self) -> Vec<u64> {
        let Some(newest) = self.known_below.0.checked_sub(1).map(Nth).filter(|nth| *nth >= self.vouched_below) else { return Vec::new() };
        self.writer.iter().filter(|(_, nth)| **nth == newest).map(|(block, _)| *block).collect()
    }

    /// Whether the block is not part of a record that is still waiting for its evidence.
    pub fn is_free_or_vouched_for(&self, block: u64) -> bool {
        self.writer.get(&block).is_none_or(|nth| *nth < self.vouched_below)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_vouched_for_once_a_later_one_that_knew_is_durable() {
        let mut e = Evidence::default();
        e.turn_begins();
        e.submitted(DiskId(1), 10..12, Seq(1), Seq(0));
        e.completed(DiskId(1), Moment(5), true);
        e.flushed(Moment(5));
        assert!(!e.is_vouched_for(10), "nothing on the drive says so");
        e.submitted(DiskId(2), 12..14, Seq(2), Seq(1));
        e.turn_begins();
        e.turn_begins();
        e.submitted(DiskId(3), 14..15, Seq(3), Seq(2));
        e.completed(DiskId(2), Moment(6), true);
        e.flushed(Moment(6));
        assert!(!e.is_vouched_for(10), "the second was written in the same turn and may not have known");
        e.completed(DiskId(3), Moment(7), true);
        e.flushed(Moment(7));
        assert!(e.is_vouched_for(10) && e.is_vouched_for(11));
        assert!(!e.is_vouched_for(12));
    }

    #[test]
    fn what_only_the_dead_process_knew_is_not_vouched_for_by_the_next() {
        let mut e = Evidence::default();
        e.submitted(DiskId(1), 10..11, Seq(1), Seq(0));
        e.completed(DiskId(1), Moment(1), true);
        e.flushed(Moment(1));
        e.turn_begins();
        e.turn_begins();
        e.died();
        e.submitted(DiskId(2), 11..12, Seq(2), Seq(1));
        e.completed(DiskId(2), Moment(2), true);
        e.flushed(Moment(2));
        assert!(!e.is_vouched_for(10));
    }

    #[test]
    fn record_behind_an_unfinished_one_is_not_known() {
        let mut e = Evidence::default();
        e.submitted(DiskId(1), 10..11, Seq(1), Seq(0));
        e.submitted(DiskId(2), 11..12, Seq(2), Seq(1));
        e.completed(DiskId(2), Moment(2), true);
        e.flushed(Moment(9));
        e.turn_begins();
        e.turn_begins();
        e.submitted(DiskId(3), 12..13, Seq(3), Seq(2));
        e.completed(DiskId(3), Moment(10), true);
        e.flushed(Moment(11));
        assert!(!e.is_vouched_for(11));
    }
}
