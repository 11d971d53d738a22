//! Reservations: kept by the log, the same at every member, and never decided by what may yet be lost.

use crate::bench::{Bench, SEGMENT, pattern};
use crate::group::cluster::Cluster;
use penstock_engine::*;
use penstock_wire::reservation::ReservationKind::{self, *};
use penstock_wire::reservation::Reservations;
use penstock_wire::*;

const B: u64 = BLOCK as u64;
const ONE: HostId = HostId([1; 16]);
const TWO: HostId = HostId([2; 16]);
const NOBODY: HostId = HostId([0; 16]);

fn write(block: u64) -> HostOp {
    HostOp::Write(Span { offset: block * B, len: B })
}

fn reserve(what: Reserve) -> HostOp {
    HostOp::Reserve(what)
}

fn acquire(kind: ReservationKind) -> HostOp {
    reserve(Reserve::Acquire { key: 1, kind })
}

fn preempt() -> HostOp {
    reserve(Reserve::Preempt { key: 2, victim: 1, kind: WriteExclusive })
}

/// A single volume of which host one holds the right to write, and two is registered.
fn held() -> Bench {
    let mut bench = Bench::new();
    bench.create(1000);
    for (host, key) in [(ONE, 1), (TWO, 2)] {
        assert_eq!(ask(&mut bench, host, reserve(Reserve::Register { new: key })), Status::Ok);
    }
    assert_eq!(ask(&mut bench, ONE, acquire(WriteExclusive)), Status::Ok);
    bench
}

fn ask(bench: &mut Bench, host: HostId, op: HostOp) -> Status {
    bench.host = host;
    let len = op.span().map_or(0, |span| span.len as usize);
    bench.host(op, pattern(9, len)).0
}

fn state(bench: &Bench) -> Reservations {
    *bench.store.reservations(bench.store.replica_of(SEGMENT).unwrap()).unwrap_or_default()
}

#[test]
fn reservation_keeps_out_who_has_no_right_and_lasts_in_the_log_and_in_a_checkpoint() {
    let mut bench = held();
    for life in 0..3 {
        assert_eq!(ask(&mut bench, TWO, write(0)), Status::Conflict, "life {life}");
        assert_eq!(ask(&mut bench, NOBODY, write(0)), Status::Conflict);
        assert_eq!(ask(&mut bench, NOBODY, HostOp::Zero(Span { offset: 0, len: B })), Status::Conflict);
        assert_eq!(ask(&mut bench, NOBODY, HostOp::Read(Span { offset: 0, len: B })), Status::Ok);
        assert_eq!(ask(&mut bench, ONE, write(0)), Status::Ok);
        assert_eq!(bench.store.view().counters.host_conflicts, 3);
        if life == 1 {
            bench.order(Order::Drain).unwrap();
        }
        bench.reopen();
    }
    assert_eq!(ask(&mut bench, ONE, reserve(Reserve::Clear { key: 1 })), Status::Ok);
    assert_eq!((state(&bench).generation, state(&bench).registrants.len()), (3, 0));
    assert_eq!(ask(&mut bench, NOBODY, write(0)), Status::Ok);
    bench.audit();
}

#[test]
fn volume_that_nobody_registered_with_says_so_and_keeps_nobody_out() {
    let mut bench = Bench::new();
    bench.create(1000);
    assert_eq!(bench.store.reservations(ReplicaNo(0)), None);
    let (status, bytes) = bench.host(reserve(Reserve::Report { len: 64 }), vec![0xcc; 64]);
    assert_eq!((status, &bytes[..10]), (Status::Invalid, &[0xcc; 10][..]), "of a host without a name");
    bench.host = ONE;
    let (status, bytes) = bench.host(reserve(Reserve::Report { len: 64 }), vec![0xcc; 64]);
    assert_eq!((status, &bytes[..]), (Status::Ok, &[[0; 9].as_slice(), &[1], &[0; 54]].concat()[..]));
    assert_eq!(ask(&mut bench, TWO, write(0)), Status::Ok);
}

#[test]
fn report_tells_what_is_applied_cut_to_what_was_asked_for() {
    let mut bench = held();
    bench.host = TWO;
    let (status, bytes) = bench.host(reserve(Reserve::Report { len: 1000 }), vec![0xcc; 1000]);
    assert_eq!((status, bytes[0], bytes[4], bytes[5], bytes[64 + 2], bytes[128 + 2]), (Status::Ok, 2, 1, 2, 1, 0));
    assert!(bytes[192..].iter().all(|byte| *byte == 0));
    let (status, short) = bench.host(reserve(Reserve::Report { len: 68 }), vec![0xcc; 68]);
    assert_eq!((status, &short[..]), (Status::Ok, &bytes[..68]));
}

#[test]
fn write_that_was_let_in_and_not_proposed_before_a_preempt_is_refused() {
    let mut bench = held();
    bench.host = ONE;
    let io = bench.begin(write(0), pattern(1, BLOCK));
    bench.host = TWO;
    let preempt = bench.begin(preempt(), Vec::new());
    let later = bench.begin(write(1), pattern(2, BLOCK));
    bench.run();
    assert_eq!(bench.replies[&preempt], Status::Ok);
    assert_eq!(bench.replies[&io], Status::Conflict, "in the log it would stand behind the change");
    assert_eq!(bench.replies[&later], Status::Ok, "decided by what the change made");
    assert_eq!(bench.read(0, B), vec![0; BLOCK]);
}

#[test]
fn merge_that_finds_a_change_on_its_way_is_decided_by_what_becomes_of_it() {
    for (by, outcome) in [(ONE, Status::Conflict), (TWO, Status::Ok)] {
        let mut bench = held();
        if by == TWO {
            assert_eq!(ask(&mut bench, ONE, reserve(Reserve::Release { key: 1, kind: WriteExclusive })), Status::Ok);
        }
        bench.host = by;
        let first = pattern(3, BLOCK);
        assert_eq!(bench.write(0, &first), Status::Ok);
        let part = bench.begin(HostOp::Write(Span { offset: 512, len: 512 }), vec![7; 512]);
        // The block is being read when the change is proposed.
        bench.store.settle(&mut bench.mem, &mut bench.fx);
        assert!(bench.fx.list.iter().any(|effect| matches!(effect, Effect::Disk(op) if op.kind == DiskKind::Read)));
        bench.host = TWO;
        let change = bench.begin(preempt(), Vec::new());
        bench.run();
        assert_eq!((bench.replies[&change], bench.replies[&part]), (Status::Ok, outcome));
        let mut expected = first;
        if outcome == Status::Ok {
            expected[512..1024].fill(7);
        }
        assert_eq!(bench.read(0, B), expected);
        bench.host = TWO;
        assert_eq!(bench.write(0, &[1; 512]), Status::Ok, "nothing stays locked");
    }
}

#[test]
fn change_behind_a_change_waits_for_it() {
    let mut bench = held();
    let ios: Vec<u32> = [(TWO, preempt()), (TWO, preempt()), (ONE, reserve(Reserve::Register { new: 5 }))]
        .into_iter()
        .map(|(host, op)| {
            bench.host = host;
            bench.begin(op, Vec::new())
        })
        .collect();
    bench.run();
    let replies: Vec<Status> = ios.iter().map(|io| bench.replies[io]).collect();
    assert_eq!(replies, [Status::Ok, Status::Conflict, Status::Ok], "nobody has key 1 any more");
    assert_eq!(state(&bench).generation, 4);
}

fn ask_at(cluster: &mut Cluster, at: usize, host: HostId, op: HostOp) -> Status {
    cluster.nodes[at].host = host;
    let len = op.span().map_or(0, |span| span.len as usize);
    let status = cluster.host(at, op, pattern(9, len)).0;
    cluster.nodes[at].host = NOBODY;
    status
}

/// A group of three of which host one holds the right to write, and two is registered.
fn held_by_group() -> (Cluster, usize) {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    for (host, key) in [(ONE, 1), (TWO, 2)] {
        assert_eq!(ask_at(&mut cluster, leader, host, reserve(Reserve::Register { new: key })), Status::Ok);
    }
    assert_eq!(ask_at(&mut cluster, leader, ONE, acquire(WriteExclusive)), Status::Ok);
    (cluster, leader)
}

#[test]
fn next_leader_has_the_same_reservations_and_so_has_everyone_after_restarts() {
    let (mut cluster, first) = held_by_group();
    cluster.kill(first);
    let next = cluster.leader();
    assert_eq!(ask_at(&mut cluster, next, TWO, write(0)), Status::Conflict);
    assert_eq!(ask_at(&mut cluster, next, TWO, preempt()), Status::Ok);
    assert_eq!(ask_at(&mut cluster, next, TWO, write(0)), Status::Ok);
    cluster.restart(first);
    cluster.agree();
    for round in 0..2 {
        let states: Vec<Reservations> = cluster.nodes.iter().map(state).collect();
        assert_eq!((states[0].generation, states[0].held), (3, Some((WriteExclusive, Some(TWO)))));
        assert!(states.iter().all(|other| *other == states[0]), "round {round}: {states:?}");
        for at in 0..3 {
            if round == 0 {
                cluster.order(at, Order::Drain).unwrap();
            }
            cluster.restart(at);
        }
        cluster.leader();
        cluster.agree();
    }
    let leader = cluster.leader();
    assert_eq!(ask_at(&mut cluster, leader, ONE, write(0)), Status::Conflict);
    cluster.audit();
}

#[test]
fn leader_that_is_cut_off_refuses_nobody_for_reservations_that_may_be_gone() {
    let (mut cluster, old) = held_by_group();
    cluster.isolate(old);
    cluster.nodes[old].host = TWO;
    let stale = cluster.begin(old, write(0), pattern(1, BLOCK));
    let report = cluster.begin(old, reserve(Reserve::Report { len: 64 }), vec![0; 64]);
    cluster.pass(50);
    assert_eq!((cluster.reply(old, stale), cluster.reply(old, report)), (None, None), "it cannot prove that it leads");
    cluster.pass(1500);
    let new = cluster.leader();
    assert_ne!(new, old);
    assert_eq!(ask_at(&mut cluster, new, ONE, reserve(Reserve::Clear { key: 1 })), Status::Ok);
    assert_eq!((cluster.reply(old, stale), cluster.reply(old, report)), (Some(Status::NotReady), Some(Status::NotReady)));
}

#[test]
fn change_that_is_not_committed_decides_nothing_and_is_gone_with_its_leader() {
    let (mut cluster, old) = held_by_group();
    cluster.isolate(old);
    cluster.nodes[old].host = TWO;
    let change = cluster.begin(old, preempt(), Vec::new());
    let behind = cluster.begin(old, write(0), pattern(1, BLOCK));
    cluster.nodes[old].host = ONE;
    let other = cluster.begin(old, write(1), pattern(1, BLOCK));
    cluster.pass(50);
    assert!([change, behind, other].iter().all(|io| cluster.reply(old, *io).is_none()));
    cluster.pass(1500);
    let new = cluster.leader();
    assert_ne!(new, old);
    assert_eq!(ask_at(&mut cluster, new, ONE, write(2)), Status::Ok, "it still holds");
    assert!([change, behind, other].iter().all(|io| cluster.reply(old, *io) == Some(Status::NotReady)));
    cluster.cut.clear();
    cluster.pass(500);
    cluster.agree();
    assert!(cluster.nodes.iter().all(|node| state(node).held == Some((WriteExclusive, Some(ONE)))));
    // And the old one takes changes again once it leads again.
    let (new, to) = (cluster.leader(), cluster.view(old).me);
    cluster.order(new, Order::Transfer { segment: SEGMENT, to }).unwrap();
    cluster.pass(200);
    assert_eq!(cluster.leader(), old);
    assert_eq!(ask_at(&mut cluster, old, TWO, preempt()), Status::Ok);
    [change, behind, other].iter().for_each(|io| drop(cluster.nodes[old].mem.host.remove(io)));
    cluster.audit();
}
