//! Volumes for our arms, made through `penstock_*` calls: in an agent's own process, or in a penstockd beside it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::arms::SharedAgent;
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

/// The node in an agent's process.
pub struct AgentNode(pub SharedAgent);

impl Node for AgentNode {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        self.0.borrow_mut().rpc(method, params).map_err(|error| error.to_string())
    }
}

/// An id as penstockd takes it: version 8, of a cluster that exists for the benchmark alone.
fn id(sequence: u64) -> String {
    format!("00be9c40-0000-8001-8000-{sequence:012x}")
}

const CLUSTER: u64 = 1;
const NODE: u64 = 2;

/// Makes the node ours, once it is up. Needed once, before drives.
pub fn claim(node: &mut dyn Node) -> Result<(), String> {
    let params = json!({"cluster_id": id(CLUSTER), "node_id": id(NODE)});
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match node.call("penstock_node_claim", &params) {
            Ok(_) => return Ok(()),
            Err(error) if error.contains(NOT_READY) && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error),
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

fn drive_id(number: u64) -> String {
    id(0x100 + number)
}

/// Adds a drive, formatted anew, and waits until it serves.
pub fn add_drive(node: &mut dyn Node, ask: &DriveAsk<'_>) -> Result<(), String> {
    let params = json!({
        "spec": ask.spec, "drive_id": drive_id(ask.number), "cluster_id": id(CLUSTER), "node_id": id(NODE),
        "stores": ask.stores, "oplog_bytes": ask.oplog_bytes, "force": true,
    });
    node.call("penstock_drive_add", &params)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let drive = drive(node, ask.number)?;
        if drive["state"] == "serving" {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("the drive {} does not serve within 60 s: {drive}", ask.spec));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn drive(node: &mut dyn Node, number: u64) -> Result<Value, String> {
    let drives = node.call("penstock_drive_list", &json!({}))?;
    let id = drive_id(number);
    let found = drives.as_array().and_then(|drives| drives.iter().find(|drive| drive["drive_id"] == id.as_str()));
    found.cloned().ok_or_else(|| format!("drive {id} is not in {drives}"))
}

fn volume_id(number: u64) -> String {
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
    let export = self::export(node, number, &json!({"kind": "local"}))?;
    export["address"].as_str().map(str::to_owned).ok_or_else(|| format!("no bdev in {export}"))
}

/// Waits until all is drained and checkpointed.
pub fn drain(node: &mut dyn Node, drive: u64) -> Result<(), String> {
    node.call("penstock_drain", &json!({"drive_id": drive_id(drive)})).map(|_| ())
}

/// Bytes of a drive's log that are not drained.
pub fn undrained_bytes(node: &mut dyn Node, number: u64) -> Result<u64, String> {
    let drive = drive(node, number)?;
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
