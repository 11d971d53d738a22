//! Clones over a well-behaved drive: they begin as a snapshot is, go their own way, and keep what they stand on.

use crate::bench::{Bench, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::layer::SnapshotShape;
use penstock_wire::*;

const B: u64 = BLOCK as u64;
const SIZE: u64 = 400;

fn segment(volume: u8) -> SegmentId {
    if volume == 0 { SEGMENT } else { SegmentId([volume + 100; 16]) }
}

fn shape(volume: u8, blocks: u64) -> Box<ReplicaShape> {
    let id = [volume + 100; 16];
    Box::new(ReplicaShape {
        volume: VolumeId(id),
        segment: segment(volume),
        replica: ReplicaId(id),
        segment_no: 0,
        blocks,
        logical_block: 512,
        name: format!("v{volume}"),
    })
}

fn snapshot_shape(no: u8) -> SnapshotShape {
    SnapshotShape { id: SnapshotId([no; 16]), name: format!("s{no}") }
}

impl Bench {
    /// An order that may take some turns.
    fn settle(&mut self, order: Order) -> Result<(), OrderError> {
        let id = self.orders.len() as u64 + 1;
        self.store.apply(Event::Order { id: OrderId(id), order: order.clone() }, &mut self.mem, &mut self.fx);
        for _ in 0..100 {
            self.run();
            self.tick(10);
            if let Some(result) = self.orders.get(&id) {
                return result.clone();
            }
        }
        panic!("{order:?} is not answered in a second: {:?}", self.store.view());
    }

    fn clone_of(&mut self, volume: u8, blocks: u64, origin: u8, snapshot: u8) -> Result<(), OrderError> {
        let (shape, origin, snapshot) = (shape(volume, blocks), segment(origin), snapshot_shape(snapshot).id);
        self.settle(Order::Clone { shape, members: None, origin, snapshot })
    }

    fn keep(&mut self, volume: u8, no: u8) -> Result<(), OrderError> {
        self.settle(Order::Snapshot { segment: segment(volume), snapshot: Box::new(snapshot_shape(no)) })
    }

    fn let_go(&mut self, volume: u8, no: u8) -> Result<(), OrderError> {
        self.settle(Order::Unsnapshot { segment: segment(volume), snapshot: snapshot_shape(no).id })
    }

    fn delete(&mut self, volume: u8) -> Result<(), OrderError> {
        self.settle(Order::Delete { segment: segment(volume) })
    }

    fn ask(&mut self, volume: u8, op: HostOp, payload: Vec<u8>) -> Vec<u8> {
        let io = self.next_io;
        self.next_io += 1;
        self.mem.host.insert(io, payload);
        let replica = self.store.replica_of(segment(volume)).expect("it stands");
        self.store.apply(Event::Host { io: IoId(io), replica, host: HostId::default(), op }, &mut self.mem, &mut self.fx);
        self.run();
        assert_eq!(self.replies[&io], Status::Ok, "volume {volume}: {op:?}");
        self.mem.host.remove(&io).expect("it was answered")
    }

    fn put(&mut self, volume: u8, block: u64, bytes: &[u8]) {
        self.ask(volume, HostOp::Write(Span { offset: block * B, len: bytes.len() as u64 }), bytes.to_vec());
    }

    fn get(&mut self, volume: u8, block: u64, blocks: u64) -> Vec<u8> {
        self.ask(volume, HostOp::Read(Span { offset: block * B, len: blocks * B }), vec![0xcc; (blocks * B) as usize])
    }

    fn discard(&mut self, volume: u8, block: u64, blocks: u64) {
        self.ask(volume, HostOp::Zero(Span { offset: block * B, len: blocks * B }), Vec::new());
    }

    fn taken(&self, volume: u8) -> u64 {
        self.store.usage(self.store.replica_of(segment(volume)).expect("it stands")).allocated_extents
    }
}

#[test]
fn clone_begins_as_its_snapshot_and_costs_what_is_written_to_it() {
    for drained in [false, true] {
        let mut bench = Bench::new();
        bench.create(SIZE);
        let old = pattern(1, 64 * BLOCK);
        bench.put(0, 0, &old);
        bench.keep(0, 1).unwrap();
        bench.put(0, 8, &pattern(2, BLOCK));
        if drained {
            bench.settle(Order::Drain).unwrap();
        }
        bench.clone_of(1, SIZE + 50, 0, 1).unwrap();
        for _ in 0..3 {
            assert_eq!(bench.get(1, 0, 64), old);
            assert_eq!(bench.get(1, 64, 386), vec![0; 386 * BLOCK]);
            bench.reopen();
            assert_eq!(bench.clone_of(1, SIZE + 50, 0, 1), Ok(()), "it is the same again");
            bench.settle(Order::Drain).unwrap();
            bench.audit();
            assert_eq!(bench.taken(1), 0);
        }
        bench.put(1, 3, &pattern(3, BLOCK));
        bench.discard(1, 20, 10);
        bench.put(1, 449, &pattern(4, BLOCK));
        let mut new = old.clone();
        new[3 * BLOCK..4 * BLOCK].copy_from_slice(&pattern(3, BLOCK));
        new[20 * BLOCK..30 * BLOCK].fill(0);
        for _ in 0..2 {
            assert_eq!(bench.get(1, 0, 64), new);
            assert_eq!(bench.get(1, 449, 1), pattern(4, BLOCK));
            let mut live = old.clone();
            live[8 * BLOCK..9 * BLOCK].copy_from_slice(&pattern(2, BLOCK));
            assert_eq!(bench.get(0, 0, 64), live, "the origin goes its own way");
            bench.settle(Order::Drain).unwrap();
            bench.audit();
            bench.reopen();
        }
        assert_eq!(bench.taken(1), 2);
    }
}

#[test]
fn what_a_clone_stands_on_does_not_go_before_it() {
    let mut bench = Bench::new();
    bench.create(SIZE);
    bench.put(0, 0, &pattern(1, 40 * BLOCK));
    bench.keep(0, 1).unwrap();
    bench.put(0, 2, &pattern(2, 4 * BLOCK));
    bench.keep(0, 2).unwrap();
    bench.clone_of(1, SIZE, 0, 2).unwrap();
    for _ in 0..2 {
        let stands = Err(OrderError::CloneStands("v1".into(), shape(1, SIZE).volume));
        assert_eq!(bench.let_go(0, 2), stands);
        assert_eq!(bench.delete(0), stands);
        bench.reopen();
    }
    // What lies beneath that is merged up to it.
    bench.let_go(0, 1).unwrap();
    bench.settle(Order::Drain).unwrap();
    let mut old = pattern(1, 40 * BLOCK);
    old[2 * BLOCK..6 * BLOCK].copy_from_slice(&pattern(2, 4 * BLOCK));
    assert_eq!(bench.get(1, 0, 40), old);
    bench.keep(1, 3).unwrap();
    bench.clone_of(2, SIZE, 1, 3).unwrap();
    assert_eq!(bench.get(2, 0, 40), old);
    assert_eq!(bench.delete(1), Err(OrderError::CloneStands("v2".into(), shape(2, SIZE).volume)));
    bench.delete(2).unwrap();
    bench.delete(1).unwrap();
    bench.let_go(0, 2).unwrap();
    bench.reopen();
    bench.settle(Order::Drain).unwrap();
    assert_eq!(bench.get(0, 0, 40), old);
    bench.delete(0).unwrap();
    bench.settle(Order::Drain).unwrap();
    bench.audit();
    assert!(bench.store.replicas().is_empty());
}

#[test]
fn clone_of_what_is_not_there_or_does_not_fit_is_refused() {
    let mut bench = Bench::new();
    bench.create(SIZE);
    bench.keep(0, 1).unwrap();
    assert_eq!(bench.clone_of(1, SIZE, 0, 9), Err(OrderError::NoSuchSnapshot));
    assert_eq!(bench.clone_of(1, SIZE, 7, 1), Err(OrderError::NoSuchSegment));
    assert!(matches!(bench.clone_of(1, SIZE - 1, 0, 1), Err(OrderError::Invalid(_))));
    let other = Box::new(ReplicaShape { logical_block: 4096, ..*shape(1, SIZE) });
    let order = Order::Clone { shape: other, members: None, origin: SEGMENT, snapshot: snapshot_shape(1).id };
    assert!(matches!(bench.order(order), Err(OrderError::Invalid(_))));
    bench.clone_of(1, SIZE, 0, 1).unwrap();
    bench.keep(0, 2).unwrap();
    assert!(matches!(bench.clone_of(1, SIZE, 0, 2), Err(OrderError::Conflict(_))), "it is one of another snapshot");
    bench.create_other(SIZE);
    assert_eq!(bench.store.replicas().len(), 3);
}

/// Volumes with snapshots and clones as they should be, block by block: the seed of what was written, 0 for zeros.
#[derive(Default)]
struct Model {
    volumes: Vec<(u8, Vec<u8>, Option<u8>)>,
    /// Number, volume, content.
    snapshots: Vec<(u8, u8, Vec<u8>)>,
}

fn bytes_of(seeds: &[u8]) -> Vec<u8> {
    let block = |seed: &u8| if *seed == 0 { vec![0; BLOCK] } else { pattern(*seed, BLOCK) };
    seeds.iter().flat_map(block).collect()
}

#[test]
fn volumes_that_are_cloned_and_snapshot_at_random_hold_what_they_should_over_any_restart() {
    for seed in 0..24u64 {
        let mut state = seed * 2 + 1;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let mut bench = Bench::new();
        bench.create(SIZE);
        let mut model = Model { volumes: vec![(0, vec![0; SIZE as usize], None)], ..Model::default() };
        let (mut next, mut next_snapshot) = (1u8, 1u8);
        for _ in 0..150 {
            let at = draw(model.volumes.len() as u64) as usize;
            let volume = model.volumes[at].0;
            let size = model.volumes[at].1.len() as u64;
            match draw(16) {
                0..=5 => {
                    let (first, seed) = (draw(size - 24), 1 + draw(250) as u8);
                    let blocks = 1 + draw(24) as usize;
                    let content = &mut model.volumes[at].1[first as usize..][..blocks];
                    content.iter_mut().enumerate().for_each(|(i, block)| *block = seed.wrapping_add(i as u8).max(1));
                    let bytes = bytes_of(content);
                    bench.put(volume, first, &bytes);
                }
                6 | 7 => {
                    let (first, blocks) = (draw(size - 60), 1 + draw(60));
                    model.volumes[at].1[first as usize..][..blocks as usize].fill(0);
                    bench.discard(volume, first, blocks);
                }
                8 | 9 if model.snapshots.len() < 8 => {
                    model.snapshots.push((next_snapshot, volume, model.volumes[at].1.clone()));
                    bench.keep(volume, next_snapshot).unwrap();
                    next_snapshot += 1;
                }
                10 if !model.snapshots.is_empty() => {
                    let of = draw(model.snapshots.len() as u64) as usize;
                    let (no, volume, _) = model.snapshots[of];
                    let stands = model.volumes.iter().any(|(_, _, origin)| *origin == Some(no));
                    let done = bench.let_go(volume, no);
                    assert_eq!(done.is_err(), stands, "{done:?}");
                    if !stands {
                        model.snapshots.remove(of);
                    }
                }
                11 | 12 if !model.snapshots.is_empty() && model.volumes.len() < 5 => {
                    let (no, of, mut content) = model.snapshots[draw(model.snapshots.len() as u64) as usize].clone();
                    let more = draw(2) * 40;
                    bench.clone_of(next, content.len() as u64 + more, of, no).unwrap();
                    content.resize(content.len() + more as usize, 0);
                    model.volumes.push((next, content, Some(no)));
                    next += 1;
                }
                13 if model.volumes.len() > 1 => {
                    let kept = |no: &u8| model.volumes.iter().any(|(_, _, origin)| *origin == Some(*no));
                    let stands = model.snapshots.iter().any(|(no, of, _)| *of == volume && kept(no));
                    let done = bench.delete(volume);
                    assert_eq!(done.is_err(), stands, "{done:?}");
                    if !stands {
                        model.volumes.remove(at);
                        model.snapshots.retain(|(_, of, _)| *of != volume);
                    }
                }
                14 => bench.settle(Order::Drain).unwrap(),
                15 => bench.reopen(),
                _ => {}
            }
            let (volume, content, _) = &model.volumes[draw(model.volumes.len() as u64) as usize];
            let first = draw(content.len() as u64 - 30);
            assert!(
                bench.get(*volume, first, 30) == bytes_of(&content[first as usize..][..30]),
                "seed {seed}, volume {volume} from {first}"
            );
        }
        for _ in 0..2 {
            for (volume, content, _) in &model.volumes {
                assert!(bench.get(*volume, 0, content.len() as u64) == bytes_of(content), "seed {seed}, volume {volume}");
            }
            for (no, volume, content) in &model.snapshots {
                let of = bench.store.snapshots(bench.store.replica_of(segment(*volume)).unwrap());
                let layer = of.iter().find(|view| view.snapshot == snapshot_shape(*no)).expect("it stands").layer;
                let span = Span { offset: 0, len: content.len() as u64 * B };
                let bytes = bench.ask(*volume, HostOp::ReadSnapshot(layer, span), vec![0xcc; span.len as usize]);
                assert!(bytes == bytes_of(content), "seed {seed}, snapshot {no}");
            }
            bench.settle(Order::Drain).unwrap();
            bench.audit();
            bench.reopen();
        }
    }
}
