//! The control daemon: HTTP API, store, reconciler, node agent. The only tokio process of the project.
//!
//! ```text
//!   http ──wish──▶ Control ──commit──▶ store (redb)        http answers when progress is settled or refused
//!                    │ ▲
//!             notify ▼ │ seen, refusals
//!                 reconciler ──steps──▶ node (JSON-RPC over Unix socket) ──▶ penstockd
//! ```
//! Kill it at any moment: what was answered is in the store, what was not may or may not be, and the reconciler
//! brings the node to what the store says. Not here: any decision about what follows from what (penstock-model),
//! and anything on the I/O path.
#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod home;
pub mod http;
pub mod listen;
pub mod metrics;
pub mod node;
pub mod reconciler;
pub mod store;
