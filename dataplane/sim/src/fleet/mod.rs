//! Fleets: three or five whole nodes, each a store over its own faulty drive, joined by a network that loses, doubles, delays, reorders, cuts and
//! corrupts; volumes with a replica on every node, and some with one beside them; from one seed, on one thread.
//!
//! The engine is the daemon's, driven by the same loop as in [`crate::world`]: what is simulated is drives, memory, network, clocks, hosts and the orders
//! of control. Hosts judge what they see ([`crate::oracle`]), the judge what passes between members and what each of them holds ([`judge`]); after the
//! storm everything must come to rest, equal everywhere ([`calm`]). Not here: groups without stores ([`crate::cluster`]), which runs a hundred times
//! as many elections in the same time; and one store alone ([`crate::world`]), whose drives suffer more.

mod calm;
mod drives;
mod hosts;
mod judge;
mod net;
mod node;
mod orders;
mod plan;
mod strike;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use penstock_engine::{Canary, replica};

use crate::run::{Outcome, Seeded, catch_quietly, last_panic};
use crate::tally::Tally;

/// A seeded bug: in the store, in a group, or in what stands around them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    Store(Canary),
    Group(replica::Canary),
}

impl Bug {
    /// Those that a fleet is there to catch. The others of [`Canary`] are the one-node simulator's, and those of groups alone the cluster's.
    pub const ALL: [Bug; 18] = [
        Bug::Store(Canary::CountBeforeBarrier),
        Bug::Store(Canary::AckEarly),
        Bug::Store(Canary::RotIsTear),
        Bug::Store(Canary::TrimPastCheckpoint),
        Bug::Store(Canary::MergeAgainstApplied),
        Bug::Store(Canary::ApplyWithoutSpace),
        Bug::Store(Canary::StampNewTerm),
        Bug::Store(Canary::StageFirstPayload),
        Bug::Store(Canary::CopyOverNewer),
        Bug::Group(replica::Canary::AnswerEarly),
        Bug::Group(replica::Canary::CountUnpersisted),
        Bug::Group(replica::Canary::ForgetBallot),
        Bug::Group(replica::Canary::LeaseFromReceive),
        Bug::Group(replica::Canary::LeaseOverTransfer),
        Bug::Group(replica::Canary::VoteAtOnce),
        Bug::Group(replica::Canary::ReuseRound),
        Bug::Group(replica::Canary::LeaseAsleep),
        Bug::Group(replica::Canary::ReadUnproven),
    ];

    pub fn name(self) -> String {
        match self {
            Bug::Store(canary) => format!("{canary:?}"),
            Bug::Group(canary) => format!("{canary:?}"),
        }
    }

    fn store(self) -> Option<Canary> {
        if let Bug::Store(canary) = self { Some(canary) } else { None }
    }

    fn group(self) -> Option<replica::Canary> {
        if let Bug::Group(canary) = self { Some(canary) } else { None }
    }
}

/// The seeded bugs of fleets.
pub fn canaries() -> Vec<Seeded> {
    Bug::ALL.into_iter().map(|bug| (bug.name(), Box::new(move |seed| run_seed(seed, Some(bug), false)) as _)).collect()
}

/// Runs one seed to its end or its first violation.
pub fn run_seed(seed: u64, bug: Option<Bug>, print: bool) -> Outcome {
    catch_quietly();
    let world: RefCell<Option<world::World>> = RefCell::new(None);
    let ran = catch_unwind(AssertUnwindSafe(|| {
        *world.borrow_mut() = Some(world::World::new(seed, bug, print));
        world.borrow_mut().as_mut().expect("just made").run();
    }));
    let violation = ran.err().map(|_| last_panic());
    let (hash, events, mut tally) = match world.try_borrow_mut() {
        Ok(mut world) => world.take().map_or((0, 0, Tally::default()), |w| (w.trace.hash(), w.trace.events(), w.tally)),
        Err(_) => (0, 0, Tally::default()),
    };
    tally.did("events", events);
    let replay =
        format!("penstock-sim --fleet --seed {seed}{} --trace", bug.map_or(String::new(), |bug| format!(" --canary {}", bug.name())));
    Outcome { seed, hash, events, tally, violation, replay }
}
