//! Recovery by force, for lost majorities alone: a member goes on by itself with the log that it has, whatever the lost ones may have had.
//!
//! ```text
//! ask all that are left, a while → a quorum answers: refused      nobody does: the group stops → its word in the log, sealed → begun anew, alone
//! ```
//!
//! The word names the membership (this member alone) and a term that is far above the one it had: no term of the lost ones, who may have gone on among themselves, is that of any
//! entry from here on. Entries of its log that are not applied are kept and will be committed; memberships among them are older than the one of the word and change
//! nothing. Until the word is durable beyond one bad record the member says nothing, as if it were stopped; a crash before that leaves the group as it was.
//!
//! The lost ones are fenced as removed members are: each tells its opening before it says anything, and whoever of the new membership hears of it answers that it
//! was removed. What hears nobody of the new membership cannot know of it: so they must not be started where the others of them are and this member is not.
//!
//! Not here: which member has most (who orders it compares receipts and logs), and giving the group new members (ordinary changes).

use crate::doubt::newest_members;
use crate::member::MemberStage;
use crate::port::*;
use crate::rebuild::Own;
use crate::replica::{Ballot, Group, LogEnd, Recovered, Stop};
use crate::store::Store;
use penstock_wire::peer::{Member as Row, MemberNo, Members, Role};
use penstock_wire::{SegmentId, Seq, Term};

/// For others to answer, and between two times of asking.
const WAIT_MS: u64 = 2000;
const ASK_MS: u64 = 500;
/// Elections that lost members may have held among themselves.
const TERMS: u64 = 1 << 16;

/// A recovery that is under way.
#[derive(Debug)]
pub(crate) struct Force {
    pub replica: ReplicaNo,
    pub order: OrderId,
    began: Millis,
    asked: Option<Millis>,
    /// Who answered meanwhile.
    pub heard: Vec<MemberNo>,
    /// Once it is decided; and the batch of its word.
    receipt: Option<Box<Receipt>>,
    pub batch: Option<Seq>,
}

impl Store {
    pub(crate) fn begin_force(
        &mut self,
        order: OrderId,
        segment: SegmentId,
        regardless: bool,
        fx: &mut Effects,
    ) -> Option<Result<(), OrderError>> {
        let Some(replica) = self.map.by_segment(segment) else { return Some(Err(OrderError::NoSuchSegment)) };
        let Some(member) = self.member(replica) else { return Some(Err(OrderError::Invalid("a volume with one replica has no group"))) };
        if self.groups.forces.iter().any(|force| force.replica == replica) {
            return Some(Err(OrderError::Invalid("it is being recovered already; wait for that")));
        }
        if member.members.get(member.me).is_some_and(|row| row.role == Role::LogOnly) {
            return Some(Err(OrderError::Invalid("a log-only member has no content to go on with")));
        }
        let alone = member.members.list.len() == 1 && member.group().is_some();
        if alone {
            // Ordered again.
            let receipt = self.receipt(replica, Vec::new());
            fx.list.push(Effect::Notice(Notice::Recovered { replica, order, receipt: Box::new(receipt) }));
            return Some(Ok(()));
        }
        let why = match &member.stage {
            MemberStage::Stopped(stop) => Some(stop.to_string()),
            MemberStage::Up(_) if member.rebuild.is_some() => {
                Some("its content is being copied from the others and is not whole".to_owned())
            }
            MemberStage::Up(_) => {
                member.admission.is_dubious().then(|| "nobody vouches for its drive, which may be an older copy".to_owned())
            }
        };
        if let Some(why) = why.filter(|_| !regardless) {
            return Some(Err(OrderError::Unsound(why)));
        }
        self.groups.forces.push(Force { replica, order, began: self.now, asked: None, heard: Vec::new(), receipt: None, batch: None });
        None
    }

    /// Goes on with what is under way.
    pub(crate) fn settle_forces<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let mut at = 0;
        while at < self.groups.forces.len() {
            let force = &self.groups.forces[at];
            let (no, order) = (force.replica, force.order);
            let done = match (&force.receipt, force.batch) {
                (None, _) => self.force_or_ask(at, mem, fx),
                (Some(_), Some(batch)) if batch <= self.stream.sealed_to() => {
                    let receipt = self.groups.forces[at].receipt.take().expect("just seen");
                    Some(self.begin_anew(no).map(|()| fx.list.push(Effect::Notice(Notice::Recovered { replica: no, order, receipt }))))
                }
                _ => None,
            };
            match done {
                Some(result) => {
                    self.groups.forces.remove(at);
                    fx.list.push(Effect::OrderDone { id: order, result });
                }
                None => at += 1,
            }
        }
    }

    /// It will not come to an end: the store, or the member, ends before.
    pub(crate) fn end_forces(&mut self, of: Option<ReplicaNo>, error: &OrderError, fx: &mut Effects) {
        for force in self.groups.forces.extract_if(.., |force| of.is_none_or(|of| force.replica == of)) {
            fx.list.push(Effect::OrderDone { id: force.order, result: Err(error.clone()) });
        }
    }

    fn force_or_ask<M: Memory>(&mut self, at: usize, mem: &mut M, fx: &mut Effects) -> Option<Result<(), OrderError>> {
        let now = self.now;
        let force = &mut self.groups.forces[at];
        let (no, heard, began) = (force.replica, force.heard.clone(), force.began);
        let asks = force.asked.is_none_or(|asked| now.0 >= asked.0 + ASK_MS);
        if asks {
            force.asked = Some(now);
        }
        let Some(member) = self.member(no) else { return Some(Err(OrderError::NoSuchSegment)) };
        let (members, sound) = (newest_members(member), member.group().is_some());
        let counted = members.voters().filter(|voter| heard.contains(voter) || sound && *voter == member.me).count();
        let quorum = members.voters().count() / 2 + 1;
        if counted >= quorum {
            return Some(Err(OrderError::QuorumHeard { heard, quorum }));
        }
        if asks {
            self.send_opening(no, fx);
        }
        if now.0 >= began.0 + WAIT_MS {
            let receipt = self.receipt(no, heard);
            self.force(no, receipt.new_term, mem, fx);
            self.groups.forces[at].receipt = Some(Box::new(receipt));
        }
        None
    }

    fn receipt(&self, no: ReplicaNo, heard: Vec<MemberNo>) -> Receipt {
        let replica = self.map.get(no).expect("a member's replica stands");
        let member = replica.member.as_deref().expect("it is a member");
        let last = member.last();
        let known = member.group().and_then(Group::view).map(|view| view.committed);
        Receipt {
            me: member.me,
            members: newest_members(member),
            heard,
            term: member.ballot.term,
            new_term: Term(member.ballot.term.0 + TERMS),
            last: LogEnd { term: member.term_at(last).unwrap_or_default(), index: last },
            committed: known.unwrap_or(replica.applied).min(last),
            floor: member.group().and_then(Group::floor),
            whole_as_of: member.rebuilt_from(),
            stopped: if let MemberStage::Stopped(stop) = &member.stage { Some(stop.to_string()) } else { None },
        }
    }

    /// The group stops, and the member's word on it goes into the log.
    fn force<M: Memory>(&mut self, no: ReplicaNo, term: Term, mem: &mut M, fx: &mut Effects) {
        self.stop_group(no, Stop::Forced, mem, fx);
        self.stop_rebuild(no);
        let replica = self.map.get_mut(no).expect("a member's replica stands");
        let member = replica.member.as_deref_mut().expect("it is a member");
        let before = newest_members(member);
        let me =
            Row { role: Role::Voter, ..*before.get(member.me).or(member.members.get(member.me)).expect("it is a member of its group") };
        // One number is skipped: so no membership that its log tells of, committed or not, is newer.
        let members = Members { next: MemberNo(before.next.max(member.members.next).0 + 1), list: vec![me] };
        member.stage = MemberStage::Stopped(Stop::Forced);
        member.ballot = Ballot { term, vote: MemberNo(0) };
        member.known.retain(|known| !members.was_removed(known.seen.no));
        member.members = members.clone();
        (member.doubts, member.rebuild) = (None, None);
        (replica.term, replica.proposed) = (term, member.last());
        self.queue_own(no, Own::Forced { term, members });
    }

    /// Its word is durable: from here on it is the group.
    fn begin_anew(&mut self, no: ReplicaNo) -> Result<(), OrderError> {
        let replica = self.map.get(no).ok_or(OrderError::NoSuchSegment)?;
        let member = replica.member.as_deref().expect("it is a member");
        let from = Recovered {
            ballot: member.ballot,
            start: member.start,
            start_term: member.start_term,
            applied: replica.applied,
            applied_term: member.applied_term,
            members: member.members.clone(),
            entries: member.log.iter().map(|logged| logged.entry.clone()).collect(),
            committed: replica.applied,
            floor: None,
        };
        let stage = self.raise_group(no, member.me, from);
        self.drain.unsaved = true;
        let member = self.member_mut(no).expect("just seen");
        member.stage = stage;
        if let MemberStage::Stopped(stop) = &member.stage {
            return Err(OrderError::Unsound(stop.to_string()));
        }
        member.awake = true;
        member.admission.tell_again();
        self.groups.woke();
        self.groups.tells = true;
        self.touch(no);
        Ok(())
    }

    /// The word is in this batch.
    pub(crate) fn forced_in(&mut self, no: ReplicaNo, batch: Seq) {
        self.groups.forces.iter_mut().filter(|force| force.replica == no).for_each(|force| force.batch = Some(batch));
    }
}
