//! A volume with several replicas, made through `penstock_*` calls on each of its nodes. Node, drive and replica of a place have its number.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::volume::{self, DriveAsk, Node};

/// Longest wait for a leader, or for members to be equal.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);
/// The volume.
const VOLUME: u64 = 1;

/// How one member stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    pub serves: bool,
    pub leads: bool,
    /// Newest entry that it holds, and newest that it has carried out.
    pub last: u64,
    pub applied: u64,
}

pub fn volume_id() -> String {
    volume::volume_id(VOLUME)
}

fn node_id(at: usize) -> String {
    volume::id(0x10 + at as u64)
}

fn replica_id(at: usize) -> String {
    volume::id(0x500 + at as u64)
}

/// Makes a node one of a cluster whose nodes listen at `listens`.
pub fn join(node: &mut dyn Node, at: usize, listens: &[SocketAddr]) -> Result<(), String> {
    volume::claim_as(node, &json!({"cluster_id": volume::id(volume::CLUSTER), "node_id": node_id(at)}))?;
    let peers: Vec<Value> =
        listens.iter().enumerate().map(|(at, listen)| json!({"node_id": node_id(at), "address": listen.to_string()})).collect();
    node.call("penstock_peers_set", &json!({"peers": peers})).map(drop)
}

/// Adds the node's drive and makes its replica of the volume on it.
pub fn create_member(node: &mut dyn Node, at: usize, nodes: usize, spec: &str, oplog_bytes: u64, size_bytes: u64) -> Result<(), String> {
    let number = at as u64;
    volume::add_drive_of(node, &DriveAsk { number, spec, stores: 1, oplog_bytes }, &node_id(at))?;
    let members: Vec<Value> =
        (0..nodes).map(|at| json!({"member": at + 1, "role": "voter", "replica_id": replica_id(at), "node_id": node_id(at)})).collect();
    let params = json!({
        "volume_id": volume::volume_id(VOLUME), "segment_id": volume::id(0x300 + VOLUME), "replica_id": replica_id(at), "name": "bench",
        "size_bytes": size_bytes, "block_size": 4096, "drive_id": volume::drive_id(number),
        "members": {"next": nodes + 1, "list": members},
    });
    node.call("penstock_member_create", &params).map(drop)
}

/// How the node's member stands; nobody, where it is not there yet.
pub fn standing(node: &mut dyn Node) -> Result<Standing, String> {
    let volumes = node.call("penstock_volume_list", &json!({}))?;
    let group = &volumes[0]["group"];
    let number = |field: &str| group[field].as_u64().unwrap_or(0);
    Ok(Standing { serves: group["serves"] == true, leads: group["part"] == "leader", last: number("last"), applied: number("applied") })
}

/// Waits until the member of place `at` leads and serves.
pub fn lead<N: Node>(nodes: &mut [N], at: usize) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    let params = json!({"volume_id": volume::volume_id(VOLUME), "to": node_id(at)});
    loop {
        if standing(&mut nodes[at])?.serves {
            return Ok(());
        }
        for from in (0..nodes.len()).filter(|from| *from != at) {
            if standing(&mut nodes[from])?.serves {
                // Refused while leaders change: asked again.
                let _ = nodes[from].call("penstock_group_transfer", &params);
            }
        }
        if Instant::now() >= deadline {
            return Err(format!("node {} does not come to lead: {:?}", at + 1, standings(nodes)));
        }
        std::thread::sleep(PAUSE);
    }
}

fn standings<N: Node>(nodes: &mut [N]) -> Vec<Result<Standing, String>> {
    nodes.iter_mut().map(|node| standing(node)).collect()
}

/// Waits until all have carried out the same.
pub fn await_equal<N: Node>(nodes: &mut [N]) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        // A node that is only starting refuses the question.
        let found = standings(nodes);
        let newest = found.first().and_then(|one| Some(one.as_ref().ok()?.last));
        if found.iter().all(|one| one.as_ref().is_ok_and(|one| one.applied == one.last && Some(one.last) == newest)) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("the replicas do not become equal: {found:?}"));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Drains a node's drive wholly.
pub fn drain(node: &mut dyn Node, at: usize) -> Result<(), String> {
    volume::drain(node, at as u64)
}

/// Opens the volume for the node's own process.
pub fn local_bdev(node: &mut dyn Node) -> Result<String, String> {
    volume::local_bdev(node, VOLUME)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as a member that stands so; a transfer makes it the leader's past.
    struct Told {
        standing: Value,
        transfers: usize,
    }

    impl Node for Told {
        fn call(&mut self, method: &str, _params: &Value) -> Result<Value, String> {
            if method == "penstock_group_transfer" {
                self.transfers += 1;
                return Err("-33008: asked again".to_owned());
            }
            Ok(json!([{"name": "bench", "group": self.standing}]))
        }
    }

    fn told(serves: bool, last: u64, applied: u64) -> Told {
        let part = if serves { "leader" } else { "follower" };
        Told { standing: json!({"serves": serves, "part": part, "last": last, "applied": applied}), transfers: 0 }
    }

    #[test]
    fn leader_that_is_in_its_place_is_left_there() {
        let mut nodes = [told(true, 9, 9), told(false, 9, 9)];
        lead(&mut nodes, 0).unwrap();
        assert_eq!((nodes[0].transfers, nodes[1].transfers), (0, 0));
    }

    #[test]
    fn members_are_equal_once_all_have_carried_out_the_newest_entry() {
        await_equal(&mut [told(true, 9, 9), told(false, 9, 9)]).unwrap();
        let standing = standing(&mut told(false, 9, 7)).unwrap();
        assert_eq!(standing, Standing { serves: false, leads: false, last: 9, applied: 7 });
    }

    #[test]
    fn volume_without_a_group_stands_nowhere() {
        struct Bare;
        impl Node for Bare {
            fn call(&mut self, _method: &str, _params: &Value) -> Result<Value, String> {
                Ok(json!([]))
            }
        }
        assert_eq!(standing(&mut Bare).unwrap(), Standing::default());
    }
}
