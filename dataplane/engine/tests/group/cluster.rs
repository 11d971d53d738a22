//! Three stores of one group and the network between them: every word goes through its bytes, may be dropped, and is handed over in order.

use crate::bench::{Bench, DRIVE_BLOCKS, SEGMENT};
use penstock_engine::replica::Part as GroupPart;
use penstock_engine::*;
use penstock_wire::peer::{Body, HEADER, Header, Member, MemberNo, Members, MessageBody, PROTOCOL, Role};
use penstock_wire::*;

/// Blocks of a drive that has hardly as much as the volume.
pub const SMALL: u64 = 4_160;

pub struct Cluster {
    pub nodes: Vec<Bench>,
    /// Whether a node's process runs.
    pub up: Vec<bool>,
    /// Pairs (from, to) that hear nothing.
    pub cut: Vec<(usize, usize)>,
    /// A word for which this is true is lost.
    pub lose: fn(&PeerWord) -> bool,
    /// A word for which this is true is kept until it is released.
    pub hold: fn(&PeerWord) -> bool,
    pub held: Vec<(usize, usize, PeerWord, Vec<u8>)>,
    /// Words that came through, by kind.
    pub delivered: u64,
    pub payload_blocks: u64,
    /// Process lives, for the incarnations that nodes show.
    lives: u8,
}

pub fn shape(no: u8) -> ReplicaShape {
    ReplicaShape {
        volume: VolumeId([2; 16]),
        segment: SEGMENT,
        replica: ReplicaId([no; 16]),
        segment_no: 0,
        blocks: 2000,
        logical_block: 512,
        name: "v".into(),
    }
}

pub fn members(count: u8) -> Members {
    let member = |no: u8| Member { no: MemberNo(no.into()), role: Role::Voter, replica: ReplicaId([no; 16]), node: NodeId([no; 16]) };
    Members { next: MemberNo(u64::from(count) + 1), list: (1..=count).map(member).collect() }
}

impl Cluster {
    /// Members of one group, on a node each.
    pub fn new(count: u8) -> Self {
        Self::on_drives(&vec![DRIVE_BLOCKS; count.into()])
    }

    /// The same on drives of so many blocks.
    pub fn on_drives(blocks: &[u64]) -> Self {
        Self::of(members(blocks.len() as u8), blocks)
    }

    /// Members in their roles.
    pub fn of(all: Members, blocks: &[u64]) -> Self {
        Self::over(all, (1..).zip(blocks).map(|(no, blocks)| Bench::on_drive(no, 9, *blocks)).collect())
    }

    /// Members of one group on logs of so many blocks.
    pub fn with_rings(rings: &[u64]) -> Self {
        let nodes = (1..).zip(rings).map(|(no, ring)| Bench::with_ring(no, 9, 4 * DRIVE_BLOCKS, *ring));
        Self::over(members(rings.len() as u8), nodes.collect())
    }

    fn over(all: Members, mut nodes: Vec<Bench>) -> Self {
        let count = nodes.len() as u8;
        for (no, bench) in (1..).zip(&mut nodes) {
            let (shape, members) = (Box::new(shape(no)), Box::new(all.clone()));
            bench.order(Order::CreateMember { shape, members }).unwrap();
        }
        let up = vec![true; count.into()];
        let held = Vec::new();
        Self { nodes, up, cut: Vec::new(), lose: |_| false, hold: |_| false, held, delivered: 0, payload_blocks: 0, lives: 0 }
    }

    fn at(&self, node: NodeId) -> usize {
        usize::from(node.0[0]) - 1
    }

    /// What follows is about another volume of these nodes.
    pub fn about(&mut self, segment: SegmentId) {
        self.nodes.iter_mut().for_each(|node| node.segment = segment);
    }

    /// Whether a node runs and has a member.
    fn has_member(&self, at: usize) -> bool {
        self.up[at] && self.nodes[at].store.replica_of(self.nodes[at].segment).is_some()
    }

    /// Lets every node rest and hands over what was said until nobody says anything.
    pub fn run(&mut self) {
        for _ in 0..1000 {
            self.nodes.iter_mut().zip(&self.up).filter(|(_, up)| **up).for_each(|(node, _)| node.run());
            if !self.exchange() {
                return;
            }
        }
        panic!("the members talk without end");
    }

    /// One turn of every node, and what was said in it is handed over.
    pub fn step(&mut self) {
        self.nodes.iter_mut().zip(&self.up).filter(|(_, up)| **up).for_each(|(node, _)| _ = node.turns(1));
        self.exchange();
    }

    /// Whether anybody had said anything.
    fn exchange(&mut self) -> bool {
        let mut said = Vec::new();
        for (from, node) in self.nodes.iter_mut().enumerate().filter(|(at, _)| self.up[*at]) {
            said.extend(std::mem::take(&mut node.sent).into_iter().map(|(to, word, payload)| (from, to, word, payload)));
        }
        let any = !said.is_empty();
        for (from, to, word, payload) in said {
            let to = self.at(to);
            if self.up[to] && !self.cut.contains(&(from, to)) && !(self.lose)(&word) {
                if (self.hold)(&word) {
                    self.held.push((from, to, word, payload));
                } else {
                    self.hand_over(from, to, &word, &payload);
                }
            }
        }
        any
    }

    /// Hands over what was held, however old it is.
    pub fn release(&mut self) {
        for (from, to, word, payload) in std::mem::take(&mut self.held) {
            if self.up[to] {
                self.hand_over(from, to, &word, &payload);
            }
        }
        self.run();
    }

    pub fn view(&self, at: usize) -> MemberView {
        let node = &self.nodes[at];
        node.store.member_view(node.store.replica_of(node.segment).unwrap()).unwrap()
    }

    /// What a member's blocks are.
    pub fn contents(&self, at: usize) -> Contents {
        let node = &self.nodes[at];
        let start = node.label.stores[0].start.0;
        let read = |block: BlockAddr| node.media[(start + block.0) as usize * BLOCK..][..BLOCK].try_into().unwrap();
        node.store.contents(node.store.replica_of(node.segment).unwrap(), read).unwrap()
    }

    /// The word is in the node's next turn.
    pub fn hand_over(&mut self, from: usize, to: usize, word: &PeerWord, payload: &[u8]) {
        let body = Body::from(word.clone());
        let bytes = body.encode(PROTOCOL, 1);
        let decoded = Body::decode(&Header::decode(&bytes).unwrap(), &bytes[HEADER..]).unwrap();
        let word = PeerWord::of(decoded).expect("it is a word").remove(0);
        assert_eq!(word.payload_blocks() as usize * BLOCK, payload.len());
        self.delivered += 1;
        self.payload_blocks += u64::from(word.payload_blocks());
        let from = NodeId([from as u8 + 1; 16]);
        let node = &mut self.nodes[to];
        let buf = (!payload.is_empty()).then(|| {
            let buf = node.mem.alloc(word.payload_blocks()).unwrap();
            node.mem.bytes_mut(buf)[..payload.len()].copy_from_slice(payload);
            buf
        });
        node.store.apply(Event::Peer { from, word: Box::new(word), payload: buf }, &mut node.mem, &mut node.fx);
    }

    /// Time passes everywhere, in ticks of 10 ms.
    pub fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            for (_, node) in self.nodes.iter_mut().enumerate().filter(|(at, _)| self.up[*at]) {
                node.pass(10);
            }
            self.run();
        }
    }

    pub fn standing(&self, at: usize) -> Standing {
        let node = &self.nodes[at];
        let no = node.store.replica_of(node.segment).unwrap();
        node.store.member_view(no).unwrap().standing.unwrap()
    }

    /// Who leads and serves, once somebody does.
    pub fn leader(&mut self) -> usize {
        for _ in 0..300 {
            let serving = (0..self.nodes.len()).filter(|at| self.has_member(*at) && self.standing(*at).serves);
            // An old leader may still think that it leads; the newest term is the one that counts.
            if let Some(at) = serving.max_by_key(|at| self.standing(*at).term) {
                let known = (0..self.nodes.len()).all(|other| {
                    !self.has_member(other)
                        || self.cut.iter().any(|cut| cut.0 == other || cut.1 == other)
                        || self.standing(other).term == self.standing(at).term
                });
                if known {
                    assert_eq!(self.standing(at).part, GroupPart::Leader);
                    return at;
                }
            }
            self.pass(10);
        }
        panic!(
            "nobody leads: {:?}",
            (0..self.nodes.len()).filter(|at| self.has_member(*at)).map(|at| self.standing(at)).collect::<Vec<_>>()
        );
    }

    pub fn begin(&mut self, at: usize, op: HostOp, payload: Vec<u8>) -> u32 {
        self.nodes[at].begin(op, payload)
    }

    pub fn reply(&self, at: usize, io: u32) -> Option<Status> {
        self.nodes[at].replies.get(&io).copied()
    }

    pub fn host(&mut self, at: usize, op: HostOp, payload: Vec<u8>) -> (Status, Vec<u8>) {
        self.host_within(at, op, payload, 1000)
    }

    pub fn host_within(&mut self, at: usize, op: HostOp, payload: Vec<u8>, ms: u64) -> (Status, Vec<u8>) {
        let io = self.begin(at, op, payload);
        self.run();
        for _ in 0..ms / 10 {
            if self.reply(at, io).is_some() {
                break;
            }
            self.pass(10);
        }
        (self.reply(at, io).expect("a command is answered in time"), self.nodes[at].mem.host.remove(&io).unwrap())
    }

    pub fn write(&mut self, at: usize, offset: u64, bytes: &[u8]) -> Status {
        self.host(at, HostOp::Write(Span { offset, len: bytes.len() as u64 }), bytes.to_vec()).0
    }

    pub fn read(&mut self, at: usize, offset: u64, len: u64) -> Vec<u8> {
        let (status, bytes) = self.host(at, HostOp::Read(Span { offset, len }), vec![0xcc; len as usize]);
        assert_eq!(status, Status::Ok);
        bytes
    }

    pub fn order(&mut self, at: usize, order: Order) -> Result<(), OrderError> {
        let id = 1000 + self.nodes[at].orders.len() as u64;
        let node = &mut self.nodes[at];
        node.store.apply(Event::Order { id: OrderId(id), order }, &mut node.mem, &mut node.fx);
        self.run();
        for _ in 0..100 {
            if let Some(result) = self.nodes[at].orders.get(&id) {
                return result.clone();
            }
            self.pass(10);
        }
        panic!("the order is not answered in a second");
    }

    /// The node's process is gone: nobody hears of it, and it does nothing.
    pub fn kill(&mut self, at: usize) {
        self.up[at] = false;
    }

    /// The process dies with all that was on its way, and comes back over what the drive has. The others see that it is another one.
    pub fn restart(&mut self, at: usize) {
        self.lives += 1;
        self.up[at] = true;
        self.held.retain(|(from, to, ..)| *from != at && *to != at);
        self.nodes[at].reopen();
        let (node, incarnation) = (NodeId([at as u8 + 1; 16]), Incarnation([self.lives; 16]));
        for (_, other) in self.nodes.iter_mut().enumerate().filter(|(other, _)| *other != at) {
            other.store.apply(Event::PeerUp { node, incarnation }, &mut other.mem, &mut other.fx);
        }
        self.run();
    }

    pub fn isolate(&mut self, at: usize) {
        for other in (0..self.nodes.len()).filter(|other| *other != at) {
            self.cut.extend([(at, other), (other, at)]);
        }
    }

    pub fn applied(&self, at: usize) -> u64 {
        let node = &self.nodes[at];
        node.store.member_view(node.store.replica_of(node.segment).unwrap()).unwrap().applied.0
    }

    /// Every member has applied the same.
    pub fn agree(&mut self) {
        let up: Vec<usize> = (0..self.nodes.len()).filter(|at| self.has_member(*at)).collect();
        self.agree_among(&up);
    }

    /// These members have applied the same.
    pub fn agree_among(&mut self, among: &[usize]) {
        for _ in 0..300 {
            let applied: Vec<u64> = among.iter().map(|at| self.applied(*at)).collect();
            if applied.windows(2).all(|pair| pair[0] == pair[1]) {
                return;
            }
            self.pass(10);
        }
        panic!("the members do not come to the same: {:?}", among.iter().map(|at| self.applied(*at)).collect::<Vec<_>>());
    }

    /// Everything is drained, nothing is held, and the books of every member add up.
    pub fn audit(&mut self) {
        self.agree();
        for at in 0..self.nodes.len() {
            if self.up[at] {
                self.order(at, Order::Drain).unwrap();
            }
        }
        self.pass(50);
        for (at, node) in self.nodes.iter().enumerate().filter(|(at, _)| self.up[*at]) {
            node.audit();
            assert_eq!(node.mem.held(), 0, "node {at} holds buffers: {:?}", node.store.view());
        }
    }
}

pub fn is_append(word: &PeerWord) -> bool {
    matches!(word, PeerWord::Group(message) if matches!(message.body, MessageBody::Append(_)))
}

pub fn carries_payload(word: &PeerWord) -> bool {
    word.payload_blocks() > 0
}
