//! What must hold between members at every turn, whoever fails: one leader a term, one history, nothing promised before it is durable, nothing that
//! leaves unverified, and the same state at the same applied index. Numbers are those of FAULTS's invariants.
//!
//! Promises are checked where they count: on a copy of the drive as a power cut at that moment would leave it, opened by a fresh store.
//! Not here: what hosts see ([`crate::oracle`]).

use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_engine::replica::Part as GroupPart;
use penstock_engine::{MemberLook, PeerWord, ReplicaNo, Standing, StoreConfig};
use penstock_wire::batch::{HEADER_BLOCKS_MAX, PAYLOAD_BLOCKS_MAX};
use penstock_wire::peer::{Entry, EntryState, FetchResult, MemberNo, Message, MessageBody, Verified};
use penstock_wire::{Index, NodeId, Term, crc32c};

use super::node::{Phase, node_id};
use super::world::World;
use crate::drive::Cut;
use crate::faults::rot;
use crate::orders::volume_of;
use crate::probe::Probe;
use crate::rng::mix;

/// What a member has shown in its present life.
#[derive(Clone, Copy, Default)]
struct Shown {
    life: u64,
    applied: Index,
    /// The most that it had applied in any life.
    reached: Index,
    term: Term,
    committed: Index,
    start: Index,
    /// Where its log ended when the life began.
    opened: Index,
}

impl Judge {
    /// A node's member has taken part in a volume's group.
    pub fn took_part(&self, volume: u32, node: usize) -> bool {
        self.spoken.contains_key(&(volume, node))
    }

    /// Another member takes the place of the node's.
    pub fn forget(&mut self, volume: u32, node: usize) {
        self.spoken.remove(&(volume, node));
        self.shown.remove(&(volume, node));
        self.doubted.remove(&(volume, node));
        self.votes.retain(|(of, at, _), _| (*of, *at) != (volume, node));
    }
}

#[derive(Default)]
pub struct Judge {
    /// Who leads each term of a volume.
    leaders: BTreeMap<(u32, Term), usize>,
    /// Whom each node gave its vote of a term.
    votes: BTreeMap<(u32, usize, Term), MemberNo>,
    /// The newest term that each node has spoken in.
    spoken: BTreeMap<(u32, usize), Term>,
    /// What an entry of an index and a term is, wherever it is seen.
    entries: BTreeMap<(u32, Index, Term), u64>,
    /// The one history: what was applied anywhere.
    history: BTreeMap<(u32, Index), (Term, u64)>,
    shown: BTreeMap<(u32, usize), Shown>,
    /// Members in doubt of how their log ended: the life that came to it, and the last entry that it had then.
    doubted: BTreeMap<(u32, usize), (u64, Index)>,
    /// Digest of the state at an applied index, and who showed it first.
    digests: BTreeMap<(u32, Index), (u64, usize)>,
    /// The same of the snapshot whose marker is an entry.
    kept: BTreeMap<(u32, Index), (u64, usize)>,
}

fn digest_of(entry: &Entry) -> u64 {
    mix(u64::from(crc32c(&entry.bytes)) ^ (entry.bytes.len() as u64) << 32 ^ u64::from(entry.payload_blocks) << 48 ^ entry.kind as u64)
}

impl World {
    pub fn judge_standing(&mut self, node: usize, volume: u32, standing: Standing) {
        if standing.part == GroupPart::Leader {
            self.leads(volume, standing.term, node);
        }
    }

    fn leads(&mut self, volume: u32, term: Term, node: usize) {
        let first = *self.judge.leaders.entry((volume, term)).or_insert(node);
        assert_eq!(first, node, "invariant 7: nodes {first} and {node} both lead volume {volume} in {term:?}");
        self.tally.check("a term has one leader (7)");
    }

    /// Before a word leaves: what it says is true, and what it promises is durable (7, 9, 10, 14).
    pub fn judge_word(&mut self, node: usize, to: NodeId, word: &PeerWord, payload: &[u8]) {
        assert_ne!(to, node_id(node), "a word to oneself: {word:?}");
        let volume = volume_of(&word.segment());
        match word {
            PeerWord::Group(message) => self.judge_message(node, volume, message, payload),
            PeerWord::EntriesAsk(ask) => assert_eq!(ask.from, self.seat(volume, node), "{ask:?} comes from node {node}"),
            PeerWord::EntriesAnswer(answer) => {
                assert_eq!(answer.from, self.seat(volume, node), "{answer:?} comes from node {node}");
                answer.check(payload).unwrap_or_else(|error| panic!("invariant 14: node {node} answers with bad payload: {error}"));
                for state in &answer.entries {
                    if let EntryState::Whole(entry) = state {
                        self.seen(volume, entry, node);
                    }
                }
                self.tally.check("payload is right when it leaves (14)");
            }
            PeerWord::CopyAsk(ask) => assert_eq!(ask.from, self.seat(volume, node), "{ask:?} comes from node {node}"),
            PeerWord::AdmitAsk(ask) => assert_eq!(ask.from, self.seat(volume, node), "{ask:?} comes from node {node}"),
            PeerWord::AdmitAnswer(answer) => assert_eq!(answer.from, self.seat(volume, node), "{answer:?} comes from node {node}"),
            PeerWord::FetchAsk(ask) => assert_eq!(ask.from, self.seat(volume, node), "{ask:?} comes from node {node}"),
            PeerWord::FetchAnswer(answer) => {
                assert_eq!(answer.from, self.seat(volume, node), "{answer:?} comes from node {node}");
                if let FetchResult::Found { crc } = answer.result {
                    answer.check(crc, payload).unwrap_or_else(|error| panic!("invariant 14: node {node} gives a bad block: {error}"));
                    self.tally.check("payload is right when it leaves (14)");
                }
            }
            PeerWord::CopyAnswer(answer) => {
                assert_eq!(answer.from, self.seat(volume, node), "{answer:?} comes from node {node}");
                answer.check(payload).unwrap_or_else(|error| panic!("invariant 14: node {node} copies a bad payload: {error}"));
                self.tally.check("payload is right when it leaves (14)");
            }
            PeerWord::DigestAsk(ask) => assert_eq!(ask.from, self.seat(volume, node), "{ask:?} comes from node {node}"),
            PeerWord::DigestAnswer(answer) => assert_eq!(answer.from, self.seat(volume, node), "{answer:?} comes from node {node}"),
            PeerWord::Forward(_) | PeerWord::Forwarded(_) => unreachable!("no store says {word:?}"),
        }
    }

    fn judge_message(&mut self, node: usize, volume: u32, message: &Message, payload: &[u8]) {
        assert_eq!(message.from, self.seat(volume, node), "{message:?} comes from node {node}");
        assert!(
            self.nodes[node].gone.is_none(),
            "invariant 12: node {node} speaks in volume {volume}, and its drive is not what it was: {message:?}"
        );
        Verified::all(vec![message.clone()], payload)
            .unwrap_or_else(|error| panic!("invariant 14: node {node} sends bad payload to {:?}: {error}", message.to));
        self.tally.check("payload is right when it leaves (14)");
        let pre = matches!(message.body, MessageBody::Vote { pre: true, .. } | MessageBody::Voted { pre: true, .. });
        if !pre {
            let spoken = self.judge.spoken.entry((volume, node)).or_default();
            *spoken = (*spoken).max(message.term);
        }
        match &message.body {
            MessageBody::Append(append) => {
                self.leads(volume, message.term, node);
                for entry in &append.entries {
                    self.seen(volume, entry, node);
                }
            }
            MessageBody::Heartbeat { .. } => self.leads(volume, message.term, node),
            MessageBody::Voted { pre: false, granted: true, .. } => self.votes(node, volume, message.term, message.to),
            MessageBody::Vote { pre: false, .. } => self.votes(node, volume, message.term, message.from),
            MessageBody::Appended { index, .. } if self.rng.one_in(self.plan.probe_one_in) => self.check_appended(node, volume, *index),
            _ => {}
        }
    }

    /// An entry is the same wherever it is seen (10).
    fn seen(&mut self, volume: u32, entry: &Entry, node: usize) {
        let digest = digest_of(entry);
        let first = *self.judge.entries.entry((volume, entry.index, entry.term)).or_insert(digest);
        assert_eq!(
            first, digest,
            "invariant 10: node {node} has entry {} of {:?} of volume {volume} otherwise than it was seen before",
            entry.index.0, entry.term
        );
    }

    /// A member votes for one in a term, and does not forget it (7).
    fn votes(&mut self, node: usize, volume: u32, term: Term, to: MemberNo) {
        let first = *self.judge.votes.entry((volume, node, term)).or_insert(to);
        assert_eq!(first, to, "invariant 7: node {node} votes for {first:?} and for {to:?} in {term:?} of volume {volume}");
        self.tally.check("a member has one vote a term (7)");
        if !self.rng.one_in((self.plan.probe_one_in / 10).max(1)) {
            return;
        }
        let rots = self.rng.one_in(2);
        let Some(probe) = self.after_cut(node, rots, "a vote") else { return };
        let look = replica_in(&probe, volume).and_then(|no| probe.store().look(no));
        let look = look
            .unwrap_or_else(|| panic!("invariant 7: after a power cut node {node} would have no member of volume {volume}, and it votes"));
        let ballot = look.ballot;
        assert!(
            ballot.term > term || ballot.term == term && ballot.vote == to,
            "invariant 7: node {node} votes for {to:?} in {term:?} of volume {volume}; after a power cut it would know {ballot:?}, the newest record rots: {rots}"
        );
        self.tally.check("a vote is durable when it is sent (7)");
    }

    /// What a member acknowledges is on its drive (9).
    fn check_appended(&mut self, node: usize, volume: u32, index: Index) {
        let live = self.nodes[node].replica_of(volume).and_then(|no| self.term_of(node, no, index));
        let Some(probe) = self.after_cut(node, false, "an acknowledged entry") else { return };
        let found = replica_in(&probe, volume).and_then(|no| probe.store().look(no).map(|look| (no, look)));
        let (no, look) =
            found.unwrap_or_else(|| panic!("invariant 9: after a power cut node {node} would have no member of volume {volume}"));
        if look.doubtful {
            return;
        }
        let term = probe.store().logged(no, index, index).first().map(|entry| entry.term);
        assert!(
            look.applied >= index || look.last >= index && (term == live || live.is_none()),
            "invariant 9: node {node} acknowledges entry {} of volume {volume} as of {live:?}; after a power cut it would have {term:?}, {look:?}",
            index.0
        );
        self.tally.check("an entry is durable before it is acknowledged (9)");
    }

    fn term_of(&self, node: usize, no: ReplicaNo, index: Index) -> Option<Term> {
        let store = self.nodes[node].store.as_ref()?;
        store.logged(no, index, index).first().map(|entry| entry.term)
    }

    /// A store opened over the node's drive as a power cut at this moment would leave it, its newest promised record rotten too if `rots`.
    /// `None` where it would know of a fence.
    fn after_cut(&mut self, node: usize, rots: bool, when: &str) -> Option<Probe> {
        let cut = self.rng.pick(&[Cut::AllLost, Cut::AllLost, Cut::PerBlock]);
        let rng = &mut self.rng.fork(3);
        let it = &self.nodes[node];
        if it.fence.is_some() || it.command_failed || it.phase != Phase::Serving {
            return None;
        }
        let mut twin = it.drive.after_cut(cut, rng);
        let newest = if rots { it.evidence.newest_known() } else { Vec::new() };
        if let Some(at) = newest.first().map(|block| it.share.start.0 + block) {
            let mut page = twin.bytes(at);
            rot(&mut page, rng);
            twin.corrupt(at, Some(Rc::new(page)));
        }
        let config = StoreConfig { fenced: None, ..it.config.clone() };
        let probe = Probe::open(twin, it.share, config, rng.fork(4)).unwrap_or_else(|stuck| panic!("{when}: {stuck}"));
        assert!(probe.failed.is_none(), "{when}: after a power cut node {node} would not open: {:?}", probe.failed);
        Some(probe)
    }

    /// After each turn: what each member of the node holds (6, 7, 10).
    pub fn look_over(&mut self, node: usize) {
        let (life, phase) = (self.nodes[node].life, self.nodes[node].phase);
        let replicas: Vec<(ReplicaNo, u32)> = self.nodes[node].replicas.iter().map(|(no, volume)| (*no, *volume)).collect();
        self.check_view(node);
        let mut whole = phase == Phase::Serving;
        // What a drive that is not what it was holds is nobody's state.
        let gone = self.nodes[node].gone.is_some();
        for (no, volume) in replicas.into_iter().filter(|_| !gone) {
            let it = &self.nodes[node];
            let store = it.store.as_ref().expect("alive");
            let Some(look) = store.look(no) else {
                assert!(!self.volumes[&volume].replicated, "node {node} has no member of volume {volume}");
                continue;
            };
            assert_eq!(look.me, self.seat(volume, node), "node {node} is another member");
            whole &= !look.doubtful && !look.rebuilding;
            if look.doubtful {
                let (of, _) = self.judge.doubted.entry((volume, node)).or_insert((life, look.last));
                *of = life;
            } else if let Some((of, last)) = self.judge.doubted.remove(&(volume, node)) {
                assert!(
                    of == life || look.last > last || look.rebuilding,
                    "invariant 11: node {node} was in doubt of its log of volume {volume} after {last:?}, and has forgotten that: {look:?}"
                );
                self.tally.check("a doubt outlives its process (11)");
            }
            let Some(view) = look.view else {
                whole = false;
                continue;
            };
            let before = self.judge.shown.get(&(volume, node)).copied().unwrap_or_default();
            let fresh = before.life != life || before.term == Term(0);
            if fresh {
                let spoken = self.judge.spoken.get(&(volume, node)).copied().unwrap_or_default();
                assert!(
                    view.term >= spoken,
                    "invariant 10: node {node} restarts in {:?} of volume {volume}, it has spoken in {spoken:?}",
                    view.term
                );
                self.tally.check("a term does not go back (10)");
            }
            assert!(
                view.applied <= view.committed && view.applied <= view.persisted,
                "invariant 10: node {node}, volume {volume}: {view:?}"
            );
            assert!(
                view.committed <= view.last && look.start <= look.applied,
                "invariant 10: node {node}, volume {volume}: {view:?}, {look:?}"
            );
            let back = !fresh && (view.term < before.term || view.committed < before.committed || look.applied < before.applied);
            assert!(!back, "invariant 10: node {node}, volume {volume} goes back to {view:?}, {look:?}");
            let from = if fresh { look.start } else { before.applied };
            if look.applied > from || fresh {
                for entry in store.logged(no, Index(from.0 + 1), look.applied) {
                    self.seen(volume, &entry, node);
                    let (term, digest) = *self.judge.history.entry((volume, entry.index)).or_insert((entry.term, digest_of(&entry)));
                    assert!(
                        (term, digest) == (entry.term, digest_of(&entry)),
                        "invariant 1: entry {} of volume {volume} was applied of {term:?}, and node {node} applies one of {:?}",
                        entry.index.0,
                        entry.term
                    );
                    self.tally.check("applied entries are the same everywhere (1, 6)");
                }
                // A life begins with what the checkpoint covers of what was applied, over extents that have more of it: they are as of no one entry
                // until all that was applied is applied again.
                let wrong = self.wrong.as_ref().is_some_and(|wrong| wrong.is_of(node, volume));
                if !wrong && !look.rebuilding && look.applied >= before.reached && !self.is_log_only(volume, node) && self.rng.one_in(24) {
                    self.check_state(node, volume, no, look.applied);
                }
            }
            if self.is_log_only(volume, node) {
                self.check_log_only(node, volume, &look, if fresh { look.start } else { before.start });
            }
            let (reached, opened) = (before.reached.max(look.applied), if fresh { look.last } else { before.opened });
            // What rotted may lie in what is not applied: with another member's copy of the same entry it would be lost.
            whole &= look.applied >= opened;
            self.judge.shown.insert(
                (volume, node),
                Shown { life, applied: look.applied, reached, term: view.term, committed: view.committed, start: look.start, opened },
            );
        }
        if whole {
            self.nodes[node].rotten = false;
        }
    }

    /// A node dies in the turn that ends: doubts that this turn ended may be over in its next life.
    pub fn doubts_end(&mut self, node: usize) {
        let it = &self.nodes[node];
        for (no, volume) in &it.replicas {
            if it.store.as_ref().and_then(|store| store.look(*no)).is_some_and(|look| !look.doubtful) {
                self.judge.doubted.remove(&(*volume, node));
            }
        }
    }

    /// It serves nobody, and lets go of what a member with content has not applied only where the log is wanted for what is new.
    fn check_log_only(&mut self, node: usize, volume: u32, look: &MemberLook, before: Index) {
        assert!(look.view.is_none_or(|view| !view.serves), "node {node} keeps the log of volume {volume} alone, and serves it");
        let it = &self.nodes[node];
        let applied = |other: usize| self.judge.shown.get(&(volume, other)).map_or(Index(0), |shown| shown.applied);
        let data = (0..self.nodes.len()).filter(|other| *other != node && self.nodes[*other].gone.is_none());
        let needed = data.map(applied).min().unwrap_or_default();
        let view = it.store.as_ref().expect("alive").view();
        if look.start > before && look.start > needed && !look.rebuilding {
            // A quarter of what hosts may fill stays, less the batch that does not fit into it any more and what a wrap pads.
            let batch = u64::from(PAYLOAD_BLOCKS_MAX + HEADER_BLOCKS_MAX);
            let quarter = (view.ring_blocks - 2 * batch - 64) / 4;
            assert!(
                view.ring_used + 2 * batch >= quarter,
                "node {node} lets go of the log of volume {volume} to {:?}, a member has applied {needed:?}, and {} of {} blocks are in use",
                look.start,
                view.ring_used,
                view.ring_blocks
            );
        }
        self.tally.check("a log-only member keeps what others lack");
    }

    fn check_view(&mut self, node: usize) {
        let it = &self.nodes[node];
        let view = it.store.as_ref().expect("alive").view();
        assert!(view.ring_used <= view.ring_blocks, "{} of {} blocks of the log are in use", view.ring_used, view.ring_blocks);
        assert!(view.extents_free <= view.extents, "{} of {} extents are free", view.extents_free, view.extents);
        assert_eq!(view.disk_out, it.out.len() as u64, "the store counts {} device commands, {} are out", view.disk_out, it.out.len());
        assert!(view.held >= it.ios.len() as u64, "the store holds {} commands, {} were not answered", view.held, it.ios.len());
        assert!(!view.quiescent || it.out.is_empty() && it.ios.is_empty(), "a store with work calls itself quiescent: {view:?}");
        if self.rng.one_in(16) {
            let it = &self.nodes[node];
            it.store.as_ref().expect("alive").audit_promises().unwrap_or_else(|error| panic!("node {node}: {error}"));
            self.tally.check("what is to be drained has its space (24)");
        }
        self.tally.check("cheap, after each turn");
    }

    /// The same applied index, the same state (6).
    fn check_state(&mut self, node: usize, volume: u32, no: ReplicaNo, applied: Index) {
        let it = &self.nodes[node];
        let start = it.share.start.0;
        let contents = it.store.as_ref().expect("alive").contents(no, |at| it.drive.bytes(start + at.0));
        let contents = contents.unwrap_or_else(|error| panic!("node {node}, volume {volume}: {error}"));
        if contents.values().any(Option::is_none) {
            return;
        }
        let fold = |h, (block, crc): (&u64, &Option<u32>)| mix(h ^ block << 32 ^ u64::from(crc.expect("none is lost")));
        let digest = contents.iter().fold(0, fold);
        let store = it.store.as_ref().expect("alive");
        // A checkpoint may know of markers behind what it calls applied.
        for view in store.snapshots(no).into_iter().filter(|view| view.at <= applied) {
            let kept = store.snapshot_contents(no, view.layer, |at| it.drive.bytes(start + at.0));
            let kept = kept.unwrap_or_else(|error| panic!("node {node}, volume {volume}: {error}"));
            if kept.values().any(Option::is_none) {
                continue;
            }
            let digest = kept.iter().fold(view.blocks, fold);
            let (first, by) = *self.judge.kept.entry((volume, view.at)).or_insert((digest, node));
            assert_eq!(
                first, digest,
                "invariant 6: nodes {by} and {node} have the snapshot at entry {} of volume {volume} otherwise",
                view.at.0
            );
            self.tally.check("same snapshot, same state (6)");
        }
        let (first, by) = *self.judge.digests.entry((volume, applied)).or_insert((digest, node));
        assert_eq!(first, digest, "invariant 6: as of entry {} nodes {by} and {node} have different states of volume {volume}", applied.0);
        if by != node {
            self.tally.check("same applied index, same state (6)");
        }
    }
}

fn replica_in(probe: &Probe, volume: u32) -> Option<ReplicaNo> {
    probe.replicas.iter().find(|(_, shape)| volume_of(&shape.segment) == volume).map(|(no, _)| *no)
}
