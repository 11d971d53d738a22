//! What the simulated hosts write: every 512-byte sector says which write made it, for which volume and place.
//!
//! So a sector found anywhere (answered to a read, lying on a drive, about to be corrupted) tells what it is, and
//! whether it is whole. Not here: any notion of which sector *should* be found; that is `oracle`.

use crate::rng::mix;

pub const BLOCK: usize = 4096;
pub const SECTOR: usize = 512;
pub const SECTORS: usize = BLOCK / SECTOR;

const MAGIC: u64 = 0x5045_4e53_544f_434b;
/// Between the words of a row: odd, so that none comes twice.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The write that filled a sector; 0 means zeros. Never reused within a run.
pub type WriteId = u64;

/// A 4 KiB block's contents as the oracle sees them: one write per sector.
pub type Image = [WriteId; SECTORS];

pub const ZEROS: Image = [0; SECTORS];

/// Where a sector belongs. `block` is the volume's 4 KiB block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Place {
    pub volume: u32,
    pub block: u64,
}

const WORDS: usize = SECTOR / 8;

/// The words of a sector: four that name it, and a row that no other sector has a word of in the same place. A row, so that it is made and
/// compared many words at a time: half of what a simulation does is this.
fn words(id: WriteId, place: Place, sector: usize) -> [u64; WORDS] {
    let first = mix(id ^ u64::from(place.volume) << 52 ^ place.block << 20 ^ sector as u64);
    let mut words = std::array::from_fn(|i| first.wrapping_add((i as u64).wrapping_mul(STEP)));
    words[..4].copy_from_slice(&[MAGIC, id, u64::from(place.volume), place.block << 3 | sector as u64]);
    words
}

/// Writes the contents of one sector.
pub fn fill(out: &mut [u8], id: WriteId, place: Place, sector: usize) {
    assert_eq!(out.len(), SECTOR);
    if id == 0 {
        out.fill(0);
        return;
    }
    for (out, word) in out.chunks_exact_mut(8).zip(words(id, place, sector)) {
        out.copy_from_slice(&word.to_le_bytes());
    }
}

/// Reads a sector back: its write and where that write belonged. `None` where it is no whole sector of ours.
pub fn sector_of(bytes: &[u8]) -> Option<(WriteId, Option<(Place, usize)>)> {
    let at = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    if at(0) != MAGIC {
        return (bytes == [0; SECTOR]).then_some((0, None));
    }
    let (id, place, sector) = (at(1), Place { volume: at(2) as u32, block: at(3) >> 3 }, (at(3) & 7) as usize);
    let differ = words(id, place, sector).iter().enumerate().fold(0, |differ, (i, word)| differ | at(i) ^ word);
    (differ == 0).then_some((id, Some((place, sector))))
}

/// What a 4 KiB block of a drive holds, if it is a host's data and whole: the place it belongs to and its image.
pub fn block_of(bytes: &[u8]) -> Option<(Place, Image)> {
    let (mut image, mut whose) = (ZEROS, None);
    for (s, piece) in bytes.chunks_exact(SECTOR).enumerate() {
        let (id, told) = sector_of(piece)?;
        image[s] = id;
        if let Some((place, sector)) = told {
            if sector != s || whose.is_some_and(|w| w != place) {
                return None;
            }
            whose = Some(place);
        }
    }
    whose.map(|place| (place, image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_of_a_filled_block_tells_place_and_writes() {
        let place = Place { volume: 3, block: 77 };
        let mut block = vec![0u8; BLOCK];
        for s in 0..SECTORS {
            fill(&mut block[s * SECTOR..(s + 1) * SECTOR], if s == 2 { 0 } else { 40 + s as u64 }, place, s);
        }
        assert_eq!(block_of(&block), Some((place, [40, 41, 0, 43, 44, 45, 46, 47])));
    }

    #[test]
    fn block_of_a_flipped_bit_is_none() {
        let mut block = vec![0u8; BLOCK];
        for s in 0..SECTORS {
            fill(&mut block[s * SECTOR..(s + 1) * SECTOR], 9, Place { volume: 0, block: 1 }, s);
        }
        for at in [0usize, 9, 17, 25, 300, 511, 4095] {
            let mut bad = block.clone();
            bad[at] ^= 4;
            assert_eq!(block_of(&bad), None, "flip at byte {at}");
        }
    }

    #[test]
    fn block_of_zeros_belongs_to_nobody() {
        assert_eq!(block_of(&[0u8; BLOCK]), None);
    }
}
