//! What comes in on a connection: bytes to whole frames, every bound checked before anything is set aside.
//!
//! A header is trusted for its checksum and limits, a body for its own; payload goes straight into buffers of the engine's, one for each
//! word, and is the engine's to verify. Where no buffer can be had, reading stops until there is one. Not here: the socket
//! (a [`Source`]), and what a frame brings about.

use std::collections::VecDeque;

use penstock_engine::{BufId, Memory, PeerWord};
use penstock_wire::peer::{Beat, Body, HEADER, Header, Hello, Kind};
use penstock_wire::{BLOCK, DecodeError};
use thiserror::Error;

/// Bytes of a hello's body at most: all that a stranger can make us set aside.
const HELLO_MAX: u32 = 512;

/// Where bytes come from.
pub trait Source {
    fn read(&mut self, to: &mut [u8]) -> Taken;
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Taken {
    /// So many; never 0.
    Bytes(usize),
    /// None for now.
    Nothing,
    /// The other end has closed.
    Ended,
    Failed(String),
}

/// Why a connection is of no more use.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum IntakeError {
    #[error("it was closed by the other end")]
    Ended,
    #[error("reading failed: {0}")]
    Read(String),
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("frame {found} came where frame {expected} belongs")]
    Sequence { found: u64, expected: u64 },
    #[error("a frame of kind {0:?} came from an end that has not proven who it is")]
    Early(Kind),
    #[error("a hello came from an end that has proven who it is")]
    Late,
    #[error("a frame is of version {found} of the protocol; {agreed} was agreed")]
    Version { found: u32, agreed: u32 },
}

/// A whole frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Came {
    Hello(Hello),
    Beat(Beat),
    /// In order; each with its payload, which nobody has verified.
    Words(Vec<(PeerWord, Option<BufId>)>),
}

/// How reading left off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    /// There was no more.
    Drained,
    /// There may be more: the budget is spent, or a hello has to be answered first.
    More,
    /// No buffer: the rest stays where it is.
    Stalled,
}

enum Stage {
    Head,
    Body(Header),
    /// Words whose buffers are not had yet.
    Short(Vec<PeerWord>),
    Payload {
        words: Vec<(PeerWord, Option<BufId>)>,
        /// Buffers that are not full yet, with their bytes.
        left: VecDeque<(BufId, usize)>,
        /// Bytes in the first of them.
        have: usize,
    },
}

pub struct Intake {
    stage: Stage,
    head: [u8; HEADER],
    body: Vec<u8>,
    /// Bytes of head or body that are there.
    have: usize,
    sequence: u64,
    /// The version that was agreed; hellos alone are taken before.
    version: Option<u32>,
    pub frames: u64,
    pub bytes: u64,
}

impl Default for Intake {
    fn default() -> Self {
        Self { stage: Stage::Head, head: [0; HEADER], body: Vec::new(), have: 0, sequence: 1, version: None, frames: 0, bytes: 0 }
    }
}

impl Intake {
    /// The other end has proven who it is: frames of this version follow, and no hello.
    pub fn agreed(&mut self, version: u32) {
        self.version = Some(version);
    }

    /// Waits for memory.
    pub fn is_stalled(&self) -> bool {
        matches!(self.stage, Stage::Short(_))
    }

    /// Gives back what a frame that never became whole was to go into.
    pub fn give_back(&mut self, memory: &mut impl Memory) {
        if let Stage::Payload { words, .. } = std::mem::replace(&mut self.stage, Stage::Head) {
            words.into_iter().filter_map(|(_, buf)| buf).for_each(|buf| memory.free(buf));
        }
    }

    /// Reads on, at most about `budget` bytes.
    ///
    /// # Errors
    /// When nothing that follows can be believed. [`Self::give_back`] then.
    pub fn read(
        &mut self,
        source: &mut impl Source,
        memory: &mut impl Memory,
        budget: usize,
        out: &mut Vec<Came>,
    ) -> Result<Rest, IntakeError> {
        let mut spent = 0;
        loop {
            if spent >= budget {
                return Ok(Rest::More);
            }
            let took = match &mut self.stage {
                Stage::Head => source.read(&mut self.head[self.have..]),
                Stage::Body(_) if self.have == self.body.len() => Taken::Bytes(0),
                Stage::Body(_) => source.read(&mut self.body[self.have..]),
                Stage::Short(_) => Taken::Bytes(0),
                Stage::Payload { left, have, .. } => match left.front() {
                    Some((buf, len)) => source.read(&mut memory.bytes_mut(*buf)[*have..*len]),
                    None => Taken::Bytes(0),
                },
            };
            let took = match took {
                Taken::Bytes(took) => took,
                Taken::Nothing => return Ok(Rest::Drained),
                Taken::Ended => return Err(IntakeError::Ended),
                Taken::Failed(why) => return Err(IntakeError::Read(why)),
            };
            spent += took;
            self.bytes += took as u64;
            match std::mem::replace(&mut self.stage, Stage::Head) {
                Stage::Head => {
                    self.have += took;
                    if self.have == HEADER {
                        self.on_header()?;
                    }
                }
                Stage::Body(header) => {
                    self.have += took;
                    if self.have < self.body.len() {
                        self.stage = Stage::Body(header);
                    } else if self.on_body(&header, memory, out)? {
                        return Ok(Rest::More);
                    }
                }
                Stage::Short(words) => self.stage = place(words, memory),
                Stage::Payload { words, mut left, mut have } => {
                    have += took;
                    if left.front().is_some_and(|(_, len)| have == *len) {
                        left.pop_front();
                        have = 0;
                    }
                    self.stage = Stage::Payload { words, left, have };
                }
            }
            if self.is_stalled() {
                return Ok(Rest::Stalled);
            }
            if let Stage::Payload { left, .. } = &self.stage
                && left.is_empty()
                && let Stage::Payload { words, .. } = std::mem::replace(&mut self.stage, Stage::Head)
            {
                out.push(Came::Words(words));
            }
        }
    }

    fn on_header(&mut self) -> Result<(), IntakeError> {
        let header = Header::decode(&self.head)?;
        if header.sequence != self.sequence {
            return Err(IntakeError::Sequence { found: header.sequence, expected: self.sequence });
        }
        match (self.version, header.kind) {
            (None, Kind::Hello) if header.body_len > HELLO_MAX => {
                let (found, limit) = (header.body_len.into(), HELLO_MAX.into());
                return Err(DecodeError::Limit { what: "bytes of a hello", found, limit }.into());
            }
            (None, Kind::Hello) => {}
            (None, kind) => return Err(IntakeError::Early(kind)),
            (Some(_), Kind::Hello) => return Err(IntakeError::Late),
            (Some(agreed), _) if header.version != agreed => return Err(IntakeError::Version { found: header.version, agreed }),
            (Some(_), _) => {}
        }
        self.body.clear();
        self.body.resize(header.body_len as usize, 0);
        self.have = 0;
        self.stage = Stage::Body(header);
        Ok(())
    }

    /// True when somebody has to act on it before anything more is read.
    fn on_body(&mut self, header: &Header, memory: &mut impl Memory, out: &mut Vec<Came>) -> Result<bool, IntakeError> {
        let body = Body::decode(header, &self.body)?;
        self.have = 0;
        self.sequence += 1;
        self.frames += 1;
        match PeerWord::of(body) {
            Ok(words) => self.stage = place(words, memory),
            Err(body) => match *body {
                Body::Hello(hello) => {
                    out.push(Came::Hello(hello));
                    return Ok(true);
                }
                Body::Beat(beat) => out.push(Came::Beat(beat)),
                other => unreachable!("{other:?} has words"),
            },
        }
        Ok(false)
    }
}

/// Buffers for the payload of all words, or for none.
fn place(words: Vec<PeerWord>, memory: &mut impl Memory) -> Stage {
    let mut bufs: Vec<Option<BufId>> = Vec::with_capacity(words.len());
    let mut left = VecDeque::new();
    for word in &words {
        let blocks = word.payload_blocks();
        let buf = if blocks == 0 { None } else { memory.alloc(blocks) };
        if blocks > 0 && buf.is_none() {
            bufs.into_iter().flatten().for_each(|buf| memory.free(buf));
            return Stage::Short(words);
        }
        left.extend(buf.map(|buf| (buf, blocks as usize * BLOCK)));
        bufs.push(buf);
    }
    Stage::Payload { words: words.into_iter().zip(bufs).collect(), left, have: 0 }
}

#[cfg(test)]
mod tests {
    use penstock_wire::peer::{BODY_MAX, PROTOCOL};
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{NodeMemory, Source as From};
    use crate::peer::tests::{append, beat, hello, message};

    /// Bytes that come in pieces of these lengths, then nothing.
    struct Bytes {
        bytes: VecDeque<u8>,
        piece: usize,
    }

    impl Source for Bytes {
        fn read(&mut self, to: &mut [u8]) -> Taken {
            let count = to.len().min(self.piece).min(self.bytes.len());
            if count == 0 {
                return Taken::Nothing;
            }
            to[..count].iter_mut().for_each(|byte| *byte = self.bytes.pop_front().expect("counted"));
            Taken::Bytes(count)
        }
    }

    fn memory() -> NodeMemory {
        NodeMemory::new(From::Heap, 64 << 20)
    }

    fn frame(body: &Body, sequence: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = body.encode(PROTOCOL, sequence);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Reads all there is; hellos are taken as they come and the last one agrees.
    fn read(bytes: Vec<u8>, piece: usize, agreed: bool, memory: &mut NodeMemory) -> (Vec<Came>, Result<Rest, IntakeError>) {
        let mut intake = Intake::default();
        let mut source = Bytes { bytes: bytes.into(), piece };
        let mut out = Vec::new();
        if agreed {
            intake.agreed(PROTOCOL);
        }
        loop {
            match intake.read(&mut source, memory, usize::MAX, &mut out) {
                Ok(Rest::More) => {}
                end => {
                    intake.give_back(memory);
                    return (out, end);
                }
            }
        }
    }

    #[test]
    fn frames_come_whole_however_their_bytes_are_cut() {
        let (first, one) = append(&[1, 2]);
        let (second, two) = append(&[7]);
        let groups = Body::Groups(vec![message(3), first.clone(), second.clone()]);
        let mut bytes = frame(&Body::Beat(beat()), 1, &[]);
        bytes.extend(frame(&groups, 2, &[one.clone(), two.clone()].concat()));
        bytes.extend(frame(&Body::Groups(vec![]), 3, &[]));
        for piece in [1, 7, 48, 4096, usize::MAX] {
            let mut memory = memory();
            let (mut came, end) = read(bytes.clone(), piece, true, &mut memory);
            assert_eq!(end, Ok(Rest::Drained));
            assert_eq!((came.remove(0), came.len()), (Came::Beat(beat()), 2));
            assert_eq!(came.remove(1), Came::Words(vec![]));
            let Came::Words(words) = came.remove(0) else { panic!("words") };
            let payloads: Vec<_> = words.iter().map(|(_, buf)| buf.map(|buf| memory.bytes(buf).to_vec())).collect();
            assert_eq!(payloads, [None, Some(one.clone()), Some(two.clone())]);
            assert_eq!(words[1].0, PeerWord::Group(first.clone()));
            words.iter().filter_map(|word| word.1).for_each(|buf| memory.free(buf));
            assert_eq!(memory.buffers_out(), 0);
        }
    }

    #[test]
    fn frame_that_must_not_come_ends_the_connection() {
        let early = read(frame(&Body::Beat(beat()), 1, &[]), 100, false, &mut memory()).1;
        assert_eq!(early, Err(IntakeError::Early(Kind::Beat)));
        let late = read(frame(&Body::Hello(hello()), 1, &[]), 100, true, &mut memory()).1;
        assert_eq!(late, Err(IntakeError::Late));
        let repeat = [frame(&Body::Beat(beat()), 1, &[]), frame(&Body::Beat(beat()), 1, &[])].concat();
        assert_eq!(read(repeat, 100, true, &mut memory()).1, Err(IntakeError::Sequence { found: 1, expected: 2 }));
        let gap = frame(&Body::Beat(beat()), 2, &[]);
        assert_eq!(read(gap, 100, true, &mut memory()).1, Err(IntakeError::Sequence { found: 2, expected: 1 }));
    }

    #[test]
    fn stranger_cannot_make_us_set_aside_more_than_a_hello() {
        let big = Header { version: 1, kind: Kind::Hello, body_len: BODY_MAX as u32, body_crc: 0, payload_blocks: 0, sequence: 1 };
        let end = read(big.encode().to_vec(), 100, false, &mut memory()).1;
        assert!(matches!(end, Err(IntakeError::Decode(DecodeError::Limit { limit: 512, .. }))), "{end:?}");
        let beyond = Header { body_len: BODY_MAX as u32 + 1, kind: Kind::Groups, ..big };
        assert!(matches!(read(beyond.encode().to_vec(), 100, true, &mut memory()).1, Err(IntakeError::Decode(_))));
    }

    #[test]
    fn hello_is_handed_over_before_what_follows_is_read() {
        let bytes = [frame(&Body::Hello(hello()), 1, &[]), frame(&Body::Beat(beat()), 2, &[])].concat();
        let (mut intake, mut out) = (Intake::default(), Vec::new());
        let mut source = Bytes { bytes: bytes.into(), piece: 4096 };
        assert_eq!(intake.read(&mut source, &mut memory(), usize::MAX, &mut out), Ok(Rest::More));
        assert_eq!(out, [Came::Hello(hello())]);
        intake.agreed(PROTOCOL);
        assert_eq!(intake.read(&mut source, &mut memory(), usize::MAX, &mut out), Ok(Rest::Drained));
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn reading_stops_without_memory_and_goes_on_where_it_was() {
        let (word, payload) = append(&[9; 200]);
        let mut memory = NodeMemory::new(From::Heap, 2 << 20);
        let held: Vec<BufId> = std::iter::from_fn(|| memory.alloc(264)).collect();
        assert!(!held.is_empty());
        let mut source = Bytes { bytes: frame(&Body::Groups(vec![word]), 1, &payload).into(), piece: 3000 };
        let (mut intake, mut out) = (Intake::default(), Vec::new());
        intake.agreed(PROTOCOL);
        for _ in 0..3 {
            assert_eq!(intake.read(&mut source, &mut memory, usize::MAX, &mut out), Ok(Rest::Stalled));
        }
        assert!(out.is_empty() && intake.is_stalled());
        held.into_iter().for_each(|buf| memory.free(buf));
        assert_eq!(intake.read(&mut source, &mut memory, usize::MAX, &mut out), Ok(Rest::Drained));
        let Some(Came::Words(words)) = out.pop() else { panic!("the words came") };
        assert_eq!(memory.bytes(words[0].1.unwrap()), payload);
    }

    #[test]
    fn budget_bounds_what_one_turn_reads() {
        let (word, payload) = append(&[9; 16]);
        let mut source = Bytes { bytes: frame(&Body::Groups(vec![word]), 1, &payload).into(), piece: 1000 };
        let (mut intake, mut out, mut memory) = (Intake::default(), Vec::new(), memory());
        intake.agreed(PROTOCOL);
        assert_eq!(intake.read(&mut source, &mut memory, 5000, &mut out), Ok(Rest::More));
        assert!(intake.bytes < 7000 && out.is_empty());
        intake.give_back(&mut memory);
        assert_eq!(memory.buffers_out(), 0, "a connection that ends in the middle of a frame keeps nothing");
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_or_end_the_connection(bytes in proptest::collection::vec(any::<u8>(), 0..300), agreed: bool) {
            let mut memory = memory();
            let _ = read(bytes, 64, agreed, &mut memory);
        }

        #[test]
        fn frames_with_bytes_changed_harm_nothing(at in 0usize..9000, to: u8, agreed: bool) {
            let (word, payload) = append(&[1, 2]);
            let mut bytes = frame(&Body::Groups(vec![message(2), word]), 1, &payload);
            let at = at % bytes.len();
            bytes[at] = to;
            let mut memory = memory();
            let (came, _) = read(bytes, 512, agreed, &mut memory);
            for one in came {
                if let Came::Words(words) = one {
                    words.into_iter().filter_map(|word| word.1).for_each(|buf| memory.free(buf));
                }
            }
            prop_assert_eq!(memory.buffers_out(), 0);
        }
    }
}
