//! The node agent: JSON-RPC calls to penstockd over its Unix socket.
//!
//! A connection carries one call at a time and is kept for the next; calls beside each other take several. Every
//! method is idempotent, so a call on a kept connection that turns out dead is sent once more on a new one.
//! Not here: when to call what (reconciler).

mod framing;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use penstock_api::rpc::{self, ErrorCode, Method, Response, RpcError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use framing::Framing;

/// Most connections kept between calls.
const KEPT_MAX: usize = 4;
/// Longest answer accepted: far above any list of ours, below what would hurt.
pub const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Why a call has no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// Nobody is there: no connection, or it ended before an answer.
    #[error("{0}")]
    Away(String),
    /// It is there and does not answer in time. What became of the call is unknown.
    #[error("{method} was not answered within {seconds} s")]
    Slow { method: &'static str, seconds: u64 },
    /// It answered, and refused.
    #[error(transparent)]
    Refused(#[from] RpcError),
}

impl CallError {
    /// As the node would say it.
    pub fn into_rpc(self) -> RpcError {
        match self {
            Self::Refused(error) => error,
            other => RpcError::new(ErrorCode::NotReady, other.to_string()),
        }
    }
}

#[derive(Debug)]
pub struct NodeClient {
    socket: PathBuf,
    kept: Mutex<Vec<UnixStream>>,
    next_id: std::sync::atomic::AtomicU64,
}

/// How long a method may take. Opening a drive reads its log, draining writes it all.
fn limit(method: &str) -> Duration {
    Duration::from_secs(match method {
        "penstock_drive_add" | "penstock_drain" => 120,
        "penstock_volume_delete" | "penstock_drive_remove" | "penstock_export_remove" => 30,
        _ => 10,
    })
}

impl NodeClient {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), kept: Mutex::default(), next_id: 1.into() }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn call<M: Method>(&self, params: &M::Params) -> Result<M::Result, CallError> {
        let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let request = rpc::encode_request::<M>(id, params)?;
        let limit = limit(M::NAME);
        let answer = timeout(limit, self.exchange(id, &request)).await;
        let response = answer.map_err(|_| CallError::Slow { method: M::NAME, seconds: limit.as_secs() })??;
        Ok(rpc::decode_response::<M>(response)?)
    }

    async fn exchange(&self, id: u64, request: &[u8]) -> Result<Response, CallError> {
        let kept = self.kept.lock().expect("no panic while held").pop();
        if let Some(stream) = kept
            && let Ok(response) = self.exchange_on(stream, id, request).await
        {
            return Ok(response);
        }
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| CallError::Away(format!("penstockd does not answer at {}: {error}", self.socket.display())))?;
        self.exchange_on(stream, id, request).await
    }

    async fn exchange_on(&self, mut stream: UnixStream, id: u64, request: &[u8]) -> Result<Response, CallError> {
        let broken = |error: std::io::Error| CallError::Away(format!("the connection to penstockd broke: {error}"));
        stream.write_all(request).await.map_err(broken)?;
        let mut bytes = Vec::with_capacity(4096);
        let mut framing = Framing::default();
        while !framing.is_whole() {
            let start = bytes.len();
            if stream.read_buf(&mut bytes).await.map_err(broken)? == 0 {
                return Err(CallError::Away("penstockd closed the connection before it answered".to_owned()));
            }
            if bytes.len() > ANSWER_BYTES_MAX {
                return Err(CallError::Away(format!("penstockd's answer is longer than {ANSWER_BYTES_MAX} bytes")));
            }
            framing.scan(&bytes[start..]);
        }
        let response: Response =
            serde_json::from_slice(&bytes).map_err(|error| CallError::Away(format!("penstockd's answer is not JSON-RPC: {error}")))?;
        if response.id.is_some_and(|answered| answered != id) {
            return Err(CallError::Away(format!("penstockd answered call {:?}, not {id}", response.id)));
        }
        let mut kept = self.kept.lock().expect("no panic while held");
        if kept.len() < KEPT_MAX {
            kept.push(stream);
        }
        Ok(response)
    }
}
