//! A host with a path to each node, which writes one block after another and keeps what was acknowledged: how long did it wait at most, and is it all there?
//!
//! A path that refuses a command for itself (asymmetric access) is followed by the next one at once; one that does not answer is left, and left alone for a while.
//! A command is given again until some path has taken it, before the next one: nothing is ever in doubt.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::nvme_tcp::wire::{Entry, Status};
use crate::nvme_tcp::{self, Attached, QueueError};
use crate::units::{ByteCount, ByteOffset};
use crate::workload::{Op, OpKind};

/// An answer that takes longer is none. Well below an election timeout: what the client needs for itself is to disappear beside what the nodes need.
const PATIENCE: Duration = Duration::from_millis(100);
/// A path that was lost is not tried again before.
const SHUN: Duration = Duration::from_secs(1);
/// Once all paths have refused.
const PAUSE: Duration = Duration::from_millis(2);
/// No path takes a command for so long: given up.
const GIVE_UP: Duration = Duration::from_secs(30);
/// Blocks that are written, over and over.
const BLOCKS: u64 = 1024;
/// Bytes of a block: what every controller takes within a command's capsule.
const AT_ONCE: usize = 4096;

/// Where a node serves the volume.
#[derive(Debug, Clone)]
pub struct Way {
    pub address: SocketAddr,
    pub nqn: String,
}

/// The host.
pub struct Client {
    ways: Vec<Way>,
    paths: Vec<Option<Attached>>,
    shunned: Vec<Option<Instant>>,
    at: usize,
    /// Newest acknowledged version of each block.
    acked: BTreeMap<u64, u64>,
    version: u64,
}

fn stamp(block: u64, version: u64) -> Vec<u8> {
    let words = [block, version, block ^ version.rotate_left(32)];
    words.iter().cycle().take(AT_ONCE / 8).flat_map(|word| word.to_le_bytes()).collect()
}

fn entry(kind: OpKind, block: u64, path: &Attached) -> Entry {
    let op = Op { kind, offset: ByteOffset(block * AT_ONCE as u64), length: ByteCount(AT_ONCE as u64) };
    Entry::of(&op, path.shape.block).0
}

impl Client {
    pub fn new(ways: Vec<Way>) -> Self {
        let count = ways.len();
        Self { ways, paths: (0..count).map(|_| None).collect(), shunned: vec![None; count], at: 0, acked: BTreeMap::new(), version: 0 }
    }

    fn next(&mut self) {
        self.at = (self.at + 1) % self.ways.len();
    }

    /// Tries each way that is not open and not shunned.
    fn open(&mut self) {
        for at in 0..self.ways.len() {
            if self.paths[at].is_none() && self.shunned[at].is_none_or(|until| Instant::now() >= until) {
                self.paths[at] = nvme_tcp::attach(self.ways[at].address, &self.ways[at].nqn, 1, PATIENCE).ok();
                self.shunned[at] = self.paths[at].is_none().then(|| Instant::now() + SHUN);
            }
        }
    }

    fn give(&mut self, mut command: impl FnMut(&mut Attached) -> Result<(), QueueError>) -> Result<(), String> {
        let began = Instant::now();
        let mut refused_by = 0;
        let mut last = "no path is open".to_owned();
        while began.elapsed() < GIVE_UP {
            if refused_by >= self.ways.len() {
                refused_by = 0;
                // Only here: with a path that takes commands, nobody waits for another to come back.
                self.open();
                std::thread::sleep(PAUSE);
            }
            let Some(path) = &mut self.paths[self.at] else {
                refused_by += 1;
                self.next();
                continue;
            };
            match command(path) {
                Ok(()) => return Ok(()),
                Err(error @ QueueError::Refused(Status { kind: Status::PATH, .. })) => {
                    last = format!("{}: {error}", self.ways[self.at].address);
                    refused_by += 1;
                    self.next();
                }
                Err(error @ QueueError::Refused(_)) => return Err(format!("{}: {error}", self.ways[self.at].address)),
                Err(QueueError::Lost(error)) => {
                    last = format!("{}: {error}", self.ways[self.at].address);
                    self.paths[self.at] = None;
                    self.shunned[self.at] = Some(Instant::now() + SHUN);
                    self.next();
                }
            }
        }
        Err(format!("no path took a command for {} s; the last said: {last}", GIVE_UP.as_secs()))
    }

    /// Writes until told to stop; gives the longest time between two acknowledgements, which are counted in `acks`.
    pub fn write_until(&mut self, stop: &AtomicBool, acks: &AtomicU64) -> Result<Duration, String> {
        self.shunned.fill(None);
        self.open();
        let mut longest = Duration::ZERO;
        let mut last: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) {
            self.version += 1;
            let (block, version) = (self.version.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BLOCKS, self.version);
            let bytes = stamp(block, version);
            self.give(|path| path.io.give(entry(OpKind::Write, block, path), &bytes).map(drop))?;
            self.acked.insert(block, version);
            let now = Instant::now();
            longest = longest.max(last.map_or(Duration::ZERO, |last| now - last));
            last = Some(now);
            acks.fetch_add(1, Ordering::Relaxed);
        }
        Ok(longest)
    }

    /// Reads back all that was acknowledged: blocks that hold it, and those that do not.
    pub fn verify(&mut self) -> Result<(u64, u64), String> {
        self.shunned.fill(None);
        self.open();
        let (mut good, mut lost) = (0, 0);
        for (block, version) in std::mem::take(&mut self.acked) {
            let mut bytes = vec![0; AT_ONCE];
            self.give(|path| path.io.take(entry(OpKind::Read, block, path), &mut bytes))?;
            if bytes == stamp(block, version) {
                good += 1;
            } else {
                lost += 1;
                eprintln!("    block {block} does not hold version {version}, which was acknowledged: {:02x?}…", &bytes[..16]);
            }
        }
        Ok((good, lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_of_blocks_and_versions_differ_and_fill_a_block() {
        assert_eq!(stamp(1, 2).len(), AT_ONCE);
        assert_ne!(stamp(1, 2), stamp(2, 1));
        assert_ne!(stamp(1, 2), stamp(1, 3));
    }

    #[test]
    fn client_without_a_path_that_answers_goes_round_and_tells_who_said_what() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let mut client = Client::new(vec![Way { address, nqn: "nqn.x".into() }; 2]);
        client.open();
        assert!(client.paths.iter().all(Option::is_none) && client.shunned.iter().all(Option::is_some));
        client.next();
        client.next();
        assert_eq!(client.at, 0);
    }
}
