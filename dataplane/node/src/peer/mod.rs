//! A core's connections to the cores of other nodes: who is reached, who is heard, and words there and back.
//!
//! Of two nodes the one with the lower id dials, and each core has a lane to core `i mod n` of every peer, so that there is one lane
//! for each pair of cores that belong together. A lane that breaks is dialled again; a peer that is not heard for three beats is
//! down, whatever its connections say. Words wait in a bounded queue a lane, and what does not fit is dropped and said so.
//!
//! [`key`] and [`handshake`] are who may speak, [`intake`] and [`outbox`] bytes and frames (both without a socket), [`lane`] one
//! connection. Not here: what words mean (the engine's), and which store of the node they are for ([`crate::core`]).

pub mod handshake;
mod intake;
pub mod key;
mod lane;
mod outbox;
mod reach;
mod stray;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use penstock_api::rpc::PeerCounters;
use penstock_engine::{BufId, Memory, Part, PeerWord};
use penstock_wire::{ClusterId, Incarnation, NodeId};
use spdk_rs::Errno;
use spdk_rs::sock::{Listener, SockGroup};

pub use stray::StrayWord;

use crate::memory::NodeMemory;
use intake::Came;
use key::ClusterKey;
use lane::{Ear, Lane, LaneError, QUEUE_LIMIT, Side};
use outbox::Chunks;

/// Between two beats.
pub const BEAT_MS: u64 = 50;
/// Not heard for this long, a peer is down: three beats.
const SILENT_MS: u64 = 3 * BEAT_MS;
/// Not heard for this long, a connection is given up.
const DEAD_MS: u64 = 3_000;
/// What a connection may take to come to stand.
const SHAKE_MS: u64 = 2_000;
/// What a frame may wait for memory here.
const STALL_MS: u64 = 1_000;
/// Between two attempts to reach a peer, at first and at most.
const RETRY_MS: (u64, u64) = (BEAT_MS, 500);
/// Between two attempts to listen, and between two complaints about strangers.
const SECOND_MS: u64 = 1_000;
/// Shards that are believed of a peer.
const SHARDS_MAX: u16 = 1024;

/// What a node's peers are, as its cores are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub key: ClusterKey,
    /// Of the first core; each further one listens on the next port.
    pub listen: SocketAddr,
    /// Cores of this node.
    pub shards: u16,
    pub peers: Vec<(NodeId, SocketAddr)>,
}

/// What came of the peers.
#[derive(Debug)]
pub enum News {
    Word { from: NodeId, word: PeerWord, payload: Option<BufId> },
    Up { node: NodeId, incarnation: Incarnation },
    Down { node: NodeId },
}

/// How a peer stands with one core.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub node: NodeId,
    pub address: SocketAddr,
    /// The incarnation that is up.
    pub up: Option<Incarnation>,
    pub connections: u32,
    pub queued_bytes: u64,
    pub reason: Option<String>,
    pub counters: PeerCounters,
}

/// A lane that is to be dialled.
struct Dial {
    to_shard: u16,
    next: u64,
    wait: u64,
}

struct Peer {
    node: NodeId,
    address: SocketAddr,
    /// Cores that it has, once it has said so.
    shards: Option<u16>,
    /// Its first core is tried, since the one that was expected is not there.
    fallback: bool,
    dials: Vec<Dial>,
    up: Option<Incarnation>,
    /// Why it is not up.
    reason: Option<String>,
    counters: PeerCounters,
}

/// See the module.
pub struct Peers {
    settings: Settings,
    shard: u16,
    group: SockGroup,
    listener: Option<Listener>,
    listen_next: u64,
    grumble_next: u64,
    lanes: Vec<Lane>,
    peers: Vec<Peer>,
    ear: Ear,
    chunks: Chunks,
    next_id: u64,
    came: Vec<Came>,
}

/// Which cores of a peer with `theirs` cores this one of `ours` has a lane to.
fn pairs(shard: u16, ours: u16, theirs: u16) -> impl Iterator<Item = u16> {
    (0..ours.max(theirs)).filter(move |at| at % ours == shard).map(move |at| at % theirs)
}

impl Peers {
    /// On the core `shard` of the node; nothing is connected before the first beat.
    ///
    /// # Errors
    /// When SPDK makes no group of sockets.
    pub fn new(settings: Settings, shard: u16) -> Result<Self, Errno> {
        Ok(Self {
            peers: settings.peers.iter().filter(|peer| peer.0 != settings.node).map(|peer| Peer::new(*peer)).collect(),
            settings,
            shard,
            group: SockGroup::new()?,
            listener: None,
            listen_next: 0,
            grumble_next: 0,
            lanes: Vec::new(),
            ear: Ear::default(),
            chunks: Chunks::default(),
            next_id: 1,
            came: Vec::new(),
        })
    }

    /// What becomes readable when a peer has said something: for cores that sleep.
    pub fn fd(&self) -> Option<std::os::fd::RawFd> {
        self.group.fd()
    }

    /// Another list of peers: lanes to those that are not in it, or are elsewhere now, end.
    pub fn set(&mut self, list: &[(NodeId, SocketAddr)], memory: &mut NodeMemory, news: &mut Vec<News>) {
        let gone: Vec<NodeId> = self.peers.iter().filter(|peer| !list.contains(&(peer.node, peer.address))).map(|peer| peer.node).collect();
        for node in gone {
            while let Some(at) = self.lanes.iter().position(|lane| lane.node() == Some(node)) {
                self.lanes.swap_remove(at).end(memory);
            }
            self.judge(node, news);
            self.peers.retain(|peer| peer.node != node);
        }
        for peer in list.iter().filter(|peer| peer.0 != self.settings.node) {
            if !self.peers.iter().any(|known| known.node == peer.0) {
                self.peers.push(Peer::new(*peer));
            }
        }
    }

    /// The life of this node's process.
    pub fn incarnation(&self) -> Incarnation {
        self.settings.incarnation
    }

    /// Peers that are up.
    pub fn up(&self) -> impl Iterator<Item = (NodeId, Incarnation)> {
        self.peers.iter().filter_map(|peer| Some((peer.node, peer.up?)))
    }

    pub fn is_up(&self, node: NodeId) -> bool {
        self.peers.iter().any(|peer| peer.node == node && peer.up.is_some())
    }

    /// The version of the protocol that is spoken with a node.
    pub fn version(&self, node: NodeId) -> Option<u32> {
        self.lanes.iter().filter_map(Lane::known).find(|known| known.node == node).map(|known| known.version)
    }

    /// There is more to do than what sockets will tell of.
    pub fn wants_turn(&self, now: u64) -> bool {
        self.lanes.iter().any(|lane| lane.wants_turn(now))
    }

    fn peer(&mut self, node: NodeId) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.node == node)
    }

    /// Takes what came. True if anything did.
    pub fn poll(&mut self, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) -> bool {
        if self.lanes.is_empty() {
            return false;
        }
        if let Err(errno) = self.group.poll() {
            tracing::error!(%errno, "the sockets of peers cannot be polled");
        }
        let mut worked = self.listen_to_ear(memory, now, news);
        let mut at = 0;
        while at < self.lanes.len() {
            let mut came = std::mem::take(&mut self.came);
            let (lane, peers) = (&mut self.lanes[at], &self.peers);
            let before = (lane.frames_heard(), lane.silent);
            let read = lane.read(memory, now, |node| peers.iter().any(|peer| peer.node == node), &mut came);
            let after = lane.frames_heard();
            let node = lane.node();
            worked |= after != before.0;
            if after != before.0 {
                lane.silent = false;
            }
            // Who is up is told before what it says.
            let stays = match &read {
                Ok(true) => self.on_up(at, memory, now, news),
                _ => true,
            };
            if let Some(node) = node {
                if before.1 && after != before.0 {
                    self.judge(node, news);
                }
                self.on_came(node, &mut came, memory, news);
                if let Some(peer) = self.peer(node) {
                    peer.counters.frames_received += after.0 - before.0.0;
                    peer.counters.bytes_received += after.1 - before.0.1;
                }
            }
            came.clear();
            self.came = came;
            if let Err(error) = read {
                self.end(at, &error, memory, now, news);
            } else if stays {
                at += 1;
            }
        }
        worked
    }

    /// Words of a peer that is up; of another, whose lane broke as it came, nothing is passed on.
    fn on_came(&mut self, from: NodeId, came: &mut Vec<Came>, memory: &mut NodeMemory, news: &mut Vec<News>) {
        let is_up = self.is_up(from);
        for one in came.drain(..) {
            let Came::Words(words) = one else { continue };
            if is_up {
                news.extend(words.into_iter().map(|(word, payload)| News::Word { from, word, payload }));
            } else {
                words.into_iter().filter_map(|(_, payload)| payload).for_each(|buf| memory.free(buf));
            }
        }
    }

    /// What SPDK said of the sockets.
    fn listen_to_ear(&mut self, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) -> bool {
        let heard = std::mem::take(&mut *self.ear.borrow_mut());
        let any = !heard.is_empty();
        for (id, heard) in heard {
            // A lane that has ended may still be spoken of.
            let Some(at) = self.lanes.iter().position(|lane| lane.id == id) else { continue };
            if let Err(error) = self.lanes[at].on_heard(heard, now, &mut self.chunks) {
                self.end(at, &error, memory, now, news);
            }
        }
        any
    }

    /// A lane has proven who is at its other end. False: it is not kept.
    fn on_up(&mut self, at: usize, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) -> bool {
        let (id, side) = (self.lanes[at].id, self.lanes[at].side);
        let Some(known) = self.lanes[at].known().copied() else { return true };
        self.lanes[at].heard = now;
        let (shard, shards) = (self.shard, self.settings.shards);
        let theirs = known.shards.clamp(1, SHARDS_MAX);
        let Some(peer) = self.peer(known.node) else {
            // It was taken from the list while it proved itself.
            self.lanes.swap_remove(at).end(memory);
            return false;
        };
        peer.shards = Some(theirs);
        if let Side::Dials { to_shard, .. } = side {
            if let Some(dial) = peer.dials.iter_mut().find(|dial| dial.to_shard == to_shard) {
                dial.wait = RETRY_MS.0;
            }
            if known.shard != to_shard || !pairs(shard, shards, theirs).any(|wanted| wanted == to_shard) {
                // It was dialled before it was known how many cores there are: now that is known.
                self.lanes.swap_remove(at).end(memory);
                return false;
            }
        }
        peer.counters.connects += 1;
        // The same pair of cores has one lane: of two, the other end knows only the newer.
        let same = |lane: &Lane| lane.id != id && lane.known().is_some_and(|other| (other.node, other.shard) == (known.node, known.shard));
        while let Some(old) = self.lanes.iter().position(same) {
            self.lanes.remove(old).end(memory);
            if let Some(peer) = self.peer(known.node) {
                peer.counters.disconnects += 1;
            }
        }
        self.judge(known.node, news);
        // Its place may be another now; whoever goes on from here reads this one again, which does no harm.
        self.lanes.get(at).is_some_and(|lane| lane.id == id)
    }

    /// Tells of a peer that came, went, or came back as another life of itself.
    fn judge(&mut self, node: NodeId, news: &mut Vec<News>) {
        let heard = self.lanes.iter().filter(|lane| !lane.silent).filter_map(|lane| lane.known().map(|known| (lane.id, known)));
        let now = heard.filter(|(_, known)| known.node == node).max_by_key(|(id, _)| *id).map(|(_, known)| known.incarnation);
        let core = self.shard;
        let Some(peer) = self.peer(node).filter(|peer| peer.up != now) else { return };
        if peer.up.is_some() {
            news.push(News::Down { node });
            if now.is_none() {
                tracing::warn!(peer = %node, core, reason = peer.reason.as_deref().unwrap_or("it is silent"), "a peer is down");
            }
        }
        if let Some(incarnation) = now {
            news.push(News::Up { node, incarnation });
            peer.reason = None;
            tracing::info!(peer = %node, core, address = %peer.address, "a peer is up");
        } else {
            peer.reason.get_or_insert_with(|| "it is connected and silent".to_owned());
        }
        peer.up = now;
    }

    fn end(&mut self, at: usize, error: &LaneError, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) {
        let lane = self.lanes.swap_remove(at);
        let (side, node, was_up) = (lane.side, lane.node(), lane.known().is_some());
        lane.end(memory);
        let core = self.shard;
        let Some(peer) = node.and_then(|node| self.peer(node)) else {
            // Whoever it was: not worth more than a line a second.
            if now >= self.grumble_next {
                self.grumble_next = now + SECOND_MS;
                tracing::warn!(core, %error, "a connection to the port for peers is refused");
            }
            return;
        };
        if was_up {
            peer.counters.disconnects += 1;
            tracing::warn!(peer = %peer.node, core, %error, "a connection to a peer ends");
        } else if peer.reason.as_deref() != Some(&*error.to_string()) {
            tracing::warn!(peer = %peer.node, address = %peer.address, core, %error, "a peer is not reached");
        }
        peer.reason = Some(error.to_string());
        if let Side::Dials { to_shard, .. } = side {
            if peer.shards.is_none() && to_shard > 0 && matches!(error, LaneError::Unreachable(_)) {
                peer.fallback = !peer.fallback;
            }
            peer.put_off(to_shard, now);
        }
        if let Some(node) = node {
            self.judge(node, news);
        }
    }

    /// Every [`BEAT_MS`]: says that this node lives, and looks after connections that came, stand or are missing.
    pub fn beat(&mut self, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) {
        self.accept(now);
        let incarnation = self.settings.incarnation;
        let mut at = 0;
        while at < self.lanes.len() {
            let lane = &mut self.lanes[at];
            let (silent_ms, age_ms) = (now.saturating_sub(lane.heard), now.saturating_sub(lane.began));
            let is_up = lane.known().is_some();
            let error = match is_up {
                false if age_ms > SHAKE_MS => Some(LaneError::Mute(SHAKE_MS)),
                true if lane.is_stalled() && silent_ms > STALL_MS => Some(LaneError::Stalled(STALL_MS)),
                true if silent_ms > DEAD_MS => Some(LaneError::Silent(DEAD_MS)),
                _ => None,
            };
            if let Some(error) = error {
                self.end(at, &error, memory, now, news);
                continue;
            }
            // What waits for memory here has been said: its sender is not silent.
            let falls_silent = is_up && !lane.silent && !lane.is_stalled() && silent_ms > SILENT_MS;
            lane.silent |= falls_silent;
            lane.beat(incarnation, QUEUE_LIMIT as u64);
            let node = lane.node();
            if falls_silent && let Some(node) = node {
                self.judge(node, news);
            }
            at += 1;
        }
        self.dial(now);
    }

    /// Takes a word for a node, and its payload out of `parts`, now. False: it is dropped.
    pub fn send(&mut self, node: NodeId, word: PeerWord, parts: &[Part], memory: &NodeMemory) -> bool {
        // What an older build would not know would end the connection, and all else that is said on it.
        let since = word.since();
        let fits = |lane: &&mut Lane| lane.known().is_some_and(|known| known.node == node && known.version >= since);
        let lanes = self.lanes.iter_mut().filter(fits);
        let lane = lanes.min_by_key(|lane| (lane.silent, lane.id));
        let blocks: u32 = parts.iter().map(|part| part.blocks()).sum();
        let is_whole = blocks == word.payload_blocks();
        if !is_whole {
            tracing::error!(blocks, wants = word.payload_blocks(), peer = %node, "a word with other payload than its own is dropped");
        }
        let mut from = memory.copier(parts);
        let taken = is_whole && lane.is_some_and(|lane| lane.outbox.word(word, &mut self.chunks, |_, to| from.copy(to)));
        if !taken && let Some(peer) = self.peer(node) {
            peer.counters.words_dropped += 1;
        }
        taken
    }

    /// A word of a peer found no place here.
    pub fn unplaced(&mut self, from: NodeId) {
        if let Some(peer) = self.peer(from) {
            peer.counters.words_unplaced += 1;
        }
    }

    /// Hands what waits to the sockets: at the end of a turn.
    pub fn flush(&mut self, memory: &mut NodeMemory, now: u64, news: &mut Vec<News>) {
        let mut at = 0;
        let mut went = false;
        while at < self.lanes.len() {
            let lane = &mut self.lanes[at];
            let before = (lane.sent_frames, lane.sent_bytes);
            let flushed = lane.flush(now, &mut self.chunks);
            let (node, after) = (lane.node(), (lane.sent_frames, lane.sent_bytes));
            if let Some(peer) = node.and_then(|node| self.peer(node)) {
                peer.counters.frames_sent += after.0 - before.0;
                peer.counters.bytes_sent += after.1 - before.1;
            }
            match flushed {
                Ok(any) => went |= any,
                Err(error) => {
                    self.end(at, &error, memory, now, news);
                    continue;
                }
            }
            at += 1;
        }
        if went {
            // Most of it the kernel took at once: its memory is for the next turn.
            self.listen_to_ear(memory, now, news);
        }
    }

    pub fn views(&self) -> Vec<PeerView> {
        let view = |peer: &Peer| {
            let of = |lane: &&Lane| lane.known().is_some_and(|known| known.node == peer.node);
            PeerView {
                node: peer.node,
                address: peer.address,
                up: peer.up,
                connections: self.lanes.iter().filter(of).count() as u32,
                queued_bytes: self.lanes.iter().filter(of).map(|lane| lane.outbox.queued() as u64).sum(),
                reason: peer.reason.clone(),
                counters: peer.counters,
            }
        };
        self.peers.iter().map(view).collect()
    }

    /// Before the loop ends: connections close while their thread is there.
    pub fn close(mut self, memory: &mut NodeMemory) {
        self.lanes.drain(..).for_each(|lane| lane.end(memory));
    }
}

impl Peer {
    fn new((node, address): (NodeId, SocketAddr)) -> Self {
        Self {
            node,
            address,
            shards: None,
            fallback: false,
            dials: Vec::new(),
            up: None,
            reason: Some("it was not heard of yet".to_owned()),
            counters: PeerCounters::default(),
        }
    }
}
