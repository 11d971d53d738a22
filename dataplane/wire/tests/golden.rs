//! Every record version that was ever released, as bytes in `golden/`: this build reads each as the values it was written
//! from, and writes the same values as the same bytes.
//!
//! Trailing zeros are left out of the files. A new version gets new files beside the old ones, which stay for good. The files
//! are made once, by `PENSTOCK_GOLDEN=write cargo test --release -p penstock-wire --test golden`; a change of an old one is a
//! change of the format, and needs a new version instead.

mod sample;

use penstock_wire::batch::{Batch, Op, decode_section};
use penstock_wire::directory::{Directory, Part};
use penstock_wire::label::Label;
use penstock_wire::superblock::Superblock;
use penstock_wire::*;
use std::path::PathBuf;

/// The file's bytes, padded to `len`; in writing mode it is made from `encoded` first.
fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("PENSTOCK_GOLDEN").is_some_and(|mode| mode == "write") {
        let used = encoded.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        std::fs::write(&path, &encoded[..used]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    older(name, encoded.len())
}

/// The bytes of a version that is read and no longer written, padded to `len`.
fn older(name: &str, len: usize) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let mut bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(bytes.len() <= len, "{name} has {} bytes, its record {len}", bytes.len());
    bytes.resize(len, 0);
    bytes
}

fn same(name: &str, stands: &[u8], encoded: &[u8]) {
    let differs = stands.iter().zip(encoded).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name}: what is written now differs from the file at that byte");
}

#[test]
fn label_v1() {
    let label = sample::label();
    let bytes = golden("label-v1.bin", &label.encode());
    assert_eq!(Label::decode(&bytes), Ok(label.clone()));
    same("label-v1.bin", &bytes, &label.encode());
}

#[test]
fn superblock_v1_with_and_without_a_checkpoint() {
    let (first, later) = (sample::first_superblock(), sample::superblock());
    // Those that were written before the log's generation was told have zero there.
    let older = Superblock { log_generation: Generation(0), ..later };
    for (name, superblock) in
        [("superblock-v1-first.bin", first), ("superblock-v1.bin", older), ("superblock-v1-log-generation.bin", later)]
    {
        let mut encoded = vec![0; BLOCK];
        superblock.encode_into(&mut encoded);
        let bytes = golden(name, &encoded);
        assert_eq!(Superblock::decode(&bytes), Ok(superblock));
        same(name, &bytes, &encoded);
    }
    assert_eq!(Superblock::first(first.incarnation, first.store), first, "what a store begins as");
}

#[test]
fn batches_v1_and_v2_of_each_kind_and_both_sizes_are_still_read() {
    for (name, batch) in [
        ("batch-v2-data.bin", sample::batch()),
        ("batch-v2-group.bin", sample::group_batch()),
        ("batch-v2-copy.bin", sample::copy_batch()),
        ("batch-v2-data-two-blocks.bin", sample::long_batch()),
        ("batch-v2-seal.bin", sample::seal()),
        ("batch-v2-open.bin", sample::open()),
        ("batch-v1-data.bin", sample::batch()),
        ("batch-v1-data-two-blocks.bin", sample::long_batch()),
        ("batch-v1-seal.bin", sample::seal()),
        ("batch-v1-open.bin", sample::open()),
    ] {
        let bytes = older(name, batch.encode().len());
        let read = Batch::decode(&bytes).unwrap();
        assert_eq!((read.header, read.own, read.prev), (batch.header, batch.own.bytes(), batch.prev.bytes()), "{name}");
        decode_section(read.own, batch.header.payload_blocks).unwrap();
    }
}

#[test]
fn batch_v3_of_each_kind_and_both_sizes() {
    for (name, batch) in [
        ("batch-v3-data.bin", sample::batch()),
        ("batch-v3-group.bin", sample::group_batch()),
        ("batch-v3-copy.bin", sample::copy_batch()),
        ("batch-v3-reserved.bin", sample::reserved_batch()),
        ("batch-v3-snapshot.bin", sample::snapshot_batch()),
        ("batch-v3-seen.bin", sample::seen_batch()),
        ("batch-v3-layered.bin", sample::layered_batch()),
        ("batch-v3-data-two-blocks.bin", sample::long_batch()),
        ("batch-v3-seal.bin", sample::seal()),
        ("batch-v3-open.bin", sample::open()),
    ] {
        let encoded = batch.encode();
        let bytes = golden(name, &encoded);
        let read = Batch::decode(&bytes).unwrap();
        assert_eq!((read.header, read.own, read.prev), (batch.header, batch.own.bytes(), batch.prev.bytes()), "{name}");
        same(name, &bytes, &encoded);
        decode_section(read.own, batch.header.payload_blocks).unwrap();
    }
    let entries = decode_section(sample::batch().own.bytes(), 3).unwrap();
    assert_eq!(entries[0].ops[1], Op::Zero { block: 7, count: 0x00a0_b0c0 });
    assert_eq!(entries[1].ops, [Op::Create(Box::new(sample::shape())), Op::Resize { blocks: 9 }, Op::Delete]);
    let entries = decode_section(sample::group_batch().own.bytes(), 3).unwrap();
    let members = Box::new(sample::peer::members());
    assert_eq!(entries[0].ops, [Op::Create(Box::new(sample::shape())), Op::Members(members.clone())]);
    assert_eq!(entries[1].ops, [Op::Ballot { term: Term(0x0102_0304_0506), vote: peer::MemberNo(0x0708_090a) }]);
    assert_eq!(entries[4].ops, [Op::Members(members)]);
    let logged: Vec<_> = entries[2..5].iter().map(|entry| entry.logged().unwrap()).collect();
    assert_eq!(logged, sample::peer::entries());
    let entries = decode_section(sample::copy_batch().own.bytes(), 2).unwrap();
    let (as_of, index, index_term, members) = (Index(0x0304), Index(0x0506), Term(0x0102), Box::new(sample::peer::members()));
    assert_eq!(entries[0].ops, [Op::Install { as_of, index, index_term, members }]);
    assert_eq!(entries[1].ops, [Op::Copy(Box::new(sample::copy()))]);
    let set: Vec<_> = sample::copy().blocks().map(|(block, _, at)| (block & 15, at)).collect();
    assert_eq!(set, [(0, 0), (1, 0), (4, 1), (15, 1)]);
    assert_eq!(entries[2].ops, [Op::Whole { blocks: 0x0708 }]);
    let entries = decode_section(sample::reserved_batch().own.bytes(), 1).unwrap();
    let reserve = Op::Reserve(Box::new(sample::reservations()));
    assert_eq!((&entries[0].ops[1], &entries[1].ops[1]), (&reserve, &reserve));
    assert_eq!(entries[1].logged().unwrap().ops(), Ok(entries[1].ops.clone()));
    let entries = decode_section(sample::snapshot_batch().own.bytes(), 1).unwrap();
    assert_eq!(entries[0].ops[1], Op::Snapshot { blocks: 0x1112, shape: Box::new(sample::snapshot(0xb0)) });
    assert_eq!(entries[1].ops, [Op::Unsnapshot(sample::snapshot(0xc0).id)]);
    let segment = SegmentId(sample::snapshot(0xd0).id.0);
    assert_eq!(entries[2].ops[1], Op::Origin { segment, snapshot: sample::snapshot(0xe0).id });
    let entries = decode_section(sample::layered_batch().own.bytes(), 2).unwrap();
    let rows: Vec<_> = sample::stack().kept.into_iter().map(|row| Op::Layer(Box::new(row))).collect();
    assert_eq!((&entries[0].ops, &entries[1].ops[2]), (&rows, &Op::Stack(sample::stack_op())));
    assert_eq!(entries[2].ops, [Op::Copy(Box::new(sample::copy_in_layer()))]);
    let entries = decode_section(sample::seen_batch().own.bytes(), 0).unwrap();
    assert_eq!(entries[1].ops, [Op::Seen(Box::new(sample::peer::seen()[1]))]);
    assert_eq!(entries[2].ops, [Op::Believed(sample::peer::past().believed.unwrap())]);
    assert_eq!(entries[3].ops, [Op::Opened { vouched: true }]);
    assert_eq!(entries[4].ops, [Op::Forced { term: Term(0x2021), members: Box::new(sample::peer::members()) }]);
    assert_eq!(entries[5].ops, [Op::Committed { index: Index(0x2223), term: Term(0x2021) }]);
}

#[test]
fn page_v1() {
    let (name, map) = (sample::page_name(), sample::page());
    let mut encoded = vec![0; BLOCK];
    page::encode_into(&mut encoded, &name, 0x0a0b, &map);
    let bytes = golden("page-v1.bin", &encoded);
    assert_eq!(page::decode(&bytes, &name, sample::PAGE_EXTENTS), Ok(map));
    same("page-v1.bin", &bytes, &encoded);
}

#[test]
fn directories_v1_and_v2_and_their_parts_are_still_read() {
    let mut directory = sample::older_directory();
    for version in [2, 1] {
        if version == 1 {
            directory.replicas.iter_mut().flat_map(|replica| &mut replica.pages).for_each(|page| page.extents = None);
        }
        let bytes = older(&format!("directory-part-v{version}.bin"), EXTENT);
        let (part, stream) = Part::decode(&bytes).unwrap();
        assert_eq!(part, Part { version, ..sample::part(stream) });
        assert_eq!(Directory::decode(stream, part.version, sample::DIRECTORY_EXTENTS).as_ref(), Ok(&directory));
    }
}

#[test]
fn directory_v3_and_its_part_are_still_read() {
    let bytes = older("directory-part-v3.bin", EXTENT);
    let (part, stream) = Part::decode(&bytes).unwrap();
    assert_eq!(part, Part { version: 3, ..sample::part(stream) });
    assert_eq!(Directory::decode(stream, 3, sample::DIRECTORY_EXTENTS), Ok(sample::directory_v3()));
}

#[test]
fn directory_v4_and_its_part() {
    let directory = sample::layered_directory();
    let stream = directory.encode();
    let part = sample::part(&stream);
    let mut encoded = vec![0; EXTENT];
    part.encode_into(&mut encoded, &stream);
    let bytes = golden("directory-part-v4.bin", &encoded);
    assert_eq!(Part::decode(&bytes), Ok((part, &stream[..])));
    assert_eq!(Directory::decode(&stream, 4, sample::DIRECTORY_EXTENTS), Ok(directory));
    same("directory-part-v4.bin", &bytes, &encoded);
}

#[test]
fn peer_frames_v1_and_v2() {
    for (name, body, _) in sample::peer::bodies() {
        let version = if name.ends_with("-v1.bin") { 1 } else { 2 };
        assert!(version >= body.kind().since(), "{name}");
        let encoded = body.encode(version, 0x0102_0304);
        let bytes = golden(name, &encoded);
        let header = peer::Header::decode(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(peer::Body::decode(&header, &bytes[peer::HEADER..]).as_ref(), Ok(&body), "{name}");
        same(name, &bytes, &encoded);
        if body.kind().since() > peer::PROTOCOL_OLDEST {
            let older = body.encode(body.kind().since() - 1, 0x0102_0304);
            assert!(matches!(peer::Header::decode(&older), Err(DecodeError::Version { .. })), "{name} in an older version");
        }
    }
}

#[test]
fn install_may_have_layers_of_markers_beyond_its_index() {
    let body = sample::peer::install_before_its_marker();
    let bytes = body.encode(peer::PROTOCOL, 1);
    let header = peer::Header::decode(&bytes).expect("a frame");
    assert_eq!(peer::Body::decode(&header, &bytes[peer::HEADER..]), Ok(body));
}

/// Version 1 laid them out and no build ever sent one.
#[test]
fn fetches_of_version_1_are_refused() {
    for name in ["peer-fetch-ask-v1.bin", "peer-fetch-answer-v1.bin", "peer-fetch-answer-none-v1.bin"] {
        let error = peer::Header::decode(&older(name, 256)).unwrap_err();
        assert!(matches!(error, DecodeError::Version { found: 1, known: 2, .. }), "{name}: {error}");
    }
}
