//! Proofs of leadership: rounds that a quorum answers, the reads that wait for them, and the lease that one may leave.
//!
//! A round's number is never used twice, since crate `raft` would answer the second from the first. What a proof covers begins
//! when the round is *sent*: by the time that it is answered another may lead.

use super::Timing;
use crate::port::Millis;
use penstock_wire::Term;
use penstock_wire::peer::Round;
use std::collections::VecDeque;

/// Rounds that may be out: reads that come meanwhile wait for the next one.
const OUT_MAX: usize = 8;

struct Out {
    round: Round,
    sent: Millis,
    reads: Vec<u64>,
}

/// Reads that a proof covers, once everything up to `index` is applied.
pub(super) struct Proven {
    pub index: u64,
    pub reads: Vec<u64>,
}

#[derive(Default)]
pub(super) struct Rounds {
    count: u64,
    /// Reads of this turn.
    fresh: Vec<u64>,
    /// A round is wanted though nobody reads: the lease would run out.
    renew: bool,
    out: VecDeque<Out>,
    proven: VecDeque<Proven>,
    lease: Option<(Term, Millis)>,
    /// The newest term in which a transfer was begun: whoever was told to campaign may do so at any later time, past any lease.
    transfer: Term,
}

impl Rounds {
    pub fn read(&mut self, id: u64) {
        self.fresh.push(id);
    }

    pub fn renew(&mut self) {
        self.renew = true;
    }

    pub fn is_idle(&self) -> bool {
        self.fresh.is_empty() && self.out.is_empty() && self.proven.is_empty()
    }

    /// The round to send now, if one is wanted. All reads that wait go with it.
    pub fn begin(&mut self, term: Term, now: Millis, reuse: bool) -> Option<Round> {
        let wanted = !self.fresh.is_empty() || std::mem::take(&mut self.renew);
        if !wanted || self.out.len() >= OUT_MAX {
            return None;
        }
        if !reuse || self.count == 0 {
            self.count += 1;
        }
        let round = Round { term, count: self.count };
        self.out.push_back(Out { round, sent: now, reads: std::mem::take(&mut self.fresh) });
        Some(round)
    }

    /// A quorum has answered `round`: its reads may be served from `index` on, and a lease runs from when it was sent.
    pub fn answered(&mut self, round: Round, index: u64, timing: &Timing, now: Millis, from_receive: bool, over_transfer: bool) {
        let Some(at) = self.out.iter().position(|out| out.round == round) else { return };
        let out = self.out.remove(at).expect("just found");
        if timing.lease && (self.transfer < round.term || over_transfer) {
            let end = timing.lease_end(if from_receive { now } else { out.sent });
            if self.lease.is_none_or(|(term, until)| term < round.term || until < end) {
                self.lease = Some((round.term, end));
            }
        }
        self.proven.push_back(Proven { index, reads: out.reads });
    }

    /// Reads whose proof is in and whose entries are applied.
    pub fn served(&mut self, applied: u64, reads: &mut Vec<u64>) {
        self.proven.retain_mut(|proven| {
            let done = proven.index <= applied;
            if done {
                reads.append(&mut proven.reads);
            }
            !done
        });
    }

    pub fn lease_holds(&self, term: Term, now: Millis) -> bool {
        self.lease.is_some_and(|(of, until)| of == term && now < until)
    }

    pub fn drop_lease(&mut self) {
        self.lease = None;
    }

    /// From here on this term has no lease any more.
    pub fn transfer_begins(&mut self, term: Term) {
        self.transfer = self.transfer.max(term);
    }

    /// Leadership is gone: nothing that waits will be proven.
    pub fn lost(&mut self, refused: &mut Vec<u64>) {
        refused.append(&mut self.fresh);
        for out in &mut self.out {
            refused.append(&mut out.reads);
        }
        for proven in &mut self.proven {
            refused.append(&mut proven.reads);
        }
        self.out.clear();
        self.proven.clear();
        self.renew = false;
        self.lease = None;
    }
}
