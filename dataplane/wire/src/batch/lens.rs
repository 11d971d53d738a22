//! What entries take in a section, for who counts whether a batch has room for them. Not here: the bytes.

use super::{ENTRY_HEAD, OP_HEAD};
use crate::layer::KeptRow;
use crate::peer::{self, EntryKind, Members, OpeningId, Seen};
use crate::reservation::Reservations;

/// Bytes that an entry of a group's log takes in a section.
pub fn logged_len(entry: &peer::Entry) -> usize {
    let op_head = if entry.kind == EntryKind::Members { OP_HEAD } else { 0 };
    ENTRY_HEAD + op_head + entry.bytes.len()
}

/// Bytes that an entry with an install and the reservations as of it takes in a section, with the layers as of it or without, one with a whole alone,
/// one with layers, and at most one with a copied extent alone.
pub fn install_len(members: &Members, reservations: Option<&Reservations>, layered: bool) -> usize {
    let stack = if layered { OP_HEAD + 16 } else { 0 };
    WHOLE_LEN + 16 + members.encode().len() + reservations.map_or(0, |state| OP_HEAD + state.encoded_len()) + stack
}
pub const WHOLE_LEN: usize = ENTRY_HEAD + OP_HEAD;
pub fn layers_len(rows: &[KeptRow]) -> usize {
    ENTRY_HEAD + rows.iter().map(|row| OP_HEAD + row.encoded_len()).sum::<usize>()
}
/// Of one in a layer; one in the first takes less.
pub const fn copy_len(data_blocks: u32) -> usize {
    WHOLE_LEN + 20 + 4 * data_blocks as usize
}

/// Bytes that an entry with a ballot alone takes in a section, or one with a doubt alone.
pub const BALLOT_LEN: usize = ENTRY_HEAD + OP_HEAD + 8;

/// Bytes that an entry takes in a section which says that a doubt is over.
pub const RESOLVED_LEN: usize = ENTRY_HEAD + OP_HEAD;

/// Bytes that an entry takes in a section which says what is known of one other member.
pub const SEEN_LEN: usize = ENTRY_HEAD + OP_HEAD + Seen::BYTES;

/// Bytes that an entry takes in a section which says how far the log is known to be committed.
pub const COMMITTED_LEN: usize = ENTRY_HEAD + OP_HEAD + 8;

/// Bytes that an entry takes in a section which says that an opening is believed.
pub const BELIEVED_LEN: usize = ENTRY_HEAD + OP_HEAD + OpeningId::BYTES;

/// Bytes that an entry with a membership by force alone takes in a section.
pub fn forced_len(members: &Members) -> usize {
    ENTRY_HEAD + OP_HEAD + members.encode().len()
}
