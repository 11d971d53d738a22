//! The daemon as a process: drives and volumes over JSON-RPC, kill -9, restart, foreign data, an orderly end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const CLUSTER: &str = "0194a5c1-b2d3-8000-8000-000000000000";
const NODE: &str = "0194a5c1-b2d3-8001-8000-000000000000";
const BOUND: Duration = Duration::from_secs(60);

fn id(sequence: u32) -> String {
    format!("0194a5c1-b2d3-8001-8000-{sequence:012}")
}

struct Daemon {
    child: Child,
    socket: std::path::PathBuf,
}

impl Daemon {
    fn start(dir: &Path) -> Self {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_penstockd"))
            .args(["--no-huge", "--poll", "adaptive", "--cores", "0", "--log-format", "json"])
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--state-dir")
            .arg(dir.join("state"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("penstockd starts");
        let daemon = Self { child, socket: dir.join("run/penstockd.sock") };
        let end = Instant::now() + BOUND;
        while daemon.call("penstock_node_get", json!({})).is_err() {
            assert!(Instant::now() < end, "penstockd does not come up; see {}/log", dir.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    /// One call; `Err` is the error object, or a text where there was no answer.
    fn call(&self, method: &str, params: Value) -> Result<Value, Value> {
        let wrap = |e: std::io::Error| json!(e.to_string());
        let mut stream = UnixStream::connect(&self.socket).map_err(wrap)?;
        stream.set_read_timeout(Some(BOUND)).map_err(wrap)?;
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        stream.write_all(request.to_string().as_bytes()).map_err(wrap)?;
        let mut text = Vec::new();
        let mut chunk = [0; 65536];
        loop {
            let len = stream.read(&mut chunk).map_err(wrap)?;
            text.extend_from_slice(&chunk[..len]);
            if let Ok(mut answer) = serde_json::from_slice::<Value>(&text) {
                return match answer.get("error") {
                    Some(error) => Err(error.clone()),
                    None => Ok(answer["result"].take()),
                };
            }
            if len == 0 {
                return Err(json!("the connection closed"));
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("it is ours");
    }

    fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
        let end = Instant::now() + BOUND;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < end, "penstockd does not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn code(result: Result<Value, Value>) -> i64 {
    let error = result.expect_err("an error");
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
    error["code"].as_i64().expect("a code")
}

/// Calls until the answer satisfies `good`, within the bound.
fn until(daemon: &Daemon, method: &str, good: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + BOUND;
    loop {
        let answer = daemon.call(method, json!({})).expect("an answer");
        if good(&answer) {
            return answer;
        }
        assert!(Instant::now() < end, "{method} still says {answer}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn daemon_killed_comes_back_with_its_drives_and_volumes() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("d0.img");
    let spec = format!("file:{}?size=256MiB", image.display());
    let add = |force: bool| json!({"spec": spec, "drive_id": id(1), "cluster_id": CLUSTER, "node_id": NODE, "force": force});
    let volume = json!({"volume_id": id(2), "segment_id": id(3), "replica_id": id(4), "name": "v0", "size_bytes": 16 << 20,
        "block_size": 512, "drive_id": id(1)});

    let daemon = Daemon::start(dir.path());
    assert_eq!(code(daemon.call("penstock_volume_create", volume.clone())), -33001, "no drive yet");
    std::fs::write(&image, vec![7; 256 << 20]).expect("a file of data");
    assert_eq!(code(daemon.call("penstock_drive_add", add(false))), -33004, "foreign data is refused");
    assert_eq!(std::fs::read(&image).expect("readable")[..4096], [7; 4096], "and untouched");
    let drive = daemon.call("penstock_drive_add", add(true)).expect("forced");
    assert_eq!(drive["state"], "serving");
    assert_eq!(daemon.call("penstock_drive_add", add(false)).expect("idempotent")["incarnation"], drive["incarnation"]);

    daemon.call("penstock_volume_create", volume.clone()).expect("created");
    daemon.call("penstock_volume_create", volume.clone()).expect("idempotent");
    let mut other = volume.clone();
    other["size_bytes"] = json!(32 << 20);
    assert_eq!(code(daemon.call("penstock_volume_create", other)), -33009, "the same id with another size");
    let resize = |size: u64, shrink: bool| json!({"volume_id": id(2), "size_bytes": size, "allow_shrink": shrink});
    daemon.call("penstock_volume_resize", resize(48 << 20, false)).expect("grows");
    assert_eq!(code(daemon.call("penstock_volume_resize", resize(16 << 20, false))), -33007, "shrinks only when told");
    let door = json!({"volume_id": id(2), "door": {"kind": "vhost"}});
    let export = daemon.call("penstock_export_add", door.clone()).expect("a door");
    assert!(Path::new(export["address"].as_str().expect("a path")).exists());
    assert_eq!(code(daemon.call("penstock_volume_delete", json!({"volume_id": id(2)}))), -33003, "it is exported");
    assert_eq!(code(daemon.call("penstock_drive_remove", json!({"drive_id": id(1)}))), -33003, "a volume lives on it");
    daemon.kill();

    let daemon = Daemon::start(dir.path());
    let open = |list: &Value| list[0]["exports"][0]["address"].as_str().is_some_and(|a| !a.is_empty());
    let volumes = until(&daemon, "penstock_volume_list", open);
    assert_eq!((&volumes[0]["name"], &volumes[0]["size_bytes"]), (&json!("v0"), &json!(48 << 20)));
    assert_eq!(volumes[0]["exports"][0]["door"], json!({"kind": "vhost"}));
    daemon.call("penstock_export_remove", door).expect("closed");
    daemon.call("penstock_volume_delete", json!({"volume_id": id(2)})).expect("deleted");
    daemon.call("penstock_drain", json!({})).expect("drained");
    daemon.terminate();

    let daemon = Daemon::start(dir.path());
    let drives = until(&daemon, "penstock_drive_list", |list| list[0]["state"] == "serving");
    assert_eq!(drives[0]["stores"][0]["recovery"]["lost_blocks"], 0);
    assert_eq!(daemon.call("penstock_volume_list", json!({})).expect("a list"), json!([]), "deleted is deleted");
    daemon.call("penstock_drive_remove", json!({"drive_id": id(1)})).expect("let go");
    assert_eq!(daemon.call("penstock_drive_list", json!({})).expect("a list"), json!([]));
    daemon.terminate();
}
