//! Issues ids: counts up under a high-water mark that is durable before any id below it leaves.
//!
//! ```text
//!   take(n) ─▶ Issued(ids)                    all of them below the mark
//!           └▶ Reserve(mark) ─ make it durable ─▶ on_durable(mark) ─▶ take(n) again
//! ```
//! A crash loses what was reserved and not issued: opening starts at the mark, so ids are skipped and never reused.
//! A state that was restored from a copy is older than the ids it once issued: it counts on under a higher
//! incarnation. Which it does when told ([`Identity::restored`]), and when it sees an id that it cannot have
//! issued ([`Issuer::on_seen`]). Not here: where the mark is kept.

use penstock_api::id::{ClusterTag, Id, IdParts, Incarnation, NodeNumber, Sequence};
use penstock_api::{ClusterId, NodeId};
use serde::{Deserialize, Serialize};

/// Ids reserved at a time: one durable write per so many ids, and at most so many skipped by a crash.
pub const BLOCK: u64 = 1024;

/// Who issues, and how often its state was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub cluster: ClusterTag,
    pub node: NodeNumber,
    pub incarnation: Incarnation,
}

impl Identity {
    pub fn cluster_id(&self) -> ClusterId {
        ClusterId::of(self.cluster)
    }

    pub fn node_id(&self) -> NodeId {
        NodeId::of(self.cluster, self.node)
    }

    /// After its state was restored from a copy. `skip` should be drawn at random, so that two restores of one
    /// copy do not meet. `None` when the incarnations are used up.
    pub fn restored(mut self, skip: u8) -> Option<Self> {
        let next = u64::from(self.incarnation) + 1 + u64::from(skip);
        self.incarnation = Incarnation::try_from(next).ok()?;
        Some(self)
    }
}

/// What [`Issuer::take`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Take {
    Issued(Vec<Id>),
    /// Make this mark durable, tell [`Issuer::on_durable`], and take again.
    Reserve(Mark),
}

/// The part of the issuer's state that must be durable: no id of this incarnation at or above it was ever issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    pub incarnation: Incarnation,
    pub high_water: Sequence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// All sequences of this incarnation are issued.
    Sequences,
    /// All incarnations of this node are used.
    Incarnations,
}

#[derive(Clone, Debug)]
pub struct Issuer {
    identity: Identity,
    /// The next to issue. `next <= durable` always.
    next: u64,
    /// Durable high-water mark: everything below it may have been issued.
    durable: u64,
}

impl Issuer {
    /// `mark` is the durable one; `None` on the very first start.
    pub fn open(mut identity: Identity, mark: Option<Mark>) -> Self {
        let start = match mark {
            // The mark is written together with a raised incarnation, the identity may lag behind it.
            Some(mark) if mark.incarnation >= identity.incarnation => {
                identity.incarnation = mark.incarnation;
                mark.high_water.get()
            }
            // An incarnation that has never issued.
            Some(_) | None => 1,
        };
        Self { identity, next: start, durable: start }
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Takes `n` ids, or says what must be made durable first.
    pub fn take(&mut self, n: u32) -> Result<Take, Exhausted> {
        let n = u64::from(n);
        let end = self.next + n;
        if end > self.durable {
            let mark = end.next_multiple_of(BLOCK);
            let high_water = Sequence::new(mark).ok_or(Exhausted::Sequences)?;
            return Ok(Take::Reserve(Mark { incarnation: self.identity.incarnation, high_water }));
        }
        let ids = (self.next..end).map(|sequence| self.id(sequence)).collect();
        self.next = end;
        assert!(self.next <= self.durable, "issued up to {}, durable is {}", self.next, self.durable);
        Ok(Take::Issued(ids))
    }

    /// `mark` is durable now.
    pub fn on_durable(&mut self, mark: Mark) {
        if mark.incarnation > self.identity.incarnation {
            self.identity.incarnation = mark.incarnation;
            self.next = mark.high_water.get();
            self.durable = mark.high_water.get();
        } else if mark.incarnation == self.identity.incarnation {
            self.durable = self.durable.max(mark.high_water.get());
        }
    }

    /// An id was seen out there. If this node must have issued it and this state knows nothing of it, the state is
    /// older than the world: the answer is the mark of a new incarnation to make durable before the next `take`.
    pub fn on_seen(&self, id: Id) -> Result<Option<Mark>, Exhausted> {
        let seen = id.parts();
        let mine = seen.cluster == self.identity.cluster && seen.node == self.identity.node;
        let known = (seen.incarnation, seen.sequence.get()) < (self.identity.incarnation, self.durable);
        if !mine || known || seen.sequence == Sequence::SELF {
            return Ok(None);
        }
        let incarnation = seen.incarnation.max(self.identity.incarnation).next().ok_or(Exhausted::Incarnations)?;
        Ok(Some(Mark { incarnation, high_water: Sequence::new(1).expect("1 is a sequence") }))
    }

    fn id(&self, sequence: u64) -> Id {
        Id::from_parts(IdParts {
            cluster: self.identity.cluster,
            node: self.identity.node,
            incarnation: self.identity.incarnation,
            sequence: Sequence::new(sequence).expect("below a mark that is a Sequence"),
        })
    }
}

/// Where a state lives: told apart from a copy of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Home {
    /// Of the operating system's installation.
    pub machine: String,
    /// Of the file that holds the state: a copy has another.
    pub inode: u64,
}

/// What opening a state at `found` means when it says that it lives at `recorded`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Residence {
    New,
    Same,
    /// A copy: refused unless the operator says that it replaces the original.
    Copied {
        recorded: Home,
        found: Home,
    },
}

pub fn residence(recorded: Option<&Home>, found: &Home) -> Residence {
    match recorded {
        None => Residence::New,
        Some(recorded) if recorded == found => Residence::Same,
        Some(recorded) => Residence::Copied { recorded: recorded.clone(), found: found.clone() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn identity() -> Identity {
        Identity { cluster: ClusterTag::new(0xabc).unwrap(), node: NodeNumber::new(1).unwrap(), incarnation: Incarnation::FIRST }
    }

    fn take(issuer: &mut Issuer, disk: &mut Option<Mark>, n: u32) -> Vec<Id> {
        match issuer.take(n).unwrap() {
            Take::Issued(ids) => ids,
            Take::Reserve(mark) => {
                *disk = Some(mark);
                issuer.on_durable(mark);
                match issuer.take(n).unwrap() {
                    Take::Issued(ids) => ids,
                    Take::Reserve(mark) => panic!("asked twice, for {mark:?}"),
                }
            }
        }
    }

    #[test]
    fn issuer_first_id_is_one_and_needs_a_durable_mark() {
        let mut issuer = Issuer::open(identity(), None);
        let Take::Reserve(mark) = issuer.take(1).unwrap() else { panic!("issued without a durable mark") };
        assert_eq!(mark.high_water.get(), BLOCK);
        assert_eq!(issuer.take(1).unwrap(), Take::Reserve(mark), "not durable yet: the same answer");
        issuer.on_durable(mark);
        let Take::Issued(ids) = issuer.take(1).unwrap() else { panic!("durable and still refused") };
        assert_eq!(ids[0].parts().sequence.get(), 1);
    }

    #[test]
    fn issuer_exhausted_says_so() {
        let near = Mark { incarnation: Incarnation::FIRST, high_water: Sequence::MAX };
        assert_eq!(Issuer::open(identity(), Some(near)).take(2), Err(Exhausted::Sequences));
        let last = Identity { incarnation: Incarnation::MAX, ..identity() };
        assert_eq!(last.restored(0), None);
    }

    #[test]
    fn issuer_that_sees_its_own_unknown_id_moves_to_a_new_incarnation() {
        let (mut disk, mut later) = (None, None);
        let mut issuer = Issuer::open(identity(), None);
        take(&mut issuer, &mut disk, 5);
        let copy = disk;
        take(&mut issuer, &mut disk, 5000);
        let newest = *take(&mut issuer, &mut disk, 1).last().unwrap();
        assert_eq!(issuer.on_seen(newest), Ok(None));

        let mut restored = Issuer::open(identity(), copy);
        let mark = restored.on_seen(newest).unwrap().expect("it cannot have issued that id");
        restored.on_durable(mark);
        assert_eq!(restored.identity().incarnation.get(), 1);
        assert_eq!(take(&mut restored, &mut later, 1)[0].parts().incarnation.get(), 1);
        assert_eq!(restored.on_seen(newest), Ok(None));
    }

    #[test]
    fn residence_of_a_copy_is_noticed() {
        let here = Home { machine: "m".to_owned(), inode: 1 };
        let there = Home { machine: "m".to_owned(), inode: 2 };
        assert_eq!(residence(None, &here), Residence::New);
        assert_eq!(residence(Some(&here), &here), Residence::Same);
        assert!(matches!(residence(Some(&here), &there), Residence::Copied { .. }));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Take(u32),
        /// Crash after the reservation became durable, or before it.
        CrashInReserve {
            durable: bool,
        },
        Crash,
        /// Go back to an earlier durable state, as a restore from a copy does.
        Restore {
            back: usize,
            skip: u8,
        },
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => (1u32..3000).prop_map(Event::Take),
            1 => any::<bool>().prop_map(|durable| Event::CrashInReserve { durable }),
            1 => Just(Event::Crash),
            1 => (0usize..8, any::<u8>()).prop_map(|(back, skip)| Event::Restore { back, skip }),
        ]
    }

    proptest! {
        #[test]
        fn issuer_never_issues_an_id_twice(events in proptest::collection::vec(any_event(), 1..60)) {
            let mut disk: (Identity, Option<Mark>) = (identity(), None);
            let mut copies = vec![disk];
            let mut issuer = Issuer::open(disk.0, disk.1);
            let mut issued = BTreeSet::new();
            for event in events {
                match event {
                    Event::Take(n) => {
                        for id in take(&mut issuer, &mut disk.1, n) {
                            prop_assert!(issued.insert(id), "{} issued twice", id);
                        }
                        copies.push(disk);
                    }
                    Event::CrashInReserve { durable } => {
                        if let (Ok(Take::Reserve(mark)), true) = (issuer.take(2000), durable) {
                            disk.1 = Some(mark);
                        }
                        issuer = Issuer::open(disk.0, disk.1);
                    }
                    Event::Crash => issuer = Issuer::open(disk.0, disk.1),
                    Event::Restore { back, skip } => {
                        disk = copies[copies.len().saturating_sub(1 + back)];
                        let Some(raised) = disk.0.restored(skip) else { continue };
                        disk.0 = raised;
                        issuer = Issuer::open(disk.0, disk.1);
                        // What the world holds is looked at before anything is issued.
                        for id in &issued {
                            if let Some(mark) = issuer.on_seen(*id).unwrap() {
                                disk.1 = Some(mark);
                                issuer.on_durable(mark);
                            }
                        }
                    }
                }
            }
        }
    }
}
