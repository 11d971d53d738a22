//! Snapshots: taken once, removed when it is wished, taken back where the node refuses.

use penstock_api::VolumeId;
use penstock_api::http::{NodeView, SnapshotView, VolumeView};
use penstock_api::rpc::{ErrorCode, RpcError};
use serde_json::{Value, json};
use std::time::Duration;

use crate::api::{add_drive, create};
use crate::cli::{refused, said};
use crate::harness::House;

fn take(house: &House, name: &str) -> SnapshotView {
    let answer = house.request("POST", "/v1/volumes/db/snapshots", json!({"name": name}));
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()
}

/// A house with a drive and volume db.
fn with_volume() -> (House, VolumeId) {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let id = create(&house, "db").volume_id;
    (house, id)
}

/// The same, and snapshot monday of it.
fn with_snapshot() -> (House, VolumeId, SnapshotView) {
    let (house, id) = with_volume();
    let monday = take(&house, "monday");
    (house, id, monday)
}

fn names(house: &House) -> Vec<String> {
    house.get::<Vec<SnapshotView>>("/v1/volumes/db/snapshots").iter().map(|known| known.name.to_string()).collect()
}

#[test]
fn snapshot_life_from_taken_to_removed() {
    let (house, _, monday) = with_snapshot();
    let tuesday = take(&house, "tuesday");
    assert!(monday.progress.is_settled() && tuesday.observed.is_some_and(|seen| seen.index == 1));
    let taken = house.request("POST", "/v1/volumes/db/snapshots", json!({"name": "monday"})).error();
    assert_eq!(taken.code, ErrorCode::AlreadyExists);
    let refused = house.request("DELETE", "/v1/volumes/db", Value::Null).error();
    assert!(refused.code == ErrorCode::Busy && refused.message.contains("2 in all"), "{refused:?}");
    assert_eq!(names(&house), ["monday", "tuesday"]);
    assert_eq!(house.request("DELETE", &format!("/v1/volumes/db/snapshots/{}", monday.snapshot_id), Value::Null).status, 204);
    assert_eq!(house.request("DELETE", "/v1/volumes/db/snapshots/tuesday", Value::Null).status, 204);
    assert_eq!(house.request("DELETE", "/v1/volumes/db/snapshots/tuesday", Value::Null).error().code, ErrorCode::NotFound);
    assert!(house.get::<VolumeView>("/v1/volumes/db").snapshots.is_empty());
    assert_eq!(house.request("DELETE", "/v1/volumes/db", Value::Null).status, 204);
}

#[test]
fn snapshot_that_the_node_refuses_leaves_no_trace() {
    let (house, _) = with_volume();
    let full = RpcError::new(ErrorCode::Capacity, "no space is left").with_hint("remove some");
    house.node.inner.lock().unwrap().refuse.insert("penstock_snapshot_create", (1, full));
    let error = house.request("POST", "/v1/volumes/db/snapshots", json!({"name": "monday"})).error();
    assert_eq!((error.code, error.hint.as_deref()), (ErrorCode::Capacity, Some("remove some")));
    house.settle();
    assert!(names(&house).is_empty());
    take(&house, "monday");
}

#[test]
fn snapshot_that_was_there_and_is_gone_is_reported_not_taken_again() {
    let (house, id, _) = with_snapshot();
    let forget = |inner: &mut crate::fake::Inner| {
        inner.media.values_mut().filter_map(|medium| medium.volumes.get_mut(&id)).for_each(|volume| volume.snapshots.clear());
    };
    forget(&mut house.node.inner.lock().unwrap());
    crate::harness::eventually("the loss to show", || {
        let shown = house.get::<Vec<SnapshotView>>("/v1/volumes/db/snapshots");
        (!shown[0].progress.is_settled() && shown[0].observed.is_none()).then_some(())
    });
    let calls = house.node.inner.lock().unwrap().calls["penstock_snapshot_create"];
    assert_eq!(calls, 1);
    assert_eq!(house.request("DELETE", "/v1/volumes/db/snapshots/monday", Value::Null).status, 204);
}

#[test]
fn clone_is_made_of_a_snapshot_which_stays_as_long_as_it_does() {
    let (house, ..) = with_snapshot();
    said(&house, "volume create test --from db@monday", "created volume test as db@monday of 64MiB");
    let shown: VolumeView = house.get("/v1/volumes/test");
    let origin = shown.origin.unwrap();
    assert_eq!((origin.volume.as_str(), origin.snapshot.as_str(), shown.replicas.len()), ("db", "monday", 1));
    assert_eq!(shown.observed.unwrap().origin.map(|seen| seen.snapshot_id), Some(origin.snapshot_id), "the node was told");
    said(&house, "volume show test", "clone of");
    said(&house, "snapshot ls db", "test");
    refused(&house, "volume create other --from db@tuesday", 1, &["volume db has no snapshot tuesday", "penstock snapshot ls db"]);
    refused(&house, "volume create other --from db@monday --size 4MiB", 1, &["would cut it off"]);
    refused(&house, "volume create other --from db", 2, &["VOLUME@SNAPSHOT"]);
    refused(
        &house,
        "snapshot rm db monday",
        1,
        &["test is a clone that stands on it", "hint: remove what stands on it first: penstock volume rm test"],
    );
    refused(&house, "volume rm db --force", 1, &["volume db cannot go: test is a clone"]);

    // A control that lost its state learns it from the node.
    house.kill_control();
    std::fs::remove_dir_all(house.path("state")).unwrap();
    house.start_control(&[]);
    said(&house, "pool import", "2 volumes");
    assert_eq!(house.get::<VolumeView>("/v1/volumes/test").origin, Some(origin));
    said(&house, "volume rm test", "removed");
    said(&house, "snapshot rm db monday", "removed");
    said(&house, "volume rm db", "removed");
}

#[test]
fn clone_that_is_asked_for_while_its_node_starts_is_made_once_control_has_looked_at_it() {
    let (house, ..) = with_snapshot();
    house.node.kill();
    crate::harness::eventually("control sees it", || {
        let nodes: Vec<NodeView> = house.get("/v1/nodes");
        nodes.iter().all(|node| !node.reachable).then_some(())
    });
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Control has the request by then; were it late, there would be nothing to wait for.
            std::thread::sleep(Duration::from_millis(300));
            house.node.run();
        });
        said(&house, "volume create test --from db@monday", "created volume test as db@monday of 64MiB");
    });
}
