//! Single on-disk records: as they come, and once more with magic, version and checksum set right, so that what lies behind
//! the checksum is reached. What decodes must encode to something that decodes to the same.

use crate::bytes::Choices;
use crate::damage::reseal;
use penstock_wire::batch::{Batch, Header, Kind, Prev, Section, decode_section, header_blocks};
use penstock_wire::directory::{Directory, PageRow, Part, ReplicaRow};
use penstock_wire::label::{Geometry, Label};
use penstock_wire::page::{BlockState, Page, PageName};
use penstock_wire::superblock::Superblock;
use penstock_wire::{page, *};

const NAME: PageName = PageName { incarnation: Incarnation([9; 16]), replica: 1, layer: 0, page_no: 2 };
const EXTENTS: u64 = 128;

/// The input as a record of `len` bytes, with and without its prefix forged.
fn both(data: &[u8], len: usize, magic: &[u8; 8], mut decode: impl FnMut(&[u8])) {
    decode(data);
    let mut record = vec![0; len];
    let take = data.len().min(len);
    record[..take].copy_from_slice(&data[..take]);
    decode(&record);
    record[..8].copy_from_slice(magic);
    record[8..12].copy_from_slice(&1u32.to_le_bytes());
    reseal(&mut record);
    decode(&record);
}

pub fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let kind = choices.u8() % 7;
    let data = choices.rest();
    match kind {
        0 => both(data, BLOCK, b"PENSTOCK", label),
        1 => both(data, BLOCK, b"PENSSUPR", superblock),
        2 => both(data, BLOCK, b"PENSLOG1", header),
        3 => both(data, 2 * BLOCK, b"PENSLOG1", header),
        4 => both(data, BLOCK, b"PENSMAP1", map_page),
        5 => both(data, EXTENT, b"PENSDIR1", part),
        _ => {
            directory(data);
            section(data, choices.u16().into());
        }
    }
}

fn label(bytes: &[u8]) {
    let _ = Label::looks_like(bytes);
    if let Ok(label) = Label::decode(bytes) {
        for share in &label.stores {
            Geometry::of(share).expect("a decoded label's shares are sound");
        }
        assert_eq!(Label::decode(&label.encode()).as_ref(), Ok(&label));
    }
}

fn superblock(bytes: &[u8]) {
    if let Ok(superblock) = Superblock::decode(bytes) {
        let mut block = vec![0; BLOCK];
        superblock.encode_into(&mut block);
        assert_eq!(Superblock::decode(&block), Ok(superblock));
    }
}

fn header(bytes: &[u8]) {
    let _ = Batch::looks_like(bytes);
    if let Ok(batch) = Batch::decode(bytes) {
        let mut again = vec![0; header_blocks(batch.own.len(), batch.prev.len()) as usize * BLOCK];
        batch.header.encode_into(&mut again, batch.own, batch.prev);
        let second = Batch::decode(&again).expect("what was encoded decodes");
        assert_eq!((second.header, second.own, second.prev), (batch.header, batch.own, batch.prev));
        section(batch.own, batch.header.payload_blocks);
        section(batch.prev, batch.header.prev.map_or(0, |prev| prev.payload_blocks));
    }
}

fn section(bytes: &[u8], payload_blocks: u32) {
    let Ok(entries) = decode_section(bytes, payload_blocks) else { return };
    let mut section = Section::default();
    for entry in &entries {
        section.entry(entry.replica, entry.term, entry.index);
        for op in &entry.ops {
            match op {
                batch::Op::Write { block, crcs } => section.write(*block, crcs),
                batch::Op::Zero { block, count } => section.zero(*block, *count),
                batch::Op::Create(shape) => section.create(shape),
                batch::Op::Delete => section.delete(),
                batch::Op::Resize { blocks } => section.resize(*blocks),
            }
        }
    }
    assert_eq!(decode_section(section.bytes(), payload_blocks), Ok(entries));
}

fn map_page(bytes: &[u8]) {
    // The name is looked for, so the input is believed about it.
    let mut name = NAME;
    if let (Some(id), Some(rest)) = (bytes.get(16..32), bytes.get(32..44)) {
        name.incarnation.0.copy_from_slice(id);
        let word = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        (name.replica, name.layer, name.page_no) = (word(0), word(4), word(8));
    }
    if let Ok(page) = page::decode(bytes, &name, EXTENTS) {
        let mut block = vec![0; BLOCK];
        page::encode_into(&mut block, &name, 1, &page);
        assert_eq!(page::decode(&block, &name, EXTENTS).as_ref(), Ok(&page));
    }
}

fn part(bytes: &[u8]) {
    if let Ok((part, payload)) = Part::decode(bytes) {
        let mut extent = vec![0; EXTENT];
        part.encode_into(&mut extent, payload);
        assert_eq!(Part::decode(&extent), Ok((part, payload)));
        directory(payload);
    }
}

fn directory(bytes: &[u8]) {
    if let Ok(directory) = Directory::decode(bytes, EXTENTS) {
        assert_eq!(Directory::decode(&directory.encode(), EXTENTS).as_ref(), Ok(&directory));
    }
}

/// One valid record of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let mut seed = |kind: u8, record: &[u8]| {
        // Trailing zeros say nothing: padding puts them back.
        let used = record.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        seeds.push([&[kind], &record[..used]].concat());
    };
    let label = Label::plan(ClusterId([1; 16]), NodeId([2; 16]), DriveId([3; 16]), Incarnation([9; 16]), 40_000, 2, 4096)
        .expect("the drive is large enough");
    seed(0, &label.encode());
    let mut block = vec![0; BLOCK];
    superblock_sample().encode_into(&mut block);
    seed(1, &block);
    let shape = ReplicaShape {
        volume: VolumeId([1; 16]),
        segment: SegmentId([2; 16]),
        replica: ReplicaId([3; 16]),
        segment_no: 0,
        blocks: 2560,
        logical_block: 512,
        name: "db-1".into(),
    };
    let mut own = Section::default();
    own.entry(4, Term(1), Index(10));
    own.write(100, &[1, 2, 3]);
    own.zero(7, 9000);
    own.entry(5, Term(1), Index(1));
    own.create(&shape);
    own.resize(9);
    own.delete();
    let mut prev = Section::default();
    prev.entry(4, Term(1), Index(9));
    prev.write(0, &[9]);
    for (kind, code) in [(Kind::Data, 2), (Kind::Seal, 2), (Kind::Open, 3)] {
        let header = Header {
            incarnation: Incarnation([9; 16]),
            store: 0,
            kind,
            seq: Seq(12),
            generation: Generation(2),
            durable_to: Seq(10),
            at: RingPos(555),
            payload_blocks: 3,
            prev: Some(Prev { seq: Seq(11), at: RingPos(553), header_blocks: 1, payload_blocks: 1 }),
        };
        let mut bytes = vec![0; header_blocks(own.bytes().len(), prev.bytes().len()) as usize * BLOCK];
        header.encode_into(&mut bytes, own.bytes(), prev.bytes());
        seed(code, &bytes);
    }
    let mut map = Page::empty();
    map.extents[0].place = 4;
    map.extents[0].set(3, BlockState::Data, 0x1234);
    map.extents[47].set(0, BlockState::Lost, 0);
    page::encode_into(&mut block, &NAME, 6, &map);
    seed(4, &block);
    let row =
        |no, pages| ReplicaRow { no, deleting: no == 1, term: Term(1), voted_for: [0; 16], applied: Index(5), shape: shape.clone(), pages };
    let directory = Directory {
        next_replica: 5,
        replicas: vec![row(1, vec![]), row(3, vec![PageRow { page_no: 0, slot: 17, crc: 1 }, PageRow { page_no: 9, slot: 18, crc: 2 }])],
        taken: vec![0b10; EXTENTS as usize / 8],
    };
    let stream = directory.encode();
    seed(6, &stream);
    seed(6, own.bytes());
    let part = Part { incarnation: Incarnation([9; 16]), store: 0, checkpoint: 3, part: 0, next: 44, twin: 9, len: stream.len() as u32 };
    let mut extent = vec![0; EXTENT];
    part.encode_into(&mut extent, &stream);
    seed(5, &extent);
    seeds
}

fn superblock_sample() -> Superblock {
    Superblock {
        incarnation: Incarnation([9; 16]),
        store: 1,
        write_count: 9,
        generation: Generation(3),
        log_seq: Seq(77),
        log_at: RingPos(12345),
        checkpoint: 4,
        directory: [18, 19],
        directory_parts: 2,
        directory_len: 70_000,
        directory_crc: 0xdead_beef,
    }
}
