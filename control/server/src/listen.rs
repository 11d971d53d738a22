//! Binds the API's address. A socket file left by a killed process is taken over; one that somebody serves is not.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use axum::Router;
use tokio::net::{TcpListener, UnixListener};

use crate::config::Listen;
use crate::home;

pub enum Bound {
    Unix(UnixListener, SocketFile),
    Loopback(TcpListener),
}

/// Removes the socket's file when serving ends.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nothing can be done about it on the way out; the next start takes a stale file over.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("another process serves {0}: stop it, or choose another --listen")]
    Taken(PathBuf),
    #[error("{path} exists and is not a socket: remove it, or choose another --listen")]
    NotASocket { path: PathBuf },
    #[error("cannot listen on {at}: {source}")]
    Io { at: String, source: io::Error },
}

async fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let io = |source| ListenError::Io { at: path.display().to_string(), source };
    let meta = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io)?,
    };
    if !std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match tokio::net::UnixStream::connect(path).await {
        Ok(_) => Err(ListenError::Taken(path.to_owned())),
        Err(_) => std::fs::remove_file(path).map_err(io),
    }
}

pub async fn bind(listen: &Listen) -> Result<Bound, ListenError> {
    match listen {
        Listen::Unix(path) => {
            let io = |source| ListenError::Io { at: path.display().to_string(), source };
            if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
                home::make_dir(dir).map_err(io)?;
            }
            clear_stale(path).await?;
            let listener = UnixListener::bind(path).map_err(io)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
            Ok(Bound::Unix(listener, SocketFile(path.clone())))
        }
        Listen::Loopback(address) => {
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|source| ListenError::Io { at: address.to_string(), source })?;
            Ok(Bound::Loopback(listener))
        }
    }
}

impl Bound {
    /// As the flag would say it, with the port that was chosen.
    pub fn address(&self) -> String {
        match self {
            Self::Unix(_, file) => format!("unix:{}", file.0.display()),
            Self::Loopback(listener) => listener.local_addr().map(|a| a.to_string()).unwrap_or_else(|e| e.to_string()),
        }
    }

    /// Serves until `shutdown` ends, then finishes the requests that are under way.
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        match self {
            Self::Unix(listener, _file) => axum::serve(listener, router).with_graceful_shutdown(shutdown).await,
            Self::Loopback(listener) => axum::serve(listener, router).with_graceful_shutdown(shutdown).await,
        }
    }
}
