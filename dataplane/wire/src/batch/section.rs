//! Building a section: the bytes of each op. Not here: what comes of them (`take_op`), and how many there are (`lens`).

use super::*;

/// Builds a section: the descriptors of one batch. Keeps its capacity from batch to batch.
#[derive(Default, Debug)]
pub struct Section {
    pub(super) bytes: Vec<u8>,
    /// Where the current entry's op count lies.
    entry_at: usize,
}

impl Section {
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entry_at = 0;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A section read back, to be repeated in the next header.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), entry_at: 0 }
    }

    /// Starts an entry; ops follow.
    pub fn entry(&mut self, replica: u32, term: Term, index: Index) {
        self.entry_at = self.bytes.len();
        self.bytes.extend_from_slice(&replica.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&term.0.to_le_bytes());
        self.bytes.extend_from_slice(&index.0.to_le_bytes());
    }

    fn op(&mut self, kind: u8, count: u32, block: u64) {
        assert!(count <= ZERO_BLOCKS_MAX);
        let at = self.entry_at + 4;
        let ops = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]) + 1;
        self.bytes[at..at + 2].copy_from_slice(&ops.to_le_bytes());
        self.bytes.extend_from_slice(&(u32::from(kind) | count << 8).to_le_bytes());
        self.bytes.extend_from_slice(&block.to_le_bytes());
    }

    /// Blocks from `block`, one checksum each; their payload is next in the batch.
    pub fn write(&mut self, block: u64, crcs: &[u32]) {
        self.op(OP_WRITE, crcs.len() as u32, block);
        for crc in crcs {
            self.bytes.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// `count` blocks from `block` read as zeros from here on.
    pub fn zero(&mut self, block: u64, count: u32) {
        self.op(OP_ZERO, count, block);
    }

    /// A decoded op, as the bytes that it was decoded from.
    pub fn push(&mut self, op: &Op) {
        match op {
            Op::Write { block, crcs } => self.write(*block, crcs),
            Op::Zero { block, count } => self.zero(*block, *count),
            Op::Create(shape) => self.create(shape),
            Op::Delete => self.delete(),
            Op::Resize { blocks } => self.resize(*blocks),
            Op::Members(members) => self.members(members),
            Op::Ballot { term, vote } => self.ballot(*term, *vote),
            Op::Doubt { floor } => self.doubt(*floor),
            Op::Resolved => self.resolved(),
            Op::Install { as_of, index, index_term, members } => self.install(*as_of, *index, *index_term, members),
            Op::Whole { blocks } => self.whole(*blocks),
            Op::Copy(copy) => self.copy(copy),
            Op::Reserve(state) => self.reserve(state),
            Op::Snapshot { blocks, shape } => self.snapshot(*blocks, shape),
            Op::Unsnapshot(id) => self.unsnapshot(*id),
            Op::Origin { segment, snapshot } => self.origin(*segment, *snapshot),
            Op::Layer(row) => self.layer(row),
            Op::Stack(stack) => self.stack(stack),
            Op::Seen(seen) => self.seen(seen),
            Op::Believed(id) => self.believed(*id),
            Op::Opened { vouched } => self.opened(*vouched),
            Op::Forced { term, members } => self.forced(*term, members),
            Op::Committed { index, term } => self.committed(*index, *term),
        }
    }

    /// The replica begins.
    pub fn create(&mut self, shape: &ReplicaShape) {
        let len = shape.encoded_len();
        self.op(OP_CREATE, len as u32, 0);
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        shape.put(&mut Put::new(&mut self.bytes, at));
    }

    /// The replica ends.
    pub fn delete(&mut self) {
        self.op(OP_DELETE, 0, 0);
    }

    /// The replica has `blocks` from here on.
    pub fn resize(&mut self, blocks: u64) {
        self.op(OP_RESIZE, 0, blocks);
    }

    /// The group's members from here on: with `create` at the birth of a member replica, alone in an entry of its log.
    pub fn members(&mut self, members: &Members) {
        self.members_bytes(&members.encode());
    }

    fn members_bytes(&mut self, bytes: &[u8]) {
        self.op(OP_MEMBERS, bytes.len() as u32, 0);
        self.bytes.extend_from_slice(bytes);
    }

    /// The replica's term and vote from here on. `MemberNo(0)` is a vote for nobody.
    pub fn ballot(&mut self, term: Term, vote: MemberNo) {
        self.op(OP_BALLOT, 8, term.0);
        self.bytes.extend_from_slice(&vote.0.to_le_bytes());
    }

    /// The replica may have acknowledged entries that stood after what stands before this, and are gone: none beyond the end of a log that ends like
    /// `floor`. `None`: whatever its ballot allowed.
    pub fn doubt(&mut self, floor: Option<(Index, Term)>) {
        let (index, term) = floor.unwrap_or_default();
        self.op(OP_DOUBT, 8, index.0);
        self.bytes.extend_from_slice(&term.0.to_le_bytes());
    }

    /// All doubt about the replica before this is settled.
    pub fn resolved(&mut self) {
        self.op(OP_RESOLVED, 0, 0);
    }

    /// The replica's log begins anew.
    pub fn install(&mut self, as_of: Index, index: Index, index_term: Term, members: &Members) {
        let members = members.encode();
        self.op(OP_INSTALL, 16 + members.len() as u32, as_of.0);
        self.bytes.extend_from_slice(&index.0.to_le_bytes());
        self.bytes.extend_from_slice(&index_term.0.to_le_bytes());
        self.bytes.extend_from_slice(&members);
    }

    /// The replica's content is whole.
    pub fn whole(&mut self, blocks: u64) {
        self.op(OP_WHOLE, 0, blocks);
    }

    /// An extent that was copied; the payload of what is data is next in the batch.
    pub fn copy(&mut self, copy: &CopyOp) {
        let layered = copy.layer > 0;
        self.op(OP_COPY, 16 + 4 * (copy.crcs.len() as u32 + u32::from(layered)), u64::from(copy.extent) * EXTENT_BLOCKS);
        self.bytes.extend_from_slice(&copy.changed.to_le_bytes());
        self.bytes.extend_from_slice(&copy.states.0.to_le_bytes());
        self.bytes.extend_from_slice(&copy.mask.to_le_bytes());
        self.bytes.extend_from_slice(&u16::from(layered).to_le_bytes());
        if layered {
            self.bytes.extend_from_slice(&copy.layer.to_le_bytes());
        }
        for crc in &copy.crcs {
            self.bytes.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// The volume's reservations are these from here on.
    pub fn reserve(&mut self, state: &Reservations) {
        self.op(OP_RESERVE, state.encoded_len() as u32, 0);
        self.bytes.extend_from_slice(&state.encode());
    }

    /// The volume as of here, of so many blocks, is a snapshot: the last op of its entry.
    pub fn snapshot(&mut self, blocks: u64, shape: &SnapshotShape) {
        let len = shape.encoded_len();
        self.op(OP_SNAPSHOT, len as u32, blocks);
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        shape.put(&mut Put::new(&mut self.bytes, at));
    }

    /// The snapshot is no more.
    pub fn unsnapshot(&mut self, id: SnapshotId) {
        self.op(OP_UNSNAPSHOT, 16, 0);
        self.bytes.extend_from_slice(&id.0);
    }

    /// A layer of the stack that the next install brings.
    pub fn layer(&mut self, row: &KeptRow) {
        let bytes = row.encode();
        self.op(OP_LAYER, bytes.len() as u32, 0);
        self.bytes.extend_from_slice(&bytes);
    }

    /// The replica's layers from the install before it on.
    pub fn stack(&mut self, stack: &StackOp) {
        self.op(OP_STACK, 16, stack.since.0);
        self.bytes.extend_from_slice(&stack.live.to_le_bytes());
        self.bytes.extend_from_slice(&stack.kept.to_le_bytes());
        self.bytes.extend_from_slice(&stack.applied.0.to_le_bytes());
    }

    /// The replica, which has just begun, is a clone.
    pub fn origin(&mut self, segment: SegmentId, snapshot: SnapshotId) {
        self.op(OP_ORIGIN, 32, 0);
        self.bytes.extend_from_slice(&segment.0);
        self.bytes.extend_from_slice(&snapshot.0);
    }

    /// What the replica knows of another member's openings.
    pub fn seen(&mut self, seen: &Seen) {
        self.op(OP_SEEN, Seen::BYTES as u32, seen.no.0);
        self.bytes.extend_from_slice(&seen.opening.encode());
        self.bytes.extend_from_slice(&seen.sealed.0.to_le_bytes());
    }

    /// Enough of the other members believe this opening of the store.
    pub fn believed(&mut self, id: OpeningId) {
        self.op(OP_BELIEVED, OpeningId::BYTES as u32, 0);
        self.bytes.extend_from_slice(&OpeningId::encode(Some(id)));
    }

    /// The log is known to be committed up to this entry.
    pub fn committed(&mut self, index: Index, term: Term) {
        self.op(OP_COMMITTED, 8, index.0);
        self.bytes.extend_from_slice(&term.0.to_le_bytes());
    }

    /// The store is opened with this batch, and its node has written down the opening before, or not.
    pub fn opened(&mut self, vouched: bool) {
        self.op(OP_OPENED, u32::from(vouched), 0);
    }

    /// The group is these members from here on, by force: no entry is of an older term, and no membership before is newer.
    pub fn forced(&mut self, term: Term, members: &Members) {
        let members = members.encode();
        self.op(OP_FORCED, members.len() as u32, term.0);
        self.bytes.extend_from_slice(&members);
    }

    /// A whole entry of ops that [`decode_ops`] took before.
    pub fn raw(&mut self, replica: u32, term: Term, index: Index, ops: &[u8]) {
        self.entry(replica, term, index);
        let count = RawOps(ops).count() as u16;
        self.bytes[self.entry_at + 4..self.entry_at + 6].copy_from_slice(&count.to_le_bytes());
        self.bytes.extend_from_slice(ops);
    }

    /// The entry that was put last stands in an earlier batch too: it replaces nothing, but its payload may be read here.
    pub fn again(&mut self) {
        self.bytes[self.entry_at + 6] = AGAIN;
    }

    /// A whole entry of a group's log, of either kind; takes [`logged_len`] bytes.
    pub fn logged(&mut self, replica: u32, entry: &peer::Entry) {
        match entry.kind {
            EntryKind::Ops => self.raw(replica, entry.term, entry.index, &entry.bytes),
            EntryKind::Members => {
                self.entry(replica, entry.term, entry.index);
                self.members_bytes(&entry.bytes);
            }
        }
    }
}
