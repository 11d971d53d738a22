//! One path to a volume over NVMe/TCP, without SPDK: a client that is to look elsewhere at once when nobody answers cannot wait for a driver's own rules.
//!
//! One namespace, one I/O queue, one command at a time, of 4 KiB at most. Sources: NVM Express base 2.0 (Connect, Property Get and Set, Identify), NVMe/TCP transport
//! 1.0 (PDUs), NVM command set 1.0 (Read, Write). Not here: speed, digests, authentication, and what to do when a path fails.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:5b6f9c7e-2f0b-4d54-9a35-7d3a41b8c0de";
const HOST_ID: [u8; 16] = [0x5b, 0x6f, 0x9c, 0x7e, 0x2f, 0x0b, 0x4d, 0x54, 0x9a, 0x35, 0x7d, 0x3a, 0x41, 0xb8, 0xc0, 0xde];
/// Bytes of one command at most: what every controller takes within its capsule.
pub const AT_ONCE: usize = 4096;
/// Longest answer: a header and the data of a read.
const PDU_MAX: usize = AT_ONCE + 4096;
const NAMESPACE: u32 = 1;

const IC_REQ: u8 = 0;
const IC_RESP: u8 = 1;
const CAPSULE_COMMAND: u8 = 4;
const CAPSULE_RESPONSE: u8 = 5;
const DATA: u8 = 7;
/// Of data: they were the last, and no response follows.
const IS_SUCCESS: u8 = 1 << 3;

const WRITE: u8 = 1;
const READ: u8 = 2;
const IDENTIFY: u8 = 6;
const FABRICS: u8 = 0x7f;
const SQE: usize = 64;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The controller's answer: status code type and code.
    #[error("refused with status code type {0}, code {1:#04x}")]
    Refused(u8, u8),
    /// No answer that can be understood, in time or at all: the connection is of no more use.
    #[error("{0}")]
    Lost(#[from] io::Error),
}

fn broken(what: String) -> PathError {
    PathError::Lost(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// A submission queue entry.
struct Command([u8; SQE]);

impl Command {
    fn new(opcode: u8) -> Self {
        let mut entry = [0; SQE];
        entry[0] = opcode;
        entry[1] = 0x40; // SGLs
        Self(entry)
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn fabrics(kind: u8) -> Self {
        Self::new(FABRICS).put(4, &[kind])
    }
}

struct Queue {
    line: TcpStream,
    id: u16,
}

impl Queue {
    fn open(address: SocketAddr, patience: Duration) -> Result<Self, PathError> {
        let mut line = TcpStream::connect_timeout(&address, patience)?;
        line.set_nodelay(true)?;
        line.set_read_timeout(Some(patience))?;
        line.set_write_timeout(Some(patience))?;
        let mut greeting = [0; 128];
        (greeting[0], greeting[2], greeting[4]) = (IC_REQ, 128, 128);
        line.write_all(&greeting)?;
        line.read_exact(&mut greeting)?;
        if greeting[0] != IC_RESP {
            return Err(broken(format!("PDU type {} in answer to the greeting", greeting[0])));
        }
        Ok(Self { line, id: 0 })
    }

    /// Fabrics Connect; gives the controller's id.
    fn connect(&mut self, nqn: &str, queue: u16, controller: u16) -> Result<u16, PathError> {
        let mut data = [0; 1024];
        data[..16].copy_from_slice(&HOST_ID);
        data[16..18].copy_from_slice(&controller.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
        // 32 entries, counted from 0; no keep-alive.
        let command = Command::fabrics(1).put(42, &queue.to_le_bytes()).put(44, &31u16.to_le_bytes());
        Ok(self.give(command, &data)? as u16)
    }

    /// A command with its data in the capsule; gives the first two words of the completion.
    fn give(&mut self, command: Command, data: &[u8]) -> Result<u64, PathError> {
        let command = if data.is_empty() { command } else { command.put(32, &(data.len() as u32).to_le_bytes()).put(39, &[0x01]) };
        let id = self.send(command, data)?;
        let (kind, _, body) = self.receive()?;
        if kind != CAPSULE_RESPONSE {
            return Err(broken(format!("PDU type {kind} where a response was due")));
        }
        completion(&body, id)
    }

    /// A command that fills `into`.
    fn take(&mut self, command: Command, into: &mut [u8]) -> Result<(), PathError> {
        let command = command.put(32, &(into.len() as u32).to_le_bytes()).put(39, &[0x5a]);
        let id = self.send(command, &[])?;
        let mut filled = 0;
        loop {
            let (kind, flags, body) = self.receive()?;
            match kind {
                CAPSULE_RESPONSE => {
                    completion(&body, id)?;
                    break;
                }
                DATA if body.len() >= 16 => {
                    let word = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]) as usize;
                    let (at, data) = (word(4), &body[16..]);
                    let Some(place) = into.get_mut(at..at.saturating_add(data.len())) else {
                        return Err(broken(format!("{} bytes of data at {at} that were not asked for", data.len())));
                    };
                    place.copy_from_slice(data);
                    filled += data.len();
                    if flags & IS_SUCCESS != 0 {
                        break;
                    }
                }
                other => return Err(broken(format!("PDU type {other} where data were due"))),
            }
        }
        if filled == into.len() { Ok(()) } else { Err(broken(format!("{filled} bytes of {}", into.len()))) }
    }

    fn send(&mut self, command: Command, data: &[u8]) -> Result<u16, PathError> {
        self.id = (self.id + 1) % 32;
        let command = command.put(2, &self.id.to_le_bytes());
        const HEAD: u8 = 8 + SQE as u8;
        let total = usize::from(HEAD) + data.len();
        let mut bytes = Vec::with_capacity(total);
        bytes.extend([CAPSULE_COMMAND, 0, HEAD, if data.is_empty() { 0 } else { HEAD }]);
        bytes.extend((total as u32).to_le_bytes());
        bytes.extend(command.0);
        bytes.extend(data);
        self.line.write_all(&bytes)?;
        Ok(self.id)
    }

    /// One PDU: type, flags, and what follows the 8 bytes that all begin with.
    fn receive(&mut self) -> Result<(u8, u8, Vec<u8>), PathError> {
        let mut head = [0; 8];
        self.line.read_exact(&mut head)?;
        let total = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if !(24..=PDU_MAX).contains(&total) {
            return Err(broken(format!("a PDU of type {} with {total} bytes", head[0])));
        }
        let mut body = vec![0; total - 8];
        self.line.read_exact(&mut body)?;
        Ok((head[0], head[1], body))
    }
}

/// Reads a completion queue entry, which has 16 bytes at least by the length of its PDU.
fn completion(entry: &[u8], id: u16) -> Result<u64, PathError> {
    let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    if half(12) != id {
        return Err(broken(format!("an answer to command {} where {id} was asked", half(12))));
    }
    match half(14) >> 1 {
        status if status & 0x7ff != 0 => Err(PathError::Refused((status >> 8 & 7) as u8, status as u8)),
        _ => Ok(entry[..8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))),
    }
}

/// A connected namespace.
pub struct Path {
    io: Queue,
    _admin: Queue, // closing it would end the association
    block_bytes: usize,
}

impl Path {
    /// Connects, and gives every step and every later answer `patience`.
    pub fn connect(address: SocketAddr, nqn: &str, patience: Duration) -> Result<Self, PathError> {
        let mut admin = Queue::open(address, patience)?;
        let controller = admin.connect(nqn, 0, 0xffff)?;
        const ENABLE: u64 = 1 | 6 << 16 | 4 << 20; // entries of 2^6 and 2^4 bytes
        admin.give(Command::fabrics(0).put(44, &0x14u32.to_le_bytes()).put(48, &ENABLE.to_le_bytes()), &[])?;
        let deadline = Instant::now() + patience;
        while admin.give(Command::fabrics(4).put(44, &0x1cu32.to_le_bytes()), &[])? & 1 == 0 {
            if Instant::now() >= deadline {
                return Err(broken("the controller does not become ready".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut said = [0; 4096];
        admin.take(Command::new(IDENTIFY).put(4, &NAMESPACE.to_le_bytes()), &mut said)?;
        let shift = said[128 + 4 * usize::from(said[26] & 0xf) + 2];
        if !(9..=12).contains(&shift) {
            return Err(broken(format!("blocks of 2^{shift} bytes")));
        }
        let mut io = Queue::open(address, patience)?;
        io.connect(nqn, 1, controller)?;
        Ok(Self { io, _admin: admin, block_bytes: 1 << shift })
    }

    fn transfer(&self, opcode: u8, offset: u64, bytes: usize) -> Command {
        let block = self.block_bytes;
        assert!(offset.is_multiple_of(block as u64) && bytes.is_multiple_of(block) && (1..=AT_ONCE).contains(&bytes), "whole blocks");
        let command = Command::new(opcode).put(4, &NAMESPACE.to_le_bytes()).put(40, &(offset / block as u64).to_le_bytes());
        command.put(48, &((bytes / block - 1) as u32).to_le_bytes())
    }

    /// Returns when it was acknowledged.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), PathError> {
        let command = self.transfer(WRITE, offset, bytes.len());
        self.io.give(command, bytes).map(drop)
    }

    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), PathError> {
        let command = self.transfer(READ, offset, into.len());
        self.io.take(command, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A controller that greets and then says these bytes, whatever it hears.
    fn saying(bytes: Vec<u8>) -> Queue {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut line, _) = listener.accept().unwrap();
            let mut greeting = [0; 128];
            line.read_exact(&mut greeting).unwrap();
            greeting[0] = IC_RESP;
            line.write_all(&greeting).unwrap();
            line.write_all(&bytes).unwrap();
            let _ = line.read(&mut [0; 4096]); // until the client closes
        });
        Queue::open(address, Duration::from_secs(5)).unwrap()
    }

    fn response(id: u16, status: u16) -> Vec<u8> {
        let mut pdu = vec![CAPSULE_RESPONSE, 0, 24, 0, 24, 0, 0, 0];
        pdu.extend(7u64.to_le_bytes());
        pdu.extend([0; 4]);
        pdu.extend(id.to_le_bytes());
        pdu.extend((status << 1).to_le_bytes());
        pdu
    }

    fn data(at: u32, bytes: &[u8], flags: u8) -> Vec<u8> {
        let mut pdu = vec![DATA, flags, 24, 24];
        pdu.extend((24 + bytes.len() as u32).to_le_bytes());
        pdu.extend([1, 0, 0, 0]);
        pdu.extend(at.to_le_bytes());
        pdu.extend((bytes.len() as u32).to_le_bytes());
        pdu.extend([0; 4]);
        pdu.extend(bytes);
        pdu
    }

    #[test]
    fn command_answered_gives_its_result_and_a_refusal_its_status() {
        assert_eq!(saying(response(1, 0)).give(Command::new(WRITE), &[1; 512]).unwrap(), 7);
        let refused = saying(response(1, 0x302)).give(Command::new(WRITE), &[]).unwrap_err();
        assert!(matches!(refused, PathError::Refused(3, 2)), "{refused}");
    }

    #[test]
    fn data_in_parts_are_put_in_their_places() {
        let mut bytes = [0; 8];
        saying([data(4, &[2; 4], 0), data(0, &[1; 4], IS_SUCCESS)].concat()).take(Command::new(READ), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 2, 2]);
    }

    #[test]
    fn answers_that_make_no_sense_lose_the_path() {
        for (name, bytes) in [
            ("of another command", response(9, 0)),
            ("data beyond the end", data(8, &[1; 8], IS_SUCCESS)),
            ("too few data", data(0, &[1; 4], IS_SUCCESS)),
            ("another kind", [&[9, 0, 24, 0, 24, 0, 0, 0][..], &[0; 16]].concat()),
            ("without end", vec![DATA, 0, 24, 24, 255, 255, 255, 255]),
            ("none", Vec::new()),
        ] {
            let mut queue = saying(bytes);
            queue.line.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            assert!(matches!(queue.take(Command::new(READ), &mut [0; 8]), Err(PathError::Lost(_))), "{name}");
        }
    }
}
