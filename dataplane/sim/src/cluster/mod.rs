//! Groups of three, five or seven members from one seed: the engine's `replica` over links that lose, double, delay and cut, and streams
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

use crate::run::Life;
use crate::tally::{Tally, Trace};

impl Life for world::World {
    fn live(&mut self) {
        self.run().unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    fn end(self) -> (Trace, Tally) {
        (self.trace, self.tally)
    }
}
