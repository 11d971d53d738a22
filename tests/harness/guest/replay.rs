//! Rebuilds what a drive may hold after losing power at any point of its write log.
//!
//! The model of the drive: what completed before a completed flush is on media. Of what completed since, each 512-byte
//! sector holds any of the versions it was given, or what it held at the flush: caches evict in any order, and only a
//! sector is written whole. Not here: writes that never completed (no one was told of them, and [`super::writelog`]
//! does not record them), rot, misdirected writes; the simulator injects those.

use super::writelog::{Kind, WriteLog};
use super::{At, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

pub const SECTOR: u64 = 512;
const CHUNK: u64 = 64 * 1024;

/// A drive's content, kept sparse; absent chunks are zeros. Clones share what they do not change.
#[derive(Debug, Clone, Default)]
pub struct Media {
    chunks: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Media {
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % CHUNK) as usize;
            let take = (CHUNK as usize - within).min(data.len() - done);
            let chunk = self.chunks.entry(at / CHUNK).or_insert_with(|| Arc::new(vec![0; CHUNK as usize]));
            Arc::make_mut(chunk)[within..within + take].copy_from_slice(&data[done..done + take]);
            done += take;
        }
    }

    /// Zeros a range; whole chunks of it take no space afterwards.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let mut at = offset;
        let end = offset + length;
        while at < end {
            let next = (at / CHUNK + 1) * CHUNK;
            if at.is_multiple_of(CHUNK) && next <= end {
                self.chunks.remove(&(at / CHUNK));
            } else if self.chunks.contains_key(&(at / CHUNK)) {
                self.write(at, &vec![0; (next.min(end) - at) as usize]);
            }
            at = next;
        }
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let within = (at % CHUNK) as usize;
            let take = (CHUNK as usize - within).min(length - done);
            if let Some(chunk) = self.chunks.get(&(at / CHUNK)) {
                bytes[done..done + take].copy_from_slice(&chunk[within..within + take]);
            }
            done += take;
        }
        bytes
    }

    /// Writes the content as a sparse file of `size` bytes.
    pub fn save(&self, path: &Path, size: u64) -> Result<()> {
        let file = File::create(path).at("create", path)?;
        file.set_len(size).at("size", path)?;
        for (number, chunk) in &self.chunks {
            let at = number * CHUNK;
            let keep = size.saturating_sub(at).min(CHUNK) as usize;
            file.write_all_at(&chunk[..keep], at).at("write", path)?;
        }
        Ok(())
    }
}

/// What became of the writes that no flush covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unflushed {
    /// All lost.
    Lost,
    /// All kept, in order.
    Kept,
    /// Each write lost, kept, or kept in some of its sectors; and in any order. The same seed gives the same image.
    Random(u64),
}

/// Walks a log forward, always knowing what is on media for certain and what is not. Looks only at drive bytes below
/// `limit`; what lies above belongs to someone else (see [`super::acks`]).
pub struct Replay<'a> {
    log: &'a WriteLog,
    limit: u64,
    position: usize,
    durable: Media,
    pending: Vec<usize>,
}

impl<'a> Replay<'a> {
    /// Starts before the first entry, from an empty drive.
    pub fn new(log: &'a WriteLog, limit: u64) -> Self {
        Replay { log, limit, position: 0, durable: Media::default(), pending: Vec::new() }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    /// How many writes are not covered by a flush.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Takes in entries up to, not including, entry `cut`.
    pub fn advance_to(&mut self, cut: usize) -> Result<()> {
        assert!(self.position <= cut && cut <= self.log.entries.len(), "a replay goes forward, within its log");
        while self.position < cut {
            let entry = &self.log.entries[self.position];
            match entry.kind {
                Kind::Flush => {
                    let mut durable = std::mem::take(&mut self.durable);
                    for place in std::mem::take(&mut self.pending) {
                        self.apply(place, &mut durable, || true)?;
                    }
                    self.durable = durable;
                }
                Kind::Write { .. } | Kind::Discard if entry.offset < self.limit => self.pending.push(self.position),
                Kind::Write { .. } | Kind::Discard => {}
            }
            self.position += 1;
        }
        Ok(())
    }

    /// What the drive may hold if power fails here.
    pub fn crash(&self, unflushed: Unflushed) -> Result<Media> {
        let mut media = self.durable.clone();
        match unflushed {
            Unflushed::Lost => {}
            Unflushed::Kept => {
                for &place in &self.pending {
                    self.apply(place, &mut media, || true)?;
                }
            }
            Unflushed::Random(seed) => {
                let mut dice = Dice::new(seed);
                let mut order = self.pending.clone();
                if dice.below(2) == 0 {
                    for i in (1..order.len()).rev() {
                        order.swap(i, dice.below(i as u64 + 1) as usize);
                    }
                }
                for place in order {
                    match dice.below(3) {
                        0 => {}
                        1 => self.apply(place, &mut media, || true)?,
                        _ => self.apply(place, &mut media, || dice.below(2) == 0)?,
                    }
                }
            }
        }
        Ok(media)
    }

    /// Does entry `place` to `media`, as far as `keeps` says of each sector in turn (of each chunk, for a discard).
    /// A discard reads as zeros once it has taken effect, as on QEMU's drives.
    fn apply(&self, place: usize, media: &mut Media, mut keeps: impl FnMut() -> bool) -> Result<()> {
        let entry = &self.log.entries[place];
        if entry.kind == Kind::Discard {
            let mut at = entry.offset;
            let end = (entry.offset + entry.length).min(self.limit);
            while at < end {
                let next = ((at / CHUNK + 1) * CHUNK).min(end);
                if keeps() {
                    media.zero(at, next - at);
                }
                at = next;
            }
            return Ok(());
        }
        for (i, sector) in self.log.data(entry)?.chunks(SECTOR as usize).enumerate() {
            if keeps() {
                media.write(entry.offset + i as u64 * SECTOR, sector);
            }
        }
        Ok(())
    }
}

/// Repeatable dice (splitmix64; Steele, Lea, Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; the bias of the remainder does not matter for bounds as small as ours.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::super::writelog::fake::FakeLog;
    use super::*;

    fn at(media: &Media, offset: u64) -> u8 {
        media.read(offset, 1)[0]
    }

    #[test]
    fn crash_after_a_flush_keeps_what_completed_before_it_whatever_else_is_lost() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]).flush().write(0, &[2; 512]);
        let log = fake.open().unwrap();
        let mut replay = Replay::new(&log, u64::MAX);
        replay.advance_to(3).unwrap();
        assert_eq!(at(&replay.crash(Unflushed::Lost).unwrap(), 0), 1);
        assert_eq!(at(&replay.crash(Unflushed::Kept).unwrap(), 0), 2);
        for seed in 0..50 {
            assert!([1, 2].contains(&at(&replay.crash(Unflushed::Random(seed)).unwrap(), 0)), "never back to zeros");
        }
    }

    #[test]
    fn crash_of_unflushed_overwrites_shows_every_version_over_the_seeds() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]).write(0, &[2; 512]);
        let log = fake.open().unwrap();
        let mut replay = Replay::new(&log, u64::MAX);
        replay.advance_to(2).unwrap();
        let seen: std::collections::BTreeSet<u8> = (0..100).map(|seed| at(&replay.crash(Unflushed::Random(seed)).unwrap(), 0)).collect();
        assert_eq!(seen, [0, 1, 2].into(), "neither, the older alone, the newer");
    }

    #[test]
    fn crash_of_one_long_write_tears_at_sectors_only() {
        let mut fake = FakeLog::new();
        fake.write(0, &[5; 4096]);
        let log = fake.open().unwrap();
        let mut replay = Replay::new(&log, u64::MAX);
        replay.advance_to(1).unwrap();
        let mut torn = 0;
        for seed in 0..100 {
            let bytes = replay.crash(Unflushed::Random(seed)).unwrap().read(0, 4096);
            let whole: Vec<bool> = bytes.chunks(512).map(|s| s.iter().all(|b| *b == 5)).collect();
            let none: Vec<bool> = bytes.chunks(512).map(|s| s.iter().all(|b| *b == 0)).collect();
            assert!(whole.iter().zip(&none).all(|(w, n)| w != n), "each sector old or new");
            torn += usize::from(whole.contains(&true) && none.contains(&true));
        }
        assert!(torn > 10, "{torn} of 100 torn");
    }

    #[test]
    fn replay_leaves_alone_what_lies_above_its_limit() {
        let mut fake = FakeLog::new();
        fake.write(4096, &[1; 512]).write(0, &[2; 512]);
        let log = fake.open().unwrap();
        let mut replay = Replay::new(&log, 4096);
        replay.advance_to(2).unwrap();
        assert_eq!(replay.pending(), 1);
        assert_eq!(at(&replay.crash(Unflushed::Kept).unwrap(), 4096), 0);
    }

    #[test]
    fn crash_with_an_unflushed_discard_shows_old_data_or_zeros() {
        let mut fake = FakeLog::new();
        fake.write(512, &[5; 1024]).flush().discard(0, 1 << 20);
        let log = fake.open().unwrap();
        let mut replay = Replay::new(&log, 1 << 20);
        replay.advance_to(3).unwrap();
        assert_eq!(at(&replay.crash(Unflushed::Lost).unwrap(), 512), 5);
        assert_eq!(at(&replay.crash(Unflushed::Kept).unwrap(), 512), 0);
        let seen: std::collections::BTreeSet<u8> = (0..50).map(|seed| at(&replay.crash(Unflushed::Random(seed)).unwrap(), 1024)).collect();
        assert_eq!(seen, [0, 5].into());
    }

    #[test]
    fn media_zeroed_in_part_keeps_the_rest() {
        let mut media = Media::default();
        media.write(0, &vec![9; 200 * 1024]);
        media.zero(1000, 150 * 1024);
        assert_eq!((at(&media, 999), at(&media, 1000), at(&media, 1000 + 150 * 1024 - 1), at(&media, 1000 + 150 * 1024)), (9, 0, 0, 9));
        assert_eq!(media.chunks.len(), 3, "of four chunks one was zeroed whole");
    }

    #[test]
    fn media_saved_sparse_reads_back() {
        let mut media = Media::default();
        media.write(65_000, &[3; 2000]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        media.save(&path, 1 << 20).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert_eq!((bytes[64_999], bytes[65_000], bytes[66_999], bytes[67_000]), (0, 3, 3, 0));
    }
}
