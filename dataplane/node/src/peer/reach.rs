//! How lanes come to be: the port for peers, who knocks there, and whom this core dials.
//!
//! Not here: what a lane is once it stands.

use std::io::Read;
use std::net::SocketAddr;

use penstock_wire::NodeId;
use penstock_wire::peer::NONCE;
use spdk_rs::Errno;
use spdk_rs::sock::{Connection, Listener};

use super::handshake::{Handshake, Identity};
use super::lane::{self, DEPTH, Lane, LaneError, Side};
use super::{Dial, Peer, Peers, RETRY_MS, SECOND_MS, SHAKE_MS, Settings, pairs};

/// Connections of strangers at a time.
const STRANGERS_MAX: usize = 32;

fn nonce() -> std::io::Result<[u8; NONCE]> {
    let mut bytes = [0; NONCE];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The address of a peer's core.
fn port_of(address: SocketAddr, shard: u16) -> Option<SocketAddr> {
    Some(SocketAddr::new(address.ip(), address.port().checked_add(shard)?))
}

impl Peers {
    fn identity(&self) -> Identity {
        let Settings { cluster, node, incarnation, shards, .. } = self.settings;
        Identity { cluster, node, incarnation, shard: self.shard, shards, key: self.settings.key.clone() }
    }

    /// Takes who has dialled; opens the port first, if that is not done.
    pub(super) fn accept(&mut self, now: u64) {
        if self.listener.is_none() && now >= self.listen_next {
            let address = port_of(self.settings.listen, self.shard);
            match address.ok_or(Errno::INVAL).and_then(Listener::bind) {
                Ok(listener) => self.listener = Some(listener),
                Err(errno) => {
                    if self.listen_next == 0 {
                        tracing::error!(core = self.shard, listen = %self.settings.listen, %errno, "the port for peers does not open; tried again and again");
                    }
                    self.listen_next = now + SECOND_MS;
                }
            }
        }
        let Some(listener) = &self.listener else { return };
        while self.lanes.iter().filter(|lane| lane.side == Side::Answers && lane.known().is_none()).count() < STRANGERS_MAX {
            let id = self.next_id;
            match listener.accept(&self.group, DEPTH, lane::listen(&self.ear, id)) {
                Ok(Some(connection)) => {
                    let Ok(nonce) = nonce() else { return };
                    self.next_id += 1;
                    self.lanes.push(Lane::answered(id, connection, Handshake::answer(self.identity(), nonce), now));
                }
                Ok(None) => return,
                Err(errno) => return tracing::warn!(%errno, "a connection to the port for peers is not taken"),
            }
        }
    }

    /// Dials what is missing, to peers of a higher id.
    pub(super) fn dial(&mut self, now: u64) {
        let (shard, shards, me) = (self.shard, self.settings.shards, self.settings.node);
        for at in 0..self.peers.len() {
            let peer = &mut self.peers[at];
            let (node, address) = (peer.node, peer.address);
            if node < me {
                continue;
            }
            let wanted: Vec<u16> = match (peer.shards, peer.fallback) {
                (Some(theirs), _) => pairs(shard, shards, theirs).collect(),
                (None, false) => vec![shard],
                (None, true) => vec![0],
            };
            peer.dials.retain(|dial| wanted.contains(&dial.to_shard));
            for to_shard in wanted {
                if self.lanes.iter().any(|lane| lane.side == Side::Dials { node, to_shard }) || !self.peers[at].is_due(to_shard, now) {
                    continue;
                }
                if let Err(error) = self.dial_one(node, address, to_shard, now) {
                    let peer = &mut self.peers[at];
                    peer.reason = Some(error.to_string());
                    peer.put_off(to_shard, now);
                }
            }
        }
    }

    fn dial_one(&mut self, node: NodeId, address: SocketAddr, to_shard: u16, now: u64) -> Result<(), LaneError> {
        let address = port_of(address, to_shard).ok_or(LaneError::Unreachable(Errno::INVAL))?;
        let nonce = nonce().map_err(|_| LaneError::Unreachable(Errno::AGAIN))?;
        let id = self.next_id;
        self.next_id += 1;
        let connection = Connection::connect(&self.group, address, SHAKE_MS as u32, DEPTH, lane::listen(&self.ear, id));
        let connection = connection.map_err(LaneError::Unreachable)?;
        let shake = Handshake::dial(self.identity(), node, to_shard, nonce);
        self.lanes.push(Lane::dialled(id, (node, to_shard), connection, shake, now));
        Ok(())
    }
}

impl Peer {
    /// Whether it is time to dial that core of it.
    fn is_due(&mut self, to_shard: u16, now: u64) -> bool {
        match self.dials.iter().find(|dial| dial.to_shard == to_shard) {
            Some(dial) => now >= dial.next,
            None => {
                self.dials.push(Dial { to_shard, next: now, wait: RETRY_MS.0 });
                true
            }
        }
    }

    /// It was not reached: again later, and later each time.
    pub(super) fn put_off(&mut self, to_shard: u16, now: u64) {
        if let Some(dial) = self.dials.iter_mut().find(|dial| dial.to_shard == to_shard) {
            dial.next = now + dial.wait;
            dial.wait = (dial.wait * 2).min(RETRY_MS.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_of_both_nodes_has_a_lane() {
        for (ours, theirs) in [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (8, 8), (5, 3)] {
            let of = |shard| pairs(shard, ours, theirs).collect::<Vec<_>>();
            let all: Vec<(u16, u16)> = (0..ours).flat_map(|shard| of(shard).into_iter().map(move |to| (shard, to))).collect();
            assert!((0..ours).all(|shard| all.iter().any(|pair| pair.0 == shard)), "{ours} {theirs}: {all:?}");
            assert!((0..theirs).all(|shard| all.iter().any(|pair| pair.1 == shard)), "{ours} {theirs}: {all:?}");
        }
        assert_eq!(pairs(1, 4, 2).collect::<Vec<_>>(), [1]);
        assert_eq!(pairs(0, 1, 2).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn port_beyond_the_last_is_none() {
        assert_eq!(port_of("127.0.0.1:65535".parse().unwrap(), 1), None);
        assert_eq!(port_of("127.0.0.1:7700".parse().unwrap(), 2), Some("127.0.0.1:7702".parse().unwrap()));
    }
}
