//! kill -9 of either process at every call there is, before and after its effect; then desired and observed agree.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_api::http::{DriveView, Progress, VolumeView};
use penstock_api::{ByteSize, VolumeId};
use serde_json::{Value, json};

use crate::api::{add_drive, create};
use crate::fake::Stage;
use crate::harness::{House, eventually};

/// The calls that change something, in the order in which a volume's life makes them.
const CHANGES: [&str; 8] = [
    "penstock_node_claim",
    "penstock_drive_add",
    "penstock_volume_create",
    "penstock_export_add",
    "penstock_volume_resize",
    "penstock_export_remove",
    "penstock_volume_delete",
    "penstock_drive_remove",
];

const DOOR: &str = r#"{"door": {"kind": "nvmf", "address": "127.0.0.1", "port": 4420}}"#;

/// What a person would do, each wish sent again until it is answered: the API died, the person did not.
fn live(house: &House, restart: &impl Fn()) {
    let insist = |method: &str, path: &str, body: &str, fine: &[u16]| {
        for _ in 0..5 {
            match house.try_request(method, path, body.as_bytes()) {
                Some(answer) if fine.contains(&answer.status) => return answer.status,
                Some(answer) => panic!("{method} {path}: {}: {}", answer.status, answer.text()),
                None => restart(),
            }
        }
        panic!("{method} {path}: five deaths");
    };
    // 409: what was asked before the death had been taken. 202: the node is not back yet.
    insist("POST", "/v1/pool/drives", r#"{"spec": "file:/d0?size=1GiB"}"#, &[201, 202, 409]);
    house.settle();
    insist("POST", "/v1/volumes", r#"{"name": "db", "size": "8MiB"}"#, &[201, 202, 409]);
    house.settle();
    insist("POST", "/v1/volumes/db/export", DOOR, &[200, 202]);
    house.settle();
    insist("PATCH", "/v1/volumes/db", r#"{"size": "16MiB"}"#, &[200, 202]);
    house.settle();
    agreed(house);
    let volume: VolumeView = house.get("/v1/volumes/db");
    assert_eq!((volume.observed.unwrap().size_bytes, volume.exports.len()), (ByteSize::mib(16), 1));
    insist("POST", "/v1/volumes/db/unexport", DOOR, &[204, 202, 404]);
    house.settle();
    insist("DELETE", "/v1/volumes/db", "", &[204, 202, 404]);
    house.settle();
    let drives: Vec<DriveView> = house.get("/v1/pool/drives");
    if let Some(drive) = drives.first() {
        insist("DELETE", &format!("/v1/pool/drives/{}", drive.drive_id), "", &[204, 202, 404]);
    }
    house.settle();
    agreed(house);
    assert!(house.node.inner.lock().unwrap().open.is_empty());
}

/// Compares both sides directly, not through what control believes.
fn agreed(house: &House) {
    let volumes: Vec<VolumeView> = house.get("/v1/volumes");
    let drives: Vec<DriveView> = house.get("/v1/pool/drives");
    let inner = house.node.inner.lock().unwrap();
    let ours: BTreeMap<VolumeId, (ByteSize, usize)> =
        volumes.iter().map(|volume| (volume.volume_id, (volume.size, volume.exports.len()))).collect();
    let open = inner.open.values().map(|drive| &inner.media[&drive.spec.place()]);
    let theirs: BTreeMap<VolumeId, (ByteSize, usize)> = open
        .flat_map(|medium| medium.volumes.values())
        .map(|volume| (volume.volume_id, (volume.size_bytes, inner.exports.get(&volume.volume_id).map_or(0, Vec::len))))
        .collect();
    assert_eq!(ours, theirs);
    assert_eq!(drives.iter().map(|drive| drive.drive_id).collect::<Vec<_>>(), inner.open.keys().copied().collect::<Vec<_>>());
}

#[test]
fn control_killed_at_any_call_then_agrees_again() {
    for method in CHANGES {
        for stage in [Stage::Before, Stage::After] {
            let house = House::new();
            let armed = Arc::new(AtomicBool::new(true));
            let (control, fuse) = (Arc::clone(&house.control), Arc::clone(&armed));
            house.node.set_hook(move |called, at| {
                if called == method && at == stage && fuse.swap(false, Ordering::SeqCst) {
                    let mut control = control.lock().unwrap();
                    let child = control.as_mut().expect("it called, so it runs");
                    child.kill().unwrap();
                    child.wait().unwrap();
                }
            });
            live(&house, &|| {
                *house.control.lock().unwrap() = None;
                house.start_control(&[]);
            });
            assert!(!armed.load(Ordering::SeqCst), "{method} was never called");
        }
    }
}

#[test]
fn node_killed_at_any_call_then_agrees_again() {
    for method in CHANGES {
        for stage in [Stage::Before, Stage::After] {
            let house = House::new();
            let armed = Arc::new(AtomicBool::new(true));
            let (node, fuse) = (house.node.clone(), Arc::clone(&armed));
            house.node.set_hook(move |called, at| {
                if called == method && at == stage && fuse.swap(false, Ordering::SeqCst) {
                    node.kill();
                    node.run();
                }
            });
            live(&house, &|| panic!("control died of the node's death"));
            assert!(!armed.load(Ordering::SeqCst), "{method} was never called");
        }
    }
}

#[test]
fn refusal_that_comes_long_after_the_nodes_restart_is_no_answer_to_the_wish() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let armed = Arc::new(AtomicBool::new(true));
    let (node, fuse) = (house.node.clone(), Arc::clone(&armed));
    // The call is sent again to the process that comes next, which has no drive yet, and has it open when it says so.
    house.node.inner.lock().unwrap().late.insert("penstock_volume_create", std::time::Duration::from_millis(500));
    house.node.set_hook(move |called, at| {
        if called == "penstock_volume_create" && at == Stage::Before && fuse.swap(false, Ordering::SeqCst) {
            node.kill();
            node.run();
        }
    });
    // 202: the node was seen to be away.
    let answer = house.request("POST", "/v1/volumes", json!({"name": "db", "size": "8MiB"}));
    assert!(matches!(answer.status, 201 | 202), "{}", answer.text());
    eventually("it is made", || {
        let progress = house.get::<VolumeView>("/v1/volumes/db").progress;
        assert!(!matches!(progress, Progress::Refused { .. }), "{progress:?}");
        progress.is_settled().then_some(())
    });
    assert!(!armed.load(Ordering::SeqCst));
}

#[test]
fn both_killed_over_and_over_under_load_then_agree_again() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    add_drive(&house, "malloc:m0?size=1GiB");
    create(&house, "kept");
    house.node.inner.lock().unwrap().slow = std::time::Duration::from_millis(1);
    for round in 0..12 {
        std::thread::scope(|scope| {
            for client in 0..4 {
                let house = &house;
                scope.spawn(move || {
                    // Answers do not matter here, only that what they leave behind comes to agree.
                    let name = format!("v{client}-{}", round % 3);
                    let body = json!({"name": name, "size": "4MiB"}).to_string();
                    let _ = house.try_request("POST", "/v1/volumes", body.as_bytes());
                    let _ = house.try_request("POST", &format!("/v1/volumes/{name}/export"), br#"{"door": {"kind": "vhost"}}"#);
                    let _ = house.try_request("PATCH", &format!("/v1/volumes/{name}"), br#"{"size": "8MiB"}"#);
                    let _ = house.try_request("DELETE", &format!("/v1/volumes/{name}?force=true"), b"");
                });
            }
            // Spread over the clients' work, which takes some tens of milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(7 * (round % 6)));
            if round % 3 != 1 {
                house.kill_control();
            }
            if round % 3 != 0 {
                house.node.kill();
                house.node.run();
            }
        });
        if round % 3 != 1 {
            house.start_control(&[]);
        }
        house.settle();
        agreed(&house);
        let kept: VolumeView = house.get("/v1/volumes/kept");
        assert!(kept.progress.is_settled());
    }
    assert_eq!(house.request("DELETE", "/v1/volumes/kept", Value::Null).status, 204);
}
