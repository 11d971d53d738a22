//! The one safe layer over SPDK v26.01: what the daemon needs of it, with Rust's ownership.
//!
//! Rules of the layer:
//! - Submission owns, completion returns: memory handed to a device comes back with its completion, or with the refusal.
//! - What belongs to one core is neither `Send` nor `Sync`. [`thread::ThreadHandle`] crosses threads, and what carries no
//!   SPDK pointer.
//! - A [`module::HostIo`] is completed once, by value. A channel is used through `&self`; there is never a `&mut` to one.
//! - Nothing allocates per I/O on the paths marked so. Callbacks of the control path are boxed closures.
//! - A panic inside a C callback aborts the process: no state is left half-changed under C.
//!
//! Deliberately not here: an executor, wakers, futures, policy. Nor files and kernel block devices: `penstock-uring` has those.

pub mod app;
pub mod bdev;
pub mod dma;
pub mod lend;
pub mod module;
pub mod nvme;
pub mod nvmf;
pub mod rpc;
pub mod sock;
pub mod status;
pub mod thread;
pub mod vhost;

mod callback;

pub use status::{Errno, NvmeStatus, Status};

/// Where the SPDK tree is that this build is linked with.
pub const SPDK_TREE: &str = spdk_sys::SPDK_TREE;
