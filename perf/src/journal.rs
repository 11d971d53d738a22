//! The journal of what was issued and acknowledged, kept in a file so that a later process can check every promise.
//!
//! Layout: one 64-byte header, then records of 24 bytes, little endian; each carries 16 check bits of its CRC32C, and a
//! torn tail ends the journal. Records are handed to a thread of their own a batch at a time, so the polled loop makes
//! no system call for them. The file is not synced: it has to survive the death of processes, not of the machine it is
//! on. If the *writer* is killed, its last milliseconds may be missing; then blocks newer than the journal's end are
//! counted apart and are no fault ([`Replay::is_clean`]).
//!
//! Deliberately not here: what the records mean for a block (see [`crate::expect`]).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::expect::{Expectations, Initial, TrimReads, Version};
use crate::units::{BlockIndex, ByteCount, Generation};

const MAGIC: &[u8; 8] = b"PNSTKJNL";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const RECORD_BYTES: usize = 24;
const BATCH_RECORDS: usize = 1024;
const BATCHES_IN_FLIGHT: usize = 256;

/// What the whole journal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub seed: u64,
    /// Bytes of one verify unit.
    pub unit: u32,
    pub device: ByteCount,
    pub initial: Initial,
    pub trim_reads: TrimReads,
}

/// One fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A mutation of `count` blocks was given to the target.
    Issued {
        generation: Generation,
        first: BlockIndex,
        count: u32,
        is_trim: bool,
    },
    Acknowledged {
        generation: Generation,
    },
    /// It failed, or nothing was heard of it: its blocks are in doubt.
    Failed {
        generation: Generation,
    },
    /// The writer ended in good order; what is in flight here is in doubt.
    End,
}

/// Why a journal could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("journal {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a journal of this tool: it starts with {found:02x?}, not with `PNSTKJNL`")]
    NotAJournal { path: PathBuf, found: Vec<u8> },
    #[error("{path} is a journal of version {found}; this tool reads version {VERSION}")]
    Version { path: PathBuf, found: u32 },
    #[error("{path}: the header's checksum is {found:#x}, its bytes give {computed:#x}; the journal cannot be used")]
    HeaderChecksum { path: PathBuf, found: u32, computed: u32 },
    #[error("{path}: record {index} {what}; the journal was not written by this tool or was changed since")]
    Impossible { path: PathBuf, index: u64, what: &'static str },
    #[error("{path} is about a device of {journal} with seed {seed:#x}; the target has {target}")]
    OtherDevice { path: PathBuf, seed: u64, journal: ByteCount, target: ByteCount },
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.unit.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seed.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.device.0.to_le_bytes());
        bytes[32] = u8::from(self.initial == Initial::Zero);
        bytes[33] = u8::from(self.trim_reads == TrimReads::Zero);
        let check = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES], path: &Path) -> Result<Self, JournalError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let path = path.to_owned();
        if &bytes[..8] != MAGIC {
            return Err(JournalError::NotAJournal { path, found: bytes[..8].to_vec() });
        }
        let (found, computed) = (u32_at(60), crc32c::crc32c(&bytes[..60]));
        if found != computed {
            return Err(JournalError::HeaderChecksum { path, found, computed });
        }
        if u32_at(8) != VERSION {
            return Err(JournalError::Version { path, found: u32_at(8) });
        }
        Ok(Self {
            seed: u64_at(16),
            unit: u32_at(12),
            device: ByteCount(u64_at(24)),
            initial: if bytes[32] == 1 { Initial::Zero } else { Initial::Unknown },
            trim_reads: if bytes[33] == 1 { TrimReads::Zero } else { TrimReads::Unknown },
        })
    }
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, generation, first, count) = match *self {
            Self::Issued { generation, first, count, is_trim } => (if is_trim { 2 } else { 1 }, generation, first, count),
            Self::Acknowledged { generation } => (3, generation, BlockIndex(0), 0),
            Self::Failed { generation } => (4, generation, BlockIndex(0), 0),
            Self::End => (5, Generation(0), BlockIndex(0), 0),
        };
        let mut bytes = [0; RECORD_BYTES];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&u32::to_le_bytes(count));
        bytes[8..16].copy_from_slice(&first.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&generation.0.to_le_bytes());
        let check = crc32c::crc32c(&bytes) as u16;
        bytes[2..4].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// `None` where the check bits or the kind are wrong: the journal ends there.
    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let mut unchecked = *bytes;
        unchecked[2..4].fill(0);
        if bytes[2..4] != (crc32c::crc32c(&unchecked) as u16).to_le_bytes() {
            return None;
        }
        let count = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        let first = BlockIndex(u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")));
        let generation = Generation(u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes")));
        match bytes[0] {
            kind @ (1 | 2) => Some(Self::Issued { generation, first, count, is_trim: kind == 2 }),
            3 => Some(Self::Acknowledged { generation }),
            4 => Some(Self::Failed { generation }),
            5 => Some(Self::End),
            _ => None,
        }
    }
}

/// Appends records from the polled loop.
pub struct JournalWriter {
    path: PathBuf,
    batch: Vec<Record>,
    full: Option<Sender<Vec<Record>>>,
    empty: Receiver<Vec<Record>>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl JournalWriter {
    /// Creates the file anew.
    pub fn create(path: &Path, header: &Header) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io { path: path.to_owned(), source };
        let mut file = File::create(path).map_err(fail)?;
        file.write_all(&header.encode()).map_err(fail)?;
        Ok(Self::over(file, path))
    }

    /// Goes on after the last whole record of an existing journal.
    pub fn append(path: &Path, replay: &Replay) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new().append(true).open(path).map_err(fail)?;
        file.set_len(HEADER_BYTES as u64 + replay.records * RECORD_BYTES as u64).map_err(fail)?;
        let mut journal = Self::over(file, path);
        journal.push(Record::End)?; // what was in flight before is in doubt, whatever ended the last writer
        Ok(journal)
    }

    fn over(file: File, path: &Path) -> Self {
        let (full, batches) = bounded::<Vec<Record>>(BATCHES_IN_FLIGHT);
        let (recycle, empty) = bounded(BATCHES_IN_FLIGHT);
        let writer = std::thread::spawn(move || {
            let mut file = file;
            let mut bytes = Vec::with_capacity(BATCH_RECORDS * RECORD_BYTES);
            for mut batch in batches {
                bytes.clear();
                for record in batch.drain(..) {
                    bytes.extend_from_slice(&record.encode());
                }
                file.write_all(&bytes)?;
                // A full recycling channel just means that the loop allocates its next batch.
                let _ = recycle.try_send(batch);
            }
            Ok(())
        });
        Self { path: path.to_owned(), batch: Vec::with_capacity(BATCH_RECORDS), full: Some(full), empty, writer: Some(writer) }
    }

    /// Adds a record; a full batch is handed over. Waits when the file is more than
    /// [`BATCHES_IN_FLIGHT`] batches behind.
    pub fn push(&mut self, record: Record) -> Result<(), JournalError> {
        self.batch.push(record);
        if self.batch.len() >= BATCH_RECORDS { self.hand_over() } else { Ok(()) }
    }

    /// Hands over what was gathered; called about every millisecond.
    pub fn hand_over(&mut self) -> Result<(), JournalError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(BATCH_RECORDS));
        let batch = std::mem::replace(&mut self.batch, next);
        let full = self.full.as_ref().expect("open until finished");
        // The channel closes only when the writer failed; its reason is joined for.
        if full.send(batch).is_err() { self.join() } else { Ok(()) }
    }

    /// Writes the end mark and everything before it.
    pub fn finish(mut self) -> Result<(), JournalError> {
        self.push(Record::End)?;
        self.hand_over()?;
        self.join()
    }

    fn join(&mut self) -> Result<(), JournalError> {
        self.full = None;
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let result = writer.join().expect("the journal's writer does not panic");
        result.map_err(|source| JournalError::Io { path: self.path.clone(), source })
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        // Without `finish` there is no end mark, but what was pushed is still written.
        if self.full.is_some() && self.hand_over().is_ok() {
            let _ = self.join();
        }
    }
}

/// What a journal says when read back.
pub struct Replay {
    pub header: Header,
    pub expectations: Expectations,
    /// The greatest generation that was issued.
    pub newest: Generation,
    pub records: u64,
    pub acknowledged: u64,
    /// Mutations whose fate the journal does not tell.
    pub in_doubt: u64,
    /// False when the writer was killed: its last records may be missing.
    pub is_clean: bool,
}

struct Flying {
    first: BlockIndex,
    count: u32,
}

impl Replay {
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io { path: path.to_owned(), source };
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(fail)?);
        let mut head = [0; HEADER_BYTES];
        file.read_exact(&mut head).map_err(fail)?;
        let header = Header::decode(&head, path)?;
        let mut replay = Self {
            header,
            expectations: Expectations::new(header.initial, header.trim_reads),
            newest: Generation(0),
            records: 0,
            acknowledged: 0,
            in_doubt: 0,
            is_clean: false,
        };
        let mut flying: HashMap<Generation, Flying> = HashMap::new();
        let mut bytes = [0; RECORD_BYTES];
        loop {
            match file.read_exact(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                other => other.map_err(fail)?,
            }
            let Some(record) = Record::decode(&bytes) else {
                replay.is_clean = false;
                break;
            };
            replay.take(record, &mut flying, path)?;
            replay.records += 1;
        }
        replay.end(&mut flying);
        Ok(replay)
    }

    fn end(&mut self, flying: &mut HashMap<Generation, Flying>) {
        self.in_doubt += flying.len() as u64;
        flying.clear();
        self.expectations.all_in_doubt();
    }

    fn take(&mut self, record: Record, flying: &mut HashMap<Generation, Flying>, path: &Path) -> Result<(), JournalError> {
        let index = self.records;
        let impossible = |what| JournalError::Impossible { path: path.to_owned(), index, what };
        let blocks = |flying: &Flying| {
            let first = flying.first.0;
            (first..first + u64::from(flying.count)).map(BlockIndex)
        };
        self.is_clean = record == Record::End;
        match record {
            Record::Issued { generation, first, count, is_trim } => {
                let last = first.0.checked_add(u64::from(count));
                let blocks_max = self.header.device.0 / u64::from(self.header.unit.max(1));
                if last.is_none_or(|last| last > blocks_max) {
                    return Err(impossible("names blocks beyond the device"));
                }
                if generation <= self.newest || generation.0 >> 62 != 0 {
                    return Err(impossible("has a generation that is not newer than those before it"));
                }
                self.newest = generation;
                let version = if is_trim { Version::Trimmed(generation) } else { Version::Written(generation) };
                let entry = Flying { first, count };
                if blocks(&entry).any(|block| self.expectations.is_in_flight(block)) {
                    return Err(impossible("overlaps a mutation in flight"));
                }
                for block in blocks(&entry) {
                    self.expectations.issued(block, version);
                }
                flying.insert(generation, entry);
            }
            Record::Acknowledged { generation } => {
                let entry = flying.remove(&generation).ok_or_else(|| impossible("acknowledges what is not in flight"))?;
                blocks(&entry).for_each(|block| self.expectations.acknowledged(block));
                self.acknowledged += 1;
            }
            Record::Failed { generation } => {
                let entry = flying.remove(&generation).ok_or_else(|| impossible("fails what is not in flight"))?;
                blocks(&entry).for_each(|block| self.expectations.in_doubt(block));
                self.in_doubt += 1;
            }
            Record::End => self.end(flying),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Found;
    use crate::expect::Verdict;
    use std::io::{Seek, SeekFrom};

    const HEADER: Header = Header { seed: 5, unit: 4096, device: ByteCount(1 << 20), initial: Initial::Zero, trim_reads: TrimReads::Zero };

    fn issued(number: u64, first: u64, count: u32) -> Record {
        Record::Issued { generation: Generation(number), first: BlockIndex(first), count, is_trim: false }
    }

    fn acknowledged(number: u64) -> Record {
        Record::Acknowledged { generation: Generation(number) }
    }

    fn written(records: &[Record], finish: bool) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = JournalWriter::create(&path, &HEADER).unwrap();
        for record in records {
            journal.push(*record).unwrap();
        }
        if finish {
            journal.finish().unwrap();
        }
        (dir, path)
    }

    fn found(number: u64) -> Found {
        Found::Written(Generation(number))
    }

    #[test]
    fn journal_read_back_tells_acknowledged_from_in_doubt() {
        let (_dir, path) = written(&[issued(1, 0, 2), issued(2, 2, 1), acknowledged(1)], true);
        let replay = Replay::read(&path).unwrap();
        assert_eq!((replay.header, replay.acknowledged, replay.in_doubt), (HEADER, 1, 1));
        assert!(replay.is_clean);
        assert_eq!(replay.newest, Generation(2));
        let judge = |block, held| replay.expectations.judge(BlockIndex(block), held);
        assert_eq!(judge(1, found(1)), Verdict::Acknowledged);
        assert!(matches!(judge(1, Found::Zero), Verdict::Bad(_)));
        assert_eq!(judge(2, Found::Zero), Verdict::EitherWay { is_new: false });
        assert_eq!(judge(2, found(2)), Verdict::EitherWay { is_new: true });
    }

    #[test]
    fn journal_torn_in_its_last_record_ends_before_it_and_is_not_clean() {
        let (_dir, path) = written(&[issued(1, 0, 1), acknowledged(1), issued(2, 0, 1)], false);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 5).unwrap();
        let replay = Replay::read(&path).unwrap();
        assert_eq!((replay.records, replay.is_clean), (2, false));
        assert_eq!(replay.expectations.judge(BlockIndex(0), found(1)), Verdict::Acknowledged);
    }

    #[test]
    fn journal_continued_after_a_kill_puts_what_was_in_flight_in_doubt() {
        let (_dir, path) = written(&[issued(1, 0, 1), acknowledged(1), issued(2, 0, 1)], false);
        let replay = Replay::read(&path).unwrap();
        let mut journal = JournalWriter::append(&path, &replay).unwrap();
        journal.push(issued(3, 1, 1)).unwrap();
        journal.push(acknowledged(3)).unwrap();
        journal.finish().unwrap();
        let replay = Replay::read(&path).unwrap();
        assert_eq!((replay.acknowledged, replay.in_doubt, replay.newest), (2, 1, Generation(3)));
        for held in [found(1), found(2)] {
            assert!(matches!(replay.expectations.judge(BlockIndex(0), held), Verdict::EitherWay { .. }));
        }
    }

    #[test]
    fn journal_with_a_changed_header_is_refused() {
        let (_dir, path) = written(&[], true);
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(16)).unwrap();
        file.write_all(&[9]).unwrap();
        assert!(matches!(Replay::read(&path), Err(JournalError::HeaderChecksum { .. })));
        std::fs::write(&path, [0; 64]).unwrap();
        assert!(matches!(Replay::read(&path), Err(JournalError::NotAJournal { .. })));
    }

    #[test]
    fn journal_that_says_what_cannot_be_is_refused() {
        for records in
            [vec![acknowledged(1)], vec![issued(2, 0, 1), issued(1, 1, 1)], vec![issued(1, 0, 2), issued(2, 1, 1)], vec![issued(1, 255, 2)]]
        {
            let (_dir, path) = written(&records, true);
            assert!(matches!(Replay::read(&path), Err(JournalError::Impossible { .. })), "{records:?}");
        }
    }

    #[test]
    fn journal_of_many_batches_is_whole() {
        let records: Vec<Record> = (1..=5_000).flat_map(|number| [issued(number, number % 256, 1), acknowledged(number)]).collect();
        let (_dir, path) = written(&records, true);
        assert_eq!(Replay::read(&path).unwrap().acknowledged, 5_000);
    }
}
