//! Space at the other members: entries that are committed must find their extents everywhere, so a leader counts on what each member said last, and tells a
//! host that there is no space before it proposes what some member could not take.
//!
//! A member says with its acknowledgements, and with its answers to heartbeats, how many extents its store can still promise
//! ([`crate::alloc::Space::room`]), less a slack. From that the leader takes off what it proposed since. The slack is what several leaders may have on its way
//! to one store at the same time; hosts of that store leave it alone too. It makes running out unlikely, not impossible: who has no space in spite of all this leaves entries out
//! of an append (`follow`), and is behind until space is given back.
//!
//! Not counted on: learners, who may be given up, and members that say nothing any more, as those whose nodes are away. What a node said that was heard of a
//! moment ago counts, connected or not. News that are old and tell of little are asked for again first: a member that sleeps may have drained, or taken in for
//! other groups, since.

use crate::config::Canary;
use crate::host::Proposed;
use crate::index::{GroupKey, Slot};
use crate::map::Known;
use crate::member::{Member, Promise};
use crate::port::{Millis, ReplicaNo};
use crate::store::Store;
use penstock_wire::batch::PAYLOAD_BLOCKS_MAX;
use penstock_wire::page::{BlockState, UNALLOCATED};
use penstock_wire::peer::{MemberNo, MessageBody, Role};
use penstock_wire::{EXTENT_BLOCKS, Index};
use rustc_hash::FxHashMap;
use std::ops::Range;

/// Older news are asked for again where they tell of little room.
const FRESH_MS: u64 = 1000;
/// Extents beyond what is asked for from which on news may be of any age.
const SCARCE: u64 = 64;
/// For a member to say something, and for drains and checkpoints to give space back, before a host is told that there is none.
const PATIENCE_MS: u64 = 1000;
/// Extents that one op may take.
const EXTENTS_MAX: u64 = PAYLOAD_BLOCKS_MAX as u64 / EXTENT_BLOCKS + 2;
/// Extents that are known to be spent from which on those are looked for that every member has taken since.
const SWEEP: usize = 1024;

/// What a member said last.
#[derive(Debug)]
struct Told {
    no: MemberNo,
    room: u64,
    /// What it had taken in when it said so counts in its room: entries up to here at least.
    as_of: Index,
    /// What it knew committed.
    commit: Index,
    at: Millis,
    /// Since when newer news are waited for.
    asked: Option<Millis>,
}

/// What a leader knows of the others' space.
#[derive(Default, Debug)]
pub(crate) struct Rooms {
    told: Vec<Told>,
    /// Extents that entries were to take, each with the newest of them: however often one is written, a member takes it once.
    spent: FxHashMap<Promise, Index>,
    /// So many extents are looked through for those that every member has taken since.
    sweep_at: usize,
    /// Since when some member is short.
    short: Option<Millis>,
}

/// Whether a write that takes extents may be proposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Room,
    /// Asked again when the members have said more, or time has passed.
    Wait,
    Full,
}

impl Rooms {
    /// `index`: of the last entry that it acknowledges, if it does. What is older than what it said before is a late copy.
    fn hear(&mut self, no: MemberNo, room: u64, index: Option<Index>, commit: Index, now: Millis) {
        let before = self.told.iter().find(|told| told.no == no).map(|told| (told.as_of, told.commit));
        let (as_of, known) = before.unwrap_or_default();
        if index.is_some_and(|index| index < as_of) || commit < known {
            return;
        }
        self.told.retain(|told| told.no != no);
        self.told.push(Told { no, room, as_of: index.unwrap_or(as_of), commit, at: now, asked: None });
    }

    /// An entry was proposed that takes these extents.
    pub fn spend(&mut self, index: Index, extents: &[Promise]) {
        self.spent.extend(extents.iter().map(|extent| (*extent, index)));
    }

    fn sweep(&mut self, counts: impl Fn(MemberNo) -> bool) {
        if self.spent.len() < self.sweep_at {
            return;
        }
        self.told.retain(|told| counts(told.no));
        let all_have = self.told.iter().map(|told| told.as_of).min().unwrap_or(Index(u64::MAX));
        self.spent.retain(|_, index| *index > all_have);
        self.sweep_at = SWEEP.max(2 * self.spent.len());
    }

    /// Whether all have so much room that nothing needs a closer look.
    fn is_plenty(&mut self, extents: u64) -> bool {
        let most = self.spent.len() as u64 + extents + SCARCE;
        let plenty = self.spent.len() < self.sweep_at && self.told.iter().all(|told| told.room >= most);
        self.short = self.short.filter(|_| !plenty);
        plenty
    }

    /// Whether those that `counts` can take `extents` more.
    fn judge(&mut self, extents: u64, now: Millis, counts: impl Fn(MemberNo) -> bool) -> Verdict {
        self.sweep(&counts);
        let (mut short, mut waits) = (false, false);
        for told in &mut self.told {
            if !counts(told.no) {
                continue;
            }
            let spent = self.spent.values().filter(|index| **index > told.as_of).count() as u64;
            if told.room >= spent + extents + SCARCE {
                continue;
            }
            if now.0 > told.at.0 + FRESH_MS {
                // Who says nothing at all is not waited for.
                waits |= now.0 < told.asked.get_or_insert(now).0 + PATIENCE_MS;
            } else {
                short |= told.room < spent + extents;
            }
        }
        if short {
            let since = *self.short.get_or_insert(now);
            return if now.0 < since.0 + PATIENCE_MS { Verdict::Wait } else { Verdict::Full };
        }
        if waits {
            return Verdict::Wait;
        }
        self.short = None;
        Verdict::Room
    }
}

impl Store {
    /// Extents of which other leaders may count on this store.
    pub(crate) fn room_to_tell(&self) -> u64 {
        self.space.room().saturating_sub(self.space.slack())
    }

    /// Extents that hosts here leave alone.
    pub(crate) fn slack(&self) -> u64 {
        if self.groups.list.is_empty() { 0 } else { self.space.slack() }
    }

    /// Extents of what is written that have their place here and hold nothing: members that have drained it have given theirs back.
    pub(crate) fn bare_extents(&self, no: ReplicaNo, written: Range<u64>) -> impl Iterator<Item = Promise> {
        let layer = self.map.live_layer(no);
        let is_bare = move |extent: &u32| {
            let Known::Entry(entry) = self.map.known(layer, *extent) else { return false };
            let group = self.index.find(GroupKey { layer, extent: *extent }).map(|id| self.index.group(id));
            let holds = |at: usize| match group.and_then(|group| group.slots[at]) {
                Some(slot) => Slot::in_log(&Some(slot)),
                None => entry.state(at) == BlockState::Data,
            };
            entry.place != UNALLOCATED && !(0..EXTENT_BLOCKS as usize).any(holds)
        };
        let extents = (written.start / EXTENT_BLOCKS) as u32..written.end.div_ceil(EXTENT_BLOCKS) as u32;
        extents.filter(is_bare).map(move |extent| Promise::Extent(layer.layer, extent))
    }

    /// A member answered, and said how much room it has.
    pub(crate) fn hear_room(&mut self, no: ReplicaNo, from: MemberNo, body: &MessageBody) {
        let (room, index, commit) = match body {
            MessageBody::Appended { room: Some(room), index, commit } => (*room, Some(*index), *commit),
            MessageBody::HeartbeatDone { room: Some(room), commit, .. } => (*room, None, *commit),
            _ => return,
        };
        let now = self.now;
        if let Some(member) = self.member_mut(no).filter(|member| member.serving.is_some() && member.members.get(from).is_some()) {
            member.rooms.hear(from, room, index, commit, now);
        }
    }

    /// Whether all members have room for what a write of these blocks takes, which is so many extents here. Zeros are no write.
    pub(crate) fn members_have_room(&mut self, no: ReplicaNo, extents: u32, written: Range<u64>) -> Verdict {
        let now = self.now;
        if extents == 0 && written.is_empty() || self.canary(Canary::CountOwnSpaceAlone) {
            return Verdict::Room;
        }
        // What is decided in this turn becomes entries at its end.
        let grouped = self.host.grouped.len() as u64;
        let Some(member) = self.member_mut(no) else { return Verdict::Room };
        if member.rooms.is_plenty((grouped + 1) * EXTENTS_MAX) {
            return Verdict::Room;
        }
        let extents = u64::from(extents) + self.bare_extents(no, written).count() as u64;
        if extents == 0 {
            return Verdict::Room;
        }
        let of_op = |op: &Proposed| u64::from(op.promises) + self.bare_extents(no, op.written()).count() as u64;
        let decided: u64 = self.host.grouped.iter().filter(|op| op.replica == no).map(of_op).sum();
        let member = self.member_mut(no).expect("seen above");
        let Member { rooms, members, .. } = member;
        let counts = |no| members.get(no).is_some_and(|member| member.role == Role::Voter);
        let verdict = rooms.judge(extents + decided, now, counts);
        if verdict != Verdict::Room
            && let Some(group) = member.group_mut()
        {
            // Heartbeats are answered with news.
            group.wake();
            self.touch(no);
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::LayerNo;

    const A: MemberNo = MemberNo(2);
    const B: MemberNo = MemberNo(3);

    fn all(_: MemberNo) -> bool {
        true
    }

    fn extent(no: u32) -> Promise {
        Promise::Extent(LayerNo(0), no)
    }

    #[test]
    fn nobody_said_anything_nobody_is_counted_on() {
        assert_eq!(Rooms::default().judge(9999, Millis(5), all), Verdict::Room);
    }

    #[test]
    fn extents_proposed_since_are_taken_off_until_they_are_acknowledged() {
        let mut rooms = Rooms::default();
        rooms.hear(A, 10, Some(Index(4)), Index(0), Millis(0));
        rooms.hear(B, 5000, Some(Index(9)), Index(0), Millis(0));
        rooms.spend(Index(5), &[0, 1, 2, 3, 4, 5].map(extent));
        assert_eq!(rooms.judge(4, Millis(1), all), Verdict::Room);
        assert_eq!(rooms.judge(5, Millis(1), all), Verdict::Wait);
        assert_eq!(rooms.judge(5, Millis(1), |no| no == B), Verdict::Room, "a learner is not counted on");
        // It has taken them in, and says what is left.
        rooms.hear(A, 6, Some(Index(5)), Index(0), Millis(2));
        assert_eq!(rooms.judge(6, Millis(3), all), Verdict::Room);
    }

    #[test]
    fn extent_that_many_entries_write_is_taken_off_once_while_a_member_lags() {
        let mut rooms = Rooms::default();
        rooms.hear(A, 10, Some(Index(4)), Index(0), Millis(0));
        for index in 5..100 {
            rooms.spend(Index(index), &[7, 8].map(extent));
        }
        assert_eq!(rooms.judge(8, Millis(1), all), Verdict::Room);
        rooms.hear(A, 9, Some(Index(98)), Index(0), Millis(2));
        assert_eq!(rooms.judge(8, Millis(2), all), Verdict::Wait, "the newest entry that writes them may find them given back");
        rooms.hear(A, 8, Some(Index(99)), Index(0), Millis(3));
        assert_eq!(rooms.judge(8, Millis(3), all), Verdict::Room);
    }

    #[test]
    fn late_copy_of_what_a_member_said_is_not_believed() {
        let mut rooms = Rooms::default();
        rooms.hear(A, 2, Some(Index(138)), Index(137), Millis(0));
        rooms.hear(A, 90, Some(Index(106)), Index(137), Millis(1));
        assert_eq!(rooms.judge(3, Millis(1), all), Verdict::Wait, "an older acknowledgement");
        rooms.hear(A, 90, None, Index(120), Millis(1));
        assert_eq!(rooms.judge(3, Millis(1), all), Verdict::Wait, "an older answer to a heartbeat");
        rooms.hear(A, 4, None, Index(137), Millis(2));
        assert_eq!(rooms.judge(3, Millis(2), all), Verdict::Room);
    }

    #[test]
    fn member_that_stays_short_is_told_of_after_a_while_and_room_is_seen_at_once() {
        let mut rooms = Rooms::default();
        for at in (0..=PATIENCE_MS).step_by(50) {
            rooms.hear(A, 3, None, Index(0), Millis(at));
            let verdict = rooms.judge(4, Millis(at), all);
            assert_eq!(verdict, if at < PATIENCE_MS { Verdict::Wait } else { Verdict::Full }, "at {at}");
        }
        assert_eq!(rooms.judge(3, Millis(PATIENCE_MS), all), Verdict::Room, "a write that fits");
        rooms.hear(A, 4, None, Index(0), Millis(PATIENCE_MS + 1));
        assert_eq!(rooms.judge(4, Millis(PATIENCE_MS + 1), all), Verdict::Room);
    }

    #[test]
    fn old_news_of_little_are_asked_for_and_not_waited_for_without_end() {
        let mut rooms = Rooms::default();
        rooms.hear(A, 50, None, Index(0), Millis(0));
        rooms.hear(B, 5000, None, Index(0), Millis(0));
        let late = FRESH_MS + 1;
        assert_eq!(rooms.judge(1, Millis(late), all), Verdict::Wait);
        assert_eq!(rooms.judge(1, Millis(late + PATIENCE_MS), all), Verdict::Room, "it says nothing");
        rooms.hear(A, 0, None, Index(0), Millis(late + PATIENCE_MS));
        assert_eq!(rooms.judge(1, Millis(late + PATIENCE_MS), all), Verdict::Wait);
        assert_eq!(rooms.judge(1, Millis(late + PATIENCE_MS), |no| no == B), Verdict::Room, "it was removed");
    }

    #[test]
    fn what_every_member_took_is_swept_and_what_a_laggard_did_not_is_kept() {
        let mut rooms = Rooms::default();
        rooms.hear(A, 9000, Some(Index(0)), Index(0), Millis(0));
        rooms.hear(B, 9000, Some(Index(2000)), Index(0), Millis(0));
        for index in 1..=1500 {
            rooms.spend(Index(index), &[extent(index as u32)]);
        }
        assert_eq!(rooms.judge(1, Millis(0), all), Verdict::Room);
        assert_eq!(rooms.spent.len(), 1500);
        rooms.hear(A, 1500, Some(Index(700)), Index(0), Millis(0));
        assert_eq!(rooms.judge(700, Millis(0), all), Verdict::Room);
        assert_eq!(rooms.judge(701, Millis(0), all), Verdict::Wait);
        for index in 1501..=3000 {
            rooms.spend(Index(index), &[extent(index as u32)]);
        }
        assert_eq!(rooms.judge(1, Millis(0), |no| no == B), Verdict::Room);
        assert_eq!(rooms.spent.len(), 1000, "a learner's are not kept");
    }
}
