//! Load generation, verification, histograms, peers and ratios: what `penstock-perf` is made of.
//!
//! A load is a state machine ([`session`], [`verify`]) that an adapter drives through [`load::Load`]; figures leave it
//! as [`sample::Sample`]s. Ratios of two arms are drawn by [`stats`] from runs that alternate within seconds.
#![forbid(unsafe_code)]

pub mod agent;
pub mod args;
pub mod content;
pub mod counters;
pub mod cpu;
pub mod expect;
#[cfg(test)]
mod fake;
pub mod group;
pub mod handicap;
pub mod host;
pub mod html;
pub mod journal;
pub mod lane;
pub mod live;
pub mod load;
pub mod memory;
pub mod nvme_tcp;
pub mod pace;
pub mod paths;
pub mod ratio;
pub mod report;
pub mod rpc;
pub mod run;
pub mod sample;
pub mod scratch;
pub mod session;
pub mod stats;
pub mod target;
pub mod units;
pub mod verify;
pub mod volume;
pub mod workload;
