//! A small blocking client for SPDK's JSON-RPC 2.0 over a Unix socket: one call at a time, every wait bounded.
//!
//! Used to shape peers and our own process (attach a controller, make a bdev); never on an I/O's way.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    #[error("{socket}: {source}; is the process running, and is this its --rpc socket?")]
    Connect { socket: PathBuf, source: std::io::Error },
    #[error("{socket}: {method} was not answered: {source}")]
    Transport { socket: PathBuf, method: String, source: std::io::Error },
    #[error("{method} was refused with {code}: {message}")]
    Refused { method: String, code: i64, message: String },
    #[error("{method} was answered with something that is no JSON-RPC response: {text}")]
    Malformed { method: String, text: String },
}

/// Longest answer taken, in bytes.
const ANSWER_MAX: usize = 16 << 20;

/// A connection.
pub struct RpcClient {
    socket: PathBuf,
    stream: UnixStream,
    next_id: u64,
}

impl RpcClient {
    pub fn connect(socket: &Path) -> Result<Self, RpcError> {
        let stream = UnixStream::connect(socket).map_err(|source| RpcError::Connect { socket: socket.to_owned(), source })?;
        Ok(Self { socket: socket.to_owned(), stream, next_id: 1 })
    }

    /// Connects to a process that may still be starting.
    pub fn connect_within(socket: &Path, limit: Duration) -> Result<Self, RpcError> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::connect(socket) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                outcome => return outcome,
            }
        }
    }

    /// One call; waits up to `limit` for its answer.
    pub fn call(&mut self, method: &str, params: &Value, limit: Duration) -> Result<Value, RpcError> {
        let id = self.next_id;
        self.next_id += 1;
        let fail = |socket: &Path, source| RpcError::Transport { socket: socket.to_owned(), method: method.to_owned(), source };
        let mut request = json!({"jsonrpc": "2.0", "id": id, "method": method});
        // SPDK refuses an empty object where a method takes no parameters.
        if params.as_object().is_none_or(|params| !params.is_empty()) && !params.is_null() {
            request["params"] = params.clone();
        }
        let bytes = serde_json::to_vec(&request).expect("a JSON value has an encoding");
        self.stream.write_all(&bytes).map_err(|source| fail(&self.socket, source))?;
        let answer = self.receive(method, limit)?;
        if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
            return Err(RpcError::Refused {
                method: method.to_owned(),
                code: error["code"].as_i64().unwrap_or(0),
                message: error["message"].as_str().unwrap_or("no message").to_owned(),
            });
        }
        if answer["id"].as_u64() != Some(id) {
            return Err(RpcError::Malformed { method: method.to_owned(), text: answer.to_string() });
        }
        Ok(answer["result"].clone())
    }

    fn receive(&mut self, method: &str, limit: Duration) -> Result<Value, RpcError> {
        let fail = |source| RpcError::Transport { socket: self.socket.clone(), method: method.to_owned(), source };
        let deadline = Instant::now() + limit;
        let mut bytes = Vec::new();
        let mut chunk = [0; 16384];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("no answer within {} s", limit.as_secs_f64());
                return Err(fail(std::io::Error::new(std::io::ErrorKind::TimedOut, text)));
            }
            self.stream.set_read_timeout(Some(left)).map_err(fail)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(fail(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => continue,
                Err(error) => return Err(fail(error)),
            }
            let mut values = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>();
            match values.next() {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(error)) if error.is_eof() && bytes.len() < ANSWER_MAX => {}
                None => {}
                Some(Err(_)) => {
                    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
                    return Err(RpcError::Malformed { method: method.to_owned(), text });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Answers one request with the given chunks.
    fn server(chunks: Vec<&'static str>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rpc.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            for chunk in chunks {
                stream.write_all(chunk.as_bytes()).unwrap();
            }
            let _ = stream.read(&mut request); // until the client closes
        });
        (dir, path)
    }

    fn call(chunks: Vec<&'static str>, limit: Duration) -> Result<Value, RpcError> {
        let (_dir, path) = server(chunks);
        RpcClient::connect(&path).unwrap().call("bdev_get", &json!({"name": "a"}), limit)
    }

    #[test]
    fn answer_that_comes_in_pieces_is_put_together() {
        let answer = call(vec!["{\"jsonrpc\":\"2.0\",\"id\":1,", "\"result\":[1,", "2]}"], Duration::from_secs(5));
        assert_eq!(answer.unwrap(), json!([1, 2]));
    }

    #[test]
    fn refusal_keeps_code_and_message() {
        let answer = call(vec![r#"{"id":1,"error":{"code":-19,"message":"No such device"}}"#], Duration::from_secs(5));
        assert_eq!(answer.unwrap_err().to_string(), "bdev_get was refused with -19: No such device");
    }

    #[test]
    fn silence_ends_at_the_limit() {
        let answer = call(vec![], Duration::from_millis(50));
        assert!(answer.unwrap_err().to_string().contains("no answer within 0.05 s"));
    }

    #[test]
    fn nonsense_is_shown() {
        assert!(call(vec!["hello"], Duration::from_secs(5)).unwrap_err().to_string().contains("hello"));
    }

    #[test]
    fn absent_socket_is_named() {
        let error = RpcClient::connect(Path::new("/nonexistent/rpc.sock")).err().unwrap();
        assert!(error.to_string().contains("/nonexistent/rpc.sock"));
    }
}
