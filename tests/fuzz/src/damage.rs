//! Damage to a store's media: rot, tears and misplaced blocks as drives do them, and forgeries with every checksum in order,
//! as nobody but a bug or an attacker makes them.

use crate::bytes::Choices;
use crate::image::{Image, chain, superblock};
use crate::machine::{GEOMETRY, Media};
use penstock_wire::batch::HEADER_BLOCKS_MAX;
use penstock_wire::directory::{Directory, PART_PAYLOAD, Part, VERSION};
use penstock_wire::superblock::Superblock;
use penstock_wire::*;

/// Pieces of damage to one store at most.
const DAMAGES_MAX: usize = 12;
/// Offsets of a header's fields and their widths.
const HEADER_FIELDS: [(usize, usize); 16] = [
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (64, 1),
    (65, 1),
    (66, 2),
    (68, 2),
    (70, 2),
    (72, 4),
    (76, 2),
    (78, 2),
    (80, 8),
    (88, 8),
    (128, 4),
    (132, 2),
];
/// The same of a superblock.
const SUPERBLOCK_FIELDS: [(usize, usize); 11] =
    [(32, 4), (36, 4), (40, 4), (48, 8), (56, 8), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4)];

/// Sets the record's checksum right, whatever it says.
pub fn reseal(record: &mut [u8]) {
    record[12..16].fill(0);
    let crc = crc32c(record);
    record[12..16].copy_from_slice(&crc.to_le_bytes());
}

fn get(bytes: &[u8], at: usize, width: usize) -> u64 {
    let mut value = [0; 8];
    value[..width].copy_from_slice(&bytes[at..at + width]);
    u64::from_le_bytes(value)
}

fn set(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

fn edit(bytes: &mut [u8], choices: &mut Choices<'_>) {
    let width = [1, 2, 4, 8][choices.pick(4)];
    let at = choices.u32() as usize % (bytes.len() - width + 1);
    let value = choices.value(get(bytes, at, width));
    set(bytes, at, width, value);
}

/// Damages `media` as the choices say. True when some record was forged: then what the store holds is anybody's guess,
/// and only that it neither panics nor hangs is left to ask.
pub fn apply(media: &mut Media, image: &Image, choices: &mut Choices<'_>) -> bool {
    let mut forged = false;
    for _ in 0..DAMAGES_MAX {
        if choices.is_over() {
            break;
        }
        let kind = choices.u8() % 12;
        let place = image.places[choices.pick(image.places.len())];
        match kind {
            0 => edit(&mut media.block_mut(place)[..], choices),
            1 => {
                let to = image.places[choices.pick(image.places.len())];
                let block = media.read(place);
                *media.block_mut(to) = block;
            }
            2 => media.block_mut(place).fill(0),
            3 => {
                let sectors = choices.pick(8);
                media.block_mut(place)[sectors * 512..].fill(0);
            }
            4 => {
                media.unreadable.insert(place);
            }
            5 => {
                edit(&mut media.block_mut(place)[..], choices);
                reseal_at(media, place);
                forged = true;
            }
            6 | 7 => {
                let Some(place) = image.headers.get(choices.pick(image.headers.len())).copied() else { continue };
                let (at, width) = HEADER_FIELDS[choices.pick(HEADER_FIELDS.len())];
                forge_field(media, place, at, width, choices);
                forged = true;
            }
            8 => {
                let (at, width) = SUPERBLOCK_FIELDS[choices.pick(SUPERBLOCK_FIELDS.len())];
                let first = image.superblock.write_count % 2 * 2;
                let mut block = media.read(first);
                let value = choices.value(get(&block, at, width));
                set(&mut block, at, width, value);
                reseal(&mut block);
                for copy in 0..2 {
                    *media.block_mut(first + copy) = block;
                }
                forged = true;
            }
            9 | 10 => forged |= forge_directory(media, choices),
            _ => forged |= forge_page(media, choices),
        }
    }
    forged
}

/// Seals whatever record begins at the block.
fn reseal_at(media: &mut Media, place: u64) {
    let block = media.read(place);
    let blocks = match &block[..8] {
        b"PENSLOG1" => u64::from(block[65]).clamp(1, u64::from(HEADER_BLOCKS_MAX)),
        b"PENSDIR1" => EXTENT_BLOCKS,
        _ => 1,
    };
    let mut record = media.read_many(place, blocks);
    reseal(&mut record);
    media.write_many(place, &record);
}

fn forge_field(media: &mut Media, place: u64, at: usize, width: usize, choices: &mut Choices<'_>) {
    let block = media.block_mut(place);
    let value = choices.value(get(&block[..], at, width));
    set(&mut block[..], at, width, value);
    reseal_at(media, place);
}

/// Writes a directory's stream into both chains, which must have room for it, and has the superblocks agree.
fn store_stream(media: &mut Media, superblock: &Superblock, stream: &[u8]) {
    for copy in 0..2 {
        let Some((places, _)) = chain(media, superblock, copy) else { continue };
        for (no, place) in places.iter().enumerate() {
            let mut bytes = media.read_many(*place, EXTENT_BLOCKS);
            let Ok((part, _)) = Part::decode(&bytes) else { return };
            let from = (no * PART_PAYLOAD).min(stream.len());
            let payload = &stream[from..(from + PART_PAYLOAD).min(stream.len())];
            Part { len: payload.len() as u32, ..part }.encode_into(&mut bytes, payload);
            media.write_many(*place, &bytes);
        }
    }
    let forged = Superblock { directory_len: stream.len() as u64, directory_crc: crc32c(stream), ..*superblock };
    for slot in penstock_wire::label::Geometry::superblock_slots(forged.write_count) {
        forged.encode_into(&mut media.block_mut(slot.0)[..]);
    }
}

fn forge_directory(media: &mut Media, choices: &mut Choices<'_>) -> bool {
    let Some(superblock) = superblock(media) else { return false };
    if superblock.checkpoint == 0 {
        return false;
    }
    let Some((_, mut stream)) = chain(media, &superblock, 0) else { return false };
    if stream.len() < 8 {
        return false;
    }
    match choices.u8() % 4 {
        // Fields by meaning, where the stream still has one.
        0 | 1 => {
            let Ok(mut directory) = Directory::decode(&stream, VERSION, GEOMETRY.extents) else { return false };
            forge_row(&mut directory, choices);
            let room = stream.len().next_multiple_of(PART_PAYLOAD);
            stream = directory.encode();
            if stream.len() > room {
                return false;
            }
        }
        _ => edit(&mut stream, choices),
    }
    store_stream(media, &superblock, &stream);
    true
}

fn forge_row(directory: &mut Directory, choices: &mut Choices<'_>) {
    let bit = choices.pick(GEOMETRY.extents as usize);
    match choices.u8() % 4 {
        0 => directory.taken[bit / 8] ^= 1 << (bit % 8),
        1 => directory.next_replica = choices.value(u64::from(directory.next_replica)) as u32,
        _ => {
            let count = directory.replicas.len();
            if count == 0 {
                return;
            }
            let replica = &mut directory.replicas[choices.pick(count)];
            match choices.u8() % 6 {
                0 => replica.deleting ^= true,
                1 => replica.term = Term(choices.value(replica.term.0)),
                2 => replica.applied = Index(choices.value(replica.applied.0)),
                3 => replica.shape.blocks = choices.value(replica.shape.blocks),
                4 if !replica.pages.is_empty() => {
                    let at = choices.pick(replica.pages.len());
                    let row = &mut replica.pages[at];
                    row.slot = choices.value(u64::from(row.slot)) as u32;
                }
                _ if !replica.pages.is_empty() => {
                    let at = choices.pick(replica.pages.len());
                    let row = &mut replica.pages[at];
                    row.page_no = choices.value(u64::from(row.page_no)) as u32;
                }
                _ => {}
            }
        }
    }
}

fn forge_page(media: &mut Media, choices: &mut Choices<'_>) -> bool {
    let Some(superblock) = superblock(media) else { return false };
    let Some((_, stream)) = (superblock.checkpoint > 0).then(|| chain(media, &superblock, 0)).flatten() else { return false };
    let Ok(mut directory) = Directory::decode(&stream, VERSION, GEOMETRY.extents) else { return false };
    let mut rows: Vec<_> = directory.replicas.iter_mut().flat_map(|replica| &mut replica.pages).collect();
    if rows.is_empty() {
        return false;
    }
    let at = choices.pick(rows.len());
    let place = GEOMETRY.extents_start.0 + u64::from(rows[at].slot);
    let mut block = media.read(place);
    if choices.u8().is_multiple_of(2) {
        // An entry's place or states.
        let field = 64 + 80 * choices.pick(48) + 4 * choices.pick(2);
        let value = choices.value(get(&block, field, 4));
        set(&mut block, field, 4, value);
    } else {
        edit(&mut block, choices);
    }
    reseal(&mut block);
    rows[at].crc = crc32c(&block);
    *media.block_mut(place) = block;
    store_stream(media, &superblock, &directory.encode());
    true
}
