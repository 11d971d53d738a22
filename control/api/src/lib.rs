//! Types that control, node and CLI share: the JSON-RPC of penstockd, the HTTP API of penstock-control, and the
//! small languages people type (sizes, drive specs, names, ids).
//!
//! Not here: any I/O, clock, random source or state. The data plane links this crate, so its tree stays small.
#![forbid(unsafe_code)]

pub mod drive;
pub mod http;
pub mod id;
pub mod name;
#[cfg(feature = "openapi")]
mod openapi;
pub mod rpc;
pub mod size;

pub use drive::{DriveKind, DriveSpec};
pub use id::{ClusterId, DriveId, Id, NodeId, ReplicaId, SegmentId, SnapshotId, VolumeId};
pub use name::{NodeName, Nqn, VolumeName};
pub use size::ByteSize;

/// Major version of both interfaces: the `/v1` of the HTTP paths and the `api` field of NodeInfo.
pub const API_VERSION: u32 = 1;
