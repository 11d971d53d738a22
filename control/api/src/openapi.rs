//! OpenAPI schemas of the types that JSON carries as one text or number, whatever they are in Rust.

use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::rpc::BlockSize;
use crate::{ByteSize, ClusterId, DriveId, DriveSpec, Id, NodeId, NodeName, Nqn, ReplicaId, SegmentId, SnapshotId, VolumeId, VolumeName};

macro_rules! plain_schema {
    ($($name:ty: $kind:expr, $example:expr, $description:literal;)+) => {$(
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                ObjectBuilder::new()
                    .schema_type($kind)
                    .examples([serde_json::json!($example)])
                    .description(Some($description))
                    .into()
            }
        }
        impl ToSchema for $name {}
    )+};
}

const ID: &str = "0194a5c1-b2d3-8001-8000-000000000001";

plain_schema! {
    Id: Type::String, ID, "A unique id, UUIDv8";
    ClusterId: Type::String, "0194a5c1-b2d3-8000-8000-000000000000", "A cluster's id";
    NodeId: Type::String, "0194a5c1-b2d3-8001-8000-000000000000", "A node's id";
    DriveId: Type::String, ID, "A drive's id";
    VolumeId: Type::String, ID, "A volume's id";
    SegmentId: Type::String, ID, "A segment's id";
    ReplicaId: Type::String, ID, "A replica's id";
    SnapshotId: Type::String, ID, "A snapshot's id";
    NodeName: Type::String, "n1", "As a volume's name";
    VolumeName: Type::String, "db-0", "1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit";
    Nqn: Type::String, "nqn.2026-11.io.penstock:db-0", "An NVMe qualified name";
    DriveSpec: Type::String, "file:/var/lib/penstock/d0.img?size=10GiB", "Which drive, and how to treat it";
    ByteSize: Type::Integer, 10_737_418_240_u64, "Bytes. Requests may also say it as text, such as \"10GiB\"";
    BlockSize: Type::Integer, 4096, "Bytes of a logical block: 512 or 4096";
}
