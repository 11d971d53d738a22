//! What the host and the agent inside the guest say to each other: one JSON object a line, over a virtio-serial port.
//! Requests run side by side; answers come in any order and name their request. Not here: authentication, since the
//! line is a private socket pair of one test.

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries this conversation.
pub const PORT: &str = "penstock.agent";

/// At most this many of the last bytes of each output stream travel back.
pub const OUTPUT_LIMIT: usize = 256 * 1024;

/// Host to guest: run `script` with the guest's shell for at most `limit_ms`.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Request {
    pub id: u64,
    pub script: String,
    pub limit_ms: u64,
}

/// Guest to host.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The agent is up; sent once.
    Hello {
        kernel: String,
    },
    Done(Outcome),
}

/// How a request ended. `status` is the shell's exit status, 128 + n for signal n as shells count it, or `None` when the
/// time was up and the script was killed.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Outcome {
    pub id: u64,
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}
