//! A drive for a guest that records every write and flush: QEMU's NVMe controller over `blklogwrites`, and a second,
//! virtio device on the same recording drive for the ack journal (see [`super::acks`]).
//! Not here: reading the log ([`super::writelog`]) and rebuilding images ([`super::replay`]).

use super::machine::Machine;
use super::writelog::WriteLog;
use super::{At, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOG_SECTOR: u32 = 512;
const JOURNAL_BYTES: u64 = 16 << 20;

/// Where the two devices of a logged drive are found inside the guest, by QEMU's fixed slots.
pub const NVME_ADDRESS: &str = "0000:00:10.0";
pub const JOURNAL_DEVICE: &str = "/dev/vda";

/// Takes the NVMe controller from the guest's kernel and gives it to uio, for a driver in user space.
pub fn bind_uio(machine: &mut Machine) -> Result<()> {
    let device = format!("/sys/bus/pci/devices/{NVME_ADDRESS}");
    let script = format!(
        "set -e; [ ! -e {device}/driver ] || echo {NVME_ADDRESS} > {device}/driver/unbind; \
         echo uio_pci_generic > {device}/driver_override; echo {NVME_ADDRESS} > /sys/bus/pci/drivers/uio_pci_generic/bind; \
         ls /dev/uio0"
    );
    machine.shell(&script, Duration::from_secs(30)).map(drop)
}

/// Files of one logged drive, in a directory of the caller's.
#[derive(Debug)]
pub struct LoggedDrive {
    image: PathBuf,
    log: PathBuf,
    /// What the system under test sees, in bytes.
    pub size: u64,
}

impl LoggedDrive {
    /// An empty drive of `size` bytes.
    pub fn create(dir: &Path, size: u64) -> Result<Self> {
        assert!(size.is_multiple_of(1 << 20), "whole MiB, so that the journal begins on any sector size");
        let drive = LoggedDrive { image: dir.join("drive.img"), log: dir.join("drive.log"), size };
        let image = std::fs::File::create(&drive.image).at("create", &drive.image)?;
        image.set_len(size + JOURNAL_BYTES).at("size", &drive.image)?;
        std::fs::File::create(&drive.log).at("create", &drive.log)?;
        Ok(drive)
    }

    /// The journal is what lies beyond.
    pub fn journal_begins(&self) -> u64 {
        self.size
    }

    /// QEMU arguments. Both devices stand on the one node `recorded`, so its log orders them; each has a slice of it.
    pub fn devices(&self) -> Vec<String> {
        let (image, log, size) = (self.image.display(), self.log.display(), self.size);
        [
            "-blockdev".to_owned(),
            format!("driver=file,node-name=image,filename={image},discard=unmap"),
            "-blockdev".to_owned(),
            format!("driver=file,node-name=log,filename={log}"),
            "-blockdev".to_owned(),
            format!("driver=blklogwrites,node-name=recorded,file=image,log=log,log-sector-size={LOG_SECTOR},discard=unmap"),
            "-blockdev".to_owned(),
            format!("driver=raw,node-name=data,file=recorded,offset=0,size={size},discard=unmap"),
            "-blockdev".to_owned(),
            format!("driver=raw,node-name=journal,file=recorded,offset={size},size={JOURNAL_BYTES}"),
            "-device".to_owned(),
            "nvme,serial=recorded,drive=data,share-rw=on,addr=10.0".to_owned(),
            "-device".to_owned(),
            "virtio-blk-pci,drive=journal,share-rw=on,addr=11.0".to_owned(),
        ]
        .to_vec()
    }

    pub fn read_log(&self) -> Result<WriteLog> {
        WriteLog::open(&self.log, LOG_SECTOR)
    }
}
