//! Reads raw NVMe commands: which engine operation one asks for, or why it is refused.
//!
//! Volumes sit in passthrough subsystems, so nobody has looked at a command before us: ranges, lengths and opcodes are
//! checked here. Pure. Sources: NVM Express base specification 2.0 (figure 87 ff), NVM command set 1.0 (section 3).
//! Not here: fused commands, which SPDK turns into one COMPARE_AND_WRITE before they reach us, admin commands, and what a reservation
//! command does (the engine's).
//!
//! To add an opcode: its constant, its arm in [`parse`], a row in the tests, and its bit in `door::identify`.

use penstock_engine::{HostOp, Reserve, Span};
use penstock_wire::reservation::ReservationKind;

use crate::status::NvmeStatus;

/// Bytes of a submission queue entry.
pub const COMMAND_BYTES: usize = 64;
/// Bytes of a reservation command's keys, at most.
pub const KEYS_BYTES: usize = 16;
/// Bytes of a range of a DATASET MANAGEMENT command.
pub const RANGE_BYTES: usize = 16;
/// Most ranges of a DATASET MANAGEMENT command.
pub const RANGES_MAX: usize = 256;

mod opcode {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    pub const RESERVATION_REPORT: u8 = 0x0e;
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    pub const RESERVATION_RELEASE: u8 = 0x15;
}

/// What a volume looks like to its hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Logical block in bytes, 512 or 4096.
    pub logical_block: u32,
    /// Size in logical blocks.
    pub blocks: u64,
}

/// What to do with a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// One operation of the engine.
    Op(HostOp),
    /// Deallocate: the payload holds this many ranges, read with [`parse_range`]; each is a `Zero` of its own.
    Ranges(u32),
    /// Nothing to do but to answer.
    Answer(NvmeStatus),
}

fn word(command: &[u8; COMMAND_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(command[at..at + 4].try_into().expect("four bytes"))
}

/// The bytes that `blocks` logical blocks from `start` cover, if they lie within the volume.
pub fn span(volume: Extent, start: u64, blocks: u64) -> Option<Span> {
    let end = start.checked_add(blocks)?;
    if end > volume.blocks {
        return None;
    }
    let size = u64::from(volume.logical_block);
    // Cannot overflow: the volume's size in bytes fits, and start and blocks are within it.
    Some(Span { offset: start * size, len: blocks * size })
}

/// Reads a raw I/O command whose payload has `payload_len` bytes.
pub fn parse(command: &[u8; COMMAND_BYTES], volume: Extent, payload_len: usize) -> Ask {
    let start = u64::from(word(command, 40)) | u64::from(word(command, 44)) << 32;
    let cdw12 = word(command, 48);
    let blocks = u64::from(cdw12 & 0xffff) + 1;
    match command[0] {
        // Acknowledged is durable, so there is nothing to wait for.
        opcode::FLUSH => Ask::Op(HostOp::Flush),
        opcode::READ | opcode::WRITE => {
            let Some(span) = span(volume, start, blocks) else { return Ask::Answer(NvmeStatus::LBA_OUT_OF_RANGE) };
            if span.len != payload_len as u64 {
                return Ask::Answer(NvmeStatus::DATA_SGL_LENGTH_INVALID);
            }
            Ask::Op(if command[0] == opcode::READ { HostOp::Read(span) } else { HostOp::Write(span) })
        }
        opcode::WRITE_ZEROES => match span(volume, start, blocks) {
            Some(span) => Ask::Op(HostOp::Zero(span)),
            None => Ask::Answer(NvmeStatus::LBA_OUT_OF_RANGE),
        },
        opcode::DATASET_MANAGEMENT => {
            const DEALLOCATE: u32 = 1 << 2;
            let ranges = (word(command, 40) & 0xff) + 1;
            if payload_len < ranges as usize * RANGE_BYTES {
                return Ask::Answer(NvmeStatus::DATA_SGL_LENGTH_INVALID);
            }
            if word(command, 44) & DEALLOCATE == 0 {
                // Hints alone; doing nothing fulfils them.
                return Ask::Answer(NvmeStatus::SUCCESS);
            }
            Ask::Ranges(ranges)
        }
        _ => Ask::Answer(NvmeStatus::INVALID_OPCODE),
    }
}

/// Whether a command is read by [`parse_reservation`].
pub fn is_reservation(command: &[u8; COMMAND_BYTES]) -> bool {
    use opcode::{RESERVATION_ACQUIRE, RESERVATION_REGISTER, RESERVATION_RELEASE, RESERVATION_REPORT};
    matches!(command[0], RESERVATION_REGISTER | RESERVATION_REPORT | RESERVATION_ACQUIRE | RESERVATION_RELEASE)
}

/// Reads a command of [`is_reservation`]; `keys` is the beginning of its payload.
pub fn parse_reservation(command: &[u8; COMMAND_BYTES], keys: &[u8], payload_len: usize) -> Ask {
    reservation(command, keys, payload_len).map_or_else(Ask::Answer, |what| Ask::Op(HostOp::Reserve(what)))
}

fn reservation(command: &[u8; COMMAND_BYTES], keys: &[u8], payload_len: usize) -> Result<Reserve, NvmeStatus> {
    let (cdw10, cdw11) = (word(command, 40), word(command, 44));
    let key = |at: usize| {
        let bytes = keys.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or(NvmeStatus::DATA_SGL_LENGTH_INVALID)
    };
    let (action, ignores_key, kind) = (cdw10 & 7, cdw10 & 1 << 3 != 0, ReservationKind::of((cdw10 >> 8) as u8));
    let kind = || kind.ok_or(NvmeStatus::INVALID_FIELD);
    match command[0] {
        opcode::RESERVATION_REPORT => {
            const EXTENDED: u32 = 1;
            // Hosts of fabrics name themselves by 128 bits.
            if cdw11 & EXTENDED == 0 {
                return Err(NvmeStatus::HOST_ID_INCONSISTENT);
            }
            let len = (u64::from(cdw10) + 1) * 4;
            if len > payload_len as u64 {
                return Err(NvmeStatus::DATA_SGL_LENGTH_INVALID);
            }
            Ok(Reserve::Report { len: len as u32 })
        }
        opcode::RESERVATION_REGISTER => {
            const AS_IT_IS: u32 = 0;
            const PERSIST: u32 = 3;
            // What lasts through a loss of power cannot be made to go with it.
            if !matches!(cdw10 >> 30, AS_IT_IS | PERSIST) {
                return Err(NvmeStatus::INVALID_FIELD);
            }
            let (current, new) = ((!ignores_key).then_some(key(0)?), key(8)?);
            match action {
                0 => Ok(Reserve::Register { new }),
                1 => Ok(Reserve::Unregister { key: current }),
                2 => Ok(Reserve::Replace { key: current, new }),
                _ => Err(NvmeStatus::INVALID_FIELD),
            }
        }
        _ if ignores_key => Err(NvmeStatus::INVALID_FIELD),
        opcode::RESERVATION_ACQUIRE => match action {
            0 => Ok(Reserve::Acquire { key: key(0)?, kind: kind()? }),
            // With and without abort.
            1 | 2 => Ok(Reserve::Preempt { key: key(0)?, victim: key(8)?, kind: kind()? }),
            _ => Err(NvmeStatus::INVALID_FIELD),
        },
        _ => match action {
            0 => Ok(Reserve::Release { key: key(0)?, kind: kind()? }),
            1 => Ok(Reserve::Clear { key: key(0)? }),
            _ => Err(NvmeStatus::INVALID_FIELD),
        },
    }
}

/// Reads one range of a deallocate. `Ok(None)` for a range of no blocks, which asks for nothing.
///
/// # Errors
/// The status for a range that leaves the volume.
pub fn parse_range(range: &[u8; RANGE_BYTES], volume: Extent) -> Result<Option<Span>, NvmeStatus> {
    let blocks = u64::from(u32::from_le_bytes(range[4..8].try_into().expect("four bytes")));
    let start = u64::from_le_bytes(range[8..16].try_into().expect("eight bytes"));
    let span = span(volume, start, blocks).ok_or(NvmeStatus::LBA_OUT_OF_RANGE)?;
    Ok((span.len > 0).then_some(span))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V4K: Extent = Extent { logical_block: 4096, blocks: 100 };
    const V512: Extent = Extent { logical_block: 512, blocks: 800 };

    fn command(opcode: u8, start: u64, cdw12: u32) -> [u8; COMMAND_BYTES] {
        let mut c = [0; COMMAND_BYTES];
        c[0] = opcode;
        c[40..48].copy_from_slice(&start.to_le_bytes());
        c[48..52].copy_from_slice(&cdw12.to_le_bytes());
        c
    }

    #[test]
    fn command_table() {
        use HostOp::{Flush, Read, Write, Zero};
        let span = |offset, len| Span { offset, len };
        let refuse = Ask::Answer;
        let fua = 1 << 30;
        for (name, command, volume, payload, ask) in [
            ("read one block", command(2, 3, 0), V4K, 4096, Ask::Op(Read(span(3 * 4096, 4096)))),
            ("read 512", command(2, 3, 1), V512, 1024, Ask::Op(Read(span(1536, 1024)))),
            ("read the last block", command(2, 99, 0), V4K, 4096, Ask::Op(Read(span(99 * 4096, 4096)))),
            ("read past the end", command(2, 99, 1), V4K, 8192, refuse(NvmeStatus::LBA_OUT_OF_RANGE)),
            ("read far past the end", command(2, u64::MAX, 0), V4K, 4096, refuse(NvmeStatus::LBA_OUT_OF_RANGE)),
            ("write with FUA", command(1, 0, 7 | fua), V4K, 32768, Ask::Op(Write(span(0, 32768)))),
            ("write with too short a payload", command(1, 0, 7), V4K, 4096, refuse(NvmeStatus::DATA_SGL_LENGTH_INVALID)),
            ("write with too long a payload", command(1, 0, 0), V4K, 8192, refuse(NvmeStatus::DATA_SGL_LENGTH_INVALID)),
            ("write zeroes", command(8, 10, 89), V4K, 0, Ask::Op(Zero(span(40960, 90 * 4096)))),
            ("write zeroes with deallocate", command(8, 0, 1 << 25), V4K, 0, Ask::Op(Zero(span(0, 4096)))),
            ("write zeroes past the end", command(8, 10, 90), V4K, 0, refuse(NvmeStatus::LBA_OUT_OF_RANGE)),
            ("flush", command(0, 0, 0), V4K, 0, Ask::Op(Flush)),
            ("compare", command(5, 0, 0), V4K, 4096, refuse(NvmeStatus::INVALID_OPCODE)),
            ("write uncorrectable", command(4, 0, 0), V4K, 0, refuse(NvmeStatus::INVALID_OPCODE)),
            ("copy", command(0x19, 0, 0), V4K, 32, refuse(NvmeStatus::INVALID_OPCODE)),
            ("io cancel", command(0x18, 0, 0), V4K, 0, refuse(NvmeStatus::INVALID_OPCODE)),
            ("vendor specific", command(0xff, 0, 0), V4K, 0, refuse(NvmeStatus::INVALID_OPCODE)),
            ("deallocate two ranges", command(9, 1 | 4 << 32, 0), V4K, 32, Ask::Ranges(2)),
            ("deallocate with short payload", command(9, 1 | 4 << 32, 0), V4K, 16, refuse(NvmeStatus::DATA_SGL_LENGTH_INVALID)),
            ("dataset hint", command(9, 0, 0), V4K, 16, refuse(NvmeStatus::SUCCESS)),
        ] {
            assert_eq!(parse(&command, volume, payload), ask, "{name}");
        }
    }

    #[test]
    fn reservation_table() {
        use NvmeStatus as S;
        use ReservationKind::{ExclusiveAccessAll, WriteExclusive};
        let keys: Vec<u8> = [0x1122u64.to_le_bytes(), 0x3344u64.to_le_bytes()].concat();
        let (key, new) = (0x1122, 0x3344);
        let (register, report, acquire, release) = (0x0d, 0x0e, 0x11, 0x15);
        let ignore = 1 << 3;
        for (name, opcode, cdw10, cdw11, payload, asked) in [
            ("register", register, 0u32, 0u32, 16, Ok(Reserve::Register { new })),
            ("register to persist", register, 3 << 30, 0, 16, Ok(Reserve::Register { new })),
            ("register to be forgotten", register, 2 << 30, 0, 16, Err(S::INVALID_FIELD)),
            ("register with a wrong persistence", register, 1 << 30, 0, 16, Err(S::INVALID_FIELD)),
            ("unregister", register, 1, 0, 16, Ok(Reserve::Unregister { key: Some(key) })),
            ("unregister whatever the key", register, 1 | ignore, 0, 16, Ok(Reserve::Unregister { key: None })),
            ("replace", register, 2, 0, 16, Ok(Reserve::Replace { key: Some(key), new })),
            ("replace whatever the key", register, 2 | ignore, 0, 16, Ok(Reserve::Replace { key: None, new })),
            ("register in no way", register, 3, 0, 16, Err(S::INVALID_FIELD)),
            ("register with one key", register, 0, 0, 8, Err(S::DATA_SGL_LENGTH_INVALID)),
            ("acquire", acquire, 1 << 8, 0, 16, Ok(Reserve::Acquire { key, kind: WriteExclusive })),
            ("preempt", acquire, 1 | 6 << 8, 0, 16, Ok(Reserve::Preempt { key, victim: new, kind: ExclusiveAccessAll })),
            ("preempt and abort", acquire, 2 | 1 << 8, 0, 16, Ok(Reserve::Preempt { key, victim: new, kind: WriteExclusive })),
            ("acquire without a type", acquire, 0, 0, 16, Err(S::INVALID_FIELD)),
            ("acquire a type that is none", acquire, 7 << 8, 0, 16, Err(S::INVALID_FIELD)),
            ("acquire whatever the key", acquire, ignore | 1 << 8, 0, 16, Err(S::INVALID_FIELD)),
            ("acquire without keys", acquire, 1 << 8, 0, 0, Err(S::DATA_SGL_LENGTH_INVALID)),
            ("release", release, 1 << 8, 0, 8, Ok(Reserve::Release { key, kind: WriteExclusive })),
            ("clear", release, 1, 0, 8, Ok(Reserve::Clear { key })),
            ("release whatever the key", release, ignore | 1 << 8, 0, 8, Err(S::INVALID_FIELD)),
            ("release in no way", release, 2 | 1 << 8, 0, 8, Err(S::INVALID_FIELD)),
            ("report", report, 1023, 1, 4096, Ok(Reserve::Report { len: 4096 })),
            ("report by 64 bits", report, 1023, 0, 4096, Err(S::HOST_ID_INCONSISTENT)),
            ("report of more than there is room for", report, 1024, 1, 4096, Err(S::DATA_SGL_LENGTH_INVALID)),
            ("report of everything", report, u32::MAX, 1, 4096, Err(S::DATA_SGL_LENGTH_INVALID)),
        ] {
            let mut c = command(opcode, 0, 0);
            c[40..44].copy_from_slice(&cdw10.to_le_bytes());
            c[44..48].copy_from_slice(&cdw11.to_le_bytes());
            assert!(is_reservation(&c));
            let expected = asked.map_or_else(Ask::Answer, |what| Ask::Op(HostOp::Reserve(what)));
            assert_eq!(parse_reservation(&c, &keys[..payload.min(16)], payload), expected, "{name}");
        }
        assert!(!is_reservation(&command(2, 0, 0)));
    }

    #[test]
    fn deallocate_range_table() {
        let range = |blocks: u32, start: u64| {
            let mut r = [0; RANGE_BYTES];
            r[4..8].copy_from_slice(&blocks.to_le_bytes());
            r[8..].copy_from_slice(&start.to_le_bytes());
            r
        };
        assert_eq!(parse_range(&range(2, 1), V4K), Ok(Some(Span { offset: 4096, len: 8192 })));
        assert_eq!(parse_range(&range(0, 1), V4K), Ok(None));
        assert_eq!(parse_range(&range(1, 100), V4K), Err(NvmeStatus::LBA_OUT_OF_RANGE));
        assert_eq!(parse_range(&range(u32::MAX, u64::MAX), V4K), Err(NvmeStatus::LBA_OUT_OF_RANGE));
    }

    proptest! {
        #[test]
        fn any_command_stays_within_the_volume(bytes in proptest::array::uniform32(any::<u8>()), more in proptest::array::uniform32(any::<u8>()), payload in 0usize..1 << 20, small: bool) {
            let mut c = [0; COMMAND_BYTES];
            c[..32].copy_from_slice(&bytes);
            c[32..].copy_from_slice(&more);
            let volume = if small { V512 } else { V4K };
            let size = volume.blocks * u64::from(volume.logical_block);
            match parse(&c, volume, payload) {
                Ask::Op(HostOp::Read(s) | HostOp::Write(s)) => {
                    prop_assert!(s.end().unwrap() <= size);
                    prop_assert_eq!(s.len, payload as u64);
                }
                Ask::Op(HostOp::Zero(s)) => prop_assert!(s.end().unwrap() <= size),
                Ask::Op(op) => prop_assert_eq!(op, HostOp::Flush),
                Ask::Ranges(n) => prop_assert!(n as usize * RANGE_BYTES <= payload),
                Ask::Answer(_) => {}
            }
        }
    }
}
