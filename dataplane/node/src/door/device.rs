//! The bdev behind an export: reads what a host asks, and puts it on the port of the core that it came to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use penstock_engine::HostOp;
use penstock_wire::HostId;
use spdk_rs::lend::RoamingIo;
use spdk_rs::module::{Device, HostIo, IoKind};

use crate::command::{self, Ask, Extent};
use crate::core::port;
use crate::core::{CoreIndex, VolumeSlot};
use crate::status::NvmeStatus;

/// A volume as one door shows it. Shared by all threads, and read-only but for its size.
pub struct ExportDevice {
    home: CoreIndex,
    slot: VolumeSlot,
    logical_block: u32,
    /// Its hosts have this path alone: what they ask for is carried out by whoever leads.
    forwards: bool,
    /// In logical blocks.
    blocks: AtomicU64,
    /// The export is being taken away: nothing new is let in.
    closing: AtomicBool,
}

impl ExportDevice {
    pub fn new(home: CoreIndex, slot: VolumeSlot, logical_block: u32, blocks: u64, forwards: bool) -> Self {
        Self { home, slot, logical_block, forwards, blocks: AtomicU64::new(blocks), closing: AtomicBool::new(false) }
    }

    pub fn set_blocks(&self, blocks: u64) {
        self.blocks.store(blocks, Ordering::Relaxed);
    }

    pub fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    fn extent(&self) -> Extent {
        Extent { logical_block: self.logical_block, blocks: self.blocks.load(Ordering::Relaxed) }
    }

    /// What a command asks for, and who asks.
    fn ask(&self, io: &HostIo) -> (HostId, Ask) {
        let kind = io.kind();
        let from_host = matches!(kind, IoKind::NvmeIo | IoKind::CompareAndWrite);
        let controller = if from_host { io.controller() } else { None };
        let host = HostId(controller.map_or([0; 16], |controller| controller.host_id));
        // A command of a connection that is gone must not take effect after its host has sent it again elsewhere.
        if self.closing.load(Ordering::Relaxed) || controller.is_some_and(|controller| !controller.live) {
            return (host, Ask::Answer(NvmeStatus::PATH_INACCESSIBLE));
        }
        (host, if kind == IoKind::NvmeIo { self.read_command(io) } else { self.read_kind(kind, io) })
    }

    fn read_command(&self, io: &HostIo) -> Ask {
        if io.metadata_len() > 0 {
            return Ask::Answer(NvmeStatus::INVALID_FIELD);
        }
        let command = io.command().expect("raw commands carry their bytes");
        if !command::is_reservation(&command) {
            return command::parse(&command, self.extent(), io.payload_len());
        }
        let mut keys = [0; command::KEYS_BYTES];
        let len = io.payload_len().min(keys.len());
        io.copy_out(0, &mut keys[..len]);
        command::parse_reservation(&command, &keys[..len], io.payload_len())
    }

    fn read_kind(&self, kind: IoKind, io: &HostIo) -> Ask {
        let span = command::span(self.extent(), io.offset_blocks(), io.block_count());
        let ranged = |op: fn(penstock_engine::Span) -> HostOp| match span {
            Some(span) if span.len == 0 => Ask::Answer(NvmeStatus::SUCCESS),
            Some(span) => Ask::Op(op(span)),
            None => Ask::Answer(NvmeStatus::LBA_OUT_OF_RANGE),
        };
        match kind {
            IoKind::Read => ranged(HostOp::Read),
            IoKind::Write => ranged(HostOp::Write),
            IoKind::WriteZeroes | IoKind::Unmap => ranged(HostOp::Zero),
            IoKind::CompareAndWrite => ranged(HostOp::CompareWrite),
            IoKind::Flush => Ask::Op(HostOp::Flush),
            // Nothing of ours hangs on a connection: there is nothing to reset.
            IoKind::Reset => Ask::Answer(NvmeStatus::SUCCESS),
            IoKind::NvmeIo | IoKind::NvmeAdmin | IoKind::Abort | IoKind::Other(_) => Ask::Answer(NvmeStatus::INVALID_OPCODE),
        }
    }
}

impl Device for ExportDevice {
    type Channel = Arc<ExportDevice>;

    fn supports(&self, kind: IoKind) -> bool {
        // Flush is left out: acknowledged is durable, and the target then answers success by itself.
        matches!(
            kind,
            IoKind::Read
                | IoKind::Write
                | IoKind::WriteZeroes
                | IoKind::Unmap
                | IoKind::CompareAndWrite
                | IoKind::Reset
                | IoKind::NvmeIo
                | IoKind::NvmeAdmin
        )
    }

    fn open_channel(self: &Arc<Self>) -> Option<Self::Channel> {
        port::with(|_| self.clone())
    }

    fn submit(channel: &Self::Channel, io: HostIo) {
        let (host, ask) = channel.ask(&io);
        let io = RoamingIo::new(io);
        port::with(|port| match ask {
            // Needs nobody's data: answered where it came, in the next turn (completing from inside submit costs a message).
            Ask::Answer(status) => port.finish(io, status),
            _ => port.ask(channel.home, io, channel.slot, host, channel.forwards, ask),
        })
        .expect("channels are only opened where there is a port");
    }
}
