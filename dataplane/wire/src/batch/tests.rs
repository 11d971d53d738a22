//! Batches there and back, and whatever bytes somebody may write in their place.

use super::*;
use crate::sample::{batch, group_batch, peer::entries, peer::members, shape};
use proptest::prelude::*;

#[test]
fn header_round_trips_with_both_sections() {
    let written = batch();
    let bytes = written.encode();
    let batch = Batch::decode(&bytes).unwrap();
    assert_eq!((batch.header, batch.own, batch.prev), (written.header, written.own.bytes(), written.prev.bytes()));
    let entries = decode_section(batch.own, batch.header.payload_blocks).unwrap();
    let crcs = vec![0x1111_1111, 0x2222_2222, 0x3333_3333];
    assert_eq!(entries[0].ops, [Op::Write { block: 0x0102_0304, crcs }, Op::Zero { block: 7, count: 0x00a0_b0c0 }]);
    assert_eq!(entries[1].ops, [Op::Create(Box::new(shape())), Op::Resize { blocks: 9 }, Op::Delete]);
    assert!(decode_section(batch.prev, 1).is_ok());
}

#[test]
fn ruined_header_is_hinted_at_while_one_of_its_marks_stands() {
    let batch = batch();
    let Header { incarnation, seq, at, .. } = batch.header;
    let bytes = batch.encode();
    let hinted = |bytes: &[u8]| Batch::is_hinted(bytes, incarnation, seq, at);
    let marks = [0..8, PREFIX..PREFIX + 16, SEQ_AT..SEQ_AT + 8, PLACE_AT..PLACE_AT + 8];
    let mut none = bytes.clone();
    for mark in marks.clone() {
        let mut only = vec![0xee; BLOCK];
        only[mark.clone()].copy_from_slice(&bytes[mark.clone()]);
        assert!(hinted(&only), "{mark:?}");
        none[mark].fill(0xee);
    }
    assert!(!hinted(&none));
    assert!(!Batch::is_hinted(&[0; BLOCK], incarnation, seq, RingPos(0)), "blank, at the ring's first block");
    assert!(!hinted(&[]));
}

#[test]
fn payload_of_ops_is_counted_as_they_decode() {
    let mut section = Section::default();
    section.entry(1, Term(1), Index(1));
    section.write(1, &[1, 2, 3]);
    section.zero(5, 9);
    section.create(&shape());
    section.write(9, &[4]);
    section.resize(9);
    let ops = &section.bytes()[ENTRY_HEAD..];
    let decoded: u32 = decode_ops(ops).unwrap().iter().map(Op::payload_blocks).sum();
    assert_eq!((payload_blocks_of(ops), decoded), (4, 4));
}

#[test]
fn entries_of_a_group_come_back_as_they_were_put() {
    let decoded = decode_section(group_batch().own.bytes(), 3).unwrap();
    let (mut again, mut logged) = (Section::default(), Vec::new());
    for entry in &decoded {
        again.entry(entry.replica, entry.term, entry.index);
        entry.ops.iter().for_each(|op| again.push(op));
        if entry.again {
            again.again();
        }
        logged.extend(entry.logged());
    }
    assert_eq!(again.bytes(), group_batch().own.bytes());
    assert_eq!(logged, entries());
    for entry in &entries() {
        let mut one = Section::default();
        one.logged(7, entry);
        assert_eq!(one.bytes().len(), logged_len(entry));
    }
    let mut ballot = Section::default();
    ballot.entry(7, Term(0), Index(0));
    ballot.ballot(Term(1), MemberNo(0));
    assert_eq!(ballot.bytes().len(), BALLOT_LEN);
}

#[test]
fn op_where_it_may_not_stand_is_refused() {
    type Build = fn(&mut Section);
    let ballot: Build = |section| section.ballot(Term(3), MemberNo(1));
    let membership: Build = |section| section.members(&members());
    let zero: Build = |section| section.zero(1, 1);
    let doubt: Build = |section| section.doubt(Some((Index(4), Term(3))));
    let resolved: Build = |section| section.resolved();
    let table: [(u64, u64, &[Build], bool); 11] = [
        (0, 0, &[membership, ballot], true),
        (0, 0, &[doubt, resolved], true),
        (3, 5, &[doubt], false),
        (3, 5, &[resolved], false),
        (0, 0, &[zero], false),
        (1, 0, &[ballot], false), // the store's own word has no term
        (3, 5, &[membership], true),
        (3, 5, &[membership, membership], false),
        (3, 5, &[zero, membership], false),
        (3, 5, &[ballot], false),
        (3, 5, &[zero, zero], true),
    ];
    for (row, (term, index, ops, stands)) in table.into_iter().enumerate() {
        let mut section = Section::default();
        section.entry(7, Term(term), Index(index));
        ops.iter().for_each(|op| op(&mut section));
        assert_eq!(decode_section(section.bytes(), 0).is_ok(), stands, "row {row}");
    }
}

#[test]
fn entry_that_stands_again_says_so_and_the_stores_own_word_cannot() {
    let mut section = Section::default();
    for entry in &entries() {
        section.logged(7, entry);
    }
    section.again();
    let decoded = decode_section(section.bytes(), 3).unwrap();
    assert_eq!(decoded.iter().map(|entry| entry.again).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(decoded[2].logged().unwrap(), entries()[2]);
    section.clear();
    section.entry(7, Term(0), Index(0));
    section.resolved();
    section.again();
    assert!(decode_section(section.bytes(), 0).is_err());
}

#[test]
fn word_on_every_member_is_a_doubt_and_nothing_else() {
    for (of_doubt, build) in [(true, Section::doubt as fn(&mut Section, _)), (false, |section: &mut Section, _| section.delete())] {
        let mut section = Section::default();
        section.entry(EVERY_MEMBER, Term(0), Index(0));
        build(&mut section, None);
        assert_eq!(decode_section(section.bytes(), 0).is_ok(), of_doubt);
    }
}

#[test]
fn ballot_or_members_among_the_ops_of_an_entry_between_nodes_is_refused() {
    let mut section = Section::default();
    section.entry(0, Term(0), Index(0));
    section.ballot(Term(3), MemberNo(1));
    let ballot = section.bytes()[ENTRY_HEAD..].to_vec();
    section.clear();
    section.entry(0, Term(0), Index(0));
    section.members(&members());
    let membership = section.bytes()[ENTRY_HEAD..].to_vec();
    for bytes in [ballot, membership] {
        assert!(decode_ops(&bytes).is_ok());
        let entry = peer::Entry { term: Term(3), index: Index(5), kind: EntryKind::Ops, bytes, payload_blocks: 0 };
        assert!(entry.check().is_err());
    }
}

#[test]
fn ballot_with_a_bad_term_vote_or_length_is_refused() {
    let good = |change: fn(&mut Vec<u8>)| {
        let mut section = Section::default();
        section.entry(7, Term(0), Index(0));
        section.ballot(Term(3), MemberNo(1));
        let mut bytes = section.bytes().to_vec();
        change(&mut bytes);
        decode_section(&bytes, 0)
    };
    assert!(good(|_| ()).is_ok());
    assert!(good(|bytes| bytes[ENTRY_HEAD + 4] = 0).is_err(), "term 0");
    assert!(good(|bytes| bytes[ENTRY_HEAD + 11] = 0x40).is_err(), "a term beyond the limit");
    assert!(good(|bytes| bytes[ENTRY_HEAD + 19] = 0x40).is_err(), "a vote beyond the limit");
    assert!(good(|bytes| bytes[ENTRY_HEAD + 1] = 9).is_err(), "another length");
    assert!(good(|bytes| bytes.truncate(ENTRY_HEAD + 19)).is_err(), "cut");
}

#[test]
fn section_that_counts_other_payload_is_refused() {
    assert!(decode_section(batch().own.bytes(), 4).is_err());
}

#[test]
fn two_full_sections_fit_the_largest_header() {
    assert_eq!(header_blocks(SECTION_MAX, SECTION_MAX), HEADER_BLOCKS_MAX);
}

proptest! {
    #[test]
    fn any_flipped_bit_is_seen(bit in 0..BLOCK * 8) {
        let mut bytes = batch().encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Batch::decode(&bytes).is_err());
    }

    #[test]
    fn any_sealed_bytes_decode_or_fail_cleanly(mut bytes in proptest::collection::vec(any::<u8>(), BLOCK), own in 0u16..5000, prev in 0u16..5000) {
        bytes[65] = 1;
        bytes[68..70].copy_from_slice(&own.to_le_bytes());
        bytes[70..72].copy_from_slice(&prev.to_le_bytes());
        seal(&mut bytes, MAGIC, 1 + u32::from(own % 2 == 0));
        if let Ok(batch) = Batch::decode(&bytes) {
            let _ = decode_section(batch.own, batch.header.payload_blocks);
        }
    }

    #[test]
    fn any_bytes_as_a_section_decode_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..300), payload in 0u32..300) {
        let _ = decode_section(&bytes, payload);
    }

    #[test]
    fn mutated_section_decodes_or_fails_cleanly(at in 0usize..1000, byte: u8) {
        for batch in [batch(), group_batch()] {
            let mut bytes = batch.own.bytes().to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            for entry in decode_section(&bytes, 3).iter().flatten() {
                let _ = entry.logged();
            }
        }
    }
}
