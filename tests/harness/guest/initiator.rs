//! A small NVMe/TCP initiator, so that the host side of a test can look at a volume without a kernel that has one.
//! One namespace, one I/O queue, one command (or a fused pair) at a time; reads of any length and writes of at most 4 KiB.
//! Sources: NVM Express base 2.0 (Connect, Property Get and Set, Identify), NVMe/TCP transport 1.0 (PDUs), NVM command
//! set 1.0 (Read, Write). Not here: speed, digests, TLS, authentication, discovery, reconnecting.

use super::{GuestError, Result};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:1d0b2a64-8c32-4f4e-8e0a-52a2e1b6c7aa";
const HOST_ID: [u8; 16] = [0x1d, 0x0b, 0x2a, 0x64, 0x8c, 0x32, 0x4f, 0x4e, 0x8e, 0x0a, 0x52, 0xa2, 0xe1, 0xb6, 0xc7, 0xaa];
/// In-capsule data every NVMe/TCP controller takes on its I/O queues as SPDK configures it.
const IN_CAPSULE: usize = 4096;
/// Most data of one read; below any controller's limit.
const READ_AT_ONCE: usize = 64 * 1024;

mod pdu {
    pub const IC_REQ: u8 = 0;
    pub const IC_RESP: u8 = 1;
    pub const CAPSULE_CMD: u8 = 4;
    pub const CAPSULE_RESP: u8 = 5;
    pub const C2H_DATA: u8 = 7;
    pub const SUCCESS: u8 = 1 << 3; // of C2H_DATA: no response capsule follows
}

mod opcode {
    pub const WRITE: u8 = 1;
    pub const READ: u8 = 2;
    pub const COMPARE: u8 = 5;
    pub const WRITE_ZEROES: u8 = 8;
    pub const DATASET_MANAGEMENT: u8 = 9;
    pub const IDENTIFY: u8 = 6;
    pub const SET_FEATURES: u8 = 9;
    pub const GET_FEATURES: u8 = 10;
    pub const RESERVATION_REPORT: u8 = 0x0e;
    pub const FABRICS: u8 = 0x7f;
}

/// What controller and namespace say about themselves, as far as it is a promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identified {
    /// VWC bit 0: acknowledged writes may be lost with the power unless flushed.
    pub volatile_write_cache: bool,
    /// ONCS: bit 0 Compare, 1 Write Uncorrectable, 2 Dataset Management, 3 Write Zeroes, 5 reservations, 8 Copy.
    pub optional_commands: u16,
    /// AWUPF, in blocks from 0: what is written whole through a power cut.
    pub atomic_write_power_fail: u16,
    /// NSFEAT bit 1 set: NAWUPF of the namespace, in blocks from 0.
    pub namespace_atomic_power_fail: Option<u16>,
    /// DLFEAT bits 2:0; 1 means that discarded blocks read as zeros.
    pub discarded_reads: u8,
    /// RESCAP: bit 0 through power loss, 1 to 6 each type, 7 Ignore Existing Key.
    pub reservations: u8,
    pub nguid: [u8; 16],
    pub controller_id: u16,
}

/// Status of a command that was refused: code type and code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub code_type: u8,
    pub code: u8,
}

impl Refusal {
    pub const CAPACITY_EXCEEDED: Self = Self { code_type: 0, code: 0x81 };
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status code type {}, code {:#04x}", self.code_type, self.code)
    }
}

/// A namespace that is connected; dropping it closes the connections.
pub struct Namespace {
    io: Queue,
    admin: Queue, // closing it would end the association
    block_bytes: usize,
    blocks: u64,
}

impl Namespace {
    /// Connects to namespace 1 of subsystem `nqn`.
    pub fn connect(address: SocketAddr, nqn: &str) -> Result<Self> {
        Self::connect_within(address, nqn, PATIENCE)
    }

    /// The same, with another patience: for the connection, and for every answer.
    pub fn connect_within(address: SocketAddr, nqn: &str, patience: Duration) -> Result<Self> {
        Self::connect_as(address, nqn, HOST_ID, patience)
    }

    /// The same, as the host of that id.
    pub fn connect_as(address: SocketAddr, nqn: &str, host: [u8; 16], patience: Duration) -> Result<Self> {
        let mut admin = Queue::open(address, patience)?;
        let controller = admin.connect(nqn, host, 0, 0xffff)?;
        const CC_ENABLE_4K_PAGES_64_16: u64 = 1 | 6 << 16 | 4 << 20; // SQE 2^6, CQE 2^4 bytes
        admin.property_set(0x14, CC_ENABLE_4K_PAGES_64_16)?;
        super::wait::wait_for("the controller to become ready", patience, || Ok((admin.property_get(0x1c)? & 1 == 1).then_some(())))?;
        let mut identify = Command::new(opcode::IDENTIFY);
        identify.word(4, 1);
        let said = admin.take(identify, 4096)?;
        let format = usize::from(said[26] & 0xf);
        let block_bytes = 1usize << said[128 + 4 * format + 2];
        let blocks = u64::from_le_bytes(said[..8].try_into().expect("8 bytes"));
        let mut io = Queue::open(address, patience)?;
        io.connect(nqn, host, 1, controller)?;
        Ok(Namespace { io, admin, block_bytes, blocks })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.blocks * self.block_bytes as u64
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Reads `length` bytes; offset and length in whole blocks.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let part = (length - bytes.len()).min(READ_AT_ONCE);
            let command = self.transfer(opcode::READ, offset + bytes.len() as u64, part);
            bytes.extend(self.io.take(command, part)?);
        }
        Ok(bytes)
    }

    /// Writes at most 4 KiB; returns when the controller has acknowledged it.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= IN_CAPSULE, "at most {IN_CAPSULE} bytes at once, not {}", bytes.len());
        let command = self.transfer(opcode::WRITE, offset, bytes.len());
        self.io.give(command, bytes).map(drop)
    }

    /// As [`Self::read`] for at most 64 KiB; a refusal of the command is an answer, not an error.
    pub fn try_read(&mut self, offset: u64, length: usize) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        let command = self.transfer(opcode::READ, offset, length);
        self.io.try_take(command, length)
    }

    /// As [`Self::write`]; a refusal of the command is an answer, not an error.
    pub fn try_write(&mut self, offset: u64, bytes: &[u8]) -> Result<std::result::Result<(), Refusal>> {
        assert!(bytes.len() <= IN_CAPSULE, "at most {IN_CAPSULE} bytes at once, not {}", bytes.len());
        let command = self.transfer(opcode::WRITE, offset, bytes.len());
        Ok(self.io.try_give(command, bytes)?.map(drop))
    }

    /// Write Zeroes; offset and length in whole blocks.
    pub fn try_zero(&mut self, offset: u64, length: usize) -> Result<std::result::Result<(), Refusal>> {
        let command = self.transfer(opcode::WRITE_ZEROES, offset, length);
        Ok(self.io.try_give(command, &[])?.map(drop))
    }

    /// Dataset Management with Deallocate, of one range; offset and length in whole blocks.
    pub fn try_discard(&mut self, offset: u64, length: usize) -> Result<std::result::Result<(), Refusal>> {
        let block = self.block_bytes as u64;
        let mut command = Command::new(opcode::DATASET_MANAGEMENT);
        command.word(4, 1);
        command.word(44, 1 << 2); // deallocate; word 40 counts ranges from 0
        let mut range = [0; 16];
        range[4..8].copy_from_slice(&((length as u64 / block) as u32).to_le_bytes());
        range[8..].copy_from_slice(&(offset / block).to_le_bytes());
        Ok(self.io.try_give(command, &range)?.map(drop))
    }

    /// A reservation command (register 0x0d, acquire 0x11, release 0x15) with its first word of parameters and its keys.
    pub fn reserve(&mut self, opcode: u8, parameters: u32, keys: &[u64]) -> Result<std::result::Result<(), Refusal>> {
        let mut command = Command::new(opcode);
        command.word(4, 1);
        command.word(40, parameters);
        let keys: Vec<u8> = keys.iter().flat_map(|key| key.to_le_bytes()).collect();
        Ok(self.io.try_give(command, &keys)?.map(drop))
    }

    /// The extended Reservation Report, `length` bytes of it.
    pub fn report(&mut self, length: usize) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        let mut command = Command::new(opcode::RESERVATION_REPORT);
        command.word(4, 1);
        command.word(40, length as u32 / 4 - 1);
        command.word(44, 1);
        self.io.try_take(command, length)
    }

    /// Compare and Write, fused; `expected` and `bytes` have one length, at most 4 KiB.
    pub fn compare_and_write(&mut self, offset: u64, expected: &[u8], bytes: &[u8]) -> Result<std::result::Result<(), Refusal>> {
        let mut ids = Vec::new();
        for (opcode, half, data) in [(opcode::COMPARE, 1, expected), (opcode::WRITE, 2, bytes)] {
            assert!(data.len() == expected.len() && data.len() <= IN_CAPSULE, "halves of one length, not beyond {IN_CAPSULE}");
            let mut command = self.transfer(opcode, offset, data.len());
            command.0[1] |= half;
            ids.push(self.io.send_with(command, data)?);
        }
        let mut refusals = Vec::new();
        for _ in 0..ids.len() {
            let (kind, _, body) = self.io.receive()?;
            if kind != pdu::CAPSULE_RESP {
                return Err(failed(format!("PDU type {kind} where a response was due")));
            }
            let of = u16::from_le_bytes([body[12], body[13]]);
            ids.retain(|id| *id != of);
            refusals.extend(completion(&body, of)?.err());
        }
        if !ids.is_empty() {
            return Err(failed(format!("no answer to commands {ids:?}")));
        }
        // The half that did not fail is answered as aborted with the other.
        const ABORTED: Refusal = Refusal { code_type: 0, code: 0x09 };
        Ok(refusals.iter().find(|refusal| **refusal != ABORTED).or(refusals.first()).map_or(Ok(()), |refusal| Err(*refusal)))
    }

    /// Get Features of the namespace (`value` none) or Set Features; the first word of the completion.
    pub fn feature(&mut self, feature: u32, value: Option<u32>) -> Result<std::result::Result<u32, Refusal>> {
        let mut command = Command::new(if value.is_some() { opcode::SET_FEATURES } else { opcode::GET_FEATURES });
        command.word(4, 1);
        command.word(40, feature);
        command.word(44, value.unwrap_or(0));
        Ok(self.admin.try_give(command, &[])?.map(|words| words as u32))
    }

    /// Asks both Identify pages again.
    pub fn identify(&mut self) -> Result<Identified> {
        let mut page = |structure: u32, namespace: u32| {
            let mut command = Command::new(opcode::IDENTIFY);
            command.word(4, namespace);
            command.word(40, structure);
            self.admin.take(command, 4096)
        };
        let (controller, namespace) = (page(1, 0)?, page(0, 1)?);
        let half = |page: &[u8], at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        Ok(Identified {
            volatile_write_cache: controller[525] & 1 == 1,
            optional_commands: half(&controller, 520),
            atomic_write_power_fail: half(&controller, 528),
            namespace_atomic_power_fail: (namespace[24] & 2 != 0).then(|| half(&namespace, 36)),
            discarded_reads: namespace[33] & 7,
            reservations: namespace[31],
            nguid: namespace[104..120].try_into().expect("16 bytes"),
            controller_id: half(&controller, 78),
        })
    }

    /// Sends any I/O command without data to namespace 1: its 64 bytes are the caller's but for SGL and command id.
    /// `None` if it succeeded.
    pub fn command(&mut self, entry: [u8; 64]) -> Result<Option<Refusal>> {
        let mut command = Command(entry);
        command.0[1] = 0x40;
        let id = self.io.send(command, &[])?;
        let (kind, _, body) = self.io.receive()?;
        if kind != pdu::CAPSULE_RESP {
            return Err(failed(format!("PDU type {kind} where a response was due")));
        }
        Ok(completion(&body, id)?.err())
    }

    fn transfer(&self, opcode: u8, offset: u64, length: usize) -> Command {
        let block = self.block_bytes;
        assert!(offset.is_multiple_of(block as u64) && length.is_multiple_of(block) && length > 0, "whole blocks of {block}");
        let mut command = Command::new(opcode);
        command.word(4, 1);
        command.0[40..48].copy_from_slice(&(offset / block as u64).to_le_bytes());
        command.word(48, (length / block - 1) as u32);
        command
    }
}

/// A submission queue entry.
struct Command([u8; 64]);

impl Command {
    fn new(opcode: u8) -> Self {
        let mut entry = [0; 64];
        entry[0] = opcode;
        entry[1] = 0x40; // SGLs
        Command(entry)
    }

    fn fabrics(kind: u8) -> Self {
        let mut command = Command::new(opcode::FABRICS);
        command.0[4] = kind;
        command
    }

    fn word(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// One TCP connection: the admin queue or an I/O queue.
struct Queue {
    line: TcpStream,
    id: u16,
}

fn failed(why: impl Into<String>) -> GuestError {
    GuestError::failed("NVMe/TCP", why)
}

fn io(e: std::io::Error) -> GuestError {
    failed(e.to_string())
}

impl Queue {
    fn open(address: SocketAddr, patience: Duration) -> Result<Self> {
        let mut line = TcpStream::connect_timeout(&address, patience).map_err(|e| failed(format!("{address}: {e}")))?;
        line.set_nodelay(true).and_then(|()| line.set_read_timeout(Some(patience))).map_err(io)?;
        let mut hello = [0; 128];
        hello[0] = pdu::IC_REQ;
        hello[2] = 128;
        hello[4] = 128;
        line.write_all(&hello).map_err(io)?;
        let mut answer = [0; 128];
        line.read_exact(&mut answer).map_err(io)?;
        if answer[0] != pdu::IC_RESP {
            return Err(failed(format!("PDU type {} in answer to the greeting", answer[0])));
        }
        Ok(Queue { line, id: 0 })
    }

    /// Fabrics Connect; answers the controller id.
    fn connect(&mut self, nqn: &str, host: [u8; 16], queue: u16, controller: u16) -> Result<u16> {
        let mut data = [0; 1024];
        data[..16].copy_from_slice(&host);
        data[16..18].copy_from_slice(&controller.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
        let mut command = Command::fabrics(1);
        command.0[42..44].copy_from_slice(&queue.to_le_bytes());
        command.0[44..46].copy_from_slice(&31u16.to_le_bytes()); // entries, from 0; no keep-alive
        Ok(self.give(command, &data)? as u16)
    }

    fn property_set(&mut self, property: u32, value: u64) -> Result<()> {
        let mut command = Command::fabrics(0);
        command.word(44, property);
        command.0[48..56].copy_from_slice(&value.to_le_bytes());
        self.give(command, &[]).map(drop)
    }

    fn property_get(&mut self, property: u32) -> Result<u64> {
        let mut command = Command::fabrics(4);
        command.word(44, property);
        self.give(command, &[])
    }

    /// Sends a command with its data in the capsule; answers the first two words of the completion.
    fn give(&mut self, command: Command, data: &[u8]) -> Result<u64> {
        self.try_give(command, data)?.map_err(refused)
    }

    /// Sends a command with its data in the capsule.
    fn send_with(&mut self, mut command: Command, data: &[u8]) -> Result<u16> {
        if !data.is_empty() {
            command.word(32, data.len() as u32);
            command.0[39] = 0x01; // SGL data block, offset into the capsule
        }
        self.send(command, data)
    }

    fn try_give(&mut self, command: Command, data: &[u8]) -> Result<std::result::Result<u64, Refusal>> {
        let id = self.send_with(command, data)?;
        let (kind, _, body) = self.receive()?;
        if kind != pdu::CAPSULE_RESP {
            return Err(failed(format!("PDU type {kind} where a response was due")));
        }
        completion(&body, id)
    }

    /// Sends a command that has `length` bytes coming.
    fn take(&mut self, command: Command, length: usize) -> Result<Vec<u8>> {
        self.try_take(command, length)?.map_err(refused)
    }

    fn try_take(&mut self, mut command: Command, length: usize) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        command.word(32, length as u32);
        command.0[39] = 0x5a; // SGL transport data block
        let id = self.send(command, &[])?;
        let mut bytes = vec![0; length];
        let mut filled = 0;
        loop {
            let (kind, flags, body) = self.receive()?;
            match kind {
                pdu::CAPSULE_RESP => match completion(&body, id)? {
                    Ok(_) => break,
                    Err(refusal) => return Ok(Err(refusal)),
                },
                pdu::C2H_DATA => {
                    let word = |at: usize| u32::from_le_bytes(body[at - 8..at - 4].try_into().expect("4 bytes")) as usize;
                    let (at, size) = (word(12), word(16));
                    let data = &body[16..];
                    if data.len() != size || at + size > length {
                        return Err(failed(format!("{} bytes of data at {at} for a read of {length}", data.len())));
                    }
                    bytes[at..at + size].copy_from_slice(data);
                    filled += size;
                    if flags & pdu::SUCCESS != 0 {
                        break;
                    }
                }
                other => return Err(failed(format!("PDU type {other} where data were due"))),
            }
        }
        if filled == length { Ok(Ok(bytes)) } else { Err(failed(format!("{filled} bytes of {length}"))) }
    }

    fn send(&mut self, mut command: Command, data: &[u8]) -> Result<u16> {
        self.id = self.id.wrapping_add(1) % 32;
        command.0[2..4].copy_from_slice(&self.id.to_le_bytes());
        let total = 72 + data.len();
        let mut bytes = Vec::with_capacity(total);
        bytes.extend([pdu::CAPSULE_CMD, 0, 72, if data.is_empty() { 0 } else { 72 }]);
        bytes.extend((total as u32).to_le_bytes());
        bytes.extend(command.0);
        bytes.extend(data);
        self.line.write_all(&bytes).map_err(io)?;
        Ok(self.id)
    }

    /// One PDU: type, flags, and all after the common header of 8 bytes.
    fn receive(&mut self) -> Result<(u8, u8, Vec<u8>)> {
        let mut head = [0; 8];
        self.line.read_exact(&mut head).map_err(io)?;
        let total = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes")) as usize;
        if !(24..=READ_AT_ONCE + 4096).contains(&total) {
            return Err(failed(format!("a PDU of type {} with {total} bytes", head[0])));
        }
        let mut body = vec![0; total - 8];
        self.line.read_exact(&mut body).map_err(io)?;
        Ok((head[0], head[1], body))
    }
}

/// Reads a completion queue entry; answers its first two words, or why the command was refused.
fn completion(entry: &[u8], id: u16) -> Result<std::result::Result<u64, Refusal>> {
    let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    let status = half(14) >> 1;
    if half(12) != id {
        return Err(failed(format!("an answer to command {} where {id} was asked", half(12))));
    }
    if status & 0x7ff != 0 {
        return Ok(Err(Refusal { code_type: (status >> 8 & 7) as u8, code: status as u8 }));
    }
    Ok(Ok(u64::from_le_bytes(entry[..8].try_into().expect("8 bytes"))))
}

fn refused(refusal: Refusal) -> GuestError {
    failed(refusal.to_string())
}
