//! Payload bytes of the commands that hosts send, and the images in them.
//!
//! Not here: which commands are sent (`hosts`).

use penstock_engine::Span;

use crate::oracle::{Pieces, pieces_of};
use crate::stamp::{Place, SECTOR, SECTORS, WriteId, fill};

/// Bytes of pieces, sector by sector.
pub fn bytes_of(volume: u32, pieces: &Pieces) -> Vec<u8> {
    let sectors: u32 = pieces.iter().map(|(_, p)| p.mask.count_ones()).sum();
    let mut bytes = vec![0; sectors as usize * SECTOR];
    let mut at = bytes.chunks_exact_mut(SECTOR);
    for (block, patch) in pieces {
        for s in (0..SECTORS).filter(|s| patch.mask & 1 << s != 0) {
            fill(at.next().expect("counted"), patch.image[s], Place { volume, block: *block }, s);
        }
    }
    bytes
}

pub fn payload_of(volume: u32, span: Span, id: WriteId) -> Vec<u8> {
    bytes_of(volume, &pieces_of(span, id))
}
