//! What a verified block holds: who wrote it, for which place, as which write, and a body that follows from those.
//!
//! A verify unit is the device's logical block (512 or 4096 bytes), because that is the most that any device must
//! write as one. Its first 32 bytes name the run, the place and the generation; every further word follows from them,
//! so a torn, misplaced or stale block can be told from the one that was asked for.
//!
//! Deliberately not here: which generation a block *should* hold (see [`crate::expect`]).

use crate::units::{BlockIndex, Generation};

/// `PNSTKBLK` in the first eight bytes of a block that this tool wrote.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PNSTKBLK");
/// Bytes of the self-description at the start of each block.
pub const HEADER_BYTES: usize = 32;

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// What a block was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// All zeroes: never written, or trimmed.
    Zero,
    /// Whole, of this run and for this place.
    Written(Generation),
    /// Whole header of this run, but it names another place.
    Misplaced { claims: BlockIndex, generation: Generation },
    /// A header of this run and place over a body that does not follow from it.
    Torn { claims: Generation, first_bad_byte: usize },
    /// Neither zero nor written by this run.
    Foreign,
}

fn key(seed: u64, block: BlockIndex, generation: Generation) -> u64 {
    let mut x = seed ^ block.0.wrapping_mul(STEP) ^ generation.0.rotate_left(32);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn word_at(key: u64, index: usize) -> u64 {
    key.wrapping_add((index as u64).wrapping_mul(STEP))
}

fn header(seed: u64, block: BlockIndex, generation: Generation) -> [u64; 4] {
    [MAGIC, seed, block.0, generation.0]
}

/// Fills one verify unit.
///
/// # Panics
/// If `unit` is shorter than [`HEADER_BYTES`] or no multiple of 8 bytes.
pub fn fill(unit: &mut [u8], seed: u64, block: BlockIndex, generation: Generation) {
    assert!(unit.len() >= HEADER_BYTES && unit.len().is_multiple_of(8));
    let (head, body) = unit.split_at_mut(HEADER_BYTES);
    for (bytes, word) in head.chunks_exact_mut(8).zip(header(seed, block, generation)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let key = key(seed, block, generation);
    for (index, bytes) in body.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word_at(key, index).to_le_bytes());
    }
}

/// Fills a buffer of a multiple of 8 bytes with words that are neither zero nor equal; for loads that verify nothing.
pub fn fill_noise(buffer: &mut [u8], salt: u64) {
    let key = key(!salt, BlockIndex(0), Generation(0));
    for (index, bytes) in buffer.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&(word_at(key, index) | 1).to_le_bytes());
    }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let at = index * 8;
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Says what one verify unit holds.
pub fn examine(unit: &[u8], seed: u64, block: BlockIndex) -> Found {
    if word(unit, 0) != MAGIC || word(unit, 1) != seed {
        return if unit.iter().all(|byte| *byte == 0) { Found::Zero } else { Found::Foreign };
    }
    let claims = BlockIndex(word(unit, 2));
    let generation = Generation(word(unit, 3));
    let key = key(seed, claims, generation);
    let body = &unit[HEADER_BYTES..];
    let bad = body.chunks_exact(8).enumerate().find(|(index, bytes)| **bytes != word_at(key, *index).to_le_bytes());
    match bad {
        Some((index, _)) => Found::Torn { claims: generation, first_bad_byte: HEADER_BYTES + index * 8 },
        None if claims != block => Found::Misplaced { claims, generation },
        None => Found::Written(generation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEED: u64 = 7;

    fn unit(block: u64, generation: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        fill(&mut bytes, SEED, BlockIndex(block), Generation(generation));
        bytes
    }

    #[test]
    fn block_read_back_names_its_generation() {
        assert_eq!(examine(&unit(3, 9), SEED, BlockIndex(3)), Found::Written(Generation(9)));
    }

    #[test]
    fn block_of_another_place_is_misplaced() {
        let found = examine(&unit(4, 9), SEED, BlockIndex(3));
        assert_eq!(found, Found::Misplaced { claims: BlockIndex(4), generation: Generation(9) });
    }

    #[test]
    fn block_of_another_run_is_foreign_and_zeroes_are_zero() {
        assert_eq!(examine(&unit(3, 9), SEED + 1, BlockIndex(3)), Found::Foreign);
        assert_eq!(examine(&[0; 512], SEED, BlockIndex(3)), Found::Zero);
        let mut nearly = [0; 512];
        nearly[511] = 1;
        assert_eq!(examine(&nearly, SEED, BlockIndex(3)), Found::Foreign);
    }

    #[test]
    fn block_torn_between_two_generations_is_torn_where_they_meet() {
        let mut bytes = unit(3, 9);
        bytes[256..].copy_from_slice(&unit(3, 8)[256..]);
        let found = examine(&bytes, SEED, BlockIndex(3));
        assert_eq!(found, Found::Torn { claims: Generation(9), first_bad_byte: 256 });
    }

    proptest! {
        #[test]
        fn any_single_flipped_bit_is_noticed(bit in 0usize..512 * 8) {
            let mut bytes = unit(3, 9);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(examine(&bytes, SEED, BlockIndex(3)), Found::Written(Generation(9)));
        }
    }
}
