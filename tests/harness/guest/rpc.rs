//! A small JSON-RPC 2.0 client for the Unix sockets of SPDK and penstockd, on this host or inside a guest. One call at a
//! time, bounded. Not here: the methods; penstockd's are typed in `penstock-api`, SPDK's are said in JSON.

use super::machine::Machine;
use super::wait::Deadline;
use super::{GuestError, Result};
use penstock_api::rpc::Method;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Formatting or recovering a drive may take a while on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A way to a JSON-RPC server.
pub trait Line {
    fn call(&mut self, method: &str, params: Value) -> Result<Value>;
}

/// A server on this host.
#[derive(Debug, Clone)]
pub struct HostLine {
    pub socket: PathBuf,
}

impl Line for HostLine {
    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        call_json(&self.socket, method, params, LIMIT)
    }
}

/// A server inside a guest, reached through the agent's program there.
pub struct GuestLine<'a> {
    pub machine: &'a mut Machine,
    pub socket: &'a str,
}

impl Line for GuestLine<'_> {
    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        let params = params.to_string();
        assert!(!params.contains('\''), "parameters travel in single quotes: {params}");
        let script = format!("agent call {} {method} '{params}'", self.socket);
        let outcome = self.machine.run(&script, LIMIT + Duration::from_secs(5))?;
        if outcome.status != Some(0) {
            return Err(GuestError::failed(format!("{method} in the guest"), outcome.err.trim()));
        }
        serde_json::from_str(&outcome.out).map_err(|e| GuestError::failed(method, format!("{e}: {}", outcome.out)))
    }
}

/// Calls a method of penstockd.
pub fn call<M: Method>(line: &mut dyn Line, params: &M::Params) -> Result<M::Result> {
    let wrong = |e: serde_json::Error| GuestError::failed(M::NAME, e.to_string());
    let answer = line.call(M::NAME, serde_json::to_value(params).map_err(wrong)?)?;
    serde_json::from_value(answer).map_err(wrong)
}

/// Calls `method` on the server at `socket` and answers its result.
pub fn call_json(socket: &Path, method: &str, params: Value, limit: Duration) -> Result<Value> {
    let answer = ask_json(socket, method, params, limit)?;
    match answer.get("error") {
        Some(error) => Err(GuestError::failed(format!("{method} on {}", socket.display()), error.to_string())),
        None => Ok(answer.get("result").cloned().unwrap_or(Value::Null)),
    }
}

/// Calls `method` and answers the whole response, be it a result or an error.
pub fn ask_json(socket: &Path, method: &str, params: Value, limit: Duration) -> Result<Value> {
    let what = || format!("{method} on {}", socket.display());
    let failed = |why: String| GuestError::failed(what(), why);
    let mut deadline = Deadline::after(limit);
    let mut line = UnixStream::connect(socket).map_err(|e| failed(e.to_string()))?;
    // SPDK refuses `params` that are present and empty for methods without any
    let mut request = json!({"jsonrpc": "2.0", "id": 1, "method": method});
    if params.as_object().is_none_or(|object| !object.is_empty()) {
        request["params"] = params;
    }
    line.write_all(request.to_string().as_bytes()).map_err(|e| failed(e.to_string()))?;

    let mut heard = Vec::new();
    loop {
        // the answer has no length and no terminator: it is whole when it parses
        if let Some(Ok(answer)) = serde_json::Deserializer::from_slice(&heard).into_iter::<Value>().next() {
            return Ok(answer);
        }
        if deadline.passed() {
            return Err(deadline.timeout(format!("an answer to {}", what()), ""));
        }
        line.set_read_timeout(Some(deadline.look().max(Duration::from_millis(1)))).map_err(|e| failed(e.to_string()))?;
        let mut part = [0; 16 * 1024];
        match line.read(&mut part) {
            Ok(0) => return Err(failed("the server closed the socket".into())),
            Ok(got) => heard.extend(&part[..got]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(e) => return Err(failed(e.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn answered_with(parts: &'static [&'static str]) -> Result<Value> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("rpc.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut line, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = line.read(&mut request).unwrap();
                parts.iter().for_each(|part| line.write_all(part.as_bytes()).unwrap());
            });
            call_json(&socket, "m", json!({}), Duration::from_secs(10))
        })
    }

    #[test]
    fn call_answered_in_pieces_gives_the_result() {
        assert_eq!(answered_with(&["{\"id\":1,", "\"result\":", "[1,2]}"]).unwrap(), json!([1, 2]));
    }

    #[test]
    fn call_answered_with_an_error_is_an_error() {
        let said = answered_with(&["{\"id\":1,\"error\":{\"code\":-32601,\"message\":\"Method not found\"}}"]).unwrap_err();
        assert!(said.to_string().contains("Method not found"), "{said}");
    }

    #[test]
    fn call_cut_short_says_that_the_server_closed() {
        assert!(answered_with(&["{\"id\":1,"]).unwrap_err().to_string().contains("closed"));
    }
}
