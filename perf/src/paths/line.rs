//! One path: a thread that connects, tells when it stands, and reads what comes until the connection ends; then it begins anew.
//!
//! Writing is the host's, which has the socket's other end. Every event carries the number of its connection, so that what is left of
//! an old one is known for what it is. Deliberately not here: which commands go where.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;

use super::wire::{self, Entry, Status, half, whole};

/// For a connection to come to stand, and for each answer until then.
const PATIENCE: Duration = Duration::from_millis(1000);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(20);
/// Longest PDU accepted: the largest operation and its header.
const PDU_BYTES_MAX: usize = 16 << 20;

/// What a volume is, as a path shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub block: u32,
    pub blocks: u64,
    /// What makes two namespaces the same volume.
    pub nguid: [u8; 16],
}

/// What the host may do on a connection.
#[derive(Debug)]
pub struct Standing {
    pub stream: TcpStream,
    pub shape: Shape,
    /// Most data that a command's capsule may carry, and a data PDU.
    pub capsule_bytes: usize,
    pub data_bytes: usize,
}

#[derive(Debug)]
pub enum News {
    Up(Box<Standing>),
    /// Why it ended or did not come to stand.
    Down(String),
    Ended {
        id: u16,
        status: Status,
        /// What a read brought.
        data: Vec<u8>,
    },
    /// The controller wants so much of a write.
    Wanted {
        id: u16,
        tag: u16,
        offset: u32,
        length: u32,
    },
}

#[derive(Debug)]
pub struct Event {
    pub path: usize,
    /// Which connection of the path.
    pub life: u64,
    pub news: News,
}

/// Where a path leads.
#[derive(Debug, Clone)]
pub struct Place {
    pub address: SocketAddr,
    pub nqn: String,
    /// Commands at a time.
    pub depth: u32,
}

/// Runs a path until `over` or until nobody listens any more.
pub fn run(path: usize, place: &Place, over: &Arc<AtomicBool>, events: &Sender<Event>) {
    for life in 1.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let tell = |news| events.send(Event { path, life, news }).is_ok();
        let why = match stand(place) {
            Ok((admin, standing)) => {
                let reader = standing.stream.try_clone();
                if !tell(News::Up(Box::new(standing))) {
                    return;
                }
                let why = reader.and_then(|mut reader| read(&mut reader, &tell)).err();
                let _ = admin.shutdown(Shutdown::Both);
                why
            }
            Err(error) => Some(error),
        };
        if !tell(News::Down(why.map_or_else(|| "it was closed".to_owned(), |error| error.to_string()))) {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::other(what.into())
}

/// Admin queue and I/O queue; closing the first would end the association.
fn stand(place: &Place) -> io::Result<(TcpStream, Standing)> {
    let (mut admin, _) = greet(place.address)?;
    let controller = exchange(&mut admin, Entry::connect(0, 32).with_data(0, &wire::connect_data(&place.nqn, 0xffff)))? as u16;
    const CC_ENABLE_4K_PAGES_64_16: u64 = 1 | 6 << 16 | 4 << 20; // SQE 2^6, CQE 2^4 bytes
    exchange(&mut admin, Entry::property_set(0x14, CC_ENABLE_4K_PAGES_64_16).with_data(0, &[]))?;
    let deadline = std::time::Instant::now() + PATIENCE;
    while exchange(&mut admin, Entry::property_get(0x1c).with_data(0, &[]))? & 1 == 0 {
        if std::time::Instant::now() > deadline {
            return Err(broken("the controller does not become ready"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let controller_page = page(&mut admin, Entry::identify(1, 0))?;
    let namespace = page(&mut admin, Entry::identify(0, 1))?;
    let shift = namespace[128 + 4 * usize::from(namespace[26] & 0xf) + 2];
    if !(9..=16).contains(&shift) {
        return Err(broken(format!("namespace 1 has blocks of 2^{shift} bytes")));
    }
    let blocks = u64::from_le_bytes(namespace[..8].try_into().expect("8 bytes"));
    let nguid = namespace[104..120].try_into().expect("16 bytes");
    let capsule_bytes = (whole(&controller_page, 1792) as usize * 16).saturating_sub(64);
    let (mut stream, data_bytes) = greet(place.address)?;
    exchange(&mut stream, Entry::connect(1, entries(place.depth)).with_data(0, &wire::connect_data(&place.nqn, controller)))?;
    stream.set_read_timeout(None)?;
    Ok((admin, Standing { stream, shape: Shape { block: 1 << shift, blocks, nguid }, capsule_bytes, data_bytes }))
}

/// One more than may be under way, and what every controller has at the least.
fn entries(depth: u32) -> u16 {
    (depth + 1).clamp(2, 1024) as u16
}

/// Answers the most bytes that a data PDU may carry.
fn greet(address: SocketAddr) -> io::Result<(TcpStream, usize)> {
    let mut line = TcpStream::connect_timeout(&address, PATIENCE)?;
    line.set_nodelay(true)?;
    line.set_read_timeout(Some(PATIENCE))?;
    line.set_write_timeout(Some(PATIENCE))?;
    line.write_all(&wire::greeting())?;
    let mut answer = [0; 128];
    line.read_exact(&mut answer)?;
    if answer[0] != wire::IC_RESP {
        return Err(broken(format!("PDU type {} in answer to the greeting", answer[0])));
    }
    Ok((line, whole(&answer, 12).max(4096) as usize))
}

/// Sends a command that is alone on its queue; answers the first two words of its completion.
fn exchange(line: &mut TcpStream, capsule: Vec<u8>) -> io::Result<u64> {
    line.write_all(&capsule)?;
    let (kind, _, body) = pdu(line)?;
    if kind != wire::CAPSULE_RESP || body.len() < 16 {
        return Err(broken(format!("PDU type {kind} where a response was due")));
    }
    match Status::of(&body) {
        Status::OK => Ok(u64::from_le_bytes(body[..8].try_into().expect("8 bytes"))),
        status => Err(broken(format!("the controller refused: {status}"))),
    }
}

/// 4 KiB of an identify command that is alone on its queue.
fn page(line: &mut TcpStream, entry: Entry) -> io::Result<Vec<u8>> {
    line.write_all(&entry.with_transfer(0, 4096))?;
    let mut bytes = vec![0; 4096];
    loop {
        let (kind, flags, body) = pdu(line)?;
        match kind {
            wire::CAPSULE_RESP if body.len() >= 16 => match Status::of(&body) {
                Status::OK => return Ok(bytes),
                status => return Err(broken(format!("the controller refused: {status}"))),
            },
            wire::C2H_DATA => {
                let (_, at, data) = piece(&body)?;
                bytes.get_mut(at..at + data.len()).ok_or_else(|| broken("data beyond its page"))?.copy_from_slice(data);
                if flags & wire::SUCCESS != 0 {
                    return Ok(bytes);
                }
            }
            other => return Err(broken(format!("PDU type {other} where data were due"))),
        }
    }
}

/// Command, offset and bytes of a data PDU.
fn piece(body: &[u8]) -> io::Result<(u16, usize, &[u8])> {
    let (header, data) = body.split_at_checked(wire::DATA_HEAD - wire::HEAD).ok_or_else(|| broken("a data PDU without its header"))?;
    let (id, at, length) = (half(header, 0), whole(header, 4) as usize, whole(header, 8) as usize);
    if data.len() != length || at + length > PDU_BYTES_MAX {
        return Err(broken(format!("{} bytes of data where {length} were said", data.len())));
    }
    Ok((id, at, data))
}

/// One PDU: type, flags, and all after the common header.
fn pdu(line: &mut TcpStream) -> io::Result<(u8, u8, Vec<u8>)> {
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

/// Reads until the connection ends.
fn read(line: &mut TcpStream, tell: &impl Fn(News) -> bool) -> io::Result<()> {
    let mut line = io::BufReader::with_capacity(64 << 10, line.try_clone()?);
    let mut coming: Vec<Vec<u8>> = Vec::new();
    loop {
        let mut head = [0; wire::HEAD];
        line.read_exact(&mut head)?;
        let total = whole(&head, 4) as usize;
        if !(24..=PDU_BYTES_MAX).contains(&total) {
            return Err(broken(format!("a PDU of type {} with {total} bytes", head[0])));
        }
        let mut body = vec![0; total - wire::HEAD];
        line.read_exact(&mut body)?;
        let news = match head[0] {
            wire::CAPSULE_RESP if body.len() >= 16 => {
                let id = half(&body, 12);
                let data = coming.get_mut(usize::from(id)).map(std::mem::take).unwrap_or_default();
                News::Ended { id, status: Status::of(&body), data }
            }
            wire::C2H_DATA => {
                let (id, at, data) = piece(&body)?;
                if coming.len() <= usize::from(id) {
                    coming.resize(usize::from(id) + 1, Vec::new());
                }
                let whole = &mut coming[usize::from(id)];
                if whole.len() < at + data.len() {
                    whole.resize(at + data.len(), 0);
                }
                whole[at..at + data.len()].copy_from_slice(data);
                if head[1] & wire::SUCCESS == 0 {
                    continue;
                }
                News::Ended { id, status: Status::OK, data: std::mem::take(whole) }
            }
            wire::R2T if body.len() >= 16 => {
                News::Wanted { id: half(&body, 0), tag: half(&body, 2), offset: whole(&body, 4), length: whole(&body, 8) }
            }
            other => return Err(broken(format!("PDU type {other} on an I/O queue"))),
        };
        if !tell(news) {
            return Ok(());
        }
    }
}
