//! Fuzz targets over every parser of bytes that others write, each a function of the input bytes that panics on a find.
//!
//! `records` takes single on-disk records, `peer` frames between nodes, `store` whole stores over damaged media, `api` what comes over sockets and from
//! people's keyboards, `config` penstockd's file and flags. Not here: the front doors' bytes (NVMe/TCP, vhost-user), which
//! SPDK parses; the process tests send malformed ones to a running penstockd.
//!
//! Adding a target: a module here with `run` and `seeds`, a file under targets/, its `[[bin]]`, and its name in
//! scripts/fuzz.sh.

#![forbid(unsafe_code)]

pub mod api;
pub mod bytes;
pub mod config;
pub mod content;
pub mod damage;
pub mod image;
pub mod machine;
pub mod peer;
pub mod records;
pub mod seeds;
pub mod store;

// What others have already: the engine's plain memory, wire's samples.
#[path = "../../../dataplane/engine/tests/bench/memory.rs"]
pub mod plain_memory;
#[path = "../../../dataplane/wire/tests/sample/mod.rs"]
pub mod sample;
// penstockd's own module, built here without the daemon's SPDK.
#[path = "../../../dataplane/node/src/config/mod.rs"]
pub mod node_config;
