//! Fleets: three, five or seven whole nodes, each a store over its own faulty drive, joined by a network that loses, doubles, delays, reorders, cuts and
//! corrupts; volumes with a replica on every node, and some with one beside them; from one seed, on one thread.
//!
//! The engine is the daemon's, driven by the same loop as in [`crate::world`]: what is simulated is drives, memory, network, clocks, hosts and the orders
//! of control. Hosts judge what they see ([`crate::oracle`]), the judge what passes between members and what each of them holds ([`judge`]); after the
//! storm everything must come to rest, equal everywhere ([`calm`]). Not here: groups without stores ([`crate::cluster`]), which runs a hundred times
//! as many elections in the same time; and one store alone ([`crate::world`]), whose drives suffer more.

mod calm;
mod clones;
mod drives;
mod forsake;
mod hosts;
mod judge;
mod net;
mod node;
mod orders;
mod plan;
mod replace;
mod snapshots;
mod strike;
mod world;
mod wrong;

use crate::run::Life;
use crate::tally::{Tally, Trace};

pub use world::World;

impl Life for World {
    fn live(&mut self) {
        self.run();
    }

    fn end(self) -> (Trace, Tally) {
        (self.trace, self.tally)
    }
}
