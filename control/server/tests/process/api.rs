//! What the API answers while all is well, and while the node refuses or is away.

use penstock_api::http::{DriveView, IdsView, NodeView, Progress, VolumeView};
use penstock_api::rpc::{ErrorCode, RpcError};
use penstock_api::{ByteSize, VolumeId};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fake::{Medium, Stage};
use crate::harness::{House, eventually};

pub fn add_drive(house: &House, spec: &str) -> DriveView {
    let answer = house.request("POST", "/v1/pool/drives", json!({"spec": spec, "volatile": spec.starts_with("malloc")}));
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()
}

pub fn create(house: &House, name: &str) -> VolumeView {
    let answer = house.request("POST", "/v1/volumes", json!({"name": name, "size": "64MiB"}));
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()
}

#[test]
fn volume_life_from_drive_to_removal() {
    let house = House::new();
    let drive = add_drive(&house, "file:/d0?size=1GiB");
    assert!(drive.progress.is_settled() && drive.observed.is_some(), "{drive:?}");

    let volume = create(&house, "db");
    assert_eq!((volume.size, volume.replicas.len(), volume.replicas[0].drive_id), (ByteSize::mib(64), 1, drive.drive_id));
    assert!(volume.progress.is_settled() && volume.observed.is_some());

    let door = json!({"kind": "nvmf", "address": "127.0.0.1", "port": 4420});
    let exported = house.request("POST", "/v1/volumes/db/export", json!({"door": door}));
    assert_eq!(exported.status, 200, "{}", exported.text());
    assert!(exported.json::<Value>()[0]["observed"]["nqn"].is_string());
    assert_eq!(house.request("POST", "/v1/volumes/db/export", json!({"door": door})).status, 200, "idempotent");

    let grown = house.request("PATCH", "/v1/volumes/db", json!({"size": "128MiB"}));
    assert_eq!(grown.status, 200, "{}", grown.text());
    assert_eq!(grown.json::<VolumeView>().observed.unwrap().size_bytes, ByteSize::mib(128));
    let shrink = house.request("PATCH", "/v1/volumes/db", json!({"size": "32MiB"})).error();
    assert!(shrink.hint.unwrap().contains("--allow-shrink"));

    let refused = house.request("DELETE", "/v1/volumes/db", Value::Null).error();
    assert!(refused.code == ErrorCode::Busy && refused.message.contains("exported"), "{refused:?}");
    let refused = house.request("DELETE", &format!("/v1/pool/drives/{}", drive.drive_id), Value::Null).error();
    assert_eq!(refused.code, ErrorCode::Busy);

    assert_eq!(house.request("POST", "/v1/volumes/db/unexport", json!({"door": door})).status, 204);
    assert_eq!(house.request("DELETE", "/v1/volumes/db", Value::Null).status, 204);
    assert_eq!(house.request("GET", "/v1/volumes/db", Value::Null).status, 404);
    assert_eq!(house.request("DELETE", &format!("/v1/pool/drives/{}", drive.drive_id), Value::Null).status, 204);
    assert!(house.get::<Vec<DriveView>>("/v1/pool/drives").is_empty());
    assert!(house.node.inner.lock().unwrap().open.is_empty());
}

#[test]
fn volume_of_a_taken_name_refused() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    create(&house, "db");
    let refused = house.request("POST", "/v1/volumes", json!({"name": "db", "size": "1MiB"})).error();
    assert_eq!(refused.code, ErrorCode::AlreadyExists);
}

#[test]
fn volume_that_the_node_refuses_leaves_no_trace() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let answer = house.request("POST", "/v1/volumes", json!({"name": "big", "size": "2000GiB"}));
    let error = answer.error();
    assert_eq!((answer.status, error.code, error.hint.as_deref()), (507, ErrorCode::Capacity, Some("ask for less")));
    house.settle();
    assert!(house.get::<Vec<VolumeView>>("/v1/volumes").is_empty());
    create(&house, "big");
    let answer = house.request("PATCH", "/v1/volumes/big", json!({"size": "2000GiB"}));
    assert_eq!(answer.error().code, ErrorCode::Capacity);
    house.settle();
    assert_eq!(house.get::<VolumeView>("/v1/volumes/big").size, ByteSize::mib(64));
}

#[test]
fn volume_in_use_kept_unless_forced() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let id = create(&house, "db").volume_id;
    let door = json!({"door": {"kind": "vhost"}});
    assert_eq!(house.request("POST", "/v1/volumes/db/export", door.clone()).status, 200);
    house.node.inner.lock().unwrap().connected.insert(id, vec!["vm".to_owned()]);
    let refused = house.request("POST", "/v1/volumes/db/unexport", door).error();
    assert_eq!((refused.code, refused.hint.as_deref()), (ErrorCode::Busy, Some("disconnect them")));
    house.settle();
    assert_eq!(house.get::<VolumeView>("/v1/volumes/db").exports.len(), 1, "the door is as it was");
    let refused = house.request("DELETE", "/v1/volumes/db", Value::Null).error();
    assert!(refused.message.contains("in use by 1 host"), "{refused:?}");
    assert_eq!(house.request("DELETE", "/v1/volumes/db?force=true", Value::Null).status, 204);
    assert!(house.node.inner.lock().unwrap().exports.is_empty());
}

#[test]
fn drive_that_is_not_blank_refused() {
    let house = House::new();
    {
        let mut inner = house.node.inner.lock().unwrap();
        inner.media.insert("block:/dev/sdx".to_owned(), Medium { foreign: Some("ext4 file system"), ..Medium::default() });
        inner.media.insert("block:/dev/sdy".to_owned(), Medium { no_barrier: true, ..Medium::default() });
    }
    let add = |body: Value| house.request("POST", "/v1/pool/drives", body);
    let error = add(json!({"spec": "block:/dev/sdx"})).error();
    assert!(error.code == ErrorCode::ForeignData && error.message.contains("ext4 file system at byte 1080"), "{error:?}");
    let error = add(json!({"spec": "block:/dev/sdy"})).error();
    assert!(error.hint.unwrap().contains("power_safe=true"));
    let error = add(json!({"spec": "malloc:m?size=1GiB"})).error();
    assert!(error.hint.unwrap().contains("--volatile"));
    assert!(house.get::<Vec<DriveView>>("/v1/pool/drives").is_empty());

    assert_eq!(add(json!({"spec": "block:/dev/sdx", "force": true})).status, 201);
    let error = add(json!({"spec": "block:/dev/sdx?stores=2"})).error();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    let error = add(json!({"spec": "disk:/dev/sdx"})).error();
    assert!(error.message.contains("not a kind of drive"), "{error:?}");
}

#[test]
fn node_away_wish_is_taken_and_done_later() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    house.node.kill();
    eventually("control sees it", || (!house.get::<NodeView>("/v1/node").reachable).then_some(()));
    let answer = house.request("POST", "/v1/volumes", json!({"name": "later", "size": "1MiB"}));
    assert_eq!(answer.status, 202, "{}", answer.text());
    assert_eq!(answer.json::<Value>()["progress"], json!({"phase": "pending", "reason": "the node is away"}));
    let error = house.request("POST", "/v1/pool/drives", json!({"spec": "file:/d1?size=1GiB"})).error();
    assert!(error.code == ErrorCode::NotReady && error.hint.unwrap().contains("penstockd"));
    house.node.run();
    house.settle();
    assert!(house.get::<VolumeView>("/v1/volumes/later").progress.is_settled());
}

#[test]
fn node_not_ready_is_asked_again() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let error = RpcError::new(ErrorCode::NotReady, "busy recovering");
    house.node.inner.lock().unwrap().refuse.insert("penstock_volume_create", (3, error));
    create(&house, "db");
    assert_eq!(house.node.inner.lock().unwrap().calls["penstock_volume_create"], 4);
}

#[test]
fn node_that_says_done_and_does_nothing_is_asked_again_but_not_all_the_time() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    create(&house, "db");
    let before = house.node.inner.lock().unwrap().calls["penstock_volume_list"];
    house.node.inner.lock().unwrap().pretend.insert("penstock_volume_delete", (3, json!({})));
    assert_eq!(house.request("DELETE", "/v1/volumes/db", Value::Null).status, 204);
    let inner = house.node.inner.lock().unwrap();
    assert_eq!(inner.calls["penstock_volume_delete"], 4);
    // 1.4 s of waiting in all, a look each 50 ms: some thirty. A loop without pause would make thousands.
    let looks = inner.calls["penstock_volume_list"] - before;
    assert!(looks < 500, "{looks} looks");
}

#[test]
fn refusal_of_an_old_wishs_step_says_nothing_about_the_new_wish() {
    let house = House::new();
    let drive = add_drive(&house, "file:/d0?size=1GiB").drive_id;
    house.settle();
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    house.node.set_hook(move |method, at| {
        if method == "penstock_drive_add" && at == Stage::Before {
            let _ = begun.send(());
            let _ = may_go.recv_timeout(std::time::Duration::from_secs(30));
        }
    });
    // The drive is gone and refused when it is opened again; while that call is under way somebody removes the drive.
    let error = RpcError::new(ErrorCode::Conflict, "another drive lies there");
    house.node.inner.lock().unwrap().refuse.insert("penstock_drive_add", (1, error));
    house.node.inner.lock().unwrap().open.clear();
    has_begun.recv_timeout(std::time::Duration::from_secs(30)).unwrap();
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| house.request("DELETE", &format!("/v1/pool/drives/{drive}"), Value::Null));
        eventually("the wish to be taken in", || {
            let drives: Vec<DriveView> = house.get("/v1/pool/drives");
            drives.iter().all(|drive| matches!(drive.progress, Progress::Removing { .. })).then_some(())
        });
        go.send(()).unwrap();
        let answer = removal.join().unwrap();
        assert_eq!(answer.status, 204, "{}", answer.text());
    });
}

#[test]
fn node_commands_reach_the_node() {
    let house = House::new();
    let drive = add_drive(&house, "file:/d0?size=1GiB").drive_id;
    let scrub = house.request("POST", &format!("/v1/pool/drives/{drive}/scrub"), json!({"action": "start"}));
    assert_eq!(scrub.json::<Value>()["running"], true);
    assert_eq!(house.request("POST", "/v1/drain", json!({})).json::<Value>()["ms"], 3);
    assert_eq!(house.request("POST", &format!("/v1/pool/drives/{drive}/clear-fence"), Value::Null).status, 204);
    let unknown = "0194a5c1-b2d3-8001-8000-000000000001";
    assert_eq!(house.request("POST", &format!("/v1/pool/drives/{unknown}/scrub"), json!({"action": "start"})).status, 404);
    let text = house.request("GET", "/metrics", Value::Null).text();
    for line in ["penstock_fake_calls_total 42", "penstock_control_node_reachable 1", "penstock_control_drives 1"] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let document = house.get::<Value>("/openapi.json");
    assert!(document["paths"]["/v1/volumes"]["post"].is_object());
}

#[test]
fn api_wrong_requests_get_errors_that_say_why() {
    let house = House::new();
    for (method, path, body, status, part) in [
        ("GET", "/nothing", "", 404, "there is no /nothing"),
        ("PUT", "/v1/volumes", "", 405, "takes no PUT"),
        ("POST", "/v1/volumes", "{", 400, "the body"),
        ("POST", "/v1/volumes", r#"{"name": "a/b", "size": 4096}"#, 400, "may not be in a name"),
        ("POST", "/v1/volumes", r#"{"name": "a", "size": "10 gigs"}"#, 400, "\\\"gigs\\\""),
        ("POST", "/v1/volumes", r#"{"name": "a", "size": 4096, "sise": 1}"#, 400, "sise"),
        ("POST", "/v1/volumes", r#"{"name": "a", "size": 4096}"#, 404, "the pool has no drive"),
        ("POST", "/v1/ids", r#"{"count": 0}"#, 400, "use 1 to"),
        ("DELETE", "/v1/pool/drives/xyz", "", 400, "the path"),
        ("DELETE", "/v1/volumes/x?farce=true", "", 400, "the query"),
        ("POST", "/v1/pool/import", "{}", 404, "none was named"),
    ] {
        let answer = house.try_request(method, path, body.as_bytes()).unwrap();
        assert_eq!(answer.status, status, "{method} {path} {body}: {}", answer.text());
        assert!(answer.text().contains(part), "{method} {path} {body}: {}", answer.text());
    }
    let long = vec![b' '; 100_000];
    assert!(house.try_request("POST", "/v1/volumes", &long).is_none_or(|answer| answer.status >= 400));
}

#[test]
fn api_random_bodies_never_end_the_process() {
    let house = House::new();
    add_drive(&house, "file:/d0?size=1GiB");
    let fragments = proptest::collection::vec(
        prop_oneof![
            Just("{".to_owned()),
            Just("}".to_owned()),
            Just("[".to_owned()),
            Just("\"name\":".to_owned()),
            Just("\"size\":".to_owned()),
            Just("\"door\":".to_owned()),
            Just("\"spec\":".to_owned()),
            Just("\"kind\":\"nvmf\"".to_owned()),
            Just(",".to_owned()),
            Just("1e999".to_owned()),
            Just("18446744073709551615".to_owned()),
            Just("null".to_owned()),
            "\\PC{0,8}",
        ],
        0..12,
    );
    let paths = ["/v1/volumes", "/v1/pool/drives", "/v1/volumes/db/export", "/v1/pool/import", "/v1/ids", "/v1/drain", "/%00/%ff"];
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) }, |(parts in fragments, at in 0usize..7)| {
        let answer = house.try_request("POST", paths[at], parts.concat().as_bytes()).expect("an answer");
        prop_assert!((200..600).contains(&answer.status));
    });
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) }, |(bytes: Vec<u8>)| {
        let mut stream = std::os::unix::net::UnixStream::connect(house.path("control.sock")).unwrap();
        // The server may hang up at once: that is an answer too.
        let _ = std::io::Write::write_all(&mut stream, &bytes);
    });
    assert_eq!(house.request("GET", "/healthz", Value::Null).text(), "ok\n");
}

#[test]
fn ids_are_distinct_across_calls_and_crashes() {
    let house = House::new();
    let mut all = std::collections::BTreeSet::new();
    for _ in 0..4 {
        for _ in 0..2 {
            let ids = house.request("POST", "/v1/ids", json!({"count": 700})).json::<IdsView>().ids;
            assert_eq!(ids.len(), 700);
            ids.into_iter().for_each(|id| assert!(all.insert(id), "{id} twice"));
        }
        house.kill_control();
        house.start_control(&[]);
    }
    assert!(all.iter().all(|id| VolumeId(*id).0.parts().node.get() == 1));
}
