//! Real processes on loopback: penstockd, penstock-control and the commands, over temporary pools.
//!
//! A [`house::House`] is one node with its control; a [`ledger::Ledger`] writes to a volume, keeps what was acknowledged
//! and judges what is read back; a [`fleet::Fleet`] is several nodes that are peers, a [`cluster::Cluster`] such nodes under one
//! [`control::Control`], [`paths`] a host with a path to each, [`fleet_target`] a fleet as a guest's target; [`hostile`] says wrong things to sockets. Processes and clients are shared with the guest tests ([`crate::guest`]). Tests take turns (see [`turn`]), since two pollers on two cores would starve each other.
//! Deliberately not here: QEMU, and assertions on wall-clock time.

pub mod cluster;
pub mod control;
pub mod fleet;
pub mod fleet_target;
pub mod hostile;
pub mod house;
pub mod http;
pub mod image;
pub mod ledger;
pub mod nvme;
pub mod paths;
pub mod perf;
pub mod program;
pub mod turn;
pub mod usage;
pub mod witness;

pub use crate::guest::{GuestError, Result};

use crate::guest::replay::Dice;

/// Dice from `PENSTOCK_SEED`, else from the clock; the seed is printed, so that a failure can be looked at again.
pub fn dice(test: &str) -> Dice {
    let given = std::env::var("PENSTOCK_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |since| since.as_nanos() as u64)
    });
    println!("{test}: PENSTOCK_SEED={seed}");
    Dice::new(seed)
}

pub fn failed(what: impl Into<String>, detail: impl Into<String>) -> GuestError {
    GuestError::failed(what, detail)
}
