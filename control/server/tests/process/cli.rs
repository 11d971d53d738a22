//! The real `penstock` command against the real penstock-control: what people and scripts see.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{House, eventually};
use penstock_api::http::NodeView;

/// The command is of another package, so Cargo does not build it for these tests.
fn penstock() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_BIN_EXE_penstock-control")).with_file_name("penstock");
    assert!(path.is_file(), "there is no {}; build it with: cargo build --release -p penstock-cli", path.display());
    path
}

pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn say(house: &House, words: &str) -> Said {
    let mut command = Command::new(penstock());
    let api = format!("unix:{}", house.path("control.sock").display());
    let output = command.args(words.split(' ')).env("PENSTOCK_API", api).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

pub fn said(house: &House, words: &str, part: &str) -> String {
    let said = say(house, words);
    assert!(said.code == 0 && said.out.contains(part), "penstock {words}: {}\n{}\n{}", said.code, said.out, said.err);
    said.out
}

pub fn refused(house: &House, words: &str, code: i32, parts: &[&str]) {
    let said = say(house, words);
    let all = parts.iter().all(|part| said.err.contains(part));
    assert!(said.code == code && all, "penstock {words}: {}\n{}\n{}", said.code, said.out, said.err);
}

#[test]
fn cli_life_of_a_volume() {
    let house = House::new();
    said(&house, "pool ls", "the pool has no drive; add one");
    said(&house, "pool add file:/d0?size=1GiB --oplog 64MiB", "added drive");
    said(&house, "volume create db 64MiB --drive file:/d0", "created volume db of 64MiB");
    let exported = said(&house, "volume export db --nvmf --vhost", "over nvmf at");
    assert!(exported.contains("as nqn.2026-11.io.penstock:") && exported.contains("over vhost"), "{exported}");
    let list = said(&house, "volume ls", "64 MiB");
    let header = "NAME    SIZE  ALLOCATED  BLOCK  REPLICAS  LEADER  EXPORTS";
    assert!(list.starts_with(header), "{list}");
    said(&house, "volume resize db 128MiB", "volume db has 128MiB now");
    said(&house, "volume show db", "128 MiB (134217728 bytes)");
    said(&house, "node show", "yes, desired and observed agree");
    said(&house, "top --once --interval 0.1", "R IOPS");
    said(&house, "scrub file:/d0 start", "running");
    said(&house, "drain", "drained 1 MiB in 3 ms");
    assert_eq!(said(&house, "id new --count 3", "-8001-").lines().count(), 3);

    refused(&house, "volume create db 1MiB", 1, &["a volume named db exists already", "hint: choose another name"]);
    refused(&house, "volume rm db", 1, &["volume db is exported", "hint: `penstock volume unexport db`"]);
    refused(&house, "volume resize db 1MiB", 1, &["smaller", "--allow-shrink"]);
    refused(&house, "pool rm file:/d0", 1, &["holds volumes: db"]);
    refused(&house, "pool add file:/d1?sise=1GiB", 2, &["option \"sise\" does not exist for file drives: they take size"]);
    refused(&house, "volume create x 10gigs", 2, &["\"gigs\""]);
    refused(&house, "volume show no/such", 2, &["neither a volume's name nor its id"]);
    refused(&house, "volume unexport db --vfio-user", 2, &["volume db has no door vfio-user", "it has nvmf=127.0.0.1:4420, vhost"]);

    said(&house, "volume unexport db --vhost", "closed vhost of volume db");
    said(&house, "volume unexport db", "closed nvmf=127.0.0.1:4420 of volume db");
    said(&house, "volume rm db", "removed volume db");
    said(&house, "pool rm file:/d0", "removed drive");
    said(&house, "pool import file:/d0", "imported 1 drives, 0 volumes");
}

#[test]
fn cli_json_on_every_read() {
    let house = House::new();
    said(&house, "pool add file:/d0?size=1GiB", "added");
    said(&house, "volume create db 64MiB", "created");
    let reads = [
        "pool ls",
        "volume ls",
        "volume show db",
        "node show",
        "node ls",
        "replica ls",
        "replica ls db",
        "top --once --interval 0.1",
        "id new",
        "scrub file:/d0",
        "drain",
    ];
    for words in reads {
        let out = said(&house, &format!("{words} -o json"), "");
        let value: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{words}: {error}\n{out}"));
        assert!(value.is_object() || value.is_array(), "{words}: {out}");
    }
}

#[test]
fn cli_waits_for_a_node_that_is_away_and_says_so() {
    let house = House::new();
    said(&house, "pool add file:/d0?size=1GiB", "added");
    house.node.kill();
    eventually("control sees it", || (!house.get::<NodeView>("/v1/node").reachable).then_some(()));
    let parts = ["volume", "is pending: the node is away", "taken in, but not done yet", "penstock node show"];
    refused(&house, "volume create db 64MiB --timeout 0", 4, &parts[2..]);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| say(&house, "volume create db2 64MiB --timeout 30"));
        eventually("taken in", || house.request("GET", "/v1/volumes/db2", Value::Null).status.eq(&200).then_some(()));
        house.node.run();
        let said = waiting.join().unwrap();
        assert!(said.code == 0 && said.out.contains("created volume db2"), "{}{}", said.out, said.err);
        assert!(parts[..2].iter().all(|part| said.err.contains(part)), "{}", said.err);
    });
    house.kill_control();
    refused(&house, "volume ls", 3, &["penstock-control does not answer at unix:", "--api or PENSTOCK_API"]);
}

#[test]
fn cli_over_loopback_and_only_under_local_names() {
    let house = House::without_control();
    let mut control = house.command("state", &[]);
    // The port is free now and taken in a moment; another test may be faster, so several are tried.
    let bound = (0..5).find_map(|_| {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = control.arg("--listen").arg(format!("127.0.0.1:{port}")).spawn().unwrap();
        *house.control.lock().unwrap() = Some(child);
        let up = eventually("control answers or ends", || match std::net::TcpStream::connect(("127.0.0.1", port)) {
            Ok(_) => Some(true),
            Err(_) => house.control.lock().unwrap().as_mut().unwrap().try_wait().unwrap().map(|_| false),
        });
        up.then_some(port)
    });
    let port = bound.expect("one of five ports");
    let run = |api: String| Command::new(penstock()).args(["volume", "ls", "--api", &api]).output().unwrap();
    let output = run(format!("http://127.0.0.1:{port}"));
    assert!(output.status.success(), "{output:?}");
    assert!(run(format!("http://localhost:{port}")).status.success());

    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /v1/volumes HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("is not this machine"), "{answer}");
}
