//! Valid stores to damage: each stands for a place where a power cut may find one.

use crate::content;
use crate::machine::{GEOMETRY, Machine, Media};
use penstock_engine::*;
use penstock_wire::batch::Batch;
use penstock_wire::directory::{Directory, Part, VERSION};
use penstock_wire::superblock::Superblock;
use penstock_wire::*;
use std::sync::OnceLock;

/// A store at rest, and where its records lie.
pub struct Image {
    pub media: Media,
    /// Blocks worth damaging: records first, then payload and data.
    pub places: Vec<u64>,
    /// Blocks of the ring at which a header stands.
    pub headers: Vec<u64>,
    pub superblock: Superblock,
}

pub fn segment(volume: u8) -> SegmentId {
    SegmentId([volume; 16])
}

fn create(machine: &mut Machine, volume: u8, blocks: u64, name: String) {
    let shape = ReplicaShape {
        volume: VolumeId([volume; 16]),
        segment: segment(volume),
        replica: ReplicaId([volume; 16]),
        segment_no: 0,
        blocks,
        logical_block: 512,
        name,
    };
    machine.order(Order::Create(Box::new(shape)));
}

/// Writes `sectors` of a volume.
fn write(machine: &mut Machine, volume: u8, first: u64, sectors: u64, version: u8) {
    let mut payload = vec![0; sectors as usize * content::SECTOR];
    content::fill(&mut payload, volume, first, version);
    let span = Span { offset: first * content::SECTOR as u64, len: payload.len() as u64 };
    let replica = machine.store.replica_of(segment(volume)).expect("the volume stands");
    let (status, _) = machine.host(replica, HostOp::Write(span), payload);
    assert_eq!(status, Some(Status::Ok), "writing an undamaged store");
}

fn zero(machine: &mut Machine, volume: u8, first: u64, sectors: u64) {
    let sector = content::SECTOR as u64;
    let replica = machine.store.replica_of(segment(volume)).expect("the volume stands");
    machine.host(replica, HostOp::Zero(Span { offset: first * sector, len: sectors * sector }), Vec::new());
}

/// Two volumes, a few writes of each kind, nothing drained.
fn log_alone() -> Machine {
    let mut machine = Machine::open(Media::blank());
    create(&mut machine, 1, 200, "one".into());
    create(&mut machine, 2, 100, "two".into());
    write(&mut machine, 1, 0, 32, 1);
    write(&mut machine, 2, 80, 200, 1);
    write(&mut machine, 1, 3, 2, 2);
    zero(&mut machine, 2, 88, 16);
    machine
}

/// The same drained and checkpointed, and more in the log behind.
fn checkpointed() -> Machine {
    let mut machine = log_alone();
    write(&mut machine, 1, 1200, 64, 1);
    machine.order(Order::Drain);
    write(&mut machine, 1, 8, 16, 3);
    zero(&mut machine, 2, 100, 80);
    machine.order(Order::Resize { segment: segment(2), blocks: 60 });
    write(&mut machine, 2, 0, 8, 4);
    create(&mut machine, 3, 50, "three".into());
    write(&mut machine, 3, 16, 8, 1);
    machine
}

/// The ring gone round several times, one volume deleted, the stream sealed.
fn wrapped() -> Machine {
    let mut machine = checkpointed();
    for round in 0..12 {
        for at in 0..4 {
            write(&mut machine, 1, at * 400, 240, round);
            machine.tick(1);
        }
    }
    machine.order(Order::Delete { segment: segment(2) });
    machine.tick(20);
    write(&mut machine, 1, 40, 16, 99);
    machine.tick(20);
    machine
}

/// Left cleanly: all of it in the checkpoint.
fn stopped() -> Machine {
    let mut machine = checkpointed();
    machine.order(Order::Stop);
    machine
}

/// So many volumes that the directory takes two parts.
fn crowded() -> Machine {
    let mut machine = Machine::open(Media::blank());
    for no in 0..230u8 {
        for twin in 0..2u8 {
            let name = format!("{no:02x}{twin}{}", "x".repeat(NAME_MAX - 3));
            let shape = ReplicaShape {
                volume: VolumeId([no; 16]),
                segment: SegmentId([no, twin, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                replica: ReplicaId([no; 16]),
                segment_no: 0,
                blocks: 1000,
                logical_block: 4096,
                name,
            };
            machine.order(Order::Create(Box::new(shape)));
        }
    }
    machine.order(Order::Drain);
    machine
}

pub fn images() -> &'static [Image] {
    static IMAGES: OnceLock<Vec<Image>> = OnceLock::new();
    IMAGES.get_or_init(|| [log_alone(), checkpointed(), wrapped(), stopped(), crowded()].into_iter().map(Image::of).collect())
}

/// The newest of the four superblocks.
pub fn superblock(media: &Media) -> Option<Superblock> {
    (0..4).filter_map(|at| Superblock::decode(&media.read(at)).ok()).max_by_key(|sb| sb.write_count)
}

/// Block of the store at which an extent begins.
pub fn extent_at(extent: u32) -> u64 {
    GEOMETRY.extents_start.0 + u64::from(extent) * EXTENT_BLOCKS
}

/// First blocks of the parts of a directory's chain, and the stream that they carry.
pub fn chain(media: &Media, superblock: &Superblock, copy: usize) -> Option<(Vec<u64>, Vec<u8>)> {
    let mut extent = superblock.directory[copy];
    let (mut places, mut stream) = (Vec::new(), Vec::new());
    for _ in 0..superblock.directory_parts.min(64) {
        if u64::from(extent) >= GEOMETRY.extents {
            return None;
        }
        let bytes = media.read_many(extent_at(extent), EXTENT_BLOCKS);
        let (part, payload) = Part::decode(&bytes).ok()?;
        places.push(extent_at(extent));
        stream.extend_from_slice(payload);
        extent = part.next;
    }
    Some((places, stream))
}

impl Image {
    fn of(machine: Machine) -> Self {
        let media = machine.media.settled();
        let superblock = superblock(&media).expect("an undamaged store has its superblock");
        let mut places: Vec<u64> = (0..4).collect();
        let mut headers = Vec::new();
        for at in 0..GEOMETRY.ring_blocks {
            let place = GEOMETRY.ring_start.0 + at;
            if Batch::looks_like(&media.read(place)) {
                headers.push(place);
            }
        }
        places.extend(&headers);
        if superblock.checkpoint > 0 {
            for copy in 0..2 {
                let (parts, stream) = chain(&media, &superblock, copy).expect("an undamaged directory");
                places.extend(parts);
                let directory = Directory::decode(&stream, VERSION, GEOMETRY.extents).expect("an undamaged directory");
                for row in directory.replicas.iter().flat_map(|replica| &replica.pages) {
                    places.push(GEOMETRY.extents_start.0 + u64::from(row.slot));
                }
            }
        }
        places.extend(headers.iter().map(|at| at + 1));
        places.extend((0..24).map(extent_at));
        Self { media, places, headers, superblock }
    }
}
