//! A drive's image looked at, and damaged, from outside: what a failing medium would do. Not here: what blocks mean beyond
//! the label, which `penstock-wire` reads.

use super::{Result, failed};
use penstock_wire::BLOCK;
use penstock_wire::label::{Geometry, Label};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A drive's image file.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        Ok(Image { path: path.to_owned(), file: file.map_err(|e| failed(path.display().to_string(), e.to_string()))? })
    }

    fn wrong(&self, e: impl ToString) -> super::GuestError {
        failed(self.path.display().to_string(), e.to_string())
    }

    pub fn label(&self) -> Result<Label> {
        Label::decode(&self.read(0, BLOCK)?).map_err(|e| self.wrong(e))
    }

    pub fn size(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|e| self.wrong(e))?.len())
    }

    pub fn read(&self, at: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at).map_err(|e| self.wrong(e))?;
        Ok(bytes)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).and_then(|()| self.file.sync_data()).map_err(|e| self.wrong(e))
    }

    /// Turns one bit round.
    pub fn flip_bit(&self, at: u64, bit: u8) -> Result<()> {
        let old = self.read(at, 1)?;
        self.write(at, &[old[0] ^ 1 << bit])
    }

    /// Turns one bit round in each of `count` blocks of a range, of those that hold anything and are `meant`; answers in how many, as it gives up where
    /// there are few.
    pub fn rot(&self, range: &Range<u64>, count: u64, mut roll: impl FnMut() -> u64, meant: impl Fn(&[u8]) -> bool) -> Result<u64> {
        let blocks = (range.end - range.start) / BLOCK as u64;
        let mut done = 0;
        for _ in 0..count * 1000 {
            let at = range.start + roll() % blocks * BLOCK as u64;
            let block = self.read(at, BLOCK)?;
            if block.iter().any(|byte| *byte != 0) && meant(&block) {
                self.flip_bit(at + roll() % BLOCK as u64, (roll() % 8) as u8)?;
                done += 1;
            }
            if done == count {
                break;
            }
        }
        Ok(done)
    }

    /// Byte ranges of superblocks, oplog and extents of each store.
    pub fn zones(&self) -> Result<Vec<Zones>> {
        let label = self.label()?;
        let bytes = |blocks: u64| blocks * BLOCK as u64;
        let zones = label.stores.iter().map(|share| {
            let geometry = Geometry::of(share).map_err(|e| self.wrong(e))?;
            let base = bytes(share.start.0);
            let ring = base + bytes(geometry.ring_start.0);
            let extents = base + bytes(geometry.extents_start.0);
            Ok(Zones {
                superblocks: base..base + bytes(u64::from(Geometry::SUPERBLOCK_BLOCKS)),
                oplog: ring..ring + bytes(geometry.ring_blocks),
                extents: extents..base + bytes(share.blocks),
            })
        });
        zones.collect()
    }

    /// Places in `range` where `wanted` stands at the start of a sector.
    pub fn find(&self, range: &Range<u64>, wanted: &[u8]) -> Result<Vec<u64>> {
        const PIECE: u64 = 1 << 20;
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(PIECE);
            let bytes = self.read(at, length as usize)?;
            let sectors = bytes.chunks(512).zip((at..).step_by(512));
            found.extend(sectors.filter(|(sector, _)| sector.starts_with(wanted)).map(|(_, place)| place));
            at += length;
        }
        Ok(found)
    }
}

/// Where things lie on a drive, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zones {
    pub superblocks: Range<u64>,
    pub oplog: Range<u64>,
    pub extents: Range<u64>,
}
