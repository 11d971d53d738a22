//! NVMe reservations and compare-and-write over NVMe/TCP, of hosts that come through any of three nodes: the same on all of them, whoever leads, and after
//! kill -9 of each and of all. Not here: every case of the specification (penstock-engine's own tests).

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::wait::wait_for;
use penstock::process::fleet::{Fleet, Plan};
use penstock::process::house::LIMIT;
use std::time::Duration;

const REGISTER: u8 = 0x0d;
const ACQUIRE: u8 = 0x11;
const RELEASE: u8 = 0x15;
const WRITE_EXCLUSIVE: u32 = 1 << 8;
const PREEMPT_AND_ABORT: u32 = 2;
const CLEAR: u32 = 1;
const CONFLICT: Refusal = Refusal { code_type: 0, code: 0x83 };
const INVALID_FIELD: Refusal = Refusal { code_type: 0, code: 0x02 };
const NOT_CHANGEABLE: Refusal = Refusal { code_type: 1, code: 0x0e };
const COMPARE_FAILURE: Refusal = Refusal { code_type: 2, code: 0x85 };

const ONE: [u8; 16] = [0x11; 16];
const TWO: [u8; 16] = [0x22; 16];
const KEYS: [u64; 2] = [0x1111, 0x2222];

/// A host at a node's door, as soon as the volume is served there.
fn host(fleet: &Fleet, at: usize, id: [u8; 16]) -> Namespace {
    let door = fleet.doors().swap_remove(at);
    let connected = wait_for("the volume to be served at the door", LIMIT, || {
        let namespace = Namespace::connect_as(door.address, &door.nqn, id, Duration::from_secs(10));
        // A host that was not ended with a leader before it, and reads.
        Ok(namespace.ok().and_then(|mut namespace| namespace.try_read(0, 512).ok()?.ok().map(|_| namespace)))
    });
    connected.unwrap_or_else(|e| panic!("{e}\n{}", fleet.last_words()))
}

fn report(host: &mut Namespace) -> Vec<u8> {
    host.report(256).unwrap().unwrap()
}

#[test]
fn reservation_is_the_same_on_every_node_and_lasts_through_kills_of_each_and_all() {
    let mut fleet = Fleet::new(Plan::default()).unwrap();
    let first = fleet.wait_for_leader().unwrap();
    let (mut one, mut two) = (host(&fleet, first, ONE), host(&fleet, first, TWO));
    let told = one.identify().unwrap();
    assert_eq!((told.optional_commands & 1 << 5, told.reservations), (1 << 5, 0xff), "reservations of all types, lasting");
    assert_eq!(one.feature(0x83, None).unwrap(), Ok(1), "they last through a loss of power");
    assert_eq!(one.feature(0x83, Some(0)).unwrap(), Err(NOT_CHANGEABLE));
    assert_eq!(one.feature(0x83, Some(1)).unwrap().map(drop), Ok(()));
    assert_eq!(one.feature(0x82, None).unwrap(), Ok(0xe), "and nobody is notified");

    for (host, key) in [(&mut one, KEYS[0]), (&mut two, KEYS[1])] {
        assert_eq!(host.reserve(REGISTER, 2 << 30, &[0, key]).unwrap(), Err(INVALID_FIELD), "to be forgotten cannot be asked for");
        assert_eq!(host.reserve(REGISTER, 3 << 30, &[0, key]).unwrap(), Ok(()));
    }
    assert_eq!(one.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[KEYS[0], 0]).unwrap(), Ok(()));
    assert_eq!(two.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[KEYS[1], 0]).unwrap(), Err(CONFLICT));
    assert_eq!(two.try_write(0, &[2; 512]).unwrap(), Err(CONFLICT));
    assert_eq!(two.try_zero(0, 512).unwrap(), Err(CONFLICT));
    assert_eq!(two.try_discard(0, 512).unwrap(), Err(CONFLICT));
    assert_eq!(two.compare_and_write(0, &[0; 512], &[2; 512]).unwrap(), Err(CONFLICT));
    assert_eq!(one.try_write(0, &[1; 512]).unwrap(), Ok(()));
    assert_eq!(two.try_read(0, 512).unwrap(), Ok(vec![1; 512]));
    let state = report(&mut two);
    assert_eq!((state[0], state[4], state[5], state[9], state[64 + 2], state[128 + 2]), (2, 1, 2, 1, 1, 0));
    assert_eq!((&state[80..96], &state[144..160]), (&ONE[..], &TWO[..]));

    fleet.kill(first).unwrap();
    let second = wait_for("another leader", LIMIT, || Ok(fleet.leader().filter(|at| *at != first))).unwrap();
    let (mut one, mut two) = (host(&fleet, second, ONE), host(&fleet, second, TWO));
    assert_eq!(report(&mut one), state);
    assert_eq!(two.try_write(0, &[2; 512]).unwrap(), Err(CONFLICT));
    assert_eq!(one.try_write(512, &[3; 512]).unwrap(), Ok(()));
    fleet.start(first).unwrap();
    fleet.wait_until_equal().unwrap();

    for at in 0..3 {
        fleet.kill(at).unwrap();
    }
    for at in 0..3 {
        fleet.start(at).unwrap();
    }
    fleet.wait_for_leader().unwrap();
    fleet.wait_until_equal().unwrap();
    for at in 0..3 {
        fleet.transfer(at).unwrap();
        let mut two = host(&fleet, at, TWO);
        assert_eq!(report(&mut two), state, "at node {}", at + 1);
        assert_eq!(two.try_write(0, &[2; 512]).unwrap(), Err(CONFLICT));
    }

    let last = fleet.wait_for_leader().unwrap();
    let (mut one, mut two) = (host(&fleet, last, ONE), host(&fleet, last, TWO));
    assert_eq!(two.reserve(ACQUIRE, PREEMPT_AND_ABORT | WRITE_EXCLUSIVE, &[KEYS[1], KEYS[0]]).unwrap(), Ok(()));
    assert_eq!(one.try_write(0, &[4; 512]).unwrap(), Err(CONFLICT), "its right was taken away");
    assert_eq!(one.reserve(RELEASE, CLEAR, &[KEYS[0]]).unwrap(), Err(CONFLICT), "and its key");
    assert_eq!(two.try_write(0, &[5; 512]).unwrap(), Ok(()));
    fleet.transfer((last + 1) % 3).unwrap();
    let (mut one, mut two) = (host(&fleet, (last + 1) % 3, ONE), host(&fleet, (last + 1) % 3, TWO));
    assert_eq!(one.try_read(0, 512).unwrap(), Ok(vec![5; 512]));
    assert_eq!(one.try_write(0, &[6; 512]).unwrap(), Err(CONFLICT));
    assert_eq!(two.reserve(RELEASE, CLEAR, &[KEYS[1]]).unwrap(), Ok(()));
    assert_eq!(one.try_write(0, &[6; 512]).unwrap(), Ok(()), "free for all again");
}

#[test]
fn compare_and_write_decides_alike_before_and_after_a_change_of_leader() {
    let mut fleet = Fleet::new(Plan::default()).unwrap();
    let first = fleet.wait_for_leader().unwrap();
    let mut one = host(&fleet, first, ONE);
    one.write(4096, &[1; 4096]).unwrap();
    let part = 4096 + 512;
    assert_eq!(one.compare_and_write(part, &[9; 512], &[2; 512]).unwrap(), Err(COMPARE_FAILURE));
    assert_eq!(one.try_read(part, 512).unwrap(), Ok(vec![1; 512]), "nothing was written");
    assert_eq!(one.compare_and_write(part, &[1; 512], &[2; 512]).unwrap(), Ok(()));
    assert_eq!(one.compare_and_write(part, &[1; 512], &[3; 512]).unwrap(), Err(COMPARE_FAILURE), "once");
    fleet.kill(first).unwrap();
    let second = wait_for("another leader", LIMIT, || Ok(fleet.leader().filter(|at| *at != first))).unwrap();
    let mut one = host(&fleet, second, ONE);
    assert_eq!(one.compare_and_write(part, &[1; 512], &[3; 512]).unwrap(), Err(COMPARE_FAILURE), "what was swapped stays swapped");
    assert_eq!(one.compare_and_write(part, &[2; 512], &[3; 512]).unwrap(), Ok(()));
    assert_eq!(one.try_read(4096, 1536).unwrap(), Ok([[1; 512], [3; 512], [1; 512]].concat()));
    fleet.start(first).unwrap();
    fleet.wait_until_equal().unwrap();
    fleet.transfer(first).unwrap();
    let mut one = host(&fleet, first, ONE);
    assert_eq!(one.compare_and_write(part, &[2; 512], &[4; 512]).unwrap(), Err(COMPARE_FAILURE));
    assert_eq!(one.compare_and_write(part, &[3; 512], &[4; 512]).unwrap(), Ok(()));
}
