//! One frame of each kind between nodes, and a message of each kind that groups send.

use super::id;
use penstock_wire::batch::Section;
use penstock_wire::peer::*;
use penstock_wire::*;

/// Payload blocks, each of one byte.
pub fn payload(first: u8, blocks: u8) -> Vec<u8> {
    (first..first + blocks).flat_map(|byte| [byte; BLOCK]).collect()
}

pub fn members() -> Members {
    let member = |no: u8, role| Member { no: MemberNo(no.into()), role, replica: ReplicaId(id(no)), node: NodeId(id(no + 0x20)) };
    Members { next: MemberNo(0x0102), list: vec![member(1, Role::Voter), member(3, Role::LogOnly), member(7, Role::Learner)] }
}

fn ops_bytes(build: impl FnOnce(&mut Section)) -> Vec<u8> {
    let mut section = Section::default();
    section.entry(0, Term(0), Index(0));
    build(&mut section);
    section.bytes()[batch::ENTRY_HEAD..].to_vec()
}

/// Entries from index 41 on: a beginning of a term, writes of [`payload`]`(1, 3)`, a change of members.
pub fn entries() -> Vec<Entry> {
    let crcs: Vec<u32> = payload(1, 3).chunks(BLOCK).map(crc32c).collect();
    let writes = ops_bytes(|section| {
        section.write(0x0102_0304, &crcs[..2]);
        section.zero(7, 0x00a0_b0c0);
        section.write(9, &crcs[2..]);
        section.resize(0x0506);
    });
    let entry = |term, index, kind, bytes, payload_blocks| Entry { term: Term(term), index: Index(index), kind, bytes, payload_blocks };
    vec![
        entry(5, 41, EntryKind::Ops, vec![], 0),
        entry(5, 42, EntryKind::Ops, writes, 3),
        entry(6, 43, EntryKind::Members, members().encode(), 0),
    ]
}

fn install(reservations: Option<Box<reservation::Reservations>>) -> Install {
    Install { index: Index(0x0c0d), index_term: Term(7), digest: id(0x50), members: members(), reservations, stack: None }
}

/// What came with version 2: an append with reservations, and an install as of which there are some.
pub fn reserved_messages() -> Vec<Message> {
    let bytes = ops_bytes(|section| section.reserve(&super::reservations()));
    let entries = vec![Entry { term: Term(5), index: Index(41), kind: EntryKind::Ops, bytes, payload_blocks: 0 }];
    let append = Append { prev: Index(40), prev_term: Term(4), commit: Index(0x0a0b), entries };
    [MessageBody::Append(append), MessageBody::Install(install(Some(Box::new(super::reservations()))))].into_iter().map(message).collect()
}

/// An append with a marker and a removal, and an install as of which there are snapshots.
pub fn layered_messages() -> Vec<Message> {
    let bytes = ops_bytes(|section| {
        section.unsnapshot(super::snapshot(0xc0).id);
        section.snapshot(0x1112, &super::snapshot(0xb0));
    });
    let entries = vec![Entry { term: Term(5), index: Index(41), kind: EntryKind::Ops, bytes, payload_blocks: 0 }];
    let append = Append { prev: Index(40), prev_term: Term(4), commit: Index(0x0a0b), entries };
    let install = Install { stack: Some(Box::new(super::stack())), ..install(None) };
    [MessageBody::Append(append), MessageBody::Install(install)].into_iter().map(message).collect()
}

/// Of a leader that restarted over a checkpoint which knows of a marker that it has not applied again.
pub fn install_before_its_marker() -> Body {
    let stack = super::stack();
    let install = Install { index: Index(stack.since.0 - 1), stack: Some(Box::new(stack)), ..install(None) };
    Body::Groups(vec![message(MessageBody::Install(install))])
}

/// Answers of version 2, which say how much room there is.
pub fn roomy_messages() -> Vec<Message> {
    let (commit, room) = (Index(0x0a0b), Some(0x0c_0d0e));
    let round = Some(Round { term: Term(9), count: 0x0708 });
    let appended = MessageBody::Appended { index: Index(43), commit, room };
    [appended, MessageBody::HeartbeatDone { commit, round, room }, MessageBody::HeartbeatDone { commit, round: None, room }]
        .map(message)
        .to_vec()
}

fn message(body: MessageBody) -> Message {
    Message { segment: SegmentId(id(0x90)), from: MemberNo(0x11), to: MemberNo(0x12), term: Term(9), body }
}

/// A message of each kind; the append carries [`entries`].
pub fn messages() -> Vec<Message> {
    let round = Round { term: Term(9), count: 0x0708 };
    let (commit, commit_term) = (Index(0x0a0b), Term(8));
    let bodies = [
        MessageBody::Append(Append { prev: Index(40), prev_term: Term(4), commit, entries: entries() }),
        MessageBody::Append(Append { prev: Index(0), prev_term: Term(0), commit: Index(0), entries: vec![] }),
        MessageBody::Appended { index: Index(43), commit, room: None },
        MessageBody::AppendRefused { index: Index(40), hint: Index(30), hint_term: Term(3), commit },
        MessageBody::Vote { pre: true, forced: false, last: Index(0x0a0c), last_term: Term(8), commit, commit_term },
        MessageBody::Vote { pre: false, forced: true, last: Index(0x0a0c), last_term: Term(8), commit, commit_term },
        MessageBody::Voted { pre: true, granted: true, commit, commit_term },
        MessageBody::Voted { pre: false, granted: false, commit, commit_term },
        MessageBody::Heartbeat { commit, round: Some(round) },
        MessageBody::HeartbeatDone { commit, round: Some(round), room: None },
        MessageBody::HeartbeatDone { commit, round: None, room: None },
        MessageBody::Campaign,
        MessageBody::Install(install(None)),
        MessageBody::Sleep { last: Index(0x0e0f) },
    ];
    bodies.into_iter().map(message).collect()
}

fn crcs_of(payload: &[u8]) -> Vec<u32> {
    payload.chunks(BLOCK).map(crc32c).collect()
}

fn forward(deed: Deed, len: u64, payload: Vec<u8>) -> Forward {
    let (session, segment, term) = (Incarnation(id(0x70)), SegmentId(id(0x90)), Term(0x0102));
    let (id, done, offset) = (0x0b0a, 0x0908, 0x0001_0203_0400);
    Forward { id, done, session, segment, term, deed, offset, len, crcs: crcs_of(&payload) }
}

fn forwarded(outcome: Outcome, at: u32, payload: Vec<u8>) -> Forwarded {
    let (session, segment, term) = (Incarnation(id(0x70)), SegmentId(id(0x90)), Term(0x0102));
    Forwarded { id: 0x0b0a, session, segment, term, outcome, at, crcs: crcs_of(&payload) }
}

/// A body of each kind, with its payload and the name of its golden file.
pub fn bodies() -> Vec<(&'static str, Body, Vec<u8>)> {
    let hello = Hello {
        oldest: 1,
        newest: 2,
        cluster: ClusterId(id(0x10)),
        node: NodeId(id(0x30)),
        incarnation: Incarnation(id(0x70)),
        shard: 1,
        shards: 4,
        to_shard: 3,
        key: 0x0102_0304,
        nonce: std::array::from_fn(|i| i as u8 + 0x80),
        proof: None,
    };
    let proven = Hello { proof: Some(std::array::from_fn(|i| i as u8 + 0xa0)), ..hello.clone() };
    let drive = |first, state| Drive { drive: DriveId(id(first)), incarnation: Incarnation(id(first + 1)), state, opens: 0x0304 };
    let beat = Beat {
        incarnation: Incarnation(id(0x70)),
        count: 0x0506,
        heard: 0x0505,
        window: 0x0700_0000,
        drives: vec![
            drive(1, DriveState::Serving),
            drive(2, DriveState::Fenced),
            drive(3, DriveState::Resolving),
            drive(4, DriveState::Gone),
        ],
        spaces: vec![Space { drive: DriveId(id(1)), store: 2, room: Room { ring_blocks: 0x0809, blocks: 0x0a_0b0c } }],
    };
    let crc = crc32c(&payload(9, 1));
    let fetch = FetchAsk {
        id: 0x0d0e,
        segment: SegmentId(id(0x90)),
        from: MemberNo(2),
        to: MemberNo(3),
        block: 0x0f10,
        applied: Index(0x1516),
        crc,
    };
    let fetched = |result| FetchAnswer { id: fetch.id, segment: fetch.segment, from: fetch.to, to: fetch.from, result };
    let ask =
        EntriesAsk { id: 0x1112, segment: SegmentId(id(0x90)), from: MemberNo(1), to: MemberNo(3), first: Index(41), last: Index(0x1314) };
    let mut states: Vec<_> = entries().into_iter().map(EntryState::Whole).collect();
    states.extend([EntryState::Held(Term(6)), EntryState::Unknown]);
    let answer = EntriesAnswer {
        id: ask.id,
        segment: ask.segment,
        from: ask.to,
        to: ask.from,
        term: Term(6),
        leads: true,
        more: true,
        first: ask.first,
        entries: states,
    };
    let copy = CopyAsk {
        id: 0x1516,
        segment: SegmentId(id(0x90)),
        from: MemberNo(2),
        to: MemberNo(3),
        layer: 0,
        stands: false,
        first: 0x1718,
        until: 0x191a1b,
        room: 0x1c,
        changed: vec![7, CopyAsk::ANY, 0],
    };
    let layered = CopyAsk { layer: 0x2a2b, ..copy.clone() };
    let standing = CopyAsk { stands: true, ..copy.clone() };
    let copied = |copied| CopyAnswer { id: copy.id, segment: copy.segment, from: copy.to, to: copy.from, applied: Index(0x1d1e), copied };
    let mut states = States::default();
    for (at, state) in [(1, page::BlockState::Data), (4, page::BlockState::Lost), (15, page::BlockState::Data)] {
        states.set(at, state);
    }
    let crcs: Vec<u32> = payload(5, 2).chunks(BLOCK).map(crc32c).collect();
    let extent = copied(Copied::Extent { extent: 0x1719, changed: 0x1d1d, states, crcs: crcs.clone() });
    states.set(7, page::BlockState::Inherit);
    let delta = copied(Copied::Extent { extent: 0x1719, changed: 0x1d1d, states, crcs });
    let done = copied(Copied::Done { until: 0x191a, answers: 1, blocks: 0x1f20 });
    let seen = seen()[0];
    let admit = AdmitAsk {
        segment: SegmentId(id(0x90)),
        from: MemberNo(2),
        to: MemberNo(3),
        opening: seen.opening,
        believed: past().believed,
        found: Seq(0x2122),
        sealed: seen.sealed,
        term: Term(0x2526),
        last: Index(0x2728),
        last_term: Term(0x2524),
    };
    let admitted = |belief| AdmitAnswer {
        segment: admit.segment,
        from: admit.to,
        to: admit.from,
        life: admit.opening.life,
        belief,
        generation: Generation(0x292a),
        sealed: Seq(0x2b2c),
        entry: Index(0x2d2e),
    };
    let mut extents = Box::new([None; page::EXTENTS_PER_PAGE]);
    extents[0] = Some(ExtentDigest { since: Index(0), digest: ExtentDigest::sum(&[None; 16]) });
    extents[47] =
        Some(ExtentDigest { since: Index(0x2e2f), digest: ExtentDigest::sum(&std::array::from_fn(|at| (at == 3).then_some(crc))) });
    let digests = Digests { as_of: Index(0x3031), extents };
    let (segment, from, to) = (SegmentId(id(0x90)), MemberNo(2), MemberNo(3));
    let compare = DigestAsk { id: 0x3233, segment, from, to, layer: 0x3435, page_no: 0x36_3738, digests: digests.clone() };
    let compared = DigestAnswer { id: compare.id, segment, from: to, to: from, digests };
    let bare = |name, body| (name, body, vec![]);
    vec![
        bare("peer-hello-v1.bin", Body::Hello(hello)),
        bare("peer-hello-proven-v1.bin", Body::Hello(proven)),
        bare("peer-beat-v1.bin", Body::Beat(beat)),
        ("peer-groups-v1.bin", Body::Groups(messages()), payload(1, 3)),
        bare("peer-fetch-ask-v2.bin", Body::FetchAsk(fetch)),
        ("peer-fetch-answer-v2.bin", Body::FetchAnswer(fetched(FetchResult::Found { crc })), payload(9, 1)),
        bare("peer-fetch-answer-none-v2.bin", Body::FetchAnswer(fetched(FetchResult::Differs))),
        bare("peer-entries-ask-v1.bin", Body::EntriesAsk(ask)),
        ("peer-entries-answer-v1.bin", Body::EntriesAnswer(answer), payload(1, 3)),
        bare("peer-copy-ask-v1.bin", Body::CopyAsk(copy)),
        ("peer-copy-answer-v1.bin", Body::CopyAnswer(extent), payload(5, 2)),
        bare("peer-copy-answer-done-v1.bin", Body::CopyAnswer(done)),
        bare("peer-copy-ask-layer-v2.bin", Body::CopyAsk(layered)),
        bare("peer-copy-ask-stands-v2.bin", Body::CopyAsk(standing)),
        ("peer-copy-answer-layer-v2.bin", Body::CopyAnswer(delta), payload(5, 2)),
        bare("peer-groups-layered-v2.bin", Body::Groups(layered_messages())),
        bare("peer-groups-reserved-v2.bin", Body::Groups(reserved_messages())),
        bare("peer-admit-ask-v2.bin", Body::AdmitAsk(admit)),
        bare("peer-admit-ask-believed-v2.bin", Body::AdmitAsk(AdmitAsk { believed: Some(admit.opening.id()), ..admit })),
        bare("peer-admit-answer-v2.bin", Body::AdmitAnswer(admitted(Belief::Recorded))),
        bare("peer-admit-answer-forgot-v2.bin", Body::AdmitAnswer(admitted(Belief::Forgot))),
        bare("peer-digest-ask-v2.bin", Body::DigestAsk(compare)),
        bare("peer-digest-answer-v2.bin", Body::DigestAnswer(compared)),
        bare("peer-groups-room-v2.bin", Body::Groups(roomy_messages())),
        ("peer-forward-v2.bin", Body::Forward(forward(Deed::CompareWrite, 4096, payload(3, 2))), payload(3, 2)),
        bare("peer-forward-read-v2.bin", Body::Forward(forward(Deed::Read, 512, vec![]))),
        ("peer-forwarded-v2.bin", Body::Forwarded(forwarded(Outcome::Ok, 0, payload(7, 1))), payload(7, 1)),
        bare("peer-forwarded-miscompare-v2.bin", Body::Forwarded(forwarded(Outcome::Miscompare, 0x0102, vec![]))),
    ]
}

/// What a member's drive knows of the openings of its store.
pub fn past() -> Past {
    let believed = Some(OpeningId { generation: Generation(0x0707), life: Incarnation(id(0xbf)) });
    Past { believed, opened: Some(Seq(0x2020)), unvouched: true }
}

/// What a member knows of two others.
pub fn seen() -> Vec<Seen> {
    let seen = |no: u64| Seen {
        no: MemberNo(no),
        opening: Opening {
            drive: Incarnation(id(no as u8)),
            store: 0x0102,
            replica: 0x0304_0506,
            generation: Generation(0x0708 + no),
            life: Incarnation(id(0xb0 + no as u8)),
        },
        sealed: Seq(0x2324),
    };
    vec![seen(2), seen(9)]
}
