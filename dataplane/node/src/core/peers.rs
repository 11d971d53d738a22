//! What peers say, on its way to the stores of this core, and what stores say to peers.
//!
//! A word goes by its segment to the store that has it, here or on another core; what nobody has is dropped and counted, as a network
//! may drop it. Not here: connections ([`crate::peer`]), and what a word means.

use std::collections::HashMap;

use penstock_engine::{BufId, Event, Memory, Part, PeerWord};
use penstock_wire::{BLOCK, Incarnation, NodeId, SegmentId};
use spdk_rs::thread::{Activity, FdEvent, Poller};

use super::{CORE, Core, CoreIndex, port, turn};
use crate::memory::{NodeMemory, Owner};
use crate::peer::{BEAT_MS, News, PeerView, Peers, Settings, StrayWord};

/// A fact for one store.
pub(super) struct Heard {
    shard: usize,
    event: Event,
}

/// This core's end of all that has to do with peers.
#[derive(Default)]
pub(super) struct PeerEnd {
    // Before the sockets, whose descriptor it watches.
    event: Option<FdEvent>,
    beat: Option<Poller>,
    beat_due: bool,
    peers: Option<Peers>,
    news: Vec<News>,
    strays: Vec<StrayWord>,
    heard: Vec<Heard>,
    /// Which stores' words to which node were dropped since the last tick.
    lost: Vec<(usize, NodeId)>,
    /// Where segments live: a store of this core, or another core.
    here: HashMap<SegmentId, usize>,
    there: HashMap<SegmentId, CoreIndex>,
}

impl PeerEnd {
    /// Where words from other cores are put.
    pub fn strays(&mut self) -> &mut Vec<StrayWord> {
        &mut self.strays
    }

    pub fn wants_turn(&self, now: u64) -> bool {
        self.peers.as_ref().is_some_and(|peers| peers.wants_turn(now))
    }

    /// The life of this node, as its peers know it.
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.peers.as_ref().map(Peers::incarnation)
    }

    /// Whether a node is up, and in that life.
    pub fn is_up_as(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.peers.as_ref().is_some_and(|peers| peers.up().any(|up| up == (node, incarnation)))
    }

    /// Says something to a node that is no store's word. False: it cannot go now.
    pub fn say(&mut self, node: NodeId, word: PeerWord, parts: &[Part], memory: &NodeMemory) -> bool {
        self.peers.as_mut().is_some_and(|peers| peers.send(node, word, parts, memory))
    }

    pub fn views(&self) -> Vec<PeerView> {
        self.peers.as_ref().map(Peers::views).unwrap_or_default()
    }
}

impl Core {
    /// Begins to reach these peers, or goes on with others.
    ///
    /// # Errors
    /// When SPDK makes no sockets or poller.
    pub fn set_peers(&mut self, settings: Settings) -> Result<(), spdk_rs::Errno> {
        let end = &mut self.peer_end;
        if let Some(peers) = &mut end.peers {
            peers.set(&settings.peers, &mut self.memory, &mut end.news);
            self.waker.wake();
            return Ok(());
        }
        let peers = Peers::new(settings, self.index.0)?;
        if let Some(fd) = peers.fd().filter(|_| spdk_rs::thread::interrupt_mode()) {
            end.event = Some(FdEvent::register("penstock_peers", fd, turn)?);
        }
        let beat = Poller::timed("penstock_beat", BEAT_MS * 1000, || {
            CORE.with_borrow_mut(|core| {
                if let Some(core) = core {
                    core.peer_end.beat_due = true;
                    core.waker.wake();
                }
            });
            Activity::Idle
        });
        end.beat = Some(beat?);
        end.peers = Some(peers);
        Ok(())
    }

    /// Whether a peer list was ever given to this core.
    pub fn has_peers(&self) -> bool {
        self.peer_end.peers.is_some()
    }

    /// Another core has a segment, or no longer.
    pub fn learn_place(&mut self, segment: SegmentId, core: Option<CoreIndex>) {
        match core {
            Some(core) => self.peer_end.there.insert(segment, core),
            None => self.peer_end.there.remove(&segment),
        };
    }

    /// A store of this core has a segment, or no longer.
    pub(super) fn place_here(&mut self, segment: SegmentId, shard: usize, gone: bool) {
        let here = &mut self.peer_end.here;
        if !gone {
            here.insert(segment, shard);
        } else if here.get(&segment) == Some(&shard) {
            here.remove(&segment);
        }
    }

    /// A store is not run any more.
    pub(super) fn forget_places(&mut self, shard: usize) {
        self.peer_end.here.retain(|_, at| *at != shard);
        self.peer_end.lost.retain(|(at, _)| *at != shard);
    }

    /// Tells a store that was just opened who is up.
    pub(super) fn greet(&mut self, shard: usize) {
        let up: Vec<(NodeId, Incarnation)> = self.peer_end.peers.iter().flat_map(Peers::up).collect();
        self.peer_end.heard.extend(up.into_iter().map(|(node, incarnation)| Heard { shard, event: Event::PeerUp { node, incarnation } }));
    }

    /// Takes what peers have said since the last turn, to be applied in this one. True if anything came.
    pub(super) fn hear(&mut self) -> bool {
        let now = self.clock.0;
        let end = &mut self.peer_end;
        let mut worked = !end.heard.is_empty() || !end.strays.is_empty();
        if let Some(peers) = &mut end.peers {
            worked |= peers.poll(&mut self.memory, now, &mut end.news);
            if std::mem::take(&mut end.beat_due) {
                peers.beat(&mut self.memory, now, &mut end.news);
                worked = true;
            }
        }
        if self.tick_due {
            // No sooner: what is lost at once and said at once would be sent again at once.
            end.heard.extend(end.lost.drain(..).map(|(shard, node)| Heard { shard, event: Event::PeerLost { node } }));
        }
        let mut news = std::mem::take(&mut end.news);
        for one in news.drain(..) {
            match one {
                News::Up { node, incarnation } => self.tell_all(&Event::PeerUp { node, incarnation }),
                News::Down { node } => self.tell_all(&Event::PeerDown { node }),
                News::Word { from, word, payload } => self.on_word(from, word, payload),
            }
        }
        self.peer_end.news = news;
        let mut strays = std::mem::take(&mut self.peer_end.strays);
        for stray in strays.drain(..) {
            self.on_stray(stray);
        }
        self.peer_end.strays = strays;
        worked
    }

    /// What [`Self::hear`] took, to be applied by the turn.
    pub(super) fn take_heard(&mut self) -> Vec<Heard> {
        std::mem::take(&mut self.peer_end.heard)
    }

    pub(super) fn keep_heard(&mut self, empty: Vec<Heard>) {
        if self.peer_end.heard.is_empty() {
            self.peer_end.heard = empty;
        }
    }

    pub(super) fn on_heard(&mut self, heard: Heard) {
        let Heard { shard: at, event } = heard;
        let payload = if let Event::Peer { payload, .. } = &event { *payload } else { None };
        match self.shards[at].as_mut().filter(|shard| !shard.quarantined) {
            Some(shard) => {
                if let Some(buf) = payload {
                    self.memory.hand_over(buf, Owner::Store(at as u32));
                }
                shard.apply(event, self.clock, &mut self.memory);
            }
            None => payload.into_iter().for_each(|buf| self.memory.free(buf)),
        }
    }

    fn tell_all(&mut self, event: &Event) {
        for (shard, _) in self.shards.iter().enumerate().filter(|(_, shard)| shard.is_some()) {
            self.peer_end.heard.push(Heard { shard, event: event.clone() });
        }
    }

    fn on_word(&mut self, from: NodeId, word: PeerWord, payload: Option<BufId>) {
        let segment = word.segment();
        let end = &mut self.peer_end;
        if let Some(&shard) = end.here.get(&segment) {
            if matches!(word, PeerWord::Forward(_) | PeerWord::Forwarded(_)) {
                return self.ways.say((from, word, payload));
            }
            let event = Event::Peer { from, word: Box::new(word), payload };
            return end.heard.push(Heard { shard, event });
        }
        let stray = end.there.get(&segment).and_then(|&core| {
            let bytes = payload.map(|buf| self.memory.bytes(buf));
            Some((core, StrayWord::new(from, word, bytes)?))
        });
        match stray {
            Some((core, stray)) => drop(port::with(|port| port.forward(core, Box::new(stray)))),
            None => end.peers.iter_mut().for_each(|peers| peers.unplaced(from)),
        }
        payload.into_iter().for_each(|buf| self.memory.free(buf));
    }

    /// A word that came in on another core.
    fn on_stray(&mut self, mut stray: StrayWord) {
        let from = stray.from;
        // No store hears a word of a node before it hears that the node is up, on whichever core that was seen first.
        let is_up = self.peer_end.peers.as_ref().is_some_and(|peers| peers.is_up(from));
        let here = self.peer_end.here.get(&stray.word.segment()).copied().filter(|_| is_up);
        let placed = here.and_then(|shard| {
            let payload = match stray.payload.take() {
                None => None,
                Some(bytes) => {
                    let buf = self.memory.alloc((bytes.len() / BLOCK) as u32)?;
                    self.memory.bytes_mut(buf).copy_from_slice(&bytes);
                    Some(buf)
                }
            };
            if matches!(stray.word, PeerWord::Forward(_) | PeerWord::Forwarded(_)) {
                self.ways.say((from, stray.word.clone(), payload));
                return Some(None);
            }
            let event = Event::Peer { from, word: Box::new(stray.word.clone()), payload };
            Some(Some(Heard { shard, event }))
        });
        match placed {
            Some(heard) => self.peer_end.heard.extend(heard),
            None => self.peer_end.peers.iter_mut().for_each(|peers| peers.unplaced(from)),
        }
    }

    /// Carries out a store's word to a node.
    pub(super) fn send_word(&mut self, shard: usize, node: NodeId, word: PeerWord, parts: &[Part]) {
        let end = &mut self.peer_end;
        let is_older = end.peers.as_ref().and_then(|peers| peers.version(node)).is_some_and(|version| version < word.since());
        match &word {
            PeerWord::AdmitAsk(ask) if is_older => {
                // Its build records nobody's openings, and believes everyone: while nodes are upgraded one after the other, so is its word.
                let answer = Box::new(PeerWord::AdmitAnswer(ask.believed()));
                return end.heard.push(Heard { shard, event: Event::Peer { from: node, word: answer, payload: None } });
            }
            // It compares nothing, and misses nothing by that.
            PeerWord::DigestAsk(_) if is_older => return,
            _ => {}
        }
        let taken = end.peers.as_mut().is_some_and(|peers| peers.send(node, word, parts, &self.memory));
        if !taken && !end.lost.contains(&(shard, node)) {
            end.lost.push((shard, node));
        }
    }

    /// Hands to the sockets what the turn has said.
    pub(super) fn flush_words(&mut self) {
        let now = self.now().0;
        let end = &mut self.peer_end;
        if let Some(peers) = &mut end.peers {
            peers.flush(&mut self.memory, now, &mut end.news);
        }
        if !end.news.is_empty() || !end.heard.is_empty() {
            self.waker.wake();
        }
    }

    /// Ends all connections: before the loop ends.
    pub(super) fn close_peers(&mut self) {
        let PeerEnd { event, beat, peers, .. } = std::mem::take(&mut self.peer_end);
        drop((event, beat));
        if let Some(peers) = peers {
            peers.close(&mut self.memory);
        }
    }
}
