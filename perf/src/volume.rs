//! Volumes made or opened through `penstock_*` calls: in this process, in an agent's, or in a penstockd beside it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rpc::RpcClient;

/// Who answers `penstock_*`.
pub trait Node {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String>;
}

impl Node for RpcClient {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        Self::call(self, method, params, Duration::from_secs(60)).map_err(|error| error.to_string())
    }
}

/// An id as penstockd takes it: version 8, of a cluster that exists for the benchmark alone.
pub(crate) fn id(sequence: u64) -> String {
    format!("00be9c40-0000-8001-8000-{sequence:012x}")
}

pub(crate) const CLUSTER: u64 = 1;
const NODE: u64 = 2;

/// Makes the node that of the benchmark's own cluster, once it is up. Needed once, before drives.
pub fn claim(node: &mut dyn Node) -> Result<(), String> {
    claim_as(node, &json!({"cluster_id": id(CLUSTER), "node_id": id(NODE)}))
}

pub(crate) fn claim_as(node: &mut dyn Node, ids: &Value) -> Result<(), String> {
    call_when_up(node, "penstock_node_claim", ids).map(drop)
}

/// A call that a node which is still starting is asked again.
fn call_when_up(node: &mut dyn Node, method: &str, params: &Value) -> Result<Value, String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match node.call(method, params) {
            Err(error) if error.contains(NOT_READY) && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            outcome => return outcome,
        }
    }
}

/// JSON-RPC code of a node that is still starting.
const NOT_READY: &str = "-33008";

/// A drive to add.
#[derive(Debug, Clone)]
pub struct DriveAsk<'a> {
    pub number: u64,
    pub spec: &'a str,
    pub stores: u16,
    pub oplog_bytes: u64,
}

pub(crate) fn drive_id(number: u64) -> String {
    id(0x100 + number)
}

/// Adds a drive, formatted anew, and waits until it serves.
pub fn add_drive(node: &mut dyn Node, ask: &DriveAsk<'_>) -> Result<(), String> {
    add_drive_of(node, ask, &id(NODE))
}

/// The same, of a node with that id.
pub(crate) fn add_drive_of(node: &mut dyn Node, ask: &DriveAsk<'_>, node_id: &str) -> Result<(), String> {
    let params = json!({
        "spec": ask.spec, "drive_id": drive_id(ask.number), "cluster_id": id(CLUSTER), "node_id": node_id,
        "stores": ask.stores, "oplog_bytes": ask.oplog_bytes, "force": true,
    });
    node.call("penstock_drive_add", &params)?;
    serving(node, &Value::String(drive_id(ask.number)), ask.spec)
}

fn serving(node: &mut dyn Node, id: &Value, spec: &str) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let drive = drive(node, id)?;
        if drive["state"] == "serving" {
            return Ok(());
        }
        if Instant::now() >= deadline || drive["state"] != "opening" {
            return Err(format!("the drive {spec} does not serve: {drive}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Opens the volume of that name on a drive that carries a label of ours, in a node that has no drives yet; gives its bdev.
pub fn open_named(node: &mut dyn Node, name: &str, spec: &str) -> Result<String, String> {
    let found = call_when_up(node, "penstock_drive_probe", &json!({"spec": spec}))?;
    let label = &found["content"]["label"];
    if label.is_null() {
        return Err(format!(
            "{spec} holds no Penstock drive ({}); name one that does, or make a volume for the run with volume:SIZE@{spec}",
            found["content"]
        ));
    }
    claim_as(node, &json!({"cluster_id": label["cluster_id"], "node_id": label["node_id"]}))?;
    let add = json!({
        "spec": spec, "drive_id": label["drive_id"], "cluster_id": label["cluster_id"], "node_id": label["node_id"], "open_only": true,
    });
    node.call("penstock_drive_add", &add)?;
    serving(node, &label["drive_id"], spec)?;
    let volumes = node.call("penstock_volume_list", &json!({}))?;
    let all = volumes.as_array().cloned().unwrap_or_default();
    let Some(volume) = all.iter().find(|volume| volume["name"] == name) else {
        let names: Vec<&str> = all.iter().filter_map(|volume| volume["name"].as_str()).collect();
        return Err(format!("no volume `{name}` on {spec}, which holds: {}", names.join(", ")));
    };
    open_local(node, &volume["volume_id"])
}

/// Makes a volume of `size_bytes` on a blank drive, in a node that has no drives yet; gives its bdev.
pub fn open_new(node: &mut dyn Node, size_bytes: u64, spec: &str) -> Result<String, String> {
    claim(node)?;
    let add = json!({"spec": spec, "drive_id": drive_id(1), "cluster_id": id(CLUSTER), "node_id": id(NODE)});
    node.call("penstock_drive_add", &add)?;
    serving(node, &Value::String(drive_id(1)), spec)?;
    create(node, 1, 1, size_bytes)?;
    local_bdev(node, 1)
}

fn drive(node: &mut dyn Node, id: &Value) -> Result<Value, String> {
    let drives = node.call("penstock_drive_list", &json!({}))?;
    let found = drives.as_array().and_then(|drives| drives.iter().find(|drive| drive["drive_id"] == *id));
    found.cloned().ok_or_else(|| format!("drive {id} is not in {drives}"))
}

pub(crate) fn volume_id(number: u64) -> String {
    id(0x200 + number)
}

/// Makes a volume on a drive and gives the core it lives on.
pub fn create(node: &mut dyn Node, number: u64, drive: u64, size_bytes: u64) -> Result<u32, String> {
    let params = json!({
        "volume_id": volume_id(number), "segment_id": id(0x300 + number), "replica_id": id(0x400 + number),
        "name": format!("bench{number}"), "size_bytes": size_bytes, "block_size": 4096, "drive_id": drive_id(drive),
    });
    let volume = node.call("penstock_volume_create", &params)?;
    volume["core"].as_u64().map(|core| core as u32).ok_or_else(|| format!("no core in {volume}"))
}

/// Opens a door and gives its address (a socket or directory for local doors).
pub fn export(node: &mut dyn Node, number: u64, door: &Value) -> Result<Value, String> {
    node.call("penstock_export_add", &json!({"volume_id": volume_id(number), "door": door}))
}

/// Opens a volume for this process and gives its bdev.
pub fn local_bdev(node: &mut dyn Node, number: u64) -> Result<String, String> {
    open_local(node, &Value::String(volume_id(number)))
}

fn open_local(node: &mut dyn Node, volume: &Value) -> Result<String, String> {
    let export = node.call("penstock_export_add", &json!({"volume_id": volume, "door": {"kind": "local"}}))?;
    export["address"].as_str().map(str::to_owned).ok_or_else(|| format!("no bdev in {export}"))
}

/// Waits until all is drained and checkpointed.
pub fn drain(node: &mut dyn Node, drive: u64) -> Result<(), String> {
    node.call("penstock_drain", &json!({"drive_id": drive_id(drive)})).map(|_| ())
}

/// Bytes of a drive's log that are not drained.
pub fn undrained_bytes(node: &mut dyn Node, number: u64) -> Result<u64, String> {
    let drive = drive(node, &Value::String(drive_id(number)))?;
    let stores = drive["stores"].as_array().cloned().unwrap_or_default();
    Ok(stores.iter().filter_map(|store| store["undrained_bytes"].as_u64()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scripted(Vec<(&'static str, Value)>);

    impl Node for Scripted {
        fn call(&mut self, method: &str, _params: &Value) -> Result<Value, String> {
            let (expected, answer) = self.0.remove(0);
            assert_eq!(method, expected);
            Ok(answer)
        }
    }

    #[test]
    fn drive_without_a_label_is_refused_with_what_would_be_right() {
        let mut node = Scripted(vec![("penstock_drive_probe", json!({"content": {"state": "blank"}}))]);
        let error = open_named(&mut node, "db-1", "file:/x.img").unwrap_err();
        assert!(error.contains("blank") && error.contains("volume:SIZE@file:/x.img"), "{error}");
    }

    #[test]
    fn volume_that_is_not_there_names_those_that_are() {
        let label = json!({"cluster_id": "c", "node_id": "n", "drive_id": "d"});
        let mut node = Scripted(vec![
            ("penstock_drive_probe", json!({"content": {"state": "ours", "label": label}})),
            ("penstock_node_claim", json!({})),
            ("penstock_drive_add", json!({})),
            ("penstock_drive_list", json!([{"drive_id": "d", "state": "serving"}])),
            ("penstock_volume_list", json!([{"name": "db-1"}, {"name": "db-2"}])),
        ]);
        let error = open_named(&mut node, "db-3", "file:/x.img").unwrap_err();
        assert!(error.contains("db-1, db-2"), "{error}");
    }

    #[test]
    fn drive_is_waited_for_until_it_serves() {
        let list = |state: &str| json!([{"drive_id": drive_id(1), "state": state}]);
        let mut node = Scripted(vec![
            ("penstock_drive_add", json!({})),
            ("penstock_drive_list", list("opening")),
            ("penstock_drive_list", list("serving")),
        ]);
        add_drive(&mut node, &DriveAsk { number: 1, spec: "bdev:M0", stores: 1, oplog_bytes: 1 << 28 }).unwrap();
        assert!(node.0.is_empty());
    }

    #[test]
    fn ids_are_of_version_8_and_differ() {
        assert_eq!(id(1).as_bytes()[14], b'8');
        assert_eq!(id(1).len(), 36);
        assert_ne!(volume_id(1), drive_id(1));
    }
}
