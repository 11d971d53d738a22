//! The node itself.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::PeerInfo;
use crate::id::{ClusterId, NodeId};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeInfo {
    /// Both absent until the node is claimed, or has opened a drive that names them.
    #[serde(default)]
    pub cluster_id: Option<ClusterId>,
    #[serde(default)]
    pub node_id: Option<NodeId>,
    /// Of penstockd.
    pub version: String,
    /// [`crate::API_VERSION`] that the node speaks.
    pub api: u32,
    pub pid: u32,
    pub uptime_s: u64,
    /// Differs in each run of the process, so that a restart between two looks is seen.
    pub incarnation: u64,
    pub cores: Vec<CoreInfo>,
    pub poll: PollMode,
    pub no_huge: bool,
    pub spdk: SpdkInfo,
    pub drives: u32,
    pub volumes: u32,
    /// Where it listens for other nodes; absent where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, example = "127.0.0.1:7700"))]
    pub peer_address: Option<SocketAddr>,
    /// The other nodes that it was told of.
    #[serde(default)]
    pub peers: Vec<PeerInfo>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CoreInfo {
    pub core: u32,
    /// 0.0 to 1.0, over the last second or so.
    pub busy_fraction: f64,
    pub stores: u32,
    pub volumes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum PollMode {
    Busy,
    Adaptive,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SpdkInfo {
    pub version: String,
    /// Which source tree it was built from: `upstream`, `ceph`, or a path given by SPDK_DIR.
    pub tree: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeClaimParams {
    pub cluster_id: ClusterId,
    pub node_id: NodeId,
}
