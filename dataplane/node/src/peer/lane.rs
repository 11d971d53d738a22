//! One connection between this core and a core of a peer: its socket, and what goes in and out of it.
//!
//! What SPDK says of the socket is put aside by its closure and looked at when nobody is inside SPDK ([`Heard`]). Not here: which
//! lanes there are to be, and what their nodes make of them.

use std::cell::RefCell;
use std::rc::Rc;

use penstock_engine::Memory;
use penstock_wire::NodeId;
use penstock_wire::peer::{Beat, Hello, PROTOCOL};
use spdk_rs::Errno;
use spdk_rs::lend::SourcePart;
use spdk_rs::sock::{Connection, SockEvent};
use thiserror::Error;

use super::handshake::{Handshake, Known, Refusal, Step};
use super::intake::{Came, Intake, IntakeError, Rest, Source, Taken};
use super::outbox::{Chunks, Outbox};

/// Frames that a socket has at a time.
pub const DEPTH: usize = 8;
/// Bytes that one connection reads in one turn, so that the others have theirs.
const READ_BUDGET: usize = 4 << 20;
/// How long a core stays awake for a peer that takes nothing more; then it tries as often as it beats.
const PUSH_MS: u64 = 5;
/// Bytes that may wait for one peer's core.
pub const QUEUE_LIMIT: usize = 64 << 20;

/// What SPDK says of a socket.
#[derive(Debug)]
pub enum Heard {
    Connected(Result<(), Errno>),
    Readable,
    Written(Result<(), Errno>),
}

/// What was said of the sockets of a core, by their lane's number.
pub type Ear = Rc<RefCell<Vec<(u64, Heard)>>>;

/// The closure that a lane's socket is made with.
pub fn listen(ear: &Ear, id: u64) -> impl Fn(SockEvent<Vec<SourcePart>>) + 'static {
    let ear = ear.clone();
    move |event| {
        let heard = match event {
            SockEvent::Connected(result) => Heard::Connected(result),
            SockEvent::Readable => Heard::Readable,
            SockEvent::Written { result, .. } => Heard::Written(result),
        };
        ear.borrow_mut().push((id, heard));
    }
}

/// Why a lane ends.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum LaneError {
    #[error("it cannot be reached: {0}")]
    Unreachable(Errno),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Intake(#[from] IntakeError),
    #[error("sending failed: {0}")]
    Send(Errno),
    #[error("it did not say who it is within {0} ms")]
    Mute(u64),
    #[error("nothing was heard of it for {0} ms")]
    Silent(u64),
    #[error("it beats for another life of its process than it began with")]
    OtherLife,
    #[error("it stands still for {0} ms for want of memory here")]
    Stalled(u64),
}

/// Who began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Dials { node: NodeId, to_shard: u16 },
    Answers,
}

enum Stage {
    Shaking(Box<Handshake>),
    Up(Known),
}

pub struct Lane {
    pub id: u64,
    pub side: Side,
    stage: Stage,
    connection: Connection<Vec<SourcePart>>,
    intake: Intake,
    pub outbox: Outbox,
    /// There may be something to read.
    readable: bool,
    /// A dialler's hello, until it is connected.
    first: Option<Hello>,
    pub began: u64,
    pub heard: u64,
    /// When the kernel last took something.
    written: u64,
    /// Not heard for some beats.
    pub silent: bool,
    beats: u64,
    beat_heard: u64,
    pub sent_frames: u64,
    pub sent_bytes: u64,
}

/// A connection as bytes.
struct Bytes<'a>(&'a Connection<Vec<SourcePart>>);

impl Source for Bytes<'_> {
    fn read(&mut self, to: &mut [u8]) -> Taken {
        match self.0.read(to) {
            Ok(0) => Taken::Ended,
            Ok(count) => Taken::Bytes(count),
            Err(Errno::AGAIN) => Taken::Nothing,
            Err(errno) => Taken::Failed(errno.to_string()),
        }
    }
}

impl Lane {
    pub fn dialled(id: u64, to: (NodeId, u16), connection: Connection<Vec<SourcePart>>, shake: (Handshake, Hello), now: u64) -> Self {
        let side = Side::Dials { node: to.0, to_shard: to.1 };
        let (handshake, first) = shake;
        Self { first: Some(first), ..Self::new(id, side, handshake, connection, now) }
    }

    pub fn answered(id: u64, connection: Connection<Vec<SourcePart>>, handshake: Handshake, now: u64) -> Self {
        Self::new(id, Side::Answers, handshake, connection, now)
    }

    fn new(id: u64, side: Side, handshake: Handshake, connection: Connection<Vec<SourcePart>>, now: u64) -> Self {
        Self {
            id,
            side,
            stage: Stage::Shaking(Box::new(handshake)),
            connection,
            intake: Intake::default(),
            outbox: Outbox::new(QUEUE_LIMIT),
            readable: true,
            first: None,
            began: now,
            heard: now,
            written: now,
            silent: false,
            beats: 0,
            beat_heard: 0,
            sent_frames: 0,
            sent_bytes: 0,
        }
    }

    /// The other end, once it has proven itself.
    pub fn known(&self) -> Option<&Known> {
        if let Stage::Up(known) = &self.stage { Some(known) } else { None }
    }

    /// Whose it is, as far as that is known: proven, or dialled.
    pub fn node(&self) -> Option<NodeId> {
        match (&self.stage, self.side) {
            (Stage::Up(known), _) => Some(known.node),
            (_, Side::Dials { node, .. }) => Some(node),
            (_, Side::Answers) => None,
        }
    }

    pub fn is_stalled(&self) -> bool {
        self.intake.is_stalled()
    }

    /// There is more to do than what the socket will tell of: it says when it can be read, and not when it can be written.
    pub fn wants_turn(&self, now: u64) -> bool {
        self.readable && !self.is_stalled() || self.outbox.flying() > 0 && now.saturating_sub(self.written) < PUSH_MS
    }

    pub fn frames_heard(&self) -> (u64, u64) {
        (self.intake.frames, self.intake.bytes)
    }

    /// # Errors
    /// When the lane has ended by it.
    pub fn on_heard(&mut self, heard: Heard, now: u64, chunks: &mut Chunks) -> Result<(), LaneError> {
        match heard {
            Heard::Connected(Ok(())) => {
                if let Some(first) = self.first.take() {
                    self.outbox.hello(first);
                }
                self.readable = true;
            }
            Heard::Connected(Err(errno)) => return Err(LaneError::Unreachable(errno)),
            Heard::Readable => self.readable = true,
            Heard::Written(Ok(())) => {
                self.written = now;
                self.outbox.sent(chunks);
            }
            Heard::Written(Err(errno)) => return Err(LaneError::Send(errno)),
        }
        Ok(())
    }

    /// Reads what there is; words into `out`, which is empty. True: it has just come up.
    ///
    /// # Errors
    /// When the lane has ended.
    pub fn read(
        &mut self,
        memory: &mut impl Memory,
        now: u64,
        is_peer: impl Fn(NodeId) -> bool,
        out: &mut Vec<Came>,
    ) -> Result<bool, LaneError> {
        if self.first.is_some() || !(self.readable || self.is_stalled()) {
            return Ok(false);
        }
        let before = self.intake.bytes;
        let mut came_up = false;
        let mut end = Ok(());
        loop {
            let rest = self.intake.read(&mut Bytes(&self.connection), memory, READ_BUDGET, out);
            // A hello is alone and last: nothing is read beyond it before it is answered.
            if let Some(Came::Hello(_)) = out.last()
                && let Some(Came::Hello(hello)) = out.pop()
            {
                match self.on_hello(hello, &is_peer) {
                    Ok(up) => came_up |= up,
                    Err(refusal) => end = Err(refusal.into()),
                }
                if end.is_ok() && rest.is_ok() {
                    continue;
                }
            }
            match rest {
                Ok(rest) => self.readable = rest != Rest::Drained,
                Err(error) => end = end.and(Err(error.into())),
            }
            break;
        }
        if self.intake.bytes > before {
            self.heard = now;
        }
        for came in &*out {
            if let (Came::Beat(beat), Stage::Up(known)) = (came, &self.stage) {
                self.beat_heard = beat.count;
                if beat.incarnation != known.incarnation {
                    end = end.and(Err(LaneError::OtherLife));
                }
            }
        }
        out.retain(|came| matches!(came, Came::Words(_)));
        end.map(|()| came_up)
    }

    fn on_hello(&mut self, hello: Hello, is_peer: impl Fn(NodeId) -> bool) -> Result<bool, Refusal> {
        let Stage::Shaking(handshake) = &mut self.stage else { unreachable!("the intake takes hellos of strangers alone") };
        let Step { say, known } = handshake.on_hello(hello, is_peer)?;
        say.into_iter().for_each(|hello| self.outbox.hello(hello));
        let Some(known) = known else { return Ok(false) };
        self.intake.agreed(known.version);
        self.stage = Stage::Up(known);
        Ok(true)
    }

    /// Puts the next beat on its way.
    pub fn beat(&mut self, incarnation: penstock_wire::Incarnation, window: u64) {
        if self.known().is_some() {
            self.beats += 1;
            let (count, heard) = (self.beats, self.beat_heard);
            self.outbox.beat(Beat { incarnation, count, heard, window, drives: Vec::new(), spaces: Vec::new() });
        }
    }

    /// Hands to the socket what waits, as far as it takes it. True if anything went.
    ///
    /// # Errors
    /// When the lane has ended.
    pub fn flush(&mut self, now: u64, chunks: &mut Chunks) -> Result<bool, LaneError> {
        if self.first.is_some() {
            return Ok(false);
        }
        if self.outbox.flying() == 0 {
            self.written = now;
        }
        let mut went = false;
        while self.outbox.flying() < DEPTH {
            let version = self.known().map_or(PROTOCOL, |known| known.version);
            let Some(frame) = self.outbox.next(version, chunks) else { break };
            self.sent_frames += 1;
            self.sent_bytes += frame.len() as u64;
            let parts: Vec<SourcePart> =
                frame.head.pieces().chain(frame.payload.pieces()).map(|(chunk, len)| chunk.lend_source(0..len)).collect();
            if let Err(refused) = self.connection.write(parts, 0) {
                return Err(LaneError::Send(refused.errno));
            }
            went = true;
        }
        if went && let Err(errno) = self.connection.flush() {
            // What the kernel has no room for goes when it has; what is broken is told with the write.
            tracing::trace!(%errno, "a peer's socket does not take all at once");
        }
        Ok(went)
    }

    /// Gives back what it holds of the engine's memory.
    pub fn end(mut self, memory: &mut impl Memory) {
        self.intake.give_back(memory);
    }
}
