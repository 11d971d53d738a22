//! Volumes that share a log: one of them must not keep another from what brings it on.

use super::B;
use super::cluster::{Cluster, members, shape};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::peer::MessageBody;
use penstock_wire::*;

const OTHER: SegmentId = SegmentId([7; 16]);

fn is_answer_of_first(word: &PeerWord) -> bool {
    matches!(word, PeerWord::Group(message) if message.segment == SEGMENT && matches!(message.body, MessageBody::Appended { .. }))
}

fn is_of_first(word: &PeerWord) -> bool {
    matches!(word, PeerWord::Group(message) if message.segment == SEGMENT)
}

/// The leader's log is larger than the other's, which is filled by what others lead.
#[test]
fn entry_that_waits_for_a_leader_of_its_volume_is_brought_on_though_another_volume_filled_the_log() {
    let mut cluster = Cluster::with_rings(&[8192, 2048, 2048]);
    for at in 0..3 {
        let shape = ReplicaShape { volume: VolumeId([7; 16]), segment: OTHER, ..shape(at as u8 + 1) };
        cluster.order(at, Order::CreateMember { shape: Box::new(shape), members: Box::new(members(3)) }).unwrap();
    }
    let (large, small) = (0, 1);
    for segment in [SEGMENT, OTHER] {
        cluster.about(segment);
        let leader = cluster.leader();
        if leader != large {
            let to = penstock_wire::peer::MemberNo(1);
            cluster.order(leader, Order::Transfer { segment, to }).unwrap();
            assert_eq!(cluster.leader(), large);
        }
    }
    cluster.kill(2);
    // The first volume's entries: one that both have and nobody knows to be committed, and more that the leader alone has.
    cluster.about(SEGMENT);
    cluster.lose = is_answer_of_first;
    let begun = |cluster: &mut Cluster, at: u64| {
        cluster.begin(large, HostOp::Write(Span { offset: at * 16 * B, len: 16 * B }), pattern(at as u8, 16 * BLOCK));
        cluster.run();
    };
    begun(&mut cluster, 0);
    cluster.lose = is_of_first;
    (1..4).for_each(|at| begun(&mut cluster, at));
    cluster.pass(2000);
    // It has no leader, and the second volume is written until the smaller log takes no more.
    cluster.about(OTHER);
    assert_eq!(cluster.leader(), large);
    let write = |cluster: &mut Cluster, seed: u64| {
        let io = cluster.begin(large, HostOp::Write(Span { offset: seed % 10 * 16 * B, len: 16 * B }), pattern(seed as u8, 16 * BLOCK));
        cluster.pass(200);
        (io, cluster.reply(large, io))
    };
    let waits = (0..400).map(|seed| write(&mut cluster, seed)).find(|(_, reply)| reply.is_none());
    let (waits, _) = waits.expect("the log is full some time");
    // Everybody hears everybody again.
    cluster.lose = |_| false;
    cluster.about(SEGMENT);
    assert_eq!(cluster.leader(), large);
    cluster.agree_among(&[large, small]);
    assert_eq!(cluster.read(large, 3 * 16 * B, 16 * B), pattern(3, 16 * BLOCK));
    cluster.about(OTHER);
    cluster.pass(1000);
    assert_eq!(cluster.reply(large, waits), Some(Status::Ok));
    cluster.restart(2);
    cluster.audit();
}
