//! A node as a few maps: media that survive, and what is open, which does not. Groups are the world's.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::rpc::{Door, DriveState, ErrorCode, GroupInfo, Origin, PeerAddress, RpcError, VolumeCreateParams, VolumeState};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, VolumeId};

use crate::observed::{Observed, ObservedDrive, ObservedVolume};
use crate::reconcile::NodeStep;

/// What lies on one medium: a label and the volumes.
#[derive(Clone, Debug, Default)]
pub(super) struct Medium {
    pub(super) label: Option<(ClusterId, NodeId, DriveId)>,
    pub(super) volumes: BTreeMap<VolumeId, ObservedVolume>,
}

#[derive(Default)]
pub(super) struct Node {
    /// By place. Survive everything.
    pub(super) media: BTreeMap<String, Medium>,
    pub(super) claim: Option<(ClusterId, NodeId)>,
    pub(super) peers: Vec<PeerAddress>,
    /// Open drives and the doors served; gone with the process.
    pub(super) open: BTreeMap<DriveId, (String, ObservedDrive)>,
    pub(super) doors: BTreeMap<VolumeId, BTreeSet<Door>>,
}

impl Node {
    pub(super) fn crash(&mut self, volatile_places: &[String]) {
        self.claim = None;
        self.peers.clear();
        self.open.clear();
        self.doors.clear();
        for place in volatile_places {
            self.media.remove(place);
        }
    }

    pub(super) fn observe(&self) -> Observed {
        let volumes = self.open.values().flat_map(|(place, _)| {
            self.media[place].volumes.iter().map(|(id, volume)| {
                let doors = self.doors.get(id).cloned().unwrap_or_default();
                (*id, ObservedVolume { doors, ..volume.clone() })
            })
        });
        Observed {
            cluster_id: self.claim.map(|claim| claim.0),
            node_id: self.claim.map(|claim| claim.1),
            peers: self.peers.clone(),
            connected: self.peers.iter().map(|peer| peer.node_id).collect(),
            drives: self.open.iter().map(|(id, (_, drive))| (*id, drive.clone())).collect(),
            volumes: volumes.collect(),
        }
    }

    fn medium_of(&mut self, drive_id: DriveId) -> Result<&mut Medium, RpcError> {
        let (place, _) = self.open.get(&drive_id).ok_or_else(|| RpcError::new(ErrorCode::NotFound, "no such drive"))?;
        Ok(self.media.entry(place.clone()).or_default())
    }

    pub(super) fn volume(&mut self, id: VolumeId) -> Option<&mut ObservedVolume> {
        let places: Vec<String> = self.open.values().map(|(place, _)| place.clone()).collect();
        let place = places.into_iter().find(|place| self.media[place].volumes.contains_key(&id))?;
        self.media.get_mut(&place)?.volumes.get_mut(&id)
    }

    fn make(&mut self, params: &VolumeCreateParams, group: Option<GroupInfo>) -> Result<(), RpcError> {
        let has_origin = |medium: &Medium, origin: Origin| {
            medium.volumes.get(&origin.volume_id).is_some_and(|volume| volume.has_snapshot(origin.snapshot_id))
        };
        let medium = self.medium_of(params.drive_id)?;
        if params.origin.is_some_and(|origin| !has_origin(medium, origin)) {
            return Err(RpcError::new(ErrorCode::NotReady, "no such snapshot on that drive"));
        }
        let volume = ObservedVolume {
            segment_id: params.segment_id,
            replica_id: params.replica_id,
            name: params.name.clone(),
            size: params.size_bytes,
            block_size: params.block_size,
            drive_id: params.drive_id,
            allocated: ByteSize(0),
            state: VolumeState::Serving,
            reason: None,
            doors: BTreeSet::new(),
            snapshots: vec![],
            origin: params.origin,
            connections: 0,
            group,
        };
        self.medium_of(params.drive_id)?.volumes.entry(params.volume_id).or_insert(volume);
        Ok(())
    }

    pub(super) fn call(&mut self, step: &NodeStep) -> Result<(), RpcError> {
        let refuse = |code, message: &str| Err(RpcError::new(code, message));
        match step {
            NodeStep::Claim(params) => match self.claim {
                Some(claim) if claim != (params.cluster_id, params.node_id) => return refuse(ErrorCode::Conflict, "claimed"),
                _ => self.claim = Some((params.cluster_id, params.node_id)),
            },
            NodeStep::AddDrive(params) => {
                let place = params.spec.place();
                let medium = self.media.entry(place.clone()).or_default();
                let label = (params.cluster_id, params.node_id, params.drive_id);
                match medium.label {
                    Some(found) if found == label => {}
                    None if params.open_only => return refuse(ErrorCode::NotFound, "blank, and was to be opened only"),
                    None => medium.label = Some(label),
                    Some(_) if params.force => *medium = Medium { label: Some(label), ..Medium::default() },
                    Some(_) => return refuse(ErrorCode::ForeignData, "another label"),
                }
                let drive = ObservedDrive {
                    spec: params.spec.clone(),
                    state: DriveState::Serving,
                    reason: None,
                    volatile: params.spec.is_volatile(),
                    free: ByteSize::gib(100),
                };
                self.open.insert(params.drive_id, (place, drive));
            }
            NodeStep::RemoveDrive(params) => {
                let Ok(medium) = self.medium_of(params.drive_id) else { return Ok(()) };
                if !medium.volumes.is_empty() && !params.force {
                    return refuse(ErrorCode::Busy, "volumes live on it");
                }
                let gone: Vec<VolumeId> = medium.volumes.keys().copied().collect();
                gone.iter().for_each(|id| drop(self.doors.remove(id)));
                self.open.remove(&params.drive_id);
            }
            NodeStep::SetPeers(params) => self.peers = params.peers.clone(),
            NodeStep::CreateVolume(params) => {
                self.make(params, None)?;
            }
            NodeStep::CreateMember(params) => {
                let Some(me) = params.own().filter(|member| Some(member.node_id) == self.claim.map(|claim| claim.1)) else {
                    return refuse(ErrorCode::Invalid, "no member is on this node");
                };
                self.make(&params.volume(), Some(GroupInfo::newborn(me.member, params.members.clone())))?;
            }
            NodeStep::ResizeVolume(params) => match self.volume(params.volume_id) {
                None => return refuse(ErrorCode::NotFound, "no such volume"),
                Some(volume) if params.size_bytes < volume.size && !params.allow_shrink => return refuse(ErrorCode::Invalid, "smaller"),
                Some(volume) => volume.size = params.size_bytes,
            },
            NodeStep::DeleteVolume(params) => {
                if self.doors.get(&params.volume_id).is_some_and(|doors| !doors.is_empty()) && !params.force {
                    return refuse(ErrorCode::Busy, "exported");
                }
                self.doors.remove(&params.volume_id);
                self.media.values_mut().for_each(|medium| drop(medium.volumes.remove(&params.volume_id)));
            }
            NodeStep::AddExport(params) => {
                if self.volume(params.volume_id).is_none() {
                    return refuse(ErrorCode::NotFound, "no such volume");
                }
                self.doors.entry(params.volume_id).or_default().insert(params.door.clone());
            }
            NodeStep::RemoveExport(params) => {
                self.doors.entry(params.volume_id).or_default().remove(&params.door);
            }
            NodeStep::TakeSnapshot(_) | NodeStep::RemoveSnapshot(_) => unreachable!("the world does these at all members"),
            NodeStep::ChangeMembers(_) | NodeStep::StepAside(_) => unreachable!("the world's groups do these"),
        }
        Ok(())
    }
}
