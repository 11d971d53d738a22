//! Opening drives. Blocking where the kernel is asked; on the app thread, at control events.
//!
//! What is learned here about a barrier is reported, and `drives` decides. Not here: labels.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_uring::{OpenOpts, UringFile};
use penstock_wire::BLOCK;
use spdk_rs::bdev::{Bdev, BdevEvent};

use penstock_api::rpc::Barrier;

/// An SPDK bdev that is used as a drive.
#[derive(Clone, Debug)]
pub struct OpenBdev {
    pub bdev: Bdev,
    pub barrier: Barrier,
    pub volatile: bool,
}

/// An opened drive, shared by all cores. The last clone closes it.
#[derive(Clone, Debug)]
pub struct Backend {
    pub(super) medium: Medium,
    /// Set by the core whose barrier failed. What the drive lost then may be another core's, and a later barrier of that core may be
    /// answered with success: so none counts on any core any more, though the fence that follows takes its way over the app thread.
    barrier_failed: Arc<AtomicBool>,
}

#[derive(Clone, Debug)]
pub(super) enum Medium {
    File(Arc<UringFile>),
    Bdev(OpenBdev),
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("{0}")]
    File(#[from] penstock_uring::OpenError),
    #[error("io_uring cannot be used: {0}")]
    Ring(std::io::Error),
    #[error(
        "there is no bdev \"{name}\" ({errno}). `penstock pool add` makes malloc, nvme and vfio-user drives by itself; bdev: names one that exists already"
    )]
    NoBdev { name: String, errno: spdk_rs::Errno },
    #[error(
        "the bdev \"{name}\" has blocks of {block_size} bytes with {metadata_size} of metadata; a drive needs 512 or 4096 bytes without metadata"
    )]
    Format { name: String, block_size: u32, metadata_size: u32 },
    #[error("SPDK gives no channel to the drive: {0}")]
    Channel(spdk_rs::Errno),
}

impl Backend {
    fn new(medium: Medium) -> Self {
        Self { medium, barrier_failed: Arc::default() }
    }

    /// Whether a barrier that was answered so counts.
    pub(super) fn barrier_counts(&self, ok: bool) -> bool {
        if !ok {
            self.barrier_failed.store(true, Ordering::SeqCst);
        }
        ok && !self.barrier_failed.load(Ordering::SeqCst)
    }

    /// Whole 4 KiB blocks.
    pub fn blocks(&self) -> u64 {
        self.size() / BLOCK as u64
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        match &self.medium {
            Medium::File(file) => file.size(),
            Medium::Bdev(open) => {
                let geometry = open.bdev.geometry();
                geometry.block_count * u64::from(geometry.block_size)
            }
        }
    }

    pub fn barrier(&self) -> Barrier {
        match &self.medium {
            Medium::File(file) => of_uring(file.barrier()),
            Medium::Bdev(open) => open.barrier,
        }
    }

    /// Everything on it is gone with the process or the machine.
    pub fn is_volatile(&self) -> bool {
        match &self.medium {
            Medium::File(file) => file.is_volatile(),
            Medium::Bdev(open) => open.volatile,
        }
    }
}

/// The barrier that a drive is used with. The operator's word that it is power-safe, and that nothing on it is to last, count
/// where no flush reaches it; one that does is used whatever was said.
pub fn barrier_in_use(of_drive: Barrier, power_safe: bool, volatile: bool) -> Barrier {
    match of_drive {
        Barrier::Missing if power_safe || volatile => Barrier::NoneNeeded,
        found => found,
    }
}

/// What a file would be that is made at `path`.
///
/// # Errors
/// What `penstock_uring` says of its directory.
pub fn prospect(path: &str) -> Result<(Barrier, bool), BackendError> {
    let (barrier, volatile) = UringFile::prospect(path)?;
    Ok((of_uring(&barrier), volatile))
}

fn of_uring(barrier: &penstock_uring::Barrier) -> Barrier {
    match barrier {
        penstock_uring::Barrier::Flush => Barrier::Flush,
        penstock_uring::Barrier::NotNeeded => Barrier::NoneNeeded,
        penstock_uring::Barrier::Missing { .. } => Barrier::Missing,
    }
}

/// Opens a file or block device.
///
/// # Errors
/// What `penstock_uring` says of it.
pub fn open_file(path: &str, size: Option<u64>) -> Result<Backend, BackendError> {
    Ok(Backend::new(Medium::File(UringFile::open(path, &OpenOpts { size, ..Default::default() })?)))
}

/// Opens a bdev on the app thread. `on_event` runs there.
///
/// # Errors
/// When there is none of that name, or its format cannot serve.
pub fn open_bdev(name: &str, barrier: Barrier, volatile: bool, on_event: impl Fn(BdevEvent) + 'static) -> Result<Backend, BackendError> {
    let bdev = Bdev::open(name, true, on_event).map_err(|errno| BackendError::NoBdev { name: name.to_owned(), errno })?;
    let geometry = bdev.geometry();
    if !matches!(geometry.block_size, 512 | 4096) || geometry.metadata_size != 0 {
        let (block_size, metadata_size) = (geometry.block_size, geometry.metadata_size);
        return Err(BackendError::Format { name: name.to_owned(), block_size, metadata_size });
    }
    // SPDK's NVMe driver says whether the drive has a volatile cache, and with enable_flush set its flushes reach the drive. Of
    // other modules nothing is known, but for those that are memory.
    let (barrier, volatile) = match bdev.module_name().as_str() {
        "nvme" if geometry.write_cache => (Barrier::Flush, volatile),
        "nvme" => (Barrier::NoneNeeded, volatile),
        "malloc" | "null" => (Barrier::NoneNeeded, true),
        _ => (barrier, volatile),
    };
    Ok(Backend::new(Medium::Bdev(OpenBdev { bdev, barrier, volatile })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn barrier_that_failed_on_one_core_counts_on_none_until_the_drive_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        let open = |size| open_file(path.to_str().unwrap(), size).unwrap();
        let one = open(Some(1 << 20));
        let other = one.clone();
        assert!(one.barrier_counts(true) && other.barrier_counts(true));
        assert!(!one.barrier_counts(false));
        assert!(!other.barrier_counts(true), "it may not hold what the other core's wrote");
        drop((one, other));
        assert!(open(None).barrier_counts(true));
    }

    #[test]
    fn power_safe_stands_in_for_a_barrier_that_is_missing_and_for_no_other() {
        for (of_drive, power_safe, volatile, in_use) in [
            (Barrier::Flush, false, false, Barrier::Flush),
            (Barrier::Flush, true, false, Barrier::Flush),
            (Barrier::Flush, true, true, Barrier::Flush),
            (Barrier::NoneNeeded, false, false, Barrier::NoneNeeded),
            (Barrier::Missing, false, false, Barrier::Missing),
            (Barrier::Missing, true, false, Barrier::NoneNeeded),
            (Barrier::Missing, false, true, Barrier::NoneNeeded),
        ] {
            assert_eq!(barrier_in_use(of_drive, power_safe, volatile), in_use, "{of_drive:?} {power_safe} {volatile}");
        }
    }
}
