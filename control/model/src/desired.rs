//! What is desired: control's durable state, a set of records that each stand alone.
//!
//! Things to be taken away stay as records in phase `Removing` until they are observed gone, so that a crash at any
//! moment leaves either the wish or its fulfilment. Permissions that destroy (`force`, `allow_shrink`) are part of
//! one wish and end with it. Not here: who may change it how (change), what follows from it (reconcile).

use std::collections::BTreeMap;

use penstock_api::rpc::{BlockSize, Door};
use penstock_api::{ByteSize, DriveId, DriveSpec, ReplicaId, SegmentId, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use crate::issuer::Identity;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Absent until the first drive is added or imported, or the first id issued.
    pub identity: Option<Identity>,
    pub drives: BTreeMap<DriveId, DesiredDrive>,
    pub volumes: BTreeMap<VolumeId, DesiredVolume>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Present,
    Removing { force: bool },
}

impl Phase {
    pub fn is_present(self) -> bool {
        self == Self::Present
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredDrive {
    pub spec: DriveSpec,
    pub phase: Phase,
    pub volatile: bool,
    pub stores: Option<u16>,
    pub oplog_bytes: Option<ByteSize>,
    /// Permission to format over foreign data. Ends when the drive is made.
    pub force: bool,
    /// It was seen serving: from then on it is opened and never formatted again (unless it is volatile).
    pub made: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredVolume {
    pub name: VolumeName,
    pub segment_id: SegmentId,
    pub replica_id: ReplicaId,
    pub size: ByteSize,
    /// Permission to cut off what lies beyond `size`. Ends when the size is reached.
    pub allow_shrink: bool,
    pub block_size: BlockSize,
    pub drive_id: DriveId,
    pub phase: Phase,
    /// It was seen: if it is absent later, it was lost, and an empty one must not take its place.
    pub made: bool,
    pub doors: Vec<DesiredDoor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredDoor {
    pub door: Door,
    pub phase: Phase,
}

/// One durable change. A list of them is committed at once or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    Identity(Identity),
    PutDrive(DriveId, DesiredDrive),
    DropDrive(DriveId),
    PutVolume(VolumeId, DesiredVolume),
    DropVolume(VolumeId),
}

impl Desired {
    /// Applies what has been made durable.
    pub fn apply(&mut self, records: &[Record]) {
        for record in records {
            match record.clone() {
                Record::Identity(identity) => self.identity = Some(identity),
                Record::PutDrive(id, drive) => drop(self.drives.insert(id, drive)),
                Record::DropDrive(id) => drop(self.drives.remove(&id)),
                Record::PutVolume(id, volume) => drop(self.volumes.insert(id, volume)),
                Record::DropVolume(id) => drop(self.volumes.remove(&id)),
            }
        }
    }

    /// Finds a volume by id, else by name.
    pub fn find_volume(&self, name_or_id: &str) -> Option<(VolumeId, &DesiredVolume)> {
        if let Ok(id) = name_or_id.parse::<VolumeId>() {
            return self.volumes.get(&id).map(|volume| (id, volume));
        }
        self.volumes.iter().find(|(_, volume)| volume.name.as_str() == name_or_id).map(|(id, volume)| (*id, volume))
    }

    pub fn volumes_on(&self, drive_id: DriveId) -> impl Iterator<Item = (&VolumeId, &DesiredVolume)> {
        self.volumes.iter().filter(move |(_, volume)| volume.drive_id == drive_id)
    }
}

impl DesiredVolume {
    pub fn door(&self, door: &Door) -> Option<&DesiredDoor> {
        self.doors.iter().find(|desired| desired.door == *door)
    }
}
