//! A small JSON-RPC 2.0 client for the Unix sockets of SPDK and penstockd. One call at a time, bounded.
//! Not here: typed methods; tests say what they call in JSON.

use super::wait::Deadline;
use super::{GuestError, Result};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Calls `method` on the server at `socket` and answers its result.
pub fn call(socket: &Path, method: &str, params: Value, limit: Duration) -> Result<Value> {
    let what = || format!("{method} on {}", socket.display());
    let failed = |why: String| GuestError::failed(what(), why);
    let deadline = Deadline::after(limit);
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
            return match answer.get("error") {
                Some(error) => Err(failed(error.to_string())),
                None => Ok(answer.get("result").cloned().unwrap_or(Value::Null)),
            };
        }
        let left = deadline.left();
        if left.is_zero() {
            return Err(deadline.timeout(format!("an answer to {}", what()), ""));
        }
        line.set_read_timeout(Some(left)).map_err(|e| failed(e.to_string()))?;
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
            call(&socket, "m", json!({}), Duration::from_secs(10))
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
