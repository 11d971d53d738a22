//! A host with several paths to one volume: an NVMe/TCP initiator that gives a command again on another path when its own refuses it, falls
//! silent or ends, as Linux's multipath does. For volumes with replicas on several nodes, whose leader may change or die under the load.
//!
//! It runs on plain sockets and threads, without SPDK, whose initiator waits a whole second when no path takes a command: that
//! would measure the host, not the volume. A path that was silent is closed and not used again for a while, so that what its node may still
//! hold has come to an end before anything newer goes there. Deliberately not here: what to submit (the load), speed.

mod line;

use std::collections::VecDeque;
use std::io::Write;
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use crate::load::Load;
use crate::nvme_tcp::Shape;
use crate::nvme_tcp::wire::{self, Entry};
use crate::sample::Sample;
use crate::session::{Outcome, Tag};
use crate::units::Nanos;
use crate::workload::{Op, OpKind};
use line::{Event, News, Place, Standing};

/// A path that refused is asked again after this: it may lead by then.
const REFUSED_FOR: Nanos = Nanos(5_000_000);
/// A path that was silent is not used for this long.
const SILENT_FOR: Nanos = Nanos(3_000_000_000);
/// The loop turns at least this often.
const TURN: Duration = Duration::from_millis(1);
/// For the first path to come to stand.
const STAND_LIMIT: Duration = Duration::from_secs(30);

/// Which way to a volume.
#[derive(Debug, Clone)]
pub struct PathsOptions {
    pub addresses: Vec<SocketAddr>,
    pub nqn: String,
    pub depth: u32,
    /// Without an answer to a command for this long a path is given up.
    pub silence: Nanos,
}

/// Where a load over paths stands when it is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Standpoint {
    /// Of the clock that the load counts by.
    pub now: Nanos,
    pub switches: u64,
    /// Of the path in use.
    pub address: SocketAddr,
}

/// Why a load over paths did not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    #[error("no path came to stand within {} s: {last}", STAND_LIMIT.as_secs())]
    NoPath { last: String },
    #[error("{address} leads to another volume than {other}: NGUID {found}, not {expected}")]
    OtherVolume { address: SocketAddr, other: SocketAddr, found: String, expected: String },
    #[error("every path's thread has ended")]
    Vanished,
}

/// What a load over paths went through, beside its figures.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct PathsReport {
    /// Commands that were given again, and why.
    pub refused: u64,
    pub cut: u64,
    pub silent: u64,
    /// Times that the load went over to another path.
    pub switches: u64,
}

struct Path {
    address: SocketAddr,
    life: u64,
    standing: Option<Standing>,
    not_before: Nanos,
}

/// A command that the load waits for.
struct Flight {
    op: Op,
    data: Vec<u8>,
    /// Where it is, and since when; `None` while it waits for a path.
    at: Option<(usize, Nanos)>,
}

/// The volume as its paths show it; they stand until this is dropped.
pub struct Paths {
    options: PathsOptions,
    paths: Vec<Path>,
    current: usize,
    shape: Shape,
    flights: Vec<Option<Flight>>,
    /// Flights without a path, in order.
    waiting: VecDeque<Tag>,
    events: Receiver<Event>,
    over: Arc<AtomicBool>,
    started: Instant,
    report: PathsReport,
}

impl Drop for Paths {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for standing in self.paths.iter().filter_map(|path| path.standing.as_ref()) {
            let _ = standing.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Paths {
    /// Connects; returns once a path stands.
    pub fn open(options: PathsOptions) -> Result<Self, PathsError> {
        let (tell, events) = unbounded();
        let over = Arc::new(AtomicBool::new(false));
        let paths: Vec<Path> =
            options.addresses.iter().map(|&address| Path { address, life: 0, standing: None, not_before: Nanos(0) }).collect();
        for (at, path) in paths.iter().enumerate() {
            let place = Place { address: path.address, nqn: options.nqn.clone(), depth: options.depth };
            let (over, tell) = (over.clone(), tell.clone());
            std::thread::spawn(move || line::run(at, &place, &over, &tell));
        }
        let flights = (0..options.depth).map(|_| None).collect();
        let shape = Shape { block: 0, blocks: 0, nguid: [0; 16] };
        let (started, report) = (Instant::now(), PathsReport::default());
        let mut open = Self { options, paths, current: 0, shape, flights, waiting: VecDeque::new(), events, over, started, report };
        let mut last = "nothing answered".to_owned();
        while open.paths.iter().all(|path| path.standing.is_none()) {
            let left = STAND_LIMIT.saturating_sub(open.started.elapsed());
            match open.events.recv_timeout(left) {
                Ok(Event { path, news: News::Down(why), .. }) => last = format!("{}: {why}", open.paths[path].address),
                Ok(Event { path, life, news: News::Up(standing) }) => open.stands(path, life, *standing)?,
                Ok(_) => {}
                Err(_) => return Err(PathsError::NoPath { last }),
            }
        }
        Ok(open)
    }

    /// Bytes of a logical block, and how many there are.
    pub fn geometry(&self) -> (u32, u64) {
        (self.shape.block, self.shape.blocks)
    }

    pub fn report(&self) -> &PathsReport {
        &self.report
    }

    fn now(&self) -> Nanos {
        self.started.elapsed().into()
    }

    fn stands(&mut self, path: usize, life: u64, standing: Standing) -> Result<(), PathsError> {
        if self.shape.block == 0 {
            self.shape = standing.shape;
            self.current = path;
        }
        if standing.shape.nguid != self.shape.nguid {
            let hex = |nguid: [u8; 16]| nguid.iter().map(|byte| format!("{byte:02x}")).collect();
            let (address, other) = (self.paths[path].address, self.paths[self.current].address);
            let (found, expected) = (hex(standing.shape.nguid), hex(self.shape.nguid));
            return Err(PathsError::OtherVolume { address, other, found, expected });
        }
        let path = &mut self.paths[path];
        (path.life, path.standing) = (life, Some(standing));
        Ok(())
    }

    /// What was on the path has no answer there any more.
    fn lose(&mut self, path: usize) -> u64 {
        if let Some(standing) = self.paths[path].standing.take() {
            // Ends its reader, which begins anew.
            let _ = standing.stream.shutdown(Shutdown::Both);
        }
        let lost: Vec<Tag> = (0..self.flights.len() as u32)
            .map(Tag)
            .filter(|tag| self.flights[tag.0 as usize].as_ref().is_some_and(|flight| flight.at.is_some_and(|(at, _)| at == path)))
            .collect();
        for &tag in &lost {
            self.flights[tag.0 as usize].as_mut().expect("just found").at = None;
            self.waiting.push_back(tag);
        }
        lost.len() as u64
    }

    /// The path to use now: the one that took the last command, else the next that may take one.
    fn usable(&mut self, now: Nanos) -> Option<usize> {
        let count = self.paths.len();
        let next = (0..count).map(|step| (self.current + step) % count).find(|&at| {
            let path = &self.paths[at];
            path.standing.is_some() && path.not_before <= now
        })?;
        if next != self.current {
            self.report.switches += 1;
            self.current = next;
        }
        Some(next)
    }

    /// Sends what waits, as long as a path takes it.
    fn send(&mut self, now: Nanos) {
        while let Some(&tag) = self.waiting.front() {
            let Some(at) = self.usable(now) else { return };
            self.waiting.pop_front();
            let flight = self.flights[tag.0 as usize].as_mut().expect("what waits is in flight");
            flight.at = Some((at, now));
            let standing = self.paths[at].standing.as_mut().expect("usable");
            let (entry, range) = Entry::of(&flight.op, self.shape.block);
            let id = tag.0 as u16;
            let capsule = match (flight.op.kind, range) {
                (OpKind::Trim, Some(range)) => entry.with_data(id, &range),
                (OpKind::Write, _) if flight.data.len() <= standing.capsule_bytes => entry.with_data(id, &flight.data),
                _ => entry.with_transfer(id, flight.op.length.0 as usize),
            };
            if standing.stream.write_all(&capsule).is_err() {
                self.report.cut += self.lose(at);
            }
        }
    }

    /// Commands that a path has had for too long.
    fn look_for_silence(&mut self, now: Nanos) {
        let silence = self.options.silence;
        let silent = self.flights.iter().flatten().filter_map(|flight| flight.at).find(|(_, since)| now.since(*since) > silence);
        if let Some((path, _)) = silent {
            self.paths[path].not_before = now.plus(SILENT_FOR);
            self.report.silent += self.lose(path);
        }
    }

    fn on_event<L: Load>(&mut self, event: Event, load: &mut L) -> Result<(), PathsError> {
        let Event { path, life, news } = event;
        let now = self.now();
        match news {
            News::Up(standing) => return self.stands(path, life, *standing),
            _ if self.paths[path].life != life || self.paths[path].standing.is_none() => {}
            News::Down(_) => self.report.cut += self.lose(path),
            News::Wanted { id, tag, offset, length } => self.hand_over(path, id, tag, (offset, length)),
            News::Ended { id, status, data } => {
                let tag = Tag(u32::from(id));
                let is_there = |flight: &Flight| flight.at.is_some_and(|(at, _)| at == path);
                let Some(flight) = self.flights.get_mut(usize::from(id)).and_then(Option::as_mut).filter(|flight| is_there(flight)) else {
                    return Ok(());
                };
                if status.is_of_the_path() {
                    flight.at = None;
                    self.waiting.push_back(tag);
                    self.report.refused += 1;
                    self.paths[path].not_before = now.plus(REFUSED_FOR);
                    return Ok(());
                }
                let flight = self.flights[usize::from(id)].take().expect("just found");
                let is_short = flight.op.kind == OpKind::Read && data.len() != flight.op.length.0 as usize;
                let outcome = match status {
                    wire::Status::OK if is_short => Outcome::Failed(format!("{} bytes of {}", data.len(), flight.op.length.0)),
                    wire::Status::OK => Outcome::Ok,
                    refused => Outcome::Failed(refused.to_string()),
                };
                load.done(tag, &outcome, now, &data);
            }
        }
        Ok(())
    }

    /// Gives the controller the piece of a write that it asked for.
    fn hand_over(&mut self, path: usize, id: u16, tag: u16, (offset, length): (u32, u32)) {
        let Some(standing) = self.paths[path].standing.as_mut() else { return };
        let flight = self.flights.get(usize::from(id)).and_then(Option::as_ref);
        let (from, to) = (offset as usize, offset as usize + length as usize);
        let sent = match flight.and_then(|flight| flight.data.get(from..to)) {
            None => Err(std::io::Error::other("it wants what was not offered")),
            Some(piece) => {
                let mut at = offset;
                let count = piece.len().div_ceil(standing.data_bytes);
                piece.chunks(standing.data_bytes).enumerate().try_for_each(|(number, data)| {
                    let pdu = wire::h2c_data(id, tag, at, data, number + 1 == count);
                    at += data.len() as u32;
                    standing.stream.write_all(&pdu)
                })
            }
        };
        if sent.is_err() {
            self.report.cut += self.lose(path);
        }
    }

    /// Takes what the load gives now.
    fn fill<L: Load>(&mut self, load: &mut L, now: Nanos) {
        while let Some(submission) = load.next(now) {
            let (tag, op) = (submission.tag, submission.op);
            let mut data = Vec::new();
            if op.kind == OpKind::Write {
                data = vec![0; op.length.0 as usize];
                // Not zero: a target may treat zeroes as a case of its own.
                crate::content::fill_noise(&mut data, u64::from(tag.0));
                load.prepare(tag, &mut data);
            }
            self.flights[tag.0 as usize] = Some(Flight { op, data, at: None });
            self.waiting.push_back(tag);
        }
    }

    /// Runs a load to its end on this thread. `look` is told each window, how long nothing has completed, and where the load stands; it may
    /// stop it.
    pub fn drive<L: Load>(
        &mut self,
        load: &mut L,
        window: Nanos,
        mut look: impl FnMut(&Sample, Nanos, Standpoint, &mut L),
    ) -> Result<(), PathsError> {
        let mut empty = Sample::default();
        let began = self.now();
        load.begin(began);
        let mut next_window = began.plus(window);
        while !load.is_finished() {
            let now = self.now();
            self.look_for_silence(now);
            self.fill(load, now);
            self.send(now);
            match self.events.recv_timeout(TURN) {
                Ok(event) => {
                    self.on_event(event, load)?;
                    while let Ok(event) = self.events.try_recv() {
                        self.on_event(event, load)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(PathsError::Vanished),
            }
            let now = self.now();
            load.turn(now);
            if now >= next_window && !load.is_finished() {
                next_window = now.plus(window);
                let sample = load.take_window(std::mem::take(&mut empty), now);
                let at = Standpoint { now, switches: self.report.switches, address: self.paths[self.current].address };
                look(&sample, load.silence(now), at, load);
                empty = sample;
            }
        }
        // What an abandoned load left is nobody's: an answer to it must not be taken for one of the next load.
        for path in 0..self.paths.len() {
            if self.lose(path) > 0 {
                self.paths[path].not_before = self.now().plus(SILENT_FOR);
            }
        }
        self.flights.iter_mut().for_each(|flight| *flight = None);
        self.waiting.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
