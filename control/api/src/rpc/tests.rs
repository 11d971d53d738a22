//! What control and node say to each other, there and back, and what a hostile peer may say.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::id::Id;

#[test]
fn error_code_words_and_numbers_are_distinct_and_round_trip() {
    for (at, &code) in ErrorCode::ALL.iter().enumerate() {
        assert_eq!(code.code(), -33001 - at as i32);
        assert_eq!(ErrorCode::from_code(code.code()), Some(code));
        assert_eq!(serde_json::to_value(code).unwrap(), json!(code.word()));
    }
    assert_eq!(ErrorCode::from_code(-32601), None);
}

#[test]
fn request_without_params_carries_none() {
    let bytes = encode_request::<NodeGet>(7, &Empty {}).unwrap();
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(value, json!({"jsonrpc": "2.0", "id": 7, "method": "penstock_node_get"}));
    assert!(decode_params::<NodeGet>(None).is_ok());
}

/// No method of ours takes a list; one that did must not get past SPDK's limit.
enum Bulk {}
impl Method for Bulk {
    const NAME: &'static str = "penstock_bulk";
    const READ_ONLY: bool = true;
    type Params = Vec<VolumeDeleteParams>;
    type Result = Empty;
}

#[test]
fn request_too_long_for_spdk_refused() {
    let volume_id = crate::VolumeId(Id::from_u128(0x0194_a5c1_b2d3_8001_8000_0000_0000_0001).unwrap());
    let params = |_| VolumeDeleteParams { volume_id, force: false };
    assert!(encode_request::<Bulk>(1, &(0..100).map(params).collect()).is_ok());
    let error = encode_request::<Bulk>(1, &(0..1000).map(params).collect()).unwrap_err();
    assert_eq!(error.kind(), Some(ErrorCode::Invalid));
}

#[test]
fn params_with_unknown_field_refused() {
    let params = json!({"drive_id": "0194a5c1-b2d3-8001-8000-000000000001", "fource": true});
    let error = decode_params::<DriveRemove>(Some(params)).unwrap_err();
    assert!(error.message.contains("fource"), "{error}");
}

#[test]
fn door_with_unknown_field_refused() {
    assert!(serde_json::from_value::<Door>(json!({"kind": "vhost", "nam": "x"})).is_err());
    let door: Door = serde_json::from_value(json!({"kind": "nvmf", "address": "127.0.0.1", "port": 4420})).unwrap();
    assert_eq!(door.to_string(), "nvmf=127.0.0.1:4420");
    let escape = json!({"kind": "vhost", "name": "../../etc/x"});
    assert!(serde_json::from_value::<Door>(escape).is_err(), "a door's name becomes a path");
}

#[test]
fn probe_states_have_the_shape_of_the_contract() {
    let foreign = DriveContent::Foreign { what: "ext4 file system".to_owned(), at: crate::ByteSize(1080) };
    let value = serde_json::to_value(&foreign).unwrap();
    assert_eq!(value, json!({"state": "foreign", "what": "ext4 file system", "where": 1080}));
    assert_eq!(serde_json::from_value::<DriveContent>(value).unwrap(), foreign);
}

#[test]
fn answer_of_another_shape_is_an_error() {
    let answer = |result, error| Response { jsonrpc: "2.0".to_owned(), id: Some(1), result, error };
    let error = decode_response::<Drain>(answer(Some(json!([])), None)).unwrap_err();
    assert_eq!(error.kind(), Some(ErrorCode::Internal));
    assert!(decode_response::<Drain>(answer(None, None)).is_err());
    let busy = RpcError::new(ErrorCode::Busy, "in use").with_hint("unexport first");
    assert_eq!(decode_response::<Drain>(answer(None, Some(busy.clone()))).unwrap_err(), busy);
}

#[test]
fn method_names_are_distinct() {
    let mut names = METHODS.to_vec();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), METHODS.len());
    assert!(names.iter().all(|name| name.starts_with("penstock_")));
}

/// JSON of any shape, with keys that the params use.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("0194a5c1-b2d3-8001-8000-000000000001")),
    ];
    let key = prop_oneof![
        Just("spec".to_owned()),
        Just("drive_id".to_owned()),
        Just("volume_id".to_owned()),
        Just("door".to_owned()),
        Just("kind".to_owned()),
        Just("name".to_owned()),
        Just("size_bytes".to_owned()),
        Just("block_size".to_owned()),
        "[a-z]{1,6}",
    ];
    leaf.prop_recursive(3, 24, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map(key.clone(), inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn params_of_any_json_never_panic(value in any_json()) {
        let _ = decode_params::<DriveAdd>(Some(value.clone()));
        let _ = decode_params::<VolumeCreate>(Some(value.clone()));
        let _ = decode_params::<ExportAdd>(Some(value.clone()));
        let _ = decode_params::<Scrub>(Some(value.clone()));
        let _ = serde_json::from_value::<Response>(value.clone()).map(decode_response::<VolumeList>);
        let _ = serde_json::from_value::<MetricsInfo>(value);
    }
    #[test]
    fn frames_of_any_bytes_never_panic(bytes: Vec<u8>) {
        let _ = serde_json::from_slice::<Request>(&bytes);
        let _ = serde_json::from_slice::<Response>(&bytes);
        let _ = serde_json::from_slice::<crate::http::VolumeCreateBody>(&bytes);
    }
    #[test]
    fn door_json_round_trips(port: u16, address: std::net::IpAddr, name in proptest::option::of("[a-z]{1,8}")) {
        let nqn = name.as_ref().map(|name| format!("nqn.2026-11.io.penstock:{name}").parse().unwrap());
        let name = name.map(|name| name.parse::<crate::VolumeName>().unwrap());
        for door in [
            Door::Nvmf { address, port, nqn },
            Door::Vhost { name: name.clone() },
            Door::VfioUser { name: name.clone() },
        ] {
            let json = serde_json::to_string(&door).unwrap();
            prop_assert_eq!(serde_json::from_str::<Door>(&json).unwrap(), door);
        }
    }
}
