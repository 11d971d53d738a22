//! Groups of three or five members from one seed: the engine's `replica` over links that lose, double, delay and cut, and streams
//! that tear. What is simulated is everything around a group: frames, oplog streams with their barriers, crashes, clients.
//!
//! `world` is the loop and the network, `strike` the faults, `node` one machine with its group, `disk` its stream, `doubts` what a member asks before
//! its group is built, `judge` what must hold.
//! Not here (yet): payload, extents and the store around the group, which the simulator of one node has; the group stands here for
//! itself, its ops being "block b becomes v" written as a zero of v blocks.

pub mod disk;
mod doubts;
pub mod judge;
pub mod node;
mod strike;
pub mod world;

use crate::run::{Outcome, Seeded, catch_quietly};
use penstock_engine::replica::Canary;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A seeded bug: in a group, or in what stands around it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    Group(Canary),
    /// A record that recovery cannot judge is taken for one that never was.
    UnknownIsAbsent,
    /// A ballot counts as persisted without a later record that says so, and rots like any newest record.
    Unsealed,
}

impl Bug {
    pub const ALL: [Bug; 13] = [
        Bug::Group(Canary::AnswerEarly),
        Bug::Group(Canary::CountUnpersisted),
        Bug::Group(Canary::ForgetBallot),
        Bug::Group(Canary::LeaseFromReceive),
        Bug::Group(Canary::LeaseOverTransfer),
        Bug::Group(Canary::VoteAtOnce),
        Bug::Group(Canary::ReuseRound),
        Bug::Group(Canary::LeaseAsleep),
        Bug::Group(Canary::ReadUnproven),
        Bug::Group(Canary::StepUnchecked),
        Bug::Group(Canary::ForgetFloor),
        Bug::UnknownIsAbsent,
        Bug::Unsealed,
    ];

    pub fn name(self) -> String {
        match self {
            Bug::Group(canary) => format!("{canary:?}"),
            other => format!("{other:?}"),
        }
    }
}

/// The seeded bugs of groups.
pub fn canaries() -> Vec<Seeded> {
    Bug::ALL.into_iter().map(|bug| (bug.name(), Box::new(move |seed| run_seed(seed, Some(bug), false)) as _)).collect()
}

/// Runs one seed to its end or its first violation.
pub fn run_seed(seed: u64, bug: Option<Bug>, print: bool) -> Outcome {
    catch_quietly();
    let world = RefCell::new(world::World::new(seed, bug, print));
    let ran = catch_unwind(AssertUnwindSafe(|| world.borrow_mut().run()));
    let world = world.into_inner();
    let violation = match ran {
        Ok(Ok(())) => None,
        Ok(Err(text)) => Some(text),
        Err(panic) => Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic in the simulator".to_owned())),
    };
    let replay =
        format!("penstock-sim --cluster --seed {seed}{} --trace", bug.map_or(String::new(), |bug| format!(" --canary {}", bug.name())));
    Outcome { seed, hash: world.trace.hash(), events: world.trace.events(), tally: world.tally, violation, replay }
}
