//! One node on one thread from one seed: the real engine over drives that lie, hosts that meddle and power that goes; and fleets of nodes
//! ([`fleet`]), and groups without stores ([`cluster`]).
//!
//! The engine is driven by the daemon's own loop (`world`); what is simulated is everything around it. An oracle says what
//! hosts may expect (`oracle`, `register`), copies of the drives are opened to see whether promises hold (`probe`,
//! `invariants`), and seeded bugs (canaries) show that all this would notice. A seed gives the same run on every machine:
//! nothing here reads a clock, a random source or a disk. Threads run different seeds (`run`) and share nothing.
//!
//! Architecture invariant: no knowledge of the disk format. What a block means is found from what hosts wrote into it.

#![forbid(unsafe_code)]

pub mod canaries;
pub mod cluster;
pub mod content;
pub mod device;
pub mod drive;
pub mod evidence;
pub mod faults;
pub mod fleet;
pub mod hosts;
pub mod invariants;
pub mod life;
pub mod liveness;
pub mod memory;
pub mod oracle;
pub mod orders;
pub mod plan;
pub mod probe;
pub mod register;
pub mod report;
pub mod rng;
pub mod run;
pub mod snapshots;
pub mod stamp;
pub mod tally;
pub mod world;
