//! Several nodes under one control: volumes with several replicas, and nodes that are away while the others go on.

use penstock_api::ByteSize;
use penstock_api::http::{DriveView, NodeView, RecoveryView, ReplicaView, VolumeView};
use penstock_api::rpc::{Door, ErrorCode, GroupPart};
use serde_json::{Value, json};

use crate::cli::{refused, said, say};
use crate::harness::{House, eventually};

fn with_drives() -> House {
    let house = House::of_three();
    for n in 1..=3 {
        let answer = house.request("POST", "/v1/pool/drives", json!({"spec": "file:/d0?size=1GiB", "node": format!("n{n}")}));
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_eq!(answer.json::<DriveView>().node, format!("n{n}"));
    }
    house
}

fn create(house: &House, name: &str) -> VolumeView {
    let answer = house.request("POST", "/v1/volumes", json!({"name": name, "size": "64MiB", "replicas": 3}));
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()
}

fn away(house: &House, n: usize) {
    house.node(n).kill();
    let path = format!("/v1/nodes/n{n}");
    eventually("control sees it", || (!house.get::<NodeView>(&path).reachable).then_some(()));
}

fn leader(volume: &VolumeView) -> Option<&ReplicaView> {
    volume.replicas.iter().find(|replica| replica.reachable && replica.part == Some(GroupPart::Leader))
}

#[test]
fn volume_of_three_replicas_from_creation_to_removal() {
    let house = with_drives();
    let volume = create(&house, "db");
    assert!(volume.progress.is_settled(), "{volume:?}");
    let nodes: Vec<&str> = volume.replicas.iter().map(|replica| replica.node.as_str()).collect();
    assert_eq!(nodes, ["n1", "n2", "n3"]);
    for n in 1..=3 {
        let inner = house.node(n).inner.lock().unwrap();
        assert_eq!(inner.peers.len(), 2, "n{n} is told of the two others");
        let made = inner.media.values().flat_map(|medium| medium.volumes.values()).next().unwrap();
        let group = made.group.as_ref().unwrap();
        assert_eq!((group.member, group.members.list.len(), group.members.next), (n as u64, 3, 4));
    }

    let door = json!({"kind": "nvmf", "address": "0.0.0.0", "port": 0});
    let exported = house.request("POST", "/v1/volumes/db/export", json!({"door": door}));
    assert_eq!(exported.status, 200, "{}", exported.text());
    assert_eq!(exported.json::<Vec<Value>>().len(), 3);
    let mut ranges = Vec::new();
    for n in 1..=3u8 {
        let inner = house.node(n.into()).inner.lock().unwrap();
        let own = Door::Nvmf { address: [127, 0, 0, n].into(), port: 4420, nqn: None };
        assert!(inner.exports.values().flatten().any(|export| export.door == own), "{:?}", inner.exports);
        ranges.push(*inner.controllers.values().next().unwrap());
    }
    assert!(ranges.windows(2).all(|pair| pair[0].last < pair[1].first), "{ranges:?}");

    let grown = house.request("PATCH", "/v1/volumes/db", json!({"size": "128MiB"}));
    assert_eq!(grown.status, 200, "{}", grown.text());
    let grown: VolumeView = grown.json();
    assert!(grown.replicas.iter().all(|replica| replica.observed.as_ref().unwrap().size_bytes == ByteSize::mib(128)));

    let refused = house.request("DELETE", "/v1/volumes/db", Value::Null).error();
    assert!(refused.code == ErrorCode::Busy && refused.message.contains("exported"), "{refused:?}");
    assert_eq!(house.request("DELETE", "/v1/volumes/db?force=true", Value::Null).status, 204);
    for n in 1..=3 {
        assert!(house.node(n).inner.lock().unwrap().media.values().all(|medium| medium.volumes.is_empty()));
    }
}

#[test]
fn node_away_holds_up_nobody_else_and_comes_along_later() {
    let house = with_drives();
    create(&house, "early");
    away(&house, 3);
    // A third of the volume is pending; what the two others can do is done.
    let answer = house.request("POST", "/v1/volumes", json!({"name": "late", "size": "8MiB", "replicas": 3}));
    assert_eq!(answer.status, 202, "{}", answer.text());
    let late: VolumeView = answer.json();
    assert!(late.replicas[..2].iter().all(|replica| replica.progress.is_settled()), "{late:?}");
    assert!(format!("{:?}", late.progress).contains("its replica on n3: node n3 is away"), "{late:?}");
    let exported = house.request("POST", "/v1/volumes/late/export", json!({"door": {"kind": "nvmf", "address": "0.0.0.0", "port": 0}}));
    assert_eq!(exported.status, 202, "{}", exported.text());
    let open = |n: usize| house.node(n).inner.lock().unwrap().exports.values().map(Vec::len).sum::<usize>();
    assert_eq!((open(1), open(2), open(3)), (1, 1, 0));
    assert_eq!(house.request("PATCH", "/v1/volumes/early", json!({"size": "128MiB"})).status, 202);
    assert_eq!(house.request("DELETE", "/v1/volumes/late?force=true", Value::Null).status, 202);
    assert!(house.get::<VolumeView>("/v1/volumes/late").replicas.iter().map(|replica| replica.node.as_str()).eq(["n3"]));

    house.node(3).run();
    house.settle();
    assert_eq!(house.request("GET", "/v1/volumes/late", Value::Null).status, 404);
    assert!(house.get::<VolumeView>("/v1/volumes/early").progress.is_settled());
    assert_eq!(house.node(3).inner.lock().unwrap().peers.len(), 2, "it is told of the others again");
}

#[test]
fn leader_is_shown_moved_by_transfer_and_by_death() {
    let house = with_drives();
    create(&house, "db");
    let before: VolumeView = house.get("/v1/volumes/db");
    let from = leader(&before).unwrap().node.clone();
    let to = if from == "n2" { "n3" } else { "n2" };
    let answer = house.request("POST", "/v1/volumes/db/transfer", json!({"to": to}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let moved: VolumeView = answer.json();
    assert_eq!(leader(&moved).unwrap().node, to);
    assert!(leader(&moved).unwrap().term > leader(&before).unwrap().term);
    assert!(moved.replicas.iter().all(|replica| replica.lag == Some(replica.member)), "{moved:?}");
    assert_eq!(house.request("POST", "/v1/volumes/db/transfer", json!({"to": to})).status, 200, "it leads already");

    let error = house.request("POST", "/v1/volumes/db/transfer", json!({"to": "n9"})).error();
    assert!(error.hint.unwrap().contains("n1, n2, n3"));
    away(&house, to[1..].parse().unwrap());
    let error = house.request("POST", "/v1/volumes/db/transfer", json!({"to": to})).error();
    assert!(error.code == ErrorCode::NotReady && error.message.contains("is away"), "{error:?}");
    eventually("another leads", || leader(&house.get("/v1/volumes/db")).map(|leader| assert_ne!(leader.node, to)));
}

#[test]
fn recovery_by_force_is_answered_once_it_is_served_and_asked_again_has_the_same_receipt() {
    let house = with_drives();
    let volume = create(&house, "db");
    away(&house, 2);
    away(&house, 3);
    // As if the one that leads were a lost one, so that the one that is left does not take its place.
    let (lost, groups) = {
        let lost = house.node(2).inner.lock().unwrap();
        (lost.claim.unwrap().1, std::sync::Arc::clone(&lost.groups))
    };
    groups.lock().unwrap().insert(volume.volume_id, (lost, 1, volume.size));
    // A look may be under way that found it leading. Once the second from now asks, the first is what is shown.
    let looks = || house.node(1).inner.lock().unwrap().calls["penstock_volume_list"];
    let before = looks();
    eventually("nobody leads", || (looks() >= before + 2 && leader(&house.get("/v1/volumes/db")).is_none()).then_some(()));
    let recover = || {
        let answer = house.request("POST", "/v1/volumes/db/replicas/recover", json!({"force": true}));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json::<RecoveryView>().receipt
    };
    house.node(1).inner.lock().unwrap().standstill = 10;
    let receipt = recover();
    assert!(receipt.is_some());
    assert_eq!(recover(), receipt);
}

#[test]
fn placement_says_what_is_missing() {
    let house = House::of_three();
    let make = |replicas: u8| house.request("POST", "/v1/volumes", json!({"name": "db", "size": "8MiB", "replicas": replicas})).error();
    assert!(make(1).message.contains("the pool has no drive"));
    let error = house.request("POST", "/v1/pool/drives", json!({"spec": "file:/d0?size=1GiB"})).error();
    assert!(error.hint.unwrap().contains("n1, n2, n3"), "three nodes, none named");
    let add = json!({"spec": "file:/d0?size=1GiB", "node": "n2"});
    assert_eq!(house.request("POST", "/v1/pool/drives", add).status, 201);
    let error = make(3);
    assert!(error.code == ErrorCode::Capacity && error.message.contains("and 1 of the pool's nodes"), "{error:?}");
    assert!(make(2).hint.unwrap().contains("1, 3, 5"));
    assert!(house.request("GET", "/v1/node", Value::Null).error().hint.unwrap().contains("n1, n2, n3"));
    assert_eq!(house.request("GET", "/v1/nodes/n7", Value::Null).status, 404);
}

#[test]
fn import_brings_nodes_drives_and_all_replicas_back() {
    let house = with_drives();
    create(&house, "db");
    let door = json!({"door": {"kind": "nvmf", "address": "0.0.0.0", "port": 0}});
    assert_eq!(house.request("POST", "/v1/volumes/db/export", door).status, 200);
    house.settle();
    let before: VolumeView = house.get("/v1/volumes/db");
    let ids = |house: &House| house.get::<Vec<NodeView>>("/v1/nodes").iter().map(|node| node.node_id).collect::<Vec<_>>();
    let nodes = ids(&house);
    house.kill_control();
    std::fs::remove_dir_all(house.path("state")).unwrap();
    // One that answers late is there all the same.
    house.node(3).inner.lock().unwrap().slow = std::time::Duration::from_millis(50);
    house.start_control(&[]);
    let answer = house.request("POST", "/v1/pool/import", json!({}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let report: Value = answer.json();
    assert_eq!((report["drives"].as_array().unwrap().len(), report["exports"].as_u64()), (3, Some(3)), "{report}");
    house.settle();
    assert_eq!(ids(&house), nodes);
    let after: VolumeView = house.get("/v1/volumes/db");
    assert_eq!((after.replicas, after.exports), (before.replicas, before.exports));
}

#[test]
fn control_killed_between_the_replicas_makes_the_rest() {
    let house = with_drives();
    let control = std::sync::Arc::clone(&house.control);
    let armed = std::sync::atomic::AtomicBool::new(true);
    house.node(2).set_hook(move |method, _| {
        if method == "penstock_member_create" && armed.swap(false, std::sync::atomic::Ordering::SeqCst) {
            let mut control = control.lock().unwrap();
            let child = control.as_mut().expect("it called, so it runs");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    });
    let asked = house.try_request("POST", "/v1/volumes", br#"{"name": "db", "size": "8MiB", "replicas": 3}"#);
    assert!(asked.is_none(), "control died before it answered");
    *house.control.lock().unwrap() = None;
    house.start_control(&[]);
    house.settle();
    let volume: VolumeView = house.get("/v1/volumes/db");
    assert_eq!(volume.replicas.iter().filter(|replica| replica.progress.is_settled()).count(), 3);
}

#[test]
fn cli_shows_nodes_replicas_roles_and_lag() {
    let house = House::of_three();
    for n in 1..=3 {
        said(&house, &format!("pool add file:/d0?size=1GiB --node n{n}"), "added drive");
    }
    said(&house, "volume create db --size 64MiB --replicas 3", "created volume db of 64MiB on n1, n2, n3");
    let exported = said(&house, "volume export db --nvmf", "exported volume db on n2 over nvmf at nvmf=127.0.0.2:4420");
    assert_eq!(exported.lines().count(), 3, "{exported}");
    let list = said(&house, "replica ls", "leader");
    assert!(list.starts_with("VOLUME  MEMBER  NODE  ROLE") && list.matches("follower").count() == 2, "{list}");
    let shown = said(&house, "volume show db", "replicas       3");
    assert!(shown.contains("leader") && shown.contains("MEMBER  NODE") && shown.contains("n3: nvmf=127.0.0.3:4420"), "{shown}");
    let nodes = said(&house, "node ls", "2 of 2");
    assert_eq!(nodes.matches("there").count(), 3, "{nodes}");
    said(&house, "node show n2", "127.0.0.1:7702");
    said(&house, "volume transfer db --to n3", "volume db is led by n3 now");
    said(&house, "pool ls", "n3");
    for words in ["replica ls", "node ls", "node show n1", "volume show db", "volume ls", "pool ls", "volume transfer db --to n1"] {
        let out = said(&house, &format!("{words} -o json"), "");
        serde_json::from_str::<Value>(&out).unwrap_or_else(|error| panic!("{words}: {error}\n{out}"));
    }
    refused(&house, "node show", 1, &["there are 3 nodes", "hint: say which with --node: n1, n2, n3"]);
    refused(&house, "volume create x 8MiB --replicas 4", 1, &["a volume of 4 replicas is not offered", "hint: use 1, 3, 5"]);
    refused(&house, "pool rm file:/d0", 2, &["3 drives of the pool are at"]);
    refused(&house, "volume transfer db --to n5", 1, &["has no replica on a node n5", "it has replicas on n1, n2, n3"]);
    refused(&house, "volume export db --nvmf=127.0.0.1:4421", 1, &["3 nodes cannot all listen", "name one --node"]);

    away(&house, 2);
    let text = say(&house, "replica ls").out;
    let gone = text.lines().find(|line| line.contains(" n2 ")).unwrap();
    assert!(gone.contains("pending: node n2 is away") && !gone.contains("follower"), "{text}");
    house.node(2).run();
    house.settle();
    said(&house, "volume unexport db --nvmf", "closed nvmf=127.0.0.1:4420");
    said(&house, "volume rm db", "removed volume db");
}
