//! What the engine itself costs: nanoseconds per host command, with a drive that completes at once and moves no bytes.
//!
//! `cargo run --release -p penstock-engine --example turn_cost [commands [blocks of the volume [blocks of the drive]]]`. The log is of 131072 blocks: what
//! of a volume is overwritten there is not drained. Checksums are real, payloads are one shared block, so nothing is verified here: reads use a store
//! whose blocks all hold that block. For profiles, not for gates.

use penstock_engine::format::format;
use penstock_engine::*;
use penstock_wire::label::{Geometry, Label};
use penstock_wire::*;
use std::time::Instant;

/// Payload of every command is the same block; buffers are a slab of reused vectors.
struct Mem {
    block: Vec<u8>,
    bufs: Vec<Vec<u8>>,
    free: Vec<u32>,
}

impl Memory for Mem {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
        let len = blocks as usize * BLOCK;
        let id = match self.free.iter().rposition(|id| self.bufs[*id as usize].len() >= len) {
            Some(at) => self.free.swap_remove(at),
            None => {
                self.bufs.push(vec![0; len.max(16 * BLOCK)]);
                self.bufs.len() as u32 - 1
            }
        };
        Some(BufId(id))
    }
    fn free(&mut self, buf: BufId) {
        self.free.push(buf.0);
    }
    fn bytes(&self, buf: BufId) -> &[u8] {
        &self.bufs[buf.0 as usize]
    }
    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        &mut self.bufs[buf.0 as usize]
    }
    fn host_direct(&self, _: IoId) -> bool {
        true
    }
    fn host_crc(&self, _: IoId, _: u32) -> u32 {
        crc32c(&self.block)
    }
    fn host_to_buf(&mut self, _: IoId, _: u32, _: BufId, _: u32, _: u32) {}
    fn buf_to_host(&mut self, _: BufId, _: u32, _: IoId, _: u32, _: u32) {}
    fn host_zero(&mut self, _: IoId, _: u32, _: u32) {}
    fn host_differs(&self, _: IoId, _: u32, _: BufId, _: u32, _: u32) -> Option<u32> {
        None
    }
}

struct Bench {
    store: Store,
    mem: Mem,
    fx: Effects,
    spare: Effects,
    media: Vec<u8>,
    start: u64,
    open: bool,
    replies: u64,
}

impl Bench {
    fn turn(&mut self) {
        self.store.settle(&mut self.mem, &mut self.fx);
        std::mem::swap(&mut self.fx, &mut self.spare);
        self.fx.clear();
        for effect in &self.spare.list {
            match effect {
                Effect::Disk(op) => {
                    if let (DiskKind::Read, [Part::Buf { buf, first, blocks }]) = (op.kind, self.spare.parts_of(op)) {
                        let to = &mut self.mem.bufs[buf.0 as usize][*first as usize * BLOCK..][..*blocks as usize * BLOCK];
                        if self.open {
                            // The drain reads the log: every payload block is the one block.
                            to.chunks_exact_mut(BLOCK).for_each(|chunk| chunk.copy_from_slice(&self.mem.block));
                        } else {
                            let from = (self.start + op.at.0) as usize * BLOCK;
                            to.copy_from_slice(&self.media[from..from + to.len()]);
                        }
                    }
                    self.store.apply(Event::DiskDone { id: op.id, ok: true }, &mut self.mem, &mut self.fx);
                }
                Effect::Reply { status, .. } => {
                    assert_eq!(*status, Status::Ok);
                    self.replies += 1;
                }
                Effect::Notice(Notice::Serving(_)) => self.open = true,
                _ => {}
            }
        }
    }
}

fn main() {
    let count = |at, default| std::env::args().nth(at).map_or(default, |n| n.parse().expect("a count"));
    let (commands, volume, blocks) = (count(1, 2_000_000), count(2, 16_384), count(3, 400_000));
    let label =
        Label::plan(ClusterId([1; 16]), NodeId([1; 16]), DriveId([1; 16]), Incarnation([9; 16]), blocks, 1, 131_072).expect("a plan");
    let mut media = vec![0; blocks as usize * BLOCK];
    for (at, block) in format(&label).expect("a format") {
        media[at.0 as usize * BLOCK..][..BLOCK].copy_from_slice(&block);
    }
    let config = StoreConfig {
        geometry: Geometry::of(&label.stores[0]).expect("a geometry"),
        incarnation: label.incarnation,
        store: 0,
        barrier: Barrier::NotNeeded,
        fenced: None,
        accept_lost_log: false,
        limits: Limits::default(),
        replication: penstock_engine::Replication::default(),
        canary: None,
    };
    let mem = Mem { block: vec![0x5a; BLOCK], bufs: Vec::new(), free: Vec::new() };
    let mut bench = Bench {
        store: Store::new(config),
        mem,
        fx: Effects::default(),
        spare: Effects::default(),
        media,
        start: label.stores[0].start.0,
        open: false,
        replies: 0,
    };
    while !bench.open {
        bench.turn();
    }
    let segment = SegmentId([2; 16]);
    let shape = ReplicaShape {
        volume: VolumeId([2; 16]),
        segment,
        replica: ReplicaId([3; 16]),
        segment_no: 0,
        blocks: volume,
        logical_block: 4096,
        name: "v".into(),
    };
    bench.store.apply(Event::Order { id: OrderId(1), order: Order::Create(Box::new(shape)) }, &mut bench.mem, &mut bench.fx);
    for _ in 0..4 {
        bench.turn();
    }
    let replica = bench.store.replica_of(segment).expect("the volume stands");
    let mut random = 88_172_645_463_325_252u64;
    for (what, depth) in [("write", 32u64), ("read", 32), ("write", 1), ("read", 1)] {
        let before = bench.store.view().counters;
        let (start, end) = (Instant::now(), bench.replies + commands);
        let mut sent = bench.replies;
        while bench.replies < end {
            while sent < end && sent - bench.replies < depth {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let span = Span { offset: random % volume * BLOCK as u64, len: BLOCK as u64 };
                let op = if what == "write" { HostOp::Write(span) } else { HostOp::Read(span) };
                bench.store.apply(
                    Event::Host { io: IoId((sent % depth) as u32), replica, host: HostId::default(), op },
                    &mut bench.mem,
                    &mut bench.fx,
                );
                sent += 1;
            }
            bench.turn();
        }
        let after = bench.store.view().counters;
        println!(
            "{what:5} 4 KiB, depth {depth:2}: {:6.0} ns each; {:.3} log commands, {:.2} log blocks, {:.2} drained blocks, {:.4} checkpoint pages a command",
            start.elapsed().as_nanos() as f64 / commands as f64,
            (after.log_batches - before.log_batches) as f64 / commands as f64,
            (after.log_header_blocks + after.log_payload_blocks - before.log_header_blocks - before.log_payload_blocks) as f64
                / commands as f64,
            (after.drained_blocks - before.drained_blocks) as f64 / commands as f64,
            (after.checkpoint_pages - before.checkpoint_pages) as f64 / commands as f64,
        );
    }
}
