//! Host commands on their way through a core: held while the engine has them, counted, answered.
//!
//! Not here: how they come (`port`) and what they do (the engine).

use penstock_engine::{Event, HostOp, IoId, ReplicaNo, Status};
use penstock_wire::HostId;
use spdk_rs::lend::{LendBuf, Payload, RoamingIo};

use super::Core;
use super::forward::{Asker, deed_of};
use super::port::{self, Request, VolumeSlot};
use super::quarantine;
use super::volume::OpClass;
use crate::command::{self, Ask, RANGE_BYTES};
use crate::status::NvmeStatus;

/// Who waits for an answer of the engine.
pub(super) enum Pending {
    Free,
    Host {
        slot: VolumeSlot,
        class: OpClass,
        bytes: u64,
        since: u64,
    },
    /// A piece of a command that became several.
    Piece {
        of: IoId,
    },
    Pieces {
        slot: VolumeSlot,
        left: u32,
        worst: NvmeStatus,
        since: u64,
    },
    Local {
        slot: VolumeSlot,
        class: OpClass,
        bytes: u64,
        since: u64,
        tag: u64,
    },
    /// For another node's host.
    Forwarded {
        slot: VolumeSlot,
        class: OpClass,
        bytes: u64,
        since: u64,
        asker: Asker,
    },
}

/// A command from within the process.
pub struct LocalIo {
    pub slot: VolumeSlot,
    pub op: HostOp,
    /// The payload; its length is the operation's (twice that for compare-and-write). `None` for operations without.
    pub buf: Option<LendBuf>,
    pub tag: u64,
}

/// Its answer; the buffer comes back.
pub struct LocalDone {
    pub tag: u64,
    pub status: NvmeStatus,
    pub buf: Option<LendBuf>,
}

impl Core {
    pub(super) fn set_pending(&mut self, io: IoId, pending: Pending) {
        let at = io.0 as usize;
        if at >= self.pending.len() {
            self.pending.resize_with(at + 1, || Pending::Free);
        }
        debug_assert!(matches!(self.pending[at], Pending::Free), "{io:?} is in use");
        self.pending[at] = pending;
    }

    /// See [`Store::look_ahead`](penstock_engine::Store::look_ahead). A command that comes alone has nothing to gain.
    pub(super) fn look_ahead(&self, asks: &[Request]) {
        for request in asks.iter().filter(|_| asks.len() > 1) {
            let Ask::Op(op) = request.ask else { continue };
            let Some(volume) = self.volumes.get(request.slot.0 as usize) else { continue };
            if let Some(shard) = self.shards[volume.shard].as_ref().filter(|shard| !shard.quarantined) {
                shard.store.look_ahead(volume.replica, op);
            }
        }
    }

    pub(super) fn on_request(&mut self, request: Request) {
        self.counters.host_commands += 1;
        let Request { io, slot, host, forwards, ask, since } = request;
        let Some(volume) = self.volumes.get(slot.0 as usize).filter(|v| !v.gone && self.shards[v.shard].is_some()) else {
            self.counters.refused_at_door += 1;
            return answer(io, NvmeStatus::PATH_INACCESSIBLE);
        };
        if self.is_quarantined(volume.shard) {
            return answer(io, quarantine::TOLD);
        }
        // Who has no other path is not barred: what it sent is carried out once, in its order.
        if volume.is_barred && !forwards {
            self.counters.refused_at_door += 1;
            return answer(io, NvmeStatus::PATH_INACCESSIBLE);
        }
        match ask {
            Ask::Answer(status) => answer(io, status),
            Ask::Op(op) if forwards && deed_of(op).is_none() => answer(io, NvmeStatus::INVALID_OPCODE),
            Ask::Op(op) => {
                let (class, bytes) = OpClass::of(op);
                let (shard, replica) = (volume.shard, volume.replica);
                let io = self.memory.put_io(Payload::Io(io));
                self.set_pending(io, Pending::Host { slot, class, bytes, since });
                self.start(slot, shard, io, replica, host, op, forwards);
            }
            Ask::Ranges(count) => {
                let extent = command::Extent {
                    logical_block: volume.shape.logical_block,
                    blocks: volume.shape.blocks * (penstock_wire::BLOCK as u64 / u64::from(volume.shape.logical_block)),
                };
                let (shard, replica) = (volume.shard, volume.replica);
                let io = self.memory.put_io(Payload::Io(io));
                let mut spans = Vec::with_capacity(count as usize); // A rare command of many parts: it may allocate.
                for at in 0..count as usize {
                    let mut range = [0; RANGE_BYTES];
                    self.memory.copy_payload(io, at * RANGE_BYTES, &mut range);
                    match command::parse_range(&range, extent) {
                        Ok(span) => spans.extend(span),
                        Err(status) => {
                            let Payload::Io(io) = self.memory.take_io(io) else { unreachable!("it was put above") };
                            return answer(io, status);
                        }
                    }
                }
                if spans.is_empty() {
                    let Payload::Io(io) = self.memory.take_io(io) else { unreachable!("it was put above") };
                    return answer(io, NvmeStatus::SUCCESS);
                }
                self.set_pending(io, Pending::Pieces { slot, left: spans.len() as u32, worst: NvmeStatus::SUCCESS, since });
                for span in spans {
                    let piece = self.memory.put_io(Payload::None);
                    self.set_pending(piece, Pending::Piece { of: io });
                    self.start(slot, shard, piece, replica, host, HostOp::Zero(span), forwards);
                }
            }
        }
    }

    fn is_quarantined(&self, shard: usize) -> bool {
        self.shards[shard].as_ref().is_some_and(|shard| shard.quarantined)
    }

    /// A command is let in.
    #[expect(clippy::too_many_arguments)] // each is at hand where a command is read, and a struct would only be taken apart again
    fn start(&mut self, slot: VolumeSlot, shard: usize, io: IoId, replica: ReplicaNo, host: HostId, op: HostOp, forwards: bool) {
        if forwards {
            self.volumes[slot.0 as usize].held += 1;
            self.set_out(slot, io, op);
        } else {
            self.host_event(slot, shard, io, replica, host, op);
        }
    }

    fn host_event(&mut self, slot: VolumeSlot, shard: usize, io: IoId, replica: ReplicaNo, host: HostId, op: HostOp) {
        self.volumes[slot.0 as usize].held += 1;
        let shard = self.shards[shard].as_mut().expect("checked by the caller");
        shard.apply(Event::Host { io, replica, host, op }, self.clock, &mut self.memory);
    }

    pub(super) fn on_local(&mut self, local: LocalIo) {
        self.counters.host_commands += 1;
        let LocalIo { slot, op, buf, tag } = local;
        let Some(volume) = self.volumes.get(slot.0 as usize).filter(|v| !v.gone && self.shards[v.shard].is_some()) else {
            self.local_done.push(LocalDone { tag, status: NvmeStatus::PATH_INACCESSIBLE, buf });
            return;
        };
        if self.is_quarantined(volume.shard) {
            self.local_done.push(LocalDone { tag, status: quarantine::TOLD, buf });
            return;
        }
        let (class, bytes) = OpClass::of(op);
        let len = match op {
            HostOp::Read(span) | HostOp::ReadSnapshot(_, span) | HostOp::Write(span) => span.len,
            HostOp::CompareWrite(span) => 2 * span.len,
            HostOp::Zero(_) | HostOp::Flush | HostOp::Reserve(_) => 0,
        };
        let (shard, replica) = (volume.shard, volume.replica);
        let payload = match buf {
            Some(buf) => Payload::Buf { buf, len: len as usize },
            None => Payload::None,
        };
        let io = self.memory.put_io(payload);
        self.set_pending(io, Pending::Local { slot, class, bytes, since: spdk_rs::app::ticks(), tag });
        self.host_event(slot, shard, io, replica, HostId::default(), op);
    }

    /// A store has answered a command.
    pub(super) fn on_answer(&mut self, io: IoId, status: Status) {
        if let Pending::Forwarded { slot, class, bytes, since, asker } = self.pending[io.0 as usize] {
            self.pending[io.0 as usize] = Pending::Free;
            let us = ((u128::from(spdk_rs::app::ticks().saturating_sub(since)) * u128::from(self.us_per_tick)) >> 64) as u64;
            let volume = &mut self.volumes[slot.0 as usize];
            volume.held -= 1;
            volume.record(class, bytes, us, status == Status::Ok);
            self.on_visit_over(io, asker, status);
        } else if !self.on_way_back(io, status) {
            self.on_reply(io, status.into());
        }
    }

    pub(super) fn on_reply(&mut self, io: IoId, status: NvmeStatus) {
        // One reading of the clock for all answers of a turn's effects.
        let now = *self.answered_at.get_or_insert_with(spdk_rs::app::ticks);
        let us_per_tick = self.us_per_tick;
        let us_since = |since: u64| ((u128::from(now.saturating_sub(since)) * u128::from(us_per_tick)) >> 64) as u64;
        match std::mem::replace(&mut self.pending[io.0 as usize], Pending::Free) {
            Pending::Free => panic!("the engine answered {io:?} twice"),
            Pending::Host { slot, class, bytes, since } => {
                let us = us_since(since);
                let volume = &mut self.volumes[slot.0 as usize];
                volume.held -= 1;
                volume.record(class, bytes, us, status.is_success());
                let Payload::Io(io) = self.memory.take_io(io) else { unreachable!("host commands hold an I/O") };
                answer(io, status);
            }
            Pending::Local { slot, class, bytes, since, tag } => {
                let us = us_since(since);
                let volume = &mut self.volumes[slot.0 as usize];
                volume.held -= 1;
                volume.record(class, bytes, us, status.is_success());
                let buf = match self.memory.take_io(io) {
                    Payload::Buf { buf, .. } => Some(buf),
                    _ => None,
                };
                self.local_done.push(LocalDone { tag, status, buf });
            }
            Pending::Piece { of } => {
                self.memory.take_io(io);
                let Pending::Pieces { slot, left, worst, since } = &mut self.pending[of.0 as usize] else {
                    unreachable!("pieces belong to a command")
                };
                self.volumes[slot.0 as usize].held -= 1;
                if !status.is_success() {
                    *worst = status;
                }
                *left -= 1;
                if *left > 0 {
                    return;
                }
                let (slot, worst, since) = (*slot, *worst, *since);
                self.pending[of.0 as usize] = Pending::Free;
                let us = us_since(since);
                self.volumes[slot.0 as usize].record(OpClass::Zero, 0, us, worst.is_success());
                let Payload::Io(io) = self.memory.take_io(of) else { unreachable!("host commands hold an I/O") };
                answer(io, worst);
            }
            Pending::Pieces { .. } => unreachable!("the engine knows the pieces alone"),
            Pending::Forwarded { .. } => unreachable!("answered where it is known what came of it"),
        }
    }

    /// Takes a command from within the process; [`Core::take_local_done`] has its answer later. On this core, outside of a turn.
    pub fn submit_local(&mut self, io: LocalIo) {
        self.local.push(io);
        self.waker.wake();
    }

    /// Moves the answers of local commands to `out`.
    pub fn take_local_done(&mut self, out: &mut Vec<LocalDone>) {
        out.append(&mut self.local_done);
    }

    /// Commands that hosts wait for.
    pub fn held(&self) -> usize {
        self.memory.host.held()
    }
}

/// Answers a host, on its own core; here only put on the way.
pub(super) fn answer(io: RoamingIo, status: NvmeStatus) {
    port::with(|port| port.finish(io, status));
}
