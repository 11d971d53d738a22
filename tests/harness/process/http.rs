//! The HTTP that tests speak to penstock-control: one request a connection, sent byte for byte as given. Not here: TLS,
//! chunked answers (control sends none), keep-alive.

use super::{Result, failed};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).map_err(|e| failed("an answer's body", format!("{e}: {}", self.text())))
    }
}

/// A well-formed request.
pub fn request(socket: &Path, method: &str, path: &str, body: &[u8], limit: Duration) -> Result<Answer> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let answer = exchange(socket, &[head.as_bytes(), body].concat(), limit)?;
    answer.ok_or_else(|| failed(format!("{method} {path}"), "the connection was closed without an answer"))
}

/// Sends any bytes, and reads to the end of the connection. `None` if it is closed without an answer.
pub fn exchange(socket: &Path, bytes: &[u8], limit: Duration) -> Result<Option<Answer>> {
    let wrong = |e: std::io::Error| failed(socket.display().to_string(), e.to_string());
    let mut line = UnixStream::connect(socket).map_err(wrong)?;
    line.set_read_timeout(Some(limit)).map_err(wrong)?;
    line.set_write_timeout(Some(limit)).map_err(wrong)?;
    let _ = line.write_all(bytes); // refused half-way is an answer too
    let mut heard = Vec::new();
    // An answer before all was read ends in a reset; what came before that is the answer.
    let end = line.read_to_end(&mut heard);
    match (parse(&heard), end) {
        (Some(answer), _) => Ok(Some(answer)),
        (None, Err(e)) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            Err(failed(format!("an answer within {limit:?}"), String::from_utf8_lossy(&heard)))
        }
        (None, _) if heard.is_empty() => Ok(None),
        (None, _) => Err(failed("an answer", format!("not HTTP: {}", String::from_utf8_lossy(&heard)))),
    }
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, body: bytes[end + 4..].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_answer_is_split_into_status_and_body() {
        let answer = parse(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}").unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (404, "{}"));
        assert!(parse(b"HTTP/1.1 404 Not").is_none() && parse(b"SSH-2.0-x\r\n\r\n").is_none());
    }
}
