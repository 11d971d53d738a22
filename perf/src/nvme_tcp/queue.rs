//! One NVMe/TCP connection, which is one queue, with one command at a time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::wire::{self, Entry, Status, half, whole};

/// Longest PDU accepted: the largest operation and its header.
const PDU_BYTES_MAX: usize = 16 << 20;
/// Command ids of a queue that has one command at a time.
const IDS: u16 = 32;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The controller's answer.
    #[error("the controller refused: {0}")]
    Refused(Status),
    /// No answer that can be understood, in time or at all: the connection is of no more use.
    #[error("{0}")]
    Lost(#[from] io::Error),
}

pub fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// One PDU: type, flags, and all after the common header.
pub fn pdu(line: &mut impl Read) -> io::Result<(u8, u8, Vec<u8>)> {
    let mut head = [0; wire::HEAD];
    line.read_exact(&mut head)?;
    let total = whole(&head, 4) as usize;
    if !(24..=PDU_BYTES_MAX).contains(&total) {
        return Err(broken(format!("a PDU of type {} with {total} bytes", head[0])));
    }
    let mut body = vec![0; total - wire::HEAD];
    line.read_exact(&mut body)?;
    Ok((head[0], head[1], body))
}

/// Command, offset and bytes of a data PDU.
pub fn piece(body: &[u8]) -> io::Result<(u16, usize, &[u8])> {
    let (header, data) = body.split_at_checked(wire::DATA_HEAD - wire::HEAD).ok_or_else(|| broken("a data PDU without its header"))?;
    let (id, at, length) = (half(header, 0), whole(header, 4) as usize, whole(header, 8) as usize);
    if data.len() != length || at + length > PDU_BYTES_MAX {
        return Err(broken(format!("{} bytes of data where {length} were said", data.len())));
    }
    Ok((id, at, data))
}

/// A connection that has been greeted.
#[derive(Debug)]
pub struct Queue {
    line: TcpStream,
    /// Most bytes that a data PDU to the controller may carry.
    pub data_bytes: usize,
    id: u16,
}

impl Queue {
    pub fn open(address: SocketAddr, patience: Duration) -> Result<Self, QueueError> {
        let mut line = TcpStream::connect_timeout(&address, patience)?;
        line.set_nodelay(true)?;
        line.set_read_timeout(Some(patience))?;
        line.set_write_timeout(Some(patience))?;
        line.write_all(&wire::greeting())?;
        let mut answer = [0; 128];
        line.read_exact(&mut answer)?;
        if answer[0] != wire::IC_RESP {
            return Err(broken(format!("PDU type {} in answer to the greeting", answer[0])).into());
        }
        Ok(Self { line, data_bytes: whole(&answer, 12).max(4096) as usize, id: 0 })
    }

    /// The bare connection, for a user with several commands at a time.
    pub fn into_line(self) -> TcpStream {
        self.line
    }

    /// Fabrics Connect; gives the controller's id.
    pub fn connect(&mut self, nqn: &str, queue: u16, entries: u16, controller: u16) -> Result<u16, QueueError> {
        self.give(Entry::connect(queue, entries), &wire::connect_data(nqn, controller)).map(|value| value as u16)
    }

    fn next_id(&mut self) -> u16 {
        self.id = (self.id + 1) % IDS;
        self.id
    }

    /// A command with its data in the capsule; gives the first two words of the completion.
    pub fn give(&mut self, entry: Entry, data: &[u8]) -> Result<u64, QueueError> {
        let id = self.next_id();
        self.line.write_all(&entry.with_data(id, data))?;
        match pdu(&mut self.line)? {
            (wire::CAPSULE_RESP, _, body) => completion(&body, id),
            (kind, ..) => Err(broken(format!("PDU type {kind} where a response was due")).into()),
        }
    }

    /// A command that fills `into`.
    pub fn take(&mut self, entry: Entry, into: &mut [u8]) -> Result<(), QueueError> {
        let id = self.next_id();
        self.line.write_all(&entry.with_transfer(id, into.len()))?;
        let mut filled = 0;
        loop {
            let (kind, flags, body) = pdu(&mut self.line)?;
            match kind {
                wire::CAPSULE_RESP => {
                    completion(&body, id)?;
                    break;
                }
                wire::C2H_DATA => {
                    let (_, at, data) = piece(&body)?;
                    let Some(place) = into.get_mut(at..at + data.len()) else {
                        return Err(broken(format!("{} bytes of data at {at} that were not asked for", data.len())).into());
                    };
                    place.copy_from_slice(data);
                    filled += data.len();
                    if flags & wire::SUCCESS != 0 {
                        break;
                    }
                }
                other => return Err(broken(format!("PDU type {other} where data were due")).into()),
            }
        }
        if filled == into.len() { Ok(()) } else { Err(broken(format!("{filled} bytes of {}", into.len())).into()) }
    }
}

/// Reads a completion queue entry, which has 16 bytes at least by the length of its PDU.
fn completion(entry: &[u8], id: u16) -> Result<u64, QueueError> {
    if half(entry, 12) != id {
        return Err(broken(format!("an answer to command {} where {id} was asked", half(entry, 12))).into());
    }
    match Status::of(entry) {
        Status::OK => Ok(u64::from_le_bytes(entry[..8].try_into().expect("8 bytes"))),
        status => Err(QueueError::Refused(status)),
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
            greeting[0] = wire::IC_RESP;
            line.write_all(&greeting).unwrap();
            line.write_all(&bytes).unwrap();
            let _ = line.read(&mut [0; 4096]); // until the client closes
        });
        Queue::open(address, Duration::from_secs(5)).unwrap()
    }

    fn response(id: u16, status: u16) -> Vec<u8> {
        let mut pdu = vec![wire::CAPSULE_RESP, 0, 24, 0, 24, 0, 0, 0];
        pdu.extend(7u64.to_le_bytes());
        pdu.extend([0; 4]);
        pdu.extend(id.to_le_bytes());
        pdu.extend((status << 1).to_le_bytes());
        pdu
    }

    fn data(at: u32, bytes: &[u8], flags: u8) -> Vec<u8> {
        let mut pdu = vec![wire::C2H_DATA, flags, 24, 24];
        pdu.extend((24 + bytes.len() as u32).to_le_bytes());
        pdu.extend([1, 0, 0, 0]);
        pdu.extend(at.to_le_bytes());
        pdu.extend((bytes.len() as u32).to_le_bytes());
        pdu.extend([0; 4]);
        pdu.extend(bytes);
        pdu
    }

    fn any() -> Entry {
        Entry::property_get(0)
    }

    #[test]
    fn command_answered_gives_its_result_and_a_refusal_its_status() {
        assert_eq!(saying(response(1, 0)).give(any(), &[1; 512]).unwrap(), 7);
        let refused = saying(response(1, 0x302)).give(any(), &[]).unwrap_err();
        assert!(matches!(refused, QueueError::Refused(Status { kind: 3, code: 2 })), "{refused}");
    }

    #[test]
    fn data_in_parts_are_put_in_their_places() {
        let mut bytes = [0; 8];
        saying([data(4, &[2; 4], 0), data(0, &[1; 4], wire::SUCCESS)].concat()).take(any(), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 2, 2]);
    }

    #[test]
    fn answers_that_make_no_sense_lose_the_path() {
        for (name, bytes) in [
            ("of another command", response(9, 0)),
            ("data beyond the end", data(8, &[1; 8], wire::SUCCESS)),
            ("too few data", data(0, &[1; 4], wire::SUCCESS)),
            ("another kind", [&[9, 0, 24, 0, 24, 0, 0, 0][..], &[0; 16]].concat()),
            ("without end", vec![wire::C2H_DATA, 0, 24, 24, 255, 255, 255, 255]),
            ("none", Vec::new()),
        ] {
            let mut queue = saying(bytes);
            queue.line.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            assert!(matches!(queue.take(any(), &mut [0; 8]), Err(QueueError::Lost(_))), "{name}");
        }
    }
}
