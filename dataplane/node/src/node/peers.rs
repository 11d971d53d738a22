//! Other nodes: which there are, told to every core, and how it stands with them.
//!
//! Peers are those of the config and those that control named last, which are remembered. None are reached before the node knows who it
//! is. Not here: connections ([`crate::peer`]).

use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_api::rpc::{Empty, ErrorCode, PeerAddress, PeerCounters, PeerInfo, PeersSetParams};
use penstock_api::{ByteSize, NodeId};
use penstock_wire::Incarnation;

use super::{Answer, Node, fail};
use crate::core::CoreView;
use crate::peer::Settings;

/// The incarnation of this process as peers are told it.
fn told(incarnation: u64) -> Incarnation {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&incarnation.to_le_bytes());
    Incarnation(bytes)
}

fn number(incarnation: Incarnation) -> u64 {
    u64::from_le_bytes(incarnation.0[..8].try_into().expect("8 of 16 bytes"))
}

impl Node {
    /// Everyone but this node; what the config says of a node counts more.
    fn peer_list(&self) -> BTreeMap<NodeId, PeerAddress> {
        let state = self.state.borrow();
        let all = state.get().peers.iter().chain(&self.config.peers).map(|peer| (peer.node_id, *peer));
        let mut list: BTreeMap<NodeId, PeerAddress> = all.collect();
        if let Some(me) = state.get().node_id {
            list.remove(&me);
        }
        list
    }

    /// Tells the cores who the peers are: when the node serves, is claimed, or is told of others.
    pub(super) fn spread_peers(self: &Rc<Self>) {
        let (cluster, node) = {
            let state = self.state.borrow();
            (state.get().cluster_id, state.get().node_id)
        };
        let config = &self.config;
        let (Some(cluster), Some(node), Some(listen), Some(key)) = (cluster, node, config.peer_listen, config.cluster_key.clone()) else {
            return;
        };
        let cores = self.cores.borrow().clone();
        let settings = Settings {
            cluster: penstock_wire::ClusterId(cluster.to_bytes()),
            node: penstock_wire::NodeId(node.to_bytes()),
            incarnation: told(self.incarnation),
            key,
            listen,
            shards: cores.len() as u16,
            peers: self.peer_list().values().map(|peer| (penstock_wire::NodeId(peer.node_id.to_bytes()), peer.address)).collect(),
        };
        for core in cores {
            let settings = settings.clone();
            self.ask_core(
                core.index,
                move |core, replier| replier.reply(core.set_peers(settings)),
                move |_, result: Result<(), spdk_rs::Errno>| {
                    if let Err(errno) = result {
                        tracing::error!(core = core.core, %errno, "a core cannot reach peers");
                    }
                },
            );
        }
    }

    pub(super) fn peers_set(self: &Rc<Self>, params: PeersSetParams, answer: Answer<Empty>) {
        if self.config.peer_listen.is_none() || self.config.cluster_key.is_none() {
            let hint = "start penstockd with --peer-listen and --cluster-key-file, the same key on all nodes";
            return answer(Err(fail(ErrorCode::Invalid, "this node does not listen for other nodes", hint)));
        }
        if self.state.borrow().get().node_id.is_none() {
            let message = "this node belongs to no cluster yet, so it has no peers";
            return answer(Err(fail(ErrorCode::NotReady, message, "claim it first, or add a drive")));
        }
        let mut peers = params.peers;
        peers.sort_by_key(|peer| peer.node_id);
        if let Some(pair) = peers.windows(2).find(|pair| pair[0].node_id == pair[1].node_id) {
            let message = format!("node {} is in the list twice, at {} and {}", pair[0].node_id, pair[0].address, pair[1].address);
            return answer(Err(fail(ErrorCode::Invalid, message, "name each node once")));
        }
        let kept = self.remember(|state| state.peers = peers);
        if kept.is_ok() {
            self.spread_peers();
        }
        answer(kept.map(|()| Empty {}));
    }

    /// How it stands with each peer, over all cores.
    pub(super) fn peer_infos(&self, views: &[CoreView]) -> Vec<PeerInfo> {
        let info = |peer: PeerAddress| {
            let of = penstock_wire::NodeId(peer.node_id.to_bytes());
            let seen: Vec<_> = views.iter().flat_map(|view| &view.peers).filter(|one| one.node == of).collect();
            let mut counters = PeerCounters::default();
            for one in &seen {
                let c = &one.counters;
                counters.frames_sent += c.frames_sent;
                counters.frames_received += c.frames_received;
                counters.bytes_sent += c.bytes_sent;
                counters.bytes_received += c.bytes_received;
                counters.words_dropped += c.words_dropped;
                counters.words_unplaced += c.words_unplaced;
                counters.connects += c.connects;
                counters.disconnects += c.disconnects;
            }
            let connected = seen.len() == views.len() && seen.iter().all(|one| one.up.is_some());
            let reason = seen.iter().find_map(|one| one.reason.clone());
            PeerInfo {
                node_id: peer.node_id,
                address: peer.address,
                connected,
                reason: if connected { None } else { Some(reason.unwrap_or_else(|| "this node knows no cluster yet".to_owned())) },
                incarnation: seen.iter().find_map(|one| one.up).map(number),
                connections: seen.iter().map(|one| one.connections).sum(),
                queued_bytes: ByteSize(seen.iter().map(|one| one.queued_bytes).sum()).bytes(),
                counters,
            }
        };
        self.peer_list().into_values().map(info).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnation_told_to_peers_is_the_one_that_is_shown() {
        assert_eq!(number(told(0x1f_ffff_ffff_ffff)), 0x1f_ffff_ffff_ffff);
        assert_ne!(told(1), told(2));
    }
}
