//! Starts the real penstock-control beside a fake node, and speaks HTTP to it. Every wait is bounded.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use penstock_api::http::{ApiError, NodeView};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::fake::{FakeNode, Groups};

/// Far more than anything takes; a test that waits so long has failed.
pub const LIMIT: Duration = Duration::from_secs(30);

pub struct House {
    pub dir: tempfile::TempDir,
    pub node: FakeNode,
    /// Further nodes, n2 and so on; `node` is n1 then.
    pub others: Vec<FakeNode>,
    pub control: Arc<Mutex<Option<Child>>>,
    wait_ms: u64,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json<T: DeserializeOwned>(&self) -> T {
        let text = || String::from_utf8_lossy(&self.body).into_owned();
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("status {}: {error}: {}", self.status, text()))
    }

    pub fn error(&self) -> ApiError {
        assert!(self.status >= 400, "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Looks again and again, until there is an answer or the limit has passed.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl House {
    pub fn new() -> Self {
        let house = Self::without_control();
        house.start_control(&[]);
        house
    }

    pub fn without_control() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = FakeNode::start(&dir.path().join("node.sock"));
        Self { dir, node, others: Vec::new(), control: Arc::default(), wait_ms: 10_000 }
    }

    /// Three nodes, n1 to n3, under one control.
    pub fn of_three() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let groups = Groups::default();
        let start = |n: u16| FakeNode::start_in(&dir.path().join(format!("n{n}.sock")), Arc::clone(&groups));
        let (node, others) = (start(1), vec![start(2), start(3)]);
        let house = Self { dir, node, others, control: Arc::default(), wait_ms: 10_000 };
        house.start_control(&[]);
        house
    }

    pub fn node(&self, n: usize) -> &FakeNode {
        if n == 1 { &self.node } else { &self.others[n - 2] }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, state: &str, extra: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-control"));
        command
            .arg("--state-dir")
            .arg(self.path(state))
            .args(self.node_flags())
            .arg("--listen")
            .arg(format!("unix:{}", self.path("control.sock").display()))
            .args(["--period-ms", "50", "--wait-ms", &self.wait_ms.to_string()])
            .args(extra)
            .stdin(Stdio::null())
            .stderr(std::fs::OpenOptions::new().create(true).append(true).open(self.path("control.log")).unwrap());
        command
    }

    fn node_flags(&self) -> Vec<String> {
        if self.others.is_empty() {
            return vec!["--node-socket".to_owned(), self.path("node.sock").display().to_string()];
        }
        let flag = |n: usize| {
            let socket = self.path(&format!("n{n}.sock"));
            ["--node".to_owned(), format!("n{n}={},peer=127.0.0.1:{},nvmf=127.0.0.{n}:4420", socket.display(), 7700 + n)]
        };
        (1..=1 + self.others.len()).flat_map(flag).collect()
    }

    pub fn start_control(&self, extra: &[&str]) {
        let child = self.command("state", extra).spawn().unwrap();
        *self.control.lock().unwrap() = Some(child);
        eventually("control answers", || self.try_request("GET", "/healthz", b"").map(|_| ()));
    }

    /// kill -9.
    pub fn kill_control(&self) {
        if let Some(mut child) = self.control.lock().unwrap().take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Answers the exit code.
    pub fn stop_control(&self) -> Option<i32> {
        let mut child = self.control.lock().unwrap().take().unwrap();
        assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
        let status = eventually("control leaves", || child.try_wait().unwrap());
        status.code()
    }

    /// `None` when control died before it answered.
    pub fn try_request(&self, method: &str, path: &str, body: &[u8]) -> Option<Answer> {
        let mut stream = UnixStream::connect(self.path("control.sock")).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        let _ = stream.write_all(body);
        let mut bytes = Vec::new();
        // An answer before the whole body was read ends in a reset; what came before it is the answer.
        let _ = stream.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(&bytes[..end]).ok()?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        assert!(!chunked, "answers are of known length");
        Some(Answer { status, body: bytes[end + 4..].to_vec() })
    }

    pub fn request(&self, method: &str, path: &str, body: Value) -> Answer {
        let bytes = if body.is_null() { vec![] } else { serde_json::to_vec(&body).unwrap() };
        self.try_request(method, path, &bytes).unwrap_or_else(|| panic!("{method} {path}: no answer; log:\n{}", self.log()))
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        self.request("GET", path, Value::Null).json()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("control.log")).unwrap_or_default()
    }

    pub fn settle(&self) {
        eventually("desired and observed agree", || {
            let answer = self.try_request("GET", "/v1/nodes", b"")?;
            answer.json::<Vec<NodeView>>().iter().all(|node| node.settled).then_some(())
        });
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.kill_control();
        self.node.kill();
        self.others.iter().for_each(FakeNode::kill);
        if std::thread::panicking() {
            eprintln!("log of control:\n{}", self.log());
        }
    }
}
