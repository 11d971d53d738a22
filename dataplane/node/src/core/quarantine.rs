//! A store that panics is quarantined: it is not run again, its hosts are told of an internal error, and the core's other stores go
//! on. The app thread records it off the drive, so that a batch that makes a store fall does not do so at every start.
//!
//! What can be caught is a store's own code ([`Shard::apply`] and [`Shard::settle`]): while that runs, memory is taken in the store's
//! name, and this tells whose a panic was. A panic anywhere else on the core ends the process: what it was doing is everybody's.
//! Memory that a device has stays lent until the device gives it back, and so do the commands whose payload it is.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use penstock_engine::{IoId, Order, OrderError, OrderId};
use spdk_rs::lend::Payload;

use super::host::{LocalDone, Pending, answer};
use super::{Core, Report, VolumeSlot};
use crate::memory::Owner;
use crate::status::NvmeStatus;

/// What hosts of a quarantined store are told.
pub const TOLD: NvmeStatus = NvmeStatus::INTERNAL_ERROR;

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps the words of each panic, with its place in the code, for whoever catches it. Once for the process.
pub fn watch_panics() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            LAST.with_borrow_mut(|last| *last = info.to_string().replace('\n', " "));
            before(info);
        }));
    });
}

/// The words of a panic that was just caught on this thread.
fn words(panic: &(dyn Any + Send)) -> String {
    let last = LAST.take();
    if !last.is_empty() {
        return last;
    }
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_owned())
}

impl Core {
    /// Runs what may run stores. A store that falls in it is quarantined and `f` called again, to go on with what it had left.
    pub(super) fn guarded<R>(&mut self, mut f: impl FnMut(&mut Self) -> R) -> R {
        loop {
            // Unwind safe: of a store that fell nothing is used again, and what is not a store's makes the process end.
            match catch_unwind(AssertUnwindSafe(|| f(self))) {
                Ok(result) => return result,
                Err(panic) => self.quarantine(panic),
            }
        }
    }

    fn quarantine(&mut self, panic: Box<dyn Any + Send>) {
        let Owner::Store(at) = std::mem::replace(&mut self.memory.owner, Owner::Core) else { resume_unwind(panic) };
        let at = at as usize;
        let shard = self.shards[at].as_mut().expect("a store that ran is there");
        shard.quarantined = true;
        (shard.touched, shard.quiescent) = (false, true);
        // Decided by a store that then fell: none of it is carried out, and what hosts are told is that they cannot know.
        shard.fx.clear();
        let (drive, store) = (shard.drive, shard.store_no);
        (self.report)(Report::Quarantined { drive, store, panic: words(&*panic) });
        for id in std::mem::take(&mut shard.orders) {
            (self.report)(Report::OrderDone { id, result: Err(OrderError::NotServing) });
        }
        self.on_quarantined_done(at);
    }

    /// A device gave something back, or had nothing: whoever need not wait any more is answered.
    pub(super) fn on_quarantined_done(&mut self, at: usize) {
        // Pieces first: the command that they are of tells whose they are.
        for pieces in [true, false] {
            for io in 0..self.pending.len() {
                let pending = &self.pending[io];
                if matches!(pending, Pending::Piece { .. }) == pieces && self.is_of(at, pending) && !self.memory.host.is_lent(io as u32) {
                    self.give_up(IoId(io as u32));
                }
            }
        }
        self.answer_stops(at);
    }

    fn slot_of_pending(&self, pending: &Pending) -> Option<VolumeSlot> {
        match pending {
            Pending::Free => None,
            Pending::Host { slot, .. } | Pending::Local { slot, .. } | Pending::Pieces { slot, .. } => Some(*slot),
            Pending::Forwarded { slot, .. } => Some(*slot),
            Pending::Piece { of } => self.slot_of_pending(&self.pending[of.0 as usize]),
        }
    }

    fn is_of(&self, at: usize, pending: &Pending) -> bool {
        self.slot_of_pending(pending).is_some_and(|slot| self.volumes[slot.0 as usize].shard == at)
    }

    /// Answers a command that its store never will.
    fn give_up(&mut self, io: IoId) {
        let slot = self.slot_of_pending(&self.pending[io.0 as usize]).expect("somebody waits for it");
        let pending = std::mem::replace(&mut self.pending[io.0 as usize], Pending::Free);
        self.ways.forget(io);
        if let Pending::Forwarded { asker, .. } = pending {
            self.volumes[slot.0 as usize].held -= 1;
            return self.give_up_visit(io, asker);
        }
        let payload = self.memory.take_io(io);
        let volume = &mut self.volumes[slot.0 as usize];
        volume.held -= u32::from(!matches!(pending, Pending::Pieces { .. }));
        volume.counters.errors += u64::from(!matches!(pending, Pending::Piece { .. }));
        match (pending, payload) {
            // The command that it is of is given up by itself.
            (Pending::Piece { .. }, _) => {}
            (Pending::Local { tag, .. }, Payload::Buf { buf, .. }) => self.local_done.push(LocalDone { tag, status: TOLD, buf: Some(buf) }),
            (Pending::Local { tag, .. }, _) => self.local_done.push(LocalDone { tag, status: TOLD, buf: None }),
            (_, Payload::Io(io)) => answer(io, TOLD),
            (_, Payload::Buf { .. } | Payload::None) => unreachable!("host commands hold an I/O"),
        }
    }

    /// An order for a store that is not run any more: it stops when nothing of it is out, and does nothing else.
    pub(super) fn order_quarantined(&mut self, at: usize, id: OrderId, order: &Order) {
        if *order != Order::Stop {
            return (self.report)(Report::OrderDone { id, result: Err(OrderError::NotServing) });
        }
        if let Some(shard) = self.shards[at].as_mut() {
            shard.orders.push(id);
        }
        self.answer_stops(at);
    }

    fn answer_stops(&mut self, at: usize) {
        let Some(shard) = self.shards[at].as_mut().filter(|shard| shard.out == 0) else { return };
        for id in shard.orders.drain(..) {
            (self.report)(Report::OrderDone { id, result: Ok(()) });
        }
    }
}
