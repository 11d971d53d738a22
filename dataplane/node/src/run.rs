//! The daemon from its first line to its last: directories, log, SPDK, the node.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use spdk_rs::app::{App, AppError, LogLevel as SpdkLevel};

use crate::config::{Config, LogLevel, Poll};
use crate::node::{self, Node, Ready};

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("cannot make the run directory {}: {error}. Name one that can be written with --run-dir", path.display())]
    RunDir { path: PathBuf, error: std::io::Error },
    #[error("signals cannot be taken: {0}")]
    Signals(std::io::Error),
    #[error("SPDK refuses a method of ours: {0}")]
    Rpc(spdk_rs::Errno),
    #[error("{0}")]
    App(#[from] AppError),
}

/// A directory for sockets that mean root: for its owner alone.
fn private_dir(path: &Path) -> Result<(), RunError> {
    let wrap = |error| RunError::RunDir { path: path.to_owned(), error };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(wrap)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(wrap)
}

/// Runs until told to stop.
///
/// # Errors
/// When it cannot start, saying what to do.
pub fn run(config: Config) -> Result<(), RunError> {
    launch(config, Box::new(|_| ()))
}

/// As [`run`]; `ready` is called on the app thread when the node serves.
pub(crate) fn launch(config: Config, ready: Ready) -> Result<(), RunError> {
    crate::core::quarantine::watch_panics();
    for dir in [config.run_dir.clone(), config.vhost_dir(), config.vfio_user_dir()] {
        private_dir(&dir)?;
    }
    // A socket that a killed penstockd left; two that live are told apart by SPDK's lock file beside it.
    let socket = config.rpc_socket();
    node::take_signals().map_err(RunError::Signals)?;
    node::register_rpc().map_err(RunError::Rpc)?;

    let cores: Vec<String> = config.cores.iter().map(u32::to_string).collect();
    let mut app = App::new("penstockd")
        .core_mask(format!("[{}]", cores.join(",")))
        .interrupt_mode(config.poll == Poll::Adaptive)
        .rpc_socket(socket)
        .log_level(match config.log_level {
            LogLevel::Error => SpdkLevel::Error,
            LogLevel::Warn => SpdkLevel::Warn,
            LogLevel::Info => SpdkLevel::Notice,
            LogLevel::Debug => SpdkLevel::Info,
            LogLevel::Trace => SpdkLevel::Debug,
        })
        .log(|line| match line.level {
            // A peer that is away is told in words of ours, once.
            SpdkLevel::Error if line.text.starts_with("connect() failed") => tracing::debug!(target: "spdk", "{}", line.text),
            SpdkLevel::Error => tracing::error!(target: "spdk", file = line.file, line = line.line, "{}", line.text),
            SpdkLevel::Warn => tracing::warn!(target: "spdk", file = line.file, line = line.line, "{}", line.text),
            SpdkLevel::Notice => tracing::info!(target: "spdk", file = line.file, line = line.line, "{}", line.text),
            SpdkLevel::Info => tracing::debug!(target: "spdk", file = line.file, line = line.line, "{}", line.text),
            SpdkLevel::Debug => tracing::trace!(target: "spdk", file = line.file, line = line.line, "{}", line.text),
        })
        .on_shutdown(|| {
            if let Some(node) = node::current() {
                node.stop("SPDK's request");
            }
        });
    if config.no_huge {
        app = app.no_hugepages().no_pci();
    } else {
        // What drives over vfio-user need: their other end maps our memory by file.
        app = app.single_file_segments().unnamed_hugepages();
    }
    if let Some(mib) = config.mem_mib {
        app = app.memory_mib(mib);
    }
    app.run(move || {
        if let Err(error) = Node::start(config, ready) {
            tracing::error!(%error, "penstockd does not start");
            spdk_rs::app::stop(1);
        }
    })?;
    Ok(())
}
