//! Whole stores over damaged media: opened, read, written, drained, stopped and opened again.
//!
//! A find is a panic, a store that never comes to rest, a command outside the store or answered twice, and, where nothing was
//! forged, a block that is neither zeros nor something its host wrote there.

use crate::bytes::Choices;
use crate::image::images;
use crate::machine::Machine;
use crate::{content, damage};
use penstock_engine::*;
use penstock_wire::*;

/// Replicas that are looked at.
const REPLICAS_MAX: usize = 6;
/// Blocks read of each, from its start and at its end.
const HEAD_BLOCKS: u64 = 208;
const READ_BLOCKS: u64 = 16;

pub fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let images = images();
    let image = &images[usize::from(choices.u8()) % images.len()];
    let mut media = image.media.clone();
    let forged = damage::apply(&mut media, image, &mut choices);
    let mut machine = Machine::open(media);
    read_all(&mut machine, forged);
    write_some(&mut machine);
    read_all(&mut machine, forged);
    machine.order(Order::Drain);
    machine.order(Order::ScrubStart);
    for _ in 0..4 {
        machine.tick(600);
    }
    read_all(&mut machine, forged);
    machine.order(Order::Stop);
    let mut machine = Machine::open(machine.media);
    read_all(&mut machine, forged);
}

fn live(machine: &Machine) -> Vec<ReplicaView> {
    machine.store.replicas().into_iter().filter(|replica| !replica.deleting).take(REPLICAS_MAX).collect()
}

fn read_all(machine: &mut Machine, forged: bool) {
    for replica in live(machine) {
        let blocks = replica.shape.blocks;
        let tail = blocks.saturating_sub(READ_BLOCKS).max(HEAD_BLOCKS.min(blocks));
        let head = (0..HEAD_BLOCKS.min(blocks)).step_by(READ_BLOCKS as usize);
        for at in head.chain((tail < blocks).then_some(tail)) {
            let count = READ_BLOCKS.min(blocks - at);
            let whole = Span { offset: at * BLOCK as u64, len: count * BLOCK as u64 };
            if read(machine, &replica, whole, forged) == Some(Status::Unrecovered) {
                // One bad block must not hide its neighbours.
                for block in at..at + count {
                    read(machine, &replica, Span { offset: block * BLOCK as u64, len: BLOCK as u64 }, forged);
                }
            }
        }
    }
}

fn read(machine: &mut Machine, replica: &ReplicaView, span: Span, forged: bool) -> Option<Status> {
    let (status, bytes) = machine.host(replica.no, HostOp::Read(span), vec![0xcc; span.len as usize]);
    if status == Some(Status::Ok) && !forged {
        let (volume, first) = (replica.shape.segment.0[0], span.offset / content::SECTOR as u64);
        assert!(content::is_legitimate(&bytes, volume, first), "bytes that nobody wrote at {span:?} of {}", replica.shape.name);
    }
    status
}

/// Touches what the damage may have left half right: overwrites, partial blocks, new extents, zeroing, a delete, a create.
fn write_some(machine: &mut Machine) {
    let sector = content::SECTOR as u64;
    for replica in live(machine) {
        let volume = replica.shape.segment.0[0];
        let sectors = replica.shape.blocks * 8;
        for (first, count) in [(0, 16), (9, 2), (600, 160), (sectors.saturating_sub(4), 4)] {
            if first + count <= sectors {
                let mut payload = vec![0; (count * sector) as usize];
                content::fill(&mut payload, volume, first, 200);
                let span = Span { offset: first * sector, len: count * sector };
                machine.host(replica.no, HostOp::Write(span), payload);
            }
        }
        let zeroed = (sectors / 2).min(1 << 20);
        machine.host(replica.no, HostOp::Zero(Span { offset: 0, len: zeroed * sector }), Vec::new());
    }
    if let Some(replica) = live(machine).last() {
        machine.order(Order::Delete { segment: replica.shape.segment });
        machine.order(Order::Create(Box::new(replica.shape.clone())));
    }
}

/// Undamaged images, and each kind of damage once in each.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for image in 0..images().len() as u8 {
        seeds.push(vec![image]);
        for kind in 0..12u8 {
            for place in [0u8, 2, 5, 9] {
                seeds.push(vec![image, kind, place, 0, place, 0, 3, 0, 0, 0, 161, 0, 0, 0]);
            }
        }
    }
    seeds
}
