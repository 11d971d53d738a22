//! What is to go out on a connection: words gathered into frames, their payload copied when they are put in, all of it bounded.
//!
//! Words go in the order in which they came, as many to a frame as it holds; beats go before them, so that a long queue does not make a
//! node look dead. Full means full: what does not fit is not taken, and whoever sent it is told. Not here: the socket.

use std::collections::VecDeque;

use penstock_engine::PeerWord;
use penstock_wire::BLOCK;
use penstock_wire::peer::{
    AdmitAnswer, AdmitAsk, BODY_MAX, Beat, Body, DigestAnswer, DigestAsk, EntriesAnswer, EntryState, FRAME_BLOCKS_MAX, FetchAnswer,
    FetchAsk, HEADER, Hello, Message,
};
use spdk_rs::lend::LendBuf;

/// Bytes of a chunk of send memory: a frame with all it may carry is within the ranges that a socket takes at a time.
pub const CHUNK: usize = 128 << 10;
const _: () = assert!(FRAME_BLOCKS_MAX as usize * BLOCK / CHUNK + (BODY_MAX + HEADER).div_ceil(CHUNK) < spdk_rs::sock::RANGES_MAX);
const _: () = assert!(CHUNK.is_multiple_of(BLOCK));
/// Chunks that are kept for the next frames; what a burst took beyond goes back to the system.
const CHUNKS_KEPT: usize = 64;
/// What a frame of messages holds before the first one: their count.
const COUNT: usize = 4;
/// Bytes of the body of an ask for entries, and of an answer without entries.
const ASK: usize = 56;
const ANSWER: usize = 64;

fn answer_len(answer: &EntriesAnswer) -> usize {
    let of = |state: &EntryState| 8 + if let EntryState::Whole(entry) = state { entry.encoded_len() } else { 0 };
    ANSWER + answer.entries.iter().map(of).sum::<usize>()
}

/// Send memory of one core.
#[derive(Default)]
pub struct Chunks {
    free: Vec<LendBuf>,
}

impl Chunks {
    fn take(&mut self) -> LendBuf {
        self.free.pop().unwrap_or_else(|| LendBuf::heap(CHUNK))
    }

    pub fn give(&mut self, chunk: LendBuf) {
        if self.free.len() < CHUNKS_KEPT && !chunk.is_lent() {
            self.free.push(chunk);
        }
    }
}

/// Bytes in chunks, each full but the last.
#[derive(Default)]
pub struct Packed {
    chunks: Vec<LendBuf>,
    len: usize,
}

impl Packed {
    /// Adds `len` bytes; `fill` is asked for each piece of them, by its place among them.
    fn add(&mut self, len: usize, pool: &mut Chunks, mut fill: impl FnMut(usize, &mut [u8])) {
        let mut done = 0;
        while done < len {
            let at = self.len % CHUNK;
            if at == 0 {
                self.chunks.push(pool.take());
            }
            let count = (len - done).min(CHUNK - at);
            let chunk = self.chunks.last_mut().expect("there is room in it");
            fill(done, &mut chunk.bytes_mut()[at..at + count]);
            self.len += count;
            done += count;
        }
    }

    /// Chunks and the bytes used of each.
    pub fn pieces(&self) -> impl Iterator<Item = (&LendBuf, usize)> {
        self.chunks.iter().enumerate().map(|(at, chunk)| (chunk, (self.len - at * CHUNK).min(CHUNK)))
    }

    fn held(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    fn give_back(self, pool: &mut Chunks) {
        self.chunks.into_iter().for_each(|chunk| pool.give(chunk));
    }
}

enum Kind {
    Messages(Vec<Message>),
    Single(Body),
}

/// A frame that has not gone out.
struct Draft {
    kind: Kind,
    body_len: usize,
    blocks: u32,
    payload: Packed,
}

impl Draft {
    /// What it counts in the queue: memory that it holds, however little of it is used.
    fn weight(&self) -> usize {
        HEADER + self.body_len + self.payload.held()
    }
}

/// A frame on its way, in order: memory that the socket has until it says so.
pub struct Frame {
    pub head: Packed,
    pub payload: Packed,
}

impl Frame {
    pub fn len(&self) -> usize {
        self.head.len + self.payload.len
    }

    fn held(&self) -> usize {
        self.head.held() + self.payload.held()
    }
}

/// See the module.
pub struct Outbox {
    limit: usize,
    hellos: VecDeque<Hello>,
    beat: Option<Beat>,
    drafts: VecDeque<Draft>,
    flying: VecDeque<Frame>,
    sequence: u64,
    queued: usize,
}

impl Outbox {
    /// `limit`: bytes that may wait, on their way included.
    pub fn new(limit: usize) -> Self {
        Self { limit, hellos: VecDeque::new(), beat: None, drafts: VecDeque::new(), flying: VecDeque::new(), sequence: 0, queued: 0 }
    }

    /// Bytes that wait or are on their way.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Frames that the socket has.
    pub fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Before all else: how two ends begin.
    pub fn hello(&mut self, hello: Hello) {
        self.hellos.push_back(hello);
    }

    /// One that has not gone out by the time of the next says nothing that the next does not say better.
    pub fn beat(&mut self, beat: Beat) {
        self.beat = Some(beat);
    }

    /// Takes a word, and its payload by way of `copy`, which is asked for pieces by their place in it. False: there is no room.
    pub fn word(&mut self, word: PeerWord, pool: &mut Chunks, copy: impl FnMut(usize, &mut [u8])) -> bool {
        let blocks = word.payload_blocks();
        let body_len = match &word {
            PeerWord::Group(message) => COUNT + message.encoded_len(),
            PeerWord::EntriesAsk(_) => ASK,
            PeerWord::EntriesAnswer(answer) => answer_len(answer),
            PeerWord::CopyAsk(ask) => ask.encoded_len(),
            PeerWord::CopyAnswer(answer) => answer.encoded_len(),
            PeerWord::FetchAsk(_) => FetchAsk::ENCODED_LEN,
            PeerWord::AdmitAsk(_) => AdmitAsk::BYTES,
            PeerWord::AdmitAnswer(_) => AdmitAnswer::BYTES,
            PeerWord::DigestAsk(_) => DigestAsk::BYTES,
            PeerWord::DigestAnswer(_) => DigestAnswer::BYTES,
            PeerWord::FetchAnswer(_) => FetchAnswer::ENCODED_LEN,
            PeerWord::Forward(forward) => forward.encoded_len(),
            PeerWord::Forwarded(answer) => answer.encoded_len(),
        };
        let kind = match word {
            PeerWord::Group(message) => Kind::Messages(vec![message]),
            word => Kind::Single(Body::from(word)),
        };
        // What no frame holds is nothing that an engine of this version says; a peer would refuse it.
        if body_len > BODY_MAX || blocks > FRAME_BLOCKS_MAX {
            return false;
        }
        let bytes = blocks as usize * BLOCK;
        if self.queued + HEADER + body_len + bytes.next_multiple_of(CHUNK) > self.limit {
            return false;
        }
        let joins = |last: &&mut Draft| {
            matches!((&last.kind, &kind), (Kind::Messages(_), Kind::Messages(_)))
                && last.body_len + body_len - COUNT <= BODY_MAX
                && last.blocks + blocks <= FRAME_BLOCKS_MAX
        };
        match self.drafts.back_mut().filter(joins) {
            Some(last) => {
                self.queued -= last.weight();
                if let (Kind::Messages(messages), Kind::Messages(more)) = (&mut last.kind, kind) {
                    messages.extend(more);
                }
                last.body_len += body_len - COUNT;
                last.blocks += blocks;
            }
            None => self.drafts.push_back(Draft { kind, body_len, blocks, payload: Packed::default() }),
        }
        let last = self.drafts.back_mut().expect("just put there");
        last.payload.add(bytes, pool, copy);
        self.queued += last.weight();
        true
    }

    /// The next frame, if one waits: on its way from here on, until [`Self::sent`].
    pub fn next(&mut self, version: u32, pool: &mut Chunks) -> Option<&Frame> {
        let (body, payload, weight) = if let Some(hello) = self.hellos.pop_front() {
            (Body::Hello(hello), Packed::default(), 0)
        } else if let Some(beat) = self.beat.take() {
            (Body::Beat(beat), Packed::default(), 0)
        } else {
            let draft = self.drafts.pop_front()?;
            let weight = draft.weight();
            let body = match draft.kind {
                Kind::Messages(messages) => Body::Groups(messages),
                Kind::Single(body) => body,
            };
            (body, draft.payload, weight)
        };
        self.sequence += 1;
        let bytes = body.encode(version, self.sequence);
        let mut head = Packed::default();
        head.add(bytes.len(), pool, |at, to| to.copy_from_slice(&bytes[at..at + to.len()]));
        let frame = Frame { head, payload };
        self.queued = self.queued - weight + frame.held();
        self.flying.push_back(frame);
        self.flying.back()
    }

    /// The socket has sent the oldest frame that it had.
    pub fn sent(&mut self, pool: &mut Chunks) {
        let Some(frame) = self.flying.pop_front() else { return };
        self.queued -= frame.held();
        frame.head.give_back(pool);
        frame.payload.give_back(pool);
    }
}

#[cfg(test)]
mod tests {
    use penstock_wire::peer::{EntriesAsk, Header, MemberNo, MessageBody, PROTOCOL};
    use penstock_wire::{Index, SegmentId, Term};

    use super::*;

    fn word(term: u64) -> PeerWord {
        PeerWord::Group(crate::peer::tests::message(term))
    }

    fn ask() -> PeerWord {
        let ask = EntriesAsk { id: 1, segment: SegmentId([1; 16]), from: MemberNo(1), to: MemberNo(2), first: Index(1), last: Index(2) };
        PeerWord::EntriesAsk(ask)
    }

    fn append(blocks: u8) -> (PeerWord, Vec<u8>) {
        let (message, payload) = crate::peer::tests::append(&(1..=blocks).collect::<Vec<u8>>());
        (PeerWord::Group(message), payload)
    }

    fn put(outbox: &mut Outbox, pool: &mut Chunks, (word, payload): (PeerWord, Vec<u8>)) -> bool {
        outbox.word(word, pool, |at, to| to.copy_from_slice(&payload[at..at + to.len()]))
    }

    /// The bytes of the next frame, which is sent at once.
    fn frame(outbox: &mut Outbox, pool: &mut Chunks) -> Option<(Header, Body, Vec<u8>)> {
        let next = outbox.next(PROTOCOL, pool)?;
        let pieces = next.head.pieces().chain(next.payload.pieces());
        let bytes: Vec<u8> = pieces.flat_map(|(chunk, len)| chunk.bytes()[..len].to_vec()).collect();
        assert_eq!(bytes.len(), next.len());
        outbox.sent(pool);
        let header = Header::decode(&bytes).unwrap();
        let (body, payload) = bytes[HEADER..].split_at(header.body_len as usize);
        Some((header, Body::decode(&header, body).unwrap(), payload.to_vec()))
    }

    #[test]
    fn words_are_gathered_in_order_and_frames_are_counted() {
        let (mut outbox, mut pool) = (Outbox::new(64 << 20), Chunks::default());
        let (one, two) = (append(2), append(40));
        for item in [(word(1), vec![]), one.clone(), (word(2), vec![]), two.clone(), (ask(), vec![]), (word(3), vec![])] {
            assert!(put(&mut outbox, &mut pool, item));
        }
        let beat = crate::peer::tests::beat();
        outbox.beat(Beat { count: 9, ..beat.clone() });
        outbox.beat(beat.clone());
        let hello = crate::peer::tests::hello();
        outbox.hello(hello.clone());
        assert_eq!(frame(&mut outbox, &mut pool).unwrap().1, Body::Hello(hello), "a hello before all else");
        let (header, body, _) = frame(&mut outbox, &mut pool).unwrap();
        assert_eq!((header.sequence, body), (2, Body::Beat(beat)), "the newest beat, before all words");
        let (header, body, payload) = frame(&mut outbox, &mut pool).unwrap();
        let messages = |words: &[&PeerWord]| {
            let of = |word: &&PeerWord| if let PeerWord::Group(message) = word { message.clone() } else { panic!("a message") };
            Body::Groups(words.iter().map(of).collect())
        };
        assert_eq!((header.sequence, header.payload_blocks), (3, 42));
        assert_eq!(body, messages(&[&word(1), &one.0, &word(2), &two.0]));
        assert_eq!(payload, [one.1, two.1].concat());
        assert!(matches!(frame(&mut outbox, &mut pool).unwrap().1, Body::EntriesAsk(_)));
        let (header, body, _) = frame(&mut outbox, &mut pool).unwrap();
        assert_eq!((header.sequence, body), (5, messages(&[&word(3)])));
        assert!(frame(&mut outbox, &mut pool).is_none());
        assert_eq!((outbox.queued(), outbox.flying()), (0, 0));
    }

    #[test]
    fn frames_hold_no_more_than_a_frame_may() {
        let (mut outbox, mut pool) = (Outbox::new(1 << 30), Chunks::default());
        let (large, payload) = append(200);
        let many = 5000;
        for _ in 0..12 {
            assert!(put(&mut outbox, &mut pool, (large.clone(), payload.clone())));
        }
        for n in 1..=many {
            assert!(put(&mut outbox, &mut pool, (word(n), vec![])));
        }
        let (mut blocks, mut messages) = (0, 0);
        while let Some((header, Body::Groups(list), _)) = frame(&mut outbox, &mut pool) {
            blocks += header.payload_blocks;
            messages += list.len();
        }
        assert_eq!((blocks, messages), (12 * 200, 12 + many as usize));
    }

    #[test]
    fn full_queue_takes_nothing_until_something_is_sent() {
        let (mut outbox, mut pool) = (Outbox::new(1 << 20), Chunks::default());
        let mut taken = 0;
        while put(&mut outbox, &mut pool, append(32)) {
            taken += 1;
        }
        assert!((6..=8).contains(&taken), "{taken} of 128 KiB in 1 MiB");
        assert!(!put(&mut outbox, &mut pool, append(32)));
        assert!(outbox.queued() <= 1 << 20);
        assert!(frame(&mut outbox, &mut pool).is_some());
        assert!(put(&mut outbox, &mut pool, append(32)));
    }

    #[test]
    fn answer_is_as_long_as_it_is_counted() {
        let (message, payload) = crate::peer::tests::append(&[1, 2, 3]);
        let MessageBody::Append(append) = message.body else { panic!("an append") };
        let entries = vec![EntryState::Unknown, EntryState::Whole(append.entries[0].clone())];
        let (from, to) = (MemberNo(1), MemberNo(2));
        let answer = EntriesAnswer {
            id: 1,
            segment: SegmentId([1; 16]),
            from,
            to,
            term: Term(1),
            leads: true,
            more: false,
            first: Index(0),
            entries,
        };
        assert_eq!(Body::EntriesAnswer(answer.clone()).encode(PROTOCOL, 1).len() - HEADER, answer_len(&answer));
        let PeerWord::EntriesAsk(of) = ask() else { panic!("an ask") };
        assert_eq!(Body::EntriesAsk(of).encode(PROTOCOL, 1).len() - HEADER, ASK);
        let (mut outbox, mut pool) = (Outbox::new(64 << 20), Chunks::default());
        assert!(put(&mut outbox, &mut pool, (PeerWord::EntriesAnswer(answer), payload.clone())));
        assert_eq!(frame(&mut outbox, &mut pool).unwrap().2, payload);
    }

    #[test]
    fn chunks_are_used_again() {
        let (mut outbox, mut pool) = (Outbox::new(64 << 20), Chunks::default());
        for _ in 0..3 {
            assert!(put(&mut outbox, &mut pool, append(100)));
            assert!(frame(&mut outbox, &mut pool).is_some());
            assert_eq!(pool.free.len(), 5, "four of payload, one of descriptors");
        }
    }
}
