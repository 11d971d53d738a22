//! A load over small NVMe/TCP controllers of our own that share one memory: they refuse, end and fall silent.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;

use super::*;
use crate::expect::{Expectations, Initial, TrimReads};
use crate::nvme_tcp::wire::{half, whole};
use crate::pace::Pace;
use crate::session::{Ending, Session, Verifier};
use crate::units::{ByteCount, ByteOffset, Generation};
use crate::workload::{Access, Mix, Workload};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;

/// What a controller does with commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Serves,
    /// A path error to everything.
    Refuses,
    /// The connection is closed instead of an answer, and no new one is taken.
    Dead,
    /// Commands are read and never answered.
    Silent,
}

struct Shared {
    memory: Mutex<Vec<u8>>,
    /// By controller.
    moods: Mutex<Vec<Mood>>,
    /// Moods still to come: after so many commands that were served.
    changes: Mutex<VecDeque<(u64, Vec<Mood>)>>,
    served: Mutex<u64>,
    nguids: Vec<u8>,
}

impl Shared {
    fn new(moods: &[Mood]) -> Arc<Self> {
        Arc::new(Self {
            memory: Mutex::new(vec![0; BLOCK * BLOCKS]),
            moods: Mutex::new(moods.to_vec()),
            changes: Mutex::default(),
            served: Mutex::new(0),
            nguids: vec![7; moods.len()],
        })
    }

    fn mood(&self, at: usize) -> Mood {
        self.moods.lock().unwrap()[at]
    }

    fn count(&self) {
        let mut served = self.served.lock().unwrap();
        *served += 1;
        let mut changes = self.changes.lock().unwrap();
        if changes.front().is_some_and(|(after, _)| *served >= *after) {
            *self.moods.lock().unwrap() = changes.pop_front().unwrap().1;
        }
    }
}

fn answer(line: &mut TcpStream, id: u16, status: u16, value: u64) -> std::io::Result<()> {
    let mut pdu = [0; 24];
    (pdu[0], pdu[2], pdu[4]) = (wire::CAPSULE_RESP, 24, 24);
    pdu[8..16].copy_from_slice(&value.to_le_bytes());
    pdu[20..22].copy_from_slice(&id.to_le_bytes());
    pdu[22..24].copy_from_slice(&(status << 1).to_le_bytes());
    line.write_all(&pdu)
}

fn data(line: &mut TcpStream, id: u16, bytes: &[u8]) -> std::io::Result<()> {
    let mut pdu = vec![0; 24 + bytes.len()];
    (pdu[0], pdu[1], pdu[2], pdu[3]) = (wire::C2H_DATA, wire::SUCCESS | 4, 24, 24);
    let total = pdu.len() as u32;
    pdu[4..8].copy_from_slice(&total.to_le_bytes());
    pdu[8..10].copy_from_slice(&id.to_le_bytes());
    pdu[16..20].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
    pdu[24..].copy_from_slice(bytes);
    line.write_all(&pdu)
}

/// Serves one connection, be it an admin or an I/O queue.
fn serve(mut line: TcpStream, at: usize, shared: &Shared) -> std::io::Result<()> {
    let mut hello = [0; 128];
    line.read_exact(&mut hello)?;
    let mut welcome = [0; 128];
    (welcome[0], welcome[2], welcome[4]) = (wire::IC_RESP, 128, 128);
    welcome[12..16].copy_from_slice(&2048u32.to_le_bytes()); // the host may not go below 4096
    line.write_all(&welcome)?;
    let mut writes: std::collections::BTreeMap<u16, (usize, Vec<u8>, usize)> = Default::default();
    loop {
        let mut head = [0; 8];
        line.read_exact(&mut head)?;
        let mut body = vec![0; whole(&head, 4) as usize - 8];
        line.read_exact(&mut body)?;
        let place = |entry: &[u8]| whole(entry, 40) as usize * BLOCK;
        if head[0] == wire::H2C_DATA {
            let (id, from, bytes) = (half(&body, 0), whole(&body, 4) as usize, &body[16..]);
            let (place, buffer, got) = writes.get_mut(&id).expect("asked for");
            buffer[from..from + bytes.len()].copy_from_slice(bytes);
            *got += bytes.len();
            if *got == buffer.len() {
                shared.memory.lock().unwrap()[*place..*place + buffer.len()].copy_from_slice(buffer);
                writes.remove(&id);
                shared.count();
                answer(&mut line, id, 0, 0)?;
            }
            continue;
        }
        let (entry, bytes) = body.split_at(64);
        let id = half(entry, 2);
        let length = whole(entry, 32) as usize;
        match (entry[0], entry[4]) {
            (0x7f, 1) => answer(&mut line, id, 0, 5)?,
            (0x7f, 4) => answer(&mut line, id, 0, 1)?,
            (0x7f, _) => answer(&mut line, id, 0, 0)?,
            (6, _) => {
                let mut page = vec![0; 4096];
                if whole(entry, 40) == 1 {
                    page[1792..1796].copy_from_slice(&((64 + BLOCK as u32) / 16).to_le_bytes());
                } else {
                    page[..8].copy_from_slice(&(BLOCKS as u64).to_le_bytes());
                    page[130] = 12;
                    page[104..120].fill(shared.nguids[at]);
                }
                data(&mut line, id, &page)?;
            }
            _ if shared.mood(at) == Mood::Refuses => answer(&mut line, id, 3 << 8 | 2, 0)?,
            _ if shared.mood(at) == Mood::Dead => return Ok(()),
            _ if shared.mood(at) == Mood::Silent => {}
            (1, _) if bytes.is_empty() => {
                writes.insert(id, (place(entry), vec![0; length], 0));
                let mut pdu = [0; 24];
                (pdu[0], pdu[2], pdu[4]) = (wire::R2T, 24, 24);
                pdu[8..10].copy_from_slice(&id.to_le_bytes());
                pdu[16..20].copy_from_slice(&(length as u32).to_le_bytes());
                line.write_all(&pdu)?;
            }
            (1, _) => {
                shared.memory.lock().unwrap()[place(entry)..][..bytes.len()].copy_from_slice(bytes);
                shared.count();
                answer(&mut line, id, 0, 0)?;
            }
            (2, _) => {
                let bytes = shared.memory.lock().unwrap()[place(entry)..][..length].to_vec();
                shared.count();
                data(&mut line, id, &bytes)?;
            }
            (9, _) => {
                let (count, from) = (whole(bytes, 4) as usize, whole(bytes, 8) as usize);
                shared.memory.lock().unwrap()[from * BLOCK..][..count * BLOCK].fill(0);
                shared.count();
                answer(&mut line, id, 0, 0)?;
            }
            other => panic!("command {other:?}"),
        }
    }
}

fn controller(at: usize, shared: &Arc<Shared>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let shared = shared.clone();
    std::thread::spawn(move || {
        for line in listener.incoming().flatten() {
            let shared = shared.clone();
            if shared.mood(at) != Mood::Dead {
                // Ends with its connection.
                std::thread::spawn(move || drop(serve(line, at, &shared)));
            }
        }
    });
    address
}

fn options(addresses: Vec<SocketAddr>) -> PathsOptions {
    PathsOptions { addresses, nqn: "nqn.2026-11.io.penstock:v".to_owned(), depth: 8, silence: Nanos(100_000_000) }
}

fn session(operations: u64, block_size: u64) -> Session {
    let workload = Workload {
        seed: 42,
        block_size: ByteCount(block_size),
        mix: Mix { read: 30, write: 60, trim: 10 },
        access: Access::Random,
        depth: 8,
        range_offset: ByteOffset(0),
        range_length: None,
    };
    let ending = Ending { warmup: Nanos(0), duration: None, operations: Some(operations), stop_on_error: true };
    let expectations = Expectations::new(Initial::Zero, TrimReads::Zero);
    let verifier = Verifier { seed: 42, unit: BLOCK as u32, expectations, newest: Generation(0), journal: None };
    Session::new(&workload, Pace::Closed, ending, Some(verifier), ByteCount((BLOCK * BLOCKS) as u64), BLOCK as u32).unwrap()
}

/// A verified load of so many operations, through the moods given; what it went through.
fn load(moods: &[Mood], changes: Vec<(u64, Vec<Mood>)>, block_size: u64) -> PathsReport {
    let shared = Shared::new(moods);
    *shared.changes.lock().unwrap() = changes.into();
    let addresses: Vec<SocketAddr> = (0..moods.len()).map(|at| controller(at, &shared)).collect();
    let mut paths = Paths::open(options(addresses)).unwrap();
    assert_eq!(paths.geometry(), (BLOCK as u32, BLOCKS as u64));
    let mut session = session(400, block_size);
    let mut windows = Sample::default();
    paths.drive(&mut session, Nanos(20_000_000), |window, _, _, _| windows.add(window)).unwrap();
    let finished = session.finish();
    windows.add(&finished.last_window);
    assert_eq!((windows.errors(), finished.bad.count), (0, 0), "{:?} {:?}", windows.error_texts, finished.bad);
    assert_eq!(windows.operations(), 400);
    paths.report().clone()
}

use Mood::{Dead, Refuses, Serves, Silent};

#[test]
fn load_over_a_path_that_serves_goes_nowhere_else() {
    assert_eq!(load(&[Serves], vec![], 4096), PathsReport::default());
}

#[test]
fn writes_larger_than_a_capsule_go_as_the_controller_asks() {
    assert_eq!(load(&[Serves], vec![], 16384), PathsReport::default());
}

#[test]
fn load_finds_the_path_that_serves() {
    // Whichever of the three stands first: it begins there.
    let report = load(&[Refuses, Refuses, Serves], vec![], 4096);
    assert!(report.silent == 0 && report.cut == 0, "{report:?}");
}

#[test]
fn load_goes_on_when_the_path_dies_and_nobody_leads_for_a_while() {
    let changes = vec![(100, vec![Dead, Refuses, Serves]), (200, vec![Dead, Serves, Refuses])];
    let report = load(&[Serves, Refuses, Refuses], changes, 4096);
    assert!(report.cut > 0 && report.refused > 0 && report.switches >= 2, "{report:?}");
}

#[test]
fn load_goes_on_when_the_path_falls_silent() {
    let report = load(&[Serves, Refuses], vec![(100, vec![Silent, Serves])], 4096);
    assert!(report.silent > 0 && report.switches >= 1, "{report:?}");
}

#[test]
fn paths_to_two_volumes_refused() {
    let mut shared = Shared::new(&[Serves, Serves]);
    Arc::get_mut(&mut shared).unwrap().nguids = vec![1, 2];
    let addresses: Vec<SocketAddr> = (0..2).map(|at| controller(at, &shared)).collect();
    let error = match Paths::open(options(addresses)) {
        Err(error) => error,
        // The second comes to stand later.
        Ok(mut paths) => paths.drive(&mut session(1_000_000, 4096), Nanos(20_000_000), |_, _, _, _| {}).unwrap_err(),
    };
    assert!(error.to_string().contains("leads to another volume"), "{error}");
}

#[test]
fn nobody_there_is_an_error_that_says_why() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut last = None;
    let place = Place { address, nqn: String::new(), depth: 1 };
    let (tell, events) = unbounded();
    let over = Arc::new(AtomicBool::new(false));
    let ending = over.clone();
    let thread = std::thread::spawn(move || line::run(0, &place, &ending, &tell));
    if let Ok(Event { news: News::Down(why), .. }) = events.recv() {
        last = Some(why);
    }
    over.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    assert!(last.unwrap().to_lowercase().contains("refused"));
}
