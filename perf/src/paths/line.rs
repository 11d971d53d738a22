//! One path: a thread that connects, tells when it stands, and reads what comes until the connection ends; then it begins anew.
//!
//! Writing is the host's, which has the socket's other end. Every event carries the number of its connection, so that what is left of
//! an old one is known for what it is. Deliberately not here: which commands go where.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::nvme_tcp::queue::{broken, pdu, piece};
use crate::nvme_tcp::wire::{self, Status, half, whole};
use crate::nvme_tcp::{self, Attached, Queue, QueueError, Shape};

/// For a connection to come to stand, and for each answer until then.
const PATIENCE: Duration = Duration::from_millis(1000);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(20);

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
                drop(admin); // Not before: closing it ends the association.
                why.map(|error| error.to_string())
            }
            Err(error) => Some(error.to_string()),
        };
        if !tell(News::Down(why.unwrap_or_else(|| "it was closed".to_owned()))) {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

/// The admin queue, and what the host may do.
fn stand(place: &Place) -> Result<(Queue, Standing), QueueError> {
    let Attached { admin, io, shape, capsule_bytes } = nvme_tcp::attach(place.address, &place.nqn, place.depth, PATIENCE)?;
    let data_bytes = io.data_bytes;
    let stream = io.into_line();
    stream.set_read_timeout(None)?;
    Ok((admin, Standing { stream, shape, capsule_bytes, data_bytes }))
}

/// Reads until the connection ends.
fn read(line: &mut TcpStream, tell: &impl Fn(News) -> bool) -> io::Result<()> {
    let mut line = io::BufReader::with_capacity(64 << 10, line.try_clone()?);
    let mut coming: Vec<Vec<u8>> = Vec::new();
    loop {
        let (kind, flags, body) = pdu(&mut line)?;
        let news = match kind {
            wire::CAPSULE_RESP => {
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
                if flags & wire::SUCCESS == 0 {
                    continue;
                }
                News::Ended { id, status: Status::OK, data: std::mem::take(whole) }
            }
            wire::R2T => News::Wanted { id: half(&body, 0), tag: half(&body, 2), offset: whole(&body, 4), length: whole(&body, 8) },
            other => return Err(broken(format!("PDU type {other} on an I/O queue"))),
        };
        if !tell(news) {
            return Ok(());
        }
    }
}
