//! Control's state machines: which ids may be issued, what is desired, what is observed, and the steps between.
//!
//! ```text
//!   API ──changes──▶ Desired (durable) ─┐
//!                                       ├─ reconcile ──▶ [Step] ──▶ node, or control's own store
//!   node ──lists───▶ Observed ──────────┘
//! ```
//! Each node is looked at and brought along by itself: one that is away holds up none of the others.
//! Everything here is a function of its arguments. Absent: clocks, randomness, threads, files, sockets, async.
#![forbid(unsafe_code)]

pub mod change;
pub mod clones;
pub mod desired;
pub mod enroll;
pub mod import;
pub mod issuer;
pub mod membership;
pub mod observed;
pub mod progress;
pub mod reconcile;
pub mod recovery;
pub mod retry;
pub mod snapshots;

pub use desired::{
    ChangeReason, Desired, DesiredChange, DesiredDoor, DesiredDrive, DesiredGroup, DesiredNode, DesiredReplica, DesiredSnapshot,
    DesiredVolume, Phase, Record,
};
#[doc(inline)]
pub use enroll::enroll;
pub use issuer::{Identity, Issuer};
pub use observed::Observed;
pub use reconcile::{LocalStep, NodeStep, Plan, Step, Subject, reconcile};

#[cfg(test)]
mod world;
