//! Single on-disk records: as they come, and once more with magic, version and checksum set right, so that what lies behind
//! the checksum is reached. What decodes must encode to something that decodes to the same.

use crate::bytes::Choices;
use crate::damage::reseal;
use crate::sample::{self, DIRECTORY_EXTENTS, PAGE_EXTENTS};
use penstock_wire::batch::{Batch, Section, decode_section, header_blocks, logged_len};
use penstock_wire::directory::{Directory, Part, VERSION};
use penstock_wire::label::{Geometry, Label};
use penstock_wire::superblock::Superblock;
use penstock_wire::{page, *};

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
            directory(data, VERSION);
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
        entry.ops.iter().for_each(|op| section.push(op));
        if entry.again {
            section.again();
        }
    }
    assert_eq!(decode_section(section.bytes(), payload_blocks).as_ref(), Ok(&entries));
    // What a group's log may hold comes back from both of its shapes.
    for entry in &entries {
        if let Ok(logged) = entry.logged() {
            let mut section = Section::default();
            section.logged(entry.replica, &logged);
            if entry.again {
                section.again();
            }
            assert_eq!(section.bytes().len(), logged_len(&logged));
            assert_eq!(decode_section(section.bytes(), logged.payload_blocks).as_deref(), Ok(std::slice::from_ref(entry)));
        }
    }
}

fn map_page(bytes: &[u8]) {
    // The name is looked for, so the input is believed about it.
    let mut name = sample::page_name();
    if let (Some(id), Some(rest)) = (bytes.get(16..32), bytes.get(32..44)) {
        name.incarnation.0.copy_from_slice(id);
        let word = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        (name.replica, name.layer, name.page_no) = (word(0), word(4), word(8));
    }
    if let Ok(page) = page::decode(bytes, &name, PAGE_EXTENTS) {
        let mut block = vec![0; BLOCK];
        page::encode_into(&mut block, &name, 1, &page);
        assert_eq!(page::decode(&block, &name, PAGE_EXTENTS).as_ref(), Ok(&page));
    }
}

fn part(bytes: &[u8]) {
    if let Ok((part, payload)) = Part::decode(bytes) {
        let mut extent = vec![0; EXTENT];
        part.encode_into(&mut extent, payload);
        assert_eq!(Part::decode(&extent), Ok((part, payload)));
        directory(payload, part.version);
    }
}

fn directory(bytes: &[u8], version: u32) {
    if let Ok(directory) = Directory::decode(bytes, version, DIRECTORY_EXTENTS) {
        assert_eq!(Directory::decode(&directory.encode(), VERSION, DIRECTORY_EXTENTS).as_ref(), Ok(&directory));
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
    seed(0, &sample::label().encode());
    let mut block = vec![0; BLOCK];
    for superblock in [sample::first_superblock(), sample::superblock()] {
        superblock.encode_into(&mut block);
        seed(1, &block);
    }
    for batch in
        [sample::batch(), sample::group_batch(), sample::snapshot_batch(), sample::reserved_batch(), sample::seal(), sample::open()]
    {
        seed(2, &batch.encode());
    }
    seed(3, &sample::long_batch().encode());
    page::encode_into(&mut block, &sample::page_name(), 6, &sample::page());
    seed(4, &block);
    let stream = sample::layered_directory().encode();
    seed(6, &stream);
    seed(6, sample::batch().own.bytes());
    seed(6, sample::group_batch().own.bytes());
    seed(6, sample::snapshot_batch().own.bytes());
    let mut extent = vec![0; EXTENT];
    sample::part(&stream).encode_into(&mut extent, &stream);
    seed(5, &extent);
    seeds
}
