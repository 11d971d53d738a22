//! Admission: a member says nothing in its group before enough of the others have its store's opening on their drives, and is stopped by any of
//! them that knows better. So a drive that was wiped, or put back from an older copy, neither votes nor counts under the number that it had.
//!
//! Each opening has a generation, one more than the drive knows of, and a life that nobody had before. It takes two rounds. In the first it is told with
//! the last opening before it that was believed, and with where the log ended when the store was opened first after that: so openings in
//! between, which nobody need have heard of, change nothing of what is told. Who is told compares with what it recorded of that member last:
//!
//! | told | recorded | belief |
//! |---|---|---|
//! | anything | the member was removed | removed |
//! | anything | nothing | believed |
//! | another replica of that number: other drive, store or number in it | any | recreated |
//! | the same life | the same life | recorded already |
//! | none believed since | the newest | restored |
//! | a log that ended before what it said to be durable | how far it was durable | restored |
//! | a log that ends before an entry that it acknowledged to whoever asks, who leads since then | – | forgot |
//!
//! Once enough believe it, that is recorded on its own drive, and then it asks to be recorded on theirs. Of the voters besides itself, and of a
//! quorum `q` of all, there must be
//!
//! | the opening is | who believe | who recorded |
//! |---|---|---|
//! | vouched for: its node has written down, off the drive, the generation that it opened last, and the drive knows of that | q - 1 | q - 1 |
//! | not: it does not, the node forgot, the drive was moved, so it was in an opening since the last that was believed, or none ever was | q, or all | q - 1 |
//! | of a member that does not vote, and may come to | q | q |
//!
//! Not vouched for, it is told to at least one of any q - 1 that recorded the opening before: what a drive did since its copy was taken is
//! found out. Vouched for it is not wiped and not of an older generation, and the one doubt that is left is a copy of the same generation; so it waits
//! a while for all to answer. Asking goes on until everyone has it, and once in a while, to tell how far the log is durable.
//!
//! What is told is durable beyond one bad record: the first batch of the generation has a later one that says so, and so has each record of it, its own
//! and at who is told, before it is spoken of.

use crate::carry::{Carries, Item};
use crate::config::Canary;
use crate::doubt::newest_members;
use crate::member::{Member, MemberStage};
use crate::port::*;
use crate::replica::{LogEnd, Stop};
use crate::store::Store;
use penstock_wire::peer::{AdmitAnswer, AdmitAsk, Belief, MemberNo, Opening, Past, Seen};
use penstock_wire::{Generation, Index, NodeId, Seq};

/// Between two rounds of asking, while it is not admitted and afterwards.
const ASK_MS: u64 = 100;
const TELL_MS: u64 = 1000;
/// For all to answer, where fewer are enough.
const GRACE_MS: u64 = 500;

/// Where a member stands with the others in this opening of its store.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    pub admitted: bool,
    /// What the drive knows of openings, this one included.
    pub past: Past,
    /// First and last asked.
    since: Option<Millis>,
    told: Option<Millis>,
    /// Those that believe this opening, and those that have recorded it.
    believed: Vec<MemberNo>,
    recorded: Vec<MemberNo>,
    /// That it is believed: queued, its batch, and that being durable.
    claim: Claim,
    /// The first batch of the first opening after the last that was believed: see [`Past`].
    opened: Option<Seq>,
    /// The last entry that was acknowledged in this opening.
    pub shown: Index,
}

/// How far it is on the member's own drive that its opening is believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Claim {
    #[default]
    None,
    Queued,
    Sent(Seq),
    Durable,
}

impl Admission {
    pub fn new(past: Past) -> Self {
        Self { past, opened: past.opened, ..Self::default() }
    }

    /// It waits to be believed, and what its own node knows does not speak for its drive.
    pub fn is_dubious(&self) -> bool {
        !self.admitted && self.claim == Claim::None && !self.is_vouched()
    }

    /// As if nothing had been told.
    pub fn tell_again(&mut self) {
        self.told = None;
    }

    fn is_vouched(&self) -> bool {
        self.past.believed.is_some() && !self.past.unvouched
    }

    /// The claim is in this batch.
    pub fn claimed_in(&mut self, batch: Seq) {
        self.claim = Claim::Sent(batch);
    }
}

/// What is known of another member, and how far that is on the drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Known {
    pub seen: Seen,
    /// Its batch; `None` until it is in one.
    pub batch: Option<Seq>,
    /// Waits for the answer until a later record says that the batch is durable.
    pub asks: bool,
}

impl Known {
    /// As recovery found it.
    pub fn recovered(seen: Seen) -> Self {
        Self { seen, batch: Some(Seq(0)), asks: false }
    }
}

/// What is believed of an opening, by what was known before.
fn judge(known: Option<&Seen>, ask: &AdmitAsk, canary: impl Fn(Canary) -> bool) -> Belief {
    let good = if ask.is_believed() { Belief::Recorded } else { Belief::Believed };
    let Some(known) = known else { return good };
    let before = &known.opening;
    if !ask.opening.same_replica(before) {
        return if canary(Canary::VoteWhenWiped) { good } else { Belief::Recreated };
    }
    let follows = ask.believed.is_some_and(|last| last == before.id() || last.generation > before.generation);
    let whole = ask.opening.life == before.life || follows && ask.found >= known.sealed;
    if whole || canary(Canary::VoteWhenRestored) { good } else { Belief::Restored }
}

impl Store {
    fn opening_of(&self, no: ReplicaNo) -> Opening {
        Opening {
            drive: self.config.incarnation,
            store: self.config.store,
            replica: no.0,
            generation: self.stream.generation,
            life: self.config.replication.life,
        }
    }

    /// Tells each member's opening to those whose turn it is.
    pub(crate) fn tell_openings(&mut self, fx: &mut Effects) {
        // Not before a record says that it is durable: rot of the newest would make the next opening look restored.
        if self.stream.sealed_to() < self.stream.opened {
            return;
        }
        self.groups.tells = false;
        for at in 0..self.groups.list.len() {
            self.tell_opening(self.groups.list[at], fx);
        }
    }

    fn tell_opening(&mut self, no: ReplicaNo, fx: &mut Effects) {
        let now = self.now;
        let Some(member) = self.member_mut(no).filter(|member| member.group().is_some()) else { return };
        let (awake, admission) = (member.awake, &mut member.admission);
        let quiet = if admission.admitted { TELL_MS } else { ASK_MS };
        let due = admission.told.is_none_or(|told| now.0 >= told.0 + quiet && (awake || !admission.admitted));
        if !due || matches!(admission.claim, Claim::Queued | Claim::Sent(_)) {
            return;
        }
        admission.since.get_or_insert(now);
        admission.told = Some(now);
        self.send_opening(no, fx);
        self.consider_admission(no);
    }

    pub(crate) fn send_opening(&mut self, no: ReplicaNo, fx: &mut Effects) {
        let Some(member) = self.member_mut(no) else { return };
        let (all, admission) = (newest_members(member), &member.admission);
        let (believed, first) = (admission.past.believed, admission.opened);
        let last = LogEnd { term: member.term_at(member.last()).unwrap_or_default(), index: member.last() };
        let last = member.group().and_then(|group| group.floor()).map_or(last, |floor| floor.max(last));
        let (me, term) = (member.me, member.ballot.term);
        all.list.iter().filter(|other| other.no != me).for_each(|other| member.meet(other.no, other.node));
        let segment = self.map.get(no).map(|replica| replica.shape.segment).expect("a member's replica stands");
        let (opening, sealed) = (self.opening_of(no), self.stream.sealed_to());
        let found = Seq(first.unwrap_or(self.stream.opened).0 - 1);
        for to in all.list.iter().map(|other| other.no).filter(|other| *other != me) {
            let ask = AdmitAsk { segment, from: me, to, opening, believed, found, sealed, term, last: last.index, last_term: last.term };
            self.send_word(no, to, PeerWord::AdmitAsk(ask), fx);
        }
    }

    /// A node can be reached again: its members may not have heard of ours.
    pub(crate) fn tell_again(&mut self, node: NodeId) {
        for at in 0..self.groups.list.len() {
            if let Some(member) = self.member_mut(self.groups.list[at])
                && newest_members(member).list.iter().any(|other| other.node == node)
            {
                member.admission.told = None;
                self.groups.tells = true;
            }
        }
    }

    pub(crate) fn on_admit_ask(&mut self, from: NodeId, ask: &AdmitAsk, fx: &mut Effects) {
        let Some(no) = self.map.by_segment(ask.segment) else { return };
        let Some(member) = self.member_mut(no).filter(|member| member.me == ask.to && member.group().is_some()) else { return };
        if member.members.was_removed(ask.from) {
            if self.canary(Canary::ForgetRemoved) {
                return;
            }
            let Some(member) = self.member_mut(no) else { return };
            member.meet(ask.from, from);
            return self.answer_opening(no, ask.from, ask.opening, Belief::Removed, None, Index(0), fx);
        }
        let Some(other) = newest_members(member).get(ask.from).copied().filter(|other| other.node == from) else { return };
        member.meet(other.no, other.node);
        let known = member.known.iter().find(|known| known.seen.no == ask.from).copied();
        let before = known.map(|known| known.seen);
        let told = LogEnd { term: ask.last_term, index: ask.last };
        let fresh = before.is_none_or(|seen| seen.opening.life != ask.opening.life);
        let forgotten = member.group().filter(|_| fresh).and_then(|group| group.forgotten(ask.from, ask.term, told));
        let mut belief = judge(before.as_ref(), ask, |canary| self.canary(canary));
        if matches!(belief, Belief::Recorded | Belief::Believed) && forgotten.is_some() && !self.canary(Canary::VoteWhenRestored) {
            belief = Belief::Forgot;
        }
        if belief != Belief::Recorded {
            let before = before.filter(|_| belief != Belief::Believed);
            return self.answer_opening(no, ask.from, ask.opening, belief, before, forgotten.unwrap_or_default(), fx);
        }
        let member = self.member_mut(no).expect("seen above");
        let seen = Seen { no: ask.from, opening: ask.opening, sealed: ask.sealed };
        let news = before.is_none_or(|seen| fresh || seen.sealed < ask.sealed);
        if let Some(known) = member.known.iter_mut().find(|known| known.seen.no == ask.from && !fresh) {
            // How far it is durable goes into the next checkpoint.
            known.seen.sealed = known.seen.sealed.max(ask.sealed);
            known.asks = true;
        } else {
            member.known.retain(|known| known.seen.no != ask.from);
            member.known.push(Known { seen, batch: None, asks: true });
            if let Some(group) = member.group_mut() {
                group.on_restarted(ask.from);
            }
            self.groups.queue.push_back(Item { replica: no, carries: Carries::Seen(ask.from), mark: None });
        }
        self.drain.unsaved |= news;
        if !self.groups.asked.contains(&no) {
            self.groups.asked.push(no);
        }
        self.touch(no);
    }

    #[expect(clippy::too_many_arguments)] // what an answer says, which is taken apart nowhere else
    fn answer_opening(
        &mut self,
        no: ReplicaNo,
        to: MemberNo,
        asked: Opening,
        belief: Belief,
        known: Option<Seen>,
        entry: Index,
        fx: &mut Effects,
    ) {
        let Some(replica) = self.map.get(no) else { return };
        let Some(from) = replica.member.as_ref().map(|member| member.me) else { return };
        let (generation, sealed) = known.map_or((Generation(0), Seq(0)), |known| (known.opening.generation, known.sealed));
        let answer = AdmitAnswer { segment: replica.shape.segment, from, to, life: asked.life, belief, generation, sealed, entry };
        self.send_word(no, to, PeerWord::AdmitAnswer(answer), fx);
    }

    /// Answers those whose opening is recorded, beyond one bad record.
    pub(crate) fn answer_recorded(&mut self, fx: &mut Effects) {
        if self.groups.asked.is_empty() {
            return;
        }
        let sealed = self.stream.sealed_to();
        for no in std::mem::take(&mut self.groups.asked) {
            let Some(member) = self.member_mut(no) else { continue };
            let mut ready = Vec::new();
            for known in member.known.iter_mut().filter(|known| known.asks) {
                if known.batch.is_some_and(|batch| batch <= sealed) {
                    known.asks = false;
                    ready.push(known.seen);
                }
            }
            if member.known.iter().any(|known| known.asks) {
                self.groups.asked.push(no);
            }
            for seen in ready {
                self.answer_opening(no, seen.no, seen.opening, Belief::Recorded, Some(seen), Index(0), fx);
            }
        }
    }

    /// Batches that somebody waits for a later record to speak of: openings that are not told yet, that they are believed, and those of others that
    /// are not answered.
    pub(crate) fn seals_awaited(&self) -> impl Iterator<Item = Seq> + '_ {
        let claimed = self.groups.claims.iter().filter_map(|no| match self.member(*no)?.admission.claim {
            Claim::Sent(batch) => Some(batch),
            _ => None,
        });
        let forced = self.groups.forces.iter().filter_map(|force| force.batch);
        let ours = (!self.groups.list.is_empty()).then_some(self.stream.opened).into_iter().chain(claimed).chain(forced);
        let members = self.groups.asked.iter().filter_map(|no| self.member(*no));
        ours.chain(members.flat_map(|member| &member.known).filter(|known| known.asks).filter_map(|known| known.batch))
    }

    pub(crate) fn on_admit_answer<M: Memory>(&mut self, from: NodeId, answer: &AdmitAnswer, mem: &mut M, fx: &mut Effects) {
        let Some(no) = self.map.by_segment(answer.segment) else { return };
        let life = self.config.replication.life;
        let Some(member) = self.member_mut(no).filter(|member| member.me == answer.to && member.node_of(answer.from) == Some(from)) else {
            return;
        };
        if answer.life != life {
            return;
        }
        let stopped = member.group().is_none();
        self.groups.forces.iter_mut().filter(|force| force.replica == no).for_each(|force| force.heard.push(answer.from));
        let Some(member) = self.member_mut(no).filter(|_| !stopped) else { return };
        if let Belief::Recorded | Belief::Believed = answer.belief {
            let admission = &mut member.admission;
            let said = if answer.belief == Belief::Believed { &mut admission.believed } else { &mut admission.recorded };
            if !said.contains(&answer.from) {
                said.push(answer.from);
            }
            self.consider_admission(no);
            return;
        }
        if answer.belief == Belief::Forgot && answer.entry <= member.admission.shown {
            // It was acknowledged in this opening, and came there before what asked. Asking goes on.
            return;
        }
        let found = (self.stream.generation, self.stream.found);
        self.stop_group(no, Stop::Quarantined(disbelief(answer, found)), mem, fx);
        self.drain.unsaved = true;
    }

    /// Enough believe the opening, or have recorded it, or not yet.
    fn consider_admission(&mut self, no: ReplicaNo) {
        let now = self.now;
        let Some(member) = self.member_mut(no).filter(|member| !member.admission.admitted) else { return };
        let (me, all) = (member.me, newest_members(member));
        let others: Vec<MemberNo> = all.voters().filter(|voter| *voter != me).collect();
        let quorum = all.voters().count() / 2 + 1;
        let votes = others.len() < all.voters().count();
        let enough = |spared: bool| if spared && votes { quorum - 1 } else { quorum.min(others.len()) };
        let admission = &mut member.admission;
        let count = |said: &[MemberNo]| others.iter().filter(|other| said.contains(other)).count();
        match admission.claim {
            Claim::None => {
                let believed = count(&admission.believed);
                let waited = admission.since.is_some_and(|since| now.0 >= since.0 + GRACE_MS);
                if believed == others.len() || believed >= enough(admission.is_vouched()) && waited {
                    self.claim_opening(no);
                }
            }
            Claim::Durable if count(&admission.recorded) >= enough(true) => {
                admission.admitted = true;
                self.touch(no);
            }
            Claim::Queued | Claim::Sent(_) | Claim::Durable => {}
        }
    }

    /// Enough believe it: from here on this is what the next opening comes after.
    fn claim_opening(&mut self, no: ReplicaNo) {
        let id = self.opening_of(no).id();
        let admission = &mut self.member_mut(no).expect("its admission was considered").admission;
        admission.past.believe(id);
        admission.claim = Claim::Queued;
        self.drain.unsaved = true;
        self.groups.queue.push_back(Item { replica: no, carries: Carries::Believed(id), mark: None });
        self.groups.claims.push(no);
    }

    /// Those that are believed, beyond one bad record on their own drive, ask to be recorded.
    pub(crate) fn tell_claims(&mut self) {
        let sealed = self.stream.sealed_to();
        let mut claims = std::mem::take(&mut self.groups.claims);
        claims.retain(|no| {
            let Some(member) = self.member_mut(*no).filter(|member| member.group().is_some()) else { return false };
            let durable = matches!(member.admission.claim, Claim::Sent(batch) if batch <= sealed);
            if durable {
                (member.admission.claim, member.admission.told) = (Claim::Durable, None);
                self.groups.tells = true;
            }
            !durable
        });
        self.groups.claims = claims;
    }
}

impl Member {
    /// Its group may be heard: it is up, and the others believe its drive.
    pub fn speaks(&self) -> bool {
        self.admission.admitted && matches!(self.stage, MemberStage::Up(_))
    }
}

/// Why a member is stopped, in words.
fn disbelief(answer: &AdmitAnswer, (generation, found): (Generation, Seq)) -> String {
    let (by, known) = (answer.from.0, answer.generation.0);
    let why = match answer.belief {
        Belief::Recorded | Belief::Believed => unreachable!("that is believed"),
        Belief::Removed => return format!("member {by} says that it was removed from its group: delete this replica"),
        Belief::Recreated => format!("member {by} knows another replica under this number: its drive was wiped, or it was made anew"),
        Belief::Restored => format!(
            "its drive was put back from an older copy: it opens as generation {} with batches up to {}, member {by} recorded generation {known} and batch {}",
            generation.0, found.0, answer.sealed.0
        ),
        Belief::Forgot => {
            format!(
                "its drive was put back from an older copy: member {by} has its acknowledgement of entry {}, which it does not have",
                answer.entry.0
            )
        }
    };
    format!("{why}. It neither votes nor counts any more: replace this replica")
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::peer::OpeningId;
    use penstock_wire::{Incarnation, SegmentId, Term};

    fn opening(drive: u8, replica: u32, generation: u64, life: u8) -> Opening {
        Opening { drive: Incarnation([drive; 16]), store: 0, replica, generation: Generation(generation), life: Incarnation([life; 16]) }
    }

    /// Told by a drive on which opening `before` was believed last, of this life.
    fn ask(opening: Opening, before: (u64, u8), found: u64) -> AdmitAsk {
        let believed = (before.0 > 0).then_some(OpeningId { generation: Generation(before.0), life: Incarnation([before.1; 16]) });
        let (segment, from, to) = (SegmentId([1; 16]), MemberNo(1), MemberNo(2));
        let sealed = Seq(found + 1);
        AdmitAsk { segment, from, to, opening, believed, found: Seq(found), sealed, term: Term(1), last: Index(0), last_term: Term(0) }
    }

    #[test]
    fn opening_is_believed_as_the_table_says() {
        let known = Seen { no: MemberNo(1), opening: opening(1, 4, 7, 9), sealed: Seq(50) };
        use Belief::*;
        let table = [
            (opening(1, 4, 8, 10), (7, 9), 50, Believed),
            (opening(1, 4, 12, 10), (7, 9), 500, Believed),
            // What is recorded is older than what was believed last.
            (opening(1, 4, 12, 10), (11, 20), 500, Believed),
            (opening(1, 4, 12, 10), (12, 10), 500, Recorded),
            // Asked again.
            (opening(1, 4, 7, 9), (7, 9), 3, Recorded),
            (opening(1, 4, 7, 9), (6, 8), 3, Believed),
            // Another opening under the same number: both began with the same copy.
            (opening(1, 4, 7, 10), (6, 8), 60, Restored),
            (opening(1, 4, 6, 10), (5, 8), 60, Restored),
            // It was opened since, and nobody had believed that.
            (opening(1, 4, 8, 10), (6, 8), 60, Restored),
            (opening(1, 4, 9, 10), (7, 8), 60, Restored),
            (opening(1, 4, 8, 10), (0, 0), 60, Restored),
            // A copy of the newest generation.
            (opening(1, 4, 8, 10), (7, 9), 49, Restored),
            // Formatted anew, made anew in the same store, in another store.
            (opening(2, 4, 8, 10), (7, 9), 60, Recreated),
            (opening(1, 5, 8, 10), (0, 0), 60, Recreated),
            (Opening { store: 1, ..opening(1, 4, 8, 10) }, (0, 0), 60, Recreated),
        ];
        for (row, (told, before, found, belief)) in table.into_iter().enumerate() {
            let ask = ask(told, before, found);
            assert_eq!(judge(Some(&known), &ask, |_| false), belief, "row {row}");
            assert!(matches!(judge(None, &ask, |_| false), Recorded | Believed), "row {row}, unknown");
        }
    }
}
