//! The data plane daemon: thin adapters round the pure engine.
//!
//! Per core one loop (`core`) feeds the stores of that core with events and carries out their effects through `memory`,
//! `disk` and `door`. What can be decided without SPDK is decided in `config`, `command`, `label`, `placement`, `state` and
//! `status`, which are pure or touch a file alone. Not here: any decision about data, which is the engine's.

#![forbid(unsafe_code)]

pub mod command;
pub mod config;
pub mod core;
pub mod disk;
pub mod door;
pub mod inproc;
pub mod label;
pub mod log;
pub mod memory;
pub mod node;
pub mod peer;
pub mod placement;
mod run;
pub mod state;
pub mod status;

pub use run::{RunError, run};
