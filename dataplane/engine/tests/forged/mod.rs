//! Records whose checksums are right and whose contents no store ever wrote: each is refused, none is believed, nothing
//! panics. Found by the fuzz target `store` (tests/fuzz); the seeds of its like.

use crate::bench::{Bench, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::batch::{Batch, Header, Kind, Section, header_blocks};
use penstock_wire::directory::{Directory, Part};
use penstock_wire::label::Geometry;
use penstock_wire::page::{self, PageName};
use penstock_wire::superblock::Superblock;
use penstock_wire::*;

impl Bench {
    fn at(&self, block: u64) -> usize {
        (self.label.stores[0].start.0 + block) as usize * BLOCK
    }

    fn geometry(&self) -> Geometry {
        Geometry::of(&self.label.stores[0]).unwrap()
    }

    fn superblock(&self) -> Superblock {
        (0..4).filter_map(|slot| Superblock::decode(&self.media[self.at(slot)..][..BLOCK]).ok()).max_by_key(|sb| sb.write_count).unwrap()
    }

    fn put_superblock(&mut self, superblock: &Superblock) {
        for slot in Geometry::superblock_slots(superblock.write_count) {
            let at = self.at(slot.0);
            superblock.encode_into(&mut self.media[at..][..BLOCK]);
        }
    }

    fn extent(&self, extent: u32) -> usize {
        self.at(self.geometry().extents_start.0 + u64::from(extent) * EXTENT_BLOCKS)
    }

    fn slot(&self, slot: u32) -> usize {
        self.at(self.geometry().extents_start.0 + u64::from(slot))
    }

    /// Changes the directory of a store that needs one part for it, in both chains.
    fn forge_directory(&mut self, change: impl FnOnce(&mut Directory)) {
        let superblock = self.superblock();
        let (part, stream) = Part::decode(&self.media[self.extent(superblock.directory[0])..][..EXTENT]).unwrap();
        let mut directory = Directory::decode(stream, part.version, self.geometry().extents).unwrap();
        change(&mut directory);
        let stream = directory.encode();
        for chain in superblock.directory {
            let at = self.extent(chain);
            let (part, _) = Part::decode(&self.media[at..][..EXTENT]).unwrap();
            Part { len: stream.len() as u32, ..part }.encode_into(&mut self.media[at..][..EXTENT], &stream);
        }
        self.put_superblock(&Superblock { directory_len: stream.len() as u64, directory_crc: crc32c(&stream), ..superblock });
    }

    /// A store with one volume of two drained extents.
    fn drained() -> Self {
        let mut bench = Self::new();
        bench.create(1000);
        bench.write(0, &pattern(1, 32 * BLOCK));
        bench.order(Order::Drain).unwrap();
        bench
    }

    fn open_error(&self) -> Option<&OpenError> {
        self.notices.iter().find_map(|notice| match notice {
            Notice::OpenFailed(error) => Some(error),
            _ => None,
        })
    }

    /// Puts a batch of this store where the log ends.
    fn append(&mut self, change: impl FnOnce(&mut Header), own: &Section) {
        let ring = self.geometry().ring_start.0;
        let last = (0..2000)
            .filter_map(|at| {
                let bytes = &self.media[self.at(ring + at)..][..2 * BLOCK];
                Batch::decode(bytes).ok().map(|batch| (batch.header, batch.blocks()))
            })
            .max_by_key(|(header, _)| header.seq)
            .unwrap();
        let mut header = Header {
            seq: last.0.seq.next(),
            at: RingPos(last.0.at.0 + last.1),
            durable_to: last.0.seq,
            kind: Kind::Data,
            payload_blocks: 0,
            prev: None,
            ..last.0
        };
        change(&mut header);
        let at = self.at(ring + header.at.0);
        let len = header_blocks(own.bytes().len(), 0) as usize * BLOCK;
        header.encode_into(&mut self.media[at..][..len], own.bytes(), &[]);
    }
}

#[test]
fn page_of_an_old_directory_is_counted_when_it_is_loaded() {
    let mut bench = Bench::drained();
    bench.forge_directory(|directory| directory.replicas[0].pages[0].extents = None);
    bench.reopen();
    assert_eq!(bench.store.usage(ReplicaNo(0)).allocated_extents, 0, "version 1 does not say");
    bench.read(0, BLOCK as u64);
    assert_eq!(bench.store.usage(ReplicaNo(0)).allocated_extents, 2);
    bench.write(0, &pattern(2, BLOCK));
    bench.order(Order::Drain).unwrap();
    bench.reopen();
    assert_eq!(bench.store.usage(ReplicaNo(0)).allocated_extents, 2, "the next checkpoint says");
    bench.audit();
}

#[test]
fn superblock_with_a_directory_outside_the_store_is_refused() {
    let mut bench = Bench::drained();
    let superblock = bench.superblock();
    bench.put_superblock(&Superblock { directory: [0x3fff_ffff, 0x3fff_fffe], ..superblock });
    bench.reopen();
    assert!(matches!(bench.open_error(), Some(OpenError::DirectoryLost { .. })), "{:?}", bench.notices);
}

#[test]
fn superblock_of_impossible_counts_leaves_the_one_before() {
    let mut bench = Bench::drained();
    let superblock = bench.superblock();
    let at = bench.at(Geometry::superblock_slots(superblock.write_count)[0].0);
    for copy in 0..2 {
        let block = &mut bench.media[at + copy * BLOCK..][..BLOCK];
        Superblock { write_count: COUNT_LIMIT, ..superblock }.encode_into(block);
    }
    bench.reopen();
    assert_eq!(bench.store.view().stage, Stage::Serving);
    assert_eq!(bench.read(0, 32 * BLOCK as u64), pattern(1, 32 * BLOCK), "the log still holds what the checkpoint held");
}

#[test]
fn directory_that_uses_an_extent_twice_is_refused() {
    for case in 0..3 {
        let mut bench = Bench::drained();
        let chain = bench.superblock().directory[0];
        bench.forge_directory(|directory| {
            let row = &mut directory.replicas[0].pages[0];
            match case {
                0 => row.slot = chain * EXTENT_BLOCKS as u32,
                1 => directory.taken[chain as usize / 8] &= !(1 << (chain % 8)),
                _ => directory.taken.fill(0),
            }
        });
        bench.reopen();
        assert!(matches!(bench.open_error(), Some(OpenError::DirectoryLost { .. })), "case {case}: {:?}", bench.notices);
    }
}

#[test]
fn page_that_names_an_extent_twice_is_a_lost_page_and_its_volume_can_go() {
    let mut bench = Bench::drained();
    let incarnation = bench.label.incarnation;
    let name = PageName { incarnation, replica: bench.store.replica_of(SEGMENT).unwrap().0, layer: 0, page_no: 0 };
    let mut forged = None;
    let extents = bench.geometry().extents;
    let mut slot = 0;
    bench.forge_directory(|directory| slot = directory.replicas[0].pages[0].slot);
    let at = bench.slot(slot);
    let mut map = page::decode(&bench.media[at..][..BLOCK], &name, extents).unwrap();
    map.extents[1].place = map.extents[0].place;
    bench.forge_directory(|directory| {
        let mut block = vec![0; BLOCK];
        directory.replicas[0].pages[0].crc = page::encode_into(&mut block, &name, 1, &map);
        forged = Some(block);
    });
    bench.media[at..][..BLOCK].copy_from_slice(&forged.unwrap());
    bench.reopen();
    let whole = Span { offset: 0, len: BLOCK as u64 };
    assert_eq!(bench.host(HostOp::Read(whole), vec![0; BLOCK]).0, Status::Unrecovered);
    assert_eq!(bench.write(0, &pattern(9, BLOCK)), Status::Ok);
    assert_eq!(bench.read(0, BLOCK as u64), pattern(9, BLOCK));
    bench.order(Order::Delete { segment: SEGMENT }).unwrap();
    for _ in 0..20 {
        bench.tick(100);
    }
    assert_eq!(bench.store.view().stage, Stage::Serving);
}

#[test]
fn batch_of_a_replica_far_beyond_the_numbers_given_is_no_batch() {
    let mut bench = Bench::drained();
    let mut section = Section::default();
    section.entry(0xffff_fff0, Term(1), Index(1));
    section.create(&ReplicaShape {
        volume: VolumeId([8; 16]),
        segment: SegmentId([8; 16]),
        replica: ReplicaId([8; 16]),
        segment_no: 0,
        blocks: 10,
        logical_block: 4096,
        name: "far".into(),
    });
    bench.append(|_| {}, &section);
    bench.reopen();
    assert_eq!(bench.store.view().stage, Stage::Serving);
    assert!(bench.store.replica_of(SegmentId([8; 16])).is_none());
    assert_eq!(bench.read(0, BLOCK as u64), pattern(1, 32 * BLOCK)[..BLOCK]);
}

#[test]
fn batch_of_a_sequence_that_no_log_can_reach_is_no_proof_of_what_is_missing() {
    let mut bench = Bench::drained();
    let far = |header: &mut Header| {
        header.seq = Seq(1 << 60);
        header.durable_to = Seq((1 << 60) - 1);
        header.at = RingPos(header.at.0 + 3);
    };
    bench.append(far, &Section::default());
    bench.reopen();
    assert_eq!(bench.store.view().stage, Stage::Serving);
    assert_eq!(bench.store.view().recovery.lost_batches, 0);
}

#[test]
fn zeroing_terabytes_takes_what_is_there_and_spares_what_is_beyond() {
    let mut bench = Bench::new();
    bench.create(1 << 32);
    let far = (1u64 << 31) * BLOCK as u64;
    for drained in [false, true] {
        bench.write(0, &pattern(1, 2 * BLOCK));
        bench.write(far - BLOCK as u64, &pattern(2, 2 * BLOCK));
        if drained {
            bench.order(Order::Drain).unwrap();
        }
        assert_eq!(bench.host(HostOp::Zero(Span { offset: BLOCK as u64, len: far - BLOCK as u64 }), Vec::new()).0, Status::Ok);
        assert_eq!(bench.read(0, BLOCK as u64), pattern(1, 2 * BLOCK)[..BLOCK]);
        assert_eq!(bench.read(BLOCK as u64, BLOCK as u64), [0; BLOCK]);
        assert_eq!(bench.read(far - BLOCK as u64, BLOCK as u64), [0; BLOCK]);
        assert_eq!(bench.read(far, BLOCK as u64), pattern(2, 2 * BLOCK)[BLOCK..]);
    }
    bench.order(Order::Drain).unwrap();
    bench.audit();
}
