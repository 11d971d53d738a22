//! Wrong things said to sockets: what is sent, and that the other end answers or closes instead of hanging or dying.
//! Not here: NVMe/TCP's units ([`super::nvme`]) and what is right.

use super::house::LIMIT;
use super::{Result, failed};
use crate::guest::replay::Dice;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where wrong things are sent.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    Unix(&'a Path),
    Tcp(SocketAddr),
}

trait Line: Read + Write {
    fn bound(&self, limit: Duration) -> std::io::Result<()>;
    fn end_writing(&self) -> std::io::Result<()>;
}

impl Line for UnixStream {
    fn bound(&self, limit: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(limit)).and_then(|()| self.set_write_timeout(Some(limit)))
    }
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

impl Line for TcpStream {
    fn bound(&self, limit: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(limit)).and_then(|()| self.set_write_timeout(Some(limit)))
    }
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

fn open(place: Place<'_>) -> Result<Box<dyn Line>> {
    let wrong = |e: std::io::Error| failed(format!("connecting to {place:?}"), e.to_string());
    Ok(match place {
        Place::Unix(path) => Box::new(UnixStream::connect(path).map_err(wrong)?),
        Place::Tcp(address) => Box::new(TcpStream::connect_timeout(&address, Duration::from_secs(10)).map_err(wrong)?),
    })
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    pub heard: Vec<u8>,
    /// The other end closed; otherwise it still listened when the wait was over.
    pub is_closed: bool,
}

/// Sends `bytes` and listens for at most `patience`. Not being able to connect is an error; a connection that is closed in
/// the middle is not. With `end`, writing is ended, as a client does that has died.
pub fn say(place: Place<'_>, bytes: &[u8], end: bool, patience: Duration) -> Result<Echo> {
    say_until(place, bytes, end, patience, |_| false)
}

/// The same, and listens no longer than until `is_enough` of what was heard.
pub fn say_until(place: Place<'_>, bytes: &[u8], end: bool, patience: Duration, is_enough: impl Fn(&[u8]) -> bool) -> Result<Echo> {
    let mut line = open(place)?;
    let wrong = |e: std::io::Error| failed(format!("{place:?}"), e.to_string());
    line.bound(patience).map_err(wrong)?;
    let _ = line.write_all(bytes); // closed half-way is an answer too
    if end {
        let _ = line.end_writing(); // likewise
    }
    let deadline = Instant::now() + patience;
    let (mut heard, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match line.read(&mut part) {
            Ok(0) => return Ok(Echo { heard, is_closed: true }),
            Ok(got) => heard.extend(&part[..got]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(Echo { heard, is_closed: false }),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Ok(Echo { heard, is_closed: true }),
        }
        if is_enough(&heard) || Instant::now() >= deadline {
            return Ok(Echo { heard, is_closed: false });
        }
    }
}

/// Connections that say `bytes` and then nothing, kept open.
pub struct Idlers(#[expect(dead_code, reason = "they are held, which is all they do")] Vec<Box<dyn Line>>);

pub fn idlers(place: Place<'_>, count: usize, bytes: &[u8]) -> Result<Idlers> {
    let lines = (0..count).map(|_| {
        let mut line = open(place)?;
        let _ = line.write_all(bytes); // refused is fine
        Ok(line)
    });
    Ok(Idlers(lines.collect::<Result<_>>()?))
}

/// `text` with a few bytes changed, dropped or doubled.
pub fn mutate(text: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for _ in 0..1 + dice.below(4) {
        let Some(last) = bytes.len().checked_sub(1) else { break };
        let at = dice.below(last as u64 + 1) as usize;
        match dice.below(4) {
            0 => bytes[at] = dice.roll() as u8,
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, bytes[at]),
            _ => bytes.truncate(at + 1),
        }
    }
    bytes
}

/// A vhost-user message: request, flags and size as said, whatever the payload is. Source: QEMU's vhost-user document.
pub fn vhost(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    [&request.to_le_bytes()[..], &flags.to_le_bytes(), &size.to_le_bytes(), payload].concat()
}

/// vhost-user conversations that no front end has. None passes a file descriptor, so messages that must come with one are
/// wrong for that alone.
pub fn wrong_vhost(dice: &mut Dice) -> Vec<(String, Vec<u8>)> {
    const V1: u32 = 1;
    const V1_REPLY: u32 = 1 | 1 << 3;
    let mut list = vec![
        ("nothing at all".to_owned(), Vec::new()),
        ("text".to_owned(), b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("zeros".to_owned(), vec![0; 600]),
        ("ones".to_owned(), vec![0xff; 600]),
        ("half a header".to_owned(), vhost(1, V1, 0, &[])[..7].to_vec()),
        ("a request that does not exist".to_owned(), vhost(9999, V1, 0, &[])),
        ("a message of another version".to_owned(), vhost(1, 3, 0, &[])),
        ("a size of 4 GiB".to_owned(), vhost(2, V1, u32::MAX, &[0; 64])),
        ("a payload that does not come".to_owned(), vhost(2, V1, 8, &[])),
        ("all features there are".to_owned(), vhost(2, V1_REPLY, 8, &[0xff; 8])),
    ];
    for request in 1..=44u32 {
        for (name, payload) in [("no payload", vec![]), ("zeros", vec![0; 40]), ("ones", vec![0xff; 40])] {
            list.push((format!("request {request} with {name}"), vhost(request, V1, payload.len() as u32, &payload)));
        }
    }
    // A ring is set up as far as that goes without memory, then started.
    let ring = |request: u32, index: u32, value: u32| vhost(request, V1, 8, &[index.to_le_bytes(), value.to_le_bytes()].concat());
    let mut address = [0u8; 40];
    address[8..].copy_from_slice(&[0xab; 32]);
    let start = [vhost(3, V1, 0, &[]), ring(8, 0, 0x8000), vhost(9, V1, 40, &address), ring(10, 0, 0xffff), ring(18, 0, 1)].concat();
    list.push(("a ring over memory that is not there".to_owned(), start));
    list.push(("a ring of no entries".to_owned(), [vhost(3, V1, 0, &[]), ring(8, 0, 0), ring(18, 0, 1)].concat()));
    list.push(("a ring of 4 billion entries".to_owned(), [vhost(3, V1, 0, &[]), ring(8, 0, u32::MAX), ring(18, 0, 1)].concat()));
    list.push(("a ring of number 4 billion".to_owned(), [vhost(3, V1, 0, &[]), ring(8, u32::MAX, 128), ring(18, u32::MAX, 1)].concat()));
    for _ in 0..24 {
        let bytes = mutate(&list[list.len() - 1 - dice.below(20) as usize].1.clone(), dice);
        list.push(("a conversation with bytes changed".to_owned(), bytes));
    }
    list
}

/// A vfio-user message. Source: QEMU's vfio-user document.
fn vfio_user(command: u16, size: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [&1u16.to_le_bytes()[..], &command.to_le_bytes(), &size.to_le_bytes(), &flags.to_le_bytes(), &0u32.to_le_bytes(), payload].concat()
}

/// A vfio-user client's first message, with what it says of itself.
fn vfio_user_version(json: &[u8]) -> Vec<u8> {
    let payload = [&0u16.to_le_bytes()[..], &1u16.to_le_bytes(), json].concat();
    vfio_user(1, 16 + payload.len() as u32, 0, &payload)
}

fn vfio_user_hello() -> Vec<u8> {
    vfio_user_version(b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0")
}

/// Whether a vfio-user door lets a client in that is well.
pub fn vfio_user_lets_in(socket: &Path, limit: Duration) -> Result<bool> {
    let echo = say_until(Place::Unix(socket), &vfio_user_hello(), false, limit, |heard| heard.len() > 16)?;
    Ok(echo.heard.len() > 16) // a header and more
}

/// A vfio-user client that asks, and is gone before it can be answered.
pub fn vfio_user_ask_and_go(socket: &Path) -> Result<()> {
    let wrong = |e: std::io::Error| failed(socket.display().to_string(), e.to_string());
    let mut line = UnixStream::connect(socket).map_err(wrong)?;
    line.bound(LIMIT).map_err(wrong)?;
    line.write_all(&vfio_user_hello()).map_err(wrong)?;
    // It is let in, so that what comes next is carried out by the device.
    let heard = line.read(&mut [0; 4096]).map_err(wrong)?;
    line.write_all(&vfio_user(4, 32, 0, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])).map_err(wrong)?;
    if heard > 0 { Ok(()) } else { Err(failed("a vfio-user door", "it closed the connection")) }
}

/// vfio-user conversations that no client has.
pub fn wrong_vfio_user(dice: &mut Dice) -> Vec<(String, Vec<u8>)> {
    let (version, hello) = (vfio_user_version, vfio_user_hello());
    let mut list = vec![
        ("nothing at all".to_owned(), Vec::new()),
        ("text".to_owned(), b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("zeros".to_owned(), vec![0; 600]),
        ("ones".to_owned(), vec![0xff; 600]),
        ("half a header".to_owned(), hello[..9].to_vec()),
        ("a size below the header's".to_owned(), vfio_user(1, 3, 0, &[])),
        ("a size of 4 GiB".to_owned(), vfio_user(1, u32::MAX, 0, &[0; 64])),
        ("a payload that does not come".to_owned(), vfio_user(1, 100, 0, &[])),
        ("a greeting that is not JSON".to_owned(), version(b"{{{{\0")),
        ("a greeting that does not end".to_owned(), version(b"{\"capabilities\":{}")),
        ("a greeting of wrong types".to_owned(), version(b"{\"capabilities\":{\"max_msg_fds\":\"many\",\"max_data_xfer_size\":-1}}\0")),
        ("a greeting of another version".to_owned(), vfio_user(1, 20, 0, &[0xff; 4])),
        ("two greetings".to_owned(), [hello.clone(), hello.clone()].concat()),
        ("a command before the greeting".to_owned(), vfio_user(4, 16, 0, &[])),
        ("a reply to nothing".to_owned(), [hello.clone(), vfio_user(4, 16, 1, &[])].concat()),
    ];
    for command in 0..=16u16 {
        for (name, payload) in [("no payload", vec![]), ("zeros", vec![0u8; 48]), ("ones", vec![0xff; 48])] {
            let bytes = [hello.clone(), vfio_user(command, 16 + payload.len() as u32, 0, &payload)].concat();
            list.push((format!("command {command} with {name}"), bytes));
        }
    }
    for _ in 0..24 {
        let bytes = mutate(&list[list.len() - 1 - dice.below(20) as usize].1.clone(), dice);
        list.push(("a conversation with bytes changed".to_owned(), bytes));
    }
    list
}
