//! A store's superblock: where its newest checkpoint lies and from where the log counts. Two slots, written in turn, each doubled.

use crate::codec::{PREFIX, Put, Take, seal, unseal};
use crate::{BLOCK, DecodeError, Generation, Incarnation, RingPos, Seq};

const MAGIC: &[u8; 8] = b"PENSSUPR";
const VERSION: u32 = 1;
const WHAT: &str = "superblock";

/// No extent: a store that has not checkpointed yet.
pub const NO_EXTENT: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub incarnation: Incarnation,
    /// Which store of the drive.
    pub store: u32,
    /// Grows with each write of a superblock; the slot is its remainder by two.
    pub write_count: u64,
    /// Highest generation of the stream at that time; the stream itself may hold a higher one.
    pub generation: Generation,
    /// First batch that the checkpoint does not cover, and where it is or will be.
    pub log_seq: Seq,
    pub log_at: RingPos,
    /// None of those that count is of an older generation: what recovery dropped once may stand where the log begins.
    pub log_generation: Generation,
    /// Counts checkpoints; 0 with [`NO_EXTENT`] for none.
    pub checkpoint: u64,
    /// First extents of the directory's chain and of its copy.
    pub directory: [u32; 2],
    /// Extents in each chain.
    pub directory_parts: u32,
    /// Bytes of the directory and their CRC-32C over all parts.
    pub directory_len: u64,
    pub directory_crc: u32,
}

impl Superblock {
    /// What a blank store begins with.
    #[must_use]
    pub fn first(incarnation: Incarnation, store: u32) -> Self {
        Self {
            incarnation,
            store,
            write_count: 1,
            generation: Generation(0),
            log_seq: Seq(1),
            log_at: RingPos(0),
            log_generation: Generation(0),
            checkpoint: 0,
            directory: [NO_EXTENT; 2],
            directory_parts: 0,
            directory_len: 0,
            directory_crc: 0,
        }
    }

    /// One block.
    pub fn encode_into(&self, block: &mut [u8]) {
        assert_eq!(block.len(), BLOCK);
        block.fill(0);
        let mut w = Put::new(block, PREFIX);
        w.bytes(&self.incarnation.0);
        w.u32(self.store);
        w.u32(self.directory[0]);
        w.u32(self.directory[1]);
        w.u32(0);
        w.u64(self.write_count);
        w.u64(self.generation.0);
        w.u64(self.log_seq.0);
        w.u64(self.log_at.0);
        w.u64(self.checkpoint);
        w.u64(self.directory_len);
        w.u32(self.directory_parts);
        w.u32(self.directory_crc);
        w.u64(self.log_generation.0);
        seal(block, MAGIC, VERSION);
    }

    /// # Errors
    /// When `block` is not a whole superblock that this build reads.
    pub fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        unseal(block, WHAT, MAGIC, VERSION)?;
        let mut r = Take::new(block, PREFIX, WHAT);
        let incarnation = Incarnation(r.id()?);
        let store = r.u32()?;
        let directory = [r.u32()?, r.u32()?];
        r.u32()?;
        let write_count = r.count("write count of the superblock")?;
        let generation = Generation(r.count("generation of the superblock")?);
        let log_seq = Seq(r.count("log sequence of the superblock")?);
        let log_at = RingPos(r.count("log position of the superblock")?);
        let checkpoint = r.count("checkpoint of the superblock")?;
        let directory_len = r.u64()?;
        let directory_parts = r.u32()?;
        let directory_crc = r.u32()?;
        let log_generation = Generation(r.u64()?);
        if log_generation > generation {
            return Err(DecodeError::Limit { what: "generation of the superblock's log", found: log_generation.0, limit: generation.0 });
        }
        if log_seq.0 == 0 {
            return Err(DecodeError::Value { what: "log sequence of the superblock", found: 0 });
        }
        if (checkpoint == 0) != (directory_parts == 0) {
            return Err(DecodeError::Value { what: "parts of the superblock's directory", found: u64::from(directory_parts) });
        }
        if (checkpoint == 0) != (directory == [NO_EXTENT; 2]) {
            return Err(DecodeError::Value { what: "directory of the superblock", found: u64::from(directory[0]) });
        }
        Ok(Self {
            incarnation,
            store,
            write_count,
            generation,
            log_seq,
            log_at,
            log_generation,
            checkpoint,
            directory,
            directory_parts,
            directory_len,
            directory_crc,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::superblock;
    use proptest::prelude::*;

    #[test]
    fn superblock_round_trips() {
        let mut block = vec![0xff; BLOCK];
        superblock().encode_into(&mut block);
        assert_eq!(Superblock::decode(&block).unwrap(), superblock());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_seen(bit in 0..BLOCK * 8) {
            let mut block = vec![0; BLOCK];
            superblock().encode_into(&mut block);
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Superblock::decode(&block).is_err());
        }

        #[test]
        fn any_sealed_bytes_decode_or_fail_cleanly(mut block in proptest::collection::vec(any::<u8>(), BLOCK)) {
            seal(&mut block, MAGIC, VERSION);
            let _ = Superblock::decode(&block);
        }
    }
}
