//! Judges every image of a plan: rebuild it from the log, have it recovered, compare with what was acknowledged by then.
//! Not here: how an image is recovered. A closure does that: reading it as it is, or through penstockd.

use super::Result;
use super::acks::{Acknowledged, BLOCK, Verdict};
use super::replay::{Dice, Media, Replay, Unflushed};
use super::writelog::{Kind, WriteLog};

/// One image: where power failed, and what became of unflushed writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    pub cut: usize,
    pub unflushed: Unflushed,
}

/// Whether the system under test promises more than the drive's 512-byte sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tearing {
    /// A 4 KiB block is old or new: images may hold torn writes.
    Injected,
    /// A raw drive: torn images prove nothing against it.
    Spared,
}

/// The images to judge: just before every flush, and at the end, with all that is unflushed lost, and torn; and torn at
/// `between` places drawn at random. Ascending, repeatable from `seed`.
///
/// The state right after a flush is not listed apart: it is byte for byte the one just before the next flush with all
/// since lost, and there more has been acknowledged. The same holds for losing all at any place between.
pub fn plan(log: &WriteLog, tearing: Tearing, between: usize, seed: u64) -> Vec<Image> {
    let mut dice = Dice::new(seed);
    let end = log.entries.len();
    let mut images = Vec::new();
    let flushes = (0..end).filter(|place| log.entries[*place].kind == Kind::Flush);
    for cut in flushes.chain([end]) {
        images.extend([Image { cut, unflushed: Unflushed::Lost }, torn(cut, tearing, &mut dice)]);
    }
    for _ in 0..between {
        let cut = dice.below(end as u64 + 1) as usize;
        images.push(torn(cut, tearing, &mut dice));
    }
    images.sort_by_key(|image| image.cut);
    images
}

fn torn(cut: usize, tearing: Tearing, dice: &mut Dice) -> Image {
    let unflushed = match tearing {
        Tearing::Injected => Unflushed::Random(dice.roll()),
        Tearing::Spared => Unflushed::Kept,
    };
    Image { cut, unflushed }
}

/// What came of recovering an image.
#[derive(Debug)]
pub enum Recovered {
    /// The volume's first bytes.
    Volume(Vec<u8>),
    /// The system under test works, and does not open this image: then all that was promised is lost.
    Refused(String),
}

/// An image that does not hold what was promised by then.
#[derive(Debug)]
pub struct Finding {
    pub image: Image,
    pub fault: Fault,
}

impl Finding {
    /// What single blocks held, if the image was opened at all.
    pub fn verdict(&self) -> Option<&Verdict> {
        match &self.fault {
            Fault::Blocks(verdict) => Some(verdict),
            Fault::Refused(_) => None,
        }
    }
}

/// How an image fails.
#[derive(Debug)]
pub enum Fault {
    Blocks(Verdict),
    Refused(String),
}

/// What came of a plan.
#[derive(Debug, Default)]
pub struct Tally {
    /// Images judged. Those before the first acknowledgement promise nothing and are passed over.
    pub judged: usize,
    pub ack_records: usize,
    pub blocks_acknowledged: usize,
    pub findings: Vec<Finding>,
}

/// Judges `images`, ascending by cut. `recover` gives the first `blocks` blocks of the volume that an image holds.
pub fn judge(
    log: &WriteLog,
    journal_begins: u64,
    blocks: u64,
    images: &[Image],
    mut recover: impl FnMut(&Media) -> Result<Recovered>,
) -> Result<Tally> {
    let mut replay = Replay::new(log, journal_begins);
    let mut acks = Acknowledged::new(log, journal_begins);
    let mut tally = Tally::default();
    for &image in images {
        replay.advance_to(image.cut)?;
        acks.advance_to(image.cut)?;
        if acks.newest().is_empty() {
            continue;
        }
        tally.judged += 1;
        let volume = match recover(&replay.crash(image.unflushed)?)? {
            Recovered::Volume(bytes) => bytes,
            Recovered::Refused(why) => {
                tally.findings.push(Finding { image, fault: Fault::Refused(why) });
                continue;
            }
        };
        let verdict = acks.judge(blocks, |block| {
            let at = block.0 as usize * BLOCK;
            Ok(volume[at..at + BLOCK].to_vec())
        })?;
        if !verdict.is_good() {
            tally.findings.push(Finding { image, fault: Fault::Blocks(verdict) });
        }
    }
    acks.advance_to(log.entries.len())?;
    tally.ack_records = acks.records();
    tally.blocks_acknowledged = acks.newest().len();
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::super::acks::{BlockNumber, Generation, ack_record, stamp};
    use super::super::writelog::fake::FakeLog;
    use super::*;

    const JOURNAL: u64 = 1 << 20;

    /// Writes one block, flushes or not, and acknowledges it.
    fn round(fake: &mut FakeLog, generation: u64, flush: bool) {
        let (mut block, mut record) = (vec![0; BLOCK], vec![0; 512]);
        stamp(BlockNumber(0), Generation(generation), &mut block);
        ack_record(&[(BlockNumber(0), Generation(generation))], &mut record);
        fake.write(0, &block);
        if flush {
            fake.flush();
        }
        fake.write(JOURNAL, &record);
    }

    fn findings(fake: &FakeLog) -> (usize, usize) {
        let log = fake.open().unwrap();
        let images = plan(&log, Tearing::Spared, 20, 1);
        let tally = judge(&log, JOURNAL, 1, &images, |media| Ok(Recovered::Volume(media.read(0, BLOCK)))).unwrap();
        (tally.judged, tally.findings.len())
    }

    #[test]
    fn judge_of_an_honest_log_finds_nothing() {
        let mut fake = FakeLog::new();
        (1..20).for_each(|generation| round(&mut fake, generation, true));
        let (judged, found) = findings(&fake);
        assert!(judged > 30 && found == 0, "{found} of {judged}");
    }

    #[test]
    fn judge_of_a_single_missing_flush_finds_it() {
        let mut fake = FakeLog::new();
        (1..20).for_each(|generation| round(&mut fake, generation, generation != 10));
        assert!(findings(&fake).1 > 0);
    }

    #[test]
    fn plan_looks_before_every_flush_and_at_the_end() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]).flush();
        let log = fake.open().unwrap();
        let cuts: Vec<_> = plan(&log, Tearing::Injected, 0, 3).iter().map(|i| i.cut).collect();
        assert_eq!(cuts, [1, 1, 2, 2]);
    }
}
