//! Reads the log that QEMU's `blklogwrites` block driver keeps of a drive: every write, flush and discard.
//!
//! ```text
//! The format is that of Linux's dm-log-writes (drivers/md/dm-log-writes.c; QEMU block/blklogwrites.c). All integers are
//! little-endian. The file is a row of log sectors of S bytes each (S = log-sector-size, a power of two, 512 here).
//!
//! sector 0, the superblock                       one entry, in one sector of its own
//!   0  u64  magic 0x006a736677736872               0  u64  sector      first sector written, in units of S
//!   8  u64  version, 1                             8  u64  nr_sectors  length, in units of S
//!  16  u64  nr_entries                            16  u64  flags       1 flush, 2 FUA, 4 discard, 8 mark
//!  24  u32  sectorsize, S                         24  u64  data_len    length of a mark's text; 0 from QEMU
//!  28  zeros to S                                 32  zeros to S
//!                                                 then nr_sectors sectors of data, unless it is a discard
//! ```
//!
//! What the order means (QEMU, `blk_log_writes_co_log`): the operation is done on the drive first, then takes the next
//! place in the log, then that place is written, and only then is the guest answered. So:
//! - whatever the guest saw complete stands in the log, before anything it started afterwards;
//! - entries are in order of completion. The log does not say when a flush was *submitted*, so a write that completed
//!   while a flush was under way counts as covered by it here. A program that sends its barrier before its writes have
//!   completed is not caught by this log (the simulator catches that one).
//! - QEMU renews `nr_entries` only at flushes, and sets it even later than it takes places. It is not used here except to
//!   tell a log from other files: entries are walked one by one.
//! - A place that was taken but not yet written when QEMU was killed reads as zeros. No real entry does: writes and
//!   discards have a length and flushes a flag. The log is read up to there; what follows is unknown to us, and no
//!   promise made later than that is looked at either.
//! - FUA is not recorded: QEMU's block layer turns it into a write and a flush.
//! - Write-zeroes is recorded as a write of zeros.

use super::{At, GuestError, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub const MAGIC: u64 = 0x006a_7366_7773_6872;
pub const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const DISCARD: u64 = 1 << 2;

/// What one entry records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data stand in the log at byte `data`.
    Write {
        data: u64,
    },
    Flush,
    Discard,
}

/// One operation that completed on the drive, at byte `offset` for `length` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub offset: u64,
    pub length: u64,
}

/// Why reading ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// At the end of the file, after a whole entry.
    Clean,
    /// At a place that was taken but not written, or only partly; as after a power cut.
    Cut,
}

/// A log, its entries in order.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    path: PathBuf,
    pub entries: Vec<Entry>,
    pub end: End,
    /// The superblock's count, if one was ever written (at the first flush).
    pub counted: Option<u64>,
}

impl WriteLog {
    /// Reads `path`, whose log sectors are `sector_size` bytes. A log that was never flushed has no superblock yet.
    pub fn open(path: &Path, sector_size: u32) -> Result<Self> {
        let file = File::open(path).at("open", path)?;
        let length = file.metadata().at("look at", path)?.len();
        let step = u64::from(sector_size);
        let counted = superblock(&file, path, length, sector_size)?;

        let mut entries = Vec::new();
        let mut at = step;
        let mut end = End::Clean;
        while at < length {
            let mut head = [0; 32];
            if at + step > length {
                end = End::Cut;
                break;
            }
            file.read_exact_at(&mut head, at).at("read", path)?;
            let [sector, sectors, flags, _] = fields(&head);
            if [sector, sectors, flags] == [0; 3] {
                end = End::Cut;
                break;
            }
            let place = at;
            let bad = |why: &str| {
                let detail = format!("{why} (sector {sector}, nr_sectors {sectors}, flags {flags:#x})");
                GuestError::failed(format!("{}: entry {} at byte {place}", path.display(), entries.len()), detail)
            };
            if ![0, FLUSH, DISCARD].contains(&flags) {
                return Err(bad("flags that QEMU does not write: another program's log, or read out of step"));
            }
            let (Some(offset), Some(bytes)) = (sector.checked_mul(step), sectors.checked_mul(step)) else {
                return Err(bad("beyond any drive"));
            };
            if offset.checked_add(bytes).is_none() {
                return Err(bad("beyond any drive"));
            }
            let data = at + step;
            at = data;
            if flags == DISCARD {
                entries.push(Entry { kind: Kind::Discard, offset, length: bytes });
                continue;
            }
            if flags == FLUSH {
                entries.push(Entry { kind: Kind::Flush, offset: 0, length: 0 });
                continue;
            }
            at = data.checked_add(bytes).ok_or_else(|| bad("beyond any file"))?;
            if at > length {
                end = End::Cut;
                break;
            }
            entries.push(Entry { kind: Kind::Write { data }, offset, length: bytes });
        }
        Ok(WriteLog { file, path: path.to_owned(), entries, end, counted })
    }

    /// The data of a write; empty for others.
    pub fn data(&self, entry: &Entry) -> Result<Vec<u8>> {
        match entry.kind {
            Kind::Write { data } => {
                let mut bytes = vec![0; entry.length as usize];
                self.file.read_exact_at(&mut bytes, data).at("read", &self.path)?;
                Ok(bytes)
            }
            Kind::Flush | Kind::Discard => Ok(Vec::new()),
        }
    }

    pub fn flushes(&self) -> usize {
        self.entries.iter().filter(|e| e.kind == Kind::Flush).count()
    }
}

fn superblock(file: &File, path: &Path, length: u64, sector_size: u32) -> Result<Option<u64>> {
    if length < 28 {
        return Ok(None);
    }
    let mut head = [0; 32];
    let present = length.min(32) as usize;
    file.read_exact_at(&mut head[..present], 0).at("read", path)?;
    if head == [0; 32] {
        return Ok(None);
    }
    let [magic, version, counted, size] = fields(&head);
    let size = size as u32;
    if (magic, version, size) != (MAGIC, VERSION, sector_size) {
        return Err(GuestError::failed(
            format!("{} is not the log expected", path.display()),
            format!("magic {magic:#x}, version {version}, sector size {size}; expected {MAGIC:#x}, {VERSION}, {sector_size}"),
        ));
    }
    Ok(Some(counted))
}

fn fields(head: &[u8; 32]) -> [u64; 4] {
    std::array::from_fn(|i| u64::from_le_bytes(head[8 * i..8 * i + 8].try_into().expect("8 bytes")))
}

/// Writes logs in the same format, for tests of what reads them.
#[cfg(test)]
pub mod fake {
    use super::*;
    use std::io::Write;

    /// A log in memory, one call an entry.
    pub struct FakeLog {
        pub bytes: Vec<u8>,
        entries: u64,
    }

    impl Default for FakeLog {
        fn default() -> Self {
            FakeLog { bytes: vec![0; 512], entries: 0 }
        }
    }

    impl FakeLog {
        pub fn new() -> Self {
            Self::default()
        }

        fn entry(&mut self, sector: u64, sectors: u64, flags: u64) {
            let at = self.bytes.len();
            for field in [sector, sectors, flags, 0] {
                self.bytes.extend(field.to_le_bytes());
            }
            self.bytes.resize(at + 512, 0);
            self.entries += 1;
        }

        pub fn write(&mut self, offset: u64, data: &[u8]) -> &mut Self {
            assert!(offset.is_multiple_of(512) && data.len().is_multiple_of(512));
            self.entry(offset / 512, data.len() as u64 / 512, 0);
            self.bytes.extend(data);
            self
        }

        pub fn flush(&mut self) -> &mut Self {
            self.entry(0, 0, FLUSH);
            let fields = [MAGIC, VERSION, self.entries];
            for (i, field) in fields.iter().enumerate() {
                self.bytes[8 * i..8 * i + 8].copy_from_slice(&field.to_le_bytes());
            }
            self.bytes[24..28].copy_from_slice(&512u32.to_le_bytes());
            self
        }

        pub fn discard(&mut self, offset: u64, length: u64) -> &mut Self {
            self.entry(offset / 512, length / 512, DISCARD);
            self
        }

        pub fn open(&self) -> Result<WriteLog> {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&self.bytes).unwrap();
            WriteLog::open(file.path(), 512)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeLog;
    use super::*;

    #[test]
    fn log_of_each_kind_reads_back_in_order() {
        let mut fake = FakeLog::new();
        fake.write(1024, &[7; 1024]).flush().discard(4096, 8192).write(0, &[9; 512]);
        let log = fake.open().unwrap();
        assert_eq!(log.end, End::Clean);
        assert_eq!(log.counted, Some(2), "renewed at the flush only");
        let kinds: Vec<_> = log.entries.iter().map(|e| (e.kind, e.offset, e.length)).collect();
        assert_eq!(
            kinds,
            [
                (Kind::Write { data: 1024 }, 1024, 1024),
                (Kind::Flush, 0, 0),
                (Kind::Discard, 4096, 8192),
                (Kind::Write { data: 3584 }, 0, 512)
            ]
        );
        assert_eq!(log.data(&log.entries[0]).unwrap(), [7; 1024]);
        assert_eq!(log.data(&log.entries[3]).unwrap(), [9; 512]);
    }

    #[test]
    fn log_with_an_unwritten_place_ends_before_it() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]);
        fake.bytes.extend([0; 1024]); // taken, never written
        fake.flush();
        let log = fake.open().unwrap();
        assert_eq!((log.entries.len(), log.end), (1, End::Cut));
    }

    #[test]
    fn log_cut_inside_data_ends_before_that_write() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]).write(512, &[2; 1024]);
        fake.bytes.truncate(fake.bytes.len() - 512);
        let log = fake.open().unwrap();
        assert_eq!((log.entries.len(), log.end), (1, End::Cut));
    }

    #[test]
    fn log_with_unknown_flags_is_refused() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]);
        fake.bytes[512 + 16] = 0x80;
        assert!(fake.open().unwrap_err().to_string().contains("flags 0x80"));
    }

    #[test]
    fn log_with_another_sector_size_is_refused_naming_both() {
        let mut fake = FakeLog::new();
        fake.flush();
        fake.bytes[24..28].copy_from_slice(&4096u32.to_le_bytes());
        let said = fake.open().unwrap_err().to_string();
        assert!(said.contains("sector size 4096") && said.contains("512"), "{said}");
    }

    #[test]
    fn log_with_any_byte_changed_reads_or_is_refused_and_never_panics() {
        let mut fake = FakeLog::new();
        fake.write(1024, &[7; 1024]).flush().discard(4096, 8192).write(0, &[9; 512]);
        for at in 0..fake.bytes.len() {
            let before = fake.bytes[at];
            fake.bytes[at] = !before;
            drop(fake.open());
            fake.bytes[at] = before;
        }
    }

    #[test]
    fn log_never_flushed_has_entries_but_no_count() {
        let mut fake = FakeLog::new();
        fake.write(0, &[1; 512]);
        let log = fake.open().unwrap();
        assert_eq!((log.entries.len(), log.counted), (1, None));
    }
}
