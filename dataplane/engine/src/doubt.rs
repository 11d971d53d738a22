//! A member whose recovery found records that it cannot judge: it asks the others before its group is built, and neither votes nor campaigns
//! meanwhile. The judgement itself is a table ([`crate::replica::resolve`]); this is the asking.

use crate::port::{BufId, Effects, Memory};
use crate::replica::Recovered;
use crate::replica::resolve::{Answer, Unknown};
use penstock_wire::NodeId;
use penstock_wire::peer::{EntriesAnswer, EntriesAsk, Entry, MemberNo};

/// What was found, and what the others have said of it.
#[derive(Debug)]
pub(crate) struct Doubts {
    pub recovered: Recovered,
    pub unknown: Unknown,
    pub answers: Vec<(MemberNo, Answer, Vec<Entry>)>,
}

impl crate::Store {
    /// Somebody's recovery asks for what this member has.
    pub(crate) fn on_entries_ask(&mut self, _from: NodeId, _ask: &EntriesAsk, _fx: &mut Effects) {}

    /// Somebody answers what this member's recovery asked.
    pub(crate) fn on_entries_answer<M: Memory>(
        &mut self,
        _from: NodeId,
        _answer: EntriesAnswer,
        _payload: Option<BufId>,
        _mem: &mut M,
        _fx: &mut Effects,
    ) {
    }
}
