//! A word that came in on one core for a store of another: carried over with a copy of its payload, and bounded over all cores.
//!
//! Seldom where nodes have as many cores as their peers; then a connection ends where the store lives. Not here: how it gets there.

use std::sync::atomic::{AtomicUsize, Ordering};

use penstock_engine::PeerWord;
use penstock_wire::NodeId;

/// Bytes that may be between cores; more is dropped, as a network may.
const BYTES_MAX: usize = 64 << 20;
/// What a word counts for without its payload.
const WORD: usize = 1024;

static BETWEEN_CORES: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
pub struct StrayWord {
    pub from: NodeId,
    pub word: PeerWord,
    pub payload: Option<Vec<u8>>,
    weight: usize,
}

impl StrayWord {
    /// `None`: too much is between cores already.
    pub fn new(from: NodeId, word: PeerWord, payload: Option<&[u8]>) -> Option<Self> {
        let weight = WORD + payload.map_or(0, <[u8]>::len);
        if BETWEEN_CORES.fetch_add(weight, Ordering::Relaxed) + weight > BYTES_MAX {
            BETWEEN_CORES.fetch_sub(weight, Ordering::Relaxed);
            return None;
        }
        Some(Self { from, word, payload: payload.map(<[u8]>::to_vec), weight })
    }
}

impl Drop for StrayWord {
    fn drop(&mut self) {
        BETWEEN_CORES.fetch_sub(self.weight, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_between_cores_are_bounded_and_their_room_comes_back() {
        let payload = vec![0; 1 << 20];
        let word = || StrayWord::new(NodeId([1; 16]), PeerWord::Group(crate::peer::tests::message(1)), Some(&payload));
        let all: Vec<StrayWord> = std::iter::from_fn(word).collect();
        assert_eq!(all.len(), 63);
        drop(all);
        assert!(word().is_some());
    }
}
