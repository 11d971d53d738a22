//! The network between nodes: frames as they are on the wire, lost, doubled, late, out of order, cut off and corrupted; and the node's own part in it,
//! beats and what it makes of silence. Not here: what a word says (`judge`).

use std::rc::Rc;

use penstock_engine::{Event, Memory, Part, PeerWord};
use penstock_wire::peer::{Beat, Body, HEADER, Header, MessageBody, PROTOCOL};
use penstock_wire::{Incarnation, NodeId};

use super::node::{Phase, node_id};
use super::world::{BEAT_US, Coming, SILENT_US, World};
use crate::stamp::BLOCK;

/// Frames that are kept to come again.
const OLD_FRAMES_MAX: usize = 64;

/// Extents: fewer than a leader is to be generous with.
const LITTLE: u64 = 80;

fn incarnation_of(life: u64) -> Incarnation {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&life.to_le_bytes());
    Incarnation(bytes)
}

fn life_of(incarnation: Incarnation) -> u64 {
    u64::from_le_bytes(incarnation.0[..8].try_into().expect("8 bytes"))
}

/// Says that a member has next to no space.
fn tells_of_little(word: &PeerWord) -> bool {
    let PeerWord::Group(message) = word else { return false };
    let (MessageBody::Appended { room, .. } | MessageBody::HeartbeatDone { room, .. }) = &message.body else { return false };
    room.is_some_and(|room| room < LITTLE)
}

impl World {
    /// The node says to all others that it lives, and sees who has been silent.
    pub fn beat(&mut self, node: usize) {
        let it = &self.nodes[node];
        let life = it.life;
        if it.paused > self.now {
            let rest = it.paused - self.now;
            self.after(rest, Coming::Beat { node, life });
            return;
        }
        self.after(BEAT_US, Coming::Beat { node, life });
        let beat = Beat { incarnation: incarnation_of(life), count: 1, heard: 0, window: 1 << 20, drives: Vec::new(), spaces: Vec::new() };
        let bytes = Rc::new(Body::Beat(beat).encode(PROTOCOL, 1));
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            let heard = &mut self.nodes[node].heard[other];
            if heard.up && heard.last + SILENT_US < self.now {
                heard.up = false;
                self.feed(node, Event::PeerDown { node: node_id(other) });
                self.tally.did("peers found silent", 1);
            }
            self.transmit(node, other, &bytes, false);
        }
    }

    fn beaten(&mut self, node: usize, from: usize, life: u64) {
        let now = self.now;
        let heard = &mut self.nodes[node].heard[from];
        // A beat of an earlier life is late.
        if life < heard.life {
            return;
        }
        let news = !heard.up || heard.life != life;
        *heard = super::node::Heard { last: now, life, up: true };
        if news {
            self.feed(node, Event::PeerUp { node: node_id(from), incarnation: incarnation_of(life) });
        }
    }

    /// A store's word to a node, with its payload copied out now.
    pub fn send(&mut self, node: usize, to: NodeId, word: &PeerWord, parts: &[Part]) {
        let mut payload = Vec::new();
        for part in parts {
            self.nodes[node].mem.copy_out(*part, &mut payload);
        }
        self.judge_word(node, to, word, &payload);
        let to = (0..self.nodes.len()).find(|other| node_id(*other) == to).unwrap_or_else(|| panic!("a word to {to:?}, who is nobody"));
        let body = Body::from(word.clone());
        let mut bytes = body.encode(PROTOCOL, 1);
        bytes.extend_from_slice(&payload);
        self.tally.did("words sent", 1);
        self.tally.did("payload blocks sent", payload.len() as u64 / BLOCK as u64);
        if self.plan.strict && !self.nodes[node].heard[to].up || self.rng.below(2000) == 0 && !self.calm {
            self.tally.fault("word dropped by its own node (10)");
            let lost = Event::PeerLost { node: node_id(to) };
            if !self.nodes[node].inbox.contains(&lost) {
                self.feed(node, lost);
            }
            return;
        }
        self.transmit(node, to, &Rc::new(bytes), true);
    }

    fn transmit(&mut self, from: usize, to: usize, bytes: &Rc<Vec<u8>>, word: bool) {
        if word && self.old_frames.len() < OLD_FRAMES_MAX && !self.calm && self.rng.one_in(60) {
            self.old_frames.push((from, to, bytes.clone()));
        }
        if self.cut[from][to] > self.now {
            if word {
                self.tally.fault("message into a partition (8, 9)");
            }
            return;
        }
        let stormy = !self.calm;
        if stormy && self.rng.percent(self.plan.loss) {
            self.tally.fault("message lost (10)");
            return;
        }
        let copies = if stormy && self.rng.percent(self.plan.double) {
            self.tally.fault("message doubled (10)");
            2
        } else {
            1
        };
        for _ in 0..copies {
            let mut delay = self.rng.within(20, 200);
            if stormy && self.rng.percent(self.plan.late) {
                self.tally.fault("message delayed (10)");
                delay = self.rng.within(1_000, 700_000);
            }
            if self.nodes[to].lag > self.now || self.nodes[from].lag > self.now {
                self.tally.fault("message over a slow link (12)");
                delay += self.rng.within(20_000, 250_000);
            }
            let flip = (stormy && self.rng.one_in(self.plan.flip_one_in)).then(|| self.rng.below(bytes.len() as u64 * 8) as usize);
            self.after(delay, Coming::Frame { from, to, bytes: bytes.clone(), flip });
        }
    }

    /// A frame has come: every byte of it is checked before anything of it counts, its payload by the store.
    pub fn frame(&mut self, from: usize, to: usize, bytes: &Rc<Vec<u8>>, flip: Option<usize>) {
        let it = &self.nodes[to];
        if !it.alive() || it.phase == Phase::Stopped {
            return;
        }
        let mut torn;
        let mut bytes: &[u8] = bytes;
        if let Some(bit) = flip {
            torn = bytes.to_vec();
            torn[bit / 8] ^= 1 << (bit % 8);
            bytes = &torn;
            self.tally.fault("frame with a flipped bit (29)");
        }
        let decoded = Header::decode(bytes).and_then(|header| {
            let end = HEADER + header.body_len as usize;
            Body::decode(&header, bytes.get(HEADER..end).unwrap_or_default()).map(|body| (body, end))
        });
        let (body, end) = match (decoded, flip) {
            (Ok((_, end)), Some(bit)) if bit / 8 < end => panic!("a frame with bit {bit} of {end} bytes flipped decodes"),
            (Ok(decoded), _) => decoded,
            (Err(_), Some(_)) => return,
            (Err(error), None) => panic!("a frame that was sent does not decode: {error}"),
        };
        self.tally.check("frames decoded, or refused for a flipped bit (29)");
        let payload = &bytes[end..];
        let word = match PeerWord::of(body) {
            Ok(mut words) => words.pop().expect("one a frame"),
            Err(body) => {
                let Body::Beat(beat) = *body else { panic!("a frame that nobody sends: {body:?}") };
                self.beaten(to, from, life_of(beat.incarnation));
                return;
            }
        };
        let it = &mut self.nodes[to];
        if tells_of_little(&word) {
            it.heard_short = Some(self.now);
        }
        let buf = if payload.is_empty() {
            None
        } else {
            let Some(buf) = it.mem.alloc((payload.len() / BLOCK) as u32) else {
                self.tally.fault("word dropped for want of memory (32)");
                return;
            };
            it.mem.bytes_mut(buf).copy_from_slice(payload);
            Some(buf)
        };
        self.feed(to, Event::Peer { from: node_id(from), word: Box::new(word), payload: buf });
    }
}
