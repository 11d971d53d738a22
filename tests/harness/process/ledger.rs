//! Writes to a volume from several connections at once, keeps what was acknowledged, and judges what is read back.
//!
//! A volume has 512-byte blocks here, so that most writes are smaller than a block of the drive and must be merged. The
//! first half of the volume is split between the workers; in the second half neighbouring pairs of sectors belong to
//! different workers, so that writes of several connections meet in one 4 KiB block. No two workers own one sector, and
//! each has one command at a time: so of every sector one knows what it holds, or which two things it may hold.
//!
//! ```text
//! sector (512 bytes)
//!   0  u64  magic "PSTKLEDG"
//!   8  u64  seed of the ledger
//!  16  u64  sector number
//!  24  u64  version: sequence of the command << 8 | worker + 1
//!  32  bytes that follow from all these
//! ```
//!
//! Not here: starting and killing what serves the volume, and deep queues (penstock-perf does those).

use super::{Result, failed};
use crate::guest::initiator::{Namespace, Refusal};
use crate::guest::replay::Dice;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub const SECTOR: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"PSTKLEDG");
const WORKERS: usize = 4;
/// Sectors that belong to one worker at a time in the second half.
const PAIR: u64 = 2;
const WRITE_SECTORS_MAX: u64 = 8;
const ZERO_SECTORS_MAX: u64 = 256;
const READ_SECTORS_MAX: u64 = 64;
const FAULTS_SHOWN: usize = 12;

/// What a sector holds; 0 is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(pub u64);

const ZEROS: Version = Version(0);

#[derive(Debug, Clone, Copy)]
struct Cell {
    held: Version,
    /// A command that was not answered would have brought this.
    doubt: Option<Version>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Write,
    Zero,
    Discard,
}

#[derive(Debug, Clone, Copy)]
struct Order {
    deed: Deed,
    first: u64,
    count: u64,
    version: Version,
}

/// What is wrong with a sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub sector: u64,
    /// An error instead of data: a loss, but no lie.
    pub is_unreadable: bool,
    pub what: String,
}

impl Fault {
    fn lie(sector: u64, what: String) -> Self {
        Fault { sector, is_unreadable: false, what }
    }
}

/// How a worker's time ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was told to stop.
    Told,
    /// The connection broke.
    Cut(String),
    Refused(Refusal),
    /// A read gave what it may not.
    Wrong(Fault),
}

/// What a verification saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    pub sectors: u64,
    pub written: u64,
    pub in_doubt_old: u64,
    pub in_doubt_new: u64,
}

/// Counts that a test may watch while workers work.
#[derive(Debug, Default)]
pub struct Progress {
    acknowledged: AtomicU64,
}

impl Progress {
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Worker {
    number: usize,
    dice: Dice,
    sequence: u64,
    /// By sector of the volume; others' stay as they are.
    cells: Vec<Cell>,
    unanswered: Option<Order>,
}

#[derive(Clone)]
pub struct Ledger {
    seed: u64,
    sectors: u64,
    workers: Vec<Worker>,
}

fn owner(sector: u64, sectors: u64) -> usize {
    let half = sectors / 2;
    if sector < half {
        (sector / (half / WORKERS as u64)).min(WORKERS as u64 - 1) as usize
    } else {
        (sector / PAIR % WORKERS as u64) as usize
    }
}

/// The bytes of a sector.
fn stamp(seed: u64, sector: u64, version: Version, into: &mut [u8]) {
    assert_eq!(into.len(), SECTOR);
    if version == ZEROS {
        return into.fill(0);
    }
    into[..8].copy_from_slice(&MAGIC.to_le_bytes());
    into[8..16].copy_from_slice(&seed.to_le_bytes());
    into[16..24].copy_from_slice(&sector.to_le_bytes());
    into[24..32].copy_from_slice(&version.0.to_le_bytes());
    let mut dice = Dice::new(seed ^ sector.rotate_left(32) ^ version.0);
    for word in into[32..].chunks_exact_mut(8) {
        word.copy_from_slice(&dice.roll().to_le_bytes());
    }
}

fn identify(seed: u64, sector: u64, bytes: &[u8]) -> std::result::Result<Version, String> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(ZEROS);
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    if word(0) != MAGIC {
        return Err(format!("neither zeros nor ours: begins with {:#018x}", word(0)));
    }
    if word(8) != seed {
        return Err(format!("holds what another ledger wrote, of seed {:#x}", word(8)));
    }
    if word(16) != sector {
        return Err(format!("holds what was written to sector {}", word(16)));
    }
    let version = Version(word(24));
    let mut expected = [0; SECTOR];
    stamp(seed, sector, version, &mut expected);
    match bytes.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(version),
        Some(at) => Err(format!("begins as version {:#x} and differs from byte {at} on", version.0)),
    }
}

impl Worker {
    /// A random run of sectors of its own, at most `most` long; few places are written often.
    fn place(&mut self, sectors: u64, most: u64) -> (u64, u64) {
        let half = sectors / 2;
        if self.dice.below(3) == 0 {
            let groups = half / (PAIR * WORKERS as u64);
            let group = if self.dice.below(2) == 0 { self.dice.below(groups) } else { self.dice.below((groups / 64).max(1)) };
            // The owner of a sector follows from its absolute number.
            let base = (half + group * PAIR * WORKERS as u64).next_multiple_of(PAIR * WORKERS as u64);
            let first = base + self.number as u64 * PAIR;
            if first + PAIR <= sectors {
                let count = 1 + self.dice.below(PAIR.min(most));
                return (first + self.dice.below(PAIR - count + 1), count);
            }
        }
        let share = half / WORKERS as u64;
        let base = self.number as u64 * share;
        let within = if self.dice.below(2) == 0 { share } else { (share / 64).max(most) };
        let count = 1 + self.dice.below(most);
        (base + self.dice.below(within - count + 1), count)
    }

    fn next_order(&mut self, sectors: u64) -> Order {
        let (deed, most) = match self.dice.below(10) {
            0 => (Deed::Zero, ZERO_SECTORS_MAX),
            1 => (Deed::Discard, ZERO_SECTORS_MAX),
            _ => (Deed::Write, WRITE_SECTORS_MAX),
        };
        let (first, count) = self.place(sectors, most);
        self.sequence += 1;
        let version = if deed == Deed::Write { Version(self.sequence << 8 | (self.number as u64 + 1)) } else { ZEROS };
        Order { deed, first, count, version }
    }

    fn of(&mut self, order: &Order) -> &mut [Cell] {
        &mut self.cells[order.first as usize..(order.first + order.count) as usize]
    }

    fn work(&mut self, seed: u64, sectors: u64, line: &mut Namespace, stop: &AtomicBool, progress: &Progress) -> End {
        let mut bytes = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if self.dice.below(5) == 0 {
                let (first, count) = self.place(sectors, READ_SECTORS_MAX);
                let read = line.try_read(first * SECTOR as u64, count as usize * SECTOR);
                match read {
                    Ok(Ok(read)) => {
                        let found = read.chunks(SECTOR).zip(first..).map(|(bytes, sector)| (sector, identify(seed, sector, bytes)));
                        for (sector, found) in found {
                            let held = self.cells[sector as usize].held;
                            if found.as_ref() != Ok(&held) {
                                return End::Wrong(Fault::lie(sector, format!("read {found:x?} where {held:x?} is")));
                            }
                        }
                    }
                    Ok(Err(refusal)) => return End::Refused(refusal),
                    Err(why) => return End::Cut(why.to_string()),
                }
            }
            let order = self.next_order(sectors);
            let version = order.version;
            self.of(&order).iter_mut().for_each(|cell| cell.doubt = Some(version));
            self.unanswered = Some(order);
            let (offset, length) = (order.first * SECTOR as u64, order.count as usize * SECTOR);
            let answer = match order.deed {
                Deed::Write => {
                    bytes.resize(length, 0);
                    for (sector, bytes) in (order.first..).zip(bytes.chunks_mut(SECTOR)) {
                        stamp(seed, sector, version, bytes);
                    }
                    line.try_write(offset, &bytes)
                }
                Deed::Zero => line.try_zero(offset, length),
                Deed::Discard => line.try_discard(offset, length),
            };
            match answer {
                Ok(Ok(())) => {
                    self.of(&order).iter_mut().for_each(|cell| *cell = Cell { held: version, doubt: None });
                    self.unanswered = None;
                    progress.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                // Refused or cut off: done or not, nobody said.
                Ok(Err(refusal)) => return End::Refused(refusal),
                Err(why) => return End::Cut(why.to_string()),
            }
        }
        End::Told
    }
}

impl Ledger {
    /// Of a fresh volume of `size` bytes, which reads as zeros.
    pub fn new(seed: u64, size: u64) -> Self {
        let sectors = size / SECTOR as u64;
        assert!(sectors >= 8192, "a volume of 4 MiB or more, not {size} bytes");
        let fresh = Cell { held: ZEROS, doubt: None };
        let worker = |number| Worker {
            number,
            dice: Dice::new(seed ^ (number as u64 + 1) << 48),
            sequence: 0,
            cells: vec![fresh; sectors as usize],
            unanswered: None,
        };
        Ledger { seed, sectors, workers: (0..WORKERS).map(worker).collect() }
    }

    /// Of a clone of the volume as it is now. What either writes from here on can be told from what the other does.
    pub fn branch(&self, seed: u64) -> Self {
        let mut branch = self.clone();
        for worker in &mut branch.workers {
            worker.dice = Dice::new(seed ^ (worker.number as u64 + 1) << 48);
            worker.sequence += 1 << 32;
        }
        branch
    }

    /// Connects all workers and lets them work until `meanwhile` has returned; then gathers how each ended, and how many
    /// commands were acknowledged.
    pub fn work_while<T>(&mut self, address: SocketAddr, nqn: &str, meanwhile: impl FnOnce(&Progress) -> T) -> Result<(T, Vec<End>, u64)> {
        work_while(&mut [(self, address, nqn)], meanwhile)
    }

    fn connect(&self, address: SocketAddr, nqn: &str) -> Result<Vec<Namespace>> {
        let line = |worker: &Worker| {
            assert!(worker.unanswered.is_none(), "what was left in doubt is verified before more is written");
            let line = Namespace::connect(address, nqn)?;
            let fits = line.size() >= self.sectors * SECTOR as u64 && line.block_bytes() == SECTOR;
            assert!(fits, "{} bytes in blocks of {}: not the volume that the ledger is of", line.size(), line.block_bytes());
            Ok(line)
        };
        self.workers.iter().map(line).collect()
    }

    /// Reads the whole volume. What was in doubt is what was read, from now on.
    /// `Ok(Err)` lists what is not as acknowledged.
    pub fn verify(&mut self, line: &mut Namespace) -> Result<std::result::Result<Verified, Vec<Fault>>> {
        const PIECE: u64 = 128;
        const BLOCK_SECTORS: u64 = 8;
        let said = line.identify()?;
        let atomic = 1 + u64::from(said.namespace_atomic_power_fail.unwrap_or(said.atomic_write_power_fail));
        let (mut verified, mut faults) = (Verified::default(), Vec::new());
        let mut found_at = vec![ZEROS; self.sectors as usize];
        let mut pieces: Vec<(u64, u64)> = (0..self.sectors).step_by(PIECE as usize).map(|at| (at, PIECE.min(self.sectors - at))).collect();
        while let Some((at, count)) = pieces.pop() {
            match line.try_read(at * SECTOR as u64, count as usize * SECTOR)? {
                Ok(bytes) => {
                    for (bytes, sector) in bytes.chunks(SECTOR).zip(at..) {
                        match self.judge(sector, bytes, &mut verified) {
                            Ok(found) => found_at[sector as usize] = found,
                            Err(fault) => faults.push(fault),
                        }
                    }
                }
                // Block by block, so that one bad block does not hide its neighbours.
                Err(_) if count > BLOCK_SECTORS => {
                    pieces.extend((at..at + count).step_by(BLOCK_SECTORS as usize).map(|at| (at, BLOCK_SECTORS)));
                }
                Err(refusal) => {
                    faults.push(Fault { sector: at, is_unreadable: true, what: format!("{count} sectors cannot be read: {refusal}") })
                }
            }
        }
        for worker in &mut self.workers {
            let Some(order) = worker.unanswered.take() else { continue };
            if order.deed != Deed::Write || order.count > atomic {
                continue;
            }
            let new = (order.first..order.first + order.count).filter(|sector| found_at[*sector as usize] == order.version).count() as u64;
            if new != 0 && new != order.count {
                let what = format!("{new} of {} sectors of one write are there, though {atomic} are promised to be atomic", order.count);
                faults.push(Fault::lie(order.first, what));
            }
        }
        if faults.is_empty() {
            return Ok(Ok(verified));
        }
        // Lies before losses, or the many would hide the worse.
        faults.sort_by_key(|fault| (fault.is_unreadable, fault.sector));
        faults.truncate(FAULTS_SHOWN);
        Ok(Err(faults))
    }

    fn judge(&mut self, sector: u64, bytes: &[u8], verified: &mut Verified) -> std::result::Result<Version, Fault> {
        let cell = &mut self.workers[owner(sector, self.sectors)].cells[sector as usize];
        let found = identify(self.seed, sector, bytes).map_err(|what| Fault::lie(sector, what))?;
        verified.sectors += 1;
        verified.written += u64::from(found != ZEROS);
        if found == cell.held {
            verified.in_doubt_old += u64::from(cell.doubt.is_some());
        } else if Some(found) == cell.doubt {
            verified.in_doubt_new += 1;
        } else {
            let what = format!("holds {found:x?}; acknowledged is {:x?}, in doubt {:x?}", cell.held, cell.doubt);
            return Err(Fault::lie(sector, what));
        }
        *cell = Cell { held: found, doubt: None };
        Ok(found)
    }

    /// How this ledger's content of a sector begins, for whoever looks for it on a drive.
    pub fn mark(&self, sector: u64) -> [u8; 24] {
        let mut bytes = [0; SECTOR];
        stamp(self.seed, sector, Version(1), &mut bytes);
        bytes[..24].try_into().expect("24 bytes")
    }

    /// Somebody else wrote zeros there.
    pub fn forget(&mut self, offset: u64, length: u64) {
        for worker in &mut self.workers {
            let sectors = (offset / SECTOR as u64) as usize..((offset + length) / SECTOR as u64) as usize;
            worker.cells[sectors].fill(Cell { held: ZEROS, doubt: None });
        }
    }

    /// Sectors that were acknowledged and do not read as zeros.
    pub fn written(&self) -> Vec<u64> {
        let written = |sector: &u64| self.workers[owner(*sector, self.sectors)].cells[*sector as usize].held != ZEROS;
        (0..self.sectors).filter(written).collect()
    }

    /// Verifies over a connection of its own; an error lists the faults.
    pub fn expect_good(&mut self, address: SocketAddr, nqn: &str) -> Result<Verified> {
        let mut line = Namespace::connect(address, nqn)?;
        let judged = self.verify(&mut line)?;
        judged.map_err(|faults| failed("acknowledged writes", format!("{faults:#?}")))
    }
}

/// As [`Ledger::work_while`], on several volumes at once.
pub fn work_while<T>(
    volumes: &mut [(&mut Ledger, SocketAddr, &str)],
    meanwhile: impl FnOnce(&Progress) -> T,
) -> Result<(T, Vec<End>, u64)> {
    let (stop, progress) = (AtomicBool::new(false), Progress::default());
    let lines = volumes.iter().map(|(ledger, address, nqn)| ledger.connect(*address, nqn)).collect::<Result<Vec<_>>>()?;
    let (value, ends) = std::thread::scope(|scope| {
        let (stop, progress) = (&stop, &progress);
        let mut threads = Vec::new();
        for ((ledger, _, _), lines) in volumes.iter_mut().zip(lines) {
            let (seed, sectors) = (ledger.seed, ledger.sectors);
            for (worker, mut line) in ledger.workers.iter_mut().zip(lines) {
                threads.push(scope.spawn(move || worker.work(seed, sectors, &mut line, stop, progress)));
            }
        }
        let value = meanwhile(progress);
        stop.store(true, Ordering::Relaxed);
        let ends: Vec<End> = threads.into_iter().map(|thread| thread.join().expect("workers do not panic")).collect();
        (value, ends)
    });
    Ok((value, ends, progress.acknowledged()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;

    #[test]
    fn places_are_the_workers_own_and_all_deeds_happen() {
        let mut ledger = Ledger::new(1, SIZE);
        let sectors = ledger.sectors;
        for worker in &mut ledger.workers {
            let (mut deeds, mut shared) = (Vec::new(), 0);
            for _ in 0..2000 {
                let order = worker.next_order(sectors);
                for sector in order.first..order.first + order.count {
                    assert_eq!(owner(sector, sectors), worker.number, "{order:?}");
                }
                shared += usize::from(order.first >= sectors / 2);
                if !deeds.contains(&order.deed) {
                    deeds.push(order.deed);
                }
            }
            assert!(deeds.len() == 3 && shared > 200, "{deeds:?} {shared}");
        }
    }

    fn judged(held: u64, doubt: Option<u64>, found: &[u8]) -> std::result::Result<Version, Fault> {
        let mut ledger = Ledger::new(9, SIZE);
        ledger.workers[0].cells[3] = Cell { held: Version(held), doubt: doubt.map(Version) };
        ledger.judge(3, found, &mut Verified::default())
    }

    fn sector(number: u64, version: u64) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        stamp(9, number, Version(version), &mut bytes);
        bytes
    }

    #[test]
    fn judgement_table() {
        let mut torn = sector(3, 0x101);
        torn[400] ^= 1;
        for (name, held, doubt, found, good) in [
            ("what was acknowledged", 0x101, None, sector(3, 0x101), true),
            ("an older version", 0x201, None, sector(3, 0x101), false),
            ("a newer version that nobody wrote", 0x101, None, sector(3, 0x201), false),
            ("zeros for a write", 0x101, None, sector(3, 0), false),
            ("old of two", 0x101, Some(0x201), sector(3, 0x101), true),
            ("new of two", 0x101, Some(0x201), sector(3, 0x201), true),
            ("neither of two", 0x101, Some(0x201), sector(3, 0x301), false),
            ("a discard in doubt", 0x101, Some(0), sector(3, 0), true),
            ("another sector's content", 0x101, None, sector(4, 0x101), false),
            ("a changed bit", 0x101, None, torn, false),
            ("foreign bytes", 0, None, [7; SECTOR], false),
        ] {
            assert_eq!(judged(held, doubt, &found).is_ok(), good, "{name}");
        }
    }

    #[test]
    fn doubt_once_resolved_stays_resolved() {
        let mut ledger = Ledger::new(9, SIZE);
        ledger.workers[0].cells[3] = Cell { held: Version(0x101), doubt: Some(Version(0x201)) };
        let mut verified = Verified::default();
        assert!(ledger.judge(3, &sector(3, 0x201), &mut verified).is_ok());
        assert!(ledger.judge(3, &sector(3, 0x101), &mut verified).is_err(), "a write that came back does not go again");
    }
}
