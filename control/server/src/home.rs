//! Where control's state lives: the directory, made for its owner alone, and what tells it from a copy.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use penstock_model::issuer::Home;

pub const STORE_FILE: &str = "control.redb";

/// Makes the directory if it is absent, with mode 0700.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

pub fn store_path(state_dir: &Path) -> PathBuf {
    state_dir.join(STORE_FILE)
}

/// Reads where the store file lies now. It must exist.
pub fn found(state_dir: &Path) -> io::Result<Home> {
    let inode = fs::metadata(store_path(state_dir))?.ino();
    Ok(Home { machine: machine(), inode })
}

/// The operating system's installation. Machines cloned with their disks share it: that is beyond what one machine
/// can notice, and shows when both claim the same node.
fn machine() -> String {
    fs::read_to_string("/etc/machine-id").map(|text| text.trim().to_owned()).unwrap_or_default()
}
