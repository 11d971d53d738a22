//! Who is at the other end of a connection: two hellos each way, the second with a proof that the cluster's key is there.
//!
//! ```text
//! dials                         answers
//!   hello ------------------------>          checked; then both of its own
//!        <------------------------ hello
//!        <------------------------ hello, proven
//!   hello, proven ---------------->          up at both ends
//! ```
//! Pure: nonces come from outside. A proof is HMAC-SHA-256 over [`LABEL`], the first hello of the one that dialled, that of the
//! one that answers, and its own hello, each without its proof. Both nonces are in it, so it is of use once, and the speaker's
//! node and shard, so that it cannot be sent back to whom it came from.

use penstock_wire::peer::{Hello, NONCE, PROTOCOL, PROTOCOL_OLDEST, agree};
use penstock_wire::{ClusterId, Incarnation, NodeId};
use thiserror::Error;

use super::key::ClusterKey;

/// What every proof begins with, so that the key may serve other ends too.
const LABEL: &[u8] = b"penstock peer 1";

/// Who this core is to its peers.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub shard: u16,
    pub shards: u16,
    pub key: ClusterKey,
}

/// Why the other end is not believed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    #[error("it is of cluster {found}, this node of {ours}")]
    Cluster { found: ClusterId, ours: ClusterId },
    #[error("it is node {0}, which is no peer of this node")]
    Stranger(NodeId),
    #[error("it is node {found}; at this address node {expected} was expected")]
    OtherNode { found: NodeId, expected: NodeId },
    #[error("it says that it is this very node, {0}")]
    Myself(NodeId),
    #[error("node {0} has dialled, and of two nodes the one with the lower id dials")]
    Dialled(NodeId),
    #[error("it wants core {wants} of this node and has reached core {this}")]
    Shard { wants: u16, this: u16 },
    #[error("it speaks versions {oldest} to {newest} of the protocol, this node {PROTOCOL_OLDEST} to {PROTOCOL}")]
    Version { oldest: u32, newest: u32 },
    #[error("its second hello is not its first one with a proof")]
    Changed,
    #[error("its proof is wrong: its cluster key is another than this node's")]
    Proof,
}

/// What the other end turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub shard: u16,
    pub shards: u16,
    /// Of the protocol, which both speak from here on.
    pub version: u32,
}

/// What a hello brings about: hellos to be sent, then, when all is proven, who it is.
#[derive(Debug, Default)]
pub struct Step {
    pub say: Vec<Hello>,
    pub known: Option<Known>,
}

#[derive(Debug)]
pub struct Handshake {
    identity: Identity,
    /// The node that was dialled; `None` at the end that answers.
    dialled: Option<NodeId>,
    ours: Hello,
    theirs: Option<Hello>,
}

impl Handshake {
    /// At the end that dials, and the hello that begins it.
    pub fn dial(identity: Identity, node: NodeId, to_shard: u16, nonce: [u8; NONCE]) -> (Self, Hello) {
        let ours = Self::hello(&identity, to_shard, nonce);
        (Self { identity, dialled: Some(node), ours: ours.clone(), theirs: None }, ours)
    }

    /// At the end that answers: says nothing before it has heard something sensible.
    pub fn answer(identity: Identity, nonce: [u8; NONCE]) -> Self {
        let ours = Self::hello(&identity, 0, nonce);
        Self { identity, dialled: None, ours, theirs: None }
    }

    fn hello(identity: &Identity, to_shard: u16, nonce: [u8; NONCE]) -> Hello {
        let Identity { cluster, node, incarnation, shard, shards, .. } = *identity;
        Hello { oldest: PROTOCOL_OLDEST, newest: PROTOCOL, cluster, node, incarnation, shard, shards, to_shard, key: 0, nonce, proof: None }
    }

    /// Takes the next hello of the other end. `is_peer`: whether a node may be talked to at all.
    ///
    /// # Errors
    /// When the other end is not to be believed: the connection ends.
    pub fn on_hello(&mut self, hello: Hello, is_peer: impl Fn(NodeId) -> bool) -> Result<Step, Refusal> {
        match self.theirs.take() {
            None => self.on_first(hello, is_peer),
            Some(first) => self.on_second(first, hello),
        }
    }

    fn on_first(&mut self, hello: Hello, is_peer: impl Fn(NodeId) -> bool) -> Result<Step, Refusal> {
        let identity = &self.identity;
        if hello.cluster != identity.cluster {
            return Err(Refusal::Cluster { found: hello.cluster, ours: identity.cluster });
        }
        if hello.node == identity.node {
            return Err(Refusal::Myself(hello.node));
        }
        if agree((PROTOCOL_OLDEST, PROTOCOL), (hello.oldest, hello.newest)).is_none() {
            return Err(Refusal::Version { oldest: hello.oldest, newest: hello.newest });
        }
        if hello.proof.is_some() {
            return Err(Refusal::Changed);
        }
        match self.dialled {
            Some(expected) if hello.node != expected => return Err(Refusal::OtherNode { found: hello.node, expected }),
            Some(_) => {}
            None if !is_peer(hello.node) => return Err(Refusal::Stranger(hello.node)),
            None if hello.node > identity.node => return Err(Refusal::Dialled(hello.node)),
            None if hello.to_shard != identity.shard => return Err(Refusal::Shard { wants: hello.to_shard, this: identity.shard }),
            None => {}
        }
        let mut step = Step::default();
        if self.dialled.is_none() {
            self.ours.to_shard = hello.shard;
            step.say.push(self.ours.clone());
            step.say.push(self.proven(&hello));
        }
        self.theirs = Some(hello);
        Ok(step)
    }

    fn on_second(&mut self, first: Hello, hello: Hello) -> Result<Step, Refusal> {
        let Some(proof) = hello.proof.filter(|_| hello.proven() == first.proven()) else { return Err(Refusal::Changed) };
        let (of_dialler, of_answerer) = self.both(&first);
        if !self.identity.key.verifies(&[LABEL, &of_dialler, &of_answerer, &hello.proven()], &proof) {
            return Err(Refusal::Proof);
        }
        let version = agree((PROTOCOL_OLDEST, PROTOCOL), (first.oldest, first.newest)).expect("seen with the first hello");
        let Hello { node, incarnation, shard, shards, .. } = first;
        let known = Some(Known { node, incarnation, shard, shards, version });
        let say = if self.dialled.is_some() { vec![self.proven(&first)] } else { Vec::new() };
        Ok(Step { say, known })
    }

    fn both(&self, theirs: &Hello) -> (Vec<u8>, Vec<u8>) {
        if self.dialled.is_some() { (self.ours.proven(), theirs.proven()) } else { (theirs.proven(), self.ours.proven()) }
    }

    fn proven(&self, theirs: &Hello) -> Hello {
        let (of_dialler, of_answerer) = self.both(theirs);
        let proof = self.identity.key.prove(&[LABEL, &of_dialler, &of_answerer, &self.ours.proven()]);
        Hello { proof: Some(proof), ..self.ours.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(node: u8, key: u8) -> Identity {
        Identity {
            cluster: ClusterId([7; 16]),
            node: NodeId([node; 16]),
            incarnation: Incarnation([node + 100; 16]),
            shard: 0,
            shards: 2,
            key: ClusterKey::parse(&[key | 0x80; 32]).unwrap(),
        }
    }

    /// Node 1 dials node 2. What each learned, or who refused and why.
    fn meet(one: Identity, two: Identity, change: impl Fn(usize, &mut Hello)) -> Result<(Known, Known), (u8, Refusal)> {
        let (mut dials, first) = Handshake::dial(one, NodeId([2; 16]), 0, [11; NONCE]);
        let mut answers = Handshake::answer(two, [22; NONCE]);
        let mut count = 0;
        let mut said = |mut hello: Hello| {
            change(count, &mut hello);
            count += 1;
            hello
        };
        let is_peer = |node: NodeId| node == NodeId([1; 16]);
        let step = answers.on_hello(said(first), is_peer).map_err(|r| (2, r))?;
        let (mut known, mut last) = (None, Vec::new());
        for hello in step.say {
            let step = dials.on_hello(said(hello), |_| false).map_err(|r| (1, r))?;
            known = known.or(step.known);
            last.extend(step.say);
        }
        assert_eq!(last.len(), 1, "one proof goes back");
        let step = answers.on_hello(said(last.remove(0)), is_peer).map_err(|r| (2, r))?;
        Ok((known.expect("both hellos came"), step.known.expect("both hellos came")))
    }

    #[test]
    fn two_nodes_of_one_key_know_each_other() {
        let (two, one) = meet(identity(1, 5), identity(2, 5), |_, _| ()).unwrap();
        assert_eq!(two, Known { node: NodeId([2; 16]), incarnation: Incarnation([102; 16]), shard: 0, shards: 2, version: PROTOCOL });
        assert_eq!((one.node, one.incarnation), (NodeId([1; 16]), Incarnation([101; 16])));
    }

    #[test]
    fn other_key_is_refused_by_whoever_sees_its_proof_first() {
        assert_eq!(meet(identity(1, 5), identity(2, 6), |_, _| ()), Err((1, Refusal::Proof)));
    }

    #[test]
    fn answerer_refuses_a_dialler_without_the_key() {
        // It was let through by changing nothing but its proof.
        let forged = |at: usize, hello: &mut Hello| {
            if at == 3 {
                hello.proof = Some([1; 32]);
            }
        };
        assert_eq!(meet(identity(1, 5), identity(2, 5), forged), Err((2, Refusal::Proof)));
    }

    #[test]
    fn each_part_of_a_hello_that_is_not_as_it_must_be_is_refused() {
        type Change = fn(&mut Hello);
        let cases: [(usize, Change, u8, &str); 10] = [
            (0, |h| h.cluster = ClusterId([9; 16]), 2, "of cluster"),
            (1, |h| h.cluster = ClusterId([9; 16]), 1, "of cluster"),
            (0, |h| h.node = NodeId([3; 16]), 2, "no peer"),
            (0, |h| h.node = NodeId([2; 16]), 2, "this very node"),
            (1, |h| h.node = NodeId([3; 16]), 1, "was expected"),
            (0, |h| h.to_shard = 1, 2, "wants core 1"),
            (0, |h| (h.oldest, h.newest) = (PROTOCOL + 1, PROTOCOL + 2), 2, "versions"),
            (0, |h| h.proof = Some([0; 32]), 2, "second hello"),
            (2, |h| h.proof = None, 1, "second hello"),
            (2, |h| h.nonce[0] ^= 1, 1, "second hello"),
        ];
        for (at, change, who, part) in cases {
            let refused = meet(identity(1, 5), identity(2, 5), |n, hello| {
                if n == at {
                    change(hello)
                }
            })
            .unwrap_err();
            assert!(refused.0 == who && refused.1.to_string().contains(part), "{part}: {refused:?}");
        }
    }

    #[test]
    fn hello_changed_on_the_way_makes_every_proof_wrong() {
        let other_nonce = |at: usize, hello: &mut Hello| {
            if at == 0 {
                hello.nonce[5] ^= 1;
            }
        };
        assert_eq!(meet(identity(1, 5), identity(2, 5), other_nonce), Err((1, Refusal::Proof)));
        let other_life = |at: usize, hello: &mut Hello| {
            if at == 1 || at == 2 {
                hello.incarnation = Incarnation([1; 16]);
            }
        };
        assert_eq!(meet(identity(1, 5), identity(2, 5), other_life), Err((1, Refusal::Proof)));
    }

    #[test]
    fn higher_node_that_dials_is_refused() {
        let (_, first) = Handshake::dial(identity(3, 5), NodeId([2; 16]), 0, [1; NONCE]);
        let refused = Handshake::answer(identity(2, 5), [2; NONCE]).on_hello(first, |_| true).unwrap_err();
        assert_eq!(refused, Refusal::Dialled(NodeId([3; 16])));
    }
}
