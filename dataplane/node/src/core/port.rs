//! How commands come to a core and answers leave it: the front doors' end of the loop.
//!
//! Every reactor core has one port, in a thread-local. A door's channel pushes what it is given onto the port of the core it runs
//! on; the core's loop takes it from there, or carries it to the volume's home core, a batch at a time, with one wake for
//! the batch. Bounded channels of arrays between cores: nothing is allocated per command. Not here: what a command means.

use std::cell::{Cell, OnceCell, RefCell};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use penstock_wire::HostId;
use spdk_rs::lend::RoamingIo;
use spdk_rs::thread::Waker;

use crate::command::Ask;
use crate::peer::StrayWord;
use crate::status::NvmeStatus;

/// A core's place in the node's list of cores.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CoreIndex(pub u16);

/// A volume's place on its home core. Never reused while the process lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VolumeSlot(pub u32);

/// A host's command on its way to the volume.
pub struct Request {
    pub io: RoamingIo,
    pub slot: VolumeSlot,
    pub host: HostId,
    /// Its door has one path by nature.
    pub forwards: bool,
    pub ask: Ask,
    /// Ticks when the first command of its batch came: reading the clock costs more than a batch takes to come in, and so latency is
    /// overstated rather than understated.
    pub since: u64,
}

/// What goes from core to core.
pub enum Parcel {
    Ask(Request),
    Answer(RoamingIo, spdk_rs::Status),
    /// What a peer said to a store of that core on a connection of this one.
    Word(Box<StrayWord>),
}

/// The other end of a core's channel.
#[derive(Clone)]
pub struct Peer {
    /// The reactor's core.
    pub core: spdk_rs::thread::Core,
    pub sender: Sender<Parcel>,
    pub waker: Waker,
}

/// Parcels that one core may have waiting for it.
pub const PARCELS_MAX: usize = 16 * 1024;

/// One core's port.
pub struct Port {
    pub me: CoreIndex,
    waker: Waker,
    peers: Vec<Peer>,
    receiver: Receiver<Parcel>,
    asks: RefCell<Vec<Request>>,
    answers: RefCell<Vec<(RoamingIo, spdk_rs::Status)>>,
    outgoing: RefCell<Vec<(CoreIndex, Parcel)>>,
    /// When the first command since the last turn came.
    first_came: Cell<u64>,
}

thread_local! {
    static PORT: OnceCell<Port> = const { OnceCell::new() };
}

/// Gives this core its port. Once, on the core.
pub fn install(me: CoreIndex, waker: Waker, receiver: Receiver<Parcel>, peers: Vec<Peer>) {
    let port = Port {
        me,
        waker,
        peers,
        receiver,
        asks: RefCell::new(Vec::with_capacity(1024)),
        answers: RefCell::new(Vec::with_capacity(1024)),
        outgoing: RefCell::new(Vec::with_capacity(1024)),
        first_came: Cell::new(0),
    };
    PORT.with(|cell| assert!(cell.set(port).is_ok(), "a core has one port"));
}

/// The port of the core that runs this, if it has one.
pub fn with<R>(f: impl FnOnce(&Port) -> R) -> Option<R> {
    PORT.with(|cell| cell.get().map(f))
}

impl Port {
    /// The place of a reactor core among the node's cores.
    pub fn index_of(&self, core: spdk_rs::thread::Core) -> CoreIndex {
        let at = self.peers.iter().position(|peer| peer.core == core);
        CoreIndex(at.expect("commands come to the node's own cores") as u16)
    }

    /// A command for a volume whose home is `home`.
    pub fn ask(&self, home: CoreIndex, io: RoamingIo, slot: VolumeSlot, host: HostId, forwards: bool, ask: Ask) {
        if self.asks.borrow().is_empty() && self.outgoing.borrow().is_empty() {
            self.first_came.set(spdk_rs::app::ticks());
        }
        let request = Request { io, slot, host, forwards, ask, since: self.first_came.get() };
        if home == self.me {
            self.asks.borrow_mut().push(request);
        } else {
            self.outgoing.borrow_mut().push((home, Parcel::Ask(request)));
        }
        self.waker.wake();
    }

    /// An answer for a command that came to this core or another.
    pub fn answer(&self, home: CoreIndex, io: RoamingIo, status: spdk_rs::Status) {
        if home == self.me {
            self.answers.borrow_mut().push((io, status));
        } else {
            self.outgoing.borrow_mut().push((home, Parcel::Answer(io, status)));
        }
        self.waker.wake();
    }

    /// Answers a command on the core that it came to, whichever that is.
    pub fn finish(&self, io: RoamingIo, status: NvmeStatus) {
        let home = self.index_of(io.home());
        self.answer(home, io, status.to_spdk());
    }

    /// Hands on what a peer said to a store of another core.
    pub(super) fn forward(&self, to: CoreIndex, word: Box<StrayWord>) {
        self.outgoing.borrow_mut().push((to, Parcel::Word(word)));
        self.waker.wake();
    }

    /// What came since the last turn: commands into `asks`, peers' words into `words`, answers for hosts of this core into the port's own
    /// list.
    pub(super) fn collect(&self, asks: &mut Vec<Request>, words: &mut Vec<StrayWord>) {
        asks.append(&mut self.asks.borrow_mut());
        for parcel in self.receiver.try_iter() {
            match parcel {
                Parcel::Ask(request) => asks.push(request),
                Parcel::Answer(io, status) => self.answers.borrow_mut().push((io, status)),
                Parcel::Word(word) => words.push(*word),
            }
        }
    }

    /// Sends what is for other cores, in order; what finds a full channel stays for the next turn. True if something stayed.
    pub(super) fn send_outgoing(&self) -> bool {
        let mut outgoing = self.outgoing.borrow_mut();
        if outgoing.is_empty() {
            return false;
        }
        // One bit per peer that got something; cores beyond 64 are woken each time.
        let mut woken = 0u64;
        let mut full = 0u64;
        let bit = |core: CoreIndex| 1u64 << (core.0 % 64);
        let mut kept = Vec::new();
        for (core, parcel) in outgoing.drain(..) {
            if full & bit(core) != 0 {
                kept.push((core, parcel));
                continue;
            }
            match self.peers[usize::from(core.0)].sender.try_send(parcel) {
                Ok(()) => woken |= bit(core),
                Err(TrySendError::Full(parcel) | TrySendError::Disconnected(parcel)) => {
                    full |= bit(core);
                    kept.push((core, parcel));
                }
            }
        }
        outgoing.append(&mut kept);
        let left = !outgoing.is_empty();
        drop(outgoing);
        for (at, peer) in self.peers.iter().enumerate() {
            if woken & bit(CoreIndex(at as u16)) != 0 {
                peer.waker.wake();
            }
        }
        left
    }

    /// Completes what hosts of this core wait for. Their next commands may come in from inside of this: no list is borrowed meanwhile.
    pub(super) fn complete_answers(&self, scratch: &mut Vec<(RoamingIo, spdk_rs::Status)>) -> usize {
        std::mem::swap(scratch, &mut *self.answers.borrow_mut());
        let count = scratch.len();
        for (io, status) in scratch.drain(..) {
            io.complete(status);
        }
        count
    }
}
