//! The data plane's state machine: one [`Store`] is one core's share of one drive, with an oplog, a map and extents.
//!
//! Pure: no I/O, clock, random source, threads or `unsafe`. Events go in, effects come out ([`port`]); the daemon and the
//! simulator run the same code. A write's way through the files: `write` (checked, admitted, merged) → `stream` (batched,
//! persisted in order) → `index` (applied, answered) → `drain` (to its extent) → `checkpoint` (map durable, log trimmed);
//! `recover` comes back from any of these.
//!
//! Architecture invariant: nothing here knows SPDK, sockets, files or control's ids beyond their bytes.

#![forbid(unsafe_code)]

mod admit;
mod alloc;
mod audit;
mod carry;
mod checkpoint;
mod compare;
mod config;
mod doubt;
mod drain;
mod epoch;
mod follow;
mod force;
pub mod format;
mod groups;
mod host;
mod index;
mod lead;
mod look;
mod map;
mod member;
mod merge;
mod orders;
pub mod port;
mod read;
mod rebuild;
mod recover;
mod rejoin;
mod repair;
pub mod replica;
mod reserve;
mod rewrite;
mod room;
mod scrub;
mod send;
mod snapshot;
mod store;
mod stream;
mod write;
mod zero;

pub use audit::AuditError;
pub use config::{
    Barrier, Canary, Counters, FenceReason, Limits, MemberView, OpenError, RecoveryReport, ReplicaUsage, ReplicaView, Replication,
    SnapshotView, Stage, StoreConfig, StoreView,
};
pub use look::{Contents, MemberLook};
pub use port::*;
pub use reserve::rules::{REPORT_MAX, Reserve};
pub use store::Store;
