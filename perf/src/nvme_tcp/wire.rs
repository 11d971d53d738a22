//! NVMe/TCP as an initiator speaks it: PDUs and submission queue entries as bytes.
//!
//! Sources: NVM Express base 2.0 (Connect, properties, Identify, status), NVMe/TCP transport 1.0 (PDUs), NVM command set 1.0 (Read, Write,
//! Dataset Management). Deliberately not here: sockets, digests, TLS.

use crate::workload::{Op, OpKind};

pub const IC_REQ: u8 = 0;
pub const IC_RESP: u8 = 1;
pub const CAPSULE_CMD: u8 = 4;
pub const CAPSULE_RESP: u8 = 5;
pub const H2C_DATA: u8 = 6;
pub const C2H_DATA: u8 = 7;
pub const R2T: u8 = 9;

/// Flag of C2H_DATA: no response capsule follows.
pub const SUCCESS: u8 = 1 << 3;
/// Flag of C2H_DATA and H2C_DATA: the last of its transfer.
const LAST: u8 = 1 << 2;

const WRITE: u8 = 1;
const READ: u8 = 2;
const IDENTIFY: u8 = 6;
const DATASET_MANAGEMENT: u8 = 9;
const FABRICS: u8 = 0x7f;

/// A header's first 8 bytes say type, flags and length.
pub const HEAD: usize = 8;
/// Header of a command capsule.
const CAPSULE_HEAD: usize = 72;
/// Header of a data PDU.
pub const DATA_HEAD: usize = 24;

/// A submission queue entry.
#[derive(Clone)]
pub struct Entry([u8; 64]);

impl Entry {
    fn new(opcode: u8) -> Self {
        let mut entry = [0; 64];
        entry[0] = opcode;
        entry[1] = 0x40; // SGLs
        Self(entry)
    }

    fn word(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn connect(queue: u16, entries: u16) -> Self {
        let mut entry = Self::new(FABRICS);
        entry.0[4] = 1;
        entry.0[42..44].copy_from_slice(&queue.to_le_bytes());
        entry.0[44..46].copy_from_slice(&(entries - 1).to_le_bytes());
        entry // no keep-alive: word 48 stays 0
    }

    pub fn property_set(property: u32, value: u64) -> Self {
        let mut entry = Self::new(FABRICS);
        entry.word(44, property);
        entry.0[48..56].copy_from_slice(&value.to_le_bytes());
        entry
    }

    pub fn property_get(property: u32) -> Self {
        let mut entry = Self::new(FABRICS);
        entry.0[4] = 4;
        entry.word(44, property);
        entry
    }

    /// `structure` 0 is the namespace, 1 the controller.
    pub fn identify(structure: u32, namespace: u32) -> Self {
        let mut entry = Self::new(IDENTIFY);
        entry.word(4, namespace);
        entry.word(40, structure);
        entry
    }

    /// An operation on namespace 1 in blocks of `block` bytes; for a trim also the data that goes with it.
    pub fn of(op: &Op, block: u32) -> (Self, Option<[u8; 16]>) {
        let (offset, blocks) = (op.offset.0 / u64::from(block), (op.length.0 / u64::from(block)) as u32);
        let mut entry = Self::new(match op.kind {
            OpKind::Read => READ,
            OpKind::Write => WRITE,
            OpKind::Trim => DATASET_MANAGEMENT,
        });
        entry.word(4, 1);
        if op.kind == OpKind::Trim {
            entry.word(44, 1 << 2); // deallocate; word 40 counts ranges from 0
            let mut range = [0; 16];
            range[4..8].copy_from_slice(&blocks.to_le_bytes());
            range[8..].copy_from_slice(&offset.to_le_bytes());
            return (entry, Some(range));
        }
        entry.0[40..48].copy_from_slice(&offset.to_le_bytes());
        entry.word(48, blocks - 1);
        (entry, None)
    }

    /// The capsule of command `id` with `data` in it.
    pub fn with_data(mut self, id: u16, data: &[u8]) -> Vec<u8> {
        if !data.is_empty() {
            self.word(32, data.len() as u32);
            self.0[39] = 0x01; // SGL data block, offset into the capsule
        }
        self.capsule(id, data)
    }

    /// The capsule of command `id` whose `length` bytes of data come or go apart from it.
    pub fn with_transfer(mut self, id: u16, length: usize) -> Vec<u8> {
        self.word(32, length as u32);
        self.0[39] = 0x5a; // SGL transport data block
        self.capsule(id, &[])
    }

    fn capsule(mut self, id: u16, data: &[u8]) -> Vec<u8> {
        self.0[2..4].copy_from_slice(&id.to_le_bytes());
        let mut bytes = Vec::with_capacity(CAPSULE_HEAD + data.len());
        bytes.extend([CAPSULE_CMD, 0, CAPSULE_HEAD as u8, if data.is_empty() { 0 } else { CAPSULE_HEAD as u8 }]);
        bytes.extend(((CAPSULE_HEAD + data.len()) as u32).to_le_bytes());
        bytes.extend(self.0);
        bytes.extend(data);
        bytes
    }
}

/// The greeting of a connection.
pub fn greeting() -> [u8; 128] {
    let mut hello = [0; 128];
    hello[0] = IC_REQ;
    hello[2] = 128;
    hello[4] = 128;
    hello
}

const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6f1f3f0e-5f0e-4a63-9a55-2f7f5b8f1c11";
const HOST_ID: [u8; 16] = [0x6f, 0x1f, 0x3f, 0x0e, 0x5f, 0x0e, 0x4a, 0x63, 0x9a, 0x55, 0x2f, 0x7f, 0x5b, 0x8f, 0x1c, 0x11];

/// What goes with Connect.
pub fn connect_data(nqn: &str, controller: u16) -> [u8; 1024] {
    let mut data = [0; 1024];
    data[..16].copy_from_slice(&HOST_ID);
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
    data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
    data
}

/// A piece of a write that the controller asked for.
pub fn h2c_data(id: u16, tag: u16, offset: u32, data: &[u8], is_last: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(DATA_HEAD + data.len());
    bytes.extend([H2C_DATA, if is_last { LAST } else { 0 }, DATA_HEAD as u8, DATA_HEAD as u8]);
    bytes.extend(((DATA_HEAD + data.len()) as u32).to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes.extend(tag.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(data);
    bytes
}

pub fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub fn whole(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// How a command ended: status code type and status code, both 0 where it succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub kind: u8,
    pub code: u8,
}

impl Status {
    pub const OK: Self = Self { kind: 0, code: 0 };
    /// Status code type of path errors.
    pub const PATH: u8 = 3;

    /// Of a completion queue entry.
    pub fn of(entry: &[u8]) -> Self {
        let status = half(entry, 14) >> 1;
        Self { kind: (status >> 8 & 7) as u8, code: status as u8 }
    }

    /// Says nothing of the command: another path may take it. Path errors, and commands that were aborted with their queue.
    pub fn is_of_the_path(self) -> bool {
        self.kind == Self::PATH || (self.kind == 0 && matches!(self.code, 0x07 | 0x08))
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status code type {}, code {:#04x}", self.kind, self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ByteCount, ByteOffset};

    #[test]
    fn capsule_of_a_write_has_place_length_and_data() {
        let op = Op { kind: OpKind::Write, offset: ByteOffset(8192), length: ByteCount(4096) };
        let (entry, none) = Entry::of(&op, 512);
        assert!(none.is_none());
        let bytes = entry.with_data(7, &[9; 4096]);
        assert_eq!((bytes.len(), whole(&bytes, 4), bytes[3]), (72 + 4096, 72 + 4096, 72));
        let entry = &bytes[8..72];
        assert_eq!((entry[0], half(entry, 2), whole(entry, 40), whole(entry, 48), whole(entry, 32)), (1, 7, 16, 7, 4096));
    }

    #[test]
    fn trim_names_its_range_in_blocks() {
        let op = Op { kind: OpKind::Trim, offset: ByteOffset(1 << 20), length: ByteCount(65536) };
        let (_, range) = Entry::of(&op, 4096);
        let range = range.unwrap();
        assert_eq!((whole(&range, 4), whole(&range, 8)), (16, 256));
    }

    #[test]
    fn status_of_a_path_is_told_from_one_of_the_command() {
        let entry = |kind: u16, code: u16| {
            let mut entry = [0; 16];
            entry[14..].copy_from_slice(&((kind << 8 | code) << 1).to_le_bytes());
            Status::of(&entry)
        };
        assert_eq!(entry(0, 0), Status::OK);
        for (kind, code, of_path) in [(3, 2, true), (3, 0, true), (0, 8, true), (0, 0x80, false), (2, 0x81, false), (0, 0, false)] {
            assert_eq!(entry(kind, code).is_of_the_path(), of_path, "{kind} {code}");
        }
    }
}
