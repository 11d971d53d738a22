//! Reading and writing of little-endian fields with bounds checks, and the checksum of every record.

use thiserror::Error;

/// Why bytes are not the record that was looked for.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum DecodeError {
    #[error("no {what} here: the magic is {found:02x?}")]
    Magic { what: &'static str, found: [u8; 8] },
    #[error("{what} has format version {found}; this build reads {known}")]
    Version { what: &'static str, found: u32, known: u32 },
    #[error("{what}: checksum {found:#010x} stands, {computed:#010x} was computed")]
    Checksum { what: &'static str, found: u32, computed: u32 },
    #[error("{what} ends early: {need} bytes are needed, {left} are left")]
    Short { what: &'static str, need: usize, left: usize },
    #[error("{what} is {found}, which is not a value it can have")]
    Value { what: &'static str, found: u64 },
    #[error("{what} is {found}; the limit is {limit}")]
    Limit { what: &'static str, found: u64, limit: u64 },
    #[error("{what}: {found} stands where {expected} belongs")]
    Mismatch { what: &'static str, found: String, expected: String },
}

/// CRC-32C (Castagnoli, as iSCSI), the checksum of blocks and records.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

const MAGIC_LEN: usize = 8;
const VERSION_AT: usize = 8;
const CRC_AT: usize = 12;
/// Bytes of `magic version crc`, with which every record starts.
pub(crate) const PREFIX: usize = 16;

/// Fills in magic, version and, last, the checksum over all of `record`.
pub(crate) fn seal(record: &mut [u8], magic: &[u8; 8], version: u32) {
    record[..MAGIC_LEN].copy_from_slice(magic);
    record[VERSION_AT..CRC_AT].copy_from_slice(&version.to_le_bytes());
    record[CRC_AT..PREFIX].fill(0);
    let crc = crc32c(record);
    record[CRC_AT..PREFIX].copy_from_slice(&crc.to_le_bytes());
}

/// Checks magic, version and checksum over all of `record`.
pub(crate) fn unseal(record: &[u8], what: &'static str, magic: &[u8; 8], version: u32) -> Result<(), DecodeError> {
    // After the checksum: a version that rotted is rot, not another version.
    match unseal_versions(record, what, magic)? {
        found if found == version => Ok(()),
        found => Err(DecodeError::Version { what, found, known: version }),
    }
}

/// Checks magic and checksum over all of `record`, and gives its version, of which the caller takes more than one.
pub(crate) fn unseal_versions(record: &[u8], what: &'static str, magic: &[u8; 8]) -> Result<u32, DecodeError> {
    check_magic(record, what, magic)?;
    let word = |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
    let found = word(CRC_AT);
    let computed = crc_with_zeroed_field(record);
    if found != computed {
        return Err(DecodeError::Checksum { what, found, computed });
    }
    Ok(word(VERSION_AT))
}

pub(crate) fn check_magic(record: &[u8], what: &'static str, magic: &[u8; 8]) -> Result<(), DecodeError> {
    if record.len() < PREFIX {
        return Err(DecodeError::Short { what, need: PREFIX, left: record.len() });
    }
    if &record[..MAGIC_LEN] != magic {
        let mut found = [0; 8];
        found.copy_from_slice(&record[..MAGIC_LEN]);
        return Err(DecodeError::Magic { what, found });
    }
    Ok(())
}

fn crc_with_zeroed_field(record: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&record[..CRC_AT]);
    digest.update(&[0; 4]);
    digest.update(&record[PREFIX..]);
    digest.finalize() as u32
}

/// A write cursor. Panics past the end: sizes are the caller's invariant, checked before encoding.
pub(crate) struct Put<'a> {
    to: &'a mut [u8],
    at: usize,
}

impl<'a> Put<'a> {
    pub fn new(to: &'a mut [u8], at: usize) -> Self {
        Self { to, at }
    }
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.to[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
    pub fn u8(&mut self, v: u8) {
        self.bytes(&[v]);
    }
    pub fn u16(&mut self, v: u16) {
        self.bytes(&v.to_le_bytes());
    }
    pub fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }
    pub fn u64(&mut self, v: u64) {
        self.bytes(&v.to_le_bytes());
    }
    pub fn at(&self) -> usize {
        self.at
    }
}

/// A read cursor that never reads past the end.
pub(crate) struct Take<'a> {
    from: &'a [u8],
    at: usize,
    what: &'static str,
}

impl<'a> Take<'a> {
    pub fn new(from: &'a [u8], at: usize, what: &'static str) -> Self {
        Self { from, at, what }
    }
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let left = self.from.len().saturating_sub(self.at);
        if len > left {
            return Err(DecodeError::Short { what: self.what, need: len, left });
        }
        let bytes = &self.from[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }
    pub fn id(&mut self) -> Result<[u8; 16], DecodeError> {
        self.array()
    }
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A count that grows, below [`crate::COUNT_LIMIT`].
    pub fn count(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let found = self.u64()?;
        if found >= crate::COUNT_LIMIT {
            return Err(DecodeError::Limit { what, found, limit: crate::COUNT_LIMIT });
        }
        Ok(found)
    }
    pub fn left(&self) -> usize {
        self.from.len() - self.at
    }
}
