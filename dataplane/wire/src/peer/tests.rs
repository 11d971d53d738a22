//! Round trips, every flipped bit, forged bodies behind right checksums, and each refusal by name.

use super::*;
use crate::sample::peer::{bodies, entries, members, messages, payload, roomy_messages};
use crate::{Index, NodeId, ReplicaId, Term};
use proptest::prelude::*;

fn decode(bytes: &[u8]) -> Result<Body, DecodeError> {
    let header = Header::decode(bytes)?;
    Body::decode(&header, bytes.get(HEADER..).unwrap_or(&[]))
}

/// The body's bytes under a header that is right about them.
fn framed(kind: Kind, body: &[u8], payload_blocks: u32) -> Vec<u8> {
    let header = Header { version: PROTOCOL, kind, body_len: body.len() as u32, body_crc: crc32c(body), payload_blocks, sequence: 7 };
    [&header.encode()[..], body].concat()
}

fn message_bytes(message: &Message) -> Vec<u8> {
    Body::Groups(vec![message.clone()]).encode(PROTOCOL, 7)[HEADER..].to_vec()
}

fn first_append() -> (Message, Append) {
    let message = messages().remove(0);
    let MessageBody::Append(append) = &message.body else { panic!("the first sample is an append") };
    (message.clone(), append.clone())
}

fn refused(message: &Message) -> DecodeError {
    let bytes = message_bytes(message);
    decode(&framed(Kind::Groups, &bytes, message.payload_blocks())).expect_err("the message breaks a rule")
}

fn with_append(change: impl FnOnce(&mut Append)) -> Message {
    let (mut message, mut append) = first_append();
    change(&mut append);
    message.body = MessageBody::Append(append);
    message
}

#[test]
fn every_kind_of_frame_round_trips() {
    for (name, body, payload) in bodies() {
        let bytes = body.encode(PROTOCOL, 7);
        assert_eq!(decode(&bytes).as_ref(), Ok(&body), "{name}");
        assert_eq!(body.payload_blocks() as usize * BLOCK, payload.len(), "{name}");
        match body {
            Body::FetchAsk(_) => assert_eq!(bytes.len(), HEADER + FetchAsk::ENCODED_LEN),
            Body::FetchAnswer(_) => assert_eq!(bytes.len(), HEADER + FetchAnswer::ENCODED_LEN),
            Body::DigestAsk(_) => assert_eq!(bytes.len(), HEADER + DigestAsk::BYTES),
            Body::DigestAnswer(_) => assert_eq!(bytes.len(), HEADER + DigestAnswer::BYTES),
            _ => {}
        }
    }
    for message in messages() {
        assert_eq!(message.encoded_len(), message_bytes(&message).len() - 4, "{message:?}");
    }
}

#[test]
fn any_flipped_bit_of_any_frame_is_refused() {
    for (name, body, _) in bodies() {
        let bytes = body.encode(PROTOCOL, 7);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped).is_err(), "{name}: bit {bit}");
        }
    }
}

#[test]
fn frame_cut_anywhere_is_refused() {
    for (name, body, _) in bodies() {
        let bytes = body.encode(PROTOCOL, 7);
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{name}: {len} bytes");
        }
    }
}

#[test]
fn header_of_a_version_that_is_not_spoken_is_refused_but_in_a_hello() {
    for (_, body, _) in bodies() {
        let ahead = body.encode(PROTOCOL + 1, 7);
        assert_eq!(Header::decode(&ahead).is_ok(), body.kind() == Kind::Hello, "{:?}", body.kind());
    }
}

#[test]
fn room_is_left_out_of_what_version_1_is_told() {
    let sent = Body::Groups(roomy_messages());
    let bytes = sent.encode(1, 7);
    let header = Header::decode(&bytes).unwrap();
    let Ok(Body::Groups(came)) = Body::decode(&header, &bytes[HEADER..]) else { panic!("it is a frame of version 1") };
    assert_eq!(came[0].body, MessageBody::Appended { index: Index(43), commit: Index(0x0a0b), room: None });
    assert_eq!(came.len(), 3);
    assert!(Body::Groups(came).encode(2, 7).len() < sent.encode(2, 7).len());
}

#[test]
fn versions_agree_on_the_newest_that_both_speak() {
    // ours, theirs, agreed
    for (ours, theirs, agreed) in
        [((1, 1), (1, 1), Some(1)), ((1, 2), (2, 3), Some(2)), ((2, 3), (1, 2), Some(2)), ((1, 1), (2, 3), None), ((3, 4), (1, 2), None)]
    {
        assert_eq!(agree(ours, theirs), agreed, "{ours:?} and {theirs:?}");
    }
    assert!(matches!((PROTOCOL_OLDEST..=PROTOCOL).count(), 1..=2), "the version before is spoken too, and no older one");
}

#[test]
fn header_beyond_a_limit_is_refused_before_anything_is_set_aside() {
    let good = Header { version: PROTOCOL, kind: Kind::Groups, body_len: 4, body_crc: 0, payload_blocks: 0, sequence: 1 };
    assert!(Header::decode(&good.encode()).is_ok());
    for bad in [
        Header { body_len: BODY_MAX as u32 + 1, ..good },
        Header { payload_blocks: FRAME_BLOCKS_MAX + 1, ..good },
        Header { kind: Kind::Beat, payload_blocks: 1, ..good },
        Header { sequence: 0, ..good },
        Header { sequence: crate::COUNT_LIMIT, ..good },
    ] {
        assert!(Header::decode(&bad.encode()).is_err(), "{bad:?}");
    }
}

#[test]
fn append_with_a_gap_in_its_indices_is_refused() {
    assert!(matches!(refused(&with_append(|append| append.entries[1].index = Index(43))), DecodeError::Mismatch { .. }));
    assert!(matches!(refused(&with_append(|append| append.prev = Index(39))), DecodeError::Mismatch { .. }));
}

#[test]
fn append_whose_terms_go_back_or_beyond_the_message_is_refused() {
    assert!(matches!(refused(&with_append(|append| append.entries[2].term = Term(4))), DecodeError::Mismatch { .. }));
    assert!(matches!(refused(&with_append(|append| append.entries[2].term = Term(10))), DecodeError::Mismatch { .. }));
    assert!(matches!(refused(&with_append(|append| append.prev_term = Term(10))), DecodeError::Limit { .. }));
    assert!(matches!(refused(&with_append(|append| append.prev_term = Term(0))), DecodeError::Value { .. }));
}

#[test]
fn entry_whose_payload_is_not_what_its_ops_say_is_refused() {
    assert!(matches!(refused(&with_append(|append| append.entries[1].payload_blocks = 2)), DecodeError::Mismatch { .. }));
    assert!(matches!(refused(&with_append(|append| append.entries[0].payload_blocks = 1)), DecodeError::Mismatch { .. }));
    let (message, _) = first_append();
    let bytes = message_bytes(&message);
    assert!(matches!(decode(&framed(Kind::Groups, &bytes, 4)), Err(DecodeError::Mismatch { .. })));
}

#[test]
fn entry_with_ops_that_are_one_stores_own_is_refused() {
    let mut section = crate::batch::Section::default();
    section.entry(0, Term(0), Index(0));
    section.delete();
    let bytes = section.bytes()[crate::batch::ENTRY_HEAD..].to_vec();
    assert!(matches!(refused(&with_append(|append| append.entries[0].bytes = bytes)), DecodeError::Value { .. }));
}

#[test]
fn message_to_itself_of_no_term_or_with_a_strange_round_is_refused() {
    let sample = &messages()[8];
    refused(&Message { from: sample.to, ..sample.clone() });
    refused(&Message { from: MemberNo(0), ..sample.clone() });
    refused(&Message { term: Term(0), ..sample.clone() });
    let round = Some(Round { term: Term(8), count: 1 });
    refused(&Message { body: MessageBody::Heartbeat { commit: Index(1), round }, ..sample.clone() });
}

#[test]
fn membership_that_a_group_cannot_have_is_refused() {
    let good = members();
    assert_eq!(Members::decode(&good.encode()), Ok(good.clone()));
    assert!(good.was_removed(MemberNo(2)) && !good.was_removed(MemberNo(3)) && !good.was_removed(MemberNo(0x0102)));
    let bad: [fn(&mut Members); 7] = [
        |members| members.list.clear(),
        |members| members.list.swap(0, 1),
        |members| members.next = MemberNo(7),
        |members| members.list[0].no = MemberNo(0),
        |members| members.list[1].replica = members.list[0].replica,
        |members| members.list[1].node = members.list[0].node,
        |members| members.list[0].role = Role::Learner,
    ];
    for (no, change) in bad.into_iter().enumerate() {
        let mut members = good.clone();
        change(&mut members);
        assert!(Members::decode(&members.encode()).is_err(), "change {no}");
    }
    let many =
        (1..=8).map(|no| Member { no: MemberNo(no), role: Role::Voter, replica: ReplicaId([no as u8; 16]), node: NodeId([no as u8; 16]) });
    assert!(Members { next: MemberNo(9), list: many.collect() }.check().is_err(), "eight voters");
}

#[test]
fn messages_are_verified_only_with_the_very_payload() {
    let whole = |payload: &[u8]| Verified::frame(&[&Body::Groups(messages()).encode(PROTOCOL, 7)[..], payload].concat());
    let good = payload(1, 3);
    let verified = whole(&good).unwrap();
    assert_eq!(verified.iter().map(|verified| verified.message().clone()).collect::<Vec<_>>(), messages());
    for at in [0, BLOCK, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(matches!(whole(&bad), Err(DecodeError::Checksum { .. })), "byte {at}");
    }
    assert!(whole(&good[..good.len() - 1]).is_err() && whole(&good[..2 * BLOCK]).is_err());
    assert!(whole(&[&good[..], &[0]].concat()).is_err() && whole(&payload(1, 4)).is_err());
    let (append, _) = first_append();
    assert!(Verified::bare(append).is_err());
    assert!(Verified::bare(messages().remove(1)).is_ok());
}

#[test]
fn fetched_block_is_believed_only_for_the_checksum_that_was_asked() {
    let (block, other) = (payload(9, 1), payload(8, 1));
    let asked = crc32c(&block);
    let answer = |result| FetchAnswer { id: 1, segment: crate::SegmentId([1; 16]), from: MemberNo(1), to: MemberNo(2), result };
    let found = |crc| answer(FetchResult::Found { crc });
    assert_eq!(found(asked).check(asked, &block), Ok(()));
    assert!(found(asked).check(asked, &other).is_err());
    assert!(found(crc32c(&other)).check(asked, &other).is_err(), "an older version of the block");
    assert!(answer(FetchResult::Busy).check(asked, &block).is_err());
}

#[test]
fn answered_entries_are_believed_only_with_their_payload() {
    let answers = bodies()
        .into_iter()
        .find_map(|(_, body, payload)| if let Body::EntriesAnswer(answer) = body { Some((answer, payload)) } else { None });
    let (answer, good) = answers.expect("one of the samples is an answer");
    assert_eq!(answer.check(&good), Ok(()));
    let mut bad = good.clone();
    bad[2 * BLOCK] ^= 1;
    assert!(answer.check(&bad).is_err() && answer.check(&good[BLOCK..]).is_err() && answer.check(&payload(1, 4)).is_err());
    assert_eq!(entries()[1].check_payload(&good), Ok(()));
}

#[test]
fn copied_extent_is_believed_only_with_its_payload() {
    let copies = bodies()
        .into_iter()
        .filter_map(|(_, body, payload)| if let Body::CopyAnswer(answer) = body { Some((answer, payload)) } else { None });
    let copies: Vec<_> = copies.collect();
    let (answer, good) = &copies[0];
    assert_eq!(answer.check(good), Ok(()));
    assert!(answer.check(&good[BLOCK..]).is_err() && answer.check(&payload(6, 2)).is_err());
    let Copied::Extent { states, .. } = &answer.copied else { panic!("the first is an extent") };
    assert_eq!(states.data_blocks(), 2);
}

#[test]
fn copy_ask_of_no_extents_or_for_no_room_is_refused() {
    let asks = bodies().into_iter().find_map(|(_, body, _)| if let Body::CopyAsk(ask) = body { Some(ask) } else { None });
    let ask = asks.expect("one of the samples is an ask");
    assert_eq!((ask.has(ask.first), ask.has(ask.first + 1), ask.has(ask.until - 1)), (7, CopyAsk::ANY, 0));
    for bad in [CopyAsk { until: ask.first, ..ask.clone() }, CopyAsk { room: 0, ..ask.clone() }, CopyAsk { until: EXTENTS_END + 1, ..ask }]
    {
        let bytes = Body::CopyAsk(bad).encode(PROTOCOL, 1);
        assert!(decode(&framed(Kind::CopyAsk, &bytes[HEADER..], 0)).is_err());
    }
}

#[test]
fn proof_covers_every_other_field_of_a_hello() {
    let hellos = bodies().into_iter().filter_map(|(_, body, _)| if let Body::Hello(hello) = body { Some(hello) } else { None });
    let hellos: Vec<_> = hellos.collect();
    assert_eq!(hellos[0].proven(), hellos[1].proven());
    let other = Hello { to_shard: 2, ..hellos[0].clone() };
    assert_ne!(hellos[0].proven(), other.proven());
}

fn kinds() -> impl Strategy<Value = Kind> {
    (0..Kind::ALL.len()).prop_map(|at| Kind::ALL[at])
}

/// What decodes has one form only: encoded again it is the same bytes.
fn decodes_cleanly(kind: Kind, body: &[u8]) {
    for payload_blocks in [0, 1, 3] {
        if let Ok(decoded) = decode(&framed(kind, body, payload_blocks)) {
            assert_eq!(&decoded.encode(PROTOCOL, 7)[HEADER..], body);
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_as_a_body_decode_or_fail_cleanly(kind in kinds(), body in proptest::collection::vec(any::<u8>(), 0..400)) {
        decodes_cleanly(kind, &body);
    }

    #[test]
    fn mutated_bodies_decode_or_fail_cleanly(which: usize, at: usize, len in 1usize..9, value: u64) {
        let mut bodies = bodies();
        let (_, body, _) = bodies.swap_remove(which % bodies.len());
        let mut bytes = body.encode(PROTOCOL, 7)[HEADER..].to_vec();
        let at = at % bytes.len();
        let len = len.min(bytes.len() - at).min(8);
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        decodes_cleanly(body.kind(), &bytes);
    }

    #[test]
    fn any_bytes_as_a_header_decode_or_fail_cleanly(mut bytes in proptest::collection::vec(any::<u8>(), HEADER), kind in 0u16..26) {
        bytes[16..18].copy_from_slice(&kind.to_le_bytes());
        bytes[18..20].fill(0);
        seal(&mut bytes, MAGIC, PROTOCOL);
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(&header.encode()[..], &bytes[..]);
        }
    }
}

#[test]
fn forwarded_command_with_more_or_less_than_it_needs_is_refused() {
    let good = bodies().into_iter().find_map(|(_, body, _)| if let Body::Forward(forward) = body { Some(forward) } else { None }).unwrap();
    let decoded = |forward: Forward| {
        let bytes = Body::Forward(forward).encode(PROTOCOL, 1);
        Body::decode(&Header::decode(&bytes)?, &bytes[HEADER..])
    };
    assert!(decoded(good.clone()).is_ok());
    let wrong: [fn(&mut Forward); 7] = [
        |forward| forward.crcs.truncate(1),
        |forward| forward.crcs.push(1),
        |forward| forward.done = forward.id + 1,
        |forward| forward.term = Term(0),
        |forward| forward.len = 0,
        |forward| forward.offset = u64::MAX,
        |forward| (forward.deed, forward.len, forward.crcs) = (Deed::Read, FORWARD_BYTES_MAX + 1, vec![]),
    ];
    for change in wrong {
        let mut forward = good.clone();
        change(&mut forward);
        assert!(decoded(forward.clone()).is_err(), "{forward:?}");
    }
}

#[test]
fn digests_that_claim_more_than_they_are_as_of_are_refused() {
    let good = bodies().into_iter().find_map(|(_, body, _)| if let Body::DigestAsk(ask) = body { Some(ask) } else { None }).unwrap();
    let bytes = Body::DigestAsk(good.clone()).encode(PROTOCOL, 7)[HEADER..].to_vec();
    let told = DigestAsk::BYTES - 12;
    let untold = DigestAsk::BYTES - 24;
    assert_eq!(decode(&framed(Kind::DigestAsk, &bytes, 0)), Ok(Body::DigestAsk(good.clone())));
    let wrong: [(usize, u64, &str); 5] = [
        (told, good.digests.as_of.0 + 1, "changed by an entry behind what it is as of"),
        (told, u64::MAX, "not told, with a digest"),
        (untold + 8, 1, "the same"),
        (40, u64::from(crate::layer::LAYER_NO_LIMIT), "a layer beyond all"),
        (48, crate::COUNT_LIMIT, "as of an entry that never comes"),
    ];
    for (at, value, what) in wrong {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        assert!(decode(&framed(Kind::DigestAsk, &bytes, 0)).is_err(), "{what}");
    }
    let mut page = bytes.clone();
    page[44..48].copy_from_slice(&(crate::page::PAGE_NO_MAX + 1).to_le_bytes());
    assert!(matches!(decode(&framed(Kind::DigestAsk, &page, 0)), Err(DecodeError::Limit { .. })));
}

#[test]
fn digest_tells_zeros_from_data_and_one_block_from_another() {
    let sums: Vec<u32> = [vec![], vec![(0, 0)], vec![(1, 0)], vec![(0, 7)], vec![(1, 7)], vec![(0, 7), (1, 7)]]
        .into_iter()
        .map(|data: Vec<(usize, u32)>| {
            ExtentDigest::sum(&std::array::from_fn(|at| data.iter().find(|(of, _)| *of == at).map(|(_, crc)| *crc)))
        })
        .collect();
    for (at, sum) in sums.iter().enumerate() {
        assert!(!sums[..at].contains(sum), "{at}");
    }
}
