//! The first frame of each direction: who speaks, and which versions of the protocol it speaks.
//!
//! Not here: the proof itself. It is a keyed hash, by the cluster's key, over both nonces and both hellos without their proofs, and the
//! node computes and checks it; a hello without a proof opens the exchange, the second one of each side carries it.

use super::{Grow, limit, zeros};
use crate::codec::Take;
use crate::{ClusterId, DecodeError, Incarnation, NodeId};

/// Bytes of a nonce, and of a proof.
pub const NONCE: usize = 32;
pub const PROOF: usize = 32;
const SHARDS_MAX: u16 = 1024;

/// Who is at this end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Versions of the protocol, oldest and newest, both spoken.
    pub oldest: u32,
    pub newest: u32,
    pub cluster: ClusterId,
    pub node: NodeId,
    /// Of the node's process: how often it began again. A peer that shows another than before has lost what it held in memory.
    pub incarnation: Incarnation,
    /// Which of the sender's shards speaks, of how many, and which of the receiver's it wants.
    pub shard: u16,
    pub shards: u16,
    pub to_shard: u16,
    /// Which of the cluster's keys the proof is made with; keys change while nodes run.
    pub key: u32,
    pub nonce: [u8; NONCE],
    /// `None` in the hello that opens the exchange.
    pub proof: Option<[u8; PROOF]>,
}

/// The newest version that both speak.
pub fn agree(ours: (u32, u32), theirs: (u32, u32)) -> Option<u32> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

impl Hello {
    /// The bytes that a proof covers: all but the proof.
    pub fn proven(&self) -> Vec<u8> {
        let mut w = Grow(Vec::new());
        Self { proof: None, ..self.clone() }.put(&mut w);
        w.0
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u32(self.oldest);
        w.u32(self.newest);
        w.bytes(&self.cluster.0);
        w.bytes(&self.node.0);
        w.bytes(&self.incarnation.0);
        w.u16(self.shard);
        w.u16(self.shards);
        w.u16(self.to_shard);
        w.u16(u16::from(self.proof.is_some()));
        w.u32(self.key);
        w.zeros(4);
        w.bytes(&self.nonce);
        w.bytes(&self.proof.unwrap_or([0; PROOF]));
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (oldest, newest) = (r.u32()?, r.u32()?);
        if oldest == 0 || newest < oldest {
            return Err(DecodeError::Value { what: "oldest version of a hello", found: oldest.into() });
        }
        let cluster = ClusterId(r.id()?);
        let node = NodeId(r.id()?);
        let incarnation = Incarnation(r.id()?);
        let (shard, shards, to_shard) = (r.u16()?, r.u16()?, r.u16()?);
        limit("shards of a node", shards.into(), SHARDS_MAX.into())?;
        limit("shard that is asked for", to_shard.into(), u64::from(SHARDS_MAX) - 1)?;
        if shard >= shards {
            return Err(DecodeError::Limit { what: "shard of a node", found: shard.into(), limit: u64::from(shards.max(1)) - 1 });
        }
        let proven = r.u16()?;
        if proven > 1 {
            return Err(DecodeError::Value { what: "mark of a proof", found: proven.into() });
        }
        let key = r.u32()?;
        zeros(r, 4)?;
        let nonce = r.array()?;
        let proof: [u8; PROOF] = r.array()?;
        if proven == 0 && proof != [0; PROOF] {
            return Err(DecodeError::Value { what: "proof of a hello that says it has none", found: u64::from(proof[0]) });
        }
        Ok(Self { oldest, newest, cluster, node, incarnation, shard, shards, to_shard, key, nonce, proof: (proven == 1).then_some(proof) })
    }
}
