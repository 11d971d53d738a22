//! What a marked workload writes, how it records what was acknowledged to it, and how a rebuilt volume is judged.
//!
//! The workload writes numbered generations into 4 KiB blocks of a volume. Whenever a write is acknowledged it writes an
//! ack record to a journal device *on the same logged drive*, beyond the part that the system under test uses. So one
//! log orders everything: an ack record at place p of the log was written after the acknowledgement, and that after
//! whatever barrier it rests on. Cut the log at any k: all acknowledgements recorded before k must hold in the image
//! rebuilt from the entries before k. No clock, no second channel, no race between reading a log and hearing of an ack.
//!
//! ```text
//! block (4096 bytes)                                ack record (one 512-byte sector)
//!   0  u64  magic "PSTKMARK"                          0  u64  magic "PSTKACK1"
//!   8  u64  block number                              8  u32  count, 1 to 31
//!  16  u64  generation, from 1                       12  u32  0
//!  24  bytes that follow from both                   16  count × (u64 block number, u64 generation)
//! ```
//!
//! Not here: issuing the writes; the guest's `penstock-guest-writer` does that with these same functions.

use super::replay::{Dice, SECTOR};
use super::writelog::{Kind, WriteLog};
use super::{GuestError, Result};
use std::collections::BTreeMap;

pub const BLOCK: usize = 4096;
const MARK_MAGIC: u64 = u64::from_be_bytes(*b"PSTKMARK");
const ACK_MAGIC: u64 = u64::from_be_bytes(*b"PSTKACK1");
const ACKS_PER_RECORD: usize = 31;

/// Number of a 4 KiB block of the volume under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockNumber(pub u64);

/// How often a block was written; zero means never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// Fills one block.
pub fn stamp(block: BlockNumber, generation: Generation, into: &mut [u8]) {
    assert_eq!(into.len(), BLOCK);
    into[..8].copy_from_slice(&MARK_MAGIC.to_le_bytes());
    into[8..16].copy_from_slice(&block.0.to_le_bytes());
    into[16..24].copy_from_slice(&generation.0.to_le_bytes());
    let mut dice = Dice::new(block.0.rotate_left(32) ^ generation.0);
    for word in into[24..].chunks_exact_mut(8) {
        word.copy_from_slice(&dice.roll().to_le_bytes());
    }
}

/// Which generation a block holds; an error says how it is neither a whole generation of this block nor zeros.
pub fn identify(block: BlockNumber, bytes: &[u8]) -> std::result::Result<Generation, String> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(Generation(0));
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    if word(0) != MARK_MAGIC {
        return Err(format!("neither zeros nor a mark: begins with {:#018x}", word(0)));
    }
    if word(8) != block.0 {
        return Err(format!("holds the mark of block {}", word(8)));
    }
    let generation = Generation(word(16));
    let mut expected = vec![0; BLOCK];
    stamp(block, generation, &mut expected);
    match bytes.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(generation),
        Some(at) => Err(format!("begins as generation {} and differs from byte {at} on", generation.0)),
    }
}

/// Fills a sector with up to 31 acknowledgements.
pub fn ack_record(acks: &[(BlockNumber, Generation)], into: &mut [u8]) {
    assert!(into.len() == SECTOR as usize && (1..=ACKS_PER_RECORD).contains(&acks.len()));
    into.fill(0);
    into[..8].copy_from_slice(&ACK_MAGIC.to_le_bytes());
    into[8..12].copy_from_slice(&(acks.len() as u32).to_le_bytes());
    for (pair, (block, generation)) in into[16..].chunks_exact_mut(16).zip(acks) {
        pair[..8].copy_from_slice(&block.0.to_le_bytes());
        pair[8..].copy_from_slice(&generation.0.to_le_bytes());
    }
}

/// Reads the acknowledgements of one record.
fn acks_of(record: &[u8]) -> Result<Vec<(BlockNumber, Generation)>> {
    let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
    let count = (word(8) & 0xffff_ffff) as usize;
    if record.len() != SECTOR as usize || word(0) != ACK_MAGIC || !(1..=ACKS_PER_RECORD).contains(&count) {
        return Err(GuestError::failed(
            "a write to the ack journal",
            format!("{} bytes that are no ack record; something else wrote there", record.len()),
        ));
    }
    Ok((0..count).map(|i| (BlockNumber(word(16 + 16 * i)), Generation(word(24 + 16 * i)))).collect())
}

/// The newest acknowledged generation of each block, as of a place in the log.
pub struct Acknowledged<'a> {
    log: &'a WriteLog,
    journal_begins: u64,
    position: usize,
    newest: BTreeMap<BlockNumber, Generation>,
    records: usize,
}

impl<'a> Acknowledged<'a> {
    /// The journal is everything on the drive from byte `journal_begins` on.
    pub fn new(log: &'a WriteLog, journal_begins: u64) -> Self {
        Acknowledged { log, journal_begins, position: 0, newest: BTreeMap::new(), records: 0 }
    }

    /// Takes in the ack records before entry `cut`.
    pub fn advance_to(&mut self, cut: usize) -> Result<()> {
        assert!(self.position <= cut && cut <= self.log.entries.len(), "acks are read forward, within their log");
        while self.position < cut {
            let entry = &self.log.entries[self.position];
            if matches!(entry.kind, Kind::Write { .. }) && entry.offset >= self.journal_begins {
                for (block, generation) in acks_of(&self.log.data(entry)?)? {
                    let newest = self.newest.entry(block).or_insert(generation);
                    *newest = generation.max(*newest);
                }
                self.records += 1;
            }
            self.position += 1;
        }
        Ok(())
    }

    /// How many records were read.
    pub fn records(&self) -> usize {
        self.records
    }

    pub fn newest(&self) -> &BTreeMap<BlockNumber, Generation> {
        &self.newest
    }

    /// Judges a volume of `blocks` blocks, of which `read` gives one at a time. A block that was acknowledged holds that
    /// generation or a later one; every other block holds one whole generation or zeros.
    pub fn judge(&self, blocks: u64, mut read: impl FnMut(BlockNumber) -> Result<Vec<u8>>) -> Result<Verdict> {
        let mut verdict = Verdict::default();
        for block in (0..blocks).map(BlockNumber) {
            let promised = self.newest.get(&block).copied().unwrap_or(Generation(0));
            match identify(block, &read(block)?) {
                Ok(found) if found < promised => verdict.lost.push(Lost { block, promised, found }),
                Ok(_) => verdict.good += 1,
                Err(how) => verdict.damaged.push((block, how)),
            }
        }
        Ok(verdict)
    }
}

/// An acknowledged write that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub block: BlockNumber,
    pub promised: Generation,
    pub found: Generation,
}

/// What was found in a rebuilt volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    pub good: u64,
    pub lost: Vec<Lost>,
    pub damaged: Vec<(BlockNumber, String)>,
}

impl Verdict {
    pub fn is_good(&self) -> bool {
        self.lost.is_empty() && self.damaged.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::replay::{Replay, Unflushed};
    use super::super::writelog::fake::FakeLog;
    use super::*;

    const JOURNAL: u64 = 1 << 20;

    fn block(number: u64, generation: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        stamp(BlockNumber(number), Generation(generation), &mut bytes);
        bytes
    }

    fn ack(number: u64, generation: u64) -> Vec<u8> {
        let mut record = vec![0; 512];
        ack_record(&[(BlockNumber(number), Generation(generation))], &mut record);
        record
    }

    /// Cuts everywhere and judges the worst image; answers the cuts that lost something.
    fn losing_cuts(fake: &FakeLog) -> Vec<usize> {
        let log = fake.open().unwrap();
        let (mut replay, mut acks) = (Replay::new(&log, JOURNAL), Acknowledged::new(&log, JOURNAL));
        (0..=log.entries.len())
            .filter(|cut| {
                replay.advance_to(*cut).unwrap();
                acks.advance_to(*cut).unwrap();
                let media = replay.crash(Unflushed::Lost).unwrap();
                !acks.judge(4, |b| Ok(media.read(b.0 * BLOCK as u64, BLOCK))).unwrap().is_good()
            })
            .collect()
    }

    #[test]
    fn writer_that_flushes_before_it_acknowledges_loses_nothing_at_any_cut() {
        let mut fake = FakeLog::new();
        for generation in 1..5 {
            fake.write(4096, &block(1, generation)).flush().write(JOURNAL, &ack(1, generation));
        }
        assert_eq!(losing_cuts(&fake), Vec::<usize>::new());
    }

    #[test]
    fn writer_that_acknowledges_before_its_flush_is_caught_between_the_two() {
        let mut fake = FakeLog::new();
        fake.write(4096, &block(1, 1)).write(JOURNAL, &ack(1, 1)).flush();
        assert_eq!(losing_cuts(&fake), [2]);
    }

    #[test]
    fn writer_that_never_flushes_is_caught_from_its_first_ack_on() {
        let mut fake = FakeLog::new();
        fake.write(4096, &block(1, 1)).write(JOURNAL, &ack(1, 1)).write(0, &block(0, 1));
        assert_eq!(losing_cuts(&fake), [2, 3]);
    }

    #[test]
    fn judge_of_a_torn_block_calls_it_damaged_and_of_an_older_one_lost() {
        let mut fake = FakeLog::new();
        fake.write(JOURNAL, &ack(0, 2)).write(JOURNAL + 512, &ack(1, 3));
        let log = fake.open().unwrap();
        let mut acks = Acknowledged::new(&log, JOURNAL);
        acks.advance_to(2).unwrap();
        let mut torn = block(0, 2);
        torn[3000] ^= 1;
        let held = [torn, block(1, 2), block(7, 1), block(3, 9)];
        let verdict = acks.judge(4, |b| Ok(held[b.0 as usize].clone())).unwrap();
        assert_eq!(verdict.lost, [Lost { block: BlockNumber(1), promised: Generation(3), found: Generation(2) }]);
        let damaged: Vec<u64> = verdict.damaged.iter().map(|(b, _)| b.0).collect();
        assert_eq!((damaged, verdict.good), (vec![0, 2], 1));
    }

    #[test]
    fn journal_holding_something_else_is_an_error_not_silence() {
        let mut fake = FakeLog::new();
        fake.write(JOURNAL, &[1; 512]);
        let log = fake.open().unwrap();
        assert!(Acknowledged::new(&log, JOURNAL).advance_to(1).is_err());
    }
}
