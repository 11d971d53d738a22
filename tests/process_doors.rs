//! Wrong things said to a node's front doors: NVMe/TCP, vhost-user and vfio-user. The one who says them is answered by the
//! right status or cut off; the node and everybody else's I/O go on. Guests' rings are the guest tests' part.

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::process::dice;
use penstock::process::hostile::{Place, idlers, say, vfio_user_ask_and_go, vfio_user_lets_in, wrong_vfio_user, wrong_vhost};
use penstock::process::house::{House, LIMIT};
use penstock::process::ledger::{End, Ledger};
use penstock::process::nvme::{greeting, wrong_conversations};
use penstock::process::witness::Witness;
use std::path::PathBuf;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_millis(60);
const MIB: u64 = 1 << 20;

fn house_with_witness() -> (House, Witness) {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "128MiB", "--oplog 8MiB");
    let witness = Witness::new(&mut house);
    (house, witness)
}

#[test]
fn nvme_tcp_wrong_conversations_end_alone_while_others_write() {
    let mut dice = dice("NVMe/TCP conversations");
    let (mut house, mut witness) = house_with_witness();
    let good = house.add_volume("busy", "8MiB", 512);
    let door = witness.door().clone();
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let list = wrong_conversations(&door.nqn, &mut dice);
    let said = list.len();
    let (looked, ends, acknowledged) = ledger
        .work_while(good.address, &good.nqn, |_| {
            for (deed, bytes) in &list {
                for end in [false, true] {
                    say(Place::Tcp(door.address), bytes, end, PATIENCE).map_err(|e| format!("{deed}: {e}"))?;
                }
                witness.look(&mut house, deed).map_err(|e| e.to_string())?;
            }
            Ok::<_, String>(())
        })
        .unwrap();
    looked.unwrap();
    assert_eq!(ends, [End::Told, End::Told, End::Told, End::Told]);
    println!("{said} conversations, twice each; {acknowledged} writes of others acknowledged meanwhile");
    ledger.expect_good(good.address, &good.nqn).unwrap();
}

#[test]
fn nvme_tcp_flood_of_connections_is_survived() {
    let (mut house, mut witness) = house_with_witness();
    let place = Place::Tcp(witness.door().address);
    for (deed, first) in [("100 silent connections", Vec::new()), ("100 that greet and say no more", greeting())] {
        let held = idlers(place, 100, &first).unwrap();
        witness.look(&mut house, deed).unwrap();
        drop(held);
        witness.look(&mut house, "they have gone").unwrap();
    }
    // Associations that are whole and then just dropped.
    for _ in 0..50 {
        drop(witness.door().connect().unwrap());
    }
    witness.look(&mut house, "50 associations dropped").unwrap();
    // And connections that come and go at once.
    for _ in 0..200 {
        drop(idlers(place, 1, &[]).unwrap());
    }
    witness.look(&mut house, "200 connections that went at once").unwrap();
}

/// The witness is judged: it has to notice a node that is gone, one that is another, and content that is not its own.
#[test]
fn witness_notices_what_it_is_there_to_notice() {
    let (mut house, mut witness) = house_with_witness();
    witness.look(&mut house, "nothing").unwrap();
    witness.door().connect().unwrap().write(0, &[0xee; 4096]).unwrap();
    let error = witness.look(&mut house, "a write of somebody else's").unwrap_err().to_string();
    assert!(error.contains("does not hold what write 0"), "{error}");
    house.kill_node().unwrap();
    assert!(witness.look(&mut house, "a kill").is_err());
    house.start_node().unwrap();
    house.wait_for_door("witness").unwrap();
    let error = witness.look(&mut house, "a restart").unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
}

fn entry(opcode: u8, nsid: u32, start: u64, blocks: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[4..8].copy_from_slice(&nsid.to_le_bytes());
    entry[40..48].copy_from_slice(&start.to_le_bytes());
    entry[48..52].copy_from_slice(&(blocks - 1).to_le_bytes());
    entry
}

#[test]
fn nvme_commands_that_cannot_be_get_the_right_status_and_the_queue_goes_on() {
    let (mut house, mut witness) = house_with_witness();
    let mut line: Namespace = witness.door().connect().unwrap();
    let blocks = line.size() / 4096;
    const GENERIC: u8 = 0;
    let refused = |code| Some(Refusal { code_type: GENERIC, code });
    let (invalid_opcode, invalid_namespace, out_of_range) = (refused(0x01), refused(0x0b), refused(0x80));
    const ZEROES: u8 = 8;
    for (deed, entry, status) in [
        ("Write Zeroes at the end", entry(ZEROES, 1, blocks - 1, 1), None),
        ("Write Zeroes one past the end", entry(ZEROES, 1, blocks, 1), out_of_range),
        ("Write Zeroes over the end", entry(ZEROES, 1, blocks - 1, 2), out_of_range),
        ("Write Zeroes at the last address there is", entry(ZEROES, 1, u64::MAX, 1), out_of_range),
        ("Write Zeroes that wraps round", entry(ZEROES, 1, u64::MAX - 3, 8), out_of_range),
        ("Write Uncorrectable", entry(4, 1, 0, 1), invalid_opcode),
        ("an opcode of the vendor's", entry(0xc7, 1, 0, 1), invalid_opcode),
        ("an opcode that is reserved", entry(0x3f, 1, 0, 1), invalid_opcode),
        ("namespace 2", entry(ZEROES, 2, 0, 1), invalid_namespace),
        ("namespace 0", entry(ZEROES, 0, 0, 1), invalid_namespace),
        ("namespace 0xfffffffe", entry(ZEROES, 0xffff_fffe, 0, 1), invalid_namespace),
        ("Flush", entry(0, 1, 0, 1), None),
    ] {
        assert_eq!(line.command(entry).unwrap(), status, "{deed}");
    }
    // One read past the end; reads have data coming, so the refusal is an answer to them.
    assert_eq!(line.try_read(blocks * 4096, 4096).unwrap(), Err(Refusal { code_type: GENERIC, code: 0x80 }));
    assert_eq!(line.try_discard((blocks - 1) * 4096, 8192).unwrap(), Err(Refusal { code_type: GENERIC, code: 0x80 }));
    assert_eq!(line.try_write(4096, &[7; 4096]).unwrap(), Ok(()));
    assert_eq!(line.try_read(4096, 4096).unwrap(), Ok(vec![7; 4096]));
    witness.look(&mut house, "commands that cannot be").unwrap();
}

/// The socket that an export made.
fn socket_of(house: &House, volume: &str, kind: &str) -> PathBuf {
    let volume = house.volume(volume).unwrap();
    let export = volume.exports.iter().find(|export| export.door.kind_word() == kind);
    let address = &export.unwrap_or_else(|| panic!("an export over {kind}: {volume:?}")).address;
    PathBuf::from(address)
}

#[test]
fn vhost_user_wrong_conversations_end_alone() {
    let mut dice = dice("vhost-user conversations");
    let (mut house, mut witness) = house_with_witness();
    house.did("volume create guest 8MiB --block-size 512");
    house.did("volume export guest --vhost");
    let socket = socket_of(&house, "guest", "vhost");
    let list = wrong_vhost(&mut dice);
    for (at, (deed, bytes)) in list.iter().enumerate() {
        say(Place::Unix(&socket), bytes, at % 2 == 0, PATIENCE).unwrap_or_else(|e| panic!("{deed}: {e}"));
        witness.look(&mut house, deed).unwrap();
    }
    let held = idlers(Place::Unix(&socket), 20, &[1, 0, 0]).unwrap();
    witness.look(&mut house, "20 front ends in the middle of a message").unwrap();
    drop(held);
    println!("{} conversations", list.len());
    house.did("volume unexport guest --vhost --force");
    house.did("volume rm guest");
    witness.look(&mut house, "the volume is gone").unwrap();
}

#[test]
fn vfio_user_wrong_conversations_end_alone() {
    let mut dice = dice("vfio-user conversations");
    let (mut house, mut witness) = house_with_witness();
    house.did("volume create guest 8MiB");
    house.did("volume export guest --vfio-user");
    let socket = socket_of(&house, "guest", "vfio-user").join("cntrl");
    let list = wrong_vfio_user(&mut dice);
    for (at, (deed, bytes)) in list.iter().enumerate() {
        say(Place::Unix(&socket), bytes, at % 2 == 0, PATIENCE).unwrap_or_else(|e| panic!("{deed}: {e}"));
        witness.look(&mut house, deed).unwrap();
    }
    println!("{} conversations", list.len());
    house.did("volume unexport guest --vfio-user --force");
    house.did("volume rm guest");
    witness.look(&mut house, "the volume is gone").unwrap();
}

/// In interrupt mode nobody looks after a door by chance: it has to be told that its client is gone.
#[test]
fn vfio_user_clients_that_are_gone_before_they_are_answered_leave_a_door_for_the_next() {
    let house = House::new().unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    house.did("volume create guest 8MiB");
    house.did("volume export guest --vfio-user");
    let socket = socket_of(&house, "guest", "vfio-user").join("cntrl");
    // Connecting waits for as long as the door takes nobody: aside, so that this can end.
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let ask = (0..50).try_for_each(|_| vfio_user_ask_and_go(&socket)).and_then(|()| vfio_user_lets_in(&socket, LIMIT));
        tell.send(ask)
    });
    let is_let_in = told.recv_timeout(3 * LIMIT).expect("the door takes one client after the other");
    assert!(is_let_in.unwrap(), "and the last");
}

#[test]
fn node_that_served_a_vhost_door_ends_cleanly() {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    house.add_volume("guest", "8MiB", 4096);
    house.did("volume export guest --vhost");
    // More than once: DPDK's event thread used to outlive the memory that it looks at, which was seen at some ends only.
    for _ in 0..3 {
        let socket = socket_of(&house, "guest", "vhost");
        drop(std::os::unix::net::UnixStream::connect(socket).unwrap());
        let status = house.stop_node().unwrap();
        assert!(status.success(), "{status}");
        house.start_node().unwrap();
        house.settle().unwrap();
    }
}
