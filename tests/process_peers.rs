//! Nodes that are each other's peers: they find each other, notice who goes and comes back, and take no harm from what strangers say.
//! And what that is for: a volume of three replicas keeps what it acknowledged when the node that leads it is killed.
//! Not here: storms of faults (tests/chaos.rs), and what control makes of peers.

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::wait::wait_for;
use penstock::process::dice;
use penstock::process::fleet::{Fleet, Plan};
use penstock::process::hostile::{self, Place};
use penstock::process::house::LIMIT;
use penstock::process::ledger::{End, Ledger};
use penstock::process::paths::{Registers, Tally};
use penstock_api::rpc::{Empty, MetricPoints, MetricsGet, NodeGet, PeerAddress, PeerInfo, PeersSet, PeersSetParams};
use penstock_wire::peer::{Beat, Body, Header, Hello, Kind, PROTOCOL};
use penstock_wire::{ClusterId, Incarnation, NodeId};
use std::time::Duration;

/// What a node says of its peer on another.
fn peer(fleet: &Fleet, at: usize, of: usize) -> PeerInfo {
    let info = fleet.rpc::<NodeGet>(at, &Empty {}).unwrap();
    info.peers.into_iter().find(|peer| peer.node_id == fleet.node_id(of)).expect("it was named")
}

/// The same while it is heard: on a busy machine peers are silent now and then.
fn heard(fleet: &Fleet, at: usize, of: usize) -> PeerInfo {
    wait_for("a peer that is heard", LIMIT, || Ok(Some(peer(fleet, at, of)).filter(|seen| seen.connected))).unwrap()
}

fn pairs(fleet: &Fleet) -> Vec<(usize, usize)> {
    (0..fleet.len()).flat_map(|at| (0..fleet.len()).filter(move |of| *of != at).map(move |of| (at, of))).collect()
}

fn wait_until_connected(fleet: &Fleet) {
    wait_for("all nodes to hear each other", LIMIT, || {
        Ok(pairs(fleet).iter().all(|(at, of)| peer(fleet, *at, *of).connected).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}\n{}", fleet.last_words()));
}

#[test]
fn peers_find_each_other_and_notice_who_goes_and_comes_back() {
    let mut fleet = Fleet::new(Plan::default()).unwrap();
    wait_until_connected(&fleet);
    for (at, of) in pairs(&fleet) {
        let seen = heard(&fleet, at, of);
        assert_eq!((seen.connections, seen.reason.as_deref()), (1, None), "one core each");
        assert_eq!(seen.incarnation, Some(fleet.rpc::<NodeGet>(of, &Empty {}).unwrap().incarnation));
    }
    let before = heard(&fleet, 0, 2).incarnation;
    let others = [0, 1].map(|at| peer(&fleet, at, 1 - at).counters.disconnects);
    fleet.kill(2).unwrap();
    for at in [0, 1] {
        let gone =
            wait_for("the killed node to be missed", LIMIT, || Ok(Some(peer(&fleet, at, 2)).filter(|seen| !seen.connected))).unwrap();
        assert!(gone.reason.is_some(), "{gone:?}");
        assert_eq!(peer(&fleet, at, 1 - at).counters.disconnects, others[at], "the others go on");
    }
    fleet.start(2).unwrap();
    wait_until_connected(&fleet);
    let after = heard(&fleet, 0, 2);
    assert_ne!(after.incarnation, before, "another life of its process");
    assert!(after.counters.connects >= 2 && after.counters.disconnects >= 1, "{after:?}");

    fleet.pause(2, true).unwrap();
    for at in [0, 1] {
        wait_for("the node that stands still to be missed", LIMIT, || Ok((!peer(&fleet, at, 2).connected).then_some(()))).unwrap();
    }
    fleet.pause(2, false).unwrap();
    wait_until_connected(&fleet);
    assert_eq!(heard(&fleet, 0, 2).incarnation, after.incarnation, "it is the same life that went on");

    let metrics = fleet.rpc::<MetricsGet>(0, &Empty {}).unwrap();
    let received = metrics.families.iter().find(|family| family.name == "penstock_peer_frames_received").expect("peers are measured");
    let MetricPoints::Counter(points) = &received.points else { panic!("a counter") };
    assert!(points.len() == 2 && points.iter().all(|point| point.value > 0), "{points:?}");
}

#[test]
fn node_that_is_named_no_peer_any_more_is_let_go_and_taken_up_again() {
    let fleet = Fleet::new(Plan::default()).unwrap();
    wait_until_connected(&fleet);
    let list = |of: &[usize]| PeersSetParams {
        peers: of.iter().map(|at| PeerAddress { node_id: fleet.node_id(*at), address: fleet.peer_address(*at) }).collect(),
    };
    fleet.rpc::<PeersSet>(0, &list(&[0, 1])).unwrap();
    let peers = fleet.rpc::<NodeGet>(0, &Empty {}).unwrap().peers;
    assert_eq!(
        peers.iter().map(|peer| peer.node_id).collect::<Vec<_>>(),
        [fleet.node_id(1)],
        "itself is no peer, and the third is none now"
    );
    wait_for("the third to be cut off", LIMIT, || Ok((!peer(&fleet, 2, 0).connected).then_some(()))).unwrap();
    heard(&fleet, 2, 1);
    fleet.rpc::<PeersSet>(0, &list(&[0, 1, 2])).unwrap();
    wait_until_connected(&fleet);
    let twice = fleet.rpc::<PeersSet>(0, &list(&[1, 1])).unwrap_err();
    assert!(twice.message.contains("twice"), "{twice}");
}

/// A hello as node 1 of the fleet would say it to node 2, but for the key that nobody here has.
fn hello(fleet: &Fleet) -> Hello {
    let cluster = fleet.rpc::<NodeGet>(1, &Empty {}).unwrap().cluster_id.expect("it is claimed");
    Hello {
        oldest: PROTOCOL,
        newest: PROTOCOL,
        cluster: ClusterId(cluster.to_bytes()),
        node: NodeId(fleet.node_id(0).to_bytes()),
        incarnation: Incarnation([9; 16]),
        shard: 0,
        shards: 1,
        to_shard: 0,
        key: 0,
        nonce: [7; 32],
        proof: None,
    }
}

#[test]
fn strangers_at_the_port_for_peers_are_refused_and_harm_nothing() {
    let mut dice = dice("strangers at the port for peers");
    let fleet = Fleet::new(Plan::default()).unwrap();
    wait_until_connected(&fleet);
    let place = Place::Tcp(fleet.peer_address(1));
    let incarnation = fleet.rpc::<NodeGet>(1, &Empty {}).unwrap().incarnation;
    let good = hello(&fleet);
    let frame = |hello: Hello, sequence| Body::Hello(hello).encode(PROTOCOL, sequence);
    let beat = Body::Beat(Beat { incarnation: good.incarnation, count: 1, heard: 0, window: 0, drives: vec![], spaces: vec![] });
    let header = |kind, body_len, payload_blocks| {
        Header { version: PROTOCOL, kind, body_len, body_crc: 0, payload_blocks, sequence: 1 }.encode().to_vec()
    };
    let own = NodeId(fleet.node_id(1).to_bytes());
    let silent: Vec<(&str, Vec<u8>)> = vec![
        ("text", b"GET / HTTP/1.1\r\n\r\n".repeat(40)),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("a beat before any hello", beat.encode(PROTOCOL, 1)),
        ("a body of 4 GiB", header(Kind::Hello, u32::MAX, 0)),
        ("a hello of 256 KiB", header(Kind::Hello, 256 << 10, 0)),
        ("messages of groups from a stranger", header(Kind::Groups, 4, 1024)),
        ("another cluster", frame(Hello { cluster: ClusterId([1; 16]), ..good.clone() }, 1)),
        ("a node that is no peer", frame(Hello { node: NodeId([1; 16]), ..good.clone() }, 1)),
        ("the node itself", frame(Hello { node: own, ..good.clone() }, 1)),
        ("versions that nobody speaks", frame(Hello { oldest: 90, newest: 99, ..good.clone() }, 1)),
        ("a core that is not there", frame(Hello { to_shard: 7, ..good.clone() }, 1)),
        ("a proof at once", frame(Hello { proof: Some([3; 32]), ..good.clone() }, 1)),
        ("a sequence from 2", frame(good.clone(), 2)),
    ];
    for (what, bytes) in silent {
        let echo = hostile::say(place, &bytes, false, LIMIT).unwrap();
        assert!(echo.is_closed && echo.heard.is_empty(), "{what}: {echo:?}");
    }
    // A hello that is right is answered, and a proof that is not ends it.
    for (what, second) in [
        ("no proof", frame(good.clone(), 2)),
        ("a wrong proof", frame(Hello { proof: Some([3; 32]), ..good.clone() }, 2)),
        ("another hello with a proof", frame(Hello { nonce: [8; 32], proof: Some([3; 32]), ..good.clone() }, 2)),
        ("a beat instead of the proof", beat.encode(PROTOCOL, 2)),
        ("nothing", Vec::new()),
    ] {
        let echo = hostile::say(place, &[frame(good.clone(), 1), second].concat(), false, LIMIT).unwrap();
        assert!(echo.is_closed, "{what}: {echo:?}");
        // What came after it may have ended the connection before the answer was on its way.
        if what == "nothing" || !echo.heard.is_empty() {
            let first = Header::decode(&echo.heard).unwrap();
            assert_eq!((first.kind, first.sequence), (Kind::Hello, 1), "{what}");
        }
    }
    let right = [frame(good.clone(), 1), frame(Hello { proof: Some([3; 32]), ..good }, 2), beat.encode(PROTOCOL, 3)].concat();
    for _ in 0..60 {
        let bytes = hostile::mutate(&right, &mut dice);
        hostile::say(place, &bytes, true, LIMIT).unwrap();
    }
    let idle = hostile::idlers(place, 200, b"PENS").unwrap();
    wait_until_connected(&fleet);
    drop(idle);
    let after = fleet.rpc::<NodeGet>(1, &Empty {}).unwrap();
    assert_eq!(after.incarnation, incarnation, "the process lives");
    assert!(after.peers.iter().all(|peer| peer.counters.disconnects == 0), "no peer was disturbed: {:?}", after.peers);
}

/// What a host is told on a path that does not serve: to try another (path related, asymmetric access inaccessible).
const INACCESSIBLE: Refusal = Refusal { code_type: 3, code: 2 };

#[test]
fn hosts_paths_follow_the_leader_and_old_connections_to_it_end() {
    let fleet = Fleet::new(Plan::default()).unwrap();
    wait_until_connected(&fleet);
    let leader = fleet.wait_for_leader().unwrap();
    let doors = fleet.doors();
    let mut lines: Vec<Namespace> = doors.iter().map(|door| door.connect().unwrap()).collect();
    wait_for("the leader's path to serve", LIMIT, || Ok(lines[leader].try_write(0, &[7; 4096])?.ok())).unwrap();
    let others = |leader: usize| (0..doors.len()).filter(move |at| *at != leader);
    for at in others(leader) {
        assert_eq!(lines[at].try_read(0, 4096).unwrap(), Err(INACCESSIBLE), "node {} does not lead", at + 1);
    }
    let next = others(leader).next().expect("there are three");
    fleet.transfer(next).unwrap();
    // The same connection, to a node that has come to lead.
    let read = wait_for("the new leader's path to serve", LIMIT, || Ok(lines[next].try_read(0, 4096)?.ok())).unwrap();
    assert_eq!(read, [7; 4096]);
    // What was sent on a connection of the old leader's time is not to take effect when it leads again.
    wait_for("the old leader's connection to end", LIMIT, || Ok(lines[leader].try_read(0, 4096).is_err().then_some(()))).unwrap();
    let mut again = doors[leader].connect().unwrap();
    assert_eq!(again.try_write(0, &[8; 4096]).unwrap(), Err(INACCESSIBLE));
    fleet.transfer(leader).unwrap();
    let read = wait_for("the first leader's path to serve again", LIMIT, || Ok(again.try_read(0, 4096)?.ok())).unwrap();
    assert_eq!(read, [7; 4096]);
}

#[test]
fn volume_of_three_replicas_keeps_what_it_acknowledged_when_its_leader_is_killed() {
    let mut dice = dice("the leader killed under writes");
    let plan = Plan::default();
    let mut ledger = Ledger::new(dice.roll(), plan.volume.bytes());
    let mut fleet = Fleet::new(plan).unwrap();
    let leader = fleet.wait_for_leader().unwrap();
    let doors = fleet.doors();
    let moment = Duration::from_micros(dice.below(300_000));
    let kill = |progress: &penstock::process::ledger::Progress| {
        wait_for("acknowledged writes", LIMIT, || Ok((progress.acknowledged() >= 100).then_some(()))).unwrap();
        std::thread::sleep(moment);
        fleet.kill(leader)
    };
    let (killed, ends, acknowledged) = ledger.work_while(doors[leader].address, &doors[leader].nqn, kill).unwrap();
    killed.unwrap();
    assert!(ends.iter().all(|end| matches!(end, End::Cut(_))), "{ends:?}");
    let next = fleet.wait_for_leader().unwrap();
    assert_ne!(next, leader);
    let verified = ledger.expect_good(doors[next].address, &doors[next].nqn).unwrap();
    println!("{acknowledged} acknowledged by node {}, {verified:?} at node {}", leader + 1, next + 1);
}

/// How often leaders on a node handed over since their drives were slow.
fn stepped_aside(fleet: &Fleet, at: usize) -> u64 {
    let metrics = fleet.rpc::<MetricsGet>(at, &Empty {}).unwrap();
    let family = metrics.families.iter().find(|family| family.name == "penstock_store_stepped_aside").expect("stores are measured");
    let MetricPoints::Counter(points) = &family.points else { panic!("a counter") };
    points.iter().map(|point| point.value).sum()
}

#[test]
fn leader_whose_drive_becomes_slow_hands_over_and_hosts_go_on_at_the_next_one() {
    const SLOW: usize = 0;
    let mut dice = dice("a leader's drive becomes slow");
    let plan = Plan { delayed: Some(SLOW), memory: 1024, ..Plan::default() };
    let mut registers = Registers::new(dice.roll(), plan.volume.bytes(), 4);
    let fleet = Fleet::new(plan).unwrap();
    fleet.transfer(SLOW).unwrap();
    let (doors, tally) = (fleet.doors(), Tally::default());
    let more = |count: u64| {
        let before = tally.answered();
        wait_for("answers", LIMIT, || Ok((tally.answered() >= before + count).then_some(())))
    };
    let worked = registers.work_while(&doors, &tally, |_| {
        more(300)?;
        assert_eq!((fleet.leader(), stepped_aside(&fleet, SLOW)), (Some(SLOW), 0), "its drive is well yet");
        // Far more than its followers take where everything is slow, since others want the machine too.
        fleet.delay(Duration::from_millis(400))?;
        let next = wait_for("another to lead", LIMIT, || Ok(fleet.leader().filter(|at| *at != SLOW)))?;
        more(1000)?;
        assert_ne!(fleet.leader(), Some(SLOW), "it is not given back");
        Ok(next)
    });
    let next = worked.unwrap_or_else(|e| panic!("{e}\n{}", fleet.last_words()));
    println!("node {} led after node {}", next + 1, SLOW + 1);
    assert_eq!(stepped_aside(&fleet, SLOW), 1, "{}", fleet.last_words());
    fleet.delay(Duration::ZERO).unwrap();
    fleet.wait_until_equal().unwrap();
    for (at, door) in doors.iter().enumerate() {
        fleet.transfer(at).unwrap();
        registers.verify(door).unwrap_or_else(|e| panic!("node {}: {e}\n{}", at + 1, fleet.last_words()));
    }
}

#[test]
fn sigterm_to_a_leader_without_its_majority_answers_what_is_held_and_leaves() {
    let mut dice = dice("SIGTERM without a majority");
    let plan = Plan::default();
    let mut ledger = Ledger::new(dice.roll(), plan.volume.bytes());
    let mut fleet = Fleet::new(plan).unwrap();
    let leader = fleet.wait_for_leader().unwrap();
    let doors = fleet.doors();
    let others: Vec<usize> = (0..fleet.len()).filter(|at| *at != leader).collect();
    let stop = |progress: &penstock::process::ledger::Progress| {
        wait_for("acknowledged writes", LIMIT, || Ok((progress.acknowledged() >= 100).then_some(()))).unwrap();
        others.iter().try_for_each(|at| fleet.kill(*at))?;
        // Writes that are on their way now are held: nobody acknowledges them.
        fleet.stop(leader)
    };
    let (stopped, ends, acknowledged) = ledger.work_while(doors[leader].address, &doors[leader].nqn, stop).unwrap();
    stopped.unwrap();
    for end in &ends {
        let is_fine = matches!(end, End::Cut(_)) || matches!(end, End::Refused(refusal) if refusal.code_type == 3);
        assert!(is_fine, "{ends:?}");
    }
    let words = fleet.last_words();
    assert!(words.contains("penstockd has stopped") && !words.contains("stopping takes too long"), "it left by its own end: {words}");
    for at in 0..fleet.len() {
        fleet.start(at).unwrap();
    }
    let next = fleet.wait_for_leader().unwrap();
    let verified = ledger.expect_good(doors[next].address, &doors[next].nqn).unwrap();
    println!("{acknowledged} acknowledged, {verified:?}");
}
