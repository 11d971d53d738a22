//! Where a benchmark works: a temporary directory, the SPDK tree with its peers, and our own programs.

use std::path::{Path, PathBuf};

/// Why a benchmark cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("no SPDK at {0}: run `make spdk`, or set SPDK_DIR to a built tree")]
    NoSpdk(PathBuf),
    #[error("{0} is missing; build SPDK with its examples and apps (`make spdk` does)")]
    NoPeer(PathBuf),
    #[error("{0} is missing: run `make build`")]
    NoProgram(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// The place and the programs.
pub struct Lab {
    directory: PathBuf,
    spdk: PathBuf,
    programs: PathBuf,
}

fn spdk_tree() -> PathBuf {
    if let Some(tree) = std::env::var_os("SPDK_DIR") {
        return tree.into();
    }
    let cache = std::env::var_os("PENSTOCK_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/penstock"));
    cache.join("spdk")
}

impl Lab {
    /// Makes the directory, removed when dropped. `scratch`: where large files go; the system's temporary directory if not given.
    pub fn open(scratch: Option<&Path>) -> Result<Self, LabError> {
        let spdk = spdk_tree();
        if !spdk.join("build/bin/spdk_tgt").exists() {
            return Err(LabError::NoSpdk(spdk));
        }
        let base = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        let io = |source| LabError::Io { path: base.clone(), source };
        let directory = crate::scratch::directory(&base, "penstock-ratio").map_err(io)?;
        let own = std::env::current_exe().map_err(io)?;
        let programs = own.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Self { directory, spdk, programs })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A new directory in it.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.path(name);
        std::fs::create_dir_all(&path).map_err(|source| LabError::Io { path: path.clone(), source })?;
        Ok(path)
    }

    /// A program of SPDK's build, such as `build/bin/spdk_tgt`.
    pub fn peer(&self, relative: &str) -> Result<PathBuf, LabError> {
        let path = self.spdk.join(relative);
        if path.exists() { Ok(path) } else { Err(LabError::NoPeer(path)) }
    }

    /// A program of ours, beside this one.
    pub fn program(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.programs.join(name);
        if path.exists() { Ok(path) } else { Err(LabError::NoProgram(path)) }
    }

    /// A file of `bytes`, written in full: a sparse one would measure the file system's allocator.
    pub fn full_file(&self, name: &str, bytes: u64) -> Result<PathBuf, LabError> {
        use std::io::Write;
        let path = self.path(name);
        let io = |source| LabError::Io { path: path.clone(), source };
        let mut file = std::fs::File::create(&path).map_err(io)?;
        let chunk = vec![0u8; 1 << 20];
        for _ in 0..bytes >> 20 {
            file.write_all(&chunk).map_err(io)?;
        }
        file.sync_all().map_err(io)?;
        Ok(path)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
