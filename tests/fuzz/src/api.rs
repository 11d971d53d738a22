//! What comes over sockets and from keyboards: JSON-RPC frames and params, HTTP bodies, sizes, ids, names, drive specs.
//! What is accepted must print to something that is accepted as the same.

use crate::bytes::Choices;
use penstock_api::http::*;
use penstock_api::rpc::{self, *};
use penstock_api::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::fmt::{Debug, Display};
use std::str::FromStr;

fn body<T: Serialize + DeserializeOwned>(json: &[u8]) {
    let Ok(parsed) = serde_json::from_slice::<T>(json) else { return };
    let printed = serde_json::to_value(&parsed).expect("what was parsed prints");
    let again: T = serde_json::from_value(printed.clone()).expect("what was printed parses");
    assert_eq!(serde_json::to_value(again).expect("what was parsed prints"), printed);
}

fn text<T: FromStr + Display + PartialEq + Debug>(text: &str)
where
    T::Err: Debug,
{
    if let Ok(parsed) = text.parse::<T>() {
        assert_eq!(parsed.to_string().parse::<T>().expect("what was printed parses"), parsed);
    }
}

fn params<M: Method>(value: Value)
where
    M::Params: Debug,
{
    if let Ok(params) = decode_params::<M>(Some(value)) {
        let bytes = encode_request::<M>(1, &params).expect("params of one request fit");
        let request: Request = serde_json::from_slice(&bytes).expect("a request parses");
        decode_params::<M>(request.params).expect("params that were printed parse");
    }
}

macro_rules! each_method {
    ($do:ident, $value:expr; $($method:ident),+) => { $($do::<rpc::$method>($value.clone());)+ };
}

fn call(json: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(json) {
        let value = request.params.unwrap_or_default();
        each_method!(params, value; NodeGet, NodeClaim, DriveProbe, DriveAdd, DriveRemove, DriveList, DriveClearFence, VolumeCreate,
            VolumeDelete, VolumeResize, VolumeList, SnapshotCreate, SnapshotDelete, ExportAdd, ExportRemove, Scrub, Drain, MemberCreate,
            GroupChange, GroupTransfer, GroupRecover, PeersSet, MetricsGet);
    }
}

fn result<M: Method>(response: Response) {
    let _ = decode_response::<M>(response);
}

fn answer(json: &[u8]) {
    if let Ok(response) = serde_json::from_slice::<Response>(json) {
        each_method!(result, response; NodeGet, NodeClaim, DriveProbe, DriveAdd, DriveRemove, DriveList, DriveClearFence, VolumeCreate,
            VolumeDelete, VolumeResize, VolumeList, SnapshotCreate, SnapshotDelete, ExportAdd, ExportRemove, Scrub, Drain, MemberCreate,
            GroupChange, GroupTransfer, GroupRecover, PeersSet, MetricsGet);
    }
}

pub fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let kind = choices.u8() % 4;
    let data = choices.rest();
    match kind {
        0 => call(data),
        1 => answer(data),
        2 => {
            body::<DriveAddBody>(data);
            body::<ImportBody>(data);
            body::<VolumeCreateBody>(data);
            body::<VolumeResizeBody>(data);
            body::<ExportBody>(data);
            body::<UnexportBody>(data);
            body::<TransferBody>(data);
            body::<SnapshotCreateBody>(data);
            body::<ReplicaMoveBody>(data);
            body::<ReplicaReplaceBody>(data);
            body::<ReplicaRecoverBody>(data);
            body::<ScrubBody>(data);
            body::<DrainBody>(data);
            body::<IdsBody>(data);
            body::<ForceQuery>(data);
        }
        _ => {
            let Ok(words) = std::str::from_utf8(data) else { return };
            text::<ByteSize>(words);
            text::<DriveSpec>(words);
            text::<Nqn>(words);
            text::<Id>(words);
            text::<VolumeName>(words);
            if let Ok(name) = words.parse::<VolumeName>() {
                // Names become file names of sockets and subsystem names.
                let name = name.as_str();
                assert!(!name.contains(['/', '\0']) && name != "." && name != "..", "the name {name:?} can leave its directory");
            }
        }
    }
}

const ID: &str = "0194a5c1-b2d3-8001-8000-000000000001";

/// One accepted input of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let calls = [
        ("penstock_node_get", "{}".to_owned()),
        ("penstock_node_claim", format!(r#"{{"cluster_id":"{ID}","node_id":"{ID}"}}"#)),
        ("penstock_drive_probe", r#"{"spec":"nvme:0000:00:04.0/1"}"#.to_owned()),
        (
            "penstock_drive_add",
            format!(
                r#"{{"spec":"file:/a?size=1GiB","drive_id":"{ID}","cluster_id":"{ID}","node_id":"{ID}","stores":2,"oplog_bytes":1048576,"force":true,"open_only":false}}"#
            ),
        ),
        ("penstock_drive_remove", format!(r#"{{"drive_id":"{ID}","force":true}}"#)),
        ("penstock_drive_clear_fence", format!(r#"{{"drive_id":"{ID}"}}"#)),
        (
            "penstock_volume_create",
            format!(
                r#"{{"volume_id":"{ID}","segment_id":"{ID}","replica_id":"{ID}","name":"db-1","size_bytes":10737418240,"block_size":512,"drive_id":"{ID}"}}"#
            ),
        ),
        ("penstock_volume_resize", format!(r#"{{"volume_id":"{ID}","size_bytes":4096,"allow_shrink":true}}"#)),
        (
            "penstock_export_add",
            format!(r#"{{"volume_id":"{ID}","door":{{"kind":"nvmf","address":"127.0.0.1","port":4420,"nqn":"nqn.2014-08.org.x:a"}}}}"#),
        ),
        ("penstock_export_remove", format!(r#"{{"volume_id":"{ID}","door":{{"kind":"vfio_user","name":"v"}},"force":true}}"#)),
        ("penstock_snapshot_create", format!(r#"{{"volume_id":"{ID}","snapshot_id":"{ID}","name":"monday"}}"#)),
        ("penstock_snapshot_delete", format!(r#"{{"volume_id":"{ID}","snapshot_id":"{ID}"}}"#)),
        (
            "penstock_group_change",
            format!(
                r#"{{"volume_id":"{ID}","members":{{"next":3,"list":[{{"member":1,"role":"voter","replica_id":"{ID}","node_id":"{ID}"}},{{"member":2,"role":"log_only","replica_id":"{ID}","node_id":"{ID}"}}]}}}}"#
            ),
        ),
        ("penstock_group_transfer", format!(r#"{{"volume_id":"{ID}","to":"{ID}"}}"#)),
        ("penstock_group_recover", format!(r#"{{"volume_id":"{ID}","regardless":false}}"#)),
        ("penstock_peers_set", format!(r#"{{"peers":[{{"node_id":"{ID}","address":"127.0.0.1:4700"}}]}}"#)),
        ("penstock_scrub", format!(r#"{{"drive_id":"{ID}","action":"start"}}"#)),
    ];
    for (method, params) in &calls {
        seeds.push(format!("\0{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"{method}\",\"params\":{params}}}").into_bytes());
    }
    let answers = [
        "\u{1}{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{}}",
        "\u{1}{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":[]}",
        "\u{1}{\"jsonrpc\":\"2.0\",\"id\":null,\"error\":{\"code\":-33001,\"message\":\"none\",\"data\":{\"hint\":\"look\"}}}",
        "\u{1}{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"size\":4096,\"content\":{\"state\":\"blank\"},\"barrier\":\"flush\",\"volatile\":false}}",
    ];
    seeds.extend(answers.iter().map(|answer| answer.as_bytes().to_vec()));
    let bodies = [
        r#"{"spec":"malloc:m0?size=1GiB","volatile":true,"stores":1,"oplog_bytes":"64MiB","force":false}"#.to_owned(),
        r#"{"specs":["block:/dev/sdx?power_safe=true"],"exports":false}"#.to_owned(),
        format!(r#"{{"name":"db","size":"10GiB","block_size":4096,"replicas":3,"drive_ids":["{ID}","{ID}","{ID}"]}}"#),
        r#"{"size":"1TiB","allow_shrink":false}"#.to_owned(),
        r#"{"door":{"kind":"vhost","name":"a"},"force":true}"#.to_owned(),
        r#"{"to":"n2"}"#.to_owned(),
        r#"{"name":"db","size":"10GiB","replicas":2,"log_only":1}"#.to_owned(),
        r#"{"name":"monday"}"#.to_owned(),
        r#"{"from":"n1","to":"n4"}"#.to_owned(),
        r#"{"node":"n2","on":"n4"}"#.to_owned(),
        r#"{"node":"n1","force":true,"regardless":false}"#.to_owned(),
        r#"{"count":3}"#.to_owned(),
    ];
    seeds.extend(bodies.iter().map(|body| format!("\u{2}{body}").into_bytes()));
    let words = [
        "10GiB",
        "4096",
        "1.5TiB",
        ID,
        "db-1_a.b",
        "nqn.2014-08.org.nvmexpress:uuid:0194a5c1-b2d3-8001-8000-000000000001",
        "file:/srv/a.img?size=10GiB&stores=2",
        "vfio-user:/run/x",
        "bdev:Malloc0",
        "nvme:0000:00:04.0",
    ];
    seeds.extend(words.iter().map(|word| format!("\u{3}{word}").into_bytes()));
    seeds
}
