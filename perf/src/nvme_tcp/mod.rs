//! NVMe/TCP as a host speaks it, on plain sockets: for loads that are to look elsewhere at once when nobody answers, which SPDK's initiator is not made for.
//!
//! [`wire`] is bytes, [`queue`] one connection with one command at a time, [`attach`] a namespace that is connected and known. Sources: NVM Express base 2.0 (Connect,
//! properties, Identify), NVMe/TCP transport 1.0 (PDUs). Deliberately not here: several commands at a time, and what to do when a path fails (the users' own).

pub mod queue;
pub mod wire;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub use queue::{Queue, QueueError};
use wire::{Entry, whole};

/// What a volume is, as a path shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of a logical block.
    pub block: u32,
    pub blocks: u64,
    /// What makes two namespaces the same volume.
    pub nguid: [u8; 16],
}

/// Namespace 1 of a subsystem over one path: an admin queue and one I/O queue.
#[derive(Debug)]
pub struct Attached {
    /// Closing it ends the association.
    pub admin: Queue,
    pub io: Queue,
    pub shape: Shape,
    /// Most data that a command's capsule may carry.
    pub capsule_bytes: usize,
}

/// One more than may be under way, and what every controller has at the least.
fn entries(depth: u32) -> u16 {
    (depth + 1).clamp(2, 1024) as u16
}

/// Connects for `depth` commands at a time, and gives every step, and every answer on these queues, `patience`.
pub fn attach(address: SocketAddr, nqn: &str, depth: u32, patience: Duration) -> Result<Attached, QueueError> {
    let mut admin = Queue::open(address, patience)?;
    let controller = admin.connect(nqn, 0, 32, 0xffff)?;
    const CC_ENABLE_4K_PAGES_64_16: u64 = 1 | 6 << 16 | 4 << 20; // SQE 2^6, CQE 2^4 bytes
    admin.give(Entry::property_set(0x14, CC_ENABLE_4K_PAGES_64_16), &[])?;
    let deadline = Instant::now() + patience;
    while admin.give(Entry::property_get(0x1c), &[])? & 1 == 0 {
        if Instant::now() >= deadline {
            return Err(queue::broken("the controller does not become ready").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut controller_page, mut namespace) = ([0; 4096], [0; 4096]);
    admin.take(Entry::identify(1, 0), &mut controller_page)?;
    admin.take(Entry::identify(0, 1), &mut namespace)?;
    let shift = namespace[128 + 4 * usize::from(namespace[26] & 0xf) + 2];
    if !(9..=16).contains(&shift) {
        return Err(queue::broken(format!("namespace 1 has blocks of 2^{shift} bytes")).into());
    }
    let blocks = u64::from_le_bytes(namespace[..8].try_into().expect("8 bytes"));
    let nguid = namespace[104..120].try_into().expect("16 bytes");
    let capsule_bytes = (whole(&controller_page, 1792) as usize * 16).saturating_sub(64);
    let mut io = Queue::open(address, patience)?;
    io.connect(nqn, 1, entries(depth), controller)?;
    Ok(Attached { admin, io, shape: Shape { block: 1 << shift, blocks, nguid }, capsule_bytes })
}
