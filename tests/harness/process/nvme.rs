//! NVMe/TCP protocol data units put together by hand, right and wrong. Source: NVM Express TCP transport 1.0. Not here: an
//! initiator that means well ([`crate::guest::initiator`]).

use crate::guest::replay::Dice;

pub const IC_REQ: u8 = 0;
pub const H2C_TERM: u8 = 2;
pub const CAPSULE_CMD: u8 = 4;
pub const H2C_DATA: u8 = 6;

/// A unit with its common header as said, whatever `body` holds.
pub fn unit(kind: u8, flags: u8, header_length: u8, data_offset: u8, total: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, flags, header_length, data_offset];
    bytes.extend(total.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A right greeting.
pub fn greeting() -> Vec<u8> {
    unit(IC_REQ, 0, 128, 0, 128, &[0; 120])
}

/// A command capsule with 64 bytes of command and data behind it.
pub fn capsule(command: &[u8; 64], data: &[u8]) -> Vec<u8> {
    let total = 72 + data.len() as u32;
    let offset = if data.is_empty() { 0 } else { 72 };
    unit(CAPSULE_CMD, 0, 72, offset, total, &[command.as_slice(), data].concat())
}

/// A Fabrics Connect with this data; `length` is what its SGL says.
fn connect(queue: u16, entries: u16, length: u32, data: &[u8]) -> Vec<u8> {
    let mut command = [0u8; 64];
    command[0] = 0x7f;
    command[1] = 0x40;
    command[4] = 1;
    command[32..36].copy_from_slice(&length.to_le_bytes());
    command[39] = 1;
    command[42..44].copy_from_slice(&queue.to_le_bytes());
    command[44..46].copy_from_slice(&entries.to_le_bytes());
    capsule(&command, data)
}

fn connect_data(nqn: &[u8]) -> Vec<u8> {
    let mut data = vec![0; 1024];
    data[16..18].copy_from_slice(&0xffffu16.to_le_bytes());
    data[256..256 + nqn.len().min(256)].copy_from_slice(&nqn[..nqn.len().min(256)]);
    data[512..535].copy_from_slice(b"nqn.2026-11.test:a-host");
    data
}

/// Conversations that no right initiator has, each sent on a connection of its own. `nqn` is one that is served.
pub fn wrong_conversations(nqn: &str, dice: &mut Dice) -> Vec<(&'static str, Vec<u8>)> {
    let after_greeting = |more: Vec<u8>| [greeting(), more].concat();
    let mut flags = greeting();
    flags[1] = 0xff;
    let mut version = greeting();
    version[8..10].copy_from_slice(&7u16.to_le_bytes());
    let mut alignment = greeting();
    alignment[10] = 0xff;
    let mut discontiguous = [0u8; 64];
    discontiguous[0] = 2;
    discontiguous[1] = 0x40;
    discontiguous[4] = 1;
    discontiguous[39] = 0x5a;
    let mut everything = [0xffu8; 64];
    everything[0] = 1;
    let right = connect_data(nqn.as_bytes());
    let mut unended = connect_data(&[b'n'; 256]);
    unended[512..768].fill(b'h');
    let random = |dice: &mut Dice, length: usize| (0..length).map(|_| dice.roll() as u8).collect::<Vec<_>>();
    let mut list = vec![
        ("nothing at all", Vec::new()),
        ("HTTP", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("half a greeting", greeting()[..60].to_vec()),
        ("one byte", vec![0]),
        ("a greeting with all flags", flags),
        ("a greeting of another version", version),
        ("a greeting with impossible alignment", alignment),
        ("a greeting that says it is short", unit(IC_REQ, 0, 128, 0, 8, &[0; 120])),
        ("a greeting that says it is 4 GiB", unit(IC_REQ, 0, 128, 0, u32::MAX, &[0; 120])),
        ("a greeting with a wrong header length", unit(IC_REQ, 0, 255, 0, 128, &[0; 120])),
        ("two greetings", after_greeting(greeting())),
        ("a capsule before the greeting", capsule(&[0; 64], &[])),
        ("an unknown kind of unit", after_greeting(unit(0x77, 0, 24, 0, 24, &[0; 16]))),
        ("a unit of the controller's", after_greeting(unit(5, 0, 24, 0, 24, &[0; 16]))),
        ("a capsule that says it is empty", after_greeting(unit(CAPSULE_CMD, 0, 72, 0, 0, &[0; 64]))),
        ("a capsule that says it is 4 GiB", after_greeting(unit(CAPSULE_CMD, 0, 72, 72, u32::MAX, &[0; 64]))),
        ("a capsule with a header of 255", after_greeting(unit(CAPSULE_CMD, 0, 255, 255, 300, &[0; 292]))),
        ("a capsule with data before its end", after_greeting(unit(CAPSULE_CMD, 0, 72, 8, 1096, &[0; 1088]))),
        ("a capsule with digests nobody agreed on", after_greeting(unit(CAPSULE_CMD, 3, 72, 80, 84, &[0; 76]))),
        ("a command before Connect", after_greeting(capsule(&discontiguous, &[]))),
        ("a command with every bit set", after_greeting(capsule(&everything, &[0xff; 512]))),
        ("data for a command that was not sent", after_greeting(unit(H2C_DATA, 0, 24, 24, 24 + 512, &[0xee; 528]))),
        ("data that says it is 4 GiB", after_greeting(unit(H2C_DATA, 0, 24, 24, u32::MAX, &[0; 16]))),
        ("a termination with a huge report", after_greeting(unit(H2C_TERM, 0, 24, 0, 24 + 4096, &[0; 4112]))),
        ("a termination cut short", after_greeting(unit(H2C_TERM, 0, 24, 0, 24, &[1; 4]))),
        ("Connect that says it has no data", after_greeting(connect(0, 31, 0, &[]))),
        ("Connect without data", after_greeting(connect(0, 31, 1024, &[]))),
        ("Connect that says more than it has", after_greeting(connect(0, 31, 8192, &right))),
        ("Connect with less than it must have", after_greeting(connect(0, 31, 16, &right[..16]))),
        ("Connect to a subsystem that is not there", after_greeting(connect(0, 31, 1024, &connect_data(b"nqn.2026-11.test:absent")))),
        ("Connect with names that do not end", after_greeting(connect(0, 31, 1024, &unended))),
        ("Connect with names of nothing but 0xff", after_greeting(connect(0, 31, 1024, &[0xff; 1024]))),
        ("Connect to an I/O queue first", after_greeting(connect(1, 31, 1024, &right))),
        ("Connect with a queue of no entries", after_greeting(connect(0, 0, 1024, &right))),
        ("Connect with a queue of 65536 entries", after_greeting(connect(0, 0xffff, 1024, &right))),
        ("Connect twice", after_greeting([connect(0, 31, 1024, &right), connect(0, 31, 1024, &right)].concat())),
        ("Connect, then a unit that is cut off", after_greeting([connect(0, 31, 1024, &right), vec![CAPSULE_CMD, 0, 72]].concat())),
        ("Connect, then a read without enabling", after_greeting([connect(0, 31, 1024, &right), capsule(&discontiguous, &[])].concat())),
    ];
    for length in [1, 7, 64, 500, 5000, 70_000] {
        list.push(("random bytes", random(dice, length)));
        list.push(("a greeting, then random bytes", after_greeting(random(dice, length))));
    }
    for _ in 0..24 {
        let mut bytes = after_greeting(connect(0, 31, 1024, &right));
        for _ in 0..1 + dice.below(4) {
            let at = dice.below(400.min(bytes.len() as u64)) as usize;
            bytes[at] ^= 1 << dice.below(8);
        }
        list.push(("a good start with bits flipped", bytes));
    }
    list
}
