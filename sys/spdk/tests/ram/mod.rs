//! A device of memory in Rust, through the same trait as the real one. Takes cooked and raw NVMe commands.

use spdk_rs::module::{Device, HostIo, IoKind};
use spdk_rs::{NvmeStatus, Status};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub const BLOCK: usize = 4096;

pub struct Ram {
    pub bytes: Mutex<Vec<u8>>,
    pub raw: bool,
    pub channels: AtomicU32,
    pub dropped: AtomicU32,
    /// What raw commands came, by opcode, and from whom the last one.
    pub opcodes: Mutex<Vec<u8>>,
    pub hosts: Mutex<Vec<String>>,
}

impl Ram {
    pub fn new(blocks: u64, raw: bool) -> Arc<Ram> {
        Arc::new(Ram {
            bytes: Mutex::new(vec![0; blocks as usize * BLOCK]),
            raw,
            channels: AtomicU32::new(0),
            dropped: AtomicU32::new(0),
            opcodes: Mutex::default(),
            hosts: Mutex::default(),
        })
    }
}

pub struct RamChannel {
    ram: Arc<Ram>,
}

impl Drop for RamChannel {
    fn drop(&mut self) {
        self.ram.channels.fetch_sub(1, Ordering::SeqCst);
    }
}

fn word(command: &[u8; 64], at: usize) -> u32 {
    u32::from_le_bytes(command[at..at + 4].try_into().expect("four bytes"))
}

impl Device for Ram {
    type Channel = RamChannel;

    fn supports(&self, kind: IoKind) -> bool {
        match kind {
            IoKind::Read | IoKind::Write | IoKind::CompareAndWrite | IoKind::WriteZeroes => true,
            IoKind::NvmeIo | IoKind::NvmeAdmin => self.raw,
            _ => false,
        }
    }

    fn open_channel(self: &Arc<Self>) -> Option<RamChannel> {
        self.channels.fetch_add(1, Ordering::SeqCst);
        Some(RamChannel { ram: self.clone() })
    }

    fn submit(channel: &RamChannel, mut io: HostIo) {
        let ram = &channel.ram;
        let mut bytes = ram.bytes.lock().expect("no panics");
        let (kind, start, len) = match io.command() {
            None => (io.kind(), io.offset_blocks() as usize * BLOCK, io.block_count() as usize * BLOCK),
            Some(command) => {
                ram.opcodes.lock().expect("no panics").push(command[0]);
                if let Some(association) = io.association() {
                    assert!(association.live && io.controller().is_some_and(|c| c.live && c.controller == association.controller));
                    ram.hosts.lock().expect("no panics").push(association.host_nqn);
                }
                let kind = match (io.kind(), command[0]) {
                    (IoKind::NvmeIo, 0x01) => IoKind::Write,
                    (IoKind::NvmeIo, 0x02) => IoKind::Read,
                    _ => return io.complete(Status::Nvme(NvmeStatus::INVALID_OPCODE)),
                };
                (kind, word(&command, 40) as usize * BLOCK, ((word(&command, 48) & 0xffff) as usize + 1) * BLOCK)
            }
        };
        if start + len > bytes.len() {
            return io.complete(Status::Nvme(NvmeStatus::LBA_OUT_OF_RANGE));
        }
        let place = &mut bytes[start..start + len];
        match kind {
            IoKind::Read => io.copy_in(0, place),
            IoKind::Write => {
                // A block that begins with this asks to be forgotten.
                let mut first = [0u8; 6];
                io.copy_out(0, &mut first);
                if &first == b"forget" {
                    ram.dropped.fetch_add(1, Ordering::SeqCst);
                    return drop(io);
                }
                assert_eq!(io.private_parts().is_some(), io.payload_is_private());
                io.copy_out(0, place);
            }
            IoKind::WriteZeroes => place.fill(0),
            IoKind::CompareAndWrite => {
                let mut expected = vec![0; len];
                io.copy_compare(0, &mut expected);
                if expected != place {
                    return io.complete(Status::Miscompare);
                }
                io.copy_out(0, place);
            }
            _ => return io.complete(Status::Nvme(NvmeStatus::INVALID_OPCODE)),
        }
        io.complete(Status::Success);
    }
}
