//! One record of each kind in which every field is set and no two bytes of an id are the same, so that a swapped or shifted
//! field shows. The golden files were made from these values, so a change here is a change of the format and fails there;
//! the unit tests of this crate mutate them, and the fuzz targets (tests/fuzz) begin with them.

pub mod peer;

use penstock_wire::batch::{Header, Kind, Prev, Section, header_blocks};
use penstock_wire::directory::{Directory, MemberRow, PageRow, Part, ReplicaRow};
use penstock_wire::label::{Label, Share};
use penstock_wire::layer::{FrozenRow, KeptRow, SnapshotShape, Stack};
use penstock_wire::page::{BlockState, Page, PageName};
use penstock_wire::peer::{MemberNo, States};
use penstock_wire::reservation::{Registrant, ReservationKind, Reservations};
use penstock_wire::superblock::{NO_EXTENT, Superblock};
use penstock_wire::*;

fn id(first: u8) -> [u8; 16] {
    std::array::from_fn(|i| first + i as u8)
}

fn incarnation() -> Incarnation {
    Incarnation(id(0x70))
}

pub fn label() -> Label {
    Label {
        cluster: ClusterId(id(0x10)),
        node: NodeId(id(0x30)),
        drive: DriveId(id(0x50)),
        incarnation: incarnation(),
        drive_blocks: 100_000,
        stores: vec![
            Share { start: BlockAddr(1), blocks: 49_999, ring_blocks: 8192 },
            Share { start: BlockAddr(50_000), blocks: 49_998, ring_blocks: 4096 },
        ],
    }
}

/// Of a store with a checkpoint; [`Superblock::first`] is one without.
pub fn superblock() -> Superblock {
    Superblock {
        store: 1,
        write_count: 0x0102_0304_0506,
        generation: Generation(0x0203_0405),
        log_seq: Seq(0x0304_0506_0708),
        log_at: RingPos(0x0405_0607_0809),
        log_generation: Generation(0x0103_0405),
        checkpoint: 0x0506_0708,
        directory: [0x0607_0809, 0x0708_090a],
        directory_parts: 2,
        directory_len: 70_000,
        directory_crc: 0xdead_beef,
        ..first_superblock()
    }
}

/// Spelled out, since the golden file holds [`Superblock::first`] to it.
pub fn first_superblock() -> Superblock {
    Superblock {
        incarnation: incarnation(),
        store: 0,
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

pub fn shape() -> ReplicaShape {
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

/// What a batch is encoded from.
pub struct SampleBatch {
    pub header: Header,
    pub own: Section,
    pub prev: Section,
}

impl SampleBatch {
    /// Header blocks alone.
    pub fn encode(&self) -> Vec<u8> {
        let (own, prev) = (self.own.bytes(), self.prev.bytes());
        let mut bytes = vec![0xaa; header_blocks(own.len(), prev.len()) as usize * BLOCK];
        self.header.encode_into(&mut bytes, own, prev);
        bytes
    }
}

fn header(kind: Kind, payload_blocks: u32, prev: Option<Prev>) -> Header {
    Header {
        incarnation: incarnation(),
        store: 1,
        kind,
        seq: Seq(0x0a0b_0c0d),
        generation: Generation(3),
        durable_to: Seq(0x0a0b_0c0b),
        at: RingPos(0x0102_0304_0506),
        payload_blocks,
        prev,
    }
}

fn before() -> Option<Prev> {
    Some(Prev { seq: Seq(0x0a0b_0c0c), at: RingPos(0x0102_0304_0502), header_blocks: 1, payload_blocks: 1 })
}

fn section_before() -> Section {
    let mut prev = Section::default();
    prev.entry(4, Term(1), Index(9));
    prev.write(0, &[0x4444_4444]);
    prev
}

/// An op of each kind, and 3 payload blocks.
pub fn batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(4, Term(1), Index(10));
    own.write(0x0102_0304, &[0x1111_1111, 0x2222_2222, 0x3333_3333]);
    own.zero(7, 0x00a0_b0c0);
    own.entry(5, Term(1), Index(1));
    own.create(&shape());
    own.resize(9);
    own.delete();
    SampleBatch { header: header(Kind::Data, 3, before()), own, prev: section_before() }
}

/// What stores write of replicas that are members of groups: a birth, a ballot, entries of a log of each kind, an end.
pub fn group_batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(5, Term(0), Index(0));
    own.create(&shape());
    own.members(&peer::members());
    own.entry(7, Term(0), Index(0));
    own.ballot(Term(0x0102_0304_0506), MemberNo(0x0708_090a));
    for entry in peer::entries() {
        own.logged(7, &entry);
    }
    own.again();
    own.entry(8, Term(0), Index(0));
    own.delete();
    own.entry(9, Term(0), Index(0));
    own.doubt(Some((Index(0x0809), Term(0x0506))));
    own.entry(10, Term(0), Index(0));
    own.resolved();
    own.entry(batch::EVERY_MEMBER, Term(0), Index(0));
    own.doubt(None);
    SampleBatch { header: header(Kind::Data, 3, before()), own, prev: section_before() }
}

/// What stores write of what members know of each other.
pub fn seen_batch() -> SampleBatch {
    let mut own = Section::default();
    for seen in peer::seen() {
        own.entry(7, Term(0), Index(0));
        own.seen(&seen);
    }
    own.entry(7, Term(0), Index(0));
    own.believed(peer::past().believed.expect("it was"));
    own.entry(batch::EVERY_MEMBER, Term(0), Index(0));
    own.opened(true);
    own.entry(7, Term(0), Index(0));
    own.forced(Term(0x2021), &peer::members());
    own.entry(7, Term(0), Index(0));
    own.committed(Index(0x2223), Term(0x2021));
    SampleBatch { header: header(Kind::Data, 0, before()), own, prev: section_before() }
}

/// What stores write of members that are rebuilt; 2 payload blocks.
pub fn copy_batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(7, Term(0), Index(0));
    own.install(Index(0x0304), Index(0x0506), Term(0x0102), &peer::members());
    own.entry(7, Term(0), Index(0));
    own.copy(&copy());
    own.entry(8, Term(0), Index(0));
    own.whole(0x0708);
    SampleBatch { header: header(Kind::Data, 2, before()), own, prev: section_before() }
}

pub fn reservations() -> Reservations {
    let registrant = |first, key| Registrant { host: HostId(id(first)), key };
    let registrants = vec![registrant(0xc0, 0x0102_0304_0506_0708), registrant(0xd0, 0x090a_0b0c_0d0e_0f10)];
    let held = Some((ReservationKind::WriteExclusiveRegistrants, Some(HostId(id(0xd0)))));
    Reservations { generation: 0x1112_1314, held, registrants }
}

/// What came with version 3: an entry of a log that changes reservations, and an install as of which there are some.
pub fn reserved_batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(7, Term(0), Index(0));
    own.install(Index(0x0304), Index(0x0506), Term(0x0102), &peer::members());
    own.reserve(&reservations());
    own.entry(8, Term(1), Index(10));
    own.write(0x0102_0304, &[0x1111_1111]);
    own.reserve(&reservations());
    SampleBatch { header: header(Kind::Data, 1, before()), own, prev: section_before() }
}

pub fn copy() -> batch::CopyOp {
    let mut states = States::default();
    for (at, state) in [(1, BlockState::Data), (4, BlockState::Lost), (15, BlockState::Data)] {
        states.set(at, state);
    }
    batch::CopyOp { layer: 0, extent: 0x0102_0304, changed: 0x0505, states, mask: 0x8013, crcs: vec![0x1111_1111, 0x2222_2222] }
}

pub fn snapshot(first: u8) -> SnapshotShape {
    SnapshotShape { id: SnapshotId(id(first)), name: "früh".into() }
}

/// What stores write of snapshots and clones; 1 payload block.
pub fn snapshot_batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(4, Term(1), Index(10));
    own.write(0x0102_0304, &[0x1111_1111]);
    own.snapshot(0x1112, &snapshot(0xb0));
    own.entry(5, Term(1), Index(7));
    own.unsnapshot(SnapshotId(id(0xc0)));
    own.entry(6, Term(1), Index(1));
    own.create(&shape());
    own.origin(SegmentId(id(0xd0)), SnapshotId(id(0xe0)));
    SampleBatch { header: header(Kind::Data, 1, before()), own, prev: section_before() }
}

/// The layers of a volume with two snapshots.
pub fn stack() -> Stack {
    let row = |first: u8, layer, at| KeptRow { layer, at: Index(at), blocks: 0x0102 + u64::from(first), snapshot: snapshot(first) };
    Stack { live: 0x0405, since: Index(0x0304), kept: vec![row(0xb0, 0x0102, 0x0203), row(0xc0, 0x0305, 0x0304)] }
}

/// What stores write of members that are rebuilt and whose volume has snapshots; 2 payload blocks.
pub fn layered_batch() -> SampleBatch {
    let stack = stack();
    let mut own = Section::default();
    own.entry(7, Term(0), Index(0));
    stack.kept.iter().for_each(|row| own.layer(row));
    own.entry(7, Term(0), Index(0));
    own.install(Index(0x0304), Index(0x0506), Term(0x0102), &peer::members());
    own.reserve(&reservations());
    own.stack(&stack_op());
    own.entry(7, Term(0), Index(0));
    own.copy(&copy_in_layer());
    SampleBatch { header: header(Kind::Data, 2, before()), own, prev: section_before() }
}

pub fn stack_op() -> batch::StackOp {
    batch::StackOp { live: stack().live, since: stack().since, kept: 2, applied: Index(0x0605) }
}

/// Of which some blocks are as the layer beneath says.
pub fn copy_in_layer() -> batch::CopyOp {
    let mut copy = batch::CopyOp { layer: 0x0305, ..copy() };
    copy.states.set(0, BlockState::Inherit);
    copy
}

/// Descriptors that take a second header block.
pub fn long_batch() -> SampleBatch {
    let mut own = Section::default();
    own.entry(6, Term(1), Index(77));
    for chunk in 0..4 {
        own.write(chunk * 1000, &(0..64).map(|i| 0x5500_0000 + chunk as u32 * 64 + i).collect::<Vec<_>>());
    }
    for op in 0..220 {
        own.zero(op * 100, 50);
    }
    let mut prev = Section::default();
    prev.entry(6, Term(1), Index(76));
    for op in 0..30 {
        prev.zero(op * 100, 51);
    }
    SampleBatch { header: header(Kind::Data, 256, before()), own, prev }
}

pub fn seal() -> SampleBatch {
    SampleBatch { header: header(Kind::Seal, 0, before()), own: Section::default(), prev: section_before() }
}

pub fn open() -> SampleBatch {
    SampleBatch { header: header(Kind::Open, 0, None), own: Section::default(), prev: Section::default() }
}

/// Extents of the store that [`page`] is of.
pub const PAGE_EXTENTS: u64 = 128;

pub fn page_name() -> PageName {
    PageName { incarnation: incarnation(), replica: 0x0102, layer: 0, page_no: 0x0304 }
}

pub fn page() -> Box<Page> {
    let mut map = Page::empty();
    map.extents[0].place = 4;
    map.extents[0].changed = 0x0908_0706_0504;
    map.extents[0].set(0, BlockState::Zero, 0);
    map.extents[0].set(3, BlockState::Data, 0x1234_5678);
    map.extents[0].set(15, BlockState::Lost, 0);
    map.extents[47].place = 127;
    map.extents[47].set(15, BlockState::Data, 0x8765_4321);
    map
}

/// Extents of the store that [`directory`] is of.
pub const DIRECTORY_EXTENTS: u64 = 40;

pub fn directory() -> Directory {
    let page = |page_no, slot, crc, extents| PageRow { page_no, slot, crc, extents };
    let row = |no, deleting, pages| ReplicaRow {
        no,
        deleting,
        term: Term(1),
        applied: Index(0x0506),
        shape: shape(),
        layer: 0,
        since: Index(0),
        pages,
        frozen: vec![],
        origin: None,
        member: None,
        reservations: None,
    };
    let member = MemberRow {
        vote: MemberNo(0x0a0b),
        applied_term: Term(0x0c0d),
        members: peer::members(),
        doubt: Some((Index(0x0e0f), Term(0x0c0e))),
        stopped: true,
        rebuild: Some(Index(0x0102)),
        past: peer::past(),
        seen: peer::seen(),
    };
    let reservations = Some(Box::new(reservations()));
    let alone = ReplicaRow { reservations: reservations.clone(), ..row(5, false, vec![]) };
    let pages = vec![page(4, 19, 0x3333_0000, Some(2))];
    let of_group = ReplicaRow { term: Term(0x0102_0304), member: Some(member), reservations, ..row(6, false, pages) };
    Directory {
        next_replica: 9,
        covered: Seq(0x0908_0706),
        replicas: vec![
            row(1, true, vec![]),
            row(3, false, vec![page(0, 17, 0x1111_0000, Some(48)), page(9, 18, 0x2222_0000, None)]),
            alone,
            of_group,
        ],
        taken: vec![0b10, 0, 0xff, 0, 0x80],
    }
}

/// As version 3 can say it: nobody is registered, and no member knows anything of another.
pub fn directory_v3() -> Directory {
    let mut directory = directory();
    directory.replicas.retain(|replica| replica.member.is_some() || replica.reservations.is_none());
    directory.replicas.iter_mut().for_each(|replica| replica.reservations = None);
    directory.replicas.iter_mut().filter_map(|replica| replica.member.as_mut()).for_each(|member| {
        member.seen.clear();
        member.past = penstock_wire::peer::Past::default();
    });
    directory
}

/// As version 4 can say it: replicas with snapshots, and a clone of one of these.
pub fn layered_directory() -> Directory {
    let mut directory = directory();
    let page = |page_no, slot, crc| PageRow { page_no, slot, crc, extents: Some(3) };
    let frozen = |layer, first, removed, at, pages| {
        let blocks = 0x0001_0000 + u64::from(layer);
        FrozenRow { layer, snapshot: snapshot(first), removed, at: Index(at), blocks, pages }
    };
    let with = &mut directory.replicas[1];
    (with.layer, with.since) = (0x0203, Index(0x0405));
    with.frozen = vec![
        frozen(0, 0xb0, true, 0x0102, vec![page(2, 20, 0x4444_0000)]),
        frozen(0x0102, 0xc0, false, 0x0304, vec![page(1, 21, 0x5555_0000), page(7, 22, 0x6666_0000)]),
    ];
    directory.replicas[2].origin = Some((3, 0x0102));
    directory
}

/// As versions before 3 can say it: no replica is a member of a group.
pub fn older_directory() -> Directory {
    let mut directory = Directory { covered: Seq(0), ..directory_v3() };
    directory.replicas.retain(|replica| replica.member.is_none());
    directory
}

/// The part that carries `payload`.
pub fn part(payload: &[u8]) -> Part {
    let (next, len) = (NO_EXTENT, payload.len() as u32);
    Part {
        version: penstock_wire::directory::VERSION,
        incarnation: incarnation(),
        store: 1,
        checkpoint: 0x0a0b,
        part: 1,
        next,
        twin: 9,
        len,
    }
}
