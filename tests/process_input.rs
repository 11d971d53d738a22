//! Wrong things said to what administrators speak to: penstockd's JSON-RPC, control's HTTP API, config files and state. Each
//! gets an answer that says what is wrong, or its connection is closed; the processes live, and a volume serves on.
//! Front doors are in process_doors, drives in process_labels.

use penstock::process::dice;
use penstock::process::hostile::{Place, idlers, mutate, say, say_until};
use penstock::process::house::{House, LIMIT};
use penstock::process::http::exchange;
use penstock::process::program::{self, built, words};
use penstock::process::witness::Witness;
use penstock_api::rpc::{ErrorCode, METHODS, REQUEST_BYTES_MAX, RpcError};
use serde_json::{Value, json};
use std::time::Duration;

/// How long one that waits for more is listened to.
const PATIENCE: Duration = Duration::from_millis(60);

fn house_with_witness() -> (House, Witness) {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let witness = Witness::new(&mut house);
    (house, witness)
}

/// Calls any method with anything; an answer is due.
fn ask(house: &House, method: &str, params: &Value) -> Result<Value, RpcError> {
    let answer = penstock::guest::rpc::ask_json(&house.rpc_socket(), method, params.clone(), LIMIT)
        .unwrap_or_else(|e| panic!("{method} {params} is to be answered: {e}"));
    match answer.get("error") {
        Some(error) => Err(serde_json::from_value(error.clone()).unwrap_or_else(|e| panic!("{method} {params}: {e}: {error}"))),
        None => Ok(answer["result"].clone()),
    }
}

#[test]
fn json_rpc_garbage_is_answered_or_cut_off_and_the_node_serves_on() {
    let mut dice = dice("RPC garbage");
    let (mut house, mut witness) = house_with_witness();
    let socket = house.rpc_socket();
    let place = Place::Unix(&socket);
    let call =
        |method: &str, params: Value| json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string().into_bytes();
    let long = call("penstock_drive_remove", json!({"drive_id": "x".repeat(REQUEST_BYTES_MAX + 1000)}));
    // Whether the whole of it was heard, so that an error or a closed connection is due.
    for (deed, bytes, is_whole) in [
        ("binary garbage", (0u8..=255).cycle().take(3000).collect::<Vec<_>>(), true),
        ("zeros", vec![0; 1000], true),
        ("text", b"hello there\n\n".to_vec(), true),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), true),
        ("a number", b"42 ".to_vec(), true),
        ("a string", b"\"penstock_node_get\" ".to_vec(), true),
        ("null", b"null ".to_vec(), true),
        ("an empty object", b"{}".to_vec(), true),
        ("an empty batch", b"[]".to_vec(), true),
        ("a batch of nothing", b"[1,2,3]".to_vec(), true),
        ("brackets 4,000 deep", vec![b'['; 4000], false),
        ("objects 4,000 deep", b"{\"a\":".repeat(4000), false),
        ("a request above the limit", long, true),
        ("half a request", b"{\"jsonrpc\":\"2.0\",\"id\":1,\"meth".to_vec(), false),
        ("a string that does not end", b"{\"jsonrpc\":\"2.0\",\"method\":\"aaaaaaaa".to_vec(), false),
        ("invalid UTF-8", b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}".to_vec(), true),
        ("no method", b"{\"jsonrpc\":\"2.0\",\"id\":1}".to_vec(), true),
        ("a method that is a number", b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":7}".to_vec(), true),
        ("another version", b"{\"jsonrpc\":\"1.0\",\"id\":1,\"method\":\"penstock_node_get\"}".to_vec(), true),
        ("an id that is an object", b"{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"penstock_node_get\"}".to_vec(), true),
    ] {
        let is_error = |heard: &[u8]| String::from_utf8_lossy(heard).contains("\"error\"");
        let echo = say_until(place, &bytes, false, if is_whole { LIMIT } else { PATIENCE }, is_error).unwrap();
        assert!(echo.is_closed || is_error(&echo.heard) || !is_whole, "{deed} is to be refused: {}", String::from_utf8_lossy(&echo.heard));
        witness.look(&mut house, deed).unwrap();
    }
    let good = call("penstock_volume_resize", json!({"volume_id": "a255e9ab-bd48-8001-8000-000000000002", "size_bytes": 1 << 30}));
    for round in 0..150 {
        let bytes = mutate(&good, &mut dice);
        say(place, &bytes, true, PATIENCE).unwrap();
        if round % 10 == 9 {
            witness.look(&mut house, "requests with bytes changed").unwrap();
        }
    }
    let held = idlers(place, 48, b"{\"jsonrpc\":\"2.0\",\"id\":1,").unwrap();
    witness.look(&mut house, "48 clients in the middle of their requests").unwrap();
    drop(held);
    house.settle().unwrap();
}

#[test]
fn json_rpc_calls_with_wrong_params_are_refused_by_name() {
    let (mut house, mut witness) = house_with_witness();
    let unknown = ask(&house, "penstock_volume_explode", &json!({"a": 1})).unwrap_err();
    assert_eq!(unknown.code, -32601, "{unknown}");
    for method in METHODS {
        for params in [json!({"no_such_param": 1}), json!([1, 2]), json!("text"), json!(7), json!({"": {"": []}})] {
            let error = match ask(&house, method, &params) {
                Err(error) => error,
                Ok(result) => panic!("{method} took {params}: {result}"),
            };
            assert!(!error.message.is_empty(), "{method} {params}");
            if params.is_object() {
                assert_eq!(error.kind(), Some(ErrorCode::Invalid), "{method} {params}: {error}");
            }
        }
    }
    witness.look(&mut house, "wrong params").unwrap();

    let volume = house.volume("witness").unwrap();
    let drive = house.drives().unwrap()[0].clone();
    let node: Value = ask(&house, "penstock_node_get", &json!({})).unwrap();
    let other_id = "a255e9ab-bd48-8001-8000-0000000fffff";
    let create = |change: Value| {
        let mut params = json!({
            "volume_id": other_id, "segment_id": "a255e9ab-bd48-8001-8000-0000000ffffe", "replica_id": "a255e9ab-bd48-8001-8000-0000000ffffd",
            "name": "other", "size_bytes": 4096, "block_size": 4096, "drive_id": drive.drive_id,
        });
        change.as_object().unwrap().iter().for_each(|(key, value)| params[key] = value.clone());
        params
    };
    let add = |spec: &str, change: Value| {
        let mut params = json!({"spec": spec, "drive_id": other_id, "cluster_id": node["cluster_id"], "node_id": node["node_id"]});
        change.as_object().unwrap().iter().for_each(|(key, value)| params[key] = value.clone());
        params
    };
    let export = |door: Value| json!({"volume_id": volume.volume_id, "door": door});
    let missing = house.path("no/such/dir/x.img").display().to_string();
    let mut wrong = Vec::new();
    // Method, params, the code, and a word that the message has to hold.
    use ErrorCode::{Conflict, Invalid, NotFound};
    for (method, params, code, word) in [
        ("penstock_volume_create", create(json!({"name": "x".repeat(300)})), Invalid, "name"),
        ("penstock_volume_create", create(json!({"name": "../../etc"})), Invalid, "name"),
        ("penstock_volume_create", create(json!({"name": ""})), Invalid, "name"),
        ("penstock_volume_create", create(json!({"name": 7})), Invalid, "name"),
        ("penstock_volume_create", create(json!({"block_size": 513})), Invalid, "513"),
        ("penstock_volume_create", create(json!({"size_bytes": 0})), Invalid, "size"),
        ("penstock_volume_create", create(json!({"size_bytes": 4097})), Invalid, "4097"),
        ("penstock_volume_create", create(json!({"size_bytes": -1})), Invalid, "-1"),
        ("penstock_volume_create", create(json!({"size_bytes": 1e300})), Invalid, "1e+300"),
        ("penstock_volume_create", create(json!({"volume_id": "not an id"})), Invalid, "id"),
        ("penstock_volume_create", create(json!({"volume_id": "00000000-0000-4000-8000-000000000000"})), Invalid, "id"),
        ("penstock_volume_create", create(json!({"drive_id": other_id})), NotFound, other_id),
        ("penstock_volume_resize", json!({"volume_id": other_id, "size_bytes": 8192}), NotFound, other_id),
        ("penstock_volume_resize", json!({"volume_id": volume.volume_id, "size_bytes": 4096}), Invalid, "cut off"),
        ("penstock_volume_resize", json!({"volume_id": volume.volume_id, "size_bytes": 5000}), Invalid, "5000"),
        ("penstock_drive_remove", json!({"drive_id": 12}), Invalid, "drive_id"),
        ("penstock_drive_add", add("floppy:a", json!({})), Invalid, "floppy"),
        ("penstock_drive_add", add("file:relative.img?size=64MiB", json!({})), Invalid, "relative"),
        ("penstock_drive_add", add(&format!("file:{missing}?size=64MiB"), json!({})), Invalid, "no/such/dir"),
        ("penstock_drive_add", add(&format!("file:{missing}"), json!({})), Invalid, "no/such/dir"),
        ("penstock_drive_add", add("block:/dev/null", json!({})), Invalid, "/dev/null"),
        ("penstock_drive_add", add(&format!("file:{}?size=1MiB", house.path("tiny.img").display()), json!({})), Invalid, "at least"),
        (
            "penstock_drive_add",
            add(&format!("file:{}?size=64MiB", house.path("cut.img").display()), json!({"stores": 60000})),
            Invalid,
            "60000",
        ),
        (
            "penstock_drive_add",
            add(&format!("file:{}?size=64MiB", house.path("log.img").display()), json!({"oplog_bytes": 1})),
            Invalid,
            "oplog",
        ),
        ("penstock_drive_add", add(&drive.spec.to_string(), json!({})), Conflict, "in use"),
        ("penstock_drive_add", add("file:/x?size=64MiB", json!({"cluster_id": other_id})), Conflict, "cluster"),
        ("penstock_drive_clear_fence", json!({"drive_id": other_id}), NotFound, other_id),
        ("penstock_scrub", json!({"drive_id": other_id, "action": "start"}), NotFound, other_id),
        ("penstock_scrub", json!({"drive_id": drive.drive_id, "action": "explode"}), Invalid, "explode"),
        ("penstock_export_add", export(json!({"kind": "telnet"})), Invalid, "telnet"),
        ("penstock_export_add", export(json!({"kind": "nvmf", "address": "nowhere", "port": 1})), Invalid, "address"),
        ("penstock_export_add", export(json!({"kind": "nvmf", "address": "127.0.0.1", "port": 70000})), Invalid, "70000"),
        ("penstock_export_add", export(json!({"kind": "nvmf", "address": "127.0.0.1", "port": 4421, "nqn": "x"})), Invalid, "nqn"),
        ("penstock_export_add", export(json!({"kind": "vhost", "name": "../../../tmp/x"})), Invalid, "name"),
        ("penstock_export_add", json!({"volume_id": other_id, "door": {"kind": "vhost"}}), NotFound, other_id),
    ] {
        match ask(&house, method, &params) {
            Ok(result) => wrong.push(format!("{method} took {params}: {result}")),
            Err(error) if error.kind() != Some(code) => wrong.push(format!("{method} {params}: not {code}: {error}")),
            Err(error) if !error.to_string().contains(word) => wrong.push(format!("{method} {params}: \"{word}\" is not in: {error}")),
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let made = ["tiny.img", "cut.img", "log.img"].map(|name| house.path(name).exists());
    assert_eq!(made, [false; 3], "a drive that is refused leaves no file behind");
    // An address that is not this machine's: whatever the code, it has to be said which.
    let elsewhere = json!({"kind": "nvmf", "address": "192.0.2.1", "port": 4421, "nqn": "nqn.2026-11.io.penstock:elsewhere"});
    let error = ask(&house, "penstock_export_add", &export(elsewhere)).unwrap_err();
    assert!(error.message.contains("192.0.2.1"), "{error}");
    // A second door under the name that the first one has.
    let again = json!({"kind": "nvmf", "address": "127.0.0.1", "port": 4421});
    let error = ask(&house, "penstock_export_add", &export(again)).unwrap_err();
    assert_eq!(error.kind(), Some(Conflict), "{error}");
    witness.look(&mut house, "params that cannot be").unwrap();
    house.settle().unwrap();
    assert_eq!(house.volumes().unwrap().len(), 1);
    assert_eq!(house.drives().unwrap().len(), 1);
}

#[test]
fn http_that_is_wrong_gets_a_status_and_control_serves_on() {
    let mut dice = dice("HTTP garbage");
    let (mut house, mut witness) = house_with_witness();
    let socket = house.api_socket();
    let long = "x".repeat(200_000);
    let mut wrong = Vec::new();
    for (method, path, body, status, word) in [
        ("GET", "/", "", 404, ""),
        ("GET", "/v1", "", 404, ""),
        ("GET", "/v1/volumes/absent", "", 404, "absent"),
        ("GET", "/v1/volumes/..%2f..%2fetc%2fpasswd", "", 404, ""),
        ("GET", "/v1/volumes/%ff%fe", "", 400, ""),
        ("GET", "/v1/pool/drives/not-an-id", "", 405, ""),
        ("DELETE", "/v1/pool/drives/not-an-id", "", 400, "path"),
        ("DELETE", "/v1/volumes/witness?force=perhaps", "", 400, "force"),
        ("DELETE", "/v1/volumes/witness?frce=true", "", 400, "frce"),
        ("BREW", "/v1/volumes", "", 405, ""),
        ("DELETE", "/v1/volumes", "", 405, ""),
        ("POST", "/v1/volumes", "", 400, ""),
        ("POST", "/v1/volumes", "{", 400, ""),
        ("POST", "/v1/volumes", "[]", 400, ""),
        ("POST", "/v1/volumes", "{\"name\": \"a\"}", 400, "size"),
        ("POST", "/v1/volumes", "{\"name\": \"a\", \"size\": \"ten\"}", 400, "ten"),
        ("POST", "/v1/volumes", "{\"name\": \"a\", \"size\": \"4097\"}", 400, "4097"),
        ("POST", "/v1/volumes", "{\"name\": \"a/b\", \"size\": \"1MiB\"}", 400, "name"),
        ("POST", "/v1/volumes", "{\"name\": \"a\", \"size\": \"1MiB\", \"colour\": 1}", 400, "colour"),
        ("POST", "/v1/volumes", "{\"name\": \"a\", \"size\": \"900EiB\"}", 400, "900EiB"),
        ("POST", "/v1/volumes", &format!("{{\"name\": \"{long}\"}}"), 400, "65536"),
        ("POST", "/v1/ids", "{\"count\": 0}", 400, "count"),
        ("POST", "/v1/ids", "{\"count\": 1000000000}", 400, "count"),
        ("POST", "/v1/volumes/witness/export", "{\"door\": {\"kind\": \"telnet\"}}", 400, "telnet"),
        ("PATCH", "/v1/volumes/witness", "{\"size\": \"4KiB\"}", 400, "smaller"),
        ("POST", "/v1/pool/drives", "{\"spec\": \"floppy:a\"}", 400, "floppy"),
    ] {
        let answer = house.http(method, path, body.as_bytes()).unwrap();
        let shown: String = body.chars().take(60).collect();
        let error = answer.json().unwrap_or_default();
        let is_clear = error["code"].is_string() && error["message"].as_str().is_some_and(|message| message.contains(word));
        if answer.status != status || !is_clear {
            wrong.push(format!("{method} {path} {shown}: {}, not {status} with \"{word}\": {}", answer.status, answer.text()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    witness.look(&mut house, "wrong requests").unwrap();
    let place = Place::Unix(&socket);
    let head = format!("GET /v1/volumes HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    for (deed, bytes) in [
        ("binary garbage", (0u8..=255).cycle().take(3000).collect::<Vec<_>>()),
        ("JSON-RPC", b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"penstock_node_get\"}\r\n\r\n".to_vec()),
        ("a head of 1 MiB", head.into_bytes()),
        ("10,000 header fields", [b"GET / HTTP/1.1\r\n".to_vec(), b"a: b\r\n".repeat(10_000), b"\r\n".to_vec()].concat()),
        ("two lengths", b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 5\r\n\r\n{}".to_vec()),
        ("a negative length", b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: -2\r\n\r\n{}".to_vec()),
        ("a broken chunk", b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec()),
        ("HTTP/9", b"GET / HTTP/9.9\r\n\r\n".to_vec()),
    ] {
        if let Some(answer) = exchange(&socket, &bytes, LIMIT).unwrap() {
            assert!((400..600).contains(&answer.status), "{deed}: {}", answer.status);
        }
        witness.look(&mut house, deed).unwrap();
    }
    let good = b"POST /v1/volumes HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 31\r\n\r\n{\"name\": \"a\", \"size\": \"-1MiB\"}\n";
    for _ in 0..100 {
        say(place, &mutate(good, &mut dice), true, PATIENCE).unwrap();
    }
    // Clients that never end their requests hold nobody else up.
    let held = idlers(place, 64, b"POST /v1/volumes HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{\"na").unwrap();
    witness.look(&mut house, "64 clients in the middle of their requests").unwrap();
    drop(held);
    house.settle().unwrap();
    assert_eq!(house.volumes().unwrap().len(), 1, "no wrong request made a volume");
}

#[test]
fn config_that_is_wrong_is_refused_with_file_line_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    let run = |arguments: &[String]| program::run(&built("penstockd").unwrap(), arguments, Duration::from_secs(30)).unwrap();
    for (text, line, word) in [
        ("cores = \"0\"\ncoers = \"1\"\n", 2, "coers"),
        ("\n\ncores = \"x\"\n", 3, "mask such as 0x3"),
        ("poll = \"lazy\"", 1, "adaptive"),
        ("no_huge = \"perhaps\"", 1, "boolean"),
        ("\nmem_mib = 100", 2, "448"),
        ("run_dir = \"run\"", 1, "absolute"),
        ("drives = [\n\"file:/a\",\n\"disk:/b\"]", 3, "file:/srv/d0.img"),
        ("[nvmf]\nlisten = [\"localhost\"]", 2, "127.0.0.1:4420"),
        ("run_dir = ", 1, ""),
        ("\u{0}\u{1}\u{2}", 1, ""),
        ("[[[[", 1, ""),
    ] {
        std::fs::write(&file, text).unwrap();
        let outcome = run(&["--config".into(), file.display().to_string()]);
        assert!(matches!(outcome.code, Some(1 | 2)), "{text:?}: {outcome:?}");
        let place = format!("{}:{line}", file.display());
        assert!(outcome.err.contains(&place) && outcome.err.contains(word), "{text:?}: {place} and {word} are to be in:\n{}", outcome.err);
    }
    std::fs::write(&file, [0xff, 0xfe, 0x00]).unwrap();
    let outcome = run(&["--config".into(), file.display().to_string()]);
    assert!(matches!(outcome.code, Some(1 | 2)) && outcome.err.contains("p.toml"), "{outcome:?}");
    let outcome = run(&["--config".into(), dir.path().join("absent.toml").display().to_string()]);
    assert!(matches!(outcome.code, Some(1 | 2)) && outcome.err.contains("absent.toml"), "{outcome:?}");

    // State that penstockd wrote itself, damaged: refused, not forgotten.
    let root = dir.path().display().to_string();
    std::fs::create_dir(dir.path().join("state")).unwrap();
    std::fs::write(dir.path().join("state/node.toml"), "fences = 3").unwrap();
    let outcome = run(&words(&format!("--no-huge --run-dir {root}/run --state-dir {root}/state --poll adaptive")));
    assert!(matches!(outcome.code, Some(1 | 2)) && outcome.err.contains("node.toml"), "{outcome:?}");

    // penstock-control's flags and its store.
    let control = |arguments: &str| program::run(&built("penstock-control").unwrap(), &words(arguments), Duration::from_secs(30)).unwrap();
    for (arguments, word) in [
        (format!("--state-dir {root}/c --listen 0.0.0.0:7600"), "not loopback"),
        (format!("--state-dir {root}/c --listen unix:"), "path is missing"),
        (format!("--state-dir {root}/c --period-ms 1"), "period-ms"),
        ("--no-such-flag".to_owned(), "no-such-flag"),
    ] {
        let outcome = control(&arguments);
        assert!(outcome.code == Some(2) && outcome.err.contains(word), "{arguments}: {outcome:?}");
    }
    std::fs::write(dir.path().join("a-file"), "").unwrap();
    let outcome = control(&format!("--state-dir {root}/a-file/c --listen unix:{root}/c.sock"));
    assert!(outcome.code == Some(1) && outcome.err.contains("a-file"), "{outcome:?}");
    let outcome = program::run(&built("penstock").unwrap(), &words("--api ftp:x volume ls"), Duration::from_secs(30)).unwrap();
    assert!(outcome.code == Some(2) && outcome.err.contains("unix:"), "{outcome:?}");
}

#[test]
fn control_store_of_garbage_is_refused_by_name_and_left_as_it_is() {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "64MiB", "--oplog 8MiB");
    assert_eq!(house.stop_control().unwrap().code(), Some(0));
    let store = std::fs::read_dir(house.path("control")).unwrap();
    let store = store.map(|entry| entry.unwrap().path()).find(|path| path.metadata().unwrap().len() > 4096).expect("control keeps a store");
    let garbage: Vec<u8> = (0u8..=250).cycle().take(1 << 20).collect();
    std::fs::write(&store, &garbage).unwrap();
    let root = house.path("").display().to_string();
    let flags = format!("--state-dir {root}control --node-socket {root}run/penstockd.sock --listen unix:{root}c2.sock");
    let outcome = program::run(&built("penstock-control").unwrap(), &words(&flags), Duration::from_secs(30)).unwrap();
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.err.contains(&store.display().to_string()), "{}", outcome.err);
    assert_eq!(std::fs::read(&store).unwrap(), garbage);
}
