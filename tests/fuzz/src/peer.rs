//! Frames between nodes: as they come, and once more as a body behind a header that is right about it, so that what lies behind
//! the checksums is reached. What decodes has one form: encoded again it is the same bytes.

// penstockd's own, which its config names.
#[path = "../../../dataplane/node/src/peer/key.rs"]
pub mod key;

use crate::sample::peer::{bodies, members};
use penstock_wire::crc32c;
use penstock_wire::peer::{Body, HEADER, Header, Kind, Members, PROTOCOL, Verified};

pub fn run(data: &[u8]) {
    let _ = Verified::frame(data);
    if let Ok(header) = Header::decode(data) {
        assert_eq!(header.encode(), data[..HEADER], "a header has one form");
    }
    let Some((&[kind, blocks], body)) = data.split_first_chunk() else { return };
    if kind == 0 {
        if let Ok(members) = Members::decode(body) {
            assert_eq!(members.encode(), body, "a membership has one form");
        }
        return;
    }
    let kind = Kind::ALL[usize::from(kind - 1) % Kind::ALL.len()];
    let payload_blocks = if kind.carries() { u32::from(blocks) } else { 0 };
    let header = Header { version: PROTOCOL, kind, body_len: body.len() as u32, body_crc: crc32c(body), payload_blocks, sequence: 1 };
    let header = Header::decode(&header.encode()).expect("the header is within its limits");
    let Ok(decoded) = Body::decode(&header, body) else { return };
    assert_eq!(decoded.payload_blocks(), payload_blocks);
    let again = decoded.encode(PROTOCOL, 1);
    assert_eq!(&again[HEADER..], body, "a body has one form");
    if let Body::Groups(messages) = decoded {
        for message in &messages {
            assert_eq!(message.payload_blocks() > 0, Verified::bare(message.clone()).is_err());
        }
        let _ = Verified::all(messages, &[]);
    }
}

/// One valid body of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![[&[0, 0], &members().encode()[..]].concat()];
    for (_, body, _) in bodies() {
        let frame = body.encode(PROTOCOL, 1);
        seeds.push([&[body.kind() as u8, body.payload_blocks() as u8], &frame[HEADER..]].concat());
        seeds.push(frame);
    }
    seeds
}
