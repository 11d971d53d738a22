//! Words and frames that the tests of this module share.

use penstock_wire::batch::{ENTRY_HEAD, Section};
use penstock_wire::peer::{Append, Beat, Entry, EntryKind, Hello, MemberNo, Message, MessageBody, PROTOCOL};
use penstock_wire::{BLOCK, ClusterId, Incarnation, Index, NodeId, SegmentId, Term};

pub fn hello() -> Hello {
    Hello {
        oldest: 1,
        newest: PROTOCOL,
        cluster: ClusterId([1; 16]),
        node: NodeId([2; 16]),
        incarnation: Incarnation([3; 16]),
        shard: 0,
        shards: 1,
        to_shard: 0,
        key: 0,
        nonce: [4; 32],
        proof: None,
    }
}

pub fn beat() -> Beat {
    Beat { incarnation: Incarnation([3; 16]), count: 1, heard: 0, window: 1, drives: vec![], spaces: vec![] }
}

pub fn message(term: u64) -> Message {
    let body = MessageBody::Heartbeat { commit: Index(5), round: None };
    Message { segment: SegmentId([5; 16]), from: MemberNo(1), to: MemberNo(2), term: Term(term), body }
}

/// An append of one entry that writes a block for each of `fills`, and its payload.
pub fn append(fills: &[u8]) -> (Message, Vec<u8>) {
    let payload: Vec<u8> = fills.iter().flat_map(|fill| [*fill; BLOCK]).collect();
    let crcs: Vec<u32> = payload.chunks(BLOCK).map(penstock_wire::crc32c).collect();
    let mut section = Section::default();
    section.entry(0, Term(0), Index(0));
    section.write(3, &crcs);
    let bytes = section.bytes()[ENTRY_HEAD..].to_vec();
    let entry = Entry { term: Term(1), index: Index(1), kind: EntryKind::Ops, bytes, payload_blocks: fills.len() as u32 };
    let body = MessageBody::Append(Append { prev: Index(0), prev_term: Term(0), commit: Index(0), entries: vec![entry] });
    (Message { body, ..message(1) }, payload)
}
