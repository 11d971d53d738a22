//! Every record version that was ever released, as bytes in `golden/`: this build reads each as the values it was written
//! from, and writes the same values as the same bytes.
//!
//! Trailing zeros are left out of the files. A new version gets new files beside the old ones, which stay for good. The files
//! are made once, by `PENSTOCK_GOLDEN=write cargo test --release -p penstock-wire --test golden`; a change of an old one is a
//! change of the format, and needs a new version instead.

use penstock_wire::batch::{Batch, Header, Kind, Op, Prev, Section, decode_section, header_blocks};
use penstock_wire::directory::{Directory, PageRow, Part, ReplicaRow};
use penstock_wire::label::{Label, Share};
use penstock_wire::page::{self, BlockState, Page, PageName};
use penstock_wire::superblock::{NO_EXTENT, Superblock};
use penstock_wire::*;
use std::path::PathBuf;

/// Ids whose bytes all differ, so that a swapped or shifted field shows.
fn id(first: u8) -> [u8; 16] {
    std::array::from_fn(|i| first + i as u8)
}

/// The file's bytes, padded to `len`; in writing mode it is made from `encoded` first.
fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("PENSTOCK_GOLDEN").is_some_and(|mode| mode == "write") {
        let used = encoded.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        std::fs::write(&path, &encoded[..used]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let mut bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(bytes.len() <= encoded.len(), "{name} has {} bytes, its record {}", bytes.len(), encoded.len());
    bytes.resize(encoded.len(), 0);
    bytes
}

fn same(name: &str, stands: &[u8], encoded: &[u8]) {
    let differs = stands.iter().zip(encoded).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name}: what is written now differs from the file at that byte");
}

#[test]
fn label_v1() {
    let label = Label {
        cluster: ClusterId(id(0x10)),
        node: NodeId(id(0x30)),
        drive: DriveId(id(0x50)),
        incarnation: Incarnation(id(0x70)),
        drive_blocks: 100_000,
        stores: vec![
            Share { start: BlockAddr(1), blocks: 49_999, ring_blocks: 8192 },
            Share { start: BlockAddr(50_000), blocks: 49_998, ring_blocks: 4096 },
        ],
    };
    let bytes = golden("label-v1.bin", &label.encode());
    assert_eq!(Label::decode(&bytes), Ok(label.clone()));
    same("label-v1.bin", &bytes, &label.encode());
}

#[test]
fn superblock_v1_with_and_without_a_checkpoint() {
    let first = Superblock {
        incarnation: Incarnation(id(0x70)),
        store: 0,
        write_count: 1,
        generation: Generation(0),
        log_seq: Seq(1),
        log_at: RingPos(0),
        checkpoint: 0,
        directory: [NO_EXTENT; 2],
        directory_parts: 0,
        directory_len: 0,
        directory_crc: 0,
    };
    let later = Superblock {
        store: 1,
        write_count: 0x0102_0304_0506,
        generation: Generation(0x0203_0405),
        log_seq: Seq(0x0304_0506_0708),
        log_at: RingPos(0x0405_0607_0809),
        checkpoint: 0x0506_0708,
        directory: [0x0607_0809, 0x0708_090a],
        directory_parts: 2,
        directory_len: 70_000,
        directory_crc: 0xdead_beef,
        ..first
    };
    for (name, superblock) in [("superblock-v1-first.bin", first), ("superblock-v1.bin", later)] {
        let mut encoded = vec![0; BLOCK];
        superblock.encode_into(&mut encoded);
        let bytes = golden(name, &encoded);
        assert_eq!(Superblock::decode(&bytes), Ok(superblock));
        same(name, &bytes, &encoded);
    }
}

fn shape() -> ReplicaShape {
    ReplicaShape {
        volume: VolumeId(id(0x80)),
        segment: SegmentId(id(0x90)),
        replica: ReplicaId(id(0xa0)),
        segment_no: 0,
        blocks: 0x0001_0203,
        logical_block: 512,
        name: "größe-1".into(),
    }
}

#[test]
fn batch_v1_of_each_kind_and_both_sizes() {
    let mut own = Section::default();
    own.entry(4, Term(1), Index(10));
    own.write(0x0102_0304, &[0x1111_1111, 0x2222_2222, 0x3333_3333]);
    own.zero(7, 0x00a0_b0c0);
    own.entry(5, Term(1), Index(1));
    own.create(&shape());
    own.resize(9);
    own.delete();
    let mut prev = Section::default();
    prev.entry(4, Term(1), Index(9));
    prev.write(0, &[0x4444_4444]);
    let mut long = Section::default();
    long.entry(6, Term(1), Index(77));
    for chunk in 0..4 {
        long.write(chunk * 1000, &(0..64).map(|i| 0x5500_0000 + chunk as u32 * 64 + i).collect::<Vec<_>>());
    }
    for op in 0..220 {
        long.zero(op * 100, 50);
    }
    let mut long_before = Section::default();
    long_before.entry(6, Term(1), Index(76));
    for op in 0..30 {
        long_before.zero(op * 100, 51);
    }
    let header = |kind, payload_blocks, prev| Header {
        incarnation: Incarnation(id(0x70)),
        store: 1,
        kind,
        seq: Seq(0x0a0b_0c0d),
        generation: Generation(3),
        durable_to: Seq(0x0a0b_0c0b),
        at: RingPos(0x0102_0304_0506),
        payload_blocks,
        prev,
    };
    let before = Some(Prev { seq: Seq(0x0a0b_0c0c), at: RingPos(0x0102_0304_0502), header_blocks: 1, payload_blocks: 1 });
    let empty = Section::default();
    for (name, header, own, prev) in [
        ("batch-v1-data.bin", header(Kind::Data, 3, before), &own, &prev),
        ("batch-v1-data-two-blocks.bin", header(Kind::Data, 256, before), &long, &long_before),
        ("batch-v1-seal.bin", header(Kind::Seal, 0, before), &empty, &prev),
        ("batch-v1-open.bin", header(Kind::Open, 0, None), &empty, &empty),
    ] {
        let mut encoded = vec![0; header_blocks(own.bytes().len(), prev.bytes().len()) as usize * BLOCK];
        header.encode_into(&mut encoded, own.bytes(), prev.bytes());
        let bytes = golden(name, &encoded);
        let batch = Batch::decode(&bytes).unwrap();
        assert_eq!((batch.header, batch.own, batch.prev), (header, own.bytes(), prev.bytes()), "{name}");
        same(name, &bytes, &encoded);
        decode_section(batch.own, header.payload_blocks).unwrap();
    }
    let entries = decode_section(own.bytes(), 3).unwrap();
    assert_eq!(entries[0].ops[1], Op::Zero { block: 7, count: 0x00a0_b0c0 });
    assert_eq!(entries[1].ops, [Op::Create(Box::new(shape())), Op::Resize { blocks: 9 }, Op::Delete]);
}

#[test]
fn page_v1() {
    let name = PageName { incarnation: Incarnation(id(0x70)), replica: 0x0102, layer: 0, page_no: 0x0304 };
    let mut map = Page::empty();
    map.extents[0].place = 4;
    map.extents[0].changed = 0x0908_0706_0504;
    map.extents[0].set(0, BlockState::Zero, 0);
    map.extents[0].set(3, BlockState::Data, 0x1234_5678);
    map.extents[0].set(15, BlockState::Lost, 0);
    map.extents[47].place = 127;
    map.extents[47].set(15, BlockState::Data, 0x8765_4321);
    let mut encoded = vec![0; BLOCK];
    page::encode_into(&mut encoded, &name, 0x0a0b, &map);
    let bytes = golden("page-v1.bin", &encoded);
    assert_eq!(page::decode(&bytes, &name, 128), Ok(map));
    same("page-v1.bin", &bytes, &encoded);
}

#[test]
fn directory_v1_and_its_part() {
    let row =
        |no, deleting, pages| ReplicaRow { no, deleting, term: Term(1), voted_for: [0; 16], applied: Index(0x0506), shape: shape(), pages };
    let directory = Directory {
        next_replica: 9,
        replicas: vec![
            row(1, true, vec![]),
            row(3, false, vec![PageRow { page_no: 0, slot: 17, crc: 0x1111_0000 }, PageRow { page_no: 9, slot: 18, crc: 0x2222_0000 }]),
        ],
        taken: vec![0b10, 0, 0xff, 0, 0x80],
    };
    let stream = directory.encode();
    let part = Part {
        incarnation: Incarnation(id(0x70)),
        store: 1,
        checkpoint: 0x0a0b,
        part: 1,
        next: NO_EXTENT,
        twin: 9,
        len: stream.len() as u32,
    };
    let mut encoded = vec![0; EXTENT];
    part.encode_into(&mut encoded, &stream);
    let bytes = golden("directory-part-v1.bin", &encoded);
    assert_eq!(Part::decode(&bytes), Ok((part, &stream[..])));
    assert_eq!(Directory::decode(&stream, 40), Ok(directory));
    same("directory-part-v1.bin", &bytes, &encoded);
}
