//! The real penstock-control process against a fake node, over real sockets.
#![forbid(unsafe_code)]

mod api;
mod cli;
mod crash;
mod fake;
mod harness;
mod identity;
mod nodes;
mod snapshots;
