//! What each block may hold, from the writes and trims that were issued, acknowledged or failed.
//!
//! A block has one settled version, or several candidates: after a mutation that failed, or that was in flight when the
//! target died, it may hold the old version or the new one, and each is right. An acknowledged mutation leaves just
//! itself. Mutations of one block never overlap in time; the caller sees to that ([`crate::session`] holds them back).
//!
//! Deliberately not here: bytes (see [`crate::content`]) and files (see [`crate::journal`]).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::content::Found;
use crate::units::{BlockIndex, Generation};

/// What a block holds before anything was written in this run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initial {
    /// Anything: no claim is made about blocks that the run did not write.
    Unknown,
    /// Zeroes: a fresh thin volume.
    Zero,
}

/// What a trimmed block reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrimReads {
    Zero,
    /// Anything (NVMe DLFEAT 0).
    Unknown,
}

/// One version of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Initial,
    Written(Generation),
    Trimmed(Generation),
}

/// What was wrong with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "fault")]
pub enum Fault {
    /// Holds an older version than the one acknowledged, zeroes, or what was there before the run.
    Lost { expected: Generation, found: Option<Generation> },
    /// Holds a version that was never issued or is newer than allowed.
    Unexpected { found: Option<Generation> },
    /// Holds another block's data.
    Misplaced { claims: BlockIndex, generation: Generation },
    /// Its bytes do not belong together.
    Torn { claims: Generation, first_bad_byte: usize },
    /// Holds data of another writer where this run's are due.
    Foreign { expected: Option<Generation> },
}

/// The outcome of comparing one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// An acknowledged version, and the only right one.
    Acknowledged,
    /// One of several right ones; true when it is the newest of them.
    EitherWay {
        is_new: bool,
    },
    /// Never acknowledged to in this run and as it was initially.
    Untouched,
    Bad(Fault),
}

const TRIM_BIT: u64 = 1 << 63;
const PAGE_BLOCKS: u64 = 512;

#[derive(Default)]
struct Open {
    /// Versions that failed mutations may have left, oldest first.
    maybe: Vec<Version>,
    in_flight: Option<Version>,
}

/// The table of expectations.
pub struct Expectations {
    initial: Initial,
    trim_reads: TrimReads,
    pages: HashMap<u64, Box<[u64; PAGE_BLOCKS as usize]>>,
    open: HashMap<BlockIndex, Open>,
}

fn encode(version: Version) -> u64 {
    match version {
        Version::Initial => 0,
        Version::Written(generation) => generation.0,
        Version::Trimmed(generation) => generation.0 | TRIM_BIT,
    }
}

fn decode(code: u64) -> Version {
    match code {
        0 => Version::Initial,
        code if code & TRIM_BIT != 0 => Version::Trimmed(Generation(code & !TRIM_BIT)),
        code => Version::Written(Generation(code)),
    }
}

impl Expectations {
    pub fn new(initial: Initial, trim_reads: TrimReads) -> Self {
        Self { initial, trim_reads, pages: HashMap::new(), open: HashMap::new() }
    }

    fn settled(&self, block: BlockIndex) -> Version {
        let page = self.pages.get(&(block.0 / PAGE_BLOCKS));
        page.map_or(Version::Initial, |page| decode(page[(block.0 % PAGE_BLOCKS) as usize]))
    }

    fn settle(&mut self, block: BlockIndex, version: Version) {
        let page = self.pages.entry(block.0 / PAGE_BLOCKS).or_insert_with(|| Box::new([0; PAGE_BLOCKS as usize]));
        page[(block.0 % PAGE_BLOCKS) as usize] = encode(version);
    }

    /// A mutation was given to the target.
    ///
    /// # Panics
    /// If another mutation of the block is in flight.
    pub fn issued(&mut self, block: BlockIndex, version: Version) {
        let open = self.open.entry(block).or_default();
        assert!(open.in_flight.is_none(), "two mutations of {block:?} in flight");
        open.in_flight = Some(version);
    }

    /// The mutation in flight was acknowledged: the block holds it and nothing else.
    pub fn acknowledged(&mut self, block: BlockIndex) {
        let open = self.open.remove(&block).expect("a mutation was issued");
        let version = open.in_flight.expect("a mutation was in flight");
        self.settle(block, version);
    }

    /// The mutation in flight failed, or its fate is not known: old and new are both right from now on.
    pub fn in_doubt(&mut self, block: BlockIndex) {
        let open = self.open.get_mut(&block).expect("a mutation was issued");
        let version = open.in_flight.take().expect("a mutation was in flight");
        open.maybe.push(version);
    }

    /// Every mutation still in flight becomes one in doubt: the writer ends here.
    pub fn all_in_doubt(&mut self) {
        for open in self.open.values_mut() {
            open.maybe.extend(open.in_flight.take());
        }
    }

    /// True between a mutation's start and its end.
    pub fn is_in_flight(&self, block: BlockIndex) -> bool {
        self.open.get(&block).is_some_and(|open| open.in_flight.is_some())
    }

    /// Blocks for which several versions are right.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Blocks that were ever settled or are open, in ascending order.
    pub fn touched(&self) -> Vec<BlockIndex> {
        let mut blocks: Vec<BlockIndex> = self
            .pages
            .iter()
            .flat_map(|(page, codes)| {
                let codes = codes.iter().enumerate().filter(|(_, code)| **code != 0);
                codes.map(move |(index, _)| BlockIndex(page * PAGE_BLOCKS + index as u64))
            })
            .chain(self.open.keys().copied())
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    fn admits(&self, version: Version, found: Found) -> bool {
        match (version, found) {
            (Version::Initial, Found::Zero) => true,
            (Version::Initial, Found::Foreign) => self.initial == Initial::Unknown,
            (Version::Written(expected), Found::Written(generation)) => expected == generation,
            (Version::Trimmed(_), Found::Zero) => true,
            (Version::Trimmed(_), _) => self.trim_reads == TrimReads::Unknown,
            _ => false,
        }
    }

    /// Compares what a block was found to hold with what it may hold.
    pub fn judge(&self, block: BlockIndex, found: Found) -> Verdict {
        let settled = self.settled(block);
        let open = self.open.get(&block);
        let newer = open.into_iter().flat_map(|open| open.maybe.iter().chain(&open.in_flight));
        // Newest first: zeroes may be admitted by an old trim and by a new one.
        let newer: Vec<Version> = newer.copied().collect();
        if let Some(place) = newer.iter().rposition(|version| self.admits(*version, found)) {
            return Verdict::EitherWay { is_new: place + 1 == newer.len() };
        }
        if self.admits(settled, found) {
            return match (newer.is_empty(), settled) {
                (false, _) => Verdict::EitherWay { is_new: false },
                (true, Version::Initial) => Verdict::Untouched,
                (true, _) => Verdict::Acknowledged,
            };
        }
        Verdict::Bad(self.fault(settled, &newer, found))
    }

    fn fault(&self, settled: Version, newer: &[Version], found: Found) -> Fault {
        let expected = match settled {
            Version::Initial => None,
            Version::Written(generation) | Version::Trimmed(generation) => Some(generation),
        };
        match (found, expected) {
            (Found::Misplaced { claims, generation }, _) => Fault::Misplaced { claims, generation },
            (Found::Torn { claims, first_bad_byte }, _) => Fault::Torn { claims, first_bad_byte },
            (Found::Foreign, expected) => Fault::Foreign { expected },
            (Found::Zero, Some(expected)) => Fault::Lost { expected, found: None },
            (Found::Zero, None) => Fault::Unexpected { found: None },
            (Found::Written(generation), Some(expected)) if generation < expected => Fault::Lost { expected, found: Some(generation) },
            (Found::Written(generation), _) => {
                debug_assert!(!newer.contains(&Version::Written(generation)));
                Fault::Unexpected { found: Some(generation) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const B: BlockIndex = BlockIndex(700);

    fn generation(number: u64) -> Version {
        Version::Written(Generation(number))
    }

    fn found(number: u64) -> Found {
        Found::Written(Generation(number))
    }

    fn fresh() -> Expectations {
        Expectations::new(Initial::Zero, TrimReads::Zero)
    }

    fn wrote(table: &mut Expectations, number: u64) {
        table.issued(B, generation(number));
        table.acknowledged(B);
    }

    #[test]
    fn acknowledged_write_admits_itself_alone() {
        let mut table = fresh();
        wrote(&mut table, 1);
        wrote(&mut table, 2);
        assert_eq!(table.judge(B, found(2)), Verdict::Acknowledged);
        let lost = Fault::Lost { expected: Generation(2), found: Some(Generation(1)) };
        assert_eq!(table.judge(B, found(1)), Verdict::Bad(lost));
        let gone = Fault::Lost { expected: Generation(2), found: None };
        assert_eq!(table.judge(B, Found::Zero), Verdict::Bad(gone));
        assert_eq!(table.judge(B, found(3)), Verdict::Bad(Fault::Unexpected { found: Some(Generation(3)) }));
        let foreign = Fault::Foreign { expected: Some(Generation(2)) };
        assert_eq!(table.judge(B, Found::Foreign), Verdict::Bad(foreign));
    }

    #[test]
    fn write_in_flight_admits_old_and_new() {
        let mut table = fresh();
        wrote(&mut table, 1);
        table.issued(B, generation(2));
        table.all_in_doubt();
        assert_eq!(table.judge(B, found(1)), Verdict::EitherWay { is_new: false });
        assert_eq!(table.judge(B, found(2)), Verdict::EitherWay { is_new: true });
        assert!(matches!(table.judge(B, Found::Zero), Verdict::Bad(Fault::Lost { .. })));
    }

    #[test]
    fn failed_writes_pile_up_until_one_is_acknowledged() {
        let mut table = fresh();
        for number in [1, 2] {
            table.issued(B, generation(number));
            table.in_doubt(B);
        }
        for held in [Found::Zero, found(1), found(2)] {
            assert!(matches!(table.judge(B, held), Verdict::EitherWay { .. }), "{held:?}");
        }
        wrote(&mut table, 3);
        assert_eq!(table.open_count(), 0);
        assert!(matches!(table.judge(B, found(2)), Verdict::Bad(Fault::Lost { .. })));
    }

    #[test]
    fn untouched_block_follows_what_was_said_of_the_device() {
        assert_eq!(fresh().judge(B, Found::Zero), Verdict::Untouched);
        assert!(matches!(fresh().judge(B, Found::Foreign), Verdict::Bad(_)));
        let unknown = Expectations::new(Initial::Unknown, TrimReads::Zero);
        assert_eq!(unknown.judge(B, Found::Foreign), Verdict::Untouched);
        assert!(matches!(unknown.judge(B, found(1)), Verdict::Bad(Fault::Unexpected { .. })));
    }

    #[test]
    fn trimmed_block_reads_zero_or_anything_as_declared() {
        for (trim_reads, old_is_right) in [(TrimReads::Zero, false), (TrimReads::Unknown, true)] {
            let mut table = Expectations::new(Initial::Zero, trim_reads);
            wrote(&mut table, 1);
            table.issued(B, Version::Trimmed(Generation(2)));
            table.acknowledged(B);
            assert_eq!(table.judge(B, Found::Zero), Verdict::Acknowledged);
            assert_eq!(table.judge(B, found(1)) == Verdict::Acknowledged, old_is_right);
        }
    }

    #[test]
    #[should_panic(expected = "two mutations")]
    fn second_mutation_in_flight_is_a_bug_of_the_caller() {
        let mut table = fresh();
        table.issued(B, generation(1));
        table.issued(B, generation(2));
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Write(u64),
        Trim(u64),
        Acknowledge(u64),
        Fail(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        (0u64..4, 0u64..2048).prop_map(|(what, block)| {
            let block = block % 6 * 300; // several pages
            match what {
                0 => Event::Write(block),
                1 => Event::Trim(block),
                2 => Event::Acknowledge(block),
                _ => Event::Fail(block),
            }
        })
    }

    proptest! {
        /// The oracle keeps, per block, the plain set of what may be there.
        #[test]
        fn table_agrees_with_a_plain_set_of_possibilities(events in prop::collection::vec(event(), 1..200)) {
            let mut table = fresh();
            let mut possible: HashMap<u64, Vec<Found>> = HashMap::new();
            let mut flying: HashMap<u64, Found> = HashMap::new();
            for (index, event) in events.iter().enumerate() {
                let number = Generation(index as u64 + 1);
                match *event {
                    Event::Write(block) if !flying.contains_key(&block) => {
                        table.issued(BlockIndex(block), Version::Written(number));
                        flying.insert(block, Found::Written(number));
                    }
                    Event::Trim(block) if !flying.contains_key(&block) => {
                        table.issued(BlockIndex(block), Version::Trimmed(number));
                        flying.insert(block, Found::Zero);
                    }
                    Event::Acknowledge(block) => if let Some(held) = flying.remove(&block) {
                        table.acknowledged(BlockIndex(block));
                        possible.insert(block, vec![held]);
                    }
                    Event::Fail(block) => if let Some(held) = flying.remove(&block) {
                        table.in_doubt(BlockIndex(block));
                        possible.entry(block).or_insert_with(|| vec![Found::Zero]).push(held);
                    }
                    _ => {}
                }
            }
            for block in (0..6).map(|index| index * 300) {
                let mut right = possible.get(&block).cloned().unwrap_or_else(|| vec![Found::Zero]);
                right.extend(flying.get(&block));
                let all = (0..=events.len() as u64).map(|number| found(number.max(1))).chain([Found::Zero]);
                for held in all {
                    let is_good = !matches!(table.judge(BlockIndex(block), held), Verdict::Bad(_));
                    prop_assert_eq!(is_good, right.contains(&held), "block {} held {:?}", block, held);
                }
            }
        }
    }
}
