//! A host with several paths to one volume: a command that a path refuses, or does not answer, is given again on the next, as Linux's multipath
//! does. Several workers, each the only writer of its blocks, so that of every sector it is known what it holds, or which two things it may hold;
//! what is read is judged at once, and all of it at the end.
//!
//! An old command that takes effect after the host has given it again elsewhere and gone on (a ghost write) shows as a sector that
//! went back. Not here: what happens to the nodes meanwhile.

use super::house::TcpDoor;
use super::{Result, failed};
use crate::guest::initiator::{Namespace, Refusal};
use crate::guest::replay::Dice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
const BLOCK_SECTORS: u64 = 8;
const MAGIC: u64 = u64::from_le_bytes(*b"PSTPATHS");
/// Without an answer for this long a connection is given up.
const PATIENCE: Duration = Duration::from_secs(2);
/// A command that no path has taken for this long is left in doubt.
const GIVE_UP: Duration = Duration::from_secs(30);
/// Status code type of path errors: the host is to try elsewhere.
const PATH: u8 = 3;

/// One host's connections.
pub struct Paths<'a> {
    doors: &'a [TcpDoor],
    lines: Vec<Option<Namespace>>,
    at: usize,
}

/// How a command ended.
enum Ended<T> {
    Done(T),
    /// For something else than its path.
    Refused(Refusal),
    /// No path has answered; it may have taken effect.
    Doubt,
}

impl<'a> Paths<'a> {
    pub fn new(doors: &'a [TcpDoor]) -> Self {
        Paths { doors, lines: doors.iter().map(|_| None).collect(), at: 0 }
    }

    fn next(&mut self) {
        self.at = (self.at + 1) % self.doors.len();
    }

    fn give<T>(&mut self, mut command: impl FnMut(&mut Namespace) -> Result<std::result::Result<T, Refusal>>) -> Ended<T> {
        let began = Instant::now();
        let mut refused_by = 0;
        while began.elapsed() < GIVE_UP {
            if self.lines[self.at].is_none() {
                let door = &self.doors[self.at];
                self.lines[self.at] = Namespace::connect_within(door.address, &door.nqn, PATIENCE).ok();
            }
            let Some(line) = &mut self.lines[self.at] else {
                self.next();
                refused_by += 1;
                pause_after(&mut refused_by, self.doors.len());
                continue;
            };
            match command(line) {
                Ok(Ok(value)) => return Ended::Done(value),
                Ok(Err(refusal)) if refusal.code_type == PATH => {
                    self.next();
                    refused_by += 1;
                    pause_after(&mut refused_by, self.doors.len());
                }
                Ok(Err(refusal)) => return Ended::Refused(refusal),
                Err(_) => {
                    self.lines[self.at] = None;
                    self.next();
                }
            }
        }
        Ended::Doubt
    }
}

/// Once all paths have refused, a little time for one of them to come to lead.
fn pause_after(refused_by: &mut usize, doors: usize) {
    if *refused_by >= doors {
        *refused_by = 0;
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    held: u64,
    doubt: Option<u64>,
}

/// What the workers of a volume have done so far.
#[derive(Debug, Default)]
pub struct Tally {
    pub writes: AtomicU64,
    pub reads: AtomicU64,
    /// Commands that were refused as there is no room.
    pub refused: AtomicU64,
    /// Commands that failed for something else than their path.
    pub failed: AtomicU64,
    pub doubts: AtomicU64,
}

impl Tally {
    pub fn answered(&self) -> u64 {
        self.writes.load(Ordering::Relaxed) + self.reads.load(Ordering::Relaxed)
    }

    fn of(&self, refusal: Refusal) -> &AtomicU64 {
        if refusal == Refusal::CAPACITY_EXCEEDED { &self.refused } else { &self.failed }
    }
}

/// One worker's part of the volume.
struct Share {
    number: u64,
    workers: u64,
    blocks: u64,
    cells: Vec<[Cell; BLOCK_SECTORS as usize]>,
    count: u64,
    dice: Dice,
}

/// All shares of a volume of so many bytes.
pub struct Registers {
    shares: Vec<Share>,
    bytes: u64,
}

fn stamp(sector: u64, version: u64, bytes: &mut [u8]) {
    bytes.fill(0);
    if version == 0 {
        return;
    }
    for (at, value) in [MAGIC, sector, version].into_iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }
    let mut dice = Dice::new(sector ^ version.rotate_left(32));
    for word in bytes[24..].chunks_exact_mut(8) {
        word.copy_from_slice(&dice.roll().to_le_bytes());
    }
}

/// Whether a worker wrote this block.
pub fn is_written(block: &[u8]) -> bool {
    block.starts_with(&MAGIC.to_le_bytes())
}

/// Which version these bytes are, if they are one of that sector.
fn version_of(sector: u64, bytes: &[u8]) -> std::result::Result<u64, String> {
    let version = u64::from_le_bytes(bytes[16..24].try_into().expect("8 bytes"));
    let mut expected = [0; SECTOR];
    stamp(sector, version, &mut expected);
    if expected == bytes { Ok(version) } else { Err(format!("sector {sector} holds what nobody wrote there: {:02x?}…", &bytes[..32])) }
}

impl Registers {
    pub fn new(seed: u64, bytes: u64, workers: u64) -> Self {
        let blocks = bytes / (SECTOR as u64 * BLOCK_SECTORS) / workers;
        let share = |number| Share {
            number,
            workers,
            blocks,
            cells: vec![Default::default(); blocks as usize],
            count: 0,
            dice: Dice::new(seed ^ (number + 1).wrapping_mul(0x9e37_79b9)),
        };
        Registers { shares: (0..workers).map(share).collect(), bytes }
    }

    /// Lets every worker write and read over all doors while `meanwhile` runs.
    ///
    /// # Errors
    /// The first thing read that was not what it had to be.
    pub fn work_while<T>(&mut self, doors: &[TcpDoor], tally: &Tally, meanwhile: impl FnOnce(&AtomicBool) -> Result<T>) -> Result<T> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .shares
                .iter_mut()
                .map(|share| {
                    let stop = &stop;
                    scope.spawn(move || {
                        let worked = share.work(doors, stop, tally);
                        if worked.is_err() {
                            stop.store(true, Ordering::Relaxed);
                        }
                        worked
                    })
                })
                .collect();
            let value = meanwhile(&stop);
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().expect("workers do not panic")?;
            }
            value
        })
    }

    /// Reads the whole volume through one door. What was in doubt is what was read, from now on.
    ///
    /// # Errors
    /// What is not as acknowledged.
    pub fn verify(&mut self, door: &TcpDoor) -> Result<u64> {
        const PIECE: usize = 64 * 1024;
        let mut line = door.connect()?;
        let mut verified = 0;
        for offset in (0..self.bytes).step_by(PIECE) {
            let len = PIECE.min((self.bytes - offset) as usize);
            let bytes = line.read(offset, len)?;
            for (at, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
                let sector = offset / SECTOR as u64 + at as u64;
                let block = sector / BLOCK_SECTORS;
                let count = self.shares.len() as u64;
                let share = &mut self.shares[(block % count) as usize];
                if block / count < share.blocks {
                    share.judge(sector, bytes)?;
                    verified += 1;
                }
            }
        }
        Ok(verified)
    }
}

impl Share {
    fn first_sector(&self, own: u64) -> u64 {
        (own * self.workers + self.number) * BLOCK_SECTORS
    }

    fn judge(&mut self, sector: u64, bytes: &[u8]) -> Result<()> {
        let own = sector / BLOCK_SECTORS / self.workers;
        let cell = &mut self.cells[own as usize][(sector % BLOCK_SECTORS) as usize];
        let found = version_of(sector, bytes).map_err(|what| failed("a block", what))?;
        if found != cell.held && Some(found) != cell.doubt {
            let what = format!("sector {sector} holds version {found}; acknowledged is {}, in doubt {:?}", cell.held, cell.doubt);
            return Err(failed("acknowledged writes", what));
        }
        *cell = Cell { held: found, doubt: None };
        Ok(())
    }

    fn work(&mut self, doors: &[TcpDoor], stop: &AtomicBool, tally: &Tally) -> Result<()> {
        let mut paths = Paths::new(doors);
        while !stop.load(Ordering::Relaxed) {
            let own = self.dice.below(self.blocks);
            let first = self.first_sector(own);
            match self.dice.below(10) {
                0..6 => self.write(&mut paths, first, BLOCK_SECTORS, tally),
                6 | 7 => {
                    let (skip, count) = (self.dice.below(4), 1 + self.dice.below(4));
                    self.write(&mut paths, first + skip, count, tally);
                }
                8 if self.dice.below(4) == 0 => self.zero(&mut paths, first, tally),
                _ => self.read(&mut paths, first, tally)?,
            }
        }
        Ok(())
    }

    /// A command of these sectors ended.
    fn settle(&mut self, first: u64, count: u64, version: u64, ended: Ended<()>, tally: &Tally) {
        let own = (first / BLOCK_SECTORS / self.workers) as usize;
        for sector in first..first + count {
            let cell = &mut self.cells[own][(sector % BLOCK_SECTORS) as usize];
            match ended {
                Ended::Done(()) => *cell = Cell { held: version, doubt: None },
                // Given before on another path, it may have taken effect there.
                Ended::Refused(_) | Ended::Doubt => cell.doubt = Some(version),
            }
        }
        match ended {
            Ended::Done(()) => &tally.writes,
            Ended::Refused(refusal) => tally.of(refusal),
            Ended::Doubt => &tally.doubts,
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    /// Nothing more is written where it is not known what is there.
    fn is_doubtful(&self, first: u64) -> bool {
        self.cells[(first / BLOCK_SECTORS / self.workers) as usize].iter().any(|cell| cell.doubt.is_some())
    }

    fn write(&mut self, paths: &mut Paths<'_>, first: u64, count: u64, tally: &Tally) {
        if self.is_doubtful(first) {
            return;
        }
        self.count += 1;
        let version = self.count << 8 | (self.number + 1);
        let mut bytes = vec![0; count as usize * SECTOR];
        for (at, bytes) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            stamp(first + at as u64, version, bytes);
        }
        let ended = paths.give(|line| line.try_write(first * SECTOR as u64, &bytes));
        self.settle(first, count, version, ended, tally);
    }

    fn zero(&mut self, paths: &mut Paths<'_>, first: u64, tally: &Tally) {
        if self.is_doubtful(first) {
            return;
        }
        let ended = paths.give(|line| line.try_zero(first * SECTOR as u64, BLOCK_SECTORS as usize * SECTOR));
        self.settle(first, BLOCK_SECTORS, 0, ended, tally);
    }

    fn read(&mut self, paths: &mut Paths<'_>, first: u64, tally: &Tally) -> Result<()> {
        match paths.give(|line| line.try_read(first * SECTOR as u64, BLOCK_SECTORS as usize * SECTOR)) {
            Ended::Done(bytes) => {
                for (at, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
                    self.judge(first + at as u64, bytes)?;
                }
                tally.reads.fetch_add(1, Ordering::Relaxed);
            }
            Ended::Refused(refusal) => drop(tally.of(refusal).fetch_add(1, Ordering::Relaxed)),
            Ended::Doubt => drop(tally.doubts.fetch_add(1, Ordering::Relaxed)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(held: u64, doubt: Option<u64>, bytes: &[u8]) -> bool {
        let mut registers = Registers::new(1, 1 << 20, 2);
        // Sector 11 is the second worker's first block's fourth.
        registers.shares[1].cells[0][3] = Cell { held, doubt };
        registers.shares[1].judge(11, bytes).is_ok()
    }

    #[test]
    fn judgement_table() {
        let sector = |number: u64, version: u64| {
            let mut bytes = [0; SECTOR];
            stamp(number, version, &mut bytes);
            bytes
        };
        let mut torn = sector(11, 0x102);
        torn[300] ^= 4;
        for (name, held, doubt, bytes, good) in [
            ("what was acknowledged", 0x102, None, sector(11, 0x102), true),
            ("an older version", 0x202, None, sector(11, 0x102), false),
            ("a ghost", 0x102, None, sector(11, 0x202), false),
            ("zeros for a write", 0x102, None, sector(11, 0), false),
            ("new of two", 0x102, Some(0x202), sector(11, 0x202), true),
            ("old of two", 0x102, Some(0x202), sector(11, 0x102), true),
            ("another sector's", 0x102, None, sector(12, 0x102), false),
            ("a flipped bit", 0x102, None, torn, false),
            ("zeros", 0, None, sector(11, 0), true),
        ] {
            assert_eq!(judged(held, doubt, &bytes), good, "{name}");
        }
    }

    #[test]
    fn shares_are_apart_and_cover_the_volume() {
        let registers = Registers::new(1, 1 << 20, 3);
        let mut seen = std::collections::BTreeSet::new();
        for share in &registers.shares {
            for own in 0..share.blocks {
                assert!(seen.insert(share.first_sector(own)), "{own} of {}", share.number);
            }
        }
        assert_eq!(seen.len() as u64, (1 << 20) / 4096 / 3 * 3);
    }
}
