//! Members that come back from their drives: whole, with a torn or rotten end of the log, twice in a row, all at once.

use super::cluster::Cluster;
use crate::bench::{Bench, SEGMENT, config, pattern};
use penstock_engine::*;
use penstock_wire::batch::{Batch, Kind, Op, decode_section};
use penstock_wire::label::Geometry;
use penstock_wire::*;

const B: u64 = BLOCK as u64;

/// A batch on a drive: its block on the media, header blocks and all blocks.
struct OnDrive {
    at: usize,
    header: usize,
    blocks: usize,
    ops: Vec<Op>,
}

/// Data batches of the log in order.
fn batches(bench: &Bench) -> Vec<OnDrive> {
    let geometry = Geometry::of(&bench.label.stores[0]).unwrap();
    let ring = (bench.label.stores[0].start.0 + geometry.ring_start.0) as usize;
    let mut found: Vec<_> = (ring..ring + geometry.ring_blocks as usize)
        .filter_map(|at| {
            let batch = Batch::decode(&bench.media[at * BLOCK..(at + 2) * BLOCK]).ok().filter(|batch| batch.header.kind == Kind::Data)?;
            let entries = decode_section(batch.own, batch.header.payload_blocks).unwrap();
            let ops = entries.into_iter().flat_map(|entry| entry.ops).collect();
            Some((batch.header.seq, OnDrive { at, header: batch.header_blocks as usize, blocks: batch.blocks() as usize, ops }))
        })
        .collect();
    found.sort_by_key(|(seq, _)| *seq);
    found.into_iter().map(|(_, batch)| batch).collect()
}

/// How the newest data batch of a drive is ruined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ruin {
    Header,
    Payload,
}

fn ruin(bench: &mut Bench, how: Ruin) {
    let last = batches(bench).pop().expect("the log has a data batch");
    let at = match how {
        Ruin::Header => last.at * BLOCK + 100,
        Ruin::Payload => (last.at + last.header) * BLOCK + 7,
    };
    assert!(last.blocks > last.header, "the newest batch has no payload: {:?}", last.ops);
    bench.media[at] ^= 0x10;
}

fn doubtful(cluster: &Cluster, at: usize) -> bool {
    let store = &cluster.nodes[at].store;
    store.member_view(store.replica_of(SEGMENT).unwrap()).unwrap().doubtful
}

/// Three members whose newest write only member `behind` does not have; its value is `pattern(2)`. Returns leader, the other that has it, and `behind`.
fn one_behind() -> (Cluster, [usize; 3]) {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let (has, behind) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.isolate(behind);
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.kill(leader);
    cluster.cut.clear();
    (cluster, [leader, has, behind])
}

fn nobody_serves(cluster: &mut Cluster, ms: u64) {
    for _ in 0..ms / 10 {
        cluster.pass(10);
        let serving: Vec<usize> = (0..3).filter(|at| cluster.up[*at] && cluster.standing(*at).serves).collect();
        assert!(serving.is_empty(), "{serving:?} serve");
    }
}

#[test]
fn member_restarted_after_any_step_has_what_it_applied_and_takes_part() {
    for step in 0..8u64 {
        for victim in [step as usize % 3, 3] {
            let mut cluster = Cluster::new(3);
            let mut expected = vec![0; 24 * BLOCK];
            for at in 0..8u64 {
                let leader = cluster.leader();
                let data = pattern(at as u8 + 1, 3 * BLOCK);
                match at {
                    3 => _ = cluster.order(leader, Order::Drain),
                    5 => _ = cluster.host(leader, HostOp::Zero(Span { offset: 2 * B, len: 9 * B }), Vec::new()),
                    _ => _ = cluster.write(leader, at * 3 * B, &data),
                }
                match at {
                    3 => {}
                    5 => expected[2 * BLOCK..11 * BLOCK].fill(0),
                    _ => expected[at as usize * 3 * BLOCK..][..3 * BLOCK].copy_from_slice(&data),
                }
                if at == step && victim < 3 {
                    cluster.restart(victim);
                } else if at == step {
                    (0..3).for_each(|all| cluster.restart(all));
                }
            }
            let leader = cluster.leader();
            assert_eq!(cluster.read(leader, 0, 24 * B), expected, "victim {victim}, step {step}");
            cluster.audit();
            assert_eq!(cluster.read(leader, 0, 24 * B), expected, "victim {victim}, step {step}, from extents");
        }
    }
}

#[test]
fn member_that_comes_back_alone_knows_what_was_committed_but_for_some_blocks() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    for at in 0..60u64 {
        assert_eq!(cluster.write(leader, at * 3 * B, &pattern(at as u8, 3 * BLOCK)), Status::Ok);
    }
    cluster.agree();
    for at in [leader, (leader + 1) % 3] {
        assert_eq!(cluster.nodes[at].store.view().counters.checkpoints, 0, "a checkpoint would know it");
        let before = cluster.applied(at);
        cluster.isolate(at);
        cluster.restart(at);
        let after = cluster.applied(at);
        // 64 blocks are 16 such entries; the last of them told of those before it.
        assert!(after <= before && after + 18 >= before, "{after} of {before}");
        cluster.cut.clear();
    }
    cluster.pass(1000);
    cluster.agree();
    let leader = cluster.leader();
    assert!((0..60u64).all(|at| cluster.read(leader, at * 3 * B, 3 * B) == pattern(at as u8, 3 * BLOCK)));
    cluster.audit();
}

#[test]
fn group_whose_logs_went_round_and_were_trimmed_comes_back_whole() {
    let mut cluster = Cluster::new(3);
    for round in 0..40u8 {
        let leader = cluster.leader();
        for at in 0..10u64 {
            assert_eq!(cluster.write(leader, at * 60 * B, &pattern(round ^ at as u8, 40 * BLOCK)), Status::Ok);
        }
        cluster.pass(10);
        if round % 13 == 12 {
            assert!(cluster.nodes.iter().all(|node| node.store.view().counters.checkpoints > 0), "round {round}");
            (0..3).for_each(|at| cluster.restart(at));
        }
    }
    (0..3).for_each(|at| cluster.restart(at));
    let leader = cluster.leader();
    for at in 0..10u64 {
        assert_eq!(cluster.read(leader, at * 60 * B, 40 * B), pattern(39 ^ at as u8, 40 * BLOCK));
    }
    cluster.audit();
}

#[test]
fn restarted_leader_sends_from_its_ring_what_it_applied_before() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let (other, behind) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.isolate(behind);
    for at in 0..20 {
        assert_eq!(cluster.write(leader, at * 4 * B, &pattern(at as u8, 4 * BLOCK)), Status::Ok);
    }
    for at in [leader, other] {
        cluster.order(at, Order::Drain).unwrap();
        cluster.restart(at);
    }
    cluster.cut.clear();
    cluster.leader();
    cluster.agree();
    assert_eq!(cluster.nodes[behind].store.data_blocks().len(), 80);
    cluster.audit();
}

#[test]
fn terms_do_not_go_back_when_all_restart() {
    let mut cluster = Cluster::new(3);
    let mut before = Term(0);
    for _ in 0..5 {
        let leader = cluster.leader();
        let term = cluster.standing(leader).term;
        assert!(term > before, "{term:?} after {before:?}");
        before = term;
        (0..3).for_each(|at| cluster.restart(at));
    }
}

#[test]
fn follower_with_a_ruined_end_of_its_log_is_in_doubt_until_the_leader_has_told_it() {
    for how in [Ruin::Header, Ruin::Payload] {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        let victim = (leader + 1) % 3;
        assert_eq!(cluster.write(leader, 0, &pattern(1, 2 * BLOCK)), Status::Ok);
        ruin(&mut cluster.nodes[victim], how);
        cluster.restart(victim);
        assert!(doubtful(&cluster, victim), "{how:?}");
        assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
        cluster.pass(300);
        assert!(!doubtful(&cluster, victim), "{how:?}");
        cluster.agree();
        let lost = cluster.nodes[victim].store.view().recovery.lost_blocks;
        assert_eq!(lost, 0, "{how:?}: what was lost came again");
        cluster.audit();
        cluster.restart(victim);
        assert!(!doubtful(&cluster, victim), "{how:?}: it is settled for good");
        cluster.kill(leader);
        let next = cluster.leader();
        assert_eq!(cluster.read(next, 0, B), pattern(2, BLOCK));
        assert_eq!(cluster.read(next, B, B), pattern(1, 2 * BLOCK)[BLOCK..]);
    }
}

#[test]
fn rot_of_the_last_acknowledged_batch_is_not_taken_for_a_tear() {
    for how in [None, Some(Ruin::Header), Some(Ruin::Payload)] {
        let (mut cluster, [leader, has, behind]) = one_behind();
        if let Some(how) = how {
            ruin(&mut cluster.nodes[has], how);
        }
        cluster.restart(has);
        if how.is_some() {
            // Only the dead leader has the write: whoever served now would have lost it.
            assert!(doubtful(&cluster, has));
            nobody_serves(&mut cluster, 2000);
            assert!(doubtful(&cluster, has));
            cluster.restart(leader);
        }
        let next = cluster.leader();
        assert_ne!(next, behind);
        assert_eq!(cluster.read(next, 0, B), pattern(2, BLOCK), "{how:?}");
        cluster.audit();
    }
}

#[test]
fn rot_of_a_batch_that_a_checkpoint_was_told_of_and_does_not_cover_leaves_no_hole() {
    let mut told = 0;
    for (how, later) in (0..8).flat_map(|later| [(Ruin::Header, later), (Ruin::Payload, later)]) {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        // More than a slice of the drain.
        for extent in 0..120 {
            assert_eq!(cluster.write(leader, extent * 16 * B, &pattern(1, BLOCK)), Status::Ok);
        }
        cluster.agree();
        // The drain has been here when the write is applied, and goes on elsewhere.
        let node = &mut cluster.nodes[leader];
        node.store.apply(Event::Order { id: OrderId(7), order: Order::Drain }, &mut node.mem, &mut node.fx);
        (0..later).for_each(|_| cluster.step());
        let io = cluster.begin(leader, HostOp::Write(Span { offset: 0, len: B }), pattern(2, BLOCK));
        (0..200).for_each(|_| cluster.step());
        assert_eq!(cluster.reply(leader, io), Some(Status::Ok));
        cluster.nodes[leader].mem.host.remove(&io);
        assert!(cluster.nodes[leader].orders.contains_key(&7));
        let in_log_alone = cluster.nodes[leader].store.view().undrained_extents == 1;
        cluster.agree();
        let applied = cluster.applied(leader);
        ruin(&mut cluster.nodes[leader], how);
        (0..3).for_each(|at| cluster.restart(at));
        told += usize::from(in_log_alone && cluster.applied(leader) + 1 == applied);
        let next = cluster.leader();
        assert_eq!(cluster.read(next, 0, B), pattern(2, BLOCK), "{how:?}, {later} turns later");
        cluster.agree();
        assert_eq!(cluster.contents(leader), cluster.contents((leader + 1) % 3), "{how:?}, {later} turns later");
        cluster.audit();
    }
    assert!(told > 0, "no checkpoint was told of a write that it does not cover");
}

#[test]
fn doubt_outlives_crashes_and_checkpoints() {
    for how in [Ruin::Header, Ruin::Payload] {
        let (mut cluster, [leader, has, _]) = one_behind();
        ruin(&mut cluster.nodes[has], how);
        for crash in 0..4 {
            cluster.restart(has);
            assert!(doubtful(&cluster, has), "{how:?}, crash {crash}");
            cluster.pass(30);
            if crash == 2 {
                // The Open batch that names it may be trimmed: the directory says it too.
                cluster.nodes[has].create_other(100);
                cluster.order(has, Order::Drain).unwrap();
            }
        }
        nobody_serves(&mut cluster, 1000);
        cluster.restart(leader);
        let next = cluster.leader();
        assert_eq!(cluster.read(next, 0, B), pattern(2, BLOCK));
        cluster.pass(300);
        assert!(!doubtful(&cluster, has));
        cluster.audit();
        cluster.restart(has);
        assert!(!doubtful(&cluster, has));
    }
}

#[test]
fn deleted_member_in_doubt_asks_nobody_any_more() {
    let (mut cluster, [_, has, _]) = one_behind();
    ruin(&mut cluster.nodes[has], Ruin::Header);
    cluster.restart(has);
    assert!(doubtful(&cluster, has));
    cluster.order(has, Order::Delete { segment: SEGMENT }).unwrap();
    cluster.up[has] = false;
    let node = &mut cluster.nodes[has];
    node.sent.clear();
    (0..100).for_each(|_| node.tick(10));
    assert!(node.sent.is_empty(), "{:?}", node.sent);
}

#[test]
fn torn_end_that_nobody_was_promised_is_dropped_once_all_have_spoken() {
    // Power goes everywhere, each drive's last batch is torn, and nobody else had it.
    for how in [Ruin::Header, Ruin::Payload] {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
        cluster.agree();
        cluster.isolate(leader);
        let io = cluster.begin(leader, HostOp::Write(Span { offset: 0, len: B }), pattern(2, BLOCK));
        cluster.run();
        assert_eq!(cluster.reply(leader, io), None);
        ruin(&mut cluster.nodes[leader], how);
        (0..3).for_each(|at| cluster.restart(at));
        assert!(doubtful(&cluster, leader));
        cluster.cut.clear();
        let next = cluster.leader();
        assert_eq!(cluster.read(next, 0, B), pattern(1, BLOCK));
        cluster.pass(300);
        assert!(!doubtful(&cluster, leader));
        cluster.audit();
    }
}

#[test]
fn rot_known_durable_of_another_entry_at_each_drive_takes_no_entry_with_it() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    for at in 0..6 {
        assert_eq!(cluster.write(leader, at * B, &pattern(at as u8, BLOCK)), Status::Ok);
    }
    cluster.pass(30);
    // The directories know nothing applied: every entry is the group's to decide about.
    for at in 0..3 {
        let bad = batches(&cluster.nodes[at]).into_iter().filter(|batch| batch.blocks > batch.header).nth(at).unwrap();
        cluster.nodes[at].media[(bad.at + bad.header) * BLOCK] ^= 1;
    }
    (0..3).for_each(|at| cluster.restart(at));
    assert!((0..3).all(|at| !doubtful(&cluster, at)));
    let next = cluster.leader();
    cluster.agree();
    for at in 0..6 {
        assert!(cluster.read(next, at * B, B) == pattern(at as u8, BLOCK), "block {at}");
    }
    assert_eq!(cluster.write(next, next as u64 * B, &pattern(77, BLOCK)), Status::Ok);
    assert_eq!(cluster.read(next, next as u64 * B, B), pattern(77, BLOCK));
    cluster.audit();
}

#[test]
fn member_whose_log_lost_whole_batches_is_stopped_for_good_and_the_store_serves() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let victim = (leader + 1) % 3;
    for at in 0..6 {
        assert_eq!(cluster.write(leader, at * B, &pattern(at as u8, BLOCK)), Status::Ok);
    }
    cluster.pass(30);
    // Two headers in a row: neither copy of the first one's descriptors is left.
    let node = &mut cluster.nodes[victim];
    let gone: Vec<usize> = batches(node).iter().filter(|batch| batch.blocks > batch.header).skip(1).take(2).map(|batch| batch.at).collect();
    for at in gone {
        node.media[at * BLOCK + 40] ^= 1;
    }
    node.reopen();
    assert!(matches!(node.store.view().stage, Stage::Fenced(FenceReason::LogLost)));
    node.store = Store::new(StoreConfig { accept_lost_log: true, ..config(&node.label) });
    for life in 0..2 {
        node.run();
        let view = node.store.member_view(node.store.replica_of(SEGMENT).unwrap()).unwrap();
        assert_eq!((node.store.view().stage, view.stopped.is_some()), (Stage::Serving, true), "life {life}");
        node.order(Order::Drain).unwrap();
        // The next life finds nothing lost in its log, and is told by the directory.
        node.store = Store::new(config(&node.label));
    }
    cluster.up[victim] = false;
    assert_eq!(cluster.write(leader, 0, &pattern(9, BLOCK)), Status::Ok);
}

#[test]
fn fenced_drive_opens_with_its_members_stopped() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.write(leader, 0, &pattern(1, BLOCK));
    let node = &mut cluster.nodes[leader];
    node.store = Store::new(StoreConfig { fenced: Some(FenceReason::Drive), ..config(&node.label) });
    node.notices.clear();
    node.run();
    assert!(node.notices.iter().any(|notice| matches!(notice, Notice::GroupStopped { .. })));
    assert_eq!(node.host(HostOp::Read(Span { offset: 0, len: B }), vec![0; BLOCK]).0, Status::NotReady);
}
