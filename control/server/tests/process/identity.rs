//! State directories: one process each, copies noticed, and rebuilt from drives when lost.

use penstock_api::http::{DriveView, ImportReport, NodeView, VolumeView};
use penstock_api::rpc::ErrorCode;
use serde_json::{Value, json};

use crate::api::{add_drive, create};
use crate::harness::{House, eventually};

#[test]
fn control_leaves_cleanly_on_sigterm_and_takes_over_a_stale_socket() {
    let house = House::new();
    assert_eq!(house.stop_control(), Some(0), "{}", house.log());
    assert!(!house.path("control.sock").exists());
    house.start_control(&[]);
    house.kill_control();
    assert!(house.path("control.sock").exists(), "kill -9 leaves it");
    house.start_control(&[]);
}

#[test]
fn control_second_on_one_state_or_socket_refused() {
    let house = House::new();
    let second = house.command("state", &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(house.log().contains("one penstock-control runs per state directory"), "{}", house.log());
    let second = house.command("other-state", &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(house.log().contains("another process serves"), "{}", house.log());
    let wide = house.command("other-state", &["--listen", "0.0.0.0:7600"]).output().unwrap();
    assert_eq!(wide.status.code(), Some(2));
    assert!(house.log().contains("0.0.0.0 is not loopback"), "{}", house.log());
}

#[test]
fn control_copied_state_refused_until_it_is_said_to_be_restored() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let before = create(&house, "a").volume_id.0.parts();
    house.stop_control();
    std::fs::rename(house.path("state"), house.path("original")).unwrap();
    std::fs::create_dir(house.path("state")).unwrap();
    std::fs::copy(house.path("original/control.redb"), house.path("state/control.redb")).unwrap();
    let refused = house.command("state", &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(house.log().contains("--restored"), "{}", house.log());
    house.start_control(&["--restored"]);
    house.settle(); // it has looked at its node
    let after = create(&house, "b").volume_id.0.parts();
    assert!(after.incarnation > before.incarnation && after.cluster == before.cluster, "{before:?} {after:?}");
    house.kill_control();
    house.start_control(&[]); // from now on it is at home
}

#[test]
fn import_rebuilds_a_lost_state_from_the_drives() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    add_drive(&house, "file:/d1?size=1GiB");
    for name in ["a", "b", "c"] {
        create(&house, name);
    }
    assert_eq!(house.request("POST", "/v1/volumes/a/export", json!({"door": {"kind": "vhost"}})).status, 200);
    let before: Vec<VolumeView> = house.get("/v1/volumes");
    let node: NodeView = house.get("/v1/node");

    // Control's state is gone, the node runs on.
    house.kill_control();
    std::fs::remove_dir_all(house.path("state")).unwrap();
    house.start_control(&[]);
    let refused = house.request("POST", "/v1/pool/drives", json!({"spec": "file:/d9?size=1GiB"})).error();
    assert!(refused.code == ErrorCode::Conflict && refused.hint.unwrap().contains("pool import"));
    let report = house.request("POST", "/v1/pool/import", json!({}));
    assert_eq!(report.status, 200, "{}", report.text());
    let report: ImportReport = report.json();
    assert_eq!((report.drives.len(), report.volumes.len(), report.exports), (2, 3, 1));
    assert_eq!(Some(report.cluster_id), node.cluster_id);
    house.settle();
    assert_eq!(house.get::<Vec<VolumeView>>("/v1/volumes"), before);
    let again: ImportReport = house.request("POST", "/v1/pool/import", json!({})).json();
    assert_eq!((again.drives.len(), again.volumes.len(), again.known), (0, 0, 5));
    let fresh = create(&house, "d").volume_id.0.parts();
    assert!(before.iter().all(|volume| volume.volume_id.0.parts().incarnation < fresh.incarnation));
    assert_eq!(house.request("DELETE", "/v1/volumes/d", Value::Null).status, 204);

    // Control's state is gone, and the node has restarted with nothing open.
    house.kill_control();
    house.node.kill();
    std::fs::remove_dir_all(house.path("state")).unwrap();
    house.node.run();
    house.start_control(&[]);
    let report = house.request("POST", "/v1/pool/import", json!({"specs": ["file:/d0", "file:/d1"]}));
    assert_eq!(report.status, 200, "{}", report.text());
    let report: ImportReport = report.json();
    assert_eq!((report.drives.len(), report.volumes.len(), report.exports), (2, 3, 0), "doors were the process's");
    house.settle();
    let ids = |volumes: &[VolumeView]| {
        volumes.iter().map(|volume| (volume.volume_id, volume.size, volume.replicas[0].drive_id)).collect::<Vec<_>>()
    };
    assert_eq!(ids(&house.get::<Vec<VolumeView>>("/v1/volumes")), ids(&before));
    let error = house.request("POST", "/v1/pool/import", json!({"specs": ["file:/d7"]})).error();
    assert!(error.hint.unwrap().contains("pool add"));
}

#[test]
fn drive_detached_by_force_comes_back_by_import() {
    let house = House::new();
    let drive = add_drive(&house, "file:/d0?size=1GiB").drive_id;
    let volume = create(&house, "a");
    assert_eq!(house.request("DELETE", &format!("/v1/pool/drives/{drive}?force=true"), Value::Null).status, 204);
    assert!(house.get::<Vec<VolumeView>>("/v1/volumes").is_empty());
    let error = house.request("POST", "/v1/pool/drives", json!({"spec": "file:/d0?size=1GiB"})).error();
    assert!(error.hint.unwrap().contains("pool import"));
    let report: ImportReport = house.request("POST", "/v1/pool/import", json!({"specs": ["file:/d0"]})).json();
    assert_eq!(report.volumes.len(), 1);
    house.settle();
    assert_eq!(house.get::<VolumeView>("/v1/volumes/a").volume_id, volume.volume_id);
}

#[test]
fn drive_swapped_for_a_blank_one_is_not_formatted() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    create(&house, "a");
    house.node.kill();
    house.node.inner.lock().unwrap().media.clear();
    house.node.run();
    let drive = eventually("refused", || {
        let drives: Vec<DriveView> = house.get("/v1/pool/drives");
        (drives[0].progress.word() == "refused").then(|| drives[0].clone())
    });
    assert!(format!("{:?}", drive.progress).contains("is a blank drive: it is left alone"), "{drive:?}");
    assert!(house.node.inner.lock().unwrap().media.values().all(|medium| medium.label.is_none()));
}
