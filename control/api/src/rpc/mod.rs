//! The JSON-RPC 2.0 of penstockd, methods `penstock_*`, over SPDK's Unix socket.
//!
//! Each method is a type that implements [`Method`]: its name, what goes in, what comes out. Both sides compile
//! against these, so neither can drift. Params refuse unknown fields (a typo must not be a default); results ignore
//! them (a newer node may say more). Sizes are bytes, durations carry their unit in the name.
//! SPDK takes requests of at most [`REQUEST_BYTES_MAX`]; responses may be large. Not here: the transport.
//!
//! To add a method: its params and result in the fitting file, one line in `methods!`, its row in docs.

mod drive;
mod error;
mod frame;
mod group;
mod metrics;
mod node;
mod snapshot;
mod volume;

pub use drive::*;
pub use error::*;
pub use frame::*;
pub use group::*;
pub use metrics::*;
pub use node::*;
pub use snapshot::*;
pub use volume::*;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// SPDK's receive buffer: a longer request ends the connection.
pub const REQUEST_BYTES_MAX: usize = 32 * 1024;

/// One JSON-RPC method.
pub trait Method {
    const NAME: &'static str;
    /// Whether doing it changes nothing, so that it may be sent again freely.
    const READ_ONLY: bool;
    type Params: Serialize + DeserializeOwned;
    type Result: Serialize + DeserializeOwned;
}

/// Params or result of a method that has none: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Empty {}

macro_rules! methods {
    ($($(#[$doc:meta])* $method:ident = $name:literal, $read_only:literal, $params:ty => $result:ty;)+) => {
        $(
            $(#[$doc])*
            pub enum $method {}
            impl Method for $method {
                const NAME: &'static str = $name;
                const READ_ONLY: bool = $read_only;
                type Params = $params;
                type Result = $result;
            }
        )+
        /// Every method's name, in the order of the contract.
        pub const METHODS: &[&str] = &[$($name),+];
    };
}

methods! {
    NodeGet = "penstock_node_get", true, Empty => NodeInfo;
    /// The first claim binds the running node; a different later one is a Conflict.
    NodeClaim = "penstock_node_claim", false, NodeClaimParams => NodeInfo;
    DriveProbe = "penstock_drive_probe", true, DriveProbeParams => DriveProbeInfo;
    /// Formats a blank drive, opens one that carries this label, refuses foreign data unless `force` names it.
    DriveAdd = "penstock_drive_add", false, DriveAddParams => DriveInfo;
    /// Detaches; never erases. Idempotent.
    DriveRemove = "penstock_drive_remove", false, DriveRemoveParams => Empty;
    DriveList = "penstock_drive_list", true, Empty => Vec<DriveInfo>;
    DriveClearFence = "penstock_drive_clear_fence", false, DriveClearFenceParams => Empty;
    /// Idempotent for equal params, a Conflict if the id exists with others.
    VolumeCreate = "penstock_volume_create", false, VolumeCreateParams => VolumeInfo;
    /// Refused (Busy) while exported or in use unless `force`. Idempotent.
    VolumeDelete = "penstock_volume_delete", false, VolumeDeleteParams => Empty;
    VolumeResize = "penstock_volume_resize", false, VolumeResizeParams => VolumeInfo;
    VolumeList = "penstock_volume_list", true, Empty => Vec<VolumeInfo>;
    /// Every write that was answered before is in it. Idempotent; NotReady on a node that does not lead.
    SnapshotCreate = "penstock_snapshot_create", false, SnapshotCreateParams => Empty;
    /// Its space comes back in the background. Idempotent; NotReady on a node that does not lead.
    SnapshotDelete = "penstock_snapshot_delete", false, SnapshotDeleteParams => Empty;
    /// Idempotent for an equal door.
    ExportAdd = "penstock_export_add", false, ExportAddParams => ExportInfo;
    /// Refused (Busy) while hosts are connected unless `force`. Idempotent.
    ExportRemove = "penstock_export_remove", false, ExportRemoveParams => Empty;
    Scrub = "penstock_scrub", false, ScrubParams => ScrubInfo;
    /// Waits, bounded by the node, until all is drained and checkpointed; NotReady if the bound passed first.
    Drain = "penstock_drain", false, DrainParams => DrainInfo;
    /// The replica that is on this node, of a volume with several. Idempotent as `penstock_volume_create`; deleted and resized as any
    /// volume, where a resize is NotReady on a node that does not lead.
    MemberCreate = "penstock_member_create", false, MemberCreateParams => VolumeInfo;
    /// One step of a group's membership, taken by the leader's node; NotReady elsewhere. Idempotent.
    GroupChange = "penstock_group_change", false, GroupChangeParams => Empty;
    /// The leader steps aside for another node's member; answered when it has begun. NotReady on a node that does not lead.
    GroupTransfer = "penstock_group_transfer", false, GroupTransferParams => Empty;
    /// For a majority that is lost for good: the member here goes on alone. Takes seconds, for it asks the others first; a Conflict while a quorum of them
    /// answers, or where what is here is in question and that is not accepted. Idempotent: the receipt stays the same while the node runs.
    GroupRecover = "penstock_group_recover", false, GroupRecoverParams => RecoveryReceipt;
    /// Where the other nodes are. Idempotent.
    PeersSet = "penstock_peers_set", false, PeersSetParams => Empty;
    MetricsGet = "penstock_metrics_get", true, Empty => MetricsInfo;
}

#[cfg(test)]
mod tests;
