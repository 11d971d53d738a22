//! The seeded bugs, in one table: what each breaks, which simulator has to see it, and within how many seeds.
//!
//! Each stands for a mistake that somebody shipped or could have. One counts as caught when a check of the simulator says what is wrong
//! ([`How::Check`]): a hang or a fall somewhere in the engine shows that something is, and is no proof that the checks work. To add one: a switch where
//! the mistake would be made, and a row here, with the simulators whose faults and checks reach it. Not here: the switches, and how seeds run.
//!
//! [`How::Check`]: crate::run::How::Check

use penstock_engine::{Canary, replica};

use crate::run::Simulator;
use crate::run::Simulator::{Fleets, Groups, Node};

/// A seeded bug: in a store, in a group, or in what stands around a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    Store(Canary),
    Group(replica::Canary),
    /// A record that recovery cannot judge is taken for one that never was.
    UnknownIsAbsent,
    /// A ballot counts as persisted without a later record that says so, and rots like any newest record.
    Unsealed,
}

impl Bug {
    pub fn name(self) -> String {
        match self {
            Bug::Store(canary) => format!("{canary:?}"),
            Bug::Group(canary) => format!("{canary:?}"),
            other => format!("{other:?}"),
        }
    }

    pub fn store(self) -> Option<Canary> {
        if let Bug::Store(canary) = self { Some(canary) } else { None }
    }

    pub fn group(self) -> Option<replica::Canary> {
        if let Bug::Group(canary) = self { Some(canary) } else { None }
    }
}

/// A row of the table.
pub struct Seeded {
    pub bug: Bug,
    /// What it breaks, with the invariants of FAULTS.
    pub breaks: &'static str,
    /// Who has to see it, and within how many seeds: each of them.
    pub by: &'static [(Simulator, u64)],
}

const fn store(canary: Canary, breaks: &'static str, by: &'static [(Simulator, u64)]) -> Seeded {
    Seeded { bug: Bug::Store(canary), breaks, by }
}

const fn group(canary: replica::Canary, breaks: &'static str, by: &'static [(Simulator, u64)]) -> Seeded {
    Seeded { bug: Bug::Group(canary), breaks, by }
}

pub const SEEDED: &[Seeded] = &[
    store(Canary::CountBeforeBarrier, "a batch counts before its barrier (5, 9)", &[(Node, 50), (Fleets, 50)]),
    store(Canary::AckEarly, "a write is acknowledged when it is sent to the drive (1, 9)", &[(Node, 50), (Fleets, 50)]),
    store(Canary::TornIsCorruption, "a torn batch before a whole one is called corruption (13)", &[(Node, 100)]),
    store(Canary::RotIsTear, "rot in the last acknowledged batch is dropped as a tear (1, 13)", &[(Node, 50)]),
    store(Canary::TrimPastCheckpoint, "the log is trimmed past the map's checkpoint (15)", &[(Node, 100), (Fleets, 50)]),
    store(Canary::ReuseSlotEarly, "a map page's place is used again before the checkpoint that gives it up (15, 24)", &[(Node, 200)]),
    store(Canary::MergeAgainstApplied, "two sub-block writes merge with what is committed alone (2)", &[(Node, 50), (Fleets, 50)]),
    store(Canary::ApplyWithoutSpace, "a write is applied without space that was promised (15)", &[(Node, 50), (Fleets, 50)]),
    store(Canary::ForgetFence, "a fence is forgotten at a restart (1)", &[(Node, 50)]),
    store(Canary::SkipReadVerify, "what is read is not verified before it leaves (14)", &[(Node, 50)]),
    store(Canary::FreeBufEarly, "a buffer is used again while the device writes it (4, 14)", &[(Node, 50)]),
    store(Canary::DrainUnverified, "the drain copies what it does not verify (13, 14)", &[(Node, 50)]),
    store(Canary::CheckpointBeforeFlush, "a superblock is written before what it points at is durable (15)", &[(Node, 200)]),
    store(Canary::TrustTail, "what recovery reads is taken for durable (1, 9)", &[(Node, 100)]),
    store(Canary::DiscardClears, "a discard over a snapshot lets the snapshot's block show again (2, 4)", &[(Node, 50)]),
    store(Canary::AbsorbAcrossMarker, "a write overwrites what a snapshot in front of it holds (4)", &[(Node, 50)]),
    store(
        Canary::ReuseMergedEarly,
        "an extent that a merge frees is used again before the checkpoint that knows of it (15)",
        &[(Node, 500)],
    ),
    store(Canary::StampNewTerm, "a command of an old term is proposed under a new one (8)", &[(Fleets, 500)]),
    store(Canary::StageFirstPayload, "an entry is taken in without its own payload (14)", &[(Fleets, 50)]),
    store(Canary::CountOwnSpaceAlone, "a leader proposes what another member has no space for (15)", &[(Fleets, 2000)]),
    store(Canary::CopyOverNewer, "a late copy of a rebuild overwrites newer entries (6)", &[(Fleets, 2000)]),
    store(Canary::CopyLiveAlone, "a rebuild leaves out the layers that snapshots froze (6)", &[(Fleets, 500)]),
    store(Canary::CopyUnmerged, "a copy leaves out what a removed snapshot's layer holds (6)", &[(Fleets, 2000)]),
    store(Canary::CloneUnsaved, "a clone stands on what a restart has to wait for (1, 6)", &[(Fleets, 500)]),
    store(Canary::RemoveUnderClone, "a snapshot is removed under a clone", &[(Fleets, 200)]),
    store(Canary::VoteWhenWiped, "a member whose drive was wiped is believed (12)", &[(Fleets, 50)]),
    store(Canary::VoteWhenRestored, "a member whose drive was put back from an older copy is believed (12)", &[(Fleets, 200)]),
    store(Canary::ForgetRemoved, "lost members that come back are not told that their group went on (12)", &[(Fleets, 200)]),
    store(Canary::RepairOlder, "a bad block is repaired with a peer's older one (2, 14)", &[(Fleets, 2000)]),
    store(Canary::CompareNothing, "what members have is never compared (6, 25)", &[(Fleets, 50)]),
    store(Canary::SkipSeal, "a ballot counts before a later record vouches for it (7)", &[(Fleets, 50)]),
    store(Canary::CopyAsOfNow, "a copy of a rebuild is said to be newer than it is (6)", &[(Fleets, 2000)]),
    store(Canary::ForgetDoubt, "what a member may have lost is forgotten by its next restart (1, 11)", &[(Fleets, 2000)]),
    store(Canary::TrimLogOnly, "a log-only member lets go of what others lack (15)", &[(Fleets, 500)]),
    group(replica::Canary::AnswerEarly, "a follower answers before its write is durable (7, 9)", &[(Groups, 50), (Fleets, 50)]),
    group(replica::Canary::CountUnpersisted, "a leader counts its own entries before they are durable (9, 10)", &[(Groups, 50)]),
    group(replica::Canary::ForgetBallot, "term and vote are not written (7)", &[(Groups, 50), (Fleets, 50)]),
    group(replica::Canary::LeaseFromReceive, "a lease runs from when its answers came (17)", &[(Groups, 300)]),
    group(replica::Canary::LeaseOverTransfer, "a lease outlives the beginning of a transfer (17)", &[(Groups, 500)]),
    group(replica::Canary::VoteAtOnce, "a restarted member votes at once (17)", &[(Groups, 1000)]),
    group(replica::Canary::ReuseRound, "a round's number is used again (17)", &[(Groups, 2000)]),
    group(replica::Canary::LeaseAsleep, "a sleeping leader keeps its lease (17)", &[(Groups, 1000)]),
    group(replica::Canary::ReadUnproven, "a leader reads without proof that it leads (17)", &[(Groups, 50), (Fleets, 300)]),
    group(replica::Canary::StepUnchecked, "messages reach raft unchecked (29)", &[(Groups, 300)]),
    group(replica::Canary::ForgetFloor, "a member votes although its log may have been longer (1, 11)", &[(Groups, 50)]),
    group(replica::Canary::RaftLease, "reads are served on the lease of crate raft (17)", &[(Groups, 100)]),
    group(replica::Canary::ServeUnrebuilt, "a member that is rebuilt serves what it does not have yet (2, 6)", &[(Fleets, 2000)]),
    Seeded {
        bug: Bug::UnknownIsAbsent,
        breaks: "a record that cannot be judged is taken for one that never was (1, 13)",
        by: &[(Groups, 100)],
    },
    Seeded { bug: Bug::Unsealed, breaks: "a ballot counts before a later record vouches for it (7)", by: &[(Groups, 200)] },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_every_canary_of_the_engine_once() {
        let names: Vec<String> = SEEDED.iter().map(|seeded| seeded.bug.name()).collect();
        for name in &names {
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
        let stores = Canary::ALL.iter().map(|canary| format!("{canary:?}"));
        for name in stores.chain(replica::Canary::ALL.iter().map(|canary| format!("{canary:?}"))) {
            assert!(names.contains(&name), "no simulator has to see {name}");
        }
        assert!(SEEDED.iter().all(|seeded| !seeded.by.is_empty() && seeded.by.iter().all(|(_, within)| *within <= 2000)));
    }
}
