//! Ids: 122 bits carried as an RFC 9562 UUIDv8, counted where the thing is made and never drawn or reused.
//!
//! ```text
//! cccccccc-cccc-8nnn-[10]ii-ssssssssssss
//!  cluster 48      |      |   sequence 48: counts up from 1; 0 names the cluster or the node itself
//!            node 12      incarnation 14: grows when a node's state was restored, so that its counter may start anew
//! ```
//! The fields fall on the text's groups, so a person can read an id. Node 0 is the cluster's own scope. Not here:
//! issuing them (control/model).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::{Uuid, Variant};

pub const CLUSTER_BITS: u32 = 48;
pub const NODE_BITS: u32 = 12;
pub const INCARNATION_BITS: u32 = 14;
pub const SEQUENCE_BITS: u32 = 48;
const _: () = assert!(CLUSTER_BITS + NODE_BITS + INCARNATION_BITS + SEQUENCE_BITS == 122);

pub const CLUSTER_MAX: u64 = (1 << CLUSTER_BITS) - 1;
pub const NODE_MAX: u16 = (1 << NODE_BITS) - 1;
pub const INCARNATION_MAX: u16 = (1 << INCARNATION_BITS) - 1;
pub const SEQUENCE_MAX: u64 = (1 << SEQUENCE_BITS) - 1;

macro_rules! field {
    ($(#[$doc:meta])* $name:ident($inner:ty), $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name($inner);

        impl $name {
            pub const MAX: Self = Self($max);
            pub const fn new(value: $inner) -> Option<Self> {
                if value <= $max { Some(Self(value)) } else { None }
            }
            pub const fn get(self) -> $inner {
                self.0
            }
            /// The one after this, if the field has room for it.
            pub const fn next(self) -> Option<Self> {
                if self.0 < $max { Some(Self(self.0 + 1)) } else { None }
            }
        }
        impl TryFrom<u64> for $name {
            type Error = String;
            fn try_from(value: u64) -> Result<Self, String> {
                <$inner>::try_from(value).ok().and_then(Self::new).ok_or_else(|| {
                    format!("{} {value} is out of range: the most is {}", stringify!($name), $max)
                })
            }
        }
        impl From<$name> for u64 {
            fn from(value: $name) -> u64 {
                u64::from(value.0)
            }
        }
    };
}

field!(
    /// The random part that all ids of one cluster share. Checked against each other's when clusters are paired.
    ClusterTag(u64), CLUSTER_MAX
);
field!(
    /// Number of the node that made an id; 0 is the cluster's own scope.
    NodeNumber(u16), NODE_MAX
);
field!(
    /// How often the state behind a counter was restored from a copy.
    Incarnation(u16), INCARNATION_MAX
);
field!(
    /// The counter itself.
    Sequence(u64), SEQUENCE_MAX
);

impl NodeNumber {
    pub const CLUSTER: Self = Self(0);
}
impl Incarnation {
    pub const FIRST: Self = Self(0);
}
impl Sequence {
    /// Never issued: with node 0 it names the cluster, with another the node.
    pub const SELF: Self = Self(0);
}

/// The four fields of an [`Id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdParts {
    pub cluster: ClusterTag,
    pub node: NodeNumber,
    pub incarnation: Incarnation,
    pub sequence: Sequence,
}

/// A unique id of this project. See the module for its layout.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(Uuid);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("\"{text}\" is not an id: an id looks like 0194a5c1-b2d3-8001-8000-000000000001")]
    NotUuid { text: String },
    #[error("{uuid} is a UUID of version {version}, but ids are of version 8: it was not made by Penstock")]
    WrongVersion { uuid: Uuid, version: usize },
    #[error("{uuid} has another variant than RFC 9562's: it was not made by Penstock")]
    WrongVariant { uuid: Uuid },
}

impl Id {
    pub fn from_parts(parts: IdParts) -> Self {
        let high = (parts.cluster.0 << 16) | 0x8000 | u64::from(parts.node.0);
        let low = (0b10 << 62) | (u64::from(parts.incarnation.0) << SEQUENCE_BITS) | parts.sequence.0;
        Self(Uuid::from_u64_pair(high, low))
    }

    pub fn parts(self) -> IdParts {
        let (high, low) = self.0.as_u64_pair();
        IdParts {
            cluster: ClusterTag(high >> 16),
            node: NodeNumber((high & u64::from(NODE_MAX)) as u16),
            incarnation: Incarnation(((low >> SEQUENCE_BITS) & u64::from(INCARNATION_MAX)) as u16),
            sequence: Sequence(low & SEQUENCE_MAX),
        }
    }

    /// Checks version and variant; any 122 bits under them are an id.
    pub fn from_uuid(uuid: Uuid) -> Result<Self, IdError> {
        if uuid.get_variant() != Variant::RFC4122 {
            return Err(IdError::WrongVariant { uuid });
        }
        if uuid.get_version_num() != 8 {
            return Err(IdError::WrongVersion { uuid, version: uuid.get_version_num() });
        }
        Ok(Self(uuid))
    }

    pub fn uuid(self) -> Uuid {
        self.0
    }
    /// Big-endian, as on disk, on the wire, and in an NGUID.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }
    pub fn from_bytes(bytes: [u8; 16]) -> Result<Self, IdError> {
        Self::from_uuid(Uuid::from_bytes(bytes))
    }
    pub fn to_u128(self) -> u128 {
        self.0.as_u128()
    }
    pub fn from_u128(value: u128) -> Result<Self, IdError> {
        Self::from_uuid(Uuid::from_u128(value))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Uuid::encode_buffer();
        f.pad(self.0.hyphenated().encode_lower(&mut text))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let uuid = Uuid::try_parse(text).map_err(|_| IdError::NotUuid { text: text.chars().take(64).collect() })?;
        Self::from_uuid(uuid)
    }
}

impl TryFrom<String> for Id {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.to_string()
    }
}

macro_rules! typed_id {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Id);

        impl $name {
            pub fn to_bytes(self) -> [u8; 16] {
                self.0.to_bytes()
            }
            pub fn from_bytes(bytes: [u8; 16]) -> Result<Self, IdError> {
                Id::from_bytes(bytes).map(Self)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                text.parse().map(Self)
            }
        }
    )+};
}

typed_id!(
    /// Names a cluster: node 0, sequence 0.
    ClusterId,
    /// Names a node: sequence 0 under its node number.
    NodeId,
    DriveId,
    VolumeId,
    SegmentId,
    ReplicaId,
    SnapshotId,
);

impl ClusterId {
    pub fn of(cluster: ClusterTag) -> Self {
        Self(Id::from_parts(IdParts { cluster, node: NodeNumber::CLUSTER, incarnation: Incarnation::FIRST, sequence: Sequence::SELF }))
    }
}

impl NodeId {
    /// `node` must not be 0, which is the cluster.
    pub fn of(cluster: ClusterTag, node: NodeNumber) -> Self {
        assert_ne!(node, NodeNumber::CLUSTER, "node number 0 is the cluster's scope, nodes count from 1");
        Self(Id::from_parts(IdParts { cluster, node, incarnation: Incarnation::FIRST, sequence: Sequence::SELF }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parts(cluster: u64, node: u16, incarnation: u16, sequence: u64) -> IdParts {
        IdParts {
            cluster: ClusterTag::new(cluster).unwrap(),
            node: NodeNumber::new(node).unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
            sequence: Sequence::new(sequence).unwrap(),
        }
    }

    #[test]
    fn id_fields_fall_on_text_groups() {
        let id = Id::from_parts(parts(0x0194_a5c1_b2d3, 1, 0, 1));
        assert_eq!(id.to_string(), "0194a5c1-b2d3-8001-8000-000000000001");
        let id = Id::from_parts(parts((1 << 48) - 1, NODE_MAX, INCARNATION_MAX, SEQUENCE_MAX));
        assert_eq!(id.to_string(), "ffffffff-ffff-8fff-bfff-ffffffffffff");
        assert_eq!(
            NodeId::of(ClusterTag::new(0xab).unwrap(), NodeNumber::new(2).unwrap()).to_string(),
            "00000000-00ab-8002-8000-000000000000"
        );
    }

    #[test]
    fn id_of_other_versions_refused() {
        let v4 = "0194a5c1-b2d3-4001-8000-000000000001".parse::<Id>().unwrap_err().to_string();
        assert!(v4.contains("version 4"), "{v4}");
        let variant = "0194a5c1-b2d3-8001-c000-000000000001".parse::<Id>().unwrap_err();
        assert!(matches!(variant, IdError::WrongVariant { .. }));
        assert!("nonsense".parse::<Id>().is_err());
        assert!(Id::from_u128(0).is_err());
    }

    proptest! {
        #[test]
        fn id_parts_round_trip(
            cluster in 0u64..1 << CLUSTER_BITS,
            node in 0..=NODE_MAX,
            incarnation in 0..=INCARNATION_MAX,
            sequence in 0..=SEQUENCE_MAX,
        ) {
            let parts = parts(cluster, node, incarnation, sequence);
            let id = Id::from_parts(parts);
            prop_assert_eq!(id.parts(), parts);
            prop_assert_eq!(id.uuid().get_version_num(), 8);
            prop_assert_eq!(id.to_string().parse::<Id>(), Ok(id));
            prop_assert_eq!(Id::from_bytes(id.to_bytes()), Ok(id));
            prop_assert_eq!(Id::from_u128(id.to_u128()), Ok(id));
            let json = serde_json::to_string(&VolumeId(id)).unwrap();
            prop_assert_eq!(serde_json::from_str::<VolumeId>(&json).unwrap(), VolumeId(id));
        }
        #[test]
        fn id_any_128_bits_accepted_are_kept(bits: u128) {
            if let Ok(id) = Id::from_u128(bits) {
                prop_assert_eq!(Id::from_parts(id.parts()), id);
                prop_assert_eq!(id.to_u128(), bits);
            }
        }
        #[test]
        fn id_random_text_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<Id>();
        }
    }
}
